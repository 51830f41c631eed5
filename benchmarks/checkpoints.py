"""What saving costs: a run without saves, one that saves in the background, and one that waits for each save.

    python benchmarks/checkpoints.py --rounds 3

The variants take turns (A B C A B C ...), each in a process of its own, at the full size of the model. tok/s is over
the wall clock from the first step to the last, so the save at the end, for which every run waits, is in none of them.
Prints a Markdown table: medians, with the lowest and highest, the ratio to no saves in the same round, peak memory.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

RUN = f"""
import json, resource, sys
sys.path.insert(0, {str(ROOT)!r})
import train
saves, flags = json.loads(sys.argv[1])
save = train.CheckpointWriter.save
if saves == "synchronous":
    train.CheckpointWriter.save = lambda writer, *args: (save(writer, *args), writer.wait())
code = train.main(flags)
unit = 1 if sys.platform == "darwin" else 1024
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit))
raise SystemExit(code)
"""


def measure(saves: str, args: argparse.Namespace, out_dir: Path) -> tuple[float, float]:
    """(tokens a second, peak memory in GB) of one run."""
    flags = [*args.flags, "--out_dir", str(out_dir), "--overwrite", "--steps", str(args.steps), "--log_every", "1"]
    flags += ["--save_every", str(args.steps if saves == "none" else args.every), "--save_minutes", "0"]
    flags += ["--num_prompts", "0", "--target_loss", "0"]
    command = [sys.executable, "-c", RUN, json.dumps([saves, flags])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    with open(out_dir / "logs" / "train_metrics.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    tokens = int(rows[-1]["tokens"]) - int(rows[0]["tokens"])
    seconds = float(rows[-1]["elapsed_s"]) - float(rows[0]["elapsed_s"])
    return tokens / seconds, int(done.stdout.splitlines()[-1]) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--every", type=int, default=10, help="steps between saves")
    parser.add_argument("--dir", help="disk to write to (default: the system's temporary folder)")
    default = "--input_file data/sample.txt --batch_size 8 --seq_len 256 --optimizer adamw"
    parser.add_argument("--flags", type=str.split, default=default.split(), help=f"of train.py (default: {default})")
    args = parser.parse_args()
    variants = {name: [] for name in ("none", "background", "synchronous")}
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        for i in range(args.rounds):
            for name, results in variants.items():
                results.append(measure(name, args, Path(folder) / "out"))
                print(f"round {i + 1}: {name} {results[-1][0]:.1f} tok/s", file=sys.stderr)
    print(f"{args.steps} steps, a save every {args.every}; {os.cpu_count()} cores, {platform.platform()}\n")
    print("| saves | tok/s: median (lowest to highest) | to no saves | peak memory |")
    print("| --- | --- | --- | --- |")
    for name, results in variants.items():
        rates = [rate for rate, _ in results]
        ratio = statistics.median(rate / none for rate, (none, _) in zip(rates, variants["none"], strict=True))
        spread = f"{statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})"
        print(f"| {name} | {spread} | {ratio:.3f} | {max(memory for _, memory in results):.2f} GB |")


if __name__ == "__main__":
    main()
