"""The machine: device, precision, processes, memory, and the limit that mfu is measured against."""

from __future__ import annotations

import collections
import contextlib
import os
import platform
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode

from support.cli import RunError, UsageError, first_line, is_out_of_memory, say
from support.files import keep_heap
from support.kernels import updates_here

# ---- processes: one, or several under torchrun ----


class Alone:
    """Where the processes of a run meet before it begins: for one that has no others."""

    world_size = 1

    def agreed(self, make: Callable):
        """The settings that `make` returns, when all processes have come this far and have the same. Raises UsageError
        or RunError."""
        return make()

    def say(self, name: str, sentence: str) -> None:
        """A sentence on stderr. Of several processes only one says it."""
        say(name, sentence)


@dataclass
class Runtime:
    """Where and in which number format the model is trained, and this process's place among others.

    Its four verbs, first, any, gather and wait, are how processes talk to each other. All of them must call a verb
    together. For one process, as here, they do nothing."""

    device: torch.device
    amp_dtype: torch.dtype | None  # None: plain fp32
    scaler: torch.amp.GradScaler | None  # fp16 only
    reason: str
    rank: int = 0
    world_size: int = 1

    parts = 1  # into which weights, gradients and averages are cut
    talk_is_free = True  # a verb costs nothing, since nobody has to be waited for

    def first(self, value):
        """The first process's value, in all of them."""
        return value

    def any(self, value: int) -> int:
        """The largest of the processes' numbers: of truths, whether any is true."""
        return value

    def gather(self, value) -> list:
        """The values of all processes, in order of rank. Tensors stay on the device, which nobody waits for."""
        return [value]

    def wait(self) -> None:
        """Until all processes have come to this place."""

    @contextlib.contextmanager
    def first_one_first(self):
        """What is done within is done by the first process of each machine, and when it is done or has failed, by the
        others."""
        is_first = int(os.environ.get("LOCAL_RANK", self.rank)) == 0
        if not is_first:
            self.wait()
        try:
            yield
        finally:
            if is_first:
                self.wait()

    def check_alike(self, values: dict) -> None:
        """Raises UsageError where the processes haven't the same values, of plain types."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model on its device, as the training step calls it. Comes before the optimizer."""
        return model.to(self.device)

    def clip(self, parameters: Iterator[nn.Parameter], most: float) -> torch.Tensor:
        """Scales the gradients down to a norm of at most so much. Returns what the norm was."""
        return nn.utils.clip_grad_norm_(parameters, most)

    def whole(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
        """The part of a checkpoint that has weights and averages."""
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    def cut(self, state: dict, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
        """A checkpoint, as this process's model and optimizer can load it."""
        return state

    def host_copies(self) -> HostCopies:
        return HostCopies(self.device)

    def muon_updates(self, directions: dict, shapes: dict, dtype: torch.dtype) -> Iterator[tuple]:
        """Muon's updates (kernels.updates_here), each parameter's by one of the processes."""
        return updates_here(directions, shapes, dtype)

    @contextlib.contextmanager
    def watched(self, last_words: Callable[[str], None]):
        """Within, an error that comes of another process's end is a RunError that says so. A process that can't even
        get an error, since it waits for the other one, ends with these `last_words`, of that sentence."""
        yield

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, kind, e, traceback) -> None:
        """Leaves the other processes. Raises RunError if one of them is why this one failed."""

    def autocast(self):
        """Matrix products in amp_dtype; weights, sums and losses stay fp32."""
        if self.amp_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.amp_dtype)

    def describe_device(self) -> str:
        if self.device.type == "cuda":
            return f"cuda ({torch.cuda.get_device_name(self.device)})"
        count = torch.get_num_threads()
        threads = "1 thread" if count == 1 else f"{count} threads"
        return f"{self.device.type} ({platform.processor() or platform.machine()}, {threads})"

    def describe_precision(self) -> str:
        if self.amp_dtype is None:
            return "fp32 with TF32 products" if self.device.type == "cuda" else "fp32"
        scaling = " with loss scaling" if self.scaler else ""
        return str(self.amp_dtype).removeprefix("torch.") + " autocast" + scaling

    def describe(self) -> dict[str, str | int]:
        """All that the bits of a result depend on beside the configuration."""
        return {
            "device": self.describe_device(),
            "precision": self.describe_precision(),
            "processes": self.world_size,
            "torch": str(torch.__version__),
        }


