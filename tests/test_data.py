"""From a file to batches: every token a target in every pass, every bad file a sentence."""

from __future__ import annotations

import functools
import hashlib
import http.server
import os
import socket
import threading

import numpy as np
import pytest
import torch
from conftest import PLAY
from hypothesis import given, settings
from hypothesis import strategies as st

import train

# ---- batches ----


def batcher_of(n_tokens, batch_size, seq_len, **options):
    return train.TokenBatcher(np.arange(n_tokens), batch_size, seq_len, **options)


def one_pass(batcher):
    return [batcher.next_batch() for _ in range(batcher.n_batches)]


def test_tiny_shakespeare_at_4_x_256_has_331_batches():
    assert batcher_of(338_025, 4, 256).n_batches == 331


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 100), st.booleans())
def test_every_token_is_a_target_in_every_pass(batch_size, seq_len, extra, shuffle):
    n_tokens = batch_size * seq_len + 1 + extra
    batcher = batcher_of(n_tokens, batch_size, seq_len, shuffle=shuffle, seed=extra)
    for _ in range(2):
        targets = torch.cat([targets.flatten() for _, targets in one_pass(batcher)])
        assert set(targets.tolist()) == set(range(1, n_tokens))
    unique = sum(batcher.batch_tokens - batcher.repeated(i) for i in range(batcher.n_batches))
    assert unique == n_tokens - 1


def test_targets_are_the_next_tokens_across_window_borders():
    batcher = batcher_of(100, 2, 8)
    for idx, targets in one_pass(batcher):
        assert idx.shape == targets.shape == (2, 8)
        assert torch.equal(targets, idx + 1)
    first, second = batcher.batch(0)[1], batcher.batch(1)[0]
    assert second[0, 0] == first[-1, -1]  # the last target of a batch opens the next one


def test_the_windows_are_the_same_in_every_pass_and_in_order():
    batcher = batcher_of(100, 2, 8)
    first, second = one_pass(batcher), one_pass(batcher)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, second, strict=True))
    starts = [int(idx[0, 0]) for idx, _ in first]
    assert starts == [0, 16, 32, 48, 64, 80, 83]  # the last one ends where the corpus does
    assert batcher.repeated(6) == 13 and batcher.repeated(5) == 0


def test_shuffling_is_a_function_of_seed_and_position():
    order = [batcher_of(1000, 1, 10, shuffle=True, seed=5).index(k) for k in range(200)]
    assert order == [batcher_of(1000, 1, 10, shuffle=True, seed=5).index(k) for k in range(200)]
    assert sorted(order[:100]) == sorted(order[100:]) == list(range(100))
    assert order[:100] != order[100:] != list(range(100))
    assert order != [batcher_of(1000, 1, 10, shuffle=True, seed=6).index(k) for k in range(200)]


def test_processes_share_the_batches():
    alone = batcher_of(1000, 1, 10, shuffle=True)
    expected = [alone.next_batch()[0] for _ in range(60)]
    ranks = [batcher_of(1000, 1, 10, shuffle=True, rank=r, world_size=3) for r in range(3)]
    shared = [rank.next_batch()[0] for _ in range(20) for rank in ranks]
    assert all(torch.equal(a, b) for a, b in zip(expected, shared, strict=True))


def test_a_batcher_goes_on_where_its_state_was_taken():
    batcher = batcher_of(1000, 2, 7, shuffle=True, seed=3)
    for _ in range(90):
        batcher.next_batch()
    other = batcher_of(1000, 2, 7, shuffle=True, seed=3)
    other.load_state_dict(batcher.state_dict())
    assert all(torch.equal(batcher.next_batch()[0], other.next_batch()[0]) for _ in range(90))
    with pytest.raises(ValueError, match="isn't of these batches"):
        batcher_of(1000, 2, 8).load_state_dict(batcher.state_dict())


@pytest.mark.parametrize(("n_tokens", "batch_size", "seq_len"), [(100, 8, 32), (20, 8, 32), (100, 1, 100), (2, 1, 2)])
def test_a_short_text_is_told_what_would_fit(n_tokens, batch_size, seq_len):
    with pytest.raises(train.UsageError, match=f"the text has {n_tokens} tokens") as caught:
        batcher_of(n_tokens, batch_size, seq_len)
    words = str(caught.value).split()
    fits = {name: int(words[words.index(name) + 1]) for name in ("--seq_len", "--batch_size")}
    batcher_of(n_tokens, fits["--batch_size"], fits["--seq_len"])  # and it does


# ---- files ----


def load(tmp_path, content: bytes, tokenizer, name="text.txt"):
    (tmp_path / name).write_bytes(content)
    return train.load_corpus(str(tmp_path / name), tokenizer, str(tmp_path / "cache"))


