"""How fast train.py trains, beside what one would use instead, and beside what the machine could do at most.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/throughput.py                            # on a CPU: 8 x 256 tokens a step, half an hour
    python benchmarks/throughput.py --quick                    # a first try with one layer: some minutes
    python benchmarks/throughput.py --device cuda --batch_size 64 --seq_len 1024 --steps 20

All train the same model on the same batches in turns (A B C A B C ...), each turn in a process of its own, which first
warms up. The rows of a preset train as the preset says, with its own batch and optimizer. Prints a Markdown table:
tok/s (the median of a turn's steps, on a GPU their mean; over the turns the median, lowest and highest), how many times
its speed train.py has in the same round, peak memory, and the share of the limit: 6 x parameters x tok/s over the rate
at which the same process, right after, does nothing but the model's matrix products in the same precision (on a GPU:
over the card's peak). A peer whose package isn't installed is left out, and named.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from common import Failed, apart, describe_machine, parser, peak_memory, print_header, print_row, spread
from peers import PEERS, UNUSUAL, Setup, make_batcher

import train
from support import files, machine


def turn(name: str, sizes: dict) -> dict:
    """One turn of one peer, in this process: tok/s, the limit and the share of it, peak memory, the losses.

    `sizes` are the fields of a Setup."""
    peer = PEERS[name]
    setup = Setup(**sizes)
    torch.manual_seed(1337)
    step = peer.make(setup, make_batcher(setup), **peer.options)
    first = [step().item() for _ in range(setup.warmup)]
    seconds, losses = time_steps(step, setup)
    rate = setup.tokens() / seconds
    with torch.device("meta"):
        model = train.GPT(train.GPTConfig(n_layer=setup.n_layer, block_size=setup.block_size()))
    limit = find_limit(model, setup, peer.dtype)
    return {
        "rate": rate,
        "limit": limit,
        "share": model.flops_per_token() * rate / limit if limit else None,
        "memory": most_memory(setup.device),
        "losses": first + losses,
    }


def time_steps(step: Callable[[], torch.Tensor], setup: Setup) -> tuple[float, list[float]]:
    """(seconds of a step, the losses). A GPU may run behind: there, only the end of the turn is waited for."""
    times = []
    losses = []
    start = time.perf_counter()
    for _ in range(setup.steps):
        begin = time.perf_counter()
        losses.append(step())
        times.append(time.perf_counter() - begin)
    if setup.device == "cpu":
        seconds = statistics.median(times)
    else:
        torch.accelerator.synchronize()
        seconds = (time.perf_counter() - start) / setup.steps
    return seconds, [float(loss) for loss in losses]


def most_memory(device: str) -> int:
    """Bytes that this process had at most, on its GPU if it trains on one. MPS only knows what it has now."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if device == "mps":
        return torch.mps.driver_allocated_memory()
    return peak_memory()


def find_limit(model: torch.nn.Module, setup: Setup, dtype: torch.dtype | None) -> float | None:
    """FLOP/s that the device could reach in a precision, None where nobody knows."""
    if setup.device == "mps":
        return None
    if dtype is None:
        picked, _ = machine.pick_precision("auto", torch.device(setup.device))
        dtype = picked or torch.float32
    if setup.device == "cuda":
        return None if dtype == torch.float32 else machine.gpu_peak(torch.cuda.get_device_name())
    files.keep_heap()  # which only train.py's process has done already
    rows = min(256, setup.batch_size * setup.seq_len)
    return machine.matmul_rate(machine.matmul_shapes(model), rows, dtype, seconds=2.0)


def describe(device: str) -> str:
    """The machine, and the versions of what is compared."""
    found = [torch.cuda.get_device_name() if device == "cuda" else describe_machine()]
    for package in ("torch", "transformers", "litgpt", "lightning"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def take_turns(names: Sequence[str], setup: Setup, rounds: int, quick: bool) -> dict[str, list[dict]]:
    """{name: what each turn found}, without the peers that failed. Says on stderr how it goes on."""
    results = {name: [] for name in names}
    for i in range(rounds):
        for name in list(results):
            mine = setup if quick else PEERS[name].setup(setup)
            try:
                found = apart(turn, name, dataclasses.asdict(mine))
            except Failed as e:
                print(f"{name} is left out: {e}", file=sys.stderr)
                del results[name]
                continue
            found["tokens"] = f"{mine.batch_size} x {mine.seq_len} x {mine.grad_accum}"
            results[name].append(found)
            losses = " ".join(f"{loss:.3f}" for loss in found["losses"][:4])
            print(f"round {i + 1}: {name}: {found['rate']:.1f} tok/s; losses {losses}", file=sys.stderr)
    return results


def table_row(name: str, turns: Sequence[dict], reference: Sequence[dict]) -> list[str]:
    """`reference`: the turns of train.py in the same rounds, none if it isn't measured."""
    ratios = [mine["rate"] / other["rate"] for mine, other in zip(reference, turns, strict=False)]
    shares = [found["share"] for found in turns if found["share"]]
    return [
        name,
        turns[0]["tokens"],
        spread([found["rate"] for found in turns], 0),
        f"{statistics.median(ratios):.2f}" if ratios else "-",
        f"{max(found['memory'] for found in turns) / 1e9:.1f} GB",
        spread(shares, 2) if shares else "unknown",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    flags = parser(__file__, __doc__)
    flags.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="(default: cpu)")
    flags.add_argument("--batch_size", type=int, default=8, help="(default: 8)")
    flags.add_argument("--seq_len", type=int, default=256, help="(default: 256)")
    flags.add_argument("--grad_accum", type=int, default=1, help="(default: 1)")
    flags.add_argument("--rounds", type=int, default=3, help="(default: 3)")
    flags.add_argument("--steps", type=int, default=6, help="timed steps of a turn (default: 6)")
    flags.add_argument("--warmup", type=int, default=3, help="steps before them (default: 3)")
    flags.add_argument("--only", nargs="+", choices=PEERS, metavar="PEER", help=f"of: {', '.join(PEERS)}")
    flags.add_argument("--quick", action="store_true", help="one layer, 1 x 64 tokens also for presets, 1 round")
    args = flags.parse_args(argv)
    setup = Setup(args.device, args.batch_size, args.seq_len, args.grad_accum, 12, args.steps, args.warmup)
    if args.quick:
        args.rounds = 1
        setup = Setup(args.device, batch_size=1, seq_len=64, n_layer=1, steps=2, warmup=1)
    names = args.only or [name for name in PEERS if name not in UNUSUAL[args.device]]
    results = take_turns(names, setup, args.rounds, args.quick)
    print(f"{describe(args.device)}; {args.rounds} rounds of {setup.steps} steps\n")
    print_header(
        "program",
        "tokens a step",
        "tok/s: median (lowest to highest)",
        "train.py has this many times its speed",
        "peak memory",
        "share of the limit",
    )
    for name, turns in results.items():
        print_row(*table_row(name, turns, results.get("train.py", [])))


if __name__ == "__main__":
    main()
