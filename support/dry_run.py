"""What a run would take: memory, disk, length and time, for `train.py --dry_run`."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from support import rundir
from support.cli import duration
from support.machine import checkpoint_bytes, memory_needs, memory_of


def show(trainer) -> None:
    lines = list(describe(trainer))  # by all processes
    if trainer.runtime.rank == 0:
        rundir.show("\n".join(lines))


def describe(trainer) -> Iterator[str]:
    """Yields it in lines, the last one after two steps. Writes nothing. `trainer` is train.py's Trainer."""
    config = trainer.config
    device = trainer.runtime.device
    parameters = sum(p.numel() for p in trainer.model.parameters())
    yield f"Device: {trainer.runtime.describe_device()}, {trainer.runtime.describe_precision()}"
    yield f"Parameters: {parameters:,}"
    needed = sum(memory_needs(trainer.runtime, trainer.model, config).values())
    there = memory_of(device)
    yield f"Memory: at least {needed / 1e9:.1f} GB; there are {there / 1e9:.1f} GB" if there else "Memory: unknown"
    checkpoints = checkpoint_bytes(trainer.model, config.optimizer)
    free = shutil.disk_usage(existing_folder(config.out_dir)).free
    yield f"Disk: {checkpoints / 1e9:.2f} GB for last.pt, previous.pt and best.pt; {free / 1e9:.1f} GB are free"
    total = config.steps * trainer.tokens_per_step
    passes = ""
    if trainer.batcher.n_batches:  # None for a stream
        passes = f", {config.steps * trainer.batches_per_step / trainer.batcher.n_batches:.1f} passes"
    yield f"Length: {config.steps:,} steps of {trainer.tokens_per_step:,} tokens, {total:,} in all{passes}"
    yield f"Learning rate: {describe_curve(trainer)}"
    trainer.train_step()  # the first also sets up
    float(trainer.progress.loss)
    start = time.monotonic()
    trainer.train_step()
    float(trainer.progress.loss)  # waits for the device
    seconds = time.monotonic() - start
    rate = trainer.tokens_per_step / seconds
    yield f"Speed: {rate:,.0f} tok/s in the second of two steps, so {duration(seconds * config.steps)} for all of them"


def existing_folder(path: str) -> Path:
    """The folder, or the nearest above it that is there."""
    absolute = Path(path).absolute()
    return next(folder for folder in (absolute, *absolute.parents) if folder.is_dir())


def describe_curve(trainer) -> str:
    """The learning rate at its first step, its peak and its last step."""
    config = trainer.config
    first = trainer.optimizer.param_groups[0]["lr"]
    embeddings = f", of the embeddings {config.embed_lr:.2e}" if config.embed_lr else ""
    peak = f"{config.lr:.2e} at step {max(1, config.warmup_steps)}{embeddings}"
    shape = {"cos": "cosine", "linear": "line"}[config.anneal]
    return f"{first:.2e} at step 1, up to {peak}, down along a {shape} to about 0 at step {config.steps}"
