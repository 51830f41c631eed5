"""Write a run's results into the README, between <!--AUTO:NAME:START--> and <!--AUTO:NAME:END-->.

    python update_readme.py                             # from out/, into README.md and assets/
    python update_readme.py --run_dir out/demo --check  # is the README up to date? 0 yes, 5 no; writes nothing
    python update_readme.py --run_dir out/demo --diff   # what would change; writes nothing

Blocks: SUMMARY, CURVE, METRICS, SAMPLES, LOGS and REPRODUCE come from the run directory, FLAGS from the source of
train.py. A block that the README lacks is left alone. What a block says comes from the run, never from the clock, so
the same run directory gives the same bytes. Reads, where they exist, and copes with what is missing or half written:

    RUN/run.json                 how the run was made and how it ended
    RUN/logs/train_metrics.csv   a row each logged step, with at least the columns step and loss
    RUN/logs/train.log           stands in for the CSV where there is none
    RUN/samples/samples.txt      blocks of a rule of `=`, `STEP n`, and per prompt `PROMPT:` and `OUTPUT:`

Exit codes: 0 written or already current, 1 broken markers or run (file:line), 2 unusable flags, 5 stale under --check.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import io
import json
import math
import os
import re
import shlex
import shutil
import sys
import unicodedata
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from markdown_it import MarkdownIt

HERE = Path(__file__).resolve().parent
NAMES = ("SUMMARY", "CURVE", "METRICS", "SAMPLES", "LOGS", "REPRODUCE", "FLAGS")

METRICS_ROWS = 12  # rows of the table, evenly spaced
LOG_EDGE, LOG_MIDDLE = 20, 12  # lines of the log at either end, at most, and steps between
SAMPLE_LINES = 200
CURVE_POINTS = 1000


class ReadmeError(Exception):
    """Broken markers, or a run that can't be read: exit code 1. Each problem is one sentence, with file and line."""


# ======================================================================================================================
# Reading a run
# ======================================================================================================================

# What other programs call the columns of their CSV.
ALIASES = {"global_step": "step", "iter": "step", "iteration": "step", "train_loss": "loss", "learning_rate": "lr"}
FORMATS = {
    "step": ".0f",
    "epoch": ".2f",
    "tokens": ",.0f",
    "loss": ".6f",
    "avg_loss": ".6f",
    "val_loss": ".6f",
    "lr": ".2e",
    "grad_norm": ".3f",
    "tok_per_s": ",.1f",
    "elapsed_s": ",.1f",
}
LOG_STEP = re.compile(
    r"\b(?:step|iter)[ :=]{1,3}(?P<step>\d+)(?:/(?P<steps>\d+))?\b"
    r".*?\bloss[ :=]+(?P<loss>[-+.\w]+)"
    r"(?:.*?\blr[ :=]+(?P<lr>[-+.\w]+))?(?:.*?\btok/s[ :=]+(?P<tok_per_s>[.\d]+))?"
    r"(?:.*?\bavg_loss[ :=]+(?P<avg_loss>[-+.\w]+))?"
)
LOG_LINE = re.compile(r"(?P<time>\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)[,.\d]* *\| *\w+ *\| *(?P<message>.*)")
SAMPLE_HEAD = re.compile(r"^={20,}[ \t]*\n+STEP[ \t:]+(\d+)[^\n]*\n", re.M)


@dataclass(frozen=True)
class Run:
    """A run directory, as far as it could be read."""

    folder: str  # as the README names it
    record: dict  # run.json; {} where there is none
    rows: list[dict[str, float]]  # the logged steps, each once, in order; keys are those of FORMATS
    log: list[str]
    sample: tuple[int | None, str]  # (step, text) of the latest; (None, "") where there is none
    notes: list[str]  # what was passed over, for the terminal

    def number(self, key: str) -> float | None:
        """A finite number of run.json."""
        value = self.record.get(key)
        return (
            value if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) else None
        )

    def text(self, key: str) -> str | None:
        value = self.record.get(key)
        return value if isinstance(value, str) and value else None

    def best(self, key: str) -> dict[str, float] | None:
        """The first row with the lowest `key`."""
        rows = [row for row in self.rows if math.isfinite(row.get(key, math.nan))]
        return min(rows, key=lambda row: row[key], default=None)

    def settings(self) -> dict:
        """The configuration, from run.json or else from the log's line `Args: {...}`."""
        if isinstance(config := self.record.get("config"), dict):
            return config
        for line in self.log:
            if found := re.search(r"\bArgs: (\{.*\})", line):
                for read in (json.loads, ast.literal_eval):  # train.py writes JSON, others a Python dict
                    with contextlib.suppress(ValueError, SyntaxError):
                        return read(found[1])
        return {}

    def target_loss(self) -> float | None:
        value = self.record.get("target_loss", self.settings().get("target_loss"))
        return value if isinstance(value, (int, float)) and value > 0 else None

    def closing(self) -> list[tuple[str, str]]:
        """(time, message) of what follows the log's last step, or else of its last line."""
        found = [(m["time"].replace("T", " "), m["message"]) for m in map(LOG_LINE.match, self.log) if m]
        after = max((i + 1 for i, (_, message) in enumerate(found) if LOG_STEP.search(message)), default=len(found))
        return found[after:] or found[-1:]