def shared_grad_accum(processes: int, grad_accum: int) -> int:
    """The grad_accum that keeps the number of micro-batches in a step: of a run that had `processes` and `grad_accum`,
    and goes on with WORLD_SIZE processes. Raises UsageError where these can't share them evenly."""
    there = int(os.environ.get("WORLD_SIZE", 1))
    batches = processes * grad_accum
    if batches % there == 0:
        return batches // there
    would_do = [str(number) for number in range(1, batches + 1) if batches % number == 0]
    raise UsageError(
        f"the run's steps have {batches} micro-batches ({processes} processes, grad_accum {grad_accum}), which {there}"
        f" processes can't share: start {' or '.join(would_do)}, or give --grad_accum for steps of another size"
    )


def start_runtime(device: str = "auto", amp: str = "auto", deterministic: bool = False) -> Runtime:
    """Picks device and precision, for a process by itself. Raises UsageError."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when CUDA starts
    if deterministic != torch.are_deterministic_algorithms_enabled():  # asking costs nothing, setting a second
        torch.use_deterministic_algorithms(deterministic)
    picked = pick_device(device)
    amp_dtype, reason = pick_precision(amp, picked)
    scaler = torch.amp.GradScaler(picked.type) if amp_dtype == torch.float16 else None
    if picked.type == "cuda":
        torch.cuda.set_device(picked)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
    if picked.type == "cpu":
        keep_heap()
    return Runtime(picked, amp_dtype, scaler, reason)


# ---- device and precision ----


def to_device(ids: torch.Tensor, device: torch.device) -> torch.Tensor:
    """From pinned memory, ids travel to a CUDA GPU while the program goes on. On MPS that corrupts data (pytorch
    139550, 189690)."""
    on_cuda = device.type == "cuda"
    if on_cuda:
        ids = ids.pin_memory()
    return ids.to(device, non_blocking=on_cuda)


def device_present(name: str) -> bool:
    if name == "cuda":
        return torch.cuda.is_available()
    if name == "mps":
        return torch.backends.mps.is_available()
    return True


def pick_device(name: str) -> torch.device:
    """`auto` takes the first of CUDA, MPS and CPU that is there."""
    if name == "auto":
        name = next(one for one in ("cuda", "mps", "cpu") if device_present(one))
    if name == "cuda":  # torchrun numbers the processes of a machine; each takes the GPU of its number
        return torch.device(name, int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device(name)


def machine_problems(device: str, amp: str) -> list[str]:
    """What can't be had here of --device and --amp."""
    if not device_present(device):
        return [f"device {device} isn't available here: use --device auto"]
    if amp == "fp16" and pick_device(device).type == "cpu":
        return ["amp fp16 on a CPU is about a thousand times slower than fp32: use --amp auto, bf16 or off"]
    return []


def native_bf16(device: torch.device) -> bool:
    """Does the device say that it multiplies bf16 itself? No stopwatch here: the answer decides what is computed, and
    has to be the same in each process and after each start."""
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def cpu_has_bf16() -> bool:
    """Does the processor multiply bf16 itself? Emulated, it is 40 to 500 times slower than fp32 (pytorch 146508).

    x86 processors say so. Elsewhere it also depends on how torch was built, so a small product is timed."""
    if torch.cpu.get_capabilities().get("architecture") == "x86_64":
        return native_bf16(torch.device("cpu"))
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(256, 256, dtype=dtype)
        a @ a  # the first product also sets up
        start = time.perf_counter()
        a @ a
        seconds[dtype] = time.perf_counter() - start
    return seconds[torch.bfloat16] < seconds[torch.float32]


@torch.enable_grad()  # a caller that only samples may have turned gradients off
def scaler_works(device: torch.device) -> bool:
    """Tries one scaled fp16 step on a single parameter: what a version supports can't be read off its number."""
    try:
        scaler = torch.amp.GradScaler(device.type)
        p = nn.Parameter(torch.ones(1, device=device))
        optimizer = torch.optim.SGD([p], lr=0.5)
        with torch.autocast(device.type, torch.float16):
            loss = (p * p).sum()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        return p.item() == 0.0  # 1 - 0.5 * d(p^2)/dp
    except (RuntimeError, TypeError):
        return False


