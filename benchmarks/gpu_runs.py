"""The parts of gpu_check.py that ask whether runs are right on a device: saving, resuming, several processes, and whole
runs to a proven loss."""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch
from common import ROOT, SAMPLE
from gpu_kit import CLOSE, SMALL, Check, NotHere, expect, flags_of, make_trainer, settings, start_runtime, steps, widest

import train
from support import checkpoint, text
from support.meeting import Meeting
from support.processes import Processes
from support.sharding import Sharded

# ---- saving and resuming ----


def save_bits(check: Check) -> dict:
    """What a save in the background wrote, beside a copy that was waited for, while training goes on at once."""
    shape = {} if check.small else {"n_layer": 6, "n_head": 8, "n_embd": 512}  # large enough to be copied for a while
    trainer = make_trainer(check, "fp16", **shape)
    run_dir = train.RunDirectory(check.folder + "/out")
    run_dir.prepare(overwrite=True, resumed=None)
    writer = train.CheckpointWriter(run_dir, [], mock.Mock(), trainer.runtime.host_copies(), (True, math.inf))
    tensors = 0
    for _ in range(2):  # the second one uses the first one's buffers again
        steps(trainer, 3)
        state = trainer.state_dict()
        waited_for = io.BytesIO()
        torch.save(state, waited_for)
        writer.save(state, None)
        for _ in range(6):
            trainer.train_step(writer.copies.hold_device)
        writer.finish()
        waited_for.seek(0)
        expected = torch.load(waited_for, map_location="cpu", weights_only=True)
        tensors = compare(expected, checkpoint.load_checkpoint(run_dir.last), "last.pt")
    writer.close()
    return {"equal to the bit": f"{tensors} tensors of last.pt, twice"}


def compare(a, b, where: str) -> int:
    """Raises Failed where two nested states differ. Returns how many tensors they have."""
    if isinstance(a, torch.Tensor):
        expect(torch.equal(a.cpu(), b.cpu()), f"{where} isn't what training had when it was saved")
        return 1
    if isinstance(a, dict):
        return sum(compare(a[key], b[key], f"{where} {key}") for key in a)
    if isinstance(a, list | tuple):
        return sum(compare(x, y, where) for x, y in zip(a, b, strict=True))
    expect(a == b, f"{where} isn't what training had when it was saved")
    return 0


def across(check: Check) -> dict:
    """A run in fp16 on the device goes on on a CPU, and then in fp16 on the device again: the widest gap to the run
    that stayed there, in nats."""
    whole = steps(make_trainer(check, "fp16"), 20)
    moved = []
    path = Path(check.folder, "moved.pt")
    for device, amp, count in ((check.device, "fp16", 8), ("cpu", "off", 4), (check.device, "fp16", 8)):
        trainer = make_trainer(check, amp, device=device)
        if path.exists():
            trainer.load_state_dict(checkpoint.load_checkpoint(path))
        moved += steps(trainer, count)
        checkpoint.save_checkpoint(path, trainer.state_dict())
    expect(trainer.progress.step == 20, f"after 20 steps in three places, the run is at step {trainer.progress.step}")
    gap = widest(moved, whole)
    expect(gap < CLOSE["fp16"], f"a loss is {gap:.4f} nats from that of the run that stayed on the device")
    return {"widest gap": gap}


def in_own_process(check: Check, flags: Sequence[str], killed_at: int | None = None):
    """Starts train.py with these flags, in a process that ends itself as by kill -9 after a step."""
    process = multiprocessing.get_context(check.start).Process(target=run_until, args=(flags, killed_at))
    process.start()
    return process


def run_until(flags: Sequence[str], killed_at: int | None) -> None:
    after_step = train.Loop.after_step

    def killed_after_step(loop, bar) -> str:
        if loop.progress.step == killed_at:
            loop.checkpoints.wait()  # so that the save before it is sure to be there
            os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
        return after_step(loop, bar)

    train.Loop.after_step = killed_after_step
    os._exit(train.main(flags))


def kill(check: Check) -> dict:
    """Runs that are killed after step 15 and go on from step 10, beside runs that are left alone. With --deterministic
    they must be the same to the bit; without it, how far apart they are is reported."""
    common = settings(check, steps=24, save_every=10, dropout=0.1, randomize_batches=True, amp="auto")
    text.load_text(common["input_file"], "char" if check.small else "gpt2", common["cache_dir"])  # once for all runs
    runs = {}
    resumed = {}
    for name in ("deterministic", "usual"):
        given = {**common, "deterministic": True} if name == "deterministic" else common
        whole, killed = f"{check.folder}/{name}_whole", f"{check.folder}/{name}_killed"
        runs[whole] = in_own_process(check, flags_of({**given, "out_dir": whole}))
        runs[killed] = in_own_process(check, flags_of({**given, "out_dir": killed}), killed_at=15)
    wait_for(runs)
    for name in ("deterministic", "usual"):
        killed = f"{check.folder}/{name}_killed"
        resumed[killed] = in_own_process(check, ["--resume", f"{killed}/checkpoints/last.pt"])
    wait_for(resumed)
    found = {name: distance(check, name) for name in ("deterministic", "usual")}
    expect(found["deterministic"] == SAME, f"with --deterministic, {found['deterministic']} after kill and resume")
    return found


