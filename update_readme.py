"""Write a run's results into the README, between <!--AUTO:NAME:START--> and <!--AUTO:NAME:END-->.

    python update_readme.py                             # from out/, into README.md and assets/
    python update_readme.py --run_dir out/shakespeare --check  # is the README up to date? 0 yes, 5 no; writes nothing
    python update_readme.py --run_dir out/shakespeare --diff   # what would change; writes nothing

Blocks: SUMMARY, CURVE, METRICS, SAMPLES, LOGS and REPRODUCE come from the run directory, COMPARE and HELDOUT also from
benchmarks/earlier_runs.json and the published runs that it names, FLAGS from the source of train.py. A block that the
README lacks is left alone. What a block says comes from the run, never from the clock, so the same run directory gives
the same bytes. Reads, where they exist, and copes with what is missing or half written:

    RUN/run.json                 how the run was made and how it ended
    RUN/logs/train_metrics.csv   a row each logged step, with at least the columns step and loss
    RUN/logs/train.log           stands in for the CSV where that has no steps
    RUN/samples/samples.txt      blocks of a rule of `=`, `STEP n`, and per prompt `PROMPT:` and `OUTPUT:`

or, at other places, files that by their names are the same.

Exit codes: 0 written or already current, 1 broken markers (file:line), a run or a file that can't be read or written,
2 unusable flags, 5 stale under --check.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import csv
import difflib
import io
import json
import math
import os
import re
import shlex
import shutil
import sys
import textwrap
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from markdown_it import MarkdownIt

HERE = Path(__file__).resolve().parent
NAMES = ("SUMMARY", "CURVE", "METRICS", "SAMPLES", "LOGS", "REPRODUCE", "COMPARE", "HELDOUT", "FLAGS")

METRICS_ROWS = 12  # rows of the table, evenly spaced
LOG_EDGE, LOG_MIDDLE = 20, 12  # lines of the log at either end, at most, and steps between
SAMPLE_LINES, SAMPLE_CHARACTERS = 200, 30_000
LOG_CHARACTERS = 2000  # of a line
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
LOG_LINE = re.compile(r"(?P<time>\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)[,.\d]*Z? *\| *\w+ *\| *(?P<message>.*)")
# A log line of a step begins its message with `step 10/30`; its figures are looked for behind that.
LOG_STEP = re.compile(r"(?:^|[|\]:>]\s{0,9})(?:global_)?(?:step|iter|iteration)[ :=]{1,12}(\d[\d,]{0,14})\b", re.I)
NUMBER = r"[ :=]{1,12}([-+]?(?:\d[\d,]*\.?\d*(?:e[-+]?\d+)?|nan|inf))(?![\w%]|\.\w)"
LOG_FIGURES = {
    "loss": re.compile(rf"(?<!best )(?<!val )\b(?:train_)?loss{NUMBER}", re.I),
    "lr": re.compile(rf"\blr{NUMBER}", re.I),
    "tok_per_s": re.compile(rf"\btok/s{NUMBER}", re.I),
    "avg_loss": re.compile(rf"\bavg_loss{NUMBER}", re.I),
    "val_loss": re.compile(rf"\bval[_ ]loss{NUMBER}", re.I),
    "epoch": re.compile(rf"\bepoch{NUMBER}", re.I),
}
SAMPLE_HEAD = re.compile(r"^={20,}[ \t]*\n+STEP[ \t:]+(\d{1,15})[^\n]*\n", re.M)


def finite(value) -> float | None:
    """The value, if it is a finite number."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < sys.float_info.max
    return float(value) if number else None