def pick_precision(amp: str, device: torch.device) -> tuple[torch.dtype | None, str]:
    """(autocast dtype or None for fp32, the reason in words). Raises UsageError for what the device can't do."""
    if amp == "off":
        return None, "--amp off asks for it"
    if device.type == "cpu":
        return pick_cpu_precision(amp)
    if amp == "bf16":
        if device.type == "cuda" and not native_bf16(device):
            raise UsageError("amp bf16 isn't native on this GPU: use --amp fp16")
        return torch.bfloat16, "--amp bf16 asks for it"
    if scaler_works(device):
        return torch.float16, f"{device.type} is fastest in it, and loss scaling works"
    if amp == "fp16":
        raise UsageError(f"amp fp16: loss scaling doesn't work on this {device.type}: use --amp off")
    return None, f"loss scaling doesn't work on this {device.type}"


def pick_cpu_precision(amp: str) -> tuple[torch.dtype | None, str]:
    if cpu_has_bf16():
        return torch.bfloat16, "this CPU has native bf16"
    if amp == "bf16":
        return torch.bfloat16, "--amp bf16 asks for it; this CPU only emulates it, so expect it to be very slow"
    return None, "this CPU has no native bf16"


def compiled(model: nn.Module) -> Callable:
    """The model through torch.compile. What that can't do on this machine shows in the first call: a RunError."""
    by_compiler = torch.compile(model)
    worked = False

    def call(*args, **kwargs):
        nonlocal worked
        try:
            result = by_compiler(*args, **kwargs)
        except Exception as e:
            if worked or is_out_of_memory(e):
                raise
            raise RunError(f"torch.compile fails here ({first_line(e)}): leave --compile out") from e
        worked = True
        return result

    return call


# ---- memory ----


def memory_of(device: torch.device) -> int | None:
    """Bytes that a device has; for a CPU the machine's, or what its container may use. None: nobody can say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    found = []
    with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            found.append(int(Path(limit).read_text()))
    return min(found, default=None)


def saved_bytes(model: nn.Module, optimizer: str) -> int:
    """Of last.pt: in fp32 the weights, and for each of them two averages of AdamW or one of Muon."""
    parameters = sum(p.numel() for p in model.parameters())
    by_muon = sum(p.numel() for p in model.parameter_groups()["matrices"]) if optimizer == "muon" else 0
    return 12 * parameters - 4 * by_muon


def checkpoint_bytes(model: nn.Module, optimizer: str) -> int:
    """Of last.pt, previous.pt and best.pt together."""
    return 2 * saved_bytes(model, optimizer) + 4 * sum(p.numel() for p in model.parameters())


def memory_needs(runtime: Runtime, model: nn.Module, settings) -> dict[str, int]:
    """What training takes at least, in bytes, by what for. An outline of the model will do."""
    saved = saved_bytes(model, settings.optimizer)
    fixed = (saved + 4 * sum(p.numel() for p in model.parameters())) // runtime.parts
    tokens = settings.batch_size * settings.seq_len
    activations = model.activation_bytes(tokens, runtime.amp_dtype is not None, settings.grad_checkpoint)
    needs = {"weights, gradients and optimizer": fixed, "activations": activations}
    if runtime.device.type == "cpu":
        needs["the copy that is written as last.pt"] = saved // runtime.parts  # of a model in parts, one process has it
    return needs


class NoRandomNumbers(TorchFunctionMode):
    """While entered, tensors stay as they are where they would be filled with random numbers."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ in ("normal_", "uniform_", "kaiming_uniform_"):
            return None
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def outline():
    """While entered, a model gets shapes and no numbers, which takes no memory: to know how large it would be."""
    with torch.device("meta"), NoRandomNumbers():  # to draw them there, torch would import sympy, a second long
        yield


def check_memory(runtime: Runtime, model: nn.Module, settings) -> None:
    """Raises UsageError where training clearly can't fit (see memory_needs), or where its checkpoint, which the first
    process gathers of a model in parts, doesn't fit into that one's memory."""
    check_host_memory(runtime, saved_bytes(model, settings.optimizer))
    has = memory_of(runtime.device)
    needs = memory_needs(runtime, model, settings)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if runtime.device.type == "cpu" else 1
    needed = processes * sum(needs.values())
    if not has or needed <= has:
        return
    parameters = sum(p.numel() for p in model.parameters())
    fixed = needed - processes * needs["activations"]
    remedy = "lower --batch_size or --seq_len, or add --grad_checkpoint"
    if fixed > 0.9 * has:
        most = 0.9 * has / fixed * parameters
        remedy = f"choose a model of at most {most / 1e6:,.0f} million parameters"
    parts = ", ".join(f"{size / 1e9:,.1f} for {name}" for name, size in needs.items())
    if processes > 1:
        parts += f" in each of {processes} processes"
    machine = "machine" if runtime.device.type == "cpu" else runtime.device.type
    raise UsageError(
        f"training {parameters:,} parameters takes at least {needed / 1e9:,.1f} GB ({parts}), and this {machine} has"
        f" {has / 1e9:,.1f} GB: {remedy}"
    )


