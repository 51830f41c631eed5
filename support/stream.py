"""Streamed data: documents of any number -> tokens -> batches, without a pass and without an end. Imported only where
--dataset is given.

Documents come from the library `datasets`, which reads them one after the other and says where it is. Behind each
stands the token that ends a text. The row of tokens is cut into batches as a text is: B windows of T tokens, whose last
target is the first token of the batch after."""

from __future__ import annotations

import glob
import hashlib
import importlib.metadata
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from support.cli import BetweenStepsError, RunError, UsageError
from support.machine import Runtime, to_device
from support.text import TEXT_KEPT, Corpus
from support.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer

FORMATS = {"jsonl": "json", "parquet": "parquet", "text": "text"}  # what `datasets` calls them
USES = "jsonl:FILES, parquet:FILES, text:FILES or hf:NAME[:CONFIG]"
NEEDS = "--dataset needs the package datasets, 4.8.5 or newer and not 5.0.0: pip install -r requirements-data.txt"
OPENING = 20  # documents that prompts are drawn from, where none are held out
WAITS = (1, 2, 4, 8, 16, 32)  # seconds before each new try to read
# Packages whose errors are of the network, as far as they aren't OSErrors.
NETWORK = {"aiohttp", "fsspec", "httpcore", "httpcore2", "httpx", "httpx2", "huggingface_hub", "requests", "urllib3"}


# ---- what the flags say ----


@dataclass(frozen=True)
class Source:
    """Where documents are: --dataset or --val_dataset, taken apart."""

    given: str
    kind: str
    place: str  # a path that may hold * and **, or a name on huggingface.co, or a folder
    config: str = ""
    field: str = "text"

    def files(self) -> list[str]:
        """The shards on this machine. hf has others, which the library knows."""
        return sorted(path for path in glob.glob(self.place, recursive=True) if os.path.isfile(path))


def source_of(given: str, field: str) -> Source:
    kind, _, place = given.partition(":")
    config = ""
    if kind == "hf":
        place, _, config = place.partition(":")
    if kind == "text":  # its documents are files, which have no fields
        field = "text"
    return Source(given, kind, place, config, field)


def problems(config) -> Iterator[tuple[str, str]]:
    """Yields (settings that don't go together, what to do about it). `config` is train.py's TrainConfig."""
    if not config.dataset:
        yield "dataset val_documents val_dataset", "val_documents and val_dataset are of --dataset: use --val_fraction"
        return
    for name in ("dataset", "val_dataset"):
        problem = source_problem(name, getattr(config, name))
        if problem:
            yield name, problem
    if not is_installed():
        yield "dataset", NEEDS
    if config.input_file != type(config).input_file:
        yield "dataset input_file", "input_file and dataset exclude each other: give one of them"
    if config.tokenizer == "char":
        yield "dataset tokenizer", "tokenizer char needs to see all of a text: with --dataset use gpt2, or a file"
    for name in ("randomize_batches", "shift_windows", "val_fraction"):
        if getattr(config, name):
            yield f"dataset {name}", f"{name} needs a text that has an end: leave it out with --dataset"
    if config.epochs and not config.steps_per_epoch:
        yield "dataset epochs steps_per_epoch", "a stream has no pass to count: add --steps_per_epoch, or give --steps"
    if config.target_loss and not (config.val_documents or config.val_dataset):
        held_out = "target_loss can't be proven on a stream without held-out documents"
        yield "dataset target_loss val_documents val_dataset", f"{held_out}: add --val_documents, or --target_loss 0"


def source_problem(name: str, given: str) -> str:
    """What is wrong with --dataset or --val_dataset, as far as it shows without the library; "" where nothing is."""
    source = source_of(given, "")
    if not given:
        return ""
    if source.kind not in (*FORMATS, "hf") or not source.place:
        return f"{name} {given!r} isn't a data set: use {USES}"
    try:
        if source.kind == "hf" or source.files():
            return ""
    except (OSError, ValueError):  # an impossible name
        pass
    return f"{name} {given!r} names no file: check the path; {source.kind}:FOLDER/* means all files of a folder"


