"""The pictures, as SVG: the curve of a run, and the comparison of runs on the same text."""

from __future__ import annotations

import io
import logging
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from report.published import earlier_runs
from report.run import ReadmeError, Row, Run, thin, under_or_not

# Colours by their role.
INK = "#24292f"
FAINT = "#d0d7de"
PAPER = "#ffffff"
STEP_LOSS = "#9ec5f5"
LOSS = "#0550ae"
HELD_OUT = "#8250df"
LR = "#116329"
TARGET = "#bc4c00"
# What takes a colour's place where the reader prefers a dark page.
DARK = {
    INK: "#e6edf3",
    FAINT: "#3d444d",
    PAPER: "#0d1117",
    STEP_LOSS: "#2f5d94",
    LOSS: "#79c0ff",
    HELD_OUT: "#d2a8ff",
    LR: "#7ee787",
    TARGET: "#ffa657",
}
CURVE_POINTS = 1000  # of a line
DOTTED_BELOW = 50  # a line of fewer points has a dot at each
TINY = 1e-30  # a lower loss has no place on a log scale
MARK_IN_THE_MIDDLE = (1, 2)  # markevery of a line in the key, which has two points and so would show two marks

Key = list[tuple[str, dict]]  # (what a line is, how it looks)


# ---- The two pictures ----


def curve(run: Run) -> bytes:
    """The losses (log scale), the learning rate and, of experts, their load against the step."""

    def draw(figure) -> None:
        has_experts = bool(series(run, "busiest")[0])
        # At fixed places, since measured text would move them.
        upper_place = (0.11, 0.53, 0.75, 0.40) if has_experts else (0.11, 0.36, 0.75, 0.57)
        upper = figure.add_axes(upper_place, facecolor=PAPER)
        draw_losses(upper, run)
        if has_experts:
            upper.tick_params(labelbottom=False)
            middle = figure.add_axes((0.11, 0.34, 0.75, 0.15), facecolor=PAPER, sharex=upper)
            draw_load(middle, run)
        steps, _ = series(run, "lr")
        if steps:
            figure.axes[-1].tick_params(labelbottom=False)
            lower = figure.add_axes((0.11, 0.10, 0.75, 0.20), facecolor=PAPER, sharex=upper)
            draw_lr(lower, run)
        figure.axes[-1].set_xlabel("step", color=INK)

    return picture(draw, describe(run))


def comparison(run: Run) -> bytes:
    """avg_loss (log scale) against tokens: this run, the published ones, and the points of earlier ones."""

    def draw(figure) -> None:
        axes = figure.add_axes((0.11, 0.12, 0.75, 0.81), facecolor=PAPER)
        axes.set_yscale("log")
        key = draw_earlier(axes, run) + draw_own(axes, run)
        finish_losses(axes, run, key, letter=0.013)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1e6:g}")
        axes.set_xlabel("tokens, millions", color=INK)

    return picture(draw, describe_comparison(run))


def picture(draw: Callable, title: str) -> bytes:
    """The SVG of a figure that `draw` fills; the same rows give the same bytes.

    It brings its own background, so that it is legible on any page, and turns dark where the reader prefers that."""
    os.environ["MPLBACKEND"] = "svg"  # a notebook leaves the name of one that isn't there
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # in a read-only home it tells at length where its cache is
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as e:
        why = str(e).strip().splitlines()[-1]
        raise ReadmeError(f"CURVE and COMPARE need matplotlib ({why}): pip install -r requirements.txt") from None
    # Text stays text and ids depend on nothing but the drawing, so that no font and no clock gets into the file.
    style = {"svg.fonttype": "none", "svg.hashsalt": "curve", "font.family": "sans-serif", "font.size": 10}
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **style}):
        figure = Figure(figsize=(8, 5), facecolor=PAPER)
        FigureCanvasSVG(figure)
        draw(figure)
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Title": title})
    return with_dark_colours(out.getvalue().decode()).encode()


def with_dark_colours(svg: str) -> str:
    rules = []
    for light, dark in DARK.items():
        for what in ("fill", "stroke"):
            rules.append(f'[style*="{what}: {light}"]{{{what}:{dark}!important}}')
    style = f"<style>@media (prefers-color-scheme: dark){{{''.join(rules)}}}</style>"
    svg = re.sub(r"(<svg [^>]*>)", lambda m: f"{m[1]}\n {style}", svg, count=1)
    return re.sub(r"[ \t]+$", "", svg, flags=re.M)


