"""Device and precision, what fits into the memory, copies in it, determinism, and the limit that mfu is measured by."""

from __future__ import annotations

import json
import os
import time
import types

import pytest
import torch
from conftest import rows_of, same_weights, tiny_flags, weights_of, without_times

import train
from support import machine
from support.cli import RunError, UsageError
from support.machine import HostCopies, Runtime
from train import GPT, GPTConfig

CPU = torch.device("cpu")
SHORT = {"tokenizer": "char", "steps": 2, "num_prompts": 0}


def runtime(amp_dtype=None) -> Runtime:
    return Runtime(CPU, amp_dtype, None, "")


def outline(config: GPTConfig) -> GPT:
    """A model that has shapes and no numbers."""
    with machine.outline():
        return GPT(config)


def test_in_an_outline_nothing_is_filled_with_random_numbers():
    """torch would import sympy for it, which takes a second."""
    with machine.NoRandomNumbers():
        zeros = torch.zeros(9)
        zeros.normal_()
        assert not zeros.any()
        linear = torch.nn.Linear(9, 9)
        linear.weight.detach().fill_(3.0)
        linear.reset_parameters()
        assert linear.weight.eq(3.0).all()
    assert {p.device.type for p in outline(GPTConfig()).parameters()} == {"meta"}


# ---- device and precision ----


@pytest.mark.parametrize("native", [True, False])
def test_auto_takes_bf16_on_a_cpu_only_where_it_is_native(monkeypatch, native):
    monkeypatch.setattr(machine, "cpu_has_bf16", lambda: native)
    dtype, reason = machine.pick_precision("auto", CPU)
    assert dtype == (torch.bfloat16 if native else None)
    assert "native bf16" in reason
    assert machine.pick_precision("off", CPU)[0] is None
    assert machine.pick_precision("bf16", CPU)[0] == torch.bfloat16


def test_auto_takes_fp16_on_a_gpu_where_loss_scaling_works(monkeypatch):
    monkeypatch.setattr(machine, "scaler_works", lambda device: True)
    assert machine.pick_precision("auto", torch.device("mps"))[0] == torch.float16
    assert machine.pick_precision("fp16", torch.device("mps"))[0] == torch.float16


def test_without_loss_scaling_auto_takes_fp32_and_fp16_is_a_usage_error(monkeypatch):
    monkeypatch.setattr(machine, "scaler_works", lambda device: False)
    assert machine.pick_precision("auto", torch.device("mps"))[0] is None
    with pytest.raises(UsageError, match="use --amp off"):
        machine.pick_precision("fp16", torch.device("mps"))


def test_the_probe_of_loss_scaling_takes_a_real_step():
    assert machine.scaler_works(CPU) is True
    assert machine.scaler_works(torch.device("meta")) is False


@torch.no_grad()
def test_the_probe_of_loss_scaling_works_where_gradients_are_off():
    assert machine.scaler_works(CPU) is True


@pytest.mark.parametrize(("capability", "native"), [("avx512_f", False), ("avx512_bf16", True), ("amx_bf16", True)])
def test_bf16_is_not_assumed_of_a_cpu(monkeypatch, capability, native):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", capability: True})
    assert machine.cpu_has_bf16() is native


@pytest.mark.parametrize("native", [True, False])
def test_bf16_is_timed_where_the_processor_does_not_tell(monkeypatch, native):
    clock = iter([0.0, 1.0, 2.0, 2.5 if native else 30.0])  # fp32 takes 1 second, bf16 half of it or 28
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "arm64", "bf16": True})
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert machine.cpu_has_bf16() is native


# ---- torch.compile ----


class Compiler:
    """In the place of torch.compile: what it makes fails from the n-th call on."""

    def __init__(self, fails_from: int, says: str = "No working C++ compiler found\nand much more"):
        self.fails_from = fails_from
        self.says = says
        self.calls = 0

    def __call__(self, model):
        return self.call

    def call(self, x):
        self.calls += 1
        if self.calls >= self.fails_from:
            raise RuntimeError(self.says)
        return x


