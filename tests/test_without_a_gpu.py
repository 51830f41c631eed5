"""As much of a GPU's path as can be run without a GPU: fp16 with loss scaling, from start to end; the types that CUDA's
autocast gives; and the branches that a CPU doesn't take, on tensors without numbers."""

from __future__ import annotations

import collections
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from checkpoint_kit import assert_same_run, stop_at
from conftest import log_of, rows_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import train
from support import machine, rundir
from support.checkpoint import load_checkpoint
from support.kernels import linear_cross_entropy

# ---- fp16 with loss scaling, on a CPU. train.py refuses it there because of its speed, which is no matter here ----


@pytest.fixture
def fp16(quick, monkeypatch):
    """fp16(**changes) -> a TrainConfig with --amp fp16, which works here for once. Its scaler begins at 2^24, a scale
    at which gradients overflow."""
    monkeypatch.setattr(rundir, "machine_problems", lambda device, amp: [])
    monkeypatch.setattr(machine, "pick_cpu_precision", lambda amp: (torch.float16, "a test asks for it"))
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**24))
    return functools.partial(quick, amp="fp16", steps=40, lr=1e-2, save_every=10, num_prompts=0, target_loss=0.0)


def scale_in(out) -> float:
    return load_checkpoint(out / "checkpoints" / "last.pt")["scaler"]["scale"]


def test_a_run_in_fp16_skips_what_overflows_and_learns(fp16, tmp_path):
    record = train.train(fp16())
    assert record["ended"] == "steps done"
    assert record["precision"] == "float16 autocast with loss scaling"
    losses = [float(row["loss"]) for row in rows_of(tmp_path / "out")]
    norms = [float(row["grad_norm"]) for row in rows_of(tmp_path / "out")]
    skipped = sum(not math.isfinite(norm) for norm in norms)
    assert 2 < skipped < 20
    assert scale_in(tmp_path / "out") == 2.0 ** (24 - skipped)
    assert losses[-1] < losses[0] - 0.5
    last_line = [line for line in log_of(tmp_path / "out").splitlines() if "step 40/40" in line][-1]
    assert last_line.endswith(f"| skipped {skipped}")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_in_fp16_that_was_stopped_goes_on_exactly(fp16, tmp_path, monkeypatch, optimizer):
    whole = fp16(optimizer=optimizer, out_dir=str(tmp_path / "whole"), dropout=0.1)
    stopped = fp16(optimizer=optimizer, out_dir=str(tmp_path / "stopped"), dropout=0.1)
    train.train(whole)
    with monkeypatch.context() as patch:
        stop_at(4, patch)  # while updates are still skipped
        assert train.train(stopped)["ended"] == "interrupted"
    stopped.resume = str(tmp_path / "stopped" / "checkpoints" / "last.pt")
    train.train(stopped)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    assert scale_in(tmp_path / "whole") == scale_in(tmp_path / "stopped") < 2.0**24


# ---- the types of CUDA's autocast, on tensors that only claim to be on CUDA ----


class Types(TorchDispatchMode):
    """Collects the types of what each operation gives."""

    def __init__(self):
        super().__init__()
        self.seen = collections.defaultdict(set)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.seen[function.overloadpacket.__name__].add(result.dtype)
        return result


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cuda_autocast_makes_products_16_bit_and_leaves_the_rest_in_fp32(monkeypatch, dtype):
    attended = []

    def attention(q, k, v, dropout_p, is_causal):
        attended.append((q.dtype, k.dtype, v.dtype, is_causal))
        return torch.empty_like(q)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)  # its own can't be had without CUDA
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # else autocast turns itself off
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    model = meta_model()
    with FakeTensorMode(), torch.no_grad(), torch.autocast("cuda", dtype):
        x = torch.empty(2, 64, 8, device="cuda:0")  # the residual stream
        with Types() as types:
            for module in (*model.transformer.h, model.transformer.ln_f):
                x = on_cuda(module, x)
                assert x.dtype == torch.float32
            logits = on_cuda(model.lm_head, x)
    assert attended == [(dtype, dtype, dtype, True)] * 2  # torch's kernel, as on any GPU
    assert types.seen["addmm"] == types.seen["mm"] == types.seen["gelu"] == {dtype}
    assert (logits.device.type, logits.dtype) == ("cuda", dtype)


def on_cuda(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    weights = {name: torch.empty(p.shape, device="cuda:0") for name, p in module.named_parameters()}
    return torch.func.functional_call(module, weights, (x,))


# ---- what isn't on a CPU takes other branches. On the device "meta" they run without numbers: reading one is an error


@pytest.fixture
def no_autocast(monkeypatch):
    """torch can't say whether there is autocast for "meta"."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)


def meta_model() -> train.GPT:
    with torch.device("meta"):
        return train.GPT(train.GPTConfig(block_size=64, vocab_size=50, n_layer=2, n_head=2, n_embd=8))


def meta_batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(2, 64, dtype=torch.long, device="meta"), torch.zeros(2, 64, dtype=torch.long, device="meta")


@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_off_the_cpu_forward_backward_and_clipping_read_no_number(no_autocast, monkeypatch, grad_checkpoint):
    def refuse(*_):
        raise AssertionError("this is for CPUs")

    monkeypatch.setattr(train, "attention_by_products", refuse)
    model = meta_model()
    model.grad_checkpoint = grad_checkpoint
    _, loss = model(*meta_batch(), keep_logits=False)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert norm.device.type == "meta"
    assert all(p.grad.shape == p.shape and p.grad.dtype == torch.float32 for p in model.parameters())
    with pytest.raises(RuntimeError, match="item"):
        norm.item()


def test_off_the_cpu_the_model_is_one_graph(no_autocast):
    explanation = torch._dynamo.explain(meta_model())(*meta_batch(), keep_logits=False)
    assert explanation.graph_break_count == 0
    assert explanation.graph_count == 1


def test_off_the_cpu_the_head_takes_larger_chunks(no_autocast):
    """4,096 rows at once, where a CPU takes 512."""

    def products(device: str) -> int:
        x = torch.zeros(5000, 8, device=device)
        weight = torch.zeros(50, 8, device=device)
        with Count() as count:
            linear_cross_entropy(x, weight, torch.zeros(5000, dtype=torch.long, device=device))
        return count.products

    assert products("meta") == 2
    assert products("cpu") == 10


class Count(TorchDispatchMode):
    """Counts matrix products."""

    products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.products += function is torch.ops.aten.mm.default
        return function(*args, **(kwargs or {}))
