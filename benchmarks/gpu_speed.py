"""The parts of gpu_check.py that ask how fast training is on a device, and how much memory it takes."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import time
from pathlib import Path

import checkpoints
import numpy as np
import sampling
import torch
from gpu_kit import Check, NotHere, flags_of, make_trainer, settings, steps
from peers import Setup
from throughput import most_memory, turn

import train
from support import checkpoint
from support.cli import is_out_of_memory
from support.inference import Request, Writer

GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024}


# ---- memory ----


def memory(check: Check) -> dict:
    """Peak memory and speed at each batch size, doubled until the memory is full; then the largest that fits, to a
    16th."""
    seq_len = 64 if check.small else 1024
    most = 4 if check.small else 4096
    shape = {} if check.small else GPT2
    trainer = make_trainer(check, "auto", **{**shape, "batch_size": 1, "seq_len": seq_len})
    steps(trainer, 5)  # until the optimizer has its averages: a loss scaler may skip the first steps
    found = {}
    fits = 0
    full = 1
    while full <= most and (one := try_batch(trainer, full, seq_len, 3)):
        found[f"{full} x {seq_len}"] = one
        fits = full
        full *= 2
    while full <= most and full - fits > max(1, fits // 16):
        middle = (fits + full) // 2
        one = try_batch(trainer, middle, seq_len, 1)
        if one:
            found["the largest that fits"] = f"{middle} x {seq_len}"
            fits = middle
        else:
            full = middle
    return found


def try_batch(trainer: train.Trainer, batch_size: int, seq_len: int, count: int) -> str:
    """What so many steps take, or "" where the memory is full."""
    device = trainer.runtime.device.type
    times = math.ceil((batch_size * seq_len + 1) / len(trainer.corpus.tokens))
    tokens = np.tile(trainer.corpus.tokens, times)
    trainer.batcher = train.TokenBatcher(tokens, batch_size, seq_len, device=device)
    trainer.losses = torch.zeros(trainer.batcher.n_batches, device=device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    try:
        for _ in range(count):
            begin = time.perf_counter()
            steps(trainer, 1)
            seconds.append(time.perf_counter() - begin)
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        return ""
    finally:
        trainer.optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.empty_cache()
    return f"{most_memory(device) / 1e9:.1f} GB, {batch_size * seq_len / min(seconds):.0f} tok/s"


# ---- speed ----


def throughput(check: Check, peer: str, batch_size: int, seq_len: int) -> dict:
    """One row of throughput.py, in one turn."""
    setup = Setup(check.device, batch_size, seq_len, steps=max(8, 65_536 // (batch_size * seq_len)), warmup=4)
    if check.small:
        setup = Setup(check.device, batch_size=1, seq_len=16, n_layer=1, steps=2, warmup=1)
    try:
        found = turn(peer, dataclasses.asdict(setup))
    except (ImportError, importlib.metadata.PackageNotFoundError) as e:
        raise NotHere(str(e).strip().splitlines()[0]) from None
    losses = found["losses"]
    return {
        "tok/s": round(found["rate"]),
        "share of the peak": round(found["share"], 3) if found["share"] else "unknown",
        "memory": f"{found['memory'] / 1e9:.1f} GB",
        "loss": f"{losses[0]:.2f} to {losses[-1]:.2f}",
    }


def sample_speed(check: Check) -> dict:
    """sample.py's tokens a second with the cache of keys and values, and without it. (The weights aren't trained: that
    changes the text, and not the work.)"""
    shape = {} if check.small else GPT2
    state = make_trainer(check, "off", **shape).state_dict()
    path = Path(check.folder, "best.pt")
    checkpoint.save_checkpoint(path, checkpoint.weights_of(state))
    found = {}
    for amp in ("auto", "off"):
        writer = Writer(path, train.ARCHITECTURES, check.device, amp)
        request = Request(writer.trained_prompt, max_new_tokens=8 if check.small else 100, temperature=0)
        sampling.cached(writer, dataclasses.replace(request, max_new_tokens=4))  # warms up
        fast, text = sampling.timed(sampling.cached, writer, request)
        slow, slow_text = sampling.timed(sampling.uncached, writer, request)
        same = "the same text" if text == slow_text else "another text"
        found[writer.runtime.describe_precision()] = f"{fast:.0f} tok/s with the cache, {slow:.0f} without, {same}"
    return found


def save_cost(check: Check) -> dict:
    """What a save in the background costs training, as checkpoints.py measures it: seconds."""
    shape = {} if check.small else {**GPT2, "batch_size": 8, "seq_len": 256}
    count = 60 if check.small else 400
    given = settings(check, **shape, amp="auto", steps=count, save_every=count // 2, save_minutes=0)
    spans, _ = checkpoints.timed_run("in the background", flags_of(given))
    found = checkpoints.costs(spans, warm=5)
    return {
        "a step": found["step"],
        "save() holds training": found["held"],
        "the write takes": found["write"],
        "training loses": found["lost"],
    }
