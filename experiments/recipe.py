"""Which settings bring the loss under the target in the fewest tokens? Tried on a slice of the text.

    python experiments/recipe.py "--lr 4e-4" "--lr 8e-4" "--optimizer muon --lr 1e-3 --batch_size 4"
    python experiments/recipe.py --tokens 2000 --passes 2 "--lr 4e-4"     # a first try: some seconds

Each argument is one set of train.py's flags. A run of its own trains with them for --passes over the first --tokens
tokens of the text, --jobs runs at a time, each with its share of the processor's threads. The curve of the learning
rate ends with the passes unless the flags say otherwise. By default the model is small (11 million parameters in 6
blocks of width 384, 30 million in all), so that a run takes minutes; --full takes GPT-2 124M. Prints a Markdown table
of avg_loss at the end of each pass.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from support import cli, text  # noqa: E402
from support.tokenizer import load_tokenizer  # noqa: E402

SMALL = "--n_layer 6 --n_head 6 --n_embd 384"
BASE = (
    "--optimizer adamw --batch_size 2 --seq_len 256 --beta1 0.9 --beta2 0.95 --weight_decay 0 --num_prompts 0"
    " --recall_places 0 --no_mfu --save_minutes 0 --log_every 1 --save_every 100000"
)


def cut_text(input_file: str, tokens: int) -> tuple[str, int]:
    """(the beginning of the text, how many tokens it has)."""
    tokenizer = load_tokenizer()
    corpus = text.load_corpus(input_file, tokenizer)
    beginning = tokenizer.decode(corpus.tokens[:tokens].tolist())
    return beginning, len(tokenizer.encode(beginning))  # the last token may be another when what follows is cut off


def read_set(words: Sequence[str]) -> dict:
    """The settings that a set of flags gives. Raises ValueError for one that can't be tried."""
    given = cli.read_flags(train.TrainConfig, words)
    problems = [value.problem for value in given.values() if isinstance(value, cli.Unreadable)]
    if "preset" in given:
        problems.append("a preset has no effect here: give its flags")
    if problems:
        raise ValueError("; ".join(problems))
    return given


def run(words: Sequence[str], out_dir: Path, threads: int) -> list[dict[str, str]]:
    """Trains, and returns the rows of the CSV. Raises ValueError with the reason where that fails."""
    command = [sys.executable, str(ROOT / "train.py"), *words, "--out_dir", str(out_dir)]
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no words"]
        raise ValueError(lines[-1])
    for path in (out_dir / "checkpoints").glob("*.pt"):
        path.unlink()  # a dozen of them would fill a small disk
    with open(out_dir / "logs" / "train_metrics.csv", newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def cells(rows: Sequence[dict[str, str]], a_pass: int, passes: int, target: float) -> list[str]:
    """avg_loss after each pass of `a_pass` steps, and the tokens until it was under the target."""
    after = []
    under = "not in these"
    for row in rows:
        step = int(row["step"])
        loss = float(row["avg_loss"])
        if step % a_pass == 0 and len(after) < passes:
            after.append(f"{loss:.3f}")
        if step >= a_pass and loss < target and under == "not in these":
            under = f"{int(row['tokens']):,}"
    missing = [""] * (passes - len(after))
    return [*after, *missing, under]


def try_set(flags: str, args: argparse.Namespace, slice_file: Path, tokens: int, out_dir: Path) -> str:
    """Trains with a set of flags. Returns its line of the table."""
    try:
        words = shlex.split(f"{shape(args)} {BASE} {flags}")
        given = read_set(words)
        batch = given["batch_size"] * given["seq_len"] * given.get("grad_accum", 1)
        a_pass = math.ceil((tokens - 1) / batch)
        if not given.keys() & {"steps", "epochs"}:
            words += ["--steps", str(args.passes * a_pass)]
        threads = max(1, (os.cpu_count() or 1) // args.jobs)
        rows = run([*words, "--input_file", str(slice_file)], out_dir, threads)
    except ValueError as e:
        return f"| `{flags}` | {e} |"
    target = given.get("target_loss", train.TrainConfig.target_loss)
    return f"| `{flags}` | " + " | ".join(cells(rows, a_pass, args.passes, target)) + " |"


def shape(args: argparse.Namespace) -> str:
    return "" if args.full else SMALL


def main(argv: Sequence[str] | None = None) -> None:
    flags = cli.program_parser("recipe.py", 'python experiments/recipe.py [--FLAG VALUE ...] "FLAGS" ...', __doc__)
    flags.add_argument("flags", nargs="+", help="a set of train.py's flags, as one argument")
    default = str(ROOT / "data" / "input.txt")
    flags.add_argument("--input_file", default=default, help="(default: data/input.txt)")
    flags.add_argument("--tokens", type=int, default=40_000, help="of its beginning (default: 40000)")
    flags.add_argument("--passes", type=int, default=12, help="(default: 12)")
    flags.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    flags.add_argument("--full", action="store_true", help="GPT-2 124M")
    args = flags.parse_args(argv)
    beginning, tokens = cut_text(args.input_file, args.tokens)
    print(f"{tokens:,} tokens, {args.passes} passes, train.py {shape(args)} {BASE}\n")
    passes = " | ".join(f"pass {n}" for n in range(1, args.passes + 1))
    print(f"| flags | {passes} | under the target after |")
    print("| --- |" + " --- |" * (args.passes + 1), flush=True)
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(args.jobs) as pool:
        slice_file = Path(name) / "slice.txt"
        slice_file.write_text(beginning, encoding="utf-8")
        runs = []
        for i, one in enumerate(args.flags):
            runs.append(pool.submit(try_set, one, args, slice_file, tokens, Path(name) / str(i)))
        for done in as_completed(runs):
            print(done.result(), flush=True)


if __name__ == "__main__":
    main()
