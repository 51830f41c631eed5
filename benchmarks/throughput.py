"""How fast train.py trains, beside what one would use instead, and beside what the machine could do at most.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/throughput.py                            # on a CPU: 8 x 256 tokens a step, about 15 minutes
    python benchmarks/throughput.py --device cuda --batch_size 64 --seq_len 1024 --steps 20

All train the same model on the same batches in turns (A B C A B C ...), each turn in a process of its own, which first
warms up. Prints a Markdown table: tok/s (the median of a turn's steps, on a GPU their mean; over the turns the median,
lowest and highest), the ratio of train.py to it in the same round, peak memory, and the share of the limit: 6 x
parameters x tok/s over the rate at which the same process, right after, does nothing but the model's matrix products in
the same precision (on a GPU: over the card's peak). A peer whose package isn't installed is left out, and named.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time

import torch
from peers import PEERS, USUAL, make_batcher, train


def work(name: str, args: argparse.Namespace) -> dict:
    """One turn of one peer, in this process: tok/s, share of the limit, peak memory in GB, the losses."""
    make, options, dtype = PEERS[name]
    shape = train.GPTConfig(n_layer=args.n_layer, block_size=max(1024, args.seq_len))

    def limit() -> float | None:
        if args.device == "cuda":
            return train.gpu_peak(torch.cuda.get_device_name()) if dtype != torch.float32 else None
        train.keep_heap()  # which only train.py's process has done already
        return train.matmul_rate(shape, min(256, args.batch_size * args.seq_len), dtype, seconds=2.0)

    def finish() -> None:
        if args.device == "cuda":
            torch.cuda.synchronize()

    torch.manual_seed(1337)
    step = make(args, make_batcher(args), **options)
    losses = [step().item() for _ in range(args.warmup)]
    times = []
    start = time.perf_counter()
    for _ in range(args.steps):
        begin = time.perf_counter()
        losses.append(step())
        if args.device == "cpu":  # a GPU may run behind; there, only the end of the turn is waited for
            times.append(time.perf_counter() - begin)
    finish()
    seconds = statistics.median(times) if times else (time.perf_counter() - start) / args.steps
    best = limit()
    rate = args.batch_size * args.seq_len * args.grad_accum / seconds
    parameters = sum(p.numel() for p in train.GPT(shape).parameters())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if args.device == "cuda":
        memory = torch.cuda.max_memory_allocated()
    return {
        "rate": rate,
        "share": 6 * parameters * rate / best if best else None,
        "limit": best,
        "memory": memory / 1e9,
        "losses": [float(loss) for loss in losses],
    }


def turn(name: str, args: argparse.Namespace, **changes) -> dict | str:
    """What `work` finds in a process of its own, or the last line of why it fails."""
    options = {**vars(args), **changes}
    command = [sys.executable, __file__, "--turn", json.dumps([name, options])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no output"])[-1]
    return json.loads(done.stdout.splitlines()[-1])


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            name = next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{os.cpu_count()} cores of {name}"


def versions() -> str:
    found = [f"torch {torch.__version__}"]
    for package in ("transformers", "litgpt", "lightning"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--grad_accum", type=int, default=1)
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a turn")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--only", nargs="+", choices=PEERS, metavar="PEER", help=f"of: {', '.join(PEERS)}")
    parser.add_argument("--turn", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.turn:
        name, options = json.loads(args.turn)
        print(json.dumps(work(name, argparse.Namespace(**options))), flush=True)
        os._exit(0)  # a peer's thread may wait for a next turn
    results: dict[str, list[dict]] = {name: [] for name in args.only or USUAL[args.device]}
    for i in range(args.rounds):
        for name in list(results):
            found = turn(name, args)
            if isinstance(found, str):
                print(f"{name} is left out: {found}", file=sys.stderr)
                del results[name]
                continue
            results[name].append(found)
            share = f", {found['share']:.3f} of {found['limit'] / 1e9:.0f} GFLOP/s" if found["share"] else ""
            losses = " ".join(f"{loss:.3f}" for loss in found["losses"][:4])
            print(f"round {i + 1}: {name}: {found['rate']:.1f} tok/s{share}; losses {losses}", file=sys.stderr)
    tokens = f"{args.batch_size} x {args.seq_len} x {args.grad_accum} tokens a step"
    print(f"{machine(args.device)}; {versions()}; {tokens}, {args.rounds} rounds of {args.steps} steps\n")
    print("| | tok/s: median (lowest to highest) | train.py is faster by | peak memory | share of the limit |")
    print("| --- | --- | --- | --- | --- |")
    mine = results.get("train.py")
    for name, turns in results.items():
        rates = [t["rate"] for t in turns]
        spread = f"{statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f})"
        pairs = zip(mine or [], turns, strict=False)
        ratio = f"{statistics.median(a['rate'] / b['rate'] for a, b in pairs):.2f}" if mine else "-"
        shares = [t["share"] for t in turns if t["share"]]
        share = f"{statistics.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})" if shares else "unknown"
        print(f"| {name} | {spread} | {ratio} | {max(t['memory'] for t in turns):.1f} GB | {share} |")


if __name__ == "__main__":
    main()