def test_a_compiler_that_fails_is_one_sentence(monkeypatch):
    monkeypatch.setattr(torch, "compile", Compiler(fails_from=1))
    forward = machine.compiled(torch.nn.Identity())
    with pytest.raises(RunError, match=r"^torch.compile fails here \(No working C\+\+ compiler found\): leave"):
        forward(1)


def test_a_later_fault_of_a_compiled_model_is_not_put_down_to_the_compiler(monkeypatch):
    monkeypatch.setattr(torch, "compile", Compiler(fails_from=2))
    forward = machine.compiled(torch.nn.Identity())
    assert forward(1) == 1
    with pytest.raises(RuntimeError, match="and much more"):
        forward(1)


def test_a_full_memory_is_not_put_down_to_the_compiler(monkeypatch):
    monkeypatch.setattr(torch, "compile", Compiler(fails_from=1, says="CUDA out of memory. Tried to allocate 20 GiB"))
    forward = machine.compiled(torch.nn.Identity())
    with pytest.raises(RuntimeError, match=r"^CUDA out of memory"):
        forward(1)


# ---- memory ----


def small_memory(monkeypatch, gigabytes: float) -> None:
    monkeypatch.setattr(machine, "memory_of", lambda device: int(gigabytes * 1e9))


def check_gpt2(tokens: int, half_precision=False, grad_checkpoint=False) -> None:
    """Does GPT-2 124M fit, by AdamW and with so many tokens at once?"""
    settings = train.TrainConfig(batch_size=1, seq_len=tokens, grad_checkpoint=grad_checkpoint)
    amp_dtype = torch.bfloat16 if half_precision else None
    machine.check_memory(runtime(amp_dtype), outline(GPTConfig()), settings)


def test_what_cannot_fit_is_said_with_its_size_and_what_would(monkeypatch):
    """124,439,808 parameters, in fp32: 16 bytes each to train, 12 for the copy that is written; 56 bytes for each of
    768 numbers of 1,024 tokens in 12 blocks."""
    small_memory(monkeypatch, 3)
    with pytest.raises(UsageError) as caught:
        check_gpt2(tokens=1024)
    assert str(caught.value) == (
        "training 124,439,808 parameters takes at least 4.0 GB (2.0 for weights, gradients and optimizer, 0.5 for"
        " activations, 1.5 for the copy that is written as last.pt), and this machine has 3.0 GB: choose a model of at"
        " most 96 million parameters"
    )


def test_activations_that_cannot_fit_have_their_own_remedies_and_these_help(monkeypatch):
    small_memory(monkeypatch, 4.1)
    check_gpt2(tokens=1024)
    with pytest.raises(UsageError, match=r"4\.5 GB .*: lower --batch_size or --seq_len, or add --grad_checkpoint"):
        check_gpt2(tokens=2048)
    check_gpt2(tokens=2048, grad_checkpoint=True)
    check_gpt2(tokens=2048, half_precision=True)


def test_several_processes_share_a_machine(monkeypatch):
    small_memory(monkeypatch, 15)
    check_gpt2(tokens=1024)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UsageError, match=r"at least 16\.1 GB .* in each of 4 processes"):
        check_gpt2(tokens=1024)


class Parts(Runtime):
    """One of four processes that share a model."""

    parts = 4


def test_the_first_of_processes_that_share_a_model_needs_memory_for_all_of_last_pt(monkeypatch):
    settings = train.TrainConfig(batch_size=1, seq_len=64, parallel="fsdp")
    model = outline(GPTConfig())
    small_memory(monkeypatch, 1.5)  # a GB and a half: 12 bytes for each of 124,439,808 parameters, nearly
    machine.check_memory(Parts(CPU, None, None, ""), model, settings)
    small_memory(monkeypatch, 1.4)
    sentence = r"the first process gathers last.pt, which takes 1\.5 GB \(12 bytes a parameter with AdamW\), and its"
    with pytest.raises(UsageError, match=sentence):
        machine.check_memory(Parts(CPU, None, None, ""), model, settings)


