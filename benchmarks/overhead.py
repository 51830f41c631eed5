"""What a run costs beside its steps: the start, log lines, the bar and samples. (checkpoints.py measures saves.)

    python benchmarks/overhead.py
    python benchmarks/overhead.py --quick                      # a first try with a small model: half a minute

Trains on the bundled text at the full size of the model (8 x 256 tokens a step and AdamW, unless --flags says
otherwise), with a clock round each part of the loop. Prints two Markdown tables: the time from the start of the process
to its first step, with token ids in the cache; and what each part costs at the default intervals of a run of --plan
steps, as a share of the steps' own time.
"""

from __future__ import annotations

import shlex
import statistics
import tempfile
import time
from collections.abc import Sequence

from common import SAMPLE, SMALL, apart, parser, print_header, print_row, run_train, spread, watch

DEFAULT = "--batch_size 8 --seq_len 256 --optimizer adamw"
WARM = 5  # steps, and log lines, that don't count


def timed_run(flags: Sequence[str], began: float) -> list:
    """Trains with a clock round each part. Returns (name, begin, end) of each, in seconds since `began`."""
    import train

    spans = []
    watch(train.Trainer, "train_step", spans)
    watch(train.Loop, "log_step", spans)
    watch(train.Loop, "write_samples", spans)
    run_train(flags)
    return [(name, begin - began, end - began) for name, begin, end in spans]


def durations(spans: Sequence, name: str) -> list[float]:
    return [end - begin for one, begin, end in spans if one == name]


def loop_costs(spans: Sequence) -> dict[str, float]:
    """Seconds of each part: a `step`, a `line` of log and CSV, `samples`, and the `rest` of the loop a step."""
    begins = [begin for name, begin, _ in spans if name == "train_step"]
    first = begins[WARM]
    last = begins[-1]
    inside = [span for span in spans if first <= span[1] < last]  # whole rounds of the loop
    known = sum(end - begin for _, begin, end in inside)
    rounds = len(begins) - 1 - WARM
    return {
        "step": statistics.median(durations(inside, "train_step")),
        "line": statistics.mean(durations(inside, "log_step")),
        "samples": statistics.mean(durations(inside, "write_samples")),
        "rest": (last - first - known) / rounds,
    }


def print_start(flags: Sequence[str], starts: int) -> None:
    """Table 1. The first run isn't counted: it makes the cache."""
    begins = []
    ends = []
    for _ in range(1 + starts):
        spans = apart(timed_run, [*flags, "--steps", "1", "--num_prompts", "0"], time.time())
        name, begin, end = spans[0]
        assert name == "train_step"
        begins.append(begin)
        ends.append(end)
    print_header("from the start of the process to", "seconds: median (lowest to highest)")
    print_row("the first step", spread(begins[1:]))
    print_row("its end", spread(ends[1:]))


def print_loop(flags: Sequence[str], steps: int, plan: int) -> None:
    """Table 2. Log lines after each step, and samples once, in the middle."""
    frequent = ["--steps", str(steps), "--log_every", "1", "--sample_every", str(steps // 2 + 1)]
    rare = ["--save_every", str(steps), "--save_minutes", "0"]
    costs = loop_costs(apart(timed_run, [*flags, *frequent, *rare], time.time()))
    every = max(100, min(1000, plan // 10))
    print(f"\n{steps} steps of {costs['step']:.3g} s; intervals as in a run of {plan:,} steps\n")
    print_header("part", "seconds each", "how often", "share of the steps' time")
    parts = (
        ("a log line and a row of the CSV", "line", 10, "every 10 steps"),
        ("bar, signals and the rest of the loop", "rest", 1, "each step"),
        ("two samples", "samples", every, f"every {every:,} steps"),
    )
    for what, name, interval, often in parts:
        share = costs[name] / interval / costs["step"]
        print_row(what, f"{costs[name]:.4f}", often, f"{share:.3%}")


def main(argv: Sequence[str] | None = None) -> None:
    flags = parser(__file__, __doc__)
    flags.add_argument("--flags", default=DEFAULT, help=f"of train.py (default: {DEFAULT})")
    flags.add_argument("--starts", type=int, default=3, help="(default: 3)")
    flags.add_argument("--steps", type=int, default=60, help="(default: 60)")
    flags.add_argument("--plan", type=int, default=20_000, help="steps of the run that is meant (default: 20000)")
    flags.add_argument("--quick", action="store_true", help="a small model, 1 start, 20 steps")
    args = flags.parse_args(argv)
    given = shlex.split(args.flags)
    if args.quick:
        given = SMALL
        args.starts = 1
        args.steps = 20
    with tempfile.TemporaryDirectory() as folder:
        common = ["--input_file", str(SAMPLE), "--target_loss", "0", "--out_dir", folder + "/out", "--overwrite"]
        print_start([*common, *given], args.starts)
        print_loop([*common, *given], args.steps, args.plan)


if __name__ == "__main__":
    main()
