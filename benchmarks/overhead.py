"""What a run costs beside its steps: the start, log lines, bar, samples and saves.

    python benchmarks/overhead.py

Trains on the bundled text at the full size of the model (8 x 256 tokens a step and AdamW, unless --flags says
otherwise), with a clock round each part of the loop. Prints two Markdown tables: the time from the start of the process
to its first step, with token ids in the cache; and what each part costs at the default intervals of a run of --plan
steps, as a share of the steps' own time. While a checkpoint is written in the background, steps take longer: that
counts for the save.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

RUN = f"""
import json, sys, time
sys.path.insert(0, {str(ROOT)!r})
began = float(sys.argv[1])
import train
spans, busy, loops = [], [], []

def timed(owner, name):
    inner = getattr(owner, name)
    def outer(self, *args, **kwargs):
        start = time.time()
        try:
            return inner(self, *args, **kwargs)
        finally:
            spans.append((name, start - began, time.time() - began))
            if name == "train_step":
                thread = loops[0].writer.thread
                busy.append(bool(thread and thread.is_alive()))
    setattr(owner, name, outer)

for owner, name in ((train.Trainer, "train_step"), (train.Loop, "log_step"), (train.Loop, "save"),
                    (train.Loop, "write_samples")):
    timed(owner, name)
init = train.Loop.__init__
train.Loop.__init__ = lambda self, *args: (init(self, *args), loops.append(self))[0]
code = train.main(json.loads(sys.argv[2]))
print()
print(json.dumps([spans, busy]))
raise SystemExit(code)
"""


def run(flags: list[str]) -> tuple[list[tuple[str, float, float]], list[bool]]:
    """(name, start, end) of each part, in seconds since the process began; was a write under way after each step."""
    command = [sys.executable, "-c", RUN, str(time.time()), json.dumps(flags)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    default = ["--batch_size", "8", "--seq_len", "256", "--optimizer", "adamw"]
    parser.add_argument("--flags", type=str.split, default=default)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--plan", type=int, default=20000, help="steps of the run whose default intervals count")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        common = ["--input_file", "data/sample.txt", "--target_loss", "0", "--overwrite", *args.flags]
        once = [*common, "--out_dir", f"{folder}/start", "--steps", "1", "--num_prompts", "0"]
        firsts = []
        for _ in range(1 + args.starts):  # the first one makes the cache
            spans = run(once)[0]
            firsts.append(next((start, end) for name, start, end in spans if name == "train_step"))
        begins, ends = zip(*firsts[1:], strict=True)
        print("| start of the process to | seconds: median (lowest to highest) |\n| --- | --- |")
        for what, times in (("the first step", begins), ("its end", ends)):
            print(f"| {what} | {statistics.median(times):.1f} ({min(times):.1f} to {max(times):.1f}) |")

        half = str(args.steps // 2)
        often = ["--steps", str(args.steps), "--log_every", "1", "--save_every", half, "--sample_every", half]
        spans, busy = run([*common, *often, "--out_dir", f"{folder}/run", "--save_minutes", "0"])
    steps = [(start, end) for name, start, end in spans if name == "train_step"]
    warm, middle = 5, [s for s in spans if s[1] < steps[-1][0]]
    alone = [end - start for (start, end), b in list(zip(steps, busy, strict=True))[warm:] if not b]
    step = statistics.median(alone)
    held_up = sum(end - start - step for (start, end), b in zip(steps, busy, strict=True) if b)

    def cost(name: str) -> float:
        times = [end - start for n, start, end in middle if n == name]
        return statistics.mean(times[warm:] if len(times) > warm else times)

    known = sum(end - start for name, start, end in middle if start >= steps[warm][0])
    rest = (steps[-1][0] - steps[warm][0] - known) / (len(steps) - 1 - warm)
    every = min(1000, args.plan // 10)
    saves = 1 / every + step / (15 * 60)
    parts = [
        ("a log line and a row of the CSV", cost("log_step"), 1 / 10, "every 10 steps"),
        ("bar, signals and the rest of the loop", rest, 1.0, "each step"),
        ("a save", cost("save") + held_up, saves, f"every {every} steps and every 15 minutes"),
        ("two samples of 200 tokens", cost("write_samples"), 1 / every, f"every {every} steps"),
    ]
    print(f"\n{args.steps} steps of {step:.2f} s; intervals as in a run of {args.plan:,} steps\n")
    print("| part | seconds each | by default | share of the steps' time |\n| --- | --- | --- | --- |")
    for name, seconds, rate, when in parts:
        print(f"| {name} | {seconds:.4f} | {when} | {seconds * rate / step:.3%} |")
    print(f"| together | | | {sum(seconds * rate for _, seconds, rate, _ in parts) / step:.3%} |")


if __name__ == "__main__":
    main()