def is_installed() -> bool:
    """Is there a release of `datasets` that goes on exactly where it stopped?"""
    try:
        version = importlib.metadata.version("datasets")
    except importlib.metadata.PackageNotFoundError:
        return False
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    return numbers >= (4, 8, 5) and numbers != (5, 0, 0)


# ---- documents ----


def builder_of(source: Source):
    """The library's object that knows the shards. Raises what the library raises."""
    import datasets

    datasets.disable_progress_bars()
    if source.kind == "hf":
        return datasets.load_dataset_builder(source.place, source.config or None)
    options = {"sample_by": "document"} if source.kind == "text" else {}
    return datasets.load_dataset_builder(FORMATS[source.kind], data_files={"train": source.files()}, **options)


class Documents:
    """The texts of a data set, epoch after epoch, or this process's share of them. Raises RunError for what can't be
    read, also after some time and new tries, and UsageError for a field that isn't there."""

    def __init__(
        self, source: Source, splits: Sequence[str] = ("train",), seed: int | None = None, rank=0, processes=1
    ):
        """The first of `splits` that there is. By `seed` the shards of each epoch have an order of its own."""
        self.source = source
        self.seed = seed
        self.rank = rank
        self.processes = processes
        self.epoch = 0
        self.cursor: dict | None = None  # where the library is in the epoch; None: at its begin
        self.found = False  # any text in this epoch?
        self.stream: Iterator[dict] | None = None
        self.builder = patiently(source, lambda: builder_of(source))
        shards = self.builder.config.data_files or {}
        self.split = next((split for split in splits if split in shards), splits[0])
        self.shards = list(shards.get(self.split, ()))

    def begin(self) -> None:
        """Opens the epoch where the cursor is."""
        from datasets.distributed import split_dataset_by_node

        shards = list(self.shards)
        if self.seed is not None:
            random.Random(f"{self.seed} {self.epoch}").shuffle(shards)
        if shards:
            self.builder.config.data_files[self.split][:] = shards
        self.dataset = split_dataset_by_node(
            self.builder.as_streaming_dataset(split=self.split), self.rank, self.processes
        )
        if self.cursor:  # an exhausted one would yield nothing for ever: see next
            self.dataset.load_state_dict(self.cursor)
        self.stream = iter(self.dataset)

    def read(self) -> dict | None:
        """The library's next example; None at the end of the epoch."""
        try:
            if self.stream is None:
                self.begin()
            example = next(self.stream, None)
            if example is not None:
                self.cursor = self.dataset.state_dict()
            return example
        except BaseException:
            self.stream = None  # a new try begins where the cursor is
            raise

    def next(self, ends: bool = False) -> str | None:
        """The next text. With `ends`, None at the end of the epoch."""
        while True:
            example = patiently(self.source, self.read)
            if example is None:
                if not self.found:
                    raise RunError(f"{self.source.given} has no text in its field {self.source.field!r}: look into it")
                self.epoch += 1
                self.cursor = None
                self.stream = None
                self.found = False
                if ends:
                    return None
                continue
            text = self.text_of(example)
            if text.strip():
                self.found = True
                return text

    def text_of(self, example: dict) -> str:
        field = self.source.field
        if field not in example:
            fields = ", ".join(sorted(example))
            raise UsageError(f"{self.source.given} has no field {field!r}, but {fields}: choose one by --text_field")
        value = example[field]
        if value is not None and not isinstance(value, str):
            kind = type(value).__name__
            raise UsageError(f"the field {field!r} of {self.source.given} holds {kind}, not text: see --text_field")
        return value or ""

    def state_dict(self) -> dict:
        return {"epoch": self.epoch, "cursor": self.cursor, "found": self.found}

    def load_state_dict(self, state: dict) -> None:
        self.epoch = state["epoch"]
        self.cursor = state["cursor"]
        self.found = state["found"]
        self.stream = None


def patiently(source: Source, call: Callable):
    """What the call gives, tried anew after a fault of the network. Raises RunError, in one sentence."""
    for wait in (*WAITS, None):
        try:
            return call()
        except Exception as e:  # the library raises whatever its parts do
            if wait is None or not is_network_fault(e):
                raise RunError(unreadable(source, e, given_up=wait is None)) from e
            time.sleep(wait)