@dataclass(frozen=True)
class Run:
    """A run directory, as far as it could be read."""

    folder: str  # as the README names it
    record: dict  # run.json; {} where there is none
    rows: list[dict[str, float]]  # the logged steps, each once, in order; keys are those of FORMATS
    log: list[str]
    sample: tuple[int | None, str]  # (step, text) of the latest; (None, "") where there is none
    beside: tuple[Run, ...] = ()  # the published runs on the same text
    held_out: tuple[Run, ...] = ()  # those that held some of it out

    def number(self, key: str) -> float | None:
        return finite(self.record.get(key))

    def text(self, key: str) -> str | None:
        value = self.record.get(key)
        return value if isinstance(value, str) and value.strip() else None

    def part(self, name: str) -> dict:
        """An object in run.json; {} where there is none."""
        value = self.record.get(name)
        return value if isinstance(value, dict) else {}

    def with_figure(self, key: str) -> list[dict[str, float]]:
        """The rows that have a finite `key`; of avg_loss, those since the first full pass, if any says that it was."""
        rows = [row for row in self.rows if math.isfinite(row.get(key, math.nan))]
        return [row for row in rows if row.get("epoch", 1) >= 1] if key == "avg_loss" else rows

    def best(self, key: str) -> dict[str, float] | None:
        """The first row with the lowest `key`."""
        return min(self.with_figure(key), key=lambda row: row[key], default=None)

    def measure(self) -> str:
        """The loss that tells most: avg_loss, where there is one of a full pass."""
        return "avg_loss" if self.best("avg_loss") else "loss"

    def settings(self) -> dict:
        """The configuration, from run.json or else from the log's line `Args: {...}`."""
        candidates = [self.record.get("config")]
        for text in (line.partition("Args: ")[2] for line in reversed(self.log)):  # the last start's come first
            for read in (json.loads, ast.literal_eval) if text[:1] == "{" else ():  # train.py's, a Python program's
                with contextlib.suppress(ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                    candidates.append(read(text))
        return next((c for c in candidates if isinstance(c, dict)), {})

    def target_loss(self) -> float:
        """0 where there is none."""
        return max(0.0, finite(self.record.get("target_loss", self.settings().get("target_loss"))) or 0.0)

    def closing(self) -> list[tuple[str, str]]:
        """(time, message) of what follows the log's last step, or else of its last line."""
        found = [(m["time"].replace("T", " "), m["message"]) for m in map(LOG_LINE.match, self.log) if m]
        after = max((i + 1 for i, (_, message) in enumerate(found) if step_of(message)), default=len(found))
        return found[after:] or found[-1:]


def read_run(folder: Path, name: str) -> tuple[Run, list[str]]:
    """(the run, notes on what was passed over). Raises ReadmeError where there is no run, or one that can't be read."""
    notes: list[str] = []
    log_file = find(folder, "logs/train.log", r"\.log$", notes)
    csv_file = find(folder, "logs/train_metrics.csv", r"(metric|loss|train|log|history).*\.csv$", notes)
    sample_file = find(folder, "samples/samples.txt", r"sample.*\.txt$", notes)
    record_file = folder / "run.json"
    if not (log_file or csv_file or sample_file or record_file.is_file()):
        below = sorted(p.parent for pattern in ("*/run.json", "*/logs/train.log") for p in folder.glob(pattern))
        there = f"there is one in {below[0]}: use --run_dir {shlex.quote(str(below[0]))}" if below else ""
        raise ReadmeError(f"{folder} holds no run: {there or 'train first, or name another --run_dir'}")
    log = read_log(log_file) if log_file else []
    rows = read_metrics(csv_file, notes) if csv_file else []
    if not rows and (rows := in_order(row for line in log if (row := step_of(line)))):
        notes.append(f"{folder} has no CSV with steps: the log serves")
    sample = read_sample(sample_file) if sample_file else (None, "")
    return Run(harmless(name), read_record(record_file), rows, log, sample), notes


def find(folder: Path, usual: str, pattern: str, notes: list[str]) -> Path | None:
    """The file at its usual place, or else the last by name that fits the pattern, in the folder or one below."""
    if (folder / usual).is_file():
        return folder / usual
    others = [p for p in (*folder.glob("*"), *folder.glob("*/*")) if re.search(pattern, p.name, re.I) and p.is_file()]
    others.sort(key=lambda p: [int(t) if t.isdecimal() else t for t in re.split(r"(\d+)", p.as_posix())])
    if others:
        notes.append(f"{folder / usual} isn't there: {others[-1]} serves")
    return others[-1] if others else None


def read_text(path: Path) -> str:
    """A text file of any newline style, in UTF-8, or in UTF-16 as PowerShell writes it; the newlines become \\n."""
    data = path.read_bytes()
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    return "\n".join(line.rstrip("\r") for line in data.decode(encoding, "replace").split("\n"))


def read_record(path: Path) -> dict:
    if not path.is_file():
        return {}
    remedy = "mend it, or remove it to go by the log"
    try:
        record = json.loads(read_text(path))
    except json.JSONDecodeError as e:
        raise ReadmeError(f"{path}:{e.lineno}: this isn't JSON ({e.msg}): {remedy}") from None
    except (ValueError, RecursionError):
        raise ReadmeError(f"{path}:1: this is JSON beyond all measure: {remedy}") from None
    if not isinstance(record, dict):
        raise ReadmeError(f"{path}:1: this isn't a JSON object: {remedy}")
    return record


def step_of(line: str) -> dict[str, float] | None:
    """The figures of a log line that tells of a step; None if it doesn't."""
    if not (head := LOG_STEP.search(line[:500])):
        return None
    found = {key: figure.search(line[:2000], head.end()) for key, figure in LOG_FIGURES.items()}
    row = {key: float(m[1].replace(",", "")) for key, m in found.items() if m}
    return {"step": int(head[1].replace(",", "")), **row} if row.keys() & {"loss", "val_loss"} else None


def to_float(text: str) -> float | None:
    with contextlib.suppress(ValueError):
        return float(text)
    return None


def read_log(path: Path) -> list[str]:
    """The log's lines. A last line without an end is left out if it has no words, or is a step that may be cut."""
    *lines, rest = read_text(path).replace("\r", "\n").split("\n")  # a progress bar goes back by a bare \r
    like = next((line for line in reversed(lines) if step_of(line)), "") if LOG_STEP.search(rest[:500]) else ""
    torn = form(rest) != form(like) if LOG_STEP.search(rest[:500]) else not re.search(r"[^\W\d]", rest)
    return lines if torn else [*lines, rest]


def form(line: str) -> tuple[int, str]:
    """How many fields a step's line has, and how its last one looks, digit by digit behind the point."""
    return line.count("|"), re.sub(r"\d+(?=\.|$)", "0", line.rpartition("|")[2], count=1).replace("0.", ".")


def read_metrics(path: Path, notes: list[str]) -> list[dict[str, float]]:
    """The CSV's rows. One that is torn, or has no step or no figures, is left out and noted."""
    text = read_text(path)
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        return []
    names = [name.strip(' "').lower() for name in lines[0][1].split(",")]
    header = [name if ALIASES.get(name) in names else ALIASES.get(name, name) for name in names]
    if not {"step", "loss"} <= set(header):
        notes.append(f"{path}:{lines[0][0]}: the columns step and loss aren't there")
        return []
    rows, left_out = [], []
    for i, line in lines[1:]:
        open_end = i == lines[-1][0] and not text.endswith("\n")
        row = read_row(line, header, open_end)
        if row:
            rows.append(row)
        elif line.strip() != lines[0][1].strip():  # a header again, of a run that was begun anew, is no loss
            why = (
                "it has no line end, so it may be cut"
                if open_end
                else f"it isn't {len(header)} cells, of which one is the step"
            )
            left_out.append(f"{path}:{i}: row left out, since {why}")
    notes += left_out[:3] + [f"{path}: {len(left_out) - 3} more rows left out"] * (len(left_out) > 3)
    kept = in_order(rows)
    steps = {row["step"] for row in kept}
    if again := sum(row["step"] not in steps for row in rows):
        notes.append(f"{path}: {again} rows left out, since the run went back behind their steps")
    return kept


def read_row(line: str, header: Sequence[str], open_end: bool) -> dict[str, float] | None:
    """The figures of a line. In one without an end the last may be cut, so it doesn't count."""
    try:
        words = next(csv.reader([line.replace("\0", "")], skipinitialspace=True))
    except csv.Error:
        words = []
    cells = [to_float(cell) for cell in words]
    if open_end and cells:
        cells[-1] = None
    row = {key: cell for key, cell in zip(header, cells, strict=False) if key in FORMATS and cell is not None}
    step = finite(row.pop("step", None))
    sound = len(cells) == len(header) and step is not None and ("loss" in row or (row and not open_end))
    return {"step": int(step), **row} if sound else None


def in_order(rows: Iterable[dict[str, float]]) -> list[dict[str, float]]:
    """Each step once: a run that was resumed from an earlier step made those after it again. A row without a loss adds
    to the one of its step."""
    kept: list[dict[str, float]] = []
    for row in rows:
        if kept and kept[-1]["step"] == row["step"] and "loss" not in row:
            kept[-1] = kept[-1] | row
            continue
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


HIDDEN = re.compile(r"[^\S \n\t]|[\x00-\x08\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def harmless(text: str) -> str:
    """Text for a code fence: control characters, and those that turn the direction of writing, become visible, and no
    line can pass for a marker."""
    text = HIDDEN.sub(lambda m: m[0].encode("unicode_escape").decode(), text)
    return re.sub("<!--(?=AUTO:)", "<!-- ", text, flags=re.I)


def ticks(text: str, least: int) -> str:
    """A run of backticks longer than any in the text."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def fence(text: str, language: str = "text") -> str:
    """A code fence."""
    text = harmless(text)
    return f"{ticks(text, 3)}{language}\n{text}\n{ticks(text, 3)}"


def code(text: str) -> str:
    """A code span, on one line."""
    text = " ".join(harmless(text).split()) or "?"
    pad = " " if "`" in (text[0], text[-1]) else ""
    return f"{ticks(text, 1)}{pad}{text}{pad}{ticks(text, 1)}"


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
    return [round(i * (n - 1) / (most - 1)) for i in range(most)] if n > most else list(range(n))


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
    """The best and the last, each with its step."""
    remarks = {
        "loss": " (one step)" if run.measure() == "avg_loss" else "",
        "avg_loss": " (a full pass)",
        "val_loss": "",
    }
    for key, remark in remarks.items():
        if best := run.best(key):
            yield f"Best {key}: **{figure(best, key)}** at step **{best['step']}**{remark}"
    if last := [row for row in run.rows if "loss" in row][-1:]:
        yield f"Last logged loss: **{figure(last[0], 'loss')}** at step **{last[0]['step']}**"


def target(run: Run) -> Iterator[str]:
    """Was the target met, and at what cost? Only the proof over the whole text, final_loss, can tell."""
    goal, final = run.target_loss(), run.number("final_loss")
    if final is not None:
        verdict = f", {'under' if final < goal else 'not under'} the target of {goal:g}" if goal else ""
        yield f"final_loss, over {whole(run)}: **{final:.6f}**{verdict}"
    elif "final_loss" in run.record:
        yield f"final_loss: none{f', the target of {goal:g} was not reached' if goal else ''}"
    else:
        whether = f", and so whether the target of {goal:g} was met; tokens and time to it" if goal else ""
        yield f"Not on record: final_loss{whether}"
    tokens, seconds = run.number("tokens_to_target"), run.number("seconds_to_target")
    if tokens is not None:
        yield f"To the target: **{tokens:,.0f} tokens**" + ("" if seconds is None else f" in **{duration(seconds)}**")
    elif run.number("tokens") and run.number("seconds"):
        yield f"Trained: {run.number('tokens'):,.0f} tokens in {duration(run.number('seconds'))}"


def whole(run: Run) -> str:
    """What final_loss is over."""
    return "all of the text but what was held out" if finite(run.part("corpus").get("held_out")) else "the whole text"


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
    lines = [f"{table(columns, cells, '---:')}\n\n{len(rows)} of {len(run.rows)} logged rows.{bold}", *learned(run)]
    return "\n".join(lines)


def learned(run: Run) -> Iterator[str]:
    """What is known by heart: recall, and the samples' own words of the text."""
    places, recall = run.settings().get("recall_places"), run.number("recall")
    if recall is not None:
        where = f"up to {places} places" if finite(places) else "places"
        yield ""
        yield (
            f"- recall: **{recall:.4f}** of the next 32 tokens come back exactly by greedy decoding, after 32 tokens of"
            f" the text from {where} drawn by seed"
        )
    if (at_windows := run.number("recall_at_windows")) is not None:
        yield f"- recall_at_windows: **{at_windows:.4f}**, the same where windows of training begin"
    samples = run.record.get("samples")
    pairs = [(finite(s.get("verbatim")), finite(s.get("characters"))) for s in samples] if dicts(samples) else []
    if pairs and all(None not in pair for pair in pairs):
        runs = ", ".join(f"**{verbatim:.0f}** of {characters:.0f}" for verbatim, characters in pairs)
        yield f"- Longest run of each sample that stands in the text word for word, in characters: {runs}"


def dicts(value) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def samples(run: Run) -> str:
    """The latest sample, whole; one that is very long is cut between two prompts, or else between two lines."""
    step, text = run.sample
    if not text.strip():
        return "No sample has been written yet."
    head = "The latest sample:" if step is None else f"What the model wrote at step {step}:"
    lines, whole = text.split("\n"), 0
    while whole < min(len(lines), SAMPLE_LINES) and sum(map(len, lines[: whole + 1])) <= SAMPLE_CHARACTERS:
        whole += 1
    if whole == len(lines):
        return f"{head}\n\n{fence(text)}"
    prompts = [i for i in range(1, whole) if lines[i].startswith("PROMPT:")]
    kept = lines[: prompts[-1] if prompts else whole]
    left_out = f"{len(lines) - len(kept):,} more lines are left out."
    return "\n\n".join([head, *([fence("\n".join(kept).rstrip("\n"))] if kept else []), left_out])


def logs(run: Run) -> str:
    """The log's opening, steps from its middle, evenly spaced, and its closing."""
    lines = run.log
    if not any(line.strip() for line in lines):
        return "No log has been written yet."
    lines = [cut(line) for line in lines]
    steps = [i for i, line in enumerate(lines) if step_of(line)]
    first, last = (min(steps), max(steps)) if steps else (len(lines), 0)
    head = min(first + 1, LOG_EDGE)
    tail = max(last, len(lines) - LOG_EDGE, head)
    between = [i for i in steps if head <= i < tail]
    middle = [between[i] for i in thin(len(between), LOG_MIDDLE)]
    left_out = tail - head - len(middle)
    if left_out <= 3:
        return fence("\n".join(lines).strip("\n"))
    evenly = "; evenly spaced steps follow" if middle else ""
    note = f"[... {left_out:,} of the {tail - head:,} lines between are left out{evenly} ...]"
    shown = [lines[i] for i in middle] + ["[...]"] * bool(middle)
    return fence("\n".join([*lines[:head], note, *shown, *lines[tail:]]).strip("\n"))


def cut(line: str) -> str:
    return line if len(line) <= LOG_CHARACTERS else f"{line[:LOG_CHARACTERS]} [... {len(line) - LOG_CHARACTERS:,} more]"


def reproduce(run: Run) -> str:
    """The exact command, and all that its result depends on."""
    if not run.record:
        return "There is no run.json, so only the log tells how this run was made."
    versions, corpus, resumed = run.part("versions"), run.part("corpus"), run.record.get("resumed")
    commit = run.text("git_commit") or ""
    facts = {
        "Seed": run.record.get("seed"),
        "Git commit": commit.removesuffix("-dirty"),
        "Device": run.text("device"),
        "Precision": run.text("precision"),
        "Processes": run.record.get("processes"),
        "Versions": ", ".join(f"{k} {v}" for k, v in versions.items()),
        "Text": corpus.get("file"),
        "SHA-256 of the text": corpus.get("sha256"),
    }
    lines = [f"- {name}: {code(str(value))}" for name, value in facts.items() if value not in (None, "")]
    if commit.endswith("-dirty"):
        lines = [line + " and changes since" * line.startswith("- Git commit") for line in lines]
    if isinstance(resumed, list) and resumed:
        times = "once" if len(resumed) == 1 else f"{len(resumed)} times"
        lines.append(f"- Resumed {times}, at last by {code(str(resumed[-1]))}")
    command = [fence(run.text("command"), "sh")] if run.text("command") else []
    return "\n\n".join([*command, "\n".join(lines)]).strip() or "run.json says nothing of how to repeat this run."


def compare(run: Run) -> str:
    """A table of the runs on this text: the earlier ones that are on record, then this one and the published ones."""
    earlier = earlier_runs(run)
    header = ("Run", "Optimizer", "Tokens a step", "Steps", "Tokens", "Judged by")
    rows = [
        [
            plain(past["name"]),
            plain(past["optimizer"] or "not on record"),
            *(f"{past[key]:,}" if past[key] else "not on record" for key in ("tokens_per_step", "steps", "tokens")),
            plain(past["judged_by"]),
        ]
        for past in earlier
    ]
    return table(header, rows + [compared(one) for one in (run, *run.beside)])


def compared(run: Run) -> list[str]:
    """A row of this program's run."""
    settings = run.settings()
    lr, embed_lr = finite(settings.get("lr")), finite(settings.get("embed_lr"))
    name = {"adamw": "AdamW", "muon": "Muon"}.get(str(settings.get("optimizer")), "not on record")
    name += f", peak {lr:.3g}" if lr else ""
    name += f", of the embeddings {embed_lr:.3g}" if embed_lr and embed_lr != lr else ""
    ended, last, final = run.text("ended"), run.rows[-1] if run.rows else {}, run.number("final_loss")
    # until the run has ended, those of its record are of the start
    steps, tokens = (run.number("steps"), run.number("tokens")) if ended else (last.get("step"), last.get("tokens"))
    judged = [] if final is None else [f"**{final:.4f}**, final_loss over {whole(run)}"]
    judged += [f"{row['avg_loss']:.4f}, avg_loss of a full pass" for row in run.with_figure("avg_loss")[-1:]]
    if "ended" in run.record and not ended:
        judged.append("not ended yet")
    elif ended and final is None:
        judged.append(f"not proven, since the run ended before: {plain(ended)}")
    elif run.target_loss() and final is not None and final >= run.target_loss():
        judged.append("the target wasn't reached")
    figures = (tokens / steps if tokens and steps else None, steps, tokens)
    done = [f"{n:,.0f}" if n is not None else "not on record" for n in figures]
    return [code(run.folder), name, *done, "; ".join(judged)]


def earlier_runs(run: Run) -> list[dict]:
    return on_record(run).get("runs", [])


def on_record(run: Run) -> dict:
    """benchmarks/earlier_runs.json, if it is about the run's text."""
    known = read_record(HERE / "benchmarks" / "earlier_runs.json")
    return known if known and known["sha256"] == run.part("corpus").get("sha256") else {}


def published_beside(run: Run, run_dir: Path, base: Path, which: str = "published") -> tuple[Run, ...]:
    """The published runs on the run's text, but for this one itself."""
    folders = [HERE / name for name in on_record(run).get(which, [])]
    others = [f for f in folders if f.resolve() != run_dir.resolve() and (f / "run.json").is_file()]
    return tuple(read_run(folder, relative(folder, base))[0] for folder in others)


def held_out(run: Run) -> str:
    """A table of what is made of held-out text: by the earlier runs on record, the published ones, and this one."""
    rows = [
        [
            plain(past["name"]),
            code("data/input.txt"),
            f"{past['parameters']:,} ({past['megabytes']:.2f} MB)",
            plain(past["tokenizer"]),
            f"{past['context']:,}",
            f"{past['steps']:,} of {past['tokens_per_step']:,} tokens",
            "not on record",
            f"{past['train']:.4f}",
            f"{past['val']:.4f}",
        ]
        for past in on_record(run).get("held_out_runs", [])
    ]
    rows += [held_out_row(one) for one in (*run.held_out, run) if one.best("val_loss")]
    header = (
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
    return table(header, rows) if rows else "No run with held-out text is on record."


def held_out_row(run: Run) -> list[str]:
    """A row of this program's run: its best val_loss, and where that isn't the last one also that."""
    parameters, seconds, final = (run.number(key) for key in ("parameters", "seconds", "final_loss"))
    steps, tokens, unknown = run.number("steps"), run.number("tokens"), "not on record"
    best, last = run.best("val_loss"), run.with_figure("val_loss")[-1]
    context, tokenizer = run.settings().get("seq_len"), run.settings().get("tokenizer")
    rose = f" at step {best['step']:,}, {last['val_loss']:.4f} at the end" if last is not best else ""
    return [
        code(run.folder),
        code(str(run.part("corpus").get("file", unknown))),
        f"{parameters:,.0f} ({4 * parameters / 1e6:.2f} MB)" if parameters else unknown,
        plain(str(tokenizer or unknown)),
        f"{context:,}" if finite(context) else unknown,
        f"{steps:,.0f} of {tokens / steps:,.0f} tokens" if steps and tokens else unknown,
        duration(seconds) if seconds else unknown,
        f"{final:.4f}" if final is not None else unknown,
        f"**{best['val_loss']:.4f}**{rose}",
    ]


def largest_held_out(run: Run) -> Run | None:
    """The run with held-out text that has most parameters, whose curve tells most."""
    runs = [one for one in (*run.held_out, run) if one.best("val_loss")]
    return max(runs, key=lambda one: one.number("parameters") or 0, default=None)


def flags(source: Path) -> str:
    """The table of train.py's flags, and its presets, read from the source: importing it would import torch."""
    try:
        tree = ast.parse(source.read_text(encoding="utf-8")).body
        config = next(n for n in tree if isinstance(n, ast.ClassDef) and n.name == "TrainConfig")
        rows = list(flag_rows(config))
        presets = next(n for n in tree if isinstance(n, ast.AnnAssign) and getattr(n.target, "id", "") == "PRESETS")
        presets = [(name, list(settings.items())) for name, settings in ast.literal_eval(presets.value).items()]
    except OSError as e:
        raise ReadmeError(f"{source} can't be read ({e.strerror}), and the block FLAGS comes from it") from None
    except (SyntaxError, ValueError, TypeError, AttributeError, StopIteration):
        raise ReadmeError(
            f"{source}: there is no TrainConfig of flag(...) fields with PRESETS: remove the block FLAGS"
        ) from None
    lines = [table(("Flag", "Default", "What it does"), rows), ""]
    for name, settings in presets:
        words = [word for key, value in settings for word in flag_words(key, value)]
        lines.append(f"`--preset {name}` stands for {code(shlex.join(words)) if words else 'the defaults'}.")
    return "\n".join(lines)


def flag_words(key: str, value) -> list[str]:
    """A setting as it is typed."""
    if isinstance(value, bool):
        return [f"--{key}" if value else f"--no-{key}"]
    return [f"--{key}", str(value).replace("\n", r"\n")]


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
STEP_LOSS, LOSS, HELD_OUT, LR, TARGET = "#9ec5f5", "#0550ae", "#8250df", "#116329", "#bc4c00"
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


def picture(draw: Callable, title: str) -> bytes:
    """The SVG of a figure that `draw` fills; the same rows give the same bytes.

    It brings its own background, so that it is legible on any page, and turns dark where the reader prefers that."""
    os.environ["MPLBACKEND"] = "svg"  # a notebook leaves the name of one that isn't there
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        raise ReadmeError("CURVE and COMPARE need matplotlib: pip install -r requirements.txt") from None
    # Text stays text and ids depend on nothing but the drawing, so that no font and no clock gets into the file.
    style = {"svg.fonttype": "none", "svg.hashsalt": "curve", "font.family": "sans-serif", "font.size": 10}
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **style}):
        figure = Figure(figsize=(8, 5), facecolor=PAPER)
        FigureCanvasSVG(figure)
        draw(figure)
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Title": title})
    return with_dark_colours(out.getvalue().decode()).encode()


def curve(run: Run) -> bytes:
    """The losses (log scale) and the learning rate against the step."""

    def draw(figure) -> None:
        # At fixed places, since measured text would move them.
        upper = figure.add_axes((0.11, 0.36, 0.75, 0.57), facecolor=PAPER)
        draw_losses(upper, run)
        if series(run, "lr")[0]:
            upper.tick_params(labelbottom=False)
            draw_lr(figure.add_axes((0.11, 0.10, 0.75, 0.20), facecolor=PAPER, sharex=upper), run)
        figure.axes[-1].set_xlabel("step", color=INK)

    return picture(draw, describe(run))


def comparison(run: Run) -> bytes:
    """avg_loss (log scale) against tokens: this run, the published ones, and the points of earlier ones."""

    def draw(figure) -> None:
        axes = figure.add_axes((0.11, 0.12, 0.75, 0.81), facecolor=PAPER)
        axes.set_yscale("log")
        key = []
        for past in earlier_runs(run):
            if past["points"]:
                look = {"color": INK, "linewidth": 1.0, "linestyle": ":", "marker": "o", "markersize": 5}
                axes.plot(*zip(*past["points"], strict=True), **look)
                key.append((past["name"], {**look, "markevery": (1, 2)}))
        for one, colour in zip((run, *run.beside), (LOSS, HELD_OUT, LR), strict=False):
            tokens, values = series(one, one.measure(), "tokens")
            if tokens:
                axes.plot(tokens, values, color=colour, linewidth=1.6, marker=dots(tokens))
                key.append((Path(one.folder).name, {"color": colour, "linewidth": 3}))
        finish_losses(axes, run, key, letter=0.0125)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1e6:g}")
        axes.set_xlabel("tokens, millions", color=INK)

    return picture(draw, describe_comparison(run))