def read_run(folder: Path, name: str) -> Run:
    """Raises ReadmeError where there is no run, or one that can't be read."""
    record_file, log_file = folder / "run.json", find(folder, "logs/train.log", "*.log")
    csv_file, sample_file = (
        find(folder, "logs/train_metrics.csv", "*.csv"),
        find(folder, "samples/samples.txt", "sample*"),
    )
    if not any(path and path.is_file() for path in (record_file, log_file, csv_file, sample_file)):
        below = sorted(p.parent for p in folder.glob("*/run.json"))
        hint = (
            f"there is one in {below[0]}: use --run_dir {below[0]}"
            if below
            else "train first, or name another --run_dir"
        )
        raise ReadmeError(f"{folder} holds no run: {hint}")
    notes: list[str] = []
    log = read_log(log_file) if log_file else []
    rows = read_metrics(csv_file, notes) if csv_file else []
    if not rows:
        rows = in_order(steps_of_log(log))
        if rows:
            notes.append(f"{folder} has no CSV with steps: the log serves")
    sample = read_sample(sample_file) if sample_file else (None, "")
    return Run(name, read_record(record_file), rows, log, sample, notes)


def find(folder: Path, usual: str, pattern: str) -> Path | None:
    """The file at its usual place, or else the only one of that pattern in the folder or one below."""
    if (folder / usual).is_file():
        return folder / usual
    others = [p for p in sorted({*folder.glob(pattern), *folder.glob(f"*/{pattern}")}) if p.is_file()]
    return others[0] if len(others) == 1 else None


def read_text(path: Path) -> str:
    """A text file of any newline style, in UTF-8, or in UTF-16 as PowerShell writes it; the newlines become \\n."""
    data = path.read_bytes()
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    return re.sub(r"\r*\n", "\n", data.decode(encoding, "replace"))


