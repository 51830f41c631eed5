"""Fixtures: a model small enough to train in a blink, on the bundled text, in a folder of its own."""

from __future__ import annotations

import csv
import dataclasses
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402

# These models are too small to share among threads; and bits are the same only with the same number of them.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start

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


@pytest.fixture(autouse=True)
def own_folders(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def tokenizer():
    return train.load_tokenizer("gpt2")


@pytest.fixture
def tiny(tmp_path):
    """tiny(**changes) -> a TrainConfig for a run that takes about a second, in tmp_path/out."""

    def make(**changes) -> train.TrainConfig:
        return dataclasses.replace(train.TrainConfig(), **({"out_dir": str(tmp_path / "out"), **TINY} | changes))

    return make


@pytest.fixture
def make_trainer():
    """make_trainer(config) -> a Trainer on the CPU that writes no file."""

    def make(config: train.TrainConfig) -> train.Trainer:
        tokenizer, corpus = train.load_text(config)
        return train.Trainer(config, corpus, tokenizer, train.start_runtime(config))

    return make


def tiny_flags(out_dir, **changes) -> list[str]:
    """TINY as a command line."""
    settings = {"out_dir": str(out_dir), **TINY, **changes}
    pairs = [(f"--{name}", str(value)) if value is not True else (f"--{name}",) for name, value in settings.items()]
    return [part for pair in pairs for part in pair]


def rows_of(out_dir) -> list[dict[str, str]]:
    with open(Path(out_dir) / "logs" / "train_metrics.csv", newline="") as f:
        return list(csv.DictReader(f))


def without_times(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k not in ("tok_per_s", "elapsed_s", "mfu")} for row in rows]


def weights_of(out_dir) -> dict[str, torch.Tensor]:
    return train.load_checkpoint(Path(out_dir) / "checkpoints" / "last.pt")["model"]


def same_weights(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