def describe_comparison(run: Run) -> str:
    """The picture in words."""
    needed = run.number("tokens_to_target")
    own = f"{run.folder} met its target after {needed:,.0f} tokens" if needed else f"{run.folder} against tokens"
    past = [f"{past['name']} after {past['tokens']:,}" for past in earlier_runs(run)]
    return "; ".join([own, *past])


TINY = 1e-30


def series(run: Run, key: str, over: str = "step") -> tuple[list[float], list[float]]:
    """(steps, values) of a column, as many as can be told apart in the picture."""
    least = 0 if key == "lr" else TINY  # a loss of 0 has no place on a log scale
    rows = [row for row in run.rows if math.isfinite(row.get(over, math.nan))]
    points = [(row[over], row[key]) for row in rows if least <= row.get(key, -1) < 1 / TINY]
    points = [points[i] for i in thin(len(points), CURVE_POINTS)]
    return [x for x, _ in points], [y for _, y in points]


def draw_losses(axes, run: Run) -> None:
    measure = run.measure()
    lines = {
        "loss": ("loss", LOSS) if measure == "loss" else ("loss (one step)", STEP_LOSS),
        "avg_loss": ("avg_loss (a full pass)", LOSS),
        "val_loss": ("val_loss (held out)", HELD_OUT),
    }
    axes.set_yscale("log")
    key = []
    for name, (label, colour) in lines.items():
        steps, values = series(run, name)
        if steps:
            axes.plot(steps, values, color=colour, linewidth=1.6, marker=dots(steps))
            key.append((label, {"color": colour, "linewidth": 3}))
    if (best := run.best(measure)) and best[measure] >= TINY:
        ring = {"color": LOSS, "linewidth": 0, "marker": "o", "markersize": 8, "markerfacecolor": PAPER}
        axes.plot([best["step"]], [best[measure]], **ring)
        key.append((f"best: {best[measure]:.4g} at step {best['step']}", {**ring, "markevery": (1, 2)}))
    finish_losses(axes, run, key)


