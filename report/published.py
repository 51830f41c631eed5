"""Runs that are on record beside the one that is shown, and the blocks COMPARE and HELDOUT that tell of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from report.markdown import code, duration, plain, table
from report.run import Row, Run, finite, read_record, read_run, relative

ROOT = Path(__file__).resolve().parent.parent
UNKNOWN = "not on record"
OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon"}
MEAN_OF = 100  # steps; some programs stop at the mean loss of as many
COMPARE_HEADER = (
    "Run",
    "Optimizer",
    "Tokens a step",
    "Steps",
    "Tokens",
    "Tokens until one step's loss was under the target",
    f"Tokens until the mean of {MEAN_OF} steps was",
    "Judged by",
)
HELD_OUT_HEADER = (
    "Run",
    "Text",
    "Parameters",
    "Tokenizer",
    "Context",
    "Steps",
    "Time",
    "Loss on what it read",
    "On held-out text",
)


# ---- What is on record ----


def on_record(run: Run) -> dict:
    """records/earlier_runs.json, if it is about the run's text."""
    known = read_record(ROOT / "records" / "earlier_runs.json")
    if known and known["sha256"] == run.part("corpus").get("sha256"):
        return known
    return {}


def earlier_runs(run: Run) -> list[dict]:
    return on_record(run).get("runs", [])


def with_published(run: Run, blocks: Sequence[str], run_dir: Path, base: Path) -> Run:
    """The run, with the published runs that its blocks need beside it."""
    if "COMPARE" in blocks:
        run = replace(run, beside=published_runs(run, "published", run_dir, base))
    if "HELDOUT" in blocks:
        run = replace(run, held_out=published_runs(run, "held_out", run_dir, base))
    return run


def published_runs(run: Run, which: str, run_dir: Path, base: Path) -> tuple[Run, ...]:
    """The published runs on the run's text, but for this one itself."""
    found = []
    for name in on_record(run).get(which, []):
        folder = ROOT / name
        if folder.resolve() != run_dir.resolve() and (folder / "run.json").is_file():
            other, _ = read_run(folder, relative(folder, base))
            found.append(other)
    return tuple(found)


def count(value: float | None) -> str:
    """A number of tokens or steps."""
    return UNKNOWN if value is None else f"{value:,.0f}"


# ---- COMPARE ----


def compare(run: Run) -> str:
    """A table of the runs on this text: the earlier ones that are on record, then this one and the published ones."""
    rows = []
    for past in earlier_runs(run):
        rows.append(earlier_row(past))
    for one in (run, *run.beside):
        rows.append(compared_row(one))
    return table(COMPARE_HEADER, rows)


def earlier_row(past: dict) -> list[str]:
    """A row of a run of another program. What is null in the record isn't known."""
    about = "about " if past.get("tokens_are_rounded") else ""
    tokens = [past["tokens"]]
    for key in ("first_step_loss_under_target", "first_mean_of_100_under_target"):
        place = past[key] or {}
        tokens.append(place.get("tokens"))
    shown = [UNKNOWN if n is None else f"{about}{n:,}" for n in tokens]
    return [
        plain(past["name"]),
        plain(past["optimizer"] or UNKNOWN),
        count(past["tokens_per_step"]),
        count(past["steps"]),
        *shown,
        plain(past["judged_by"] or UNKNOWN),
    ]


def compared_row(run: Run) -> list[str]:
    """A row of this program's run."""
    steps, tokens = done_so_far(run)
    tokens_per_step = tokens / steps if tokens and steps else None
    return [
        code(run.folder),
        optimizer(run),
        count(tokens_per_step),
        count(steps),
        count(tokens),
        under_target(run, "first_step_loss_under_target", mean_of=1),
        under_target(run, "first_mean_of_100_under_target", mean_of=MEAN_OF),
        judged_by(run),
    ]


def done_so_far(run: Run) -> tuple[float | None, float | None]:
    """(steps, tokens). Until a run has ended, those of its record are of its start: the last row has later ones."""
    if run.text("ended"):
        return run.number("steps"), run.number("tokens")
    last: Row = run.rows[-1] if run.rows else {}
    return last.get("step"), last.get("tokens")


def optimizer(run: Run) -> str:
    """Its name, and the highest learning rates."""
    settings = run.settings()
    name = OPTIMIZERS.get(str(settings.get("optimizer")), UNKNOWN)
    lr = finite(settings.get("lr"))
    embed_lr = finite(settings.get("embed_lr"))
    if lr:
        name += f", peak {lr:.3g}"
    if embed_lr and embed_lr != lr:
        name += f", of the embeddings {embed_lr:.3g}"
    return name