def test_a_machine_that_does_not_say_what_it_has_is_tried(monkeypatch):
    monkeypatch.setattr(machine, "memory_of", lambda device: None)
    check_gpt2(tokens=10**9)


def test_this_machine_says_what_it_has():
    assert 10**8 < machine.memory_of(CPU) < 10**14


def test_a_model_that_cannot_fit_leaves_nothing_behind(tiny, tmp_path, monkeypatch):
    small_memory(monkeypatch, 0.0001)
    with pytest.raises(UsageError, match="takes at least"):
        train.train(tiny(**SHORT))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.96 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_a_full_memory_is_one_sentence_that_names_the_flag(tmp_path, monkeypatch, capsys, error):
    def full(*_):
        raise error

    monkeypatch.setattr(train.Trainer, "train_step", full)
    assert train.main(tiny_flags(tmp_path / "out", **SHORT)) == 1
    err = capsys.readouterr().err
    assert err == "train.py: the memory is full: lower --batch_size or --seq_len, or add --grad_checkpoint\n"
    assert json.loads((tmp_path / "out" / "run.json").read_text())["ended"].startswith("failed: ")


# ---- copies for checkpoints ----

LARGE = 1 << 19  # numbers in a tensor that gets a buffer of its own


def test_a_copy_is_of_its_moment():
    weights = torch.ones(LARGE)
    losses = torch.ones(3)
    content = {"step": 1, "model": {"wte": weights}, "optimizer": [(losses, "x"), None]}
    copy = HostCopies(CPU).take(content)
    weights.fill_(-1)
    losses.fill_(-1)
    content["step"] = 2
    content["model"]["head"] = weights
    assert copy["step"] == 1
    assert copy["model"].keys() == {"wte"}
    assert torch.equal(copy["model"]["wte"], torch.ones(LARGE))
    copied_losses, text = copy["optimizer"][0]
    assert copied_losses.tolist() == [1, 1, 1]
    assert text == "x"
    assert copy["optimizer"][1] is None


def test_tied_tensors_are_copied_once():
    weights = torch.ones(LARGE)
    # a state_dict has an object of its own for each name
    copy = HostCopies(CPU).take({"wte": weights.detach(), "head": weights.detach(), "average": weights + 1})
    assert copy["head"].data_ptr() == copy["wte"].data_ptr()
    assert copy["average"].data_ptr() != copy["wte"].data_ptr()


def test_the_memory_of_a_copy_is_used_again():
    weights = torch.zeros(LARGE)
    copies = HostCopies(CPU)
    places = set()
    for step in range(3):
        weights.fill_(step)
        copy = copies.take({"wte": weights})
        assert (copy["wte"] == step).all()
        places.add(copy["wte"].data_ptr())
    assert len(places) == 1


# ---- determinism ----


def test_the_same_seed_gives_the_same_rows(tiny, tmp_path):
    def run(name: str, **changes) -> list[dict]:
        out = tmp_path / name
        train.train(tiny(**SHORT, out_dir=str(out), dropout=0.2, **changes))
        return without_times(rows_of(out))

    assert run("first") == run("again")
    assert same_weights(weights_of(tmp_path / "first"), weights_of(tmp_path / "again"))
    other = run("other", seed=7)
    assert other[0]["loss"] != rows_of(tmp_path / "first")[0]["loss"]