def read_record(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        record = json.loads(read_text(path))
    except json.JSONDecodeError as e:
        raise ReadmeError(
            f"{path}:{e.lineno}: this isn't JSON ({e.msg}): mend it, or remove it to go by the log"
        ) from None
    if not isinstance(record, dict):
        raise ReadmeError(f"{path}:1: this isn't a JSON object: mend it, or remove it to go by the log")
    return record


def read_log(path: Path) -> list[str]:
    """The log's lines. A last line that is still being written is left out."""
    lines = read_text(path).split("\n")
    torn = lines.pop()  # "" behind a last newline
    whole = LOG_LINE.match(torn) and (not (step := LOG_STEP.search(torn)) or step["tok_per_s"])
    return [*lines, torn] if whole else lines


def steps_of_log(log: Sequence[str]) -> Iterator[dict[str, float]]:
    for line in log:
        if found := LOG_STEP.search(line):
            with contextlib.suppress(ValueError):
                row = {key: float(value) for key, value in found.groupdict().items() if value and key != "steps"}
                yield {**row, "step": int(found["step"])}


def read_metrics(path: Path, notes: list[str]) -> list[dict[str, float]]:
    """The CSV's rows. One that is torn, or isn't of numbers, is left out and noted."""
    text = read_text(path)
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        return []
    header = [ALIASES.get(name, name) for name in re.split(r"\s*,\s*", lines[0][1].strip().lower().replace('"', ""))]
    if not {"step", "loss"} <= set(header):
        notes.append(f"{path}:1: the columns step and loss aren't there")
        return []
    rows = []
    torn = (
        lines[-1][0] if not text.endswith("\n") else 0
    )  # a row that is still being written: its last figure may be cut
    for i, line in lines[1:]:
        cells = [cell.strip().strip('"') for cell in line.split(",")]
        if i == torn:
            cells[-1] = ""
        try:
            row = {k: float(v) for k, v in zip(header, cells, strict=True) if k in FORMATS and v}
            rows.append(row | {"step": int(row["step"]), "loss": row["loss"]})
        except (ValueError, KeyError, OverflowError):
            why = "it is still being written" if i == torn else f"it isn't of {len(header)} figures"
            notes.append(f"{path}:{i}: row left out, since {why}")
    return in_order(rows)


def in_order(rows: Iterator[dict[str, float]] | Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """Each step once: a run that was resumed from an earlier step made those after it again."""
    kept: list[dict[str, float]] = []
    for row in rows:
        while kept and kept[-1]["step"] >= row["step"]:
            kept.pop()
        kept.append(row)
    return kept


def read_sample(path: Path) -> tuple[int | None, str]:
    """(step, text) of the latest block that has any output; a file without such blocks is taken whole."""
    parts = SAMPLE_HEAD.split(read_text(path))  # text before the first block, then step, text, step, text ...
    blocks = [(int(step), text.strip("\n")) for step, text in zip(parts[1::2], parts[2::2], strict=True)]
    whole = [b for b in blocks if re.search(r"^OUTPUT:\s*\S", b[1], re.M)] or [b for b in blocks if b[1].strip()]
    return whole[-1] if whole else (None, "" if blocks else parts[0].strip("\n"))


# ======================================================================================================================
# Markdown that can't be broken out of
# ======================================================================================================================


def harmless(text: str) -> str:
    """Text for a code fence: control characters become visible, and no line can pass for a marker."""

    def visible(c: str) -> str:
        control = (
            unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")
            or c in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
        )
        return c.encode("unicode_escape").decode() if control and c not in "\n\t" else c

    return re.sub("<!--(?=AUTO:)", "<!-- ", "".join(map(visible, text)), flags=re.I)


def fence(text: str, language: str = "text") -> str:
    """A code fence longer than any run of backticks inside."""
    text = harmless(text)
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text}\n{ticks}"


def code(text: str) -> str:
    """A code span, on one line."""
    text = re.sub(r"\s*\n\s*", " ", harmless(text).replace("\t", " ")).strip() or "?"
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if "`" in (text[0], text[-1]) else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def plain(text: str) -> str:
    """Text outside code, on one line, of which nothing is markup."""
    return re.sub(r"[\\`*\[\]<>|~$&]|(?<!\w)_|_(?!\w)", r"\\\g<0>", " ".join(harmless(text).split()))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str = "---") -> str:
    """A table of cells that are Markdown already; `|` is escaped, which holds even inside a code span."""
    cells = [[re.sub(r"(?<!\\)\|", r"\\|", " ".join(cell.split())) for cell in row] for row in [header, *rows]]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + f" {align} |" * len(header), *lines[1:]])


def thin(n: int, most: int) -> list[int]:
    """At most `most` of the indices 0 .. n-1, evenly spaced, the first and the last among them."""
    return sorted({round(i * (n - 1) / (most - 1)) for i in range(most)}) if n > most else list(range(n))


def figure(row: dict[str, float], key: str) -> str:
    """A row's figure as the tables show it, empty where it has none."""
    return format(row[key], FORMATS[key]) if key in row else ""


def duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {left:02d} s" if minutes else f"{left} s"


def moment(text: str) -> str:
    try:
        at = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return plain(text)
    return f"{at:%Y-%m-%d %H:%M:%S}" + (f" {at:%Z}" if at.tzinfo else "")


# ======================================================================================================================
# The blocks
# ======================================================================================================================


def summary(run: Run) -> str:
    """When, how it ended, the losses, the target, and what is not on record."""
    closing = run.closing()
    when = run.text("end") or (closing[-1][0] if closing else run.text("start"))
    lines = [f"Updated: **{moment(when)}** (the run's own time)"] if when else []
    lines += [f"Run directory: {code(run.folder)}", f"Ended: {how_it_ended(run)}", *losses(run), *target(run)]
    lines.append(f"Logged rows: **{len(run.rows)}**" + ("" if run.rows else ", no step has been logged yet"))
    return "\n".join(f"- {line}" for line in lines)


def losses(run: Run) -> Iterator[str]:
    best, best_avg = run.best("loss"), run.best("avg_loss")
    if best:
        yield f"Best loss: **{figure(best, 'loss')}** at step **{best['step']}**" + (" (one step)" if best_avg else "")
    if best_avg:
        yield f"Best avg_loss: **{figure(best_avg, 'avg_loss')}** at step **{best_avg['step']}** (a full pass)"
    if best_val := run.best("val_loss"):
        yield f"Best val_loss: **{figure(best_val, 'val_loss')}** at step **{best_val['step']}**"
    if run.rows:
        yield f"Last logged loss: **{figure(run.rows[-1], 'loss')}** at step **{run.rows[-1]['step']}**"


