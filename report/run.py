"""Reads what a run wrote into its directory, and copes with what is missing or half written.

    RUN/run.json                 how the run was made and how it ended
    RUN/logs/train_metrics.csv   a row for each logged step, with at least the columns step and loss
    RUN/logs/train.log           stands in for the CSV where that has no steps
    RUN/samples/samples.txt      blocks of a rule of `=`, `STEP n`, and for each prompt `PROMPT:` and `OUTPUT:`

Runs of other programs are read too: their files may stand at other places under similar names."""

from __future__ import annotations

import csv
import functools
import json
import math
import os
import re
import shlex
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from report.lines import read_lines
from report.log import Log, Row
from report.markdown import harmless

# What other programs call the columns of their CSV.
ALIASES = {"global_step": "step", "iter": "step", "iteration": "step", "train_loss": "loss", "learning_rate": "lr"}
# The columns that are read, and how tables show them.
FORMATS = {
    "step": ".0f",
    "epoch": ".2f",
    "tokens": ",.0f",
    "loss": ".6f",
    "avg_loss": ".6f",
    "val_loss": ".6f",
    "lr": ".2e",
    "grad_norm": ".3f",
    "load_entropy": ".4f",
    "busiest": ".4f",
    "tok_per_s": ",.1f",
    "elapsed_s": ",.1f",
}
SAMPLE_HEAD = re.compile(r"^={20,}[ \t]*\n+STEP[ \t:]+(\d{1,15})[^\n]*\n", re.M)
LEFT_OUT_NAMED = 3  # rows of a CSV that are left out and named one by one; the others are counted

Sample = tuple[int | None, str]  # (step, text) of a block of samples.txt; None where the step isn't on record


class ReadmeError(Exception):
    """Broken markers, or a run that can't be read. Each problem is one sentence, with file and line."""


def finite(value) -> float | None:
    """The value, if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if not abs(value) < sys.float_info.max:  # also false for nan, and an int may be too large for a float
        return None
    return float(value)


def under_or_not(loss: float, target: float) -> str:
    """The target is strict: a loss that equals it isn't under it."""
    return "under" if loss < target else "not under"


def thin(n: int, most: int) -> list[int]:
    """At most `most` of the indices 0 .. n-1, evenly spaced, the first and the last among them."""
    if n <= most:
        return list(range(n))
    return [round(i * (n - 1) / (most - 1)) for i in range(most)]


def relative(path: Path, base: Path) -> str:
    """The path seen from `base`, so that it doesn't matter from where the program is called."""
    try:
        return Path(os.path.relpath(path, base)).as_posix()
    except ValueError:  # two drives of Windows
        return path.as_posix()


# ---- A run ----


@dataclass(frozen=True)
class Run:
    """A run directory, as far as it could be read."""

    folder: str  # as the README names it
    record: dict  # run.json; {} where there is none
    rows: list[Row]  # the logged steps, each once, in order
    log: Log
    samples: list[Sample]  # in the order in which they were written
    beside: tuple[Run, ...] = ()  # the published runs on the same text
    held_out: tuple[Run, ...] = ()  # the published runs that held some of it out

    def number(self, key: str) -> float | None:
        return finite(self.record.get(key))

    def text(self, key: str) -> str | None:
        value = self.record.get(key)
        if isinstance(value, str) and value.strip():
            return value
        return None

    def part(self, name: str) -> dict:
        """An object in run.json; {} where there is none."""
        value = self.record.get(name)
        return value if isinstance(value, dict) else {}

    @functools.cached_property
    def found(self) -> dict[str, list[Row]]:
        """What with_figure found: it is asked often, and there may be a million rows."""
        return {}

    def with_figure(self, key: str) -> list[Row]:
        """The rows that have a finite `key`. For avg_loss: only those since it is the mean of what it should be of."""
        if key in self.found:
            return self.found[key]
        rows = [row for row in self.rows if math.isfinite(row.get(key, math.nan))]
        if key == "avg_loss" and self.avg_steps():
            rows = [row for row in rows if row["step"] >= self.avg_steps()]
        elif key == "avg_loss":
            rows = [row for row in rows if row.get("epoch", 1) >= 1]
        self.found[key] = rows
        return rows

    def best(self, key: str) -> Row | None:
        """The first row with the lowest `key`."""
        return min(self.with_figure(key), key=lambda row: row[key], default=None)

    def measure(self) -> str:
        """The loss that tells most: avg_loss, where there is one of a full pass."""
        return "avg_loss" if self.best("avg_loss") else "loss"

    def avg_steps(self) -> float:
        """Of a run on a stream, which has no pass: how many steps avg_loss is the mean of. 0 for a run on a text."""
        if "tokens" not in self.part("corpus") or self.part("corpus")["tokens"] is not None:
            return 0.0
        return finite(self.settings().get("avg_steps")) or 0.0

    def averaged_over(self) -> str:
        """What avg_loss is the mean over."""
        steps = self.avg_steps()
        return f"the last {steps:,.0f} steps" if steps else "a full pass"

    def settings(self) -> dict:
        """The configuration, from run.json or else from the log's line `Args: {...}`."""
        config = self.record.get("config")
        if isinstance(config, dict):
            return config
        return self.log.settings()

    def target_loss(self) -> float:
        """0 where there is none."""
        target = finite(self.record.get("target_loss", self.settings().get("target_loss")))
        if target is None:
            return 0.0
        return max(0.0, target)

    def proven_over(self) -> str:
        """What final_loss is the mean over."""
        if self.avg_steps():
            return "the held-out documents"
        if finite(self.part("corpus").get("held_out")):
            return "all of the text but what was held out"
        return "the whole text"

    def latest_sample(self) -> Sample:
        """The latest that has any output, or else any text; (None, "") where there is none."""
        for pattern in (r"^OUTPUT:\s*\S", r"\S"):
            for step, text in reversed(self.samples):
                if step is None or re.search(pattern, text, re.M):
                    return step, text
        return None, ""


