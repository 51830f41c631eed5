"""The parts of gpu_check.py that ask whether a step is right on a device: its logits, its losses, its precision."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from common import Failed
from gpu_kit import CLOSE, NAMES, Check, NotHere, expect, make_trainer, needs, precisions, start_runtime, steps, widest
from torch.utils._python_dispatch import TorchDispatchMode

import train
from support import inference, machine, pretrained

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
        name = "fp32 as in training" if amp == "off" else NAMES[amp]  # on CUDA its products are in TF32
        with runtime.autocast():
            found[name] = distance(ours(idx)[0])
            other = distance(theirs(idx).logits)
        found[f"{name}, transformers"] = other
        wrong = f"in {name}, logits are {found[name]:.1e} from those in fp32, and transformers' only {other:.1e}"
        expect(found[name] < 2 * other + 1e-5, wrong)
    return found


@torch.no_grad()
def causality(check: Check) -> dict:
    """No token sees a later one, with torch's kernel and with a mask of our own. The check that says so isn't blind: it
    finds attention that does look ahead."""
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
    cases = [case for case in cases if case[1] in precisions(check)]
    for optimizer, amp in cases:
        trainer = make_trainer(check, amp, optimizer=optimizer, compile=compiled, grad_accum=2, n_layer=2)
        steps(trainer, 3)
        with no_waiting(check.device):
            for _ in range(3):
                trainer.train_step()
        finite = all(p.detach().isfinite().all() for p in trainer.model.parameters())
        expect(finite, f"{optimizer} in {NAMES[amp]} broke the weights")
    return {"waits for nothing": ", ".join(f"{optimizer} {NAMES[amp]}" for optimizer, amp in cases)}


def newton_schulz(check: Check) -> dict:
    """Muon's orthogonalization in 16 bits beside fp32: how far apart they are, relative."""
    from support.kernels import orthogonalized

    shapes = [(64, 256), (64, 64)] if check.small else [(768, 3072), (3072, 768), (768, 768)]
    found = {"bfloat16": 0.0, "float16": 0.0}
    for shape in shapes:
        matrix = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1)).to(check.device)
        exact = orthogonalized(matrix, torch.float32).float()
        for name, gap in found.items():
            rounded = orthogonalized(matrix, getattr(torch, name)).float()
            found[name] = max(gap, ((rounded - exact).norm() / exact.norm()).item())
    for name, gap in found.items():
        expect(gap < 0.2, f"in {name}, Newton-Schulz is {gap:.3f} from fp32")
    return found
