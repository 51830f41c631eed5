"""Text files -> tokenizer -> token ids, which are cached between runs and mapped into memory."""

from __future__ import annotations

import codecs
import collections
import contextlib
import hashlib
import io
import os
import random
import re
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from support.bar import no_bar
from support.cli import UsageError
from support.files import atomic_write
from support.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent

PIECE = 1 << 20  # bytes or characters that are worked on at once: memory doesn't grow with the text
TEXT_KEPT = 10**7  # characters of the text's beginning that stay in memory, for prompts and for what was learned

CORPUS_PATH = Path("data/input.txt")  # tiny Shakespeare, not part of the repository
CORPUS_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
CORPUS_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


# ---- which files ----


def as_paths(given: str | Sequence[str]) -> Sequence[str]:
    """--input_file as a list: given once it is a text."""
    return [given] if isinstance(given, str) else given


def input_problems(given: str | Sequence[str]) -> list[str]:
    """What can be said about the input files before reading them. data/input.txt may be missing: it is fetched."""
    problems = []
    for path in as_paths(given):
        found = find_input(path)
        if not path or not (os.path.exists(found) or found == CORPUS_PATH):
            remedy = "give its path by --input_file, or try --preset demo"
            problems.append(f"input_file {path or '(empty)'} doesn't exist: {remedy}")
        elif found.is_dir() and not texts_in(found):
            problems.append(f"input_file {path} is a folder without .txt files: name one that has some, or a file")
        elif found.exists() and not (found.is_file() or found.is_dir()):
            problems.append(f"input_file {path} is no plain file: name a text file")
    return problems


def find_input(path: str) -> Path:
    """The bundled and the fetched text are found from any working directory; a file that is there comes first."""
    if not os.path.exists(path) and os.path.isfile(ROOT / path):
        return ROOT / path
    return Path(path)


def texts_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.txt") if path.is_file())


def input_files(given: str | Sequence[str]) -> list[Path]:
    """The files that --input_file means, in its order; those of a folder by their names. Fetches data/input.txt.

    Raises UsageError for one that isn't there or is no text."""
    problems = input_problems(given)
    if problems:
        raise UsageError(*problems)
    files = []
    for path in map(find_input, as_paths(given)):
        if not path.exists():
            fetch_corpus(CORPUS_PATH)
        if path.is_dir():
            files += texts_in(path)
        else:
            files.append(path)
    return files


