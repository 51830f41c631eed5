"""A finished run of thirty steps that saved three times, and what tests of checkpoints ask of one."""

from __future__ import annotations

import contextlib
import errno
import functools
import multiprocessing
import os
import shutil
import subprocess
import time

import pytest
from conftest import TINY, log_of, rows_of, same_weights, weights_of, without_times

import train
from support.checkpoint import load_checkpoint

# By characters, since GPT-2's vocabulary makes a checkpoint a hundred times as large. A pass has 131 batches.
SETTINGS = {"tokenizer": "char", "steps": 30, "save_every": 10, "num_prompts": 0, "target_loss": 0.0}


@pytest.fixture(scope="module", name="finished")
def finished_fixture(tmp_path_factory):
    """The run directory of a run of 30 steps that saved at 10, 20 and 30. Not to be changed."""
    out = tmp_path_factory.mktemp("run") / "out"
    train.train(train.TrainConfig(**{**TINY, **SETTINGS, "out_dir": str(out)}))
    return out


@pytest.fixture(name="out")
def out_fixture(finished, tmp_path):
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "out")


def step_in(path) -> int | None:
    """The step of a checkpoint, None where there is none."""
    return load_checkpoint(path)["step"] if path.exists() else None


def steps_of(out) -> list[int]:
    """The steps in the CSV."""
    return [int(row["step"]) for row in rows_of(out)]


def assert_same_run(a, b) -> None:
    """Did both run directories come to the same rows and weights?"""
    assert without_times(rows_of(a)) == without_times(rows_of(b))
    assert same_weights(weights_of(a), weights_of(b))


def stop_at(step: int, monkeypatch) -> None:
    """From here on, runs are asked to stop after this step, as by a signal."""
    monkeypatch.setattr(train.Loop, "stop_asked", lambda loop: loop.progress.step == step)


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


may_mount = shutil.which("mount") and hasattr(os, "geteuid") and os.geteuid() == 0
needs_root = pytest.mark.skipif(not may_mount, reason="needs root")


@contextlib.contextmanager
def small_disk(path, size: str):
    """While entered, a folder is a disk of its own."""
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True)
    if done.returncode:
        pytest.skip("no right to mount a small disk here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


@functools.cache
def fork_server():
    """Processes are forked from one that has imported all that is needed: that takes longer than these runs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "train", "torch._dynamo"])  # the last one is torch's, at a first step
    return context


def start_process(function, *args):
    """A process that calls the function. A signal to it is one to a process of its own, as of a command line."""
    process = fork_server().Process(target=function, args=args, daemon=True)
    process.start()
    return process


def start_run(out, flags):
    """A process that trains, and has done a step of its own."""
    before = logged_steps(out)
    process = start_process(train.main, flags)
    while logged_steps(out) == before:
        assert process.is_alive()
        time.sleep(0.01)
    return process


def logged_steps(out) -> int:
    if not (out / "logs" / "train.log").exists():
        return 0
    return log_of(out).count(" | step ")


def kill(process) -> None:
    """As by kill -9."""
    process.kill()
    process.join()