# ---- The pictures in words ----


def describe(run: Run) -> str:
    """The curve: the result first."""
    key = run.measure()
    best = run.best(key)
    if not best:
        return f"Training of {run.folder}: no finite loss was logged"
    first = run.with_figure(key)[0]
    if best is first:
        text = f"{key} of {run.folder} was lowest at step {best['step']}, {best[key]:.4g}"
    else:
        text = f"{key} of {run.folder} fell from {first[key]:.4g} to {best[key]:.4g} at step {best['step']}"
    target = run.target_loss()
    if target and key == "avg_loss":
        text += f", {under_or_not(best[key], target)} the target of {target:g}"
    text += describe_held_out(run) + describe_load(run)
    final = run.number("final_loss")
    if final is not None:
        text += f"; final_loss over {run.proven_over()} is {final:.4g}"
    return text


def describe_held_out(run: Run) -> str:
    rows = run.with_figure("val_loss")
    lowest = run.best("val_loss")
    if not lowest:
        return ""
    text = f"; val_loss was lowest at step {lowest['step']}, {lowest['val_loss']:.4g}"
    if rows[-1] is not lowest:
        text += f", and {rows[-1]['val_loss']:.4g} at the end"
    return text


def describe_load(run: Run) -> str:
    rows = run.with_figure("busiest")
    if not rows:
        return ""
    return f"; at the end the busiest expert had {rows[-1]['busiest']:.2g} of its layer's load"


def describe_comparison(run: Run) -> str:
    """Only of what is drawn: the table has the other earlier runs."""
    needed = run.number("tokens_to_target")
    parts = [f"{run.folder} against tokens"]
    if needed:
        parts = [f"{run.folder} met its target after {needed:,.0f} tokens"]
    for past in earlier_runs(run):
        if past["points"]:
            parts.append(f"{past['name']} after {past['tokens']:,}")
    return "; ".join(parts)


# ---- Lines ----


def series(run: Run, key: str, over: str = "step") -> tuple[list[float], list[float]]:
    """(steps, values) of a column, as many as can be told apart in the picture; avg_loss from the first full pass on.

    Before that it is no mean over what the key says."""
    least = 0 if key == "lr" else TINY
    rows = run.with_figure(key)
    steps = []
    values = []
    for i in thin(len(rows), CURVE_POINTS):
        x = rows[i].get(over, math.nan)
        y = rows[i][key]
        if math.isfinite(x) and least <= y < 1 / TINY:
            steps.append(x)
            values.append(y)
    return steps, values


def draw_losses(axes, run: Run) -> None:
    measure = run.measure()
    lines = [("avg_loss", f"avg_loss ({run.averaged_over()})", LOSS), ("val_loss", "val_loss (held out)", HELD_OUT)]
    if measure == "loss":
        lines.insert(0, ("loss", "loss", LOSS))
    else:
        lines.insert(0, ("loss", "loss (one step)", STEP_LOSS))
    axes.set_yscale("log")
    key: Key = []
    for name, label, colour in lines:
        steps, values = series(run, name)
        if steps:
            key.append((label, draw_line(axes, steps, values, colour)))
    best = run.best(measure)
    if best and best[measure] >= TINY:
        key.append(draw_best(axes, best, measure))
    finish_losses(axes, run, key)


def draw_line(axes, x: Sequence[float], y: Sequence[float], colour: str) -> dict:
    """Draws a line and returns how it looks in the key."""
    axes.plot(x, y, color=colour, linewidth=1.6, marker="." if len(x) < DOTTED_BELOW else "")
    return {"color": colour, "linewidth": 3}


def draw_best(axes, best: Row, measure: str) -> tuple[str, dict]:
    """A ring around the best loss."""
    ring = {"color": LOSS, "linewidth": 0, "marker": "o", "markersize": 8, "markerfacecolor": PAPER}
    axes.plot([best["step"]], [best[measure]], **ring)
    label = f"best: {best[measure]:.4g} at step {best['step']}"
    return label, {**ring, "markevery": MARK_IN_THE_MIDDLE}


