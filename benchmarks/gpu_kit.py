"""What the parts of gpu_check.py share. A part is a function of a Check. It returns what it found, {name: figure}. It
raises Failed with one sentence where something is wrong, and NotHere where the machine lacks what the part is about.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch._dynamo  # torch does it at an optimizer's first step: here it is once for all that are forked
from common import SAMPLE, Failed

import train
from support import machine, text

SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64, "batch_size": 2, "seq_len": 32, "tokenizer": "char"}
NAMES = {"off": "fp32", "fp16": "fp16", "bf16": "bf16"}  # of --amp
# How far 30 losses on a device may be from those of a CPU in fp32, in nats: a few times what rounding makes of them.
# For fp32, products are in TF32 on CUDA.
CLOSE = {"off": 0.01, "fp16": 0.02, "bf16": 0.08}


class NotHere(Exception):
    """Why a part can't be tried on this machine, in one sentence."""


@dataclass(frozen=True)
class Check:
    """What all parts are told."""

    device: str  # cpu, cuda or mps
    small: bool  # models so small that a CPU takes seconds
    start: str  # how a process begins: fork, which has all modules already, or spawn
    folder: str  # where a part may write
    keep: str  # where the runs of presets stay


def expect(holds: bool, sentence: str) -> None:
    """Raises Failed unless it holds."""
    if not holds:
        raise Failed(sentence)


def needs(package: str):
    """A package that a part can't do without."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise NotHere(f"{package} isn't installed") from None


# ---- models to try it with ----


def settings(check: Check, **changes) -> dict:
    """Of a short run of a model that trains in seconds: on the bundled play, and with nothing but training."""
    shape = {"n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 256, "batch_size": 4, "seq_len": 128}
    if check.small:
        shape = SMALL
    usual = {"input_file": str(SAMPLE), "device": check.device, "steps": 30, "lr": 1e-3, "target_loss": 0.0}
    quiet = {"num_prompts": 0, "recall_places": 0, "no_mfu": True, "log_every": 1}
    places = {"out_dir": check.folder + "/out", "cache_dir": check.folder + "/cache"}
    return {**shape, **usual, **quiet, **places, **changes}


def flags_of(given: dict) -> list[str]:
    """The same as a command line."""
    flags = []
    for name, value in given.items():
        flags.append(f"--{name}")
        if value is not True:
            flags.append(str(value))
    return flags


def start_runtime(device: str, amp: str) -> machine.Runtime:
    """As train.py has it, but for two things. fp16 on a CPU, which is too slow for train.py, is fine for a small model.
    And loss scaling begins so low that no update is skipped: runs that are compared must not differ by that."""
    runtime = machine.start_runtime(device, "off" if device == "cpu" and amp == "fp16" else amp)
    if amp == "fp16":
        runtime.amp_dtype = torch.float16
        runtime.scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    return runtime


def make_trainer(check: Check, amp: str, runtime: machine.Runtime | None = None, **changes) -> train.Trainer:
    """A Trainer that writes no file."""
    config = train.TrainConfig(**settings(check, amp=amp, **changes))
    runtime = runtime or start_runtime(config.device, amp)
    tokenizer, corpus = text.load_text(config.input_file, config.tokenizer, config.cache_dir)
    return train.Trainer(config, corpus, tokenizer, runtime)


def steps(trainer: train.Trainer, count: int) -> list[float]:
    """Trains, and returns the losses."""
    losses = []
    for _ in range(count):
        trainer.train_step()
        losses.append(trainer.progress.loss)
    return [float(loss) for loss in losses]  # read at the end, so that a GPU may run behind


def precisions(check: Check) -> list[str]:
    """What --amp can be on the device."""
    has_bf16 = check.device != "cuda" or machine.native_bf16(torch.device("cuda"))
    return ["off", "fp16", "bf16"] if has_bf16 else ["off", "fp16"]


def widest(a: Sequence[float], b: Sequence[float]) -> float:
    """The largest difference between two rows of losses. Infinite where one isn't a number."""
    gap = max(abs(x - y) for x, y in zip(a, b, strict=True))
    return gap if math.isfinite(gap) else math.inf