def target(run: Run) -> Iterator[str]:
    """Was the target met, and at what cost? Only the proof over the whole text, final_loss, can tell."""
    goal, final = run.target_loss(), run.number("final_loss")
    name = f"the target of {goal:g}" if goal else "a target"
    if final is not None:
        verdict = f", {'under' if final < goal else 'not under'} {name}" if goal else ""
        yield f"final_loss, over the whole text: **{final:.6f}**{verdict}"
    elif run.record:
        yield f"final_loss: none; {name} has not been reached"
    else:
        yield f"Not on record: final_loss, and so whether {name} was met; tokens and time to it"
    tokens, seconds = run.number("tokens_to_target"), run.number("seconds_to_target")
    if tokens is not None:
        yield f"To the target: **{tokens:,.0f} tokens**" + ("" if seconds is None else f" in **{duration(seconds)}**")
    elif run.number("tokens") and run.number("seconds"):
        yield f"So far: {run.number('tokens'):,.0f} tokens in {duration(run.number('seconds'))}"


def how_it_ended(run: Run) -> str:
    if ended := run.text("ended"):
        step = run.number("steps")
        return f"**{plain(ended)}**" + (f" at step {step:.0f}" if step is not None else "")
    if "ended" in run.record:
        return "not yet: still running, or stopped without a word"
    closing = [code(message) for _, message in run.closing()[-3:]]
    return "not on record" + (f"; the log closes with {', '.join(closing)}" if closing else "")


def metrics(run: Run) -> str:
    """Evenly spaced rows of the CSV, its first, last and best among them."""
    if not run.rows:
        return "No step has been logged yet."
    best = {key: row for key in ("loss", "avg_loss", "val_loss") if (row := run.best(key))}
    shown = {run.rows[i]["step"] for i in thin(len(run.rows), METRICS_ROWS)} | {row["step"] for row in best.values()}
    rows = [row for row in run.rows if row["step"] in shown]
    columns = [key for key in FORMATS if any(key in row for row in rows)]

    def cell(row: dict, key: str) -> str:
        return f"**{figure(row, key)}**" if best.get(key) is row else figure(row, key)

    cells = [[cell(row, key) for key in columns] for row in rows]
    bold = " The lowest of each loss is bold." if best else ""
    return f"{table(columns, cells, '---:')}\n\n{len(rows)} of {len(run.rows)} logged rows.{bold}"


def samples(run: Run) -> str:
    """The latest sample, whole; one that is very long is cut between two prompts, or else between two lines."""
    step, text = run.sample
    if not text.strip():
        return "No sample has been written yet."
    lines = text.split("\n")
    head = "The latest sample:" if step is None else f"What the model wrote at step {step}:"
    if len(lines) <= SAMPLE_LINES:
        return f"{head}\n\n{fence(text)}"
    prompts = [i for i in range(1, SAMPLE_LINES) if lines[i].startswith("PROMPT:")]
    cut = prompts[-1] if prompts else SAMPLE_LINES
    kept = "\n".join(lines[:cut]).rstrip("\n")
    return f"{head}\n\n{fence(kept)}\n\n{len(lines) - cut} more lines are left out."


def logs(run: Run) -> str:
    """The log's opening, steps from its middle, evenly spaced, and its closing."""
    lines = run.log
    if not any(line.strip() for line in lines):
        return "No log has been written yet."
    steps = [i for i, line in enumerate(lines) if LOG_STEP.search(line)]
    first, last = (min(steps), max(steps)) if steps else (len(lines), len(lines))
    head = min(first + 1, LOG_EDGE)
    tail = max(last, len(lines) - LOG_EDGE, head)
    between = [i for i in steps if head <= i < tail]
    middle = [between[i] for i in thin(len(between), LOG_MIDDLE)]
    left_out = tail - head - len(middle)
    if left_out <= 3:
        return fence("\n".join(lines).strip("\n"))
    note = f"[... {left_out:,} of the {tail - head:,} lines between are left out ...]"
    shown = [lines[i] for i in middle] + ["[...]"] * bool(middle)
    return fence("\n".join([*lines[:head], note, *shown, *lines[tail:]]).strip("\n"))