def read_run(folder: Path, name: str) -> tuple[Run, list[str]]:
    """(the run, notes on what was passed over). Raises ReadmeError where there is no run, or one that can't be read."""
    notes: list[str] = []
    log_file = find(folder, "logs/train.log", r"\.log$", notes)
    csv_file = find(folder, "logs/train_metrics.csv", r"(metric|loss|train|log|history).*\.csv$", notes)
    sample_file = find(folder, "samples/samples.txt", r"sample.*\.txt$", notes)
    record_file = folder / "run.json"
    if not (log_file or csv_file or sample_file or record_file.is_file()):
        raise ReadmeError(f"{folder} holds no run: {where_a_run_is(folder)}")
    record = read_record(record_file)
    rows = read_metrics(csv_file, notes) if csv_file else []
    log = Log()
    steps = log.read(log_file) if log_file else iter(())
    if rows:
        deque(steps, maxlen=0)  # reads them, and keeps none
    else:
        rows = in_order(steps)
        if rows:
            notes.append(f"{folder} has no CSV with steps: the log serves")
    samples = read_samples(sample_file) if sample_file else []
    return Run(harmless(name), record, rows, log, samples), notes


def where_a_run_is(folder: Path) -> str:
    """A hint for a user who named the folder above the run."""
    below = [path.parent for path in folder.glob("*/run.json")]
    below += [path.parent.parent for path in folder.glob("*/logs/train.log")]
    if not below:
        return "train first, or name another --run_dir"
    first = min(below)
    return f"there is one in {first}: use --run_dir {shlex.quote(str(first))}"


# ---- Files ----


def find(folder: Path, usual: str, pattern: str, notes: list[str]) -> Path | None:
    """The file at its usual place, or else the last by name that fits the pattern, in the folder or one below."""
    if (folder / usual).is_file():
        return folder / usual
    others = []
    for path in (*folder.glob("*"), *folder.glob("*/*")):
        if re.search(pattern, path.name, re.I) and path.is_file():
            others.append(path)
    if not others:
        return None
    last = max(others, key=in_natural_order)
    notes.append(f"{folder / usual} isn't there: {last} serves")
    return last


def in_natural_order(path: Path) -> list[str | int]:
    """A sort key by which run_9 comes before run_10: every second part is a number."""
    parts: list[str | int] = list(re.split(r"(\d+)", path.as_posix()))
    parts[1::2] = map(int, parts[1::2])
    return parts


def read_text(path: Path) -> str:
    """A text file of any newline style, in UTF-8, or in UTF-16 as PowerShell writes it; the newlines become \\n."""
    data = path.read_bytes()
    encoding = "utf-8-sig"
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    text = data.decode(encoding, "replace")
    return "\n".join(line.rstrip("\r") for line in text.split("\n"))


