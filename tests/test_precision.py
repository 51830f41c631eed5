"""Device, number format, and the test that no token sees a later one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import train

CPU = torch.device("cpu")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return train.GPT(train.GPTConfig(block_size=32, vocab_size=101, n_layer=2, n_head=2, n_embd=16))


def runtime(amp_dtype=None):
    return train.Runtime(CPU, amp_dtype, None, "")


@pytest.mark.parametrize("native", [True, False])
def test_auto_takes_bf16_on_a_cpu_only_where_it_is_native(monkeypatch, native):
    monkeypatch.setattr(train, "cpu_has_bf16", lambda: native)
    dtype, reason = train.pick_precision("auto", CPU)
    assert dtype == (torch.bfloat16 if native else None)
    assert "native bf16" in reason
    assert train.pick_precision("off", CPU)[0] is None
    assert train.pick_precision("bf16", CPU)[0] == torch.bfloat16


@pytest.mark.parametrize("works", [True, False])
def test_auto_takes_fp16_on_a_gpu_only_where_loss_scaling_works(monkeypatch, works):
    monkeypatch.setattr(train, "scaler_works", lambda device: works)
    assert train.pick_precision("auto", torch.device("mps"))[0] == (torch.float16 if works else None)
    if not works:
        with pytest.raises(train.UsageError, match="use --amp off"):
            train.pick_precision("fp16", torch.device("mps"))


def test_the_probe_of_loss_scaling_takes_a_real_step():
    assert train.scaler_works(CPU) is True
    assert train.scaler_works(torch.device("meta")) is False


def test_bf16_is_not_assumed_of_a_cpu(monkeypatch):
    for capabilities, native in (
        ({"avx512_f": True}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda c=capabilities: {"architecture": "x86_64", **c})
        assert train.cpu_has_bf16() is native


@pytest.mark.parametrize("native", [True, False])
def test_bf16_is_timed_where_the_processor_does_not_tell(monkeypatch, native):
    clock = iter([0.0, 1.0, 2.0, 2.5 if native else 30.0])  # fp32 takes 1 second, bf16 half of it or 28
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "arm64", "bf16": True})
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(clock))
    assert train.cpu_has_bf16() is native


@pytest.mark.parametrize("seq_len", [1, 2, 3, 17, 32])
@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16])
def test_sound_attention_passes(model, seq_len, amp_dtype):
    assert train.check_causality(model, runtime(amp_dtype), seq_len) == "a moved token changed no earlier logit"


def leaky(q, k, v, mask=None, *, is_causal=False, **options):
    """What MPS did in half precision: one causal mask for each group of four queries, that of the last one."""
    if is_causal:
        rows = torch.arange(q.size(2)) // 4 * 4 + 3
        mask, is_causal = torch.arange(k.size(2))[None, :] <= rows[:, None], False
    return SOUND(q, k, v, mask, is_causal=is_causal, **options)


SOUND = F.scaled_dot_product_attention


@pytest.mark.parametrize("seq_len", [8, 17, 32])
def test_a_leak_within_groups_of_four_is_found_and_masked(model, monkeypatch, seq_len):
    monkeypatch.setattr(F, "scaled_dot_product_attention", leaky)
    assert train.leaks_future(model, runtime(), seq_len)
    assert "explicit mask" in train.check_causality(model, runtime(), seq_len)
    assert not train.leaks_future(model, runtime(), seq_len)


def test_a_leak_in_half_precision_falls_back_to_fp32(model, monkeypatch):
    def leaky_in_half(q, k, v, mask=None, **options):
        return SOUND(q, k, v, mask, **options) if q.dtype == torch.float32 else SOUND(q, k, v)

    monkeypatch.setattr(F, "scaled_dot_product_attention", leaky_in_half)
    half = runtime(torch.bfloat16)
    assert "fp32" in train.check_causality(model, half, 16)
    assert half.amp_dtype is None


def test_a_leak_that_nothing_stops_ends_the_run(model, monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, mask=None, **options: SOUND(q, k, v))
    with pytest.raises(train.RunError, match="leaks future tokens"):
        train.check_causality(model, runtime(), 16)