def fetch_corpus(path: Path) -> None:
    """Downloads tiny Shakespeare to `path`, checked by SHA-256. Raises UsageError when that can't be done."""
    remedy = f"put the file at {path} yourself, or train on the bundled play, data/sample.txt: --preset demo"
    data = bytearray()
    try:
        with urllib.request.urlopen(CORPUS_URL, timeout=30) as response:
            total = int(response.headers.get("Content-Length") or 0) or None
            with tqdm(total=total, unit="B", unit_scale=True, desc=f"fetching {path}", disable=no_bar()) as bar:
                while chunk := response.read(1 << 16):
                    data += chunk
                    bar.update(len(chunk))
    except (OSError, ValueError) as e:
        raise UsageError(f"{path} is missing and can't be fetched from {CORPUS_URL} ({e}): {remedy}") from None
    if hashlib.sha256(data).hexdigest() != CORPUS_SHA256:
        raise UsageError(f"what {CORPUS_URL} sent isn't tiny Shakespeare (wrong SHA-256): {remedy}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as f:
        f.write(data)


# ---- from files to pieces of text ----


@dataclass
class Reading:
    """What was found while texts were read."""

    hashes: list[str] = field(default_factory=list)  # SHA-256 of each file's bytes
    notes: list[str] = field(default_factory=list)  # what was changed, for the log

    def sha256(self) -> str:
        """Of the file; of several, of their hashes."""
        if len(self.hashes) == 1:
            return self.hashes[0]
        return hashlib.sha256("".join(self.hashes).encode()).hexdigest()


def read_texts(files: Sequence[Path], reading: Reading) -> Iterator[str | None]:
    """Yields the texts in pieces, and None between two texts; a file that is empty is passed over. What is found on
    the way goes into `reading`. Raises UsageError for what isn't a text."""
    between = False  # is there a text before the next one?
    for path in files:
        empty = True
        for piece in read_text(path, reading):
            if empty and between:
                yield None
            empty = False
            between = True
            yield piece
        if empty and len(files) > 1:
            reading.notes.append(f"{path} is empty")


def read_text(path: Path, reading: Reading) -> Iterator[str]:
    """Yields the text of one file in pieces, none of them empty. Raises UsageError."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as f:
            for piece in decode_pieces(f, str(path), reading.notes, digest):
                if piece:
                    yield piece
    except OSError as e:
        raise UsageError(f"input_file {path} can't be read ({e.strerror}): check its permissions") from None
    reading.hashes.append(digest.hexdigest())


def decode_pieces(file, path: str, notes: list[str], digest) -> Iterator[str]:
    """Yields a UTF-8 file's text with \\n line ends and no byte order mark; says in `notes` what was changed."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    size = 0
    try:
        while data := file.read(PIECE):
            if size == 0:
                check_beginning(data, path, notes)
            if b"\0" in data:
                raise UsageError(f"input_file {path} is a binary file (it holds zero bytes): give a plain text")
            size += len(data)
            digest.update(data)
            yield decoder.decode(data)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as e:  # what it was given: the rest of the piece before, and a piece
        convert = f"convert it (iconv -f LATIN1 -t UTF-8 {path} > new.txt)"
        raise UsageError(f"input_file {path} isn't UTF-8 (byte {size - len(e.object) + e.start}): {convert}") from None
    if decoder.newlines not in (None, "\n"):
        notes.append("line ends changed to \\n")


def check_beginning(data: bytes, path: str, notes: list[str]) -> None:
    """Raises UsageError for UTF-16, which its byte order mark tells."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        save = f"save it as UTF-8 (iconv -f UTF-16 -t UTF-8 {path} > new.txt)"
        raise UsageError(f"input_file {path} is UTF-16: {save}")
    if data.startswith(codecs.BOM_UTF8):
        notes.append("byte order mark removed")


def decode_text(data: bytes, path: str) -> str:
    """The text of a small file, as training reads it. Raises UsageError."""
    return "".join(decode_pieces(io.BytesIO(data), path, [], hashlib.sha256()))


# A letter before one blank and a letter, or a single line break: GPT-2's pattern cuts there too.
BETWEEN_WORDS = re.compile(r"[^\W\d_](?= [^\W\d_])|(?<=\S)\n(?=\S)")


def cut_between_words(pieces: Iterator[str | None], size: int = PIECE) -> Iterator[str | None]:
    """The same text in pieces of about `size` characters, cut only where no token changes."""
    rest = ""
    for piece in pieces:
        rest += piece or ""
        while cut := BETWEEN_WORDS.search(rest, size):
            yield rest[: cut.end()]
            rest = rest[cut.end() :]
        if piece is None:
            yield rest
            yield None
            rest = ""
    yield rest


# ---- from text to token ids ----


@dataclass(frozen=True)
class Corpus:
    """The tokens of a text, or of several with the token END_OF_TEXT between them."""

    path: str
    sha256: str  # of the file's bytes; of several files, of their hashes
    text: str  # its beginning, up to TEXT_KEPT characters
    characters: int
    tokens: np.ndarray  # ids (N,) uint16, mapped into memory from the cache: what is read of them is there
    notes: tuple[str, ...] = ()

    whole = "the whole corpus"  # what final_loss is of

    def split(self, config, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
        """(tokens to train on, held-out tokens). Raises UsageError for too few of these."""
        cut = held_out_from(self.tokens, config.val_fraction, tokenizer)
        held_out = self.tokens[cut:]
        if config.val_fraction and len(held_out) <= config.seq_len:
            raise UsageError(
                f"val_fraction {config.val_fraction} holds out {len(held_out)} tokens, and one window takes"
                f" {config.seq_len + 1}: give a larger --val_fraction, or a shorter --seq_len"
            )
        return self.tokens[:cut], held_out

    def describe(self, batcher, held_out) -> Iterator[str]:
        """Lines for the log; of train.py's batches to train on and held-out ones."""
        yield f"Corpus: {self.path}, {self.characters:,} characters; " + "; ".join(self.notes)
        tokens = f"Tokens: {len(self.tokens):,} in {batcher.n_batches:,} batches a pass"
        if held_out:
            tokens += f", and the last {len(held_out.tokens):,} held out"
        yield tokens

    def about(self) -> dict:
        """For run.json."""
        return {"file": self.path, "sha256": self.sha256, "tokens": len(self.tokens)}


def load_text(
    given: str | Sequence[str], tokenizer_name: str, cache_dir: str = "", write_cache: bool = True
) -> tuple[Tokenizer, Corpus]:
    """The tokenizer and the corpus of --input_file. Raises UsageError."""
    vocabulary = char_vocabulary(given) if tokenizer_name == "char" else ()
    tokenizer = load_tokenizer(tokenizer_name, vocabulary)
    return tokenizer, load_corpus(given, tokenizer, cache_dir, write_cache)


def char_vocabulary(given: str | Sequence[str]) -> list[str]:
    """The characters of the texts, sorted, and END_OF_TEXT where there are several. Raises UsageError."""
    characters: set[str] = set()
    several = False
    for piece in read_texts(input_files(given), Reading()):
        if piece is None:
            several = True
        else:
            characters |= set(piece)
    vocabulary = sorted(characters)
    if several:
        vocabulary.append(END_OF_TEXT)
    return vocabulary


def load_corpus(
    given: str | Sequence[str], tokenizer: Tokenizer, cache_dir: str = "", write_cache: bool = True
) -> Corpus:
    """Reads UTF-8 texts and their token ids, from the cache if this content was tokenized before.

    Raises UsageError for a file that is missing, unreadable, empty, binary, or not UTF-8."""
    files = input_files(given)
    name = ", ".join(as_paths(given))
    reading = Reading()
    opening, characters = survey(files, reading)
    if not characters:
        raise UsageError(f"input_file {name} is empty: give a text of at least a few thousand characters")
    sha256 = reading.sha256()

    def encoded() -> Iterator[np.ndarray]:
        return encode_pieces(cut_between_words(read_texts(files, Reading())), tokenizer, characters)

    cache = cache_folder(cache_dir) / f"{tokenizer.name}-{sha256}.npy"
    tokens, source = cached_tokens(cache, encoded, tokenizer.vocab_size, write_cache)
    notes = [*dict.fromkeys(reading.notes), source]  # each note once
    if len(files) > 1:
        notes.insert(0, f"{len(files):,} files")
    return Corpus(name, sha256, opening, characters, tokens, tuple(notes))


def find_text(given: str | Sequence[str], sha256: str) -> str:
    """The text of an --input_file of earlier, if it is still there and is the same by its SHA-256; "" if it isn't, or
    has over TEXT_KEPT characters. Fetches nothing."""
    reading = Reading()
    try:
        if not all(find_input(path).exists() for path in as_paths(given)):
            return ""
        files = input_files(given)
        if sum(path.stat().st_size for path in files) > 4 * TEXT_KEPT:  # bytes, of which a character has up to 4
            return ""
        text, characters = survey(files, reading)
    except (OSError, UsageError, TypeError):  # a checkpoint may name anything
        return ""
    return text if characters <= TEXT_KEPT and reading.sha256() == sha256 else ""


def survey(files: Sequence[Path], reading: Reading) -> tuple[str, int]:
    """(the beginning of the texts, how many characters they have in all; 0 if all of them are blanks)."""
    opening = ""
    characters = 0
    blank = True
    for piece in read_texts(files, reading):
        if len(opening) < TEXT_KEPT:
            opening += END_OF_TEXT if piece is None else piece
        if piece is not None:
            characters += len(piece)
            blank = blank and not piece.strip()
    return opening[:TEXT_KEPT], 0 if blank else characters


def cache_folder(cache_dir: str) -> Path:
    if cache_dir:
        return Path(cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "train-gpt2"


def encode_pieces(pieces: Iterator[str | None], tokenizer: Tokenizer, characters: int) -> Iterator[np.ndarray]:
    """Token ids uint16 of each piece, and END_OF_TEXT's for None: 50,257 of them fit into 16 bits. Encodes on all
    cores, since tiktoken works outside Python's lock; shows how much of `characters` is done."""

    def encode(piece: str | None) -> tuple[np.ndarray, int]:
        if piece is None:
            return np.array([tokenizer.end_of_text], dtype=np.uint16), 0
        return np.array(tokenizer.encode(piece), dtype=np.uint16), len(piece)

    cores = os.cpu_count() or 1
    ahead = collections.deque()  # a few pieces in work, in order
    bar = tqdm(total=characters, desc="tokenizing", unit="char", unit_scale=True, leave=False, disable=no_bar())
    with ThreadPoolExecutor(cores) as pool, bar:
        for piece in pieces:
            ahead.append(pool.submit(encode, piece))
            if len(ahead) > 2 * cores:
                tokens, done = ahead.popleft().result()
                bar.update(done)
                yield tokens
        for one in ahead:
            tokens, done = one.result()
            bar.update(done)
            yield tokens


def cached_tokens(
    path: Path, encoded: Callable[[], Iterator[np.ndarray]], vocab_size: int, write_cache: bool = True
) -> tuple[np.ndarray, str]:
    """(token ids (N,), where they came from): from the cache file if it is there and sound, else from `encoded`, which
    gives them in pieces, by way of that file."""
    with contextlib.suppress(OSError, ValueError, EOFError):
        if is_sound(path, vocab_size):
            return np.load(path, mmap_mode="r"), "token ids from the cache"
    if not write_cache:
        return np.concatenate([*encoded()]), "tokenized"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tokens(path, encoded())
        return np.load(path, mmap_mode="r"), "tokenized"
    except OSError as e:  # costs time at the next start, and memory for all of them
        return np.concatenate([*encoded()]), f"tokenized (not cached: {e.strerror})"


def write_tokens(path: Path, pieces: Iterator[np.ndarray]) -> None:
    """As a .npy file, whose header is written again once the number of tokens is known. Raises OSError."""
    header = {"descr": "<u2", "fortran_order": False, "shape": (0,)}
    count = 0
    with atomic_write(path) as f:
        np.lib.format.write_array_header_1_0(f, header)
        for tokens in pieces:
            f.write(tokens.tobytes())
            count += len(tokens)
        f.seek(0)
        header["shape"] = (count,)
        np.lib.format.write_array_header_1_0(f, header)  # of the same length: it is padded


def is_sound(path: Path, vocab_size: int) -> bool:
    """Is this a file of token ids? Maps it piece by piece, so that its pages don't add up in memory. Raises OSError,
    ValueError or EOFError for a file that isn't even of NumPy."""
    tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    if tokens.dtype != np.uint16 or tokens.ndim != 1:
        return False
    size = 1 << 22
    for start in range(0, len(tokens), size):
        piece = np.load(path, mmap_mode="r")[start : start + size]
        if piece.max() >= vocab_size:
            return False
    return True


def held_out_from(tokens: np.ndarray, fraction: float, tokenizer: Tokenizer) -> int:
    """Where the held-out end of the text begins: behind the first line break past the given share of its tokens."""
    start = len(tokens) - int(len(tokens) * fraction)
    for i in range(start, len(tokens)):
        text = tokenizer.decode_bytes([int(tokens[i])])
        if text.endswith((b"\n", END_OF_TEXT.encode())):
            return i + 1
    return start


def too_short(tokens: int, batch_size: int, seq_len: int) -> str:
    """Of a text that doesn't fill one batch: what would fit."""
    targets = tokens - 1
    fits = f"--seq_len {min(seq_len, max(1, targets))} --batch_size {max(1, targets // seq_len)}"
    return (
        f"the text has {tokens:,} tokens, and one batch of batch_size {batch_size} x seq_len {seq_len} needs"
        f" {batch_size * seq_len + 1:,}: use a longer text, or {fits}"
    )


def prompts_of(corpus: Corpus, tokenizer: Tokenizer, config) -> list[str]:
    """The prompts of a run's samples."""
    prompt = config.prompt or "\n"
    if prompt == type(config).prompt and not tokenizer.knows(prompt):
        prompt = ""  # nobody asked for it
    return draw_prompts(corpus.text, prompt, config.num_prompts, config.seed)


def draw_prompts(text: str, prompt: str, count: int, seed: int) -> list[str]:
    """`count` prompts: the given one ("": none), then openings of passages (what follows a blank line) drawn from the
    text by seed."""
    passages = re.split(rf"\n\s*\n|{re.escape(END_OF_TEXT)}", text)
    passages = [passage.strip("\n") for passage in passages if passage.strip()]
    drawn = random.Random(seed).sample(passages, min(len(passages), count))
    prompts = ["\n".join(passage.split("\n")[:2])[:200] + "\n" for passage in drawn]
    if prompt:
        prompts.insert(0, prompt)
    return prompts[:count]