def reproduce(run: Run) -> str:
    """The exact command, and all that its result depends on."""
    if not run.record:
        return "There is no run.json, so only the log tells how this run was made."
    parts = []
    if command := run.text("command"):
        parts.append(fence(command, "sh"))
    resumed = run.record.get("resumed")
    resumed = [c for c in resumed if isinstance(c, str)] if isinstance(resumed, list) else []
    commit = run.text("git_commit")
    facts = {
        "Seed": run.record.get("seed"),
        "Git commit": commit and commit.removesuffix("-dirty"),
        "Device": run.text("device"),
        "Precision": run.text("precision"),
        "Processes": run.record.get("processes"),
    }
    if isinstance(versions := run.record.get("versions"), dict):
        facts["Versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [f"- {name}: {code(str(value))}" for name, value in facts.items() if value is not None]
    if commit and commit.endswith("-dirty"):
        lines.append("- Files had changed since that commit")
    if isinstance(corpus := run.record.get("corpus"), dict):
        lines.append(f"- Text: {code(str(corpus.get('file')))}, SHA-256 {code(str(corpus.get('sha256')))}")
    if resumed:
        times = "once" if len(resumed) == 1 else f"{len(resumed)} times"
        lines.append(f"- Resumed {times}, at last by {code(resumed[-1])}")
    return (
        "\n\n".join([*parts, "\n".join(lines)])
        if lines or parts
        else "run.json says nothing of how to repeat this run."
    )


def flags(source: Path) -> str:
    """The table of train.py's flags, and its presets, read from the source: importing it would import torch."""
    try:
        tree = ast.parse(source.read_text(encoding="utf-8"))
        rows = [
            row
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef) and node.name == "TrainConfig"
            for row in flag_rows(node)
        ]
        presets = next(
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "PRESETS"
        )
    except (OSError, SyntaxError, ValueError, StopIteration) as e:
        raise ReadmeError(f"{source}: the flags can't be read from it ({type(e).__name__})") from None
    lines = [table(("Flag", "Default", "What it does"), rows), ""]
    for name, settings in presets.items():
        words = [word for key, value in settings.items() for word in (f"--{key}", str(value).replace("\n", r"\n"))]
        lines.append(f"`--preset {name}` stands for {code(shlex.join(words))}.")
    return "\n".join(lines)


def flag_rows(config: ast.ClassDef) -> Iterator[tuple[str, str, str]]:
    for node in config.body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call)):
            continue
        default, text, *group = (ast.literal_eval(arg) for arg in node.value.args)
        rules = {word.arg: word.value for word in node.value.keywords}
        if group:
            yield f"**{group[0]}**", "", ""
        shown = "" if default is False or default in (None, "") else code(repr(default))
        choices = " or ".join(code(c) for c in ast.literal_eval(rules["choices"]) if c) if "choices" in rules else ""
        yield code(f"--{node.target.id}"), shown, plain(text) + (f" ({choices})" if choices else "")


# ======================================================================================================================
# The curve
# ======================================================================================================================

# Colour in the picture: its role, and what takes its place where the reader prefers a dark page.
INK, FAINT, PAPER = "#24292f", "#d0d7de", "#ffffff"
STEP, AVERAGE, HELD_OUT, RATE, TARGET = "#9ec5f5", "#0550ae", "#8250df", "#116329", "#bc4c00"
DARK = {
    INK: "#e6edf3",
    FAINT: "#3d444d",
    PAPER: "#0d1117",
    STEP: "#2f5d94",
    AVERAGE: "#79c0ff",
    HELD_OUT: "#d2a8ff",
    RATE: "#7ee787",
    TARGET: "#ffa657",
}


def curve(run: Run) -> bytes:
    """An SVG of the losses (log scale) and the learning rate against the step; the same rows give the same bytes.

    It brings its own background, so that it is legible on any page, and turns dark where the reader prefers that."""
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        raise ReadmeError("the CURVE block needs matplotlib: pip install -r requirements.txt") from None
    # Text stays text and ids depend on nothing but the drawing, so that no font and no clock gets into the file.
    style = {"svg.fonttype": "none", "svg.hashsalt": "curve", "font.family": "sans-serif", "font.size": 10}
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **style}):
        figure = Figure(figsize=(8, 5), facecolor=PAPER)
        FigureCanvasSVG(figure)
        # At fixed places, since measured text would move them.
        upper = figure.add_axes((0.09, 0.36, 0.77, 0.57), facecolor=PAPER)
        draw_losses(upper, run)
        if series(run, "lr")[0]:
            upper.tick_params(labelbottom=False)
            draw_rate(figure.add_axes((0.09, 0.10, 0.77, 0.20), facecolor=PAPER, sharex=upper), run)
        figure.axes[-1].set_xlabel("step", color=INK)
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Title": describe(run)})
    return with_dark_colours(out.getvalue().decode()).encode()


def series(run: Run, key: str) -> tuple[list[float], list[float]]:
    """(steps, values) of a column, as many as can be told apart in the picture."""
    points = [(row["step"], row[key]) for row in run.rows if 0 < row.get(key, 0) < math.inf]
    points = [points[i] for i in thin(len(points), CURVE_POINTS)]
    return [x for x, _ in points], [y for _, y in points]


