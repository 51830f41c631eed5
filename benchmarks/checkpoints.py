"""What saving costs: how long save() holds training up, how long the write takes behind it, and what training loses.

    python benchmarks/checkpoints.py --rounds 2                # the default recipe: half an hour on two cores
    python benchmarks/checkpoints.py --quick                   # a first try with a small model: a minute

Three ways take turns, each run in a process of its own: no saves, saves in the background, and saves that training
waits for. What a save costs is what the steps from its begin to the end of its write take longer than the others. From
this and the default intervals follows the speed of a real run. Each save writes last.pt, and best.pt where avg_loss
fell. Prints a Markdown table of medians; memory is the highest.
"""

from __future__ import annotations

import itertools
import json
import math
import platform
import shlex
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common import (
    SAMPLE,
    SMALL,
    apart,
    describe_machine,
    parser,
    peak_memory,
    print_header,
    print_row,
    run_train,
    watch,
)

WAYS = ("none", "in the background", "waited for")
WARM = 2  # steps that don't count


def timed_run(way: str, flags: Sequence[str]) -> tuple[list, int]:
    """Trains. Returns (name, begin, end) of each step, save and write, and the most memory of this process."""
    import train

    spans = []
    if way == "waited for":
        wait_after_save(train.Loop)
    watch(train.Trainer, "train_step", spans)
    watch(train.Loop, "save", spans)
    watch(train.CheckpointWriter, "write", spans)
    run_train(flags)
    return spans, peak_memory()


def wait_after_save(loop_class: type) -> None:
    save = loop_class.save

    def save_and_wait(loop, *args, **kwargs):
        save(loop, *args, **kwargs)
        loop.checkpoints.wait()

    loop_class.save = save_and_wait


def costs(spans: Sequence, warm: int = WARM) -> dict[str, float]:
    """Seconds of a `step` that no save disturbs; and, 0 without saves: how long a save `held` training, how long its
    `write` took, and how much training `lost` by it in all."""
    begins = [begin for name, begin, _ in spans if name == "train_step"]
    before_last = [span for span in spans if span[1] < begins[-1]]  # the save at the end isn't training's loss
    saves = [end - begin for name, begin, end in before_last if name == "save"]
    writes = [end - begin for name, begin, end in before_last if name == "write"]
    busy = [span for span in before_last if span[0] != "train_step"]
    alone = []
    disturbed = []
    for begin, end in itertools.pairwise(begins[warm:]):
        if any(other[1] < end and begin < other[2] for other in busy):
            disturbed.append(end - begin)
        else:
            alone.append(end - begin)
    if not alone:
        raise SystemExit("no step was without a write beside it: give a larger --every")
    step = statistics.median(alone)
    if not saves:
        return {"step": step, "held": 0.0, "write": 0.0, "lost": 0.0}
    lost = sum(seconds - step for seconds in disturbed) / len(saves)
    return {"step": step, "held": statistics.median(saves), "write": statistics.median(writes), "lost": lost}


def saves_per_step(step_seconds: float, save_every: int, save_minutes: float) -> float:
    """How often a run saves: every save_every steps, and in between whenever save_minutes have passed."""
    between = save_every * step_seconds / 60  # minutes
    return max(1, math.ceil(between / save_minutes)) / save_every


def measure(way: str, args, folder: Path) -> dict[str, float]:
    """One run: costs(), and its tokens a step and peak memory."""
    every = args.steps if way == "none" else args.every
    flags = ["--input_file", str(folder / "text.txt"), "--out_dir", str(folder / "out"), "--overwrite"]
    flags += ["--num_prompts", "0", "--recall_places", "0", "--target_loss", "0", *args.flags]
    flags += ["--steps", str(args.steps), "--save_every", str(every), "--save_minutes", "0", "--log_every", "1"]
    spans, memory = apart(timed_run, way, flags)
    record = json.loads((folder / "out" / "run.json").read_text(encoding="utf-8"))
    found = costs(spans)
    found["tokens"] = record["tokens"] / record["steps"]
    found["memory"] = memory
    return found


def table_row(way: str, runs: Sequence[dict], save_every: int, save_minutes: float) -> list[str]:
    median = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    between = median["tokens"] / median["step"]
    memory = f"{max(run['memory'] for run in runs) / 1e9:.2f} GB"
    if way == "none":
        return [way, "-", "-", "-", f"{between:.1f}", "-", memory]
    lost_a_step = median["lost"] * saves_per_step(median["step"], save_every, save_minutes)
    slower = lost_a_step / (median["step"] + lost_a_step)
    seconds = [f"{median[name]:.2f} s" for name in ("held", "write", "lost")]
    return [way, *seconds, f"{between:.1f}", f"{between * (1 - slower):.1f} (-{slower:.2%})", memory]


def main(argv: Sequence[str] | None = None) -> None:
    flags = parser(__file__, __doc__)
    flags.add_argument("--rounds", type=int, default=3, help="(default: 3)")
    flags.add_argument("--steps", type=int, default=30, help="(default: 30)")
    flags.add_argument("--every", type=int, default=10, help="steps between saves (default: 10)")
    flags.add_argument("--dir", help="where to write (default: the system's temporary folder)")
    flags.add_argument("--flags", type=shlex.split, default=[], help="of train.py (default: none, so its defaults)")
    flags.add_argument("--quick", action="store_true", help="a small model, 1 round")
    args = flags.parse_args(argv)
    if args.quick:
        args.flags = SMALL
        args.rounds = 1
    import train

    usual = train.TrainConfig(steps=20_000).completed(batches_per_pass=1, batches_per_step=1)  # a long run
    runs = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        text = SAMPLE.read_text(encoding="utf-8")
        Path(name, "text.txt").write_text(text + text, encoding="utf-8")  # once, it is shorter than a batch of 16 x 256
        for _ in range(args.rounds):
            for way in WAYS:
                runs[way].append(measure(way, args, Path(name)))
    print(f"{args.rounds} rounds of {args.steps} steps, a save every {args.every}; {describe_machine()},", end=" ")
    print(f"{platform.platform()};", end=" ")
    print(f"in a long run a save every {usual.save_every} steps and {usual.save_minutes:g} minutes\n")
    names = ("saves", "save() holds training", "the write takes", "training loses by a save")
    print_header(*names, "tok/s between saves", "tok/s at default intervals", "peak memory")
    for way in WAYS:
        print_row(*table_row(way, runs[way], usual.save_every, usual.save_minutes))


if __name__ == "__main__":
    main()
