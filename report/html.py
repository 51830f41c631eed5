"""A run's report: one HTML file with no script in it, which asks no network for anything."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from string import Template

from markdown_it import MarkdownIt

from report import blocks, pictures
from report.markdown import duration, harmless
from report.published import done_so_far
from report.run import Run, Sample, thin

PAGE = Path(__file__).with_name("page.html")
GENERATOR = b'<meta name="generator" content="update_readme.py --html">'  # of page.html
MOST_SAMPLES = 5  # side by side
PROMPT = re.compile(r"^PROMPT:\n(.*?)^OUTPUT:\n?(.*?)(?=^PROMPT:\n|\Z)", re.M | re.S)


def report(run: Run) -> str:
    """The whole page."""
    parts = {
        "title": text(f"Training of {run.folder}"),
        "ended": markdown(f"Ended: {blocks.how_it_ended(run)}"),
        "tiles": tiles(run),
        "curve": section("The curve", curve(run)),
        "samples": section("How its text grew", samples(run)),
        "figures": section("Figures", markdown(blocks.metrics(run)) + markdown(blocks.summary(run))),
        "model": section("The model", markdown(blocks.model(run))),
        "repeat": section("How to repeat it", markdown(blocks.reproduce(run))),
        "log": section("The log", log(run)),
    }
    return Template(PAGE.read_text(encoding="utf-8")).substitute(parts)


def is_report(data: bytes) -> bool:
    """Was a file written by this program?"""
    return GENERATOR in data[:2000]


def text(words: str) -> str:
    """A run's words as HTML. Control characters become visible."""
    return escape(harmless(words))


def markdown(block: str) -> str:
    """A block as HTML. What looks like HTML in it stays text."""
    return MarkdownIt("commonmark", {"html": False}).enable("table").render(block)


def section(title: str, content: str) -> str:
    """ "" where there is nothing to show."""
    if not content:
        return ""
    return f"<section>\n<h2>{title}</h2>\n{content}</section>"


# ---- The figures at the top ----


def tiles(run: Run) -> str:
    shown = []
    for value, label in headline(run):
        shown.append(f"<li><b>{value}</b> {label}</li>")
    return "\n".join(shown)


def headline(run: Run) -> list[tuple[str, str]]:
    """(figure, what it is) of what tells most: the loss, what it took, and the size of the model."""
    found = []
    final = run.number("final_loss")
    measure = run.measure()
    best = run.best(measure)
    if final is not None:
        found.append((f"{final:.4f}", f"final_loss, over {run.proven_over()}"))
    elif best:
        found.append((f"{best[measure]:.4f}", f"lowest {measure}"))
    held_out = run.best("val_loss")
    if held_out:
        found.append((f"{held_out['val_loss']:.4f}", "lowest val_loss, on held-out text"))
    steps, tokens = done_so_far(run)
    counts = {"steps": steps, "tokens of training": tokens, "parameters": run.number("parameters")}
    for label, count in counts.items():
        if count:
            found.append((f"{count:,.0f}", label))
    seconds = run.number("seconds")
    if seconds:
        found.append((duration(seconds), "in all"))
    return found


# ---- The curve ----


def curve(run: Run) -> str:
    """The picture, and what it shows in words."""
    if not run.rows:
        return ""
    svg = pictures.curve(run).decode()
    svg = svg[svg.find("<svg") :]  # without the lines that an SVG in a file begins with
    words = text(pictures.describe(run))
    return f'<figure><div class="scroll" tabindex="0">{svg}</div><figcaption>{words}.</figcaption></figure>'


# ---- Samples over time ----


def samples(run: Run) -> str:
    """A row for each prompt: what followed it at a few steps, evenly spaced, the first and the last among them."""
    with_text = [sample for sample in run.samples if sample[1].strip()]
    shown = [with_text[i] for i in thin(len(with_text), MOST_SAMPLES)]
    rows = []
    for prompt in prompts_of(shown):
        if prompt:
            rows.append(f'<p class="prompt">After the prompt <q>{text(prompt)}</q></p>')
        cards = [card(run, step, outputs(block)[prompt]) for step, block in shown if prompt in outputs(block)]
        rows.append(f'<div class="cards" tabindex="0">\n{"".join(cards)}</div>')
    return "\n".join(rows)


def outputs(block: str) -> dict[str, str]:
    """{prompt: what the model wrote after it} of a block. One of another program is an output without a prompt."""
    found = {prompt.strip(): output.strip("\n") for prompt, output in PROMPT.findall(block)}
    return found or {"": block}


def prompts_of(shown: list[Sample]) -> list[str]:
    """Each once, in the order of the blocks."""
    found: dict[str, None] = {}
    for _, block in shown:
        found.update(dict.fromkeys(outputs(block)))
    return list(found)


def card(run: Run, step: int | None, output: str) -> str:
    """A sample, and what the loss was when it was written."""
    head = "" if step is None else f"<b>step {step:,}</b>"
    for row in run.with_figure(run.measure()):
        if row["step"] == step:
            head += f" {run.measure()} {row[run.measure()]:.3f}"
    return f"<article><h3>{head}</h3><pre>\n{text(output)}</pre></article>\n"


# ---- The log ----


def log(run: Run) -> str:
    if not run.log.count:
        return ""
    return f"<details><summary>Its opening, some steps, its closing</summary>\n{markdown(blocks.logs(run))}</details>\n"