def is_network_fault(e: BaseException | None) -> bool:
    """Could it be gone a moment later? What the library wraps an error in counts as the error."""
    while e is not None:
        if isinstance(e, (FileNotFoundError, PermissionError, IsADirectoryError)):
            return False
        packages = {kind.__module__.partition(".")[0] for kind in type(e).__mro__}
        if isinstance(e, OSError) or packages & NETWORK:
            return True
        e = e.__cause__ or e.__context__
    return False


def unreadable(source: Source, e: Exception, given_up: bool) -> str:
    lines = str(e).splitlines() or [""]
    what = f"{source.given} can't be read ({type(e).__name__}: {lines[0]:.150})"
    if given_up:
        minutes = sum(WAITS) / 60
        return f"{what}, tried {len(WAITS) + 1} times in {minutes:.1f} minutes: go on later, by --resume auto"
    return f"{what}: mend it, or name another"


# ---- as a corpus ----


@dataclass(frozen=True)
class StreamedCorpus(Corpus):
    """What is known of a stream before training: its opening and, as `tokens`, its held-out documents."""

    whole = "the held-out documents"

    source: Source | None = None
    held_out: frozenset[bytes] = frozenset()  # digests of the documents that aren't trained on

    def split(self, config, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
        return self.tokens[:0], self.tokens

    def batches(self, config, tokenizer: Tokenizer, runtime: Runtime) -> StreamBatcher:
        return StreamBatcher(self, config, tokenizer, runtime)

    def describe(self, batcher: StreamBatcher, held_out) -> Iterator[str]:
        yield f"Data: {self.path}; " + "; ".join(self.notes)
        line = f"Tokens: a stream, without a pass: avg_loss is the mean of the last {batcher.avg_steps} steps"
        if held_out:
            line += f"; {len(self.held_out):,} documents of {len(self.tokens):,} tokens are held out"
        yield line

    def about(self) -> dict:
        return {"file": self.path, "sha256": self.sha256, "tokens": None}


def open_dataset(config) -> tuple[Tokenizer, StreamedCorpus]:
    """The tokenizer, and what is known of the stream before training. `config` is train.py's TrainConfig.

    Raises UsageError for a tokenizer or a field that won't do, or too little held-out text, RunError for documents that
    can't be read."""
    tokenizer = load_tokenizer(config.tokenizer)
    source = source_of(config.dataset, config.text_field)
    documents = Documents(source)
    parts = [documents]
    texts = first_texts(documents, config.val_documents or OPENING)
    held_out = texts if config.val_documents else []
    if config.val_dataset:
        others = Documents(source_of(config.val_dataset, config.text_field), ("validation", "test", "train"))
        held_out = first_texts(others, config.val_documents or math.inf)
        parts.append(others)
    tokens = tokens_of(held_out, tokenizer)
    if held_out and len(tokens) <= config.seq_len:
        raise UsageError(
            f"the {len(held_out)} held-out documents have {len(tokens)} tokens, and one window takes"
            f" {config.seq_len + 1}: hold out more by --val_documents, or use a shorter --seq_len"
        )
    opening = END_OF_TEXT.join(held_out or texts)[:TEXT_KEPT]
    shards = len(documents.shards)
    notes = (f"{shards:,} shards" if shards != 1 else "1 shard", f"their order by seed {config.seed}")
    digests = frozenset(digest(text) for text in held_out)
    sha256 = identity(parts)
    return tokenizer, StreamedCorpus(config.dataset, sha256, opening, math.inf, tokens, notes, source, digests)


def first_texts(documents: Documents, count: float) -> list[str]:
    """So many documents, or all that there are, in the order of the shards' names."""
    texts = []
    while len(texts) < count:
        text = documents.next(ends=True)
        if text is None:
            break
        texts.append(text)
    return texts


def tokens_of(texts: Sequence[str], tokenizer: Tokenizer) -> np.ndarray:
    """Their ids (N,) uint16, each text with the token behind it that ends it."""
    ids = []
    for text in texts:
        ids += tokenizer.encode(text)
        ids.append(tokenizer.end_of_text)
    return np.array(ids, dtype=np.uint16)


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def identity(parts: Sequence[Documents]) -> str:
    """A SHA-256 of what the shards are: of files here, names and sizes; of others, their addresses, in which the
    version stands. Their content may be more than anybody would read before training."""
    known = []
    for documents in parts:
        known.append([documents.source.kind, documents.source.config, documents.split])
        for shard in documents.shards:
            here = os.path.exists(shard)
            known.append([os.path.basename(shard), os.path.getsize(shard)] if here else [shard])
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


# ---- as batches ----


class StreamBatcher:
    """Batches of B windows of T tokens from documents that have no end. Each of several processes reads a share of
    its own. All of a step's tokens are read before its first batch is given, so that a fault comes between steps."""

    n_batches = None  # in a pass: there is none
    tokens = np.zeros(0, dtype=np.uint16)  # that could be read again

    def __init__(self, corpus: StreamedCorpus, config, tokenizer: Tokenizer, runtime: Runtime):
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.runtime = runtime
        self.batch_size = config.batch_size
        self.seq_len = config.seq_len
        self.batch_tokens = config.batch_size * config.seq_len
        self.grad_accum = config.grad_accum
        self.avg_steps = config.avg_steps
        self.averaged = config.avg_steps * config.grad_accum * runtime.world_size  # batches that avg_loss is of
        self.documents = Documents(corpus.source, seed=config.seed, rank=runtime.rank, processes=runtime.world_size)
        self.left = torch.zeros(0, dtype=torch.int32)  # tokens read and not yet taken
        self.position = 0  # batches taken so far, by all processes together

    def index(self, k: int) -> int:
        """Where the loss of the run's k-th batch is kept: in the place of an older one."""
        return k % self.averaged

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(idx, targets), both (B, T) int64 on the device. Raises BetweenStepsError for a stream that broke off."""
        if self.position // self.runtime.world_size % self.grad_accum == 0:
            self.read_step()
        chunk = self.left[: self.batch_tokens + 1].long()
        self.left = self.left[self.batch_tokens :]  # the last token is the next row's first
        self.position += self.runtime.world_size
        chunk = to_device(chunk, self.runtime.device)
        idx = chunk[:-1].view(self.batch_size, self.seq_len)
        targets = chunk[1:].view(self.batch_size, self.seq_len)
        return idx, targets

    def read_step(self) -> None:
        """Reads what the step takes. If that fails in one of several processes, all of them stop here."""
        problem = ""
        try:
            self.read(self.grad_accum * self.batch_tokens + 1)
        except (RunError, UsageError) as e:
            problem = str(e)
        if self.runtime.any(bool(problem)):
            raise BetweenStepsError(problem or "another process can't read its share of the stream")

    def read(self, count: int) -> None:
        """Documents, until so many tokens are there."""
        parts = [self.left]
        there = len(self.left)
        try:
            while there < count:
                text = self.documents.next()
                if digest(text) in self.corpus.held_out:
                    continue
                ids = [*self.tokenizer.encode(text), self.tokenizer.end_of_text]
                parts.append(torch.tensor(ids, dtype=torch.int32))
                there += len(ids)
        finally:  # where it breaks off, the cursor stands behind what was read: keep that
            self.left = torch.cat(parts)

    def passes(self) -> float:
        """How often this process has come to the end of its documents."""
        return float(self.documents.epoch)

    def tokens_taken(self) -> int:
        return self.position * self.batch_tokens

    def state_dict(self) -> dict:
        """Of all processes, which call it together."""
        mine = {**self.documents.state_dict(), "left": self.left.clone()}
        shares = self.runtime.gather(mine)
        return {
            "position": self.position,
            "batch_tokens": self.batch_tokens,
            "averaged": self.averaged,
            "shares": shares,
        }

    def load_state_dict(self, state: dict) -> None:
        """Raises UsageError where other processes or another grad_accum would share the stream in another way."""
        if len(state["shares"]) != self.runtime.world_size or state["averaged"] != self.averaged:
            raise UsageError(
                f"the stream was read by {len(state['shares'])} processes, and {self.runtime.world_size} are here, or"
                " --grad_accum is another one: start as many with the same, or anew with another --out_dir"
            )
        mine = state["shares"][self.runtime.rank]
        self.position = state["position"]
        self.left = mine["left"]
        self.documents.load_state_dict(mine)