def finish_losses(axes, run: Run, key: Sequence[tuple[str, dict]], letter: float = 0.0105) -> None:
    """The target, the numbers of the axis, and what each line is."""
    if (goal := run.target_loss()) >= TINY:
        axes.axhline(goal, color=TARGET, linewidth=1.2, linestyle="--")
        axes.annotate(f"target {goal:.3g}", (1.01, goal), color=TARGET, va="center", xycoords=("axes fraction", "data"))
    ticks = round_numbers(*axes.set_ylim(axes.get_ylim()))  # set, so that no later line moves them
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_ylabel("loss, nats per token", color=INK)
    draw_key(axes, key, letter)
    frame(axes)


def dots(points: Sequence) -> str:
    return "." if len(points) < 50 else ""


def round_numbers(low: float, high: float) -> list[float]:
    """Some three to nine round numbers between two, for a log scale: powers of ten, or with 2 and 5 times them, or, of
    a narrow range, evenly spaced ones."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5)):
        found = [f * 10.0**decade for decade in decades for f in factors if low <= f * 10.0**decade <= high]
        if len(found) > 2:
            return found[:: math.ceil(len(found) / 9)]
    unit = 10.0 ** math.floor(math.log10((high - low) / 2))
    multiples = range(math.ceil(low / unit), math.floor(high / unit) + 1)
    return [float(f"{unit * i:.12g}") for i in multiples[:: math.ceil(len(multiples) / 9)]]


def draw_key(axes, key: Sequence[tuple[str, dict]], letter: float) -> None:
    """What each line is, in a row above the axes; matplotlib's legend would be placed by measured text, so that it
    would depend on the machine's fonts. `letter` is about the width of one."""
    x = 0.0
    for label, look in key:
        axes.plot([x, x + 0.03], [1.05, 1.05], transform=axes.transAxes, clip_on=False, **look)
        axes.text(x + 0.045, 1.05, label, color=INK, va="center", transform=axes.transAxes, parse_math=False)
        x += 0.066 + letter * len(label)


