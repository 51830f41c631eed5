"""How speed and memory of train.py change with the batch, the sequence, the accumulation and the depth.

    python benchmarks/growth.py                                # on a CPU: about 10 minutes
    python benchmarks/growth.py --quick                        # a first try with one layer: a minute
    python benchmarks/growth.py --device cuda --seq_len 1024   # batches double until the memory is full

Each row is a process of its own, as in throughput.py. Prints a Markdown table, and the best batch size.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence

from common import Failed, apart, parser, print_header, print_row
from peers import Setup
from throughput import describe, turn


def doubled(largest: int) -> list[int]:
    """1, 2, 4, ... up to the largest."""
    sizes = [1]
    while 2 * sizes[-1] <= largest:
        sizes.append(2 * sizes[-1])
    return sizes


def variations(base: Setup, largest: int, sequences: Sequence[int], depths: Sequence[int]) -> Iterator:
    """Yields (what is varied, the setup), beside the base one."""
    for batch_size in doubled(largest):
        yield "batch size", dataclasses.replace(base, batch_size=batch_size)
    for seq_len in sequences:
        yield "sequence", dataclasses.replace(base, seq_len=seq_len)
    for seq_len in sequences:
        batch_size = max(1, base.tokens() // seq_len)
        yield "sequence, as many tokens", dataclasses.replace(base, batch_size=batch_size, seq_len=seq_len)
    for grad_accum in (2, 4, 8):
        yield "accumulation", dataclasses.replace(base, batch_size=1, grad_accum=grad_accum)
    for n_layer in depths:
        yield "depth", dataclasses.replace(base, n_layer=n_layer)


def measure(varied: str, setup: Setup) -> float:
    """Prints the row, and returns tok/s. Raises Failed, for example where the memory is full."""
    found = apart(turn, "train.py", dataclasses.asdict(setup))
    share = f"{found['share']:.2f}" if found["share"] else "unknown"
    sizes = (setup.batch_size, setup.seq_len, setup.grad_accum, setup.n_layer)
    print_row(varied, *sizes, f"{found['rate']:.0f}", share, f"{found['memory'] / 1e9:.1f} GB")
    return found["rate"]


def main(argv: Sequence[str] | None = None) -> None:
    flags = parser(__file__, __doc__)
    flags.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="(default: cpu)")
    flags.add_argument("--batch_size", type=int, default=8, help="where it isn't varied (default: 8)")
    flags.add_argument("--seq_len", type=int, default=256, help="where it isn't varied (default: 256)")
    flags.add_argument("--steps", type=int, default=4, help="timed steps of a row (default: 4)")
    flags.add_argument("--warmup", type=int, default=3, help="steps before them (default: 3)")
    flags.add_argument("--quick", action="store_true", help="one layer, 2 x 32 tokens, 1 step")
    args = flags.parse_args(argv)
    base = Setup(args.device, args.batch_size, args.seq_len, steps=args.steps, warmup=args.warmup)
    largest = 32 if args.device == "cpu" else 4096
    rows = variations(base, largest, sequences=(64, 128, 512, 1024), depths=(1, 3, 6, 24))
    if args.quick:
        base = Setup(args.device, batch_size=2, seq_len=32, n_layer=1, steps=1, warmup=1)
        rows = variations(base, largest=2, sequences=(16,), depths=(2,))
    print(f"{describe(args.device)}\n")
    print_header("varied", "B", "T", "grad_accum", "n_layer", "tok/s", "share of the limit", "peak memory")
    rates = {}  # of each batch size
    full = False
    for varied, setup in rows:
        if full and varied == "batch size":
            continue
        try:
            rate = measure(varied, setup)
        except Failed as e:
            print(f"{varied} {setup}: {e}", file=sys.stderr)
            full = True
            continue
        if varied == "batch size":
            rates[setup.batch_size] = rate
    if rates:
        best = max(rates, key=rates.get)
        print(f"\nBest batch size at {base.seq_len} tokens: {best} ({rates[best]:.0f} tok/s)")


if __name__ == "__main__":
    main()
