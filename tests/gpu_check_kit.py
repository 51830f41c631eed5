"""gpu_check.py with parts that fail, hang or are broken on purpose: python tests/gpu_check_kit.py --slower 0.1

Broken ones are the real parts on a program that has a fault; each has to find it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import gpu_check  # noqa: E402
import gpu_parts  # noqa: E402
import gpu_runs  # noqa: E402
import torch  # noqa: E402
from gpu_check import Part  # noqa: E402
from gpu_kit import Check, NotHere  # noqa: E402

import train  # noqa: E402
from support import machine  # noqa: E402


def works(check: Check) -> dict:
    return {"figure": 0.123456, "words": "a | b"}


def fails(check: Check) -> dict:
    print("some words before")
    raise AssertionError("two and two are five")


def crashes(check: Check) -> dict:
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(check: Check) -> dict:
    sleeper = subprocess.Popen(["sleep", "600"])
    Path(check.keep).mkdir()
    Path(check.keep, "sleeper").write_text(str(sleeper.pid))
    print("and then", flush=True)
    time.sleep(600)


def is_elsewhere(check: Check) -> dict:
    raise NotHere("this machine has no such thing")


def wrong_logits(check: Check) -> dict:
    with mock.patch.object(train.F, "gelu", lambda x, approximate: torch.relu(x)):
        return gpu_parts.logits(check)


def blind_causality(check: Check) -> dict:
    with mock.patch.object(gpu_parts.inference, "leaks_future", lambda *_: False):
        return gpu_parts.causality(check)


def looks_ahead(check: Check) -> dict:
    with mock.patch.object(train, "attention_by_products", gpu_parts.attention_to_all):
        return gpu_parts.causality(check)


def never_skips(check: Check) -> dict:
    with mock.patch.object(torch.amp.GradScaler, "step", lambda scaler, optimizer: optimizer.step()):
        return gpu_parts.scaler(check)


def trains_only_in_fp32(check: Check) -> dict:
    with mock.patch.object(torch.amp.GradScaler, "step", lambda scaler, optimizer: None):
        return gpu_parts.losses(check)


def reads_the_loss(check: Check) -> dict:
    step = train.Trainer.train_step

    def reading_step(trainer) -> None:
        step(trainer)
        trainer.progress.loss.item()

    with mock.patch.object(train.Trainer, "train_step", reading_step):
        return gpu_parts.waits(check, False)


def saves_without_a_copy(check: Check) -> dict:
    write = train.CheckpointWriter.write

    def late_write(writer, *job) -> None:
        time.sleep(0.5)  # until training has gone on
        write(writer, *job)

    late = mock.patch.object(train.CheckpointWriter, "write", late_write)
    with late, mock.patch.object(machine.HostCopies, "copy", lambda copies, content: content):
        return gpu_runs.save_bits(check)


def forgets_its_place(check: Check) -> dict:
    with mock.patch.object(train.TokenBatcher, "load_state_dict", lambda batcher, state: None):
        return gpu_runs.kill(check)


def forgets_its_weights(check: Check) -> dict:
    with mock.patch.object(train.GPT, "load_state_dict", lambda model, state: None):
        return gpu_runs.across(check)


ODD = [works, fails, crashes, hangs, is_elsewhere, works]
BROKEN = [wrong_logits, blind_causality, looks_ahead, never_skips, trains_only_in_fp32, reads_the_loss]
BROKEN += [saves_without_a_copy, forgets_its_place, forgets_its_weights]

if __name__ == "__main__":
    gpu_check.PARTS[:] = []
    for number, one in enumerate(ODD + BROKEN):
        takes = 1 if one is hangs else 100  # with --slower 0.1, limits of 2 and 32 seconds
        gpu_check.PARTS.append(Part(f"{one.__name__}-{number}", "on purpose", one, takes))
    raise SystemExit(gpu_check.main())