def read_record(path: Path) -> dict:
    """run.json; {} where there is none."""
    if not path.is_file():
        return {}
    remedy = "mend it, or remove it to go by the log"
    try:
        record = json.loads(read_text(path))
    except json.JSONDecodeError as e:
        raise ReadmeError(f"{path}:{e.lineno}: this isn't JSON ({e.msg}): {remedy}") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, or brackets inside brackets
        raise ReadmeError(f"{path}:1: this is JSON beyond all measure: {remedy}") from None
    if not isinstance(record, dict):
        raise ReadmeError(f"{path}:1: this isn't a JSON object: {remedy}")
    return record


def read_samples(path: Path) -> list[Sample]:
    """The blocks of samples.txt; a file without such blocks is one."""
    parts = SAMPLE_HEAD.split(read_text(path))  # text before the first block, then step, text, step, text ...
    if len(parts) == 1:
        return [(None, parts[0].strip("\n"))]
    return [(int(step), text.strip("\n")) for step, text in zip(parts[1::2], parts[2::2], strict=True)]


# ---- The CSV ----


def read_metrics(path: Path, notes: list[str]) -> list[Row]:
    """The CSV's rows, each step once. What is left out is noted."""
    lines = numbered_lines(path)
    number, first_line = next(lines, (0, ""))
    if not first_line:
        return []
    header = read_header(first_line)
    if "step" not in header or "loss" not in header:
        notes.append(f"{path}:{number}: the columns step and loss aren't there")
        return []
    rows, left_out = read_rows(lines, first_line, header)
    for number, why in left_out[:LEFT_OUT_NAMED]:
        notes.append(f"{path}:{number}: row left out, since {why}")
    if len(left_out) > LEFT_OUT_NAMED:
        notes.append(f"{path}: {len(left_out) - LEFT_OUT_NAMED} more rows left out")
    kept = in_order(rows)
    steps = {row["step"] for row in kept}
    gone = [row for row in rows if row["step"] not in steps]
    if gone:
        notes.append(f"{path}: {len(gone)} rows left out, since the run went back behind their steps")
    return kept


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line) of each that isn't blank, with its end."""
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            yield number, line


def read_header(line: str) -> list[str]:
    """The names of the columns, by the names that FORMATS has."""
    names = [name.strip(' "\n').lower() for name in line.split(",")]
    header = []
    for name in names:
        known = ALIASES.get(name, name)
        if known in names:  # a column that has the name already wins over one that only means the same
            known = name
        header.append(known)
    return header


def read_rows(
    lines: Iterable[tuple[int, str]], first_line: str, header: Sequence[str]
) -> tuple[list[Row], list[tuple[int, str]]]:
    """(the rows below the header, (line number, why) of each line that is no row)."""
    columns = [(i, key) for i, key in enumerate(header) if key in FORMATS]
    rows = []
    left_out = []
    for number, line in lines:
        may_be_cut = not line.endswith("\n")
        cells = read_cells(line)
        row = read_row(cells, columns, may_be_cut) if len(cells) == len(header) else None
        if row:
            rows.append(row)
        elif line.strip() == first_line.strip():
            continue  # the header again, of a run that was begun anew, is no loss
        elif may_be_cut:
            left_out.append((number, "it has no line end, so it may be cut"))
        else:
            left_out.append((number, f"it isn't {len(header)} cells, of which one is the step"))
    return rows, left_out


def read_row(cells: Sequence[str], columns: Sequence[tuple[int, str]], may_be_cut: bool) -> Row | None:
    """The figures of a line, given (place, name) of each column that is read, or None. Where the line may be cut, its
    last figure doesn't count."""
    row: Row = {}
    for i, key in columns:
        if may_be_cut and i == len(cells) - 1:
            continue
        try:
            row[key] = float(cells[i])
        except ValueError:
            continue  # an empty cell, or words
    step = finite(row.pop("step", None))
    if step is None or not row:
        return None
    if may_be_cut and "loss" not in row:
        return None
    return {"step": int(step), **row}


def read_cells(line: str) -> list[str]:
    try:
        return next(csv.reader([line.replace("\0", "")], skipinitialspace=True))
    except csv.Error:
        return []


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Each step once: a run that was resumed from an earlier step made those after it again.

    A row without a loss, as that of a held-out loss may be, adds its figures to the row of its step."""
    kept: list[Row] = []
    for row in rows:
        if kept and kept[-1]["step"] == row["step"] and "loss" not in row:
            kept[-1] = kept[-1] | row
            continue
        while kept and kept[-1]["step"] >= row["step"]:
            kept.pop()
        kept.append(row)
    return kept
