"""How speed and memory of train.py change with the batch, the sequence, the accumulation and the depth.

    python benchmarks/growth.py                                # on a CPU: about 10 minutes
    python benchmarks/growth.py --device cuda --seq_len 1024   # batches double until the memory is full

Each row is a process of its own, as in throughput.py. Prints a Markdown table, and the best batch size.
"""

from __future__ import annotations

import argparse
import sys

from throughput import machine, turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=3)
    args = parser.parse_args()
    args.n_layer, args.grad_accum = 12, 1
    base = {"batch_size": args.batch_size, "seq_len": args.seq_len, "grad_accum": 1, "n_layer": 12}
    small = {**base, "batch_size": 1}
    largest = 32 if args.device == "cpu" else 4096
    batches = [1 << i for i in range(largest.bit_length())]
    rows = [("batch size", {**base, "batch_size": b}) for b in batches]
    rows += [("sequence", {**base, "seq_len": t}) for t in (64, 128, 512, 1024)]
    rows += [
        ("sequence, as many tokens", {**base, "batch_size": 2048 // t, "seq_len": t}) for t in (64, 128, 512, 1024)
    ]
    rows += [("accumulation", {**small, "grad_accum": a}) for a in (2, 4, 8)]
    rows += [("depth", {**base, "n_layer": n}) for n in (1, 3, 6, 24)]
    print(f"{machine(args.device)}\n")
    print("| varied | B | T | grad_accum | n_layer | tok/s | share of the limit | peak memory |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    rates, full = {}, False
    for varied, shape in rows:
        if full and varied == "batch size":
            continue
        found = turn("train.py", args, **shape)
        if isinstance(found, str):
            full = full or varied == "batch size"
            print(f"{varied} {shape}: {found}", file=sys.stderr)
            continue
        share = f"{found['share']:.2f}" if found["share"] else "unknown"
        sizes = " | ".join(str(shape[name]) for name in ("batch_size", "seq_len", "grad_accum", "n_layer"))
        print(f"| {varied} | {sizes} | {found['rate']:.0f} | {share} | {found['memory']:.1f} GB |", flush=True)
        if varied == "batch size":
            rates[shape["batch_size"]] = found["rate"]
    best = max(rates, key=rates.get)
    print(f"\nBest batch size at {args.seq_len} tokens: {best} ({rates[best]:.0f} tok/s)")


if __name__ == "__main__":
    main()