def draw_losses(axes, run: Run) -> None:
    average = bool(run.best("avg_loss"))
    lines = {
        "loss": ("loss (one step)" if average else "loss", STEP if average else AVERAGE),
        "avg_loss": ("avg_loss (a full pass)", AVERAGE),
        "val_loss": ("val_loss (held out)", HELD_OUT),
    }
    key = []
    for name, (label, colour) in lines.items():
        steps, values = series(run, name)
        if steps:
            dots = {"marker": "o", "markersize": 3 if len(steps) < 50 else 0}
            axes.plot(steps, values, color=colour, linewidth=1.6, **dots)
            key.append((label, {"color": colour, "linewidth": 3}))
    name = "avg_loss" if average else "loss"
    if best := run.best(name):
        ring = {"color": AVERAGE, "linewidth": 0, "marker": "o", "markersize": 8, "markerfacecolor": PAPER}
        axes.plot([best["step"]], [best[name]], **ring)
        key.append((f"best: {best[name]:.4g} at step {best['step']}", {**ring, "markevery": (1, 2)}))
    if goal := run.target_loss():
        axes.axhline(goal, color=TARGET, linewidth=1.2, linestyle="--")
        axes.annotate(f"target {goal:g}", (1.01, goal), color=TARGET, va="center", xycoords=("axes fraction", "data"))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylabel("loss, nats per token", color=INK)
    draw_key(axes, key)
    frame(axes)


def draw_key(axes, key: Sequence[tuple[str, dict]]) -> None:
    """What each line is, in a row above the axes; matplotlib's legend would be placed by measured text."""
    x = 0.0
    for label, look in key:
        axes.plot([x, x + 0.03], [1.05, 1.05], transform=axes.transAxes, clip_on=False, **look)
        axes.text(x + 0.045, 1.05, label, color=INK, va="center", transform=axes.transAxes)
        x += 0.07 + 0.0125 * len(label)  # about the width of a letter


def draw_rate(axes, run: Run) -> None:
    steps, values = series(run, "lr")
    peak = max(values)
    axes.plot(steps, values, color=RATE, linewidth=1.6)
    axes.set_ylim(0, 1.15 * peak)
    axes.set_yticks([0, peak], ["0", f"{peak:.1e}".replace("e-0", "e-").replace(".0e", "e")])
    axes.set_ylabel("lr", color=INK)
    frame(axes)


def frame(axes) -> None:
    """Faint lines at the major ticks, and no box."""
    axes.grid(True, which="major", color=FAINT, linewidth=0.6)
    axes.yaxis.set_label_coords(-0.07, 0.5)
    axes.tick_params(which="both", color=FAINT, labelcolor=INK)
    axes.tick_params(which="minor", left=False, labelleft=False)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)


def with_dark_colours(svg: str) -> str:
    rules = "".join(
        f'[style*="{what}: {light}"]{{{what}:{dark}!important}}'
        for light, dark in DARK.items()
        for what in ("fill", "stroke")
    )
    style = f"<style>@media (prefers-color-scheme: dark){{{rules}}}</style>"
    return re.sub(r"[ \t]+$", "", re.sub(r"(<svg [^>]*>)", lambda m: f"{m[1]}\n {style}", svg, count=1), flags=re.M)


def describe(run: Run) -> str:
    """The picture in words: the result first."""
    key = "avg_loss" if run.best("avg_loss") else "loss"
    rows = [row for row in run.rows if math.isfinite(row.get(key, math.nan))]
    if not rows:
        return f"Training of {run.folder}: no finite loss was logged"
    best, final, goal = run.best(key), run.number("final_loss"), run.target_loss()
    text = f"{key} of {run.folder} fell from {rows[0][key]:.4g} to {best[key]:.4g} at step {best['step']}"
    if goal:
        text += f", {'under' if best[key] < goal else 'not under'} the target of {goal:g}"
    return text + (f"; final_loss over the whole text is {final:.4g}" if final is not None else "")


# ======================================================================================================================
# The README
# ======================================================================================================================

MARKER = re.compile(r"<!--AUTO:([A-Z]+):(START|END)-->")
WORDS = "|".join(NAMES)
# A comment that was surely meant as a marker: AUTO, a colon and a word; or, less exactly, one of the names and an edge.
NEARLY = re.compile(
    rf"""(?<!\\)<!-+\s* (?: AUTO\s*:\s*\w+\s*(?=:|-+>|$)
                          | (?:AUTO[\s_:.-]*)? (?:{WORDS}) \s*[:_.\s-]\s* (?:START|BEGIN|END)\b ) .*? (?:-+>|$)""",
    re.I | re.X,
)
CODE_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")


