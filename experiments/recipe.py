"""Which settings bring the loss under the target in the fewest tokens? Tried on a slice of the text.

    python benchmarks/recipe.py "--lr 4e-4" "--lr 8e-4" "--optimizer muon --lr 1e-3 --batch_size 4"

Each argument is one set of train.py's flags. A run of its own trains with them for --passes over the first --tokens
tokens of the text, --jobs runs at a time, each with its share of the processor's threads. The curve of the learning
rate ends with the passes unless the flags say otherwise. By default the model is small (11 million parameters in 6
blocks of width 384, 30 million in all), so that a run takes minutes; --full takes GPT-2 124M. Prints a Markdown table
of avg_loss at the end of each pass.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402

SMALL = "--n_layer 6 --n_head 6 --n_embd 384"
BASE = (
    "--optimizer adamw --batch_size 2 --seq_len 256 --beta1 0.9 --beta2 0.95 --weight_decay 0 --num_prompts 0"
    " --recall_places 0 --no_mfu --save_minutes 0"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("flags", nargs="+", help="a set of train.py's flags, as one argument")
    parser.add_argument("--input_file", default=str(ROOT / "data" / "input.txt"))
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--passes", type=int, default=12)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--full", action="store_true")
    args = parser.parse_args()
    tokenizer = train.load_tokenizer()
    text = tokenizer.decode(train.load_corpus(args.input_file, tokenizer).tokens[: args.tokens].tolist())
    args.tokens = len(tokenizer.encode(text))  # the last one may be another when what follows is cut off
    shape = "" if args.full else SMALL
    print(f"{args.tokens:,} tokens, {args.passes} passes, train.py {shape} {BASE}\n")
    print("| flags | " + " | ".join(f"pass {n}" for n in range(1, args.passes + 1)) + " | under the target after |")
    print("| --- |" + " --- |" * (args.passes + 1), flush=True)
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        slice_file = Path(folder) / "slice.txt"
        slice_file.write_text(text, encoding="utf-8")
        runs = [
            pool.submit(row, flags, args, shape, slice_file, Path(folder) / str(i))
            for i, flags in enumerate(args.flags)
        ]
        for run in concurrent.futures.as_completed(runs):
            print(run.result(), flush=True)


def row(flags: str, args: argparse.Namespace, shape: str, slice_file: Path, out_dir: Path) -> str:
    """Trains with the flags; a line of the table."""
    try:
        given, problems = train.read_flags(shlex.split(f"{shape} {BASE} {flags}"))
    except (train.UsageError, ValueError) as e:
        given, problems = {}, {"flags": str(e)}
    if problems or "preset" in given:
        return f"| `{flags}` | {'; '.join(problems.values()) or 'a preset has no effect here: give its flags'} |"
    batch = given["batch_size"] * given["seq_len"] * given.get("grad_accum", 1)
    a_pass = -(-(args.tokens - 1) // batch)
    steps = [] if given.keys() & {"steps", "epochs"} else ["--steps", str(args.passes * a_pass)]
    command = [sys.executable, str(ROOT / "train.py"), *shlex.split(f"{shape} {BASE}"), *steps, *shlex.split(flags)]
    command += [
        "--input_file",
        str(slice_file),
        "--out_dir",
        str(out_dir),
        "--log_every",
        "1",
        "--save_every",
        "100000",
    ]
    env = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        return f"| `{flags}` | {(done.stderr.strip().splitlines() or ['no words'])[-1]} |"
    with open(out_dir / "logs" / "train_metrics.csv", newline="", encoding="utf-8") as f:
        rows = [(int(r["step"]), int(r["tokens"]), float(r["avg_loss"])) for r in csv.DictReader(f)]
    for path in (out_dir / "checkpoints").glob("*.pt"):
        path.unlink()  # a dozen of them would fill a small disk
    target = given.get("target_loss", train.TrainConfig.target_loss)
    passes = [f"{loss:.3f}" for step, _, loss in rows if step % a_pass == 0][: args.passes]
    under = next((f"{tokens:,}" for step, tokens, loss in rows if step >= a_pass and loss < target), "not in these")
    return f"| `{flags}` | " + " | ".join([*passes, *[""] * (args.passes - len(passes)), under]) + " |"


if __name__ == "__main__":
    main()
