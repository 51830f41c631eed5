"""The parts of gpu_check.py that ask whether training is right on a device. gpu_speed.py has those that ask how fast.

A part is a function of a Check. It returns what it found, {name: figure}. It raises Failed with one sentence where
something is wrong, and NotHere where the machine lacks what the part is about.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch._dynamo  # torch does it at an optimizer's first step: here it is once for all that are forked
import torch.distributed as dist
import torch.nn.functional as F
from common import ROOT, SAMPLE, Failed
from torch.utils._python_dispatch import TorchDispatchMode

import train
from support import checkpoint, inference, machine, pretrained, text

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
        shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64, "batch_size": 2, "seq_len": 32}
        shape["tokenizer"] = "char"
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


# ---- what the machine is ----


def describe(check: Check) -> dict:
    """Card, driver, versions. Raises NotHere for a device that isn't there."""
    if not machine.device_present(check.device):
        raise NotHere(f"device {check.device} isn't available here")
    runtime = machine.start_runtime(check.device, "off")
    found = {"device": runtime.describe_device(), "torch": torch.__version__, "python": sys.version.split()[0]}
    found["cores"] = os.cpu_count()
    if check.device == "cuda":
        properties = torch.cuda.get_device_properties(runtime.device)
        found |= {
            "memory": f"{properties.total_memory / 1e9:.1f} GB",
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "driver": driver(),
        }
    return found


def driver() -> str:
    """NVIDIA's driver, as its own tool says."""
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return said[0] if said else "unknown"


# ---- the model ----


@torch.no_grad()
def logits(check: Check) -> dict:
    """The logits of GPT-2 beside transformers' with the same weights. Each is compared with transformers' in full fp32:
    ours may be no more than twice as far from it as transformers' in the same precision."""
    transformers = needs("transformers")
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 512} if check.small else {}
    names = {"block_size": "n_positions"}
    config = train.GPTConfig(**shape)
    options = {names.get(name, name): value for name, value in vars(config).items() if name != "dropout"}
    torch.manual_seed(1)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**options)).eval().to(check.device)
    ours = train.GPT(config).eval()
    ours.load_state_dict({name: pretrained.transposed(name, one) for name, one in theirs.state_dict().items()})
    ours.to(check.device)
    idx = torch.randint(config.vocab_size, (2, 128 if check.small else 1024)).to(check.device)
    torch.set_float32_matmul_precision("highest")
    reference = theirs(idx).logits

    def distance(a: torch.Tensor) -> float:
        return ((a.float() - reference).norm() / reference.norm()).item()

    found = {"full fp32": distance(ours(idx)[0])}
    expect(found["full fp32"] < 1e-4, f"in full fp32, logits are {found['full fp32']:.1e} from transformers'")
    for amp in precisions(check):
        runtime = start_runtime(check.device, amp)
        name = runtime.describe_precision()
        with runtime.autocast():
            found[name] = distance(ours(idx)[0])
            other = distance(theirs(idx).logits)
        found[f"{name}, transformers"] = other
        wrong = f"in {name}, logits are {found[name]:.1e} from those in fp32, and transformers' only {other:.1e}"
        expect(found[name] < 2 * other + 1e-5, wrong)
    return found


@torch.no_grad()
def causality(check: Check) -> dict:
    """No token sees a later one, with torch's kernel and with a mask of our own. And the check that says so isn't blind:
    it finds attention that does look ahead."""
    runtime = start_runtime(check.device, "off")
    lengths = (32, 64) if check.small else (32, 256, 1000, 1024)
    config = train.GPTConfig(n_layer=2, n_head=4, n_embd=256, block_size=max(lengths))
    model = train.GPT(config, torch.Generator().manual_seed(1)).to(runtime.device)
    for kernel in ("torch's kernel", "a mask of our own"):
        if kernel == "a mask of our own":
            model.mask_explicitly()
        for amp in precisions(check):
            runtime = start_runtime(check.device, amp)
            for seq_len in lengths:
                leaks = inference.leaks_future(model, runtime, seq_len)
                expect(not leaks, f"with {kernel}, {NAMES[amp]} and {seq_len} tokens, a token sees a later one")
    with mock.patch.object(train, "attention_by_products", attention_to_all):
        expect(inference.leaks_future(model, runtime, 32), "the check doesn't find attention that looks ahead")
    return {"tried": f"{', '.join(map(NAMES.get, precisions(check)))} at {', '.join(map(str, lengths))} tokens"}