def find_blocks(lines: Sequence[str], path: str) -> dict[str, tuple[int, int]]:
    """{name: (index of the START line, index of the END line)}.

    Raises ReadmeError with every marker that is broken, as `path:line: what is wrong`."""
    code_lines, unclosed = lines_of_code(lines)
    found, problems = read_markers(lines, code_lines)
    blocks: dict[str, tuple[int, int]] = {}
    opened: dict[str, int] = {}  # in the order in which they were opened
    for i, name, edge in found:
        outer = next(reversed(opened), "")
        if edge == "START":
            if name in opened or name in blocks:
                first = opened[name] if name in opened else blocks[name][0]
                problems[i] = f"a second START of {name}, which starts in line {first + 1}: remove one of them"
            elif outer:
                problems[i] = f"{name} starts inside {outer}, which has no END before it (line {opened[outer] + 1})"
            opened.setdefault(name, i)
        elif name not in opened:
            problems[i] = f"{name} ends without a START: remove this line, or put <!--AUTO:{name}:START--> before it"
        else:
            if name != outer:
                problems[i] = f"{name} ends inside {outer} (line {opened[outer] + 1}): two blocks can't cross"
            blocks.setdefault(name, (opened.pop(name), i))
    for name, i in opened.items():
        why = f" (the code fence of line {unclosed + 1} is never closed)" if unclosed is not None else ""
        problems.setdefault(i, f"{name} starts and never ends{why}: put <!--AUTO:{name}:END--> on a line behind it")
    if problems:
        raise ReadmeError("\n".join(f"{path}:{i + 1}: {problems[i]}" for i in sorted(problems)))
    return blocks


def lines_of_code(lines: Sequence[str]) -> tuple[set[int], int | None]:
    """(indices of the lines in code fences and indented code, the line that opens a fence which nothing closes)."""
    unclosed, inside = None, set()
    for token in MarkdownIt("commonmark").disable("inline").parse("".join(lines)):
        if token.type in ("fence", "code_block"):
            inside.update(range(*token.map))
        if token.type == "fence" and not re.match(
            rf"[\s>]*{token.markup}[{token.markup[0]}]*\s*$", lines[token.map[1] - 1]
        ):
            unclosed = token.map[0]
    return inside, unclosed


def read_markers(lines: Sequence[str], code_lines: set[int]) -> tuple[list[tuple[int, str, str]], dict[int, str]]:
    """([(line index, name, START or END)], {line index: what is wrong with a marker}). Code is text."""
    found, problems = [], {}
    for i, line in enumerate(lines):
        if i in code_lines or not (near := NEARLY.search(CODE_SPAN.sub("", line))):
            continue
        exact = MARKER.fullmatch(line.strip())
        if exact and exact[1] in NAMES:
            found.append((i, exact[1], exact[2]))
        elif (inner := MARKER.search(line)) and inner[1] in NAMES:
            problems[i] = f"{inner[0]} must stand alone on its line"
        else:
            problems[i] = f"{near[0].strip()} is no marker: {meant(near[0])}"
    return found, problems


def meant(text: str) -> str:
    """What to write in place of what is nearly a marker."""
    words = [word for word in re.findall(r"[A-Z0-9]+", text.upper()) if word != "AUTO"]
    edge = (
        "START"
        if "BEGIN" in words
        else next((w for w in words if difflib.get_close_matches(w, ("START", "END"))), "START")
    )
    edge = difflib.get_close_matches(edge, ("START", "END"), n=1)[0]
    name = difflib.get_close_matches(words[0] if words else "", NAMES, n=1)
    return f"write <!--AUTO:{name[0]}:{edge}-->" if name else f"the blocks are {', '.join(NAMES)}"


# ======================================================================================================================
# Writing
# ======================================================================================================================


@dataclass(frozen=True)
class Change:
    """A file as it is (None: it isn't there) and as it should be."""

    path: Path
    old: bytes | None
    new: bytes

    def write(self) -> None:
        """Atomically, keeping the mode of the file and the link that leads to it."""
        path = self.path.resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with open(part, "wb") as f:
                f.write(self.new)
                f.flush()
                os.fsync(f.fileno())
            if self.old is not None:
                shutil.copymode(path, part)
            os.replace(part, path)
        except OSError as e:
            raise ReadmeError(f"{self.path} can't be written ({e.strerror}): it is as it was") from None
        finally:
            part.unlink(missing_ok=True)

    def diff(self) -> str:
        if self.path.suffix == ".svg":
            return f"{self.path}: would be drawn anew\n"
        old, new = ([f"{line}\n" for line in re.split("\r?\n", text_of(data))] for data in (self.old, self.new))
        return "".join(difflib.unified_diff(old, new, str(self.path), f"{self.path} (updated)"))