def draw_earlier(axes, run: Run) -> Key:
    """The earlier runs of which points are on record."""
    look = {"color": INK, "linewidth": 1.0, "linestyle": ":", "marker": "o", "markersize": 5}
    key: Key = []
    for past in earlier_runs(run):
        if past["points"]:
            tokens = [point[0] for point in past["points"]]
            values = [point[1] for point in past["points"]]
            axes.plot(tokens, values, **look)
            key.append((past["name"], {**look, "markevery": MARK_IN_THE_MIDDLE}))
    return key


def draw_own(axes, run: Run) -> Key:
    """This run and the published ones, as many as there are colours for."""
    key: Key = []
    for one, colour in zip((run, *run.beside), (LOSS, HELD_OUT, LR), strict=False):
        tokens, values = series(one, one.measure(), "tokens")
        if tokens:
            key.append((Path(one.folder).name, draw_line(axes, tokens, values, colour)))
    return key


def draw_lr(axes, run: Run) -> None:
    steps, values = series(run, "lr")
    peak = max(values) or 1.0
    draw_line(axes, steps, values, LR)
    axes.set_ylim(0, 1.15 * peak)
    peak_label = f"{peak:.1e}".replace("e-0", "e-").replace(".0e", "e")
    axes.set_yticks([0, peak], ["0", peak_label])
    axes.set_ylabel("lr", color=INK)
    frame(axes)


def draw_load(axes, run: Run) -> None:
    """How evenly experts share the work: their entropy is 1 where they all do the same."""
    for name, label, colour in (("load_entropy", "entropy", LOSS), ("busiest", "busiest", HELD_OUT)):
        steps, values = series(run, name)
        if steps:
            draw_line(axes, steps, values, colour)
            beside_the_axes = {"va": "center", "xycoords": ("axes fraction", "data")}
            axes.annotate(label, (1.01, values[-1]), color=colour, **beside_the_axes)
    axes.set_ylim(0, 1.08)
    axes.set_yticks([0, 1], ["0", "1"])
    axes.set_ylabel("experts", color=INK)
    frame(axes)


# ---- What stands around the lines ----


def finish_losses(axes, run: Run, key: Key, letter: float = 0.0105) -> None:
    """The target, the numbers of the axis, and what each line is."""
    target = run.target_loss()
    if target >= TINY:
        axes.axhline(target, color=TARGET, linewidth=1.2, linestyle="--")
        beside_the_axes = {"va": "center", "xycoords": ("axes fraction", "data")}
        axes.annotate(f"target {target:.3g}", (1.01, target), color=TARGET, **beside_the_axes)
    low, high = axes.set_ylim(axes.get_ylim())  # set, so that no later line moves them
    numbers = round_numbers(low, high)
    axes.set_yticks(numbers, [f"{number:g}" for number in numbers])
    axes.set_ylabel("loss, nats per token", color=INK)
    draw_key(axes, key, letter)
    frame(axes)


def round_numbers(low: float, high: float) -> list[float]:
    """Some three to nine round numbers between two, for a log scale.

    Powers of ten, or with 2 and 5 times them, or, of a narrow range, evenly spaced ones."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5)):
        numbers = [factor * 10.0**decade for decade in decades for factor in factors]
        found = [number for number in numbers if low <= number <= high]
        if len(found) > 2:
            return at_most_nine(found)
    unit = 10.0 ** math.floor(math.log10((high - low) / 2))
    multiples = range(math.ceil(low / unit), math.floor(high / unit) + 1)
    return [float(f"{unit * i:.12g}") for i in at_most_nine(multiples)]


def at_most_nine(numbers: Sequence) -> Sequence:
    return numbers[:: math.ceil(len(numbers) / 9)]


def draw_key(axes, key: Key, letter: float) -> None:
    """What each line is, in a row above the axes. `letter` is about the width of one.

    matplotlib's legend would be placed by measured text, so that it would depend on the machine's fonts."""
    x = 0.0
    for label, look in key:
        axes.plot([x, x + 0.03], [1.05, 1.05], transform=axes.transAxes, clip_on=False, **look)
        axes.text(x + 0.045, 1.05, label, color=INK, va="center", transform=axes.transAxes, parse_math=False)
        x += 0.066 + letter * len(label)


def frame(axes) -> None:
    """Faint lines at the major ticks, and no box."""
    axes.grid(True, which="major", color=FAINT, linewidth=0.6)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.set_label_coords(-0.1, 0.5)
    axes.tick_params(which="both", color=FAINT, labelcolor=INK)
    axes.tick_params(which="minor", left=False, labelleft=False)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)
