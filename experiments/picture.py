"""Draws avg_loss against the passes over the text, for some runs of a table of experiments.

    python experiments/picture.py records/muon_passes.csv assets/muon_passes.svg

The CSV has a row for each pass of a run, with `pass`, `avg_loss` and the run's `label`. A run without a label isn't
drawn.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from report.pictures import INK, PAPER, frame, picture  # noqa: E402

TARGET = 0.1
COLOURS = ("#57606a", "#0550ae", "#8250df", "#116329", "#9a6700", "#bc4c00")


def read_runs(path: Path) -> dict[str, list[tuple[float, float]]]:
    """label -> the points (pass, avg_loss) of the run."""
    runs = defaultdict(list)
    with open(path, newline="", encoding="utf-8") as f:
        for row in csv.DictReader(f):
            if row["label"]:
                runs[row["label"]].append((float(row["pass"]), float(row["avg_loss"])))
    return runs


def draw(figure, runs: dict[str, list[tuple[float, float]]]) -> None:
    axes = figure.add_axes((0.11, 0.12, 0.84, 0.83), facecolor=PAPER)
    axes.set_yscale("log")
    for (label, points), colour in zip(runs.items(), COLOURS, strict=True):
        passes = [a_pass for a_pass, _ in points]
        losses = [loss for _, loss in points]
        axes.plot(passes, losses, color=colour, marker=".", linewidth=1.6, label=label)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 0.06), frameon=False, labelcolor=INK)
    axes.axhline(TARGET, color=INK, linewidth=1.0, linestyle="--")
    axes.set_yticks([0.1, 0.2, 0.5, 1, 2, 5], ["0.1", "0.2", "0.5", "1", "2", "5"])
    axes.set_xlabel("passes over the text", color=INK)
    axes.set_ylabel("avg_loss, nats per token", color=INK)
    frame(axes)


def main(argv: Sequence[str]) -> int:
    if len(argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    runs = read_runs(Path(argv[0]))
    title = "avg_loss after each pass over tiny Shakespeare, by recipe of Muon"
    Path(argv[1]).write_bytes(picture(lambda figure: draw(figure, runs), title))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
