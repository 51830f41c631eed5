"""What more GPUs would bring, on paper: tokens a second and efficiency from 1 to 1,024 of them.

    python benchmarks/scaling.py                               # the tables of docs/many-machines.md
    python benchmarks/scaling.py --plot assets/scaling.svg     # and the picture
    python benchmarks/scaling.py --measure 5                   # here: two processes beside one, a thread each

Nothing here was run on several GPUs. The prediction starts from step times that others published, adds the bytes that
each way of sharing moves, and is compared with other figures that they published.
"""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import ROOT, describe_machine, parser, print_header, print_row, spread

COUNTS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
NODE = 8  # GPUs in a machine
JITTER = 0.006  # of the time, more for each doubling of the GPUs over 8: chosen by the first of torchtitan's figures
LAYER_SECONDS = 0.4e-3  # below which a layer's forward and backward pass doesn't get, however few its tokens: assumed


@dataclass(frozen=True)
class Cluster:
    """Bandwidths are those of a ring, in bytes a second of each GPU (nccl-tests call it busbw)."""

    name: str
    inside: float  # a machine, over NVLink
    between: float  # machines: what all its network cards carry, at 85%
    hop: float = 4e-6  # seconds, from one GPU to the next in the ring, mostly inside a machine: assumed

    def bandwidth(self, gpus: int) -> float:
        return self.inside if gpus <= NODE else self.between


A100 = Cluster("A100", inside=230e9, between=0.85 * 8 * 25e9)
H100 = Cluster("H100", inside=370e9, between=0.85 * 8 * 50e9)


@dataclass(frozen=True)
class Training:
    """A model, and how it is trained. `rate` is measured: tokens a second of each of 8 GPUs."""

    name: str
    cluster: Cluster
    parameters: float
    n_layer: int
    n_embd: int
    seq_len: int
    windows: int  # in a step, of all GPUs together
    rate: float
    gather_bytes: int = 4  # of a weight that travels: this program gathers fp32

    def tokens(self) -> int:
        return self.windows * self.seq_len

    def flops_per_token(self) -> float:
        """Kaplan et al. 2020, with the products of attention."""
        return 6 * self.parameters + 12 * self.n_layer * self.n_embd * self.seq_len


GPT2 = Training("GPT-2 124M", A100, 124.4e6, 12, 768, 1024, 512, rate=524_288 / 8 / 0.300)
XL = Training("GPT-2 1.5B", H100, 1557.6e6, 48, 1600, 1024, 1024, rate=1_048_576 / 8 / 2.80)
RECIPE = Training("GPT-2 124M, --preset shakespeare", A100, 124.4e6, 12, 768, 256, 8, rate=GPT2.rate)
TRAININGS = (GPT2, XL, RECIPE)


# ---- the model ----


def sent(size: float, members: int, bandwidth: float) -> float:
    """Seconds to send `size` bytes once round a ring, as a gather or a reduction does; a sum for all does both."""
    return size * (members - 1) / members / bandwidth


def traffic_seconds(one: Training, way: str, gpus: int) -> float:
    cluster = one.cluster
    gradients = 4 * one.parameters
    weights = one.gather_bytes * one.parameters  # gathered for the forward pass, and for the backward pass
    blocks = one.n_layer + 1
    inside = min(gpus, NODE)
    if way == "ddp":  # 8 bytes a parameter; NCCL's trees need log2 hops
        return sent(2 * gradients, gpus, cluster.bandwidth(gpus)) + 2 * blocks * math.log2(gpus) * cluster.hop
    if way == "fsdp":  # 12 bytes, in rings
        return sent(2 * weights + gradients, gpus, cluster.bandwidth(gpus)) + 3 * blocks * (gpus - 1) * cluster.hop
    # hsdp: these rings within a machine, and the sums of its parts between machines
    within = sent(2 * weights + gradients, inside, cluster.inside) + 3 * blocks * (inside - 1) * cluster.hop
    machines = gpus // inside
    return within + sent(2 * gradients, machines, cluster.between) + 2 * blocks * math.log2(machines) * cluster.hop


def step_seconds(one: Training, way: str, gpus: int) -> float:
    """Of a step with the windows dealt out to so many GPUs, and one micro-batch on each."""
    compute = max(one.tokens() / gpus / one.rate, one.n_layer * LAYER_SECONDS)
    traffic = traffic_seconds(one, way, gpus)
    hidden = 2 / 3 * compute if way == "ddp" else compute  # gradients travel during the backward pass
    exposed = max(traffic - hidden, traffic / (one.n_layer + 1))  # a first or a last block hides behind nothing
    return (compute + exposed) * (1 + JITTER * max(0.0, math.log2(gpus / NODE)))


def speed(one: Training, way: str, gpus: int) -> float:
    """Tokens a second of all GPUs together."""
    return one.tokens() / step_seconds(one, way, gpus)


def efficiency(one: Training, way: str, gpus: int) -> float:
    """Beside as many times one GPU."""
    return speed(one, way, gpus) / gpus / speed(one, way, 1)


# ---- beside what others measured ----