def draw_lr(axes, run: Run) -> None:
    steps, values = series(run, "lr")
    peak = max(values) or 1.0
    axes.plot(steps, values, color=LR, linewidth=1.6, marker=dots(steps))
    axes.set_ylim(0, 1.15 * peak)
    axes.set_yticks([0, peak], ["0", f"{peak:.1e}".replace("e-0", "e-").replace(".0e", "e")])
    axes.set_ylabel("lr", color=INK)
    frame(axes)


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
    key = run.measure()
    best, first = run.best(key), next((row for row in run.rows if math.isfinite(row.get(key, math.nan))), None)
    if not best:
        return f"Training of {run.folder}: no finite loss was logged"
    text = f"{key} of {run.folder} fell from {first[key]:.4g} to {best[key]:.4g} at step {best['step']}"
    if best is first:
        text = f"{key} of {run.folder} was lowest at step {best['step']}, {best[key]:.4g}"
    if (goal := run.target_loss()) and key == "avg_loss":
        text += f", {'under' if best[key] < goal else 'not under'} the target of {goal:g}"
    if held := run.with_figure("val_loss"):
        lowest = run.best("val_loss")
        text += f"; val_loss was lowest at step {lowest['step']}, {lowest['val_loss']:.4g}"
        text += f", and {held[-1]['val_loss']:.4g} at the end" if held[-1] is not lowest else ""
    final = run.number("final_loss")
    return text + (f"; final_loss over {whole(run)} is {final:.4g}" if final is not None else "")