def text_of(data: bytes | None) -> str:
    return (data or b"").decode("utf-8", "surrogateescape")  # bytes that aren't UTF-8 come back as they were


def plan(readme: Path, run_dir: Path, assets_dir: Path) -> tuple[list[Change], list[str]]:
    """(the files as they should be, what to tell the user). Writes nothing.

    Raises ReadmeError for broken markers or a run that can't be read."""
    old = readme.read_bytes()
    text = text_of(old)
    bom = "\ufeff" * text.startswith("\ufeff")
    lines = re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+\Z", text.removeprefix(bom))
    blocks = find_blocks(lines, str(readme))
    if not blocks:
        raise ReadmeError(
            f"{readme} has no block: put <!--AUTO:SUMMARY:START--> and <!--AUTO:SUMMARY:END--> on two lines"
        )
    run = read_run(run_dir, relative(run_dir, readme.parent))
    changes, notes = [], run.notes
    for name, (start, end) in sorted(
        blocks.items(), key=lambda item: -item[1][0]
    ):  # from the end, so that indices hold
        content = BLOCKS[name](run)
        if name == "CURVE" and run.rows:
            path = assets_dir / "curve.svg"
            changes.append(Change(path, path.read_bytes() if path.exists() else None, curve(run)))
            link = Path(os.path.relpath(path, readme.parent)).as_posix()
            content = f"![{plain(describe(run))}]({urllib.parse.quote(link)})"
        newline = "\r\n" if lines[start].endswith("\r\n") else lines[start][-1]
        lines[start + 1 : end] = [line + newline for line in ("", *content.split("\n"), "")]
    changes.append(Change(readme, old, (bom + "".join(lines)).encode("utf-8", "surrogateescape")))
    if lacking := [name for name in BLOCKS if name not in blocks]:
        notes.append(f"{readme} has no block {', '.join(lacking)}: left alone")
    return changes, notes


BLOCKS: dict[str, Callable[[Run], str]] = {
    "SUMMARY": summary,
    "CURVE": lambda run: "There is no curve yet, since no step has been logged.",
    "METRICS": metrics,
    "SAMPLES": samples,
    "LOGS": logs,
    "REPRODUCE": reproduce,
    "FLAGS": lambda run: flags(HERE / "train.py"),
}


def relative(path: Path, base: Path) -> str:
    """The path seen from `base`, or as it was given where it lies outside."""
    seen = Path(os.path.relpath(path, base))
    return path.as_posix() if ".." in seen.parts or not seen.name else seen.as_posix()


# ======================================================================================================================
# Command line
# ======================================================================================================================


def build_parser() -> argparse.ArgumentParser:
    summary, usage = __doc__.split("\n\n")[:2]
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "update_readme.py", None, summary, usage, formatter_class=style, allow_abbrev=False
    )
    parser.add_argument("--run_dir", type=Path, default=Path("out"), help="run directory (default: out)")
    parser.add_argument(
        "--readme", type=Path, default=Path("README.md"), help="file with the blocks (default: README.md)"
    )
    parser.add_argument("--assets_dir", type=Path, help="where the curve goes (default: assets beside the README)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 5 if the README is stale")
    parser.add_argument("--diff", action="store_true", help="write nothing; show what would change")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code; faults are one sentence each, on stderr."""
    args = build_parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a terminal may lack characters that the run has
    if not args.readme.is_file():
        print(f"update_readme.py: {args.readme} isn't a file: name one with --readme", file=sys.stderr)
        return 2
    try:
        changes, notes = plan(args.readme, args.run_dir, args.assets_dir or args.readme.parent / "assets")
        stale = [change for change in changes if change.old != change.new]
        if not (args.check or args.diff):
            for change in stale:
                change.write()
    except ReadmeError as e:
        print(e, file=sys.stderr)
        return 1
    except OSError as e:
        print(f"update_readme.py: {e.strerror or e} ({e.filename or 'no file named'})", file=sys.stderr)
        return 1
    remedy = f"is stale: python update_readme.py --run_dir {args.run_dir} brings it up to date"
    done = remedy if args.check else "would change" if args.diff else "written"
    notes += [f"{change.path}: {done if change in stale else 'already up to date'}" for change in changes]
    print(*notes, sep="\n", file=sys.stderr if args.diff else sys.stdout)
    if args.diff:
        print(*(change.diff() for change in stale), sep="", end="")
    return 5 if args.check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