def test_deterministic_asks_torch_for_it(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    machine.start_runtime("cpu", "off", deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    machine.start_runtime("cpu", "off", deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_run_is_deterministic_if_it_is_asked_to_be(tiny, monkeypatch):
    seen = []
    real = train.Trainer.train_step

    def train_step(trainer, *args):
        seen.append(torch.are_deterministic_algorithms_enabled())
        real(trainer, *args)

    monkeypatch.setattr(train.Trainer, "train_step", train_step)
    train.train(tiny(**SHORT, deterministic=True))
    train.train(tiny(**SHORT, overwrite=True))
    assert seen == [True, True, False, False]


# ---- the limit that mfu is measured against ----


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
    assert machine.gpu_peak(name) == pytest.approx(peak)


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
    assert machine.gpu_peak(name) is None


def test_the_limit_of_a_cpu_is_the_rate_of_its_products(monkeypatch):
    """By a clock on which each product takes a second: 12 of them in each of the 3 layers, and 3 in the head."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    shapes = machine.matmul_shapes(outline(GPTConfig(n_layer=3, n_embd=4, n_head=1, vocab_size=10)))
    work = 6 * 7 * (3 * 12 * 4 * 4 + 10 * 4)
    assert machine.matmul_rate(shapes, 7, torch.float32) == pytest.approx(work / (3 * 12 + 3))


def test_measuring_a_slow_cpu_ends_after_one_round(monkeypatch):
    """Where each product takes 100 seconds: 12 of them in the layer, and 3 in the head."""
    ticks = iter(range(0, 10**9, 100))
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    shapes = machine.matmul_shapes(outline(GPTConfig(n_layer=1, n_embd=4, n_head=1, vocab_size=10)))
    assert machine.matmul_rate(shapes, 7, torch.float32) == pytest.approx(6 * 7 * (12 * 4 * 4 + 10 * 4) / 1500)
    assert next(ticks) < 100 * 40


def test_a_limit_is_measured_on_a_cpu_unless_it_is_not_wanted():
    model = outline(GPTConfig(n_layer=1, n_embd=16, n_head=1, vocab_size=500))
    limit, what = machine.find_limit(runtime(), model, 64, measured=True)
    assert limit > 1e6
    assert "measured" in what
    limit, what = machine.find_limit(runtime(), model, 64, measured=False)
    assert limit is None
    assert "--no_mfu" in what


@pytest.mark.parametrize(
    ("name", "dtype", "limit"),
    [("NVIDIA H200", torch.float16, 989e12), ("NVIDIA H200", None, None), ("Some GPU", torch.float16, None)],
)
def test_a_gpu_is_never_measured(monkeypatch, name, dtype, limit):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(machine, "matmul_rate", lambda *args: pytest.fail("measured"))
    on_gpu = Runtime(torch.device("cuda"), dtype, None, "")
    assert machine.find_limit(on_gpu, outline(GPTConfig()), 64, measured=True)[0] == limit


def test_emulated_bf16_is_not_measured(monkeypatch):
    """It would take minutes."""
    monkeypatch.setattr(machine, "cpu_has_bf16", lambda: False)
    monkeypatch.setattr(machine, "matmul_rate", lambda *args: pytest.fail("measured"))
    limit, what = machine.find_limit(runtime(torch.bfloat16), outline(GPTConfig()), 64, measured=True)
    assert limit is None
    assert "emulates" in what


def test_a_share_over_1_is_measured_again_and_never_told(monkeypatch):
    """The limit was measured while another program was busy; then it is found right."""
    found = [100.0, 100.0, 4000.0]
    monkeypatch.setattr(machine, "find_limit", lambda *_: (found.pop(0), "measured"))
    model = types.SimpleNamespace(flops_per_token=lambda: 10)
    limit = machine.Limit(runtime(), model, 64, measured=True)
    assert limit.share(5.0) == "0.500"
    assert limit.share(200.0) == "unknown"  # 2000 of 100, twice
    assert limit.share(200.0) == "0.500"
    unknown = machine.Limit.__new__(machine.Limit)
    unknown.value = None
    assert unknown.share(200.0) == "unknown"


class Turns(machine.Runtime):
    """A process of two, which notes when it waits."""

    def __init__(self, rank: int):
        super().__init__(torch.device("cpu"), None, None, "", rank, 2)
        self.done = []

    def wait(self) -> None:
        self.done.append("wait")


@pytest.mark.parametrize(("rank", "order"), [(0, ["work", "wait"]), (1, ["wait", "work"])])
def test_the_first_process_goes_first_and_lets_the_others_go_on_even_if_it_fails(rank, order):
    process = Turns(rank)
    with pytest.raises(OSError), process.first_one_first():
        process.done.append("work")
        raise OSError
    assert process.done == order