def check_host_memory(runtime: Runtime, saved: int) -> None:
    there = memory_of(torch.device("cpu"))
    if runtime.parts > 1 and there and saved > there:
        raise UsageError(
            f"the first process gathers last.pt, which takes {saved / 1e9:,.1f} GB (12 bytes a parameter with AdamW),"
            f" and its machine has {there / 1e9:,.1f} GB: start it on a larger machine, or choose a smaller model"
        )


class HostCopies:
    """Copies tensors into the host's memory, in buffers that are used again for the next copy. On CUDA the copying runs
    beside the next step's forward pass; only the update of the weights has to wait for it."""

    def __init__(self, device: torch.device):
        self.buffers: dict[tuple, torch.Tensor] = {}
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None
        self.done: torch.cuda.Event | None = None

    def take(self, content: dict) -> dict:
        """A copy of nested dicts, lists and tensors, as they are at this moment."""
        if not self.stream:
            return self.copy(content)
        self.stream.wait_stream(torch.cuda.current_stream())  # the copy starts when the last step is done
        with torch.cuda.stream(self.stream):
            copied = self.copy(content)
            self.done = self.stream.record_event()
        return copied

    def copy(self, content):
        if isinstance(content, dict):
            return {key: self.copy(value) for key, value in content.items()}
        if isinstance(content, list | tuple):
            return type(content)(self.copy(value) for value in content)
        return self.copy_tensor(content) if isinstance(content, torch.Tensor) else content

    def is_large(self, content: torch.Tensor) -> bool:
        return content.numel() >= 1 << 18  # worth a buffer

    def copy_tensor(self, content: torch.Tensor) -> torch.Tensor:
        if not self.is_large(content):
            return content.detach().cpu().clone()
        key = (content.data_ptr(), content.shape, content.dtype)  # tied tensors share a buffer
        if key not in self.buffers:
            self.buffers[key] = torch.empty_like(content, device="cpu", pin_memory=content.is_cuda)
        # On MPS a copy that doesn't block has corrupted data (pytorch 139550).
        return self.buffers[key].copy_(content.detach(), non_blocking=content.is_cuda)

    def hold_device(self) -> None:
        """Lets what the device does next wait for the copy. The program goes on."""
        if self.done:
            torch.cuda.current_stream().wait_event(self.done)

    def wait(self) -> None:
        """Until the copy is there."""
        if self.done:
            self.done.synchronize()


# ---- random generators ----


def rng_state(device: torch.device) -> dict:
    """States of all random generators, in plain types. After the start, only dropout draws from one: torch's."""
    name, keys, *rest = np.random.get_state()
    version, internal, gauss = random.getstate()
    state = {
        "python": [version, list(internal), gauss],
        "numpy": [name, keys.tolist(), *rest],
        "cpu": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state[device.type] = getattr(torch, device.type).get_rng_state()
    return state


def set_rng_state(state: dict, device: torch.device) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["cpu"])
    if device.type in state and device.type != "cpu":
        getattr(torch, device.type).set_rng_state(state[device.type])


def seed_all(seed: int, rank: int) -> None:
    """Each process drops other activations, so torch's generator has a seed of its own there."""
    torch.manual_seed(seed + rank)
    random.seed(seed)
    np.random.seed(seed)


# ---- the limit that mfu is measured against ----

# Dense 16-bit products with fp32 sums, in TFLOP/s: what a card's data sheet (data centre) or its architecture's white
# paper (GeForce, workstation) says. A card that isn't here, a laptop's or a slice of one has no entry, not a near one.
GPU_PEAKS = {
    "B200": 2250,
    "GH200": 989,
    "H200": 989,
    "H200 NVL": 835,
    "H100": 989,
    "H100 NVL": 835,
    "H100 PCIE": 756,
    "A100": 312,
    "A100 PCIE": 312,
    "A40": 150,
    "A30": 165,
    "A10": 125,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "T4": 65,
    "V100": 125,
    "V100 PCIE": 112,
    "RTX A6000": 155,
    "RTX 5090": 209.5,
    "RTX 4090": 165,
    "RTX 4080": 97.5,
    "RTX 3090": 71,
    "RTX 3080": 59.5,
    "RTX 3070": 40.6,
}