# ======================================================================================================================
# The README
# ======================================================================================================================

MARKER = re.compile(r"<!--AUTO:([A-Z]+):(START|END)-->")
COMMENT = re.compile(r"<\s*!?\s*-+(.{0,60}?)(?:-+\s*>|$)")
EDGES = {"START": "START", "BEGIN": "START", "END": "END", "STOP": "END", "FINISH": "END"}
CODE_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")
RAW_HTML = re.compile(r"\s*<(pre|script|style|textarea)\b", re.I)  # what stands in such an element is no Markdown


def find_blocks(lines: Sequence[str], path: str) -> dict[str, tuple[int, int]]:
    """{name: (index of the START line, index of the END line)}.

    Raises ReadmeError with every marker that is broken, as `path:line: what is wrong`."""
    inside_code, unclosed = lines_of_code(lines)
    found, near = read_markers(lines, inside_code)
    problems: dict[int, str] = {}
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
    # What is inside a block will be replaced, so it need not be right.
    outside = {i: text for i, text in near.items() if not any(start < i < end for start, end in blocks.values())}
    if problems := outside | problems:
        raise ReadmeError("\n".join(f"{path}:{i + 1}: {problems[i]}" for i in sorted(problems)))
    return blocks


def lines_of_code(lines: Sequence[str]) -> tuple[set[int], int | None]:
    """(indices of the lines that are no Markdown: code fences, indented code, elements such as <pre>; the line that
    opens a fence which nothing closes)."""
    unclosed, inside = None, set()
    for token in MarkdownIt("commonmark").disable("inline").parse("".join(lines)):
        raw = token.type == "html_block" and RAW_HTML.match(token.content)
        if raw or token.type in ("fence", "code_block"):
            inside.update(range(*token.map))
        closing = rf"[\s>]*{token.markup}[{token.markup[:1]}]*\s*"
        if token.type == "fence" and not re.fullmatch(closing, lines[token.map[1] - 1]):
            unclosed = token.map[0]
    return inside, unclosed