def llama(rate: float, gpus: int, cluster: Cluster = H100) -> Training:
    """torchtitan's Llama 3.1 8B: two windows of 8,192 tokens a GPU; weights travel in bf16."""
    return Training("8B", cluster, 8.03e9, 32, 4096, 8192, 2 * gpus, rate, gather_bytes=2)


def checks() -> Iterator[tuple]:
    """(source, what, predicted, measured)"""
    flops = GPT2.rate * GPT2.flops_per_token()
    large = Training("", A100, 774e6, 36, 1280, 1024, 512, rate=0)
    seconds = 524_288 / 8 / (flops / large.flops_per_token())
    yield "llm.c, 8 A100", "774M: seconds a step, at the FLOP/s of 124M", f"{seconds:.2f}", "1.7"
    pairs = [
        (" (by this one JITTER was chosen)", 5762, 5605, 8, 128),
        (", compiled", 6667, 6514, 8, 128),
        (", float8", 8532, 8380, 8, 128),
    ]
    pairs.append((", float8, H200", 10938, 10753, 32, 64))
    for kind, before, after, few, many in pairs:
        times = [step_seconds(llama(before, gpus), "fsdp", gpus) for gpus in (few, many)]
        predicted = f"{times[0] / times[1]:.3f}"
        what = f"8B by FSDP{kind}: a GPU's tok/s at {many}, as a share of those at {few}"
        yield "torchtitan", what, predicted, f"{after / before:.3f}"


def print_tables() -> None:
    for one in TRAININGS:
        print(f"\n{one.name} on {one.cluster.name}, {one.tokens():,} tokens a step\n")
        print_header("GPUs", "windows on each", "DDP: tok/s", "DDP", "FSDP", "HSDP")
        for gpus in COUNTS:
            if gpus > one.windows:
                print_row(gpus, f"a step has only {one.windows}", "", "", "", "")
                continue
            shares = [f"{efficiency(one, way, gpus):.2f}" for way in ("ddp", "fsdp", "hsdp")]
            print_row(gpus, one.windows // gpus, f"{speed(one, 'ddp', gpus):,.0f}", *shares)
    print()
    print_header("source", "what", "predicted", "measured")
    for row in checks():
        print_row(*row)


def plot(path: Path) -> None:
    from report.pictures import picture

    def draw(figure) -> None:
        axes = figure.add_subplot()
        for one, colour in zip(TRAININGS, ("#1f77b4", "#d62728", "#2ca02c"), strict=True):
            for way, style in (("ddp", "-"), ("fsdp", "--"), ("hsdp", ":")):
                counts = [gpus for gpus in COUNTS if gpus <= one.windows]
                shares = [efficiency(one, way, gpus) for gpus in counts]
                axes.plot(counts, shares, style, color=colour, label=f"{one.name}, {way.upper()}")
        axes.set_xscale("log", base=2)
        axes.set_xticks(COUNTS, [str(gpus) for gpus in COUNTS])
        axes.set_ylim(0, 1.05)
        axes.set_xlabel("GPUs")
        axes.set_ylabel("efficiency, on paper")
        axes.legend(fontsize=7)

    path.write_bytes(picture(draw, "Efficiency on several GPUs, on paper"))


# ---- here ----

SHAPE = ["--n_layer", "4", "--n_head", "4", "--n_embd", "256", "--batch_size", "2", "--seq_len", "256"]
SHAPE += ["--input_file", str(ROOT / "data" / "sample.txt"), "--steps", "12", "--target_loss", "0", "--log_every", "1"]
SHAPE += ["--num_prompts", "0", "--recall_places", "0", "--no_mfu", "--device", "cpu", "--amp", "off"]


def measured_rate(processes: int, *flags: str) -> float:
    """Tokens a second of train.py on this machine, after its first two steps, with one thread in each process."""
    with tempfile.TemporaryDirectory() as folder:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [*torchrun, str(ROOT / "train.py"), *SHAPE, "--out_dir", folder, *flags]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        with open(Path(folder) / "logs" / "train_metrics.csv", newline="") as f:
            rows = list(csv.DictReader(f))
    tokens = int(rows[-1]["tokens"]) - int(rows[1]["tokens"])
    return tokens / (float(rows[-1]["elapsed_s"]) - float(rows[1]["elapsed_s"]))


def measure(times: int) -> None:
    """Prints how many times as fast two processes are as one, with as many tokens on each."""
    ways = {"DDP": (), "FSDP": ("--parallel", "fsdp"), "DDP, Muon": ("--optimizer", "muon")}
    print(f"{describe_machine()}\n")
    print_header("two processes", "times as fast as one")
    for name, flags in ways.items():
        alone = [flag for flag in flags if flag not in ("--parallel", "fsdp")]
        ratios = [measured_rate(2, *flags) / measured_rate(1, *alone) for _ in range(times)]
        print_row(name, spread(ratios, 2))


def main(argv: Sequence[str] | None = None) -> None:
    flags = parser(__file__, __doc__)
    flags.add_argument("--plot", type=Path, help="write a picture there (needs matplotlib)")
    flags.add_argument("--measure", type=int, default=0, help="so often, on this machine's CPU")
    args = flags.parse_args(argv)
    if args.measure:
        return measure(args.measure)
    print_tables()
    if args.plot:
        plot(args.plot)


if __name__ == "__main__":
    main()
