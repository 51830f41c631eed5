"""Several processes under torchrun, and what their four verbs are for one process alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, log_of, rows_of, same_weights, tiny_flags, weights_of, without_times

import train
from support.machine import Runtime

# ---- one process ----


def test_for_one_process_the_verbs_change_nothing():
    alone = Runtime(torch.device("cpu"), None, None, "")
    value = {"step": 3}
    tensor = torch.ones(2)
    model = torch.nn.Linear(1, 1)
    assert alone.first(value) is value
    assert alone.any(15) == 15
    assert alone.any(0) == 0
    assert alone.gather(value) == [value]
    assert alone.gather(tensor)[0] is tensor
    assert alone.wait() is None
    assert alone.wrap(model) is model
    assert alone.talk_is_free


# ---- two of them ----

# What the two processes do, one run after the other: they start once, which takes longer than all of it.
PROGRAM = """
import json, os, sys
import torch
import torch.distributed as dist
import train
from support.machine import Processes, start_runtime

rank = int(os.environ["RANK"])
runtime = start_runtime("cpu", "off")

# the verbs
assert isinstance(runtime, Processes)
assert runtime.first(f"of {rank}") == "of 0"
assert runtime.any(0) == 0
assert runtime.any(15 * rank) == 15
assert runtime.gather({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
assert [one.tolist() for one in runtime.gather(torch.tensor([rank, 7]))] == [[0, 7], [1, 7]]
runtime.wait()

# torchrun lets its processes meet once, so all runs have this one meeting
dist.init_process_group = lambda *args: None
leave = Processes.close
Processes.close = lambda runtime: None

# a signal that only the second process hears
real = train.Loop.stop_asked

def stop_asked(loop):
    first_start = loop.config.out_dir.endswith("parts") and not loop.trainer.given.resume
    if first_start and rank == 1 and loop.progress.step == 8:
        loop.stop.signum = 15
    return real(loop)

train.Loop.stop_asked = stop_asked

# the runs
codes = [train.main(flags) for flags in json.loads(sys.argv[1])]
leave(runtime)
assert not dist.is_initialized()
if rank == 0:
    with open("codes.json", "w") as f:
        json.dump(codes, f)
"""

SETTINGS = {"tokenizer": "char", "target_loss": 0, "num_prompts": 1, "seq_len": 64, "batch_size": 1}
PLAIN = {"steps": 25, "save_every": 25, "val_fraction": 0.2, **SETTINGS}
DROPPING = {"steps": 16, "dropout": 0.3, **SETTINGS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, short_text):
    """Where two processes together have made these runs: pair, whole, and parts, which was stopped and resumed."""
    folder = tmp_path_factory.mktemp("two")
    program = folder / "program.py"
    program.write_text(PROGRAM)
    runs = [
        tiny_flags(folder / "pair", **PLAIN, grad_accum=2, input_file=short_text),
        tiny_flags(folder / "whole", **DROPPING, input_file=short_text),
        tiny_flags(folder / "parts", **DROPPING, input_file=short_text),
        ["--resume", str(folder / "parts" / "checkpoints" / "last.pt")],
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    torchrun += ["--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0"]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    command = [*torchrun, str(program), json.dumps(runs)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=200, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "codes.json").read_text()) == [0, 0, 143, 0]
    return folder


def record_of(out_dir) -> dict:
    return json.loads((out_dir / "run.json").read_text())


def test_two_processes_do_what_one_does_with_twice_the_accumulation(folder, tmp_path, short_text):
    """And what they measure together, of the proof, held-out text and recall, is what one measures alone."""
    alone = tmp_path / "alone"
    pair = folder / "pair"
    assert train.main(tiny_flags(alone, **PLAIN, grad_accum=4, input_file=short_text)) == 0
    for one, two in zip(rows_of(alone), rows_of(pair), strict=True):
        for name in ("step", "epoch", "tokens", "lr"):
            assert one[name] == two[name]
        for name in ("loss", "avg_loss", "grad_norm"):
            assert float(one[name]) == pytest.approx(float(two[name]), rel=1e-4)
    one = record_of(alone)
    two = record_of(pair)
    assert (one["processes"], two["processes"]) == (1, 2)
    for name in ("final_loss", "val_loss", "best_val_loss"):
        assert one[name] == pytest.approx(two[name], rel=1e-4)
    for name in ("recall", "recall_at_windows"):
        assert one[name] == pytest.approx(two[name], abs=0.1)
    assert (pair / "samples" / "samples.txt").read_text().count("STEP ") == 1
    assert "Ended: steps done at step 25 of 25" in log_of(pair)


def test_two_processes_stop_together_and_resume_exactly(folder):
    """At a signal that only the second process hears, in a run with dropout."""
    record = record_of(folder / "parts")
    assert "Ended: interrupted at step 8 of 16" in log_of(folder / "parts")
    assert (record["ended"], record["steps"], len(record["resumed"])) == ("steps done", 16, 1)
    assert without_times(rows_of(folder / "whole")) == without_times(rows_of(folder / "parts"))
    assert same_weights(weights_of(folder / "whole"), weights_of(folder / "parts"))