def read_markers(lines: Sequence[str], inside_code: set[int]) -> tuple[list[tuple[int, str, str]], dict[int, str]]:
    """([(line index, name, START or END)], {line index: what is wrong with a marker}). Code is text."""
    found, problems = [], {}
    for i, line in enumerate(lines):
        if i in inside_code or "<" not in line:
            continue
        exact = MARKER.fullmatch(line.strip())
        if exact and exact[1] in NAMES:
            found.append((i, exact[1], exact[2]))
            continue
        for comment in COMMENT.finditer(CODE_SPAN.sub("", line[:10_000])):
            known = MARKER.fullmatch(comment[0])
            if comment.start() and comment.string[comment.start() - 1] == "\\":
                continue  # escaped, so no comment
            if known and known[1] in NAMES:
                problems.setdefault(i, f"{comment[0]} must stand alone on its line")
            elif remedy := meant(comment[1]):
                problems.setdefault(i, f"{comment[0].strip()} is no marker: {remedy}")
    return found, problems


def meant(text: str) -> str:
    """What to write in place of a comment that was surely meant as a marker; "" for any other comment.

    It was, if it is AUTO, some word and an edge with colons between, or if it is made of nothing but two or three words
    that are nearly AUTO, one of the names, and an edge."""
    words = re.findall(r"[A-Z0-9]+", text.upper())
    kinds = {"AUTO": ["AUTO"], "name": NAMES, "edge": EDGES}
    like = {
        k: m[0]
        for k, known in kinds.items()
        for w in words
        for m in [difflib.get_close_matches(w, known, 1, 0.74)]
        if m
    }
    strict = re.fullmatch(r"\s*AUTO\s*:\s*\w+\s*:\s*(START|END)\s*", text, re.I)
    joined = re.search(r"[:;_/.-]", text) or len(like) == 3
    if not strict and not (2 <= len(like) == len(words) and joined):
        return ""
    if "name" not in like:
        return f"the blocks are {', '.join(NAMES)}"
    return f"write <!--AUTO:{like['name']}:{EDGES[like.get('edge', 'START')]}-->"


# ======================================================================================================================
# Writing
# ======================================================================================================================


@dataclass(frozen=True)
class Change:
    """A file as it is (None: it isn't there) and as it should be."""

    path: Path
    old: bytes | None
    new: bytes

    def target(self) -> Path:
        return Path(os.path.realpath(self.path))  # through a link, which stays

    def part(self) -> Path:
        return self.target().with_name(f".{self.path.name[:40]}.{os.getpid()}.part")

    def stage(self) -> None:
        """Puts the new content on the disk, beside the file. Raises ReadmeError if that can't be done."""
        try:
            self.target().parent.mkdir(parents=True, exist_ok=True)
            with open(self.part(), "wb") as f:
                f.write(self.new)
                f.flush()
                os.fsync(f.fileno())
            if self.old is not None:
                shutil.copymode(self.target(), self.part())
        except OSError as e:
            raise ReadmeError(f"{self.path} can't be written ({e.strerror}): nothing was changed") from None

    def diff(self) -> str:
        if self.path.suffix == ".svg":
            return f"{self.path}: would be drawn anew\n"
        old, new = (lines_of(text_of(data)) for data in (self.old, self.new))
        lines = difflib.unified_diff(old, new, str(self.path), f"{self.path} (updated)")
        return "".join(
            line if line.endswith(("\n", "\r")) else f"{line}\n\\ No newline at end of file\n" for line in lines
        )


def write(changes: Sequence[Change]) -> None:
    """All of the files or, if one can't be written, none of them."""
    try:
        for change in changes:
            change.stage()
        for change in changes:
            os.replace(change.part(), change.target())
    finally:
        for change in changes:
            change.part().unlink(missing_ok=True)