def under_target(run: Run, key: str, mean_of: int) -> str:
    """The tokens until the mean loss of so many steps was under the target.

    run.json says it, of an older run the CSV may: see first_under_target."""
    target = run.target_loss()
    if not target:
        return "no target"
    if key in run.record:
        place = run.record[key]
    elif has_every_step(run.rows):
        place = first_under_target(run.rows, target, mean_of)
    else:
        return UNKNOWN
    if place is None:
        return "not reached"
    tokens = place.get("tokens") if isinstance(place, dict) else None
    return count(finite(tokens))


def has_every_step(rows: Sequence[Row]) -> bool:
    """Whether each step from the first has a row with a loss: only then is it known where the loss first was low."""
    if not rows:
        return False
    return all(row["step"] == i and "loss" in row for i, row in enumerate(rows, 1))


def first_under_target(rows: Sequence[Row], target: float, mean_of: int) -> Row | None:
    """The first row at which the mean loss of the last `mean_of` steps is under the target."""
    losses = [row["loss"] for row in rows]
    for end in range(mean_of, len(rows) + 1):
        if math.fsum(losses[end - mean_of : end]) / mean_of < target:
            return rows[end - 1]
    return None


def judged_by(run: Run) -> str:
    """The loss at the end and what it is the mean over; or why there is none."""
    ended = run.text("ended")
    final = run.number("final_loss")
    target = run.target_loss()
    judged = []
    if final is not None:
        judged.append(f"**{final:.4f}**, final_loss over {run.proven_over()}")
    full_passes = run.with_figure("avg_loss")
    if full_passes:
        judged.append(f"{full_passes[-1]['avg_loss']:.4f}, avg_loss of {run.averaged_over()}")
    if "ended" in run.record and not ended:
        judged.append("not ended yet")
    elif ended and final is None:
        judged.append(f"not proven, since the run ended before: {plain(ended)}")
    elif target and final is not None and final >= target:
        judged.append("the target wasn't reached")
    return "; ".join(judged)


# ---- HELDOUT ----


def held_out(run: Run) -> str:
    """A table of what is made of held-out text: by the earlier runs on record, the published ones, and this one."""
    rows = []
    for past in on_record(run).get("held_out_runs", []):
        rows.append(earlier_held_out_row(past))
    for one in runs_with_held_out(run):
        rows.append(held_out_row(one))
    if not rows:
        return "No run with held-out text is on record."
    return table(HELD_OUT_HEADER, rows)


def runs_with_held_out(run: Run) -> list[Run]:
    return [one for one in (*run.held_out, run) if one.best("val_loss")]


def earlier_held_out_row(past: dict) -> list[str]:
    return [
        plain(past["name"]),
        code("data/input.txt"),
        f"{past['parameters']:,} ({past['megabytes']:.2f} MB)",
        plain(past["tokenizer"]),
        f"{past['context']:,}",
        f"{past['steps']:,} of {past['tokens_per_step']:,} tokens",
        UNKNOWN,
        f"{past['train']:.4f}",
        f"{past['val']:.4f}",
    ]


def held_out_row(run: Run) -> list[str]:
    """A row of this program's run."""
    settings = run.settings()
    seconds = run.number("seconds")
    final = run.number("final_loss")
    context = finite(settings.get("seq_len"))
    return [
        code(run.folder),
        code(str(run.part("corpus").get("file", UNKNOWN))),
        parameters(run),
        plain(str(settings.get("tokenizer") or UNKNOWN)),
        count(context),
        steps_of_tokens(run),
        duration(seconds) if seconds else UNKNOWN,
        UNKNOWN if final is None else f"{final:.4f}",
        best_val_loss(run),
    ]


def parameters(run: Run) -> str:
    """How many, and their size in fp32, which has 4 bytes each."""
    number = run.number("parameters")
    if not number:
        return UNKNOWN
    return f"{number:,.0f} ({4 * number / 1e6:.2f} MB)"


def steps_of_tokens(run: Run) -> str:
    steps = run.number("steps")
    tokens = run.number("tokens")
    if not steps or not tokens:
        return UNKNOWN
    return f"{steps:,.0f} of {tokens / steps:,.0f} tokens"


def best_val_loss(run: Run) -> str:
    """The lowest, and where that isn't the last one also that."""
    best = run.best("val_loss")
    last = run.with_figure("val_loss")[-1]
    text = f"**{best['val_loss']:.4f}**"
    if last is not best:
        text += f" at step {best['step']:,}, {last['val_loss']:.4f} at the end"
    return text


def largest_held_out(run: Run) -> Run | None:
    """The run with held-out text that has most parameters: its curve tells most."""
    return max(runs_with_held_out(run), key=lambda one: one.number("parameters") or 0, default=None)