def gpu_peak(name: str) -> float | None:
    """FLOP/s of the card that torch.cuda.get_device_name() calls so: "Tesla V100-SXM2-16GB" is GPU_PEAKS' V100."""
    usual = r"NVIDIA|TESLA|GEFORCE|SXM\d?|\d+GB|HBM3\w*"
    words = [word for word in re.split("[ -]", name.upper()) if not re.fullmatch(usual, word)]
    peak = GPU_PEAKS.get(" ".join(words))
    return peak * 1e12 if peak else None


def matmul_shapes(model: nn.Module) -> collections.Counter:
    """How often the model has a matrix of each shape (rows, columns); its head counts too."""
    return collections.Counter(tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear))


@torch.no_grad()
def matmul_rate(shapes: collections.Counter, rows: int, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """FLOP/s of the CPU at the matrix products of training, forward and both backward, with `rows` tokens at a time:
    each by itself, the median of several, in the model's proportions. That is what training can come near."""
    times = collections.defaultdict(list)
    end = time.perf_counter() + seconds
    for _ in range(12):
        for n_out, n_in in shapes:
            x = torch.ones(rows, n_in, dtype=dtype)
            w = torch.ones(n_out, n_in, dtype=dtype)
            y = torch.ones(rows, n_out, dtype=dtype)
            for kind, (a, b) in enumerate(((x, w.t()), (y, w), (y.t(), x))):
                start = time.perf_counter()
                a @ b
                times[n_out, n_in, kind].append(time.perf_counter() - start)
        if time.perf_counter() > end:
            break
    work = 0.0
    spent = 0.0
    for (n_out, n_in, _), found in times.items():
        later = found[1:] or found  # the first also sets up, so it doesn't count unless it is all there is
        work += 2 * rows * n_out * n_in * shapes[n_out, n_in]
        spent += statistics.median(later) * shapes[n_out, n_in]
    return work / spent


class Limit:
    """What mfu is the share of: FLOP/s that the devices of all processes could reach together, None if that isn't
    known. `what` says what it is."""

    def __init__(self, runtime: Runtime, model: nn.Module, rows: int, measured: bool):
        self.runtime = runtime
        self.model = model
        self.rows = rows  # tokens in a micro-batch
        self.measured = measured
        self.value, self.what = find_limit(runtime, model, rows, measured)

    def share(self, rate: float) -> str:
        """mfu at `rate` tokens a second. Over 1 is no share: then the limit was measured while something else was busy,
        so it is measured again."""
        if self.value is None:
            return "unknown"
        flops = self.model.flops_per_token() * rate
        if self.runtime.any(flops > self.value):
            again, _ = find_limit(self.runtime, self.model, self.rows, self.measured)
            self.value = max(self.value, again)
        return "unknown" if flops > self.value else f"{flops / self.value:.3f}"


def find_limit(runtime: Runtime, model: nn.Module, rows: int, measured: bool) -> tuple[float | None, str]:
    """(FLOP/s that all processes' devices could reach together, or None; what that is, in words)."""
    limit, what = device_limit(runtime, model, rows, measured)
    limits = runtime.gather(limit)
    if None in limits:  # one that is unknown makes the sum unknown
        return None, what if limit is None else "it isn't known of each process's device"
    return sum(limits), what


def device_limit(runtime: Runtime, model: nn.Module, rows: int, measured: bool) -> tuple[float | None, str]:
    """The same of this process's device alone."""
    if runtime.device.type == "cuda" and runtime.amp_dtype:
        peak = gpu_peak(torch.cuda.get_device_name(runtime.device))
        if peak:
            return peak, "the card's peak in 16 bits"
    if runtime.device.type != "cpu":
        return None, "no peak is known of this device in this precision"
    if not measured:
        return None, "--no_mfu asks not to measure it"
    if runtime.amp_dtype and not cpu_has_bf16():
        return None, "this CPU only emulates bf16"
    rate = matmul_rate(matmul_shapes(model), min(rows, 256), runtime.amp_dtype or torch.float32)
    return rate, "the model's matrix products alone, measured just now"
