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


def leaky(q, k, v, *, is_causal=False, **options):
    """What MPS did in half precision: one causal mask for each group of four queries, that of the last one."""
    mask = None
    if is_causal:
        rows = torch.arange(q.size(2)) // 4 * 4 + 3
        mask, is_causal = torch.arange(k.size(2))[None, :] <= rows[:, None], False
    return SOUND(q, k, v, mask, is_causal=is_causal, **options)


SOUND = F.scaled_dot_product_attention


@pytest.fixture
def kernel_model(model):
    """A model that attends by torch's kernel, as on a GPU."""
    for block in model.transformer.h:
        block.attn.by_products = False
    return model


@pytest.mark.parametrize("seq_len", [8, 17, 32])
def test_a_leak_within_groups_of_four_is_found_and_masked(kernel_model, monkeypatch, seq_len):
    monkeypatch.setattr(F, "scaled_dot_product_attention", leaky)
    assert train.leaks_future(kernel_model, runtime(), seq_len)
    assert "explicit mask" in train.check_causality(kernel_model, runtime(), seq_len)
    assert not train.leaks_future(kernel_model, runtime(), seq_len)


def test_a_leak_in_half_precision_falls_back_to_fp32(model, monkeypatch):
    sound = train.attention_by_products

    def leaky_in_half(q, k, v, dropout):
        return sound(q, k, v, dropout) if q.dtype == torch.float32 else SOUND(q, k, v)

    monkeypatch.setattr(train, "attention_by_products", leaky_in_half)
    half = runtime(torch.bfloat16)
    assert "fp32" in train.check_causality(model, half, 16)
    assert half.amp_dtype is None


def test_a_leak_that_nothing_stops_ends_the_run(model, monkeypatch):
    monkeypatch.setattr(train, "attention_by_products", lambda q, k, v, dropout: SOUND(q, k, v))
    with pytest.raises(train.RunError, match="leaks future tokens"):
        train.check_causality(model, runtime(), 16)


# ---- how fast the device could be ----


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("Tesla V100-SXM2-16GB", 125e12),
        ("Tesla V100-PCIE-32GB", 112e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("Tesla T4", 65e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 3080", 59.5e12),
    ],
)
def test_the_peak_of_a_card_is_found_by_its_name(name, peak):
    assert train.gpu_peak(name) == pytest.approx(peak)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3080 Ti",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce GTX 1080",
        "AMD Instinct MI300X",
        "",
    ],
)
def test_no_card_has_the_peak_of_one_that_is_called_nearly_so(name):
    assert train.gpu_peak(name) is None


def test_the_limit_of_a_cpu_is_the_rate_of_its_products(monkeypatch):
    """By a clock on which each product takes a second: 12 of them in each of the 3 layers, and 3 in the head."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(ticks))
    config = train.GPTConfig(n_layer=3, n_embd=4, n_head=1, vocab_size=10)
    work = 6 * 7 * (3 * 12 * 4 * 4 + 10 * 4)
    assert train.matmul_rate(config, 7, torch.float32) == pytest.approx(work / (3 * 12 + 3))


def test_a_limit_is_measured_on_a_cpu_unless_it_is_not_wanted():
    config = train.GPTConfig(n_layer=1, n_embd=16, n_head=1)
    limit, what = train.find_limit(runtime(), config, 64, measured=True)
    assert limit > 1e6
    assert "measured" in what
    limit, what = train.find_limit(runtime(), config, 64, measured=False)
    assert limit is None
    assert "--no_mfu" in what


@pytest.mark.parametrize(
    ("name", "dtype", "limit"),
    [("NVIDIA H200", torch.float16, 989e12), ("NVIDIA H200", None, None), ("Some GPU", torch.float16, None)],
)
def test_a_gpu_is_never_measured(monkeypatch, name, dtype, limit):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(train, "matmul_rate", lambda *args: pytest.fail("measured"))
    on_gpu = train.Runtime(torch.device("cuda"), dtype, None, "")
    assert train.find_limit(on_gpu, train.GPTConfig(), 64, measured=True)[0] == limit


def test_emulated_bf16_is_not_measured(monkeypatch):
    """It would take minutes."""
    monkeypatch.setattr(train, "cpu_has_bf16", lambda: False)
    monkeypatch.setattr(train, "matmul_rate", lambda *args: pytest.fail("measured"))
    limit, what = train.find_limit(runtime(torch.bfloat16), train.GPTConfig(), 64, measured=True)
    assert limit is None
    assert "emulates" in what


def test_measuring_a_slow_cpu_ends_after_one_round(monkeypatch):
    ticks = iter(range(0, 10**9, 100))
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(ticks))
    config = train.GPTConfig(n_layer=1, n_embd=4, n_head=1, vocab_size=10)
    assert train.matmul_rate(config, 7, torch.float32) == pytest.approx(6 * 7 * (12 * 4 * 4 + 10 * 4) / 1500)
    assert next(ticks) < 100 * 40


# ---- memory ----


def small_memory(monkeypatch, gigabytes):
    monkeypatch.setattr(train, "memory_of", lambda device: gigabytes and int(gigabytes * 1e9))


GPT2 = train.GPTConfig()


ONE_WINDOW = train.TrainConfig(optimizer="adamw", batch_size=1, seq_len=1024)


def test_what_cannot_fit_is_said_with_its_size_and_what_would(monkeypatch):
    """124,439,808 parameters, in fp32: 16 bytes each to train, 12 for the copy that is written; 56 bytes for each of
    768 numbers of 1,024 tokens in 12 blocks."""
    small_memory(monkeypatch, 3)
    with pytest.raises(train.UsageError) as caught:
        train.check_memory(ONE_WINDOW, GPT2, runtime())
    assert str(caught.value) == (
        "training 124,439,808 parameters takes at least 4.0 GB (2.0 for weights, gradients and optimizer, 0.5 for"
        " activations, 1.5 for the copy that is written as last.pt), and this machine has 3.0 GB: choose a model of at"
        " most 96 million parameters"
    )
    small_memory(monkeypatch, 4.1)
    train.check_memory(ONE_WINDOW, GPT2, runtime())
    with pytest.raises(
        train.UsageError, match=r"4\.5 GB .*: lower --batch_size or --seq_len, or add --grad_checkpoint"
    ):
        train.check_memory(train.TrainConfig(optimizer="adamw", batch_size=8, seq_len=256), GPT2, runtime())
    train.check_memory(
        train.TrainConfig(optimizer="adamw", batch_size=8, seq_len=256, grad_checkpoint=True), GPT2, runtime()
    )
    train.check_memory(train.TrainConfig(optimizer="adamw", batch_size=8, seq_len=256), GPT2, runtime(torch.bfloat16))


def test_several_processes_share_a_machine(monkeypatch):
    small_memory(monkeypatch, 15)
    train.check_memory(ONE_WINDOW, GPT2, runtime())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(train.UsageError, match=r"at least 16\.1 GB .* in each of 4 processes"):
        train.check_memory(ONE_WINDOW, GPT2, runtime())


def test_a_machine_that_does_not_say_what_it_has_is_tried(monkeypatch):
    small_memory(monkeypatch, None)
    train.check_memory(train.TrainConfig(batch_size=10**6), GPT2, runtime())


def test_this_machine_says_what_it_has():
    assert 10**8 < train.memory_of(CPU) < 10**14


def test_a_model_that_cannot_fit_leaves_nothing_behind(tiny, tmp_path, monkeypatch):
    small_memory(monkeypatch, 0.001)
    with pytest.raises(train.UsageError, match="takes at least"):
        train.train(tiny())
    assert not (tmp_path / "out").exists()