def test_a_byte_order_mark_and_windows_line_ends_leave_no_trace(tmp_path, tokenizer):
    corpus = load(tmp_path, b"\xef\xbb\xbfAll:\r\nSpeak.\r\n", tokenizer)
    assert corpus.text == "All:\nSpeak.\n"
    assert corpus.tokens.tolist() == tokenizer.encode("All:\nSpeak.\n")
    assert len(corpus.notes) == 3  # both changes are said, and where the tokens came from


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"\x7fELF\x00\x01\x02 text", "is a binary file"),
        ("Speak".encode("utf-16"), "is UTF-16"),
        ("caf\u00e9 au lait".encode("latin-1"), r"isn't UTF-8 \(byte 3\)"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, tokenizer, content, sentence):
    with pytest.raises(train.UsageError, match=sentence) as caught:
        load(tmp_path, content, tokenizer)
    assert len(caught.value.problems) == 1 and "text.txt" in str(caught.value)


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path, tokenizer):
    with pytest.raises(train.UsageError, match="doesn't exist"):
        train.load_corpus(str(tmp_path / "none.txt"), tokenizer)
    with pytest.raises(train.UsageError, match=r"is a folder without .txt files"):
        train.load_corpus(str(tmp_path), tokenizer)


def test_the_second_start_takes_tokens_from_the_cache(tmp_path, tokenizer):
    first = load(tmp_path, PLAY.read_bytes(), tokenizer)
    never = train.Tokenizer("gpt2", 50257, encode=None, decode_bytes=None)
    again = load(tmp_path, PLAY.read_bytes(), never, name="same_content.txt")
    assert np.array_equal(first.tokens, again.tokens) and first.sha256 == again.sha256
    with pytest.raises(TypeError):  # other content isn't in the cache
        load(tmp_path, PLAY.read_bytes() + b"!", never)