def attention_to_all(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float) -> torch.Tensor:
    """Not causal."""
    return F.scaled_dot_product_attention(q, k, v)


# ---- the step ----


def scaler(check: Check) -> dict:
    """An overflow in fp16: the loss scaler skips updates until its scale fits, training goes on, and skipped counts."""
    trainer = make_trainer(check, "fp16", steps=200)
    trainer.runtime.scaler = torch.amp.GradScaler(check.device, init_scale=2.0**40)
    start = [p.detach().clone() for p in trainer.model.parameters()]
    losses = steps(trainer, 1)
    same = all(torch.equal(a, b) for a, b in zip(start, trainer.model.parameters(), strict=True))
    expect(same, "an update that overflowed changed the weights")
    expect(not math.isfinite(trainer.measure()["grad_norm"]), "a scale of 2^40 didn't overflow in fp16")
    losses += steps(trainer, 79)
    skipped = int(trainer.progress.skipped)
    scale = trainer.runtime.scaler.get_scale()
    expect(0 < skipped < 40, f"of 80 updates, {skipped} were skipped")
    expect(scale == 2.0 ** (40 - skipped), f"{skipped} updates were skipped, but the scale is {scale:g}")
    expect(
        losses[-1] < losses[0] - 0.5, f"after the overflow the loss only went from {losses[0]:.3f} to {losses[-1]:.3f}"
    )
    return {"skipped": skipped, "scale": f"2^{40 - skipped}", "loss": f"{losses[0]:.3f} to {losses[-1]:.3f}"}


def losses(check: Check) -> dict:
    """Thirty steps on the device in each precision, beside the same on the CPU in fp32: the widest gap of a loss, in
    nats."""
    reference = steps(make_trainer(check, "off", device="cpu"), 30)
    found = {"loss on the CPU": f"{reference[0]:.4f} to {reference[-1]:.4f}"}
    for amp in precisions(check):
        gap = widest(steps(make_trainer(check, amp), 30), reference)
        found[NAMES[amp]] = gap
        expect(gap < CLOSE[amp], f"in {NAMES[amp]}, a loss is {gap:.4f} nats from the CPU's in fp32")
    return found


class NoReads(TorchDispatchMode):
    """Fails where a tensor is asked for its value: what CUDA's own debug mode does, on other devices."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise Failed("a value was read")
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """Within it, whatever waits for the device is an error."""
    if device != "cuda":
        with NoReads():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waits(check: Check, compiled: bool) -> dict:
    """A step waits for nothing. (Muon with a loss scaler does, on purpose; so Muon is tried in bf16.)"""
    cases = [("adamw", "fp16"), ("muon", "bf16")]
    if check.small:
        cases[0] = ("adamw", "off")  # a CPU's loss scaler reads its flag
    cases = [case for case in cases if case[1] in precisions(check)]
    for optimizer, amp in cases:
        trainer = make_trainer(check, amp, optimizer=optimizer, compile=compiled, grad_accum=2, n_layer=2)
        steps(trainer, 3)
        with no_waiting(check.device):
            for _ in range(3):
                trainer.train_step()
        expect(
            all(math.isfinite(p.sum()) for p in trainer.model.parameters()), f"{optimizer} in {amp} broke the weights"
        )
    return {"waits for nothing": ", ".join(f"{optimizer} {NAMES[amp]}" for optimizer, amp in cases)}


def newton_schulz(check: Check) -> dict:
    """Muon's orthogonalization in 16 bits beside fp32: how far apart they are, relative."""
    from support.kernels import orthogonalized

    shapes = [(64, 256), (64, 64)] if check.small else [(768, 3072), (3072, 768), (768, 768)]
    found = {"bfloat16": 0.0, "float16": 0.0}
    for shape in shapes:
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(check.device)
        exact = orthogonalized(matrix, torch.float32).float()
        for name, gap in found.items():
            rounded = orthogonalized(matrix, getattr(torch, name)).float()
            found[name] = max(gap, ((rounded - exact).norm() / exact.norm()).item())
    for name, gap in found.items():
        expect(gap < 0.2, f"in {name}, Newton-Schulz is {gap:.3f} from fp32")
    return found