SAME = "the same to the bit"


def distance(check: Check, name: str) -> str:
    """How far a run that was killed and resumed is from the one that wasn't, in words."""
    whole_losses, whole = rows_and_weights(f"{check.folder}/{name}_whole")
    killed_losses, killed = rows_and_weights(f"{check.folder}/{name}_killed")
    gap = widest(whole_losses, killed_losses)
    if gap == 0 and all(torch.equal(whole[key], killed[key]) for key in whole):
        return SAME
    weights = max((whole[key] - killed[key]).abs().max().item() for key in whole)
    return f"a loss is {gap:.1e} apart, and a weight {weights:.1e}"


def wait_for(runs: dict[str, multiprocessing.Process]) -> None:
    """Waits for the runs in these folders. Raises Failed for one that ended badly; being killed is no bad end here."""
    for folder, process in runs.items():
        process.join()
        record = Path(folder, "run.json")
        why = json.loads(record.read_text(encoding="utf-8"))["ended"] if record.exists() else "it never began"
        expect(process.exitcode in (0, -9, -15), f"{Path(folder).name} ended with {process.exitcode}: {why}")


def rows_and_weights(folder: str) -> tuple[list[float], dict]:
    """(the losses in a run's CSV, the weights of its last.pt)"""
    lines = Path(folder, "logs", "train_metrics.csv").read_text(encoding="utf-8").splitlines()
    column = lines[0].split(",").index("loss")
    state = checkpoint.load_checkpoint(Path(folder, "checkpoints", "last.pt"))
    return [float(line.split(",")[column]) for line in lines[1:]], state["model"]


# ---- several processes ----


def nccl(check: Check, parallel: str) -> dict:
    """One process that talks to itself through NCCL (on a CPU, gloo), with the whole model or with a part of it, which
    here is all of it: the same losses as without. torchrun with one process doesn't get there, since train.py then
    needs no one to talk to."""
    if check.device == "mps":
        raise NotHere("no library lets processes talk about what is on MPS")
    alone = steps(make_trainer(check, "fp16"), 5)
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    kind = {"ddp": Processes, "fsdp": Sharded}[parallel]
    with kind(start_runtime(check.device, "fp16"), Meeting(), wait_minutes=2) as together:
        gap = widest(steps(make_trainer(check, "fp16", together, parallel=parallel), 5), alone)
        expect(together.first("a") == "a", "what the first process says doesn't arrive")
        expect(together.any(3) == 3 and together.gather({"a": 1}) == [{"a": 1}], "what a process says doesn't arrive")
        together.wait()
    backend = "nccl" if check.device == "cuda" else "gloo"
    expect(gap < 1e-3, f"over {backend}, a loss is {gap:.1e} from the one without")
    return {backend: f"a loss is {gap:.1e} apart"}


def torchrun(check: Check) -> dict:
    """torchrun with one process trains as python does."""
    flags = flags_of(settings(check, steps=5, amp="auto"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    done = subprocess.run([*command, str(ROOT / "train.py"), *flags], stderr=subprocess.PIPE, text=True)
    words = done.stderr.strip().splitlines() or ["no words"]
    expect(done.returncode == 0, f"torchrun ended with {done.returncode}: {words[-1]}")
    by_torchrun, _ = rows_and_weights(check.folder + "/out")
    shutil.rmtree(check.folder + "/out")
    expect(train.main(flags) == 0, "train.py failed")
    alone, _ = rows_and_weights(check.folder + "/out")
    gap = widest(by_torchrun, alone)
    expect(gap < 1e-3, f"with torchrun, a loss is {gap:.1e} from the one without")
    return {"exit code": 0, "a loss is apart by": gap}


# ---- whole runs ----


def preset(check: Check, name: str) -> dict:
    """`--preset NAME` until its loss is proven. The run directory stays, without its checkpoints."""
    out = Path(check.keep, name)
    flags = ["--preset", name, "--out_dir", str(out), "--overwrite", "--device", check.device]
    if check.small:
        flags += flags_of({**SMALL, "input_file": SAMPLE, "steps": 140, "lr": 1e-3, "target_loss": 4.0, "no_mfu": True})
    os.chdir(ROOT)  # presets name their text from there
    try:
        code = train.main(flags)
    finally:
        shutil.rmtree(out / "checkpoints", ignore_errors=True)  # gigabytes
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    expect(code == 0 and record["ended"] == "target reached", f"the run ended so: {record['ended']}")
    names = ("precision", "steps", "tokens", "seconds_to_target", "seconds", "final_loss")
    return {name: record[name] for name in names}
