"""Does memory grow with the text? Trains a small GPT-2 for a few steps on texts of several sizes, made here.

    python benchmarks/large_text.py --megabytes 10 100 1000

For each size, the first start, which tokenizes, and a second one, which finds the tokens in the cache: seconds, and the
most memory that the process ever had (its maximum resident set, mapped files included). Linux and macOS.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "--optimizer adamw --batch_size 1 --n_layer 2 --n_head 2 --n_embd 64 --seq_len 64 --steps 20 --num_prompts 0"
    " --recall_places 0 --target_loss 0"
)


def write_text(path: Path, megabytes: int) -> None:
    """Lines of words that aren't any language's, some with accents, in paragraphs; the same each time."""
    draw = random.Random(megabytes)
    syllables = [a + b for a in "bdfghklmnprstvwz" for b in "aeiouéäø"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(20_000)]
    with open(path, "w", encoding="utf-8", newline="\n") as f:
        while f.tell() < megabytes * 10**6:
            lines = (" ".join(draw.choices(words, k=draw.randint(4, 14))).capitalize() + ".\n" for _ in range(200))
            f.write("".join(line + "\n" * (draw.random() < 0.1) for line in lines))


def start(text: Path, folder: Path, *flags: str) -> tuple[float, float]:
    """(seconds, most memory in MB) of one run."""
    command = [sys.executable, str(ROOT / "train.py"), "--input_file", str(text), "--overwrite", *SMALL.split(), *flags]
    command += ["--out_dir", str(folder / "out"), "--cache_dir", str(folder / "cache")]
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"train.py ended with {process.returncode}")
    return time.perf_counter() - begin, usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--tokenizer", default="gpt2", choices=("gpt2", "char"))
    args = parser.parse_args()
    print("| text | first start | most memory | second start | most memory |\n|---:|---:|---:|---:|---:|")
    for megabytes in args.megabytes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_text(folder / "text.txt", megabytes)
            runs = [start(folder / "text.txt", folder, "--tokenizer", args.tokenizer) for _ in range(2)]
        cells = " | ".join(f"{seconds:.1f} s | {memory:,.0f} MB" for seconds, memory in runs)
        print(f"| {megabytes:,} MB | {cells} |", flush=True)


if __name__ == "__main__":
    main()