# ---- saving and resuming ----


def save_bits(check: Check) -> dict:
    """What a save in the background wrote, beside a copy that was waited for, while training goes on at once."""
    shape = {} if check.small else {"n_layer": 6, "n_head": 8, "n_embd": 512}  # large enough to be copied for a while
    trainer = make_trainer(check, "fp16", **shape)
    run_dir = train.RunDirectory(check.folder + "/out")
    run_dir.prepare(overwrite=True, resumed=None)
    writer = train.CheckpointWriter(run_dir, [], mock.Mock(), trainer.runtime.device, (True, math.inf))
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
    folders = {}
    processes = []
    for name in ("deterministic", "usual"):
        for way in ("whole", "killed"):
            folder = folders[name, way] = f"{check.folder}/{name}_{way}"
            flags = flags_of({**common, "out_dir": folder})
            if name == "deterministic":
                flags.append("--deterministic")
            processes.append(in_own_process(check, flags, 15 if way == "killed" else None))
    join(processes)
    again = [["--resume", f"{folders[name, 'killed']}/checkpoints/last.pt"] for name in ("deterministic", "usual")]
    join([in_own_process(check, flags) for flags in again])
    found = {}
    for name in ("deterministic", "usual"):
        whole, killed = (rows_and_weights(folders[name, way]) for way in ("whole", "killed"))
        gap = widest(whole[0], killed[0])
        same = all(torch.equal(whole[1][key], killed[1][key]) for key in whole[1])
        found[name] = "the same to the bit" if same and gap == 0 else f"a loss is {gap:.1e} apart"
    expect(
        "to the bit" in found["deterministic"], f"with --deterministic, {found['deterministic']} after kill and resume"
    )
    return found


def join(processes: Sequence[multiprocessing.Process]) -> None:
    """Waits for them. Killed ones are as they should be; raises Failed for another bad end."""
    for process in processes:
        process.join()
        expect(process.exitcode in (0, -9, -15), f"train.py ended with {process.exitcode}: see above")


def rows_and_weights(folder: str) -> tuple[list[float], dict]:
    """(the losses in a run's CSV, the weights of its last.pt)"""
    lines = Path(folder, "logs", "train_metrics.csv").read_text(encoding="utf-8").splitlines()
    column = lines[0].split(",").index("loss")
    state = checkpoint.load_checkpoint(Path(folder, "checkpoints", "last.pt"))
    return [float(line.split(",")[column]) for line in lines[1:]], state["model"]


# ---- several processes ----


def nccl(check: Check) -> dict:
    """One process that talks to itself through NCCL (on a CPU, gloo): the same losses as without. torchrun with one
    process doesn't get there, since train.py then needs no one to talk to."""
    if check.device == "mps":
        raise NotHere("no library lets processes talk about what is on MPS")
    alone = steps(make_trainer(check, "fp16"), 5)
    one = start_runtime(check.device, "fp16")
    backend = "nccl" if check.device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{check.folder}/meet", rank=0, world_size=1)
    together = machine.Processes(one.device, one.amp_dtype, one.scaler, one.reason, rank=0, world_size=1)
    gap = widest(steps(make_trainer(check, "fp16", together), 5), alone)
    expect(together.first("a") == "a", "what the first process says doesn't arrive")
    expect(together.any(3) == 3 and together.gather({"a": 1}) == [{"a": 1}], "what a process says doesn't arrive")
    together.wait()
    together.close()
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