def text_of(data: bytes | None) -> str:
    return (data or b"").decode("utf-8", "surrogateescape")  # bytes that aren't UTF-8 come back as they were


def lines_of(text: str) -> list[str]:
    """With their ends: as Markdown sees them, a bare \\r is one."""
    return re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+\Z", text)


def plan(readme: Path, run_dir: Path, assets_dir: Path) -> tuple[list[Change], list[str]]:
    """(the files as they should be, what to tell the user). Writes nothing.

    Raises ReadmeError for broken markers or a run that can't be read."""
    old = readme.read_bytes()
    text = text_of(old)
    bom = "\ufeff" * text.startswith("\ufeff")
    lines = lines_of(text.removeprefix(bom))
    blocks = find_blocks(lines, str(readme))
    if not blocks:
        raise ReadmeError(
            f"{readme} has no block: put <!--AUTO:SUMMARY:START--> and <!--AUTO:SUMMARY:END--> on two lines"
        )
    run, notes = read_run(run_dir, relative(run_dir, readme.parent))
    if "COMPARE" in blocks:
        run = replace(run, beside=published_beside(run, run_dir, readme.parent))
    if "HELDOUT" in blocks:
        run = replace(run, held_out=published_beside(run, run_dir, readme.parent, "held_out"))
    changes = []
    for name, (start, end) in sorted(blocks.items(), key=lambda item: item[1], reverse=True):  # so that indices hold
        content = BLOCKS[name](run)
        shown = largest_held_out(run) if name == "HELDOUT" else run
        if name in PICTURES and shown and shown.rows:
            draw, words = PICTURES[name]
            path = assets_dir / f"{name.lower()}.svg"
            changes.append(Change(path, path.read_bytes() if path.exists() else None, draw(shown)))
            link = urllib.parse.quote(os.fsencode(relative(path, readme.parent)))
            content = f"{content}\n\n![{plain(words(shown))}]({link})".strip()
        # As far to the right as the marker, so that it stays in the same list item.
        indent, newline = re.match(r"([ \t]*).*?([\r\n]+)\Z", lines[start]).groups()
        lines[start + 1 : end] = [
            (indent + line).rstrip(" \t" if not line else "") + newline for line in ("", *content.split("\n"), "")
        ]
    if find_blocks(lines, str(readme)).keys() != blocks.keys():
        raise ReadmeError(f"{readme}: a block can't stand where it does: put its markers at the start of their lines")
    changes.append(Change(readme, old, (bom + "".join(lines)).encode("utf-8", "surrogateescape")))
    if lacking := [name for name in BLOCKS if name not in blocks]:
        notes.append(f"{readme} has no block {', '.join(lacking)}: left alone")
    return changes, notes


BLOCKS: dict[str, Callable[[Run], str]] = {
    "SUMMARY": summary,
    "CURVE": lambda run: "" if run.rows else "There is no curve yet, since no step has been logged.",
    "METRICS": metrics,
    "SAMPLES": samples,
    "LOGS": logs,
    "REPRODUCE": reproduce,
    "COMPARE": compare,
    "HELDOUT": held_out,
    "FLAGS": lambda run: flags(HERE / "train.py"),
}


# (the picture that a block ends with, what it shows in words)
PICTURES: dict[str, tuple[Callable[[Run], bytes], Callable[[Run], str]]] = {
    "CURVE": (curve, describe),
    "COMPARE": (comparison, describe_comparison),
    "HELDOUT": (curve, describe),
}


def relative(path: Path, base: Path) -> str:
    """The path seen from `base`, so that it doesn't matter from where the program is called."""
    try:
        return Path(os.path.relpath(path, base)).as_posix()
    except ValueError:  # two drives of Windows
        return path.as_posix()


# ======================================================================================================================
# Command line
# ======================================================================================================================


def build_parser() -> argparse.ArgumentParser:
    about, examples = (__doc__ or "\n\n").split("\n\n")[:2]
    examples = re.sub(r"(?m)^ +(.*?) +# (.*)$", r"  # \2\n  \1", examples)  # within 80 columns
    parser = argparse.ArgumentParser(
        "update_readme.py",
        "python update_readme.py [--run_dir DIR] [--check | --diff] ...",
        textwrap.fill(about, 79, break_on_hyphens=False),
        f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
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
    try:
        if not args.readme.is_file():
            return say(f"update_readme.py: {args.readme} isn't a file: name one with --readme", to=sys.stderr) or 2
        changes, notes = plan(args.readme, args.run_dir, args.assets_dir or args.readme.parent / "assets")
        stale = [change for change in changes if change.old != change.new]
        if not (args.check or args.diff):
            write(stale)
    except ReadmeError as e:
        return say(str(e), to=sys.stderr) or 1
    except OSError as e:
        return say(f"update_readme.py: {e.strerror or e} ({e.filename or 'no file named'})", to=sys.stderr) or 1
    again = ["python", "update_readme.py", "--run_dir", args.run_dir, "--readme", args.readme]
    again += ["--assets_dir", args.assets_dir] if args.assets_dir else []
    remedy = f"is stale: {shlex.join(map(str, again))} brings it up to date"
    done = remedy if args.check else "would change" if args.diff else "written"
    notes += [f"{change.path}: {done if change in stale else 'already up to date'}" for change in changes]
    say("\n".join(notes), to=sys.stderr if args.diff else sys.stdout)
    if args.diff:
        say("".join(change.diff() for change in stale).removesuffix("\n"), to=sys.stdout)
    return 5 if args.check and stale else 0


def say(text: str, to) -> None:
    """Prints, if there is anything to print to; characters that the terminal lacks are shown by their numbers."""
    if to and text:
        with contextlib.suppress(OSError):
            encoding = getattr(to, "encoding", None) or "utf-8"
            print(text.encode(encoding, "backslashreplace").decode(encoding), file=to, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
