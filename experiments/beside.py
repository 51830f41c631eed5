"""Draws val_loss of some runs beside each other: against the tokens of training, and against seconds.

    python experiments/beside.py records/mla-moe-tiny records/gpt2-tiny assets/mla_moe.svg

A run is named by its folder. Seconds compare only runs that were made on the same machine, at the same time.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from report.pictures import HELD_OUT, INK, LOSS, LR, PAPER, draw_line, frame, picture  # noqa: E402
from report.run import Run, read_run  # noqa: E402

LEFT = (0.09, 0.12, 0.40, 0.83)
RIGHT = (0.56, 0.12, 0.40, 0.83)


def points(run: Run, over: str) -> tuple[list[float], list[float]]:
    rows = run.with_figure("val_loss")
    return [row[over] for row in rows], [row["val_loss"] for row in rows]


def draw(figure, runs: Sequence[Run]) -> None:
    for place, over, label in ((LEFT, "tokens", "tokens, thousands"), (RIGHT, "elapsed_s", "seconds")):
        axes = figure.add_axes(place, facecolor=PAPER)
        for run, colour in zip(runs, (LOSS, HELD_OUT, LR), strict=False):
            x, y = points(run, over)
            if over == "tokens":
                x = [tokens / 1000 for tokens in x]
            draw_line(axes, x, y, colour)
            axes.plot([], [], color=colour, linewidth=3, label=run.folder)
        axes.set_xlim(left=0)
        axes.set_xlabel(label, color=INK)
        frame(axes)
    figure.axes[0].set_ylabel("val_loss, nats per character", color=INK)
    figure.axes[0].legend(loc="upper right", frameon=False, labelcolor=INK)


def describe(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        last = run.with_figure("val_loss")[-1]
        parts.append(f"{run.folder} {last['val_loss']:.4g} after {last['tokens']:,.0f} tokens")
    return "val_loss of runs beside each other: " + ", ".join(parts)


def main(argv: Sequence[str]) -> int:
    if len(argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    *folders, target = argv
    runs = [read_run(Path(folder), Path(folder).name)[0] for folder in folders]
    Path(target).write_bytes(picture(lambda figure: draw(figure, runs), describe(runs)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
