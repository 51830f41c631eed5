"""Fixtures: a model small enough to train in a blink, on the bundled text, in a folder of its own."""

from __future__ import annotations

import csv
import functools
import os
import sys
from pathlib import Path

import pytest
import tiktoken.load
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from support.checkpoint import load_checkpoint  # noqa: E402
from support.machine import start_runtime  # noqa: E402
from support.text import load_text  # noqa: E402
from support.tokenizer import load_tokenizer  # noqa: E402

# These models are too small to share among threads; and bits are the same only with the same number of them.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start

# Reading GPT-2's ranks takes longer than a run of a tiny model. They are the same each time: their hashes are checked.
tiktoken.load.data_gym_to_mergeable_bpe_ranks = functools.cache(tiktoken.load.data_gym_to_mergeable_bpe_ranks)

PLAY = ROOT / "data" / "sample.txt"
SHAKESPEARE = ROOT / "data" / "input.txt"
needs_shakespeare = pytest.mark.skipif(
    not SHAKESPEARE.exists(), reason="data/input.txt isn't there: python train.py --steps 1 fetches it"
)

TINY = {
    "input_file": str(PLAY),
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "block_size": 64,
    "batch_size": 2,
    "seq_len": 32,
    "steps": 6,
    "optimizer": "adamw",
    "lr": 3e-4,
    "embed_lr": 0.0,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "log_every": 1,
    "max_new_tokens": 4,
    "recall_places": 2,
    "device": "cpu",
    "amp": "off",
    "no_mfu": True,  # half a second a run
}


@pytest.fixture(scope="session", autouse=True)
def own_folders(tmp_path_factory):
    """No test reads or writes the user's cache or boards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.setenv("TRACKIO_DIR", str(tmp_path_factory.getbasetemp() / "trackio"))
        yield


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer("gpt2")


@pytest.fixture
def tiny(tmp_path):
    """tiny(**changes) -> a TrainConfig for a run that takes about a second, in tmp_path/out."""

    def make(**changes) -> train.TrainConfig:
        settings = {"out_dir": str(tmp_path / "out"), **TINY, **changes}
        return train.TrainConfig(**settings)

    return make


@pytest.fixture(scope="session")
def short_text(tmp_path_factory):
    """A file with the play's first 1,300 characters."""
    path = tmp_path_factory.getbasetemp() / "short.txt"
    path.write_text(PLAY.read_text(encoding="utf-8")[:1300], encoding="utf-8")
    return str(path)


@pytest.fixture
def quick(tiny, short_text):
    """tiny with a token for each character of a short text: 21 batches a pass, and a step takes milliseconds."""
    return functools.partial(tiny, input_file=short_text, tokenizer="char")


@pytest.fixture
def make_trainer():
    """make_trainer(config) -> a Trainer on the CPU that writes no file."""

    def make(config: train.TrainConfig) -> train.Trainer:
        tokenizer, corpus = load_text(config.input_file, config.tokenizer, config.cache_dir)
        runtime = start_runtime(config.device, config.amp, config.deterministic)
        return train.Trainer(config, corpus, tokenizer, runtime)

    return make


def tiny_flags(out_dir, **changes) -> list[str]:
    """TINY as a command line."""
    settings = {"out_dir": str(out_dir), **TINY, **changes}
    flags = []
    for name, value in settings.items():
        flags.append(f"--{name}")
        if value is not True:
            flags.append(str(value))
    return flags


def rows_of(out_dir) -> list[dict[str, str]]:
    with open(Path(out_dir) / "logs" / "train_metrics.csv", newline="") as f:
        return list(csv.DictReader(f))


def log_of(out_dir) -> str:
    return (Path(out_dir) / "logs" / "train.log").read_text(encoding="utf-8")


def without_times(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    kept = []
    for row in rows:
        kept.append({name: value for name, value in row.items() if name not in ("tok_per_s", "elapsed_s", "mfu")})
    return kept


def weights_of(out_dir) -> dict[str, torch.Tensor]:
    return load_checkpoint(Path(out_dir) / "checkpoints" / "last.pt")["model"]


def same_weights(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
