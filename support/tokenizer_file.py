"""A tokenizer of one's own: a tokenizer.json, or a folder of transformers' that has one. Imported where --tokenizer
names a path, or a checkpoint holds such a tokenizer."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from support.cli import UsageError
from support.text import Tokenizer

MOST = 1 << 16  # tokens: cached ids have 16 bits
# What a text ends with in the usual families of models, where no tokenizer_config.json says it.
ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|end▁of▁sentence|>")


def read_tokenizer(given: str) -> Tokenizer:
    """The tokenizer of a --tokenizer PATH. Raises UsageError for a file that can't be read or won't do."""
    path = json_of(given)
    try:
        return from_json(path.read_text(encoding="utf-8"), end_named_in(path.parent))
    except OSError as e:
        raise UsageError(f"tokenizer {given} can't be read ({e.strerror}): check its permissions") from None
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        remedy = "name a tokenizer.json of byte pairs; tools/train_tokenizer.py makes one"
        raise UsageError(f"tokenizer {given} won't do ({str(e) or type(e).__name__:.150}): {remedy}") from None


def json_of(given: str) -> Path:
    """The file that a path means. What isn't there was found out before: see text.tokenizer_problems."""
    path = Path(given)
    return path / "tokenizer.json" if path.is_dir() else path


def end_named_in(folder: Path) -> str:
    """The token that transformers' settings beside a tokenizer.json call the end of a text; "" where they don't."""
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        end = settings["eos_token"]
        return end["content"] if isinstance(end, dict) else str(end or "")
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def from_json(text: str, end_of_text: str | int = "") -> Tokenizer:
    """A Tokenizer of the content of a tokenizer.json; `end_of_text` is a token or its id, where one is known.

    Raises ValueError, KeyError, TypeError or AttributeError for what is no byte-level tokenizer."""
    theirs = parsed(text)
    theirs.no_truncation()
    theirs.no_padding()
    theirs.encode_special_tokens = True  # "<|endoftext|>" in a text is twelve characters, not a control token
    vocabulary = theirs.get_vocab(with_added_tokens=True)
    vocab_size = 1 + max(vocabulary.values())  # there may be ids that no token has
    if vocab_size > MOST:
        raise ValueError(f"it has {vocab_size:,} tokens, and {MOST:,} are the most")
    bytes_of = token_bytes(vocabulary, {token.content for token in theirs.get_added_tokens_decoder().values()})

    def encode(text: str) -> list[int]:
        return theirs.encode(text, add_special_tokens=False).ids

    def decode_bytes(tokens: Sequence[int]) -> bytes:
        return b"".join(bytes_of.get(token, b"") for token in tokens)

    name = f"file-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return Tokenizer(name, vocab_size, encode, decode_bytes, end_id(vocabulary, end_of_text), tokenizer_json=text)


def parsed(text: str) -> tokenizers.Tokenizer:
    """Raises ValueError for what isn't a tokenizer.json, or one whose tokens aren't made of bytes: of others, what
    they decode isn't the text that they were given, and a piece of a text can't be told from a few tokens."""
    try:
        theirs = tokenizers.Tokenizer.from_str(text)
    except Exception as e:  # a plain Exception is all that the library raises
        raise ValueError(f"it isn't a tokenizer.json: {e}") from None
    decoder = json.loads(text).get("decoder") or {}
    kinds = [decoder.get("type"), *(one.get("type") for one in decoder.get("decoders", ()))]
    if "ByteLevel" not in kinds:
        raise ValueError("it isn't byte-level, so it can't give every text back as it was")
    return theirs


def end_id(vocabulary: dict[str, int], end_of_text: str | int) -> int:
    """The id of the token that stands between two texts. Raises ValueError if there is none."""
    if isinstance(end_of_text, int):
        if end_of_text not in vocabulary.values():
            raise ValueError(f"it has no token {end_of_text}")
        return end_of_text
    for token in (end_of_text, *ENDS_OF_TEXT):
        if token in vocabulary:
            return vocabulary[token]
    raise ValueError(f"it has no token that ends a text, as {ENDS_OF_TEXT[0]}")


def token_bytes(vocabulary: dict[str, int], added: set[str]) -> dict[int, bytes]:
    """The bytes of each token by its id. Those that were added are written as they are, the others byte by byte."""
    found = {}
    for token, i in vocabulary.items():
        if token in added:
            found[i] = token.encode()
        else:
            found[i] = bytes(byte_of()[character] for character in token)
    return found


@functools.cache
def byte_of() -> dict[str, int]:
    """Which byte a character of a byte-level vocabulary stands for: printable ones for themselves, the rest, in order,
    for the characters from 256 on (bytes_to_unicode of OpenAI's gpt-2, encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    found = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    for place, byte in enumerate(others):
        found[chr(256 + place)] = byte
    return found