@pytest.mark.parametrize("damage", [b"", b"not numpy", "half", "ids"])
def test_a_damaged_cache_is_made_anew(tmp_path, tokenizer, damage):
    tokens = load(tmp_path, PLAY.read_bytes(), tokenizer).tokens.copy()  # not of the file that is about to change
    (cached,) = (tmp_path / "cache").glob("*.npy")
    if damage == "half":
        cached.write_bytes(cached.read_bytes()[: cached.stat().st_size // 2])
    elif damage == "ids":
        np.save(cached, np.full(10, 60_000, dtype=np.uint16))
    else:
        cached.write_bytes(damage)
    assert np.array_equal(load(tmp_path, PLAY.read_bytes(), tokenizer).tokens, tokens)
    assert np.array_equal(np.load(cached), tokens)


def test_a_cache_that_refuses_costs_only_time(tmp_path, tokenizer):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert "not cached" in load(tmp_path, PLAY.read_bytes(), tokenizer).notes[-1]


def test_a_pipe_is_refused_at_once(tmp_path, tokenizer):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(train.UsageError, match="is no plain file"):
        train.load_corpus(str(tmp_path / "pipe"), tokenizer)


def test_the_bundled_text_is_found_from_any_folder(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.load_corpus("data/sample.txt", tokenizer).text == PLAY.read_text(encoding="utf-8")


# ---- tiny Shakespeare, fetched ----


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A web server on loopback in place of the public source; returns the text that it serves."""
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "input.txt").write_bytes(PLAY.read_bytes())
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "served")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(train, "CORPUS_URL", f"http://127.0.0.1:{server.server_port}/input.txt")
    monkeypatch.setattr(train, "CORPUS_SHA256", hashlib.sha256(PLAY.read_bytes()).hexdigest())
    monkeypatch.setattr(train, "HERE", tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    yield PLAY.read_text(encoding="utf-8")
    server.shutdown()
    server.server_close()


def test_a_missing_corpus_is_fetched_once(source, tmp_path, tokenizer, monkeypatch):
    assert train.load_corpus("data/input.txt", tokenizer).text == source
    assert (tmp_path / "data" / "input.txt").read_text(encoding="utf-8") == source
    monkeypatch.setattr(train, "CORPUS_URL", "http://127.0.0.1:9/nothing")
    assert train.load_corpus("data/input.txt", tokenizer).text == source


def test_what_is_not_the_corpus_is_thrown_away(source, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(train, "CORPUS_SHA256", "0" * 64)
    with pytest.raises(train.UsageError, match=r"wrong SHA-256.*data/sample.txt"):
        train.load_corpus("data/input.txt", tokenizer)
    assert not (tmp_path / "data" / "input.txt").exists()


def test_offline_the_error_names_the_bundled_text_and_the_place(tmp_path, tokenizer, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: refuses at once
        monkeypatch.setattr(train, "CORPUS_URL", f"http://127.0.0.1:{unused.getsockname()[1]}/input.txt")
        monkeypatch.setattr(train, "HERE", tmp_path / "nowhere")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(train.UsageError, match=r"put the file at data/input.txt yourself.*data/sample.txt"):
            train.load_corpus("data/input.txt", tokenizer)


# ---- several texts, and large ones ----


def write_all(folder, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def test_a_folder_is_its_texts_in_order_with_the_end_of_text_token_between(tmp_path, tokenizer):
    write_all(tmp_path / "in", {"b.txt": "Second.\n", "a.txt": "First.\n", "c/d.txt": "Third.", "no.md": "Not me."})
    corpus = train.load_corpus(str(tmp_path / "in"), tokenizer)
    first, second, third = map(tokenizer.encode, ("First.\n", "Second.\n", "Third."))
    assert corpus.tokens.tolist() == [*first, 50256, *second, 50256, *third]
    assert corpus.text == "First.\n<|endoftext|>Second.\n<|endoftext|>Third." and corpus.characters == 21
    assert corpus.notes[0] == "3 files"


def test_several_files_come_in_the_order_given_and_empty_ones_are_said(tmp_path, tokenizer):
    write_all(tmp_path, {"a.txt": "", "b.txt": "B.\r\n", "c.txt": "C.\r\n"})
    given = [str(tmp_path / name) for name in ("c.txt", "a.txt", "b.txt")]
    corpus = train.load_corpus(given, tokenizer)
    assert corpus.tokens.tolist() == [*tokenizer.encode("C.\n"), 50256, *tokenizer.encode("B.\n")]
    assert corpus.notes[1:3] == ("line ends changed to \\n", f"{given[1]} is empty")
    assert corpus.sha256 not in {train.load_corpus(order, tokenizer).sha256 for order in (given[::-1], given[:1])}
    write_all(tmp_path, {"b.txt": "", "c.txt": " \n"})
    with pytest.raises(train.UsageError, match="is empty"):
        train.load_corpus(given, tokenizer)


def test_each_bad_file_of_several_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    problems = train.input_problems((str(tmp_path / "folder"), str(PLAY), str(tmp_path / "none.txt")))
    assert len(problems) == 2 and "folder without .txt files" in problems[0] and "none.txt doesn't exist" in problems[1]
    write_all(tmp_path, {"folder/good.txt": "good"})
    (tmp_path / "folder" / "bad.txt").write_bytes(b"caf\xe9")
    with pytest.raises(train.UsageError, match=r"bad\.txt isn't UTF-8"):
        train.load_corpus(str(tmp_path / "folder"), train.load_tokenizer())


def test_characters_of_several_texts_have_an_end_of_text_of_their_own(tmp_path):
    write_all(tmp_path / "in", {"a.txt": "ba", "b.txt": "ca"})
    vocabulary = train.char_vocabulary(str(tmp_path / "in"))
    assert vocabulary == ["a", "b", "c", "<|endoftext|>"]
    corpus = train.load_corpus(str(tmp_path / "in"), train.load_tokenizer("char", vocabulary))
    assert corpus.tokens.tolist() == [1, 0, 3, 2, 0]


@pytest.mark.parametrize("piece", [1, 2, 3, 7])
def test_a_text_read_in_pieces_is_the_same_text(tmp_path, tokenizer, monkeypatch, piece):
    """Pieces end inside a character, a \\r\\n, the byte order mark."""
    text = "Ä\r\nün\rterm€\n\U0001f642\r\n\r\n"
    monkeypatch.setattr(train, "PIECE", piece)
    corpus = load(tmp_path, b"\xef\xbb\xbf" + text.encode(), tokenizer)
    plain = text.replace("\r\n", "\n").replace("\r", "\n")
    assert corpus.text == plain and corpus.characters == len(plain)
    assert tokenizer.decode(corpus.tokens.tolist()) == plain
    with pytest.raises(train.UsageError, match=r"isn't UTF-8 \(byte 9\)"):
        load(tmp_path, "Ä\r\nün\r".encode() + b"\n\xe9x", tokenizer)


def test_of_a_long_text_the_beginning_is_kept_and_the_tokens_stay_on_the_disk(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(train, "TEXT_KEPT", 100)
    monkeypatch.setattr(train, "PIECE", 64)
    text = PLAY.read_text(encoding="utf-8")
    corpus = load(tmp_path, PLAY.read_bytes(), tokenizer)
    assert corpus.text == text[:100] and corpus.characters == len(text)
    assert isinstance(corpus.tokens, np.memmap) and tokenizer.decode(corpus.tokens.tolist()) == text
    assert np.shares_memory(train.TokenBatcher(corpus.tokens, 1, 8).tokens, corpus.tokens)


def test_no_more_pieces_are_read_than_are_worked_on(tokenizer):
    """So that the memory for tokenizing doesn't grow with the text."""
    read = []

    def pieces():
        for i in range(200):
            read.append(i)
            yield "a word "

    for done, tokens in enumerate(train.encode_pieces(pieces(), tokenizer, 1400)):
        assert len(read) - done <= 2 * torch.get_num_threads() + 1
        assert len(tokens) == (3 if done < 200 else 0)
    assert len(read) == 200
