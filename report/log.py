"""Reads a log: the figures of its steps, and the few lines that are shown of it."""

from __future__ import annotations

import ast
import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from report.lines import read_lines

LOG_LINE = re.compile(r"(?P<time>\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)[,.\d]*Z? *\| *\w+ *\| *(?P<message>.*)")
# All below are for lines in lower case.
# The message of a step begins with `step 10/30`; its figures stand behind that.
LOG_STEP = re.compile(r"(?:^|[|\]:>]\s{0,9})(?:global_)?(?:step|iter|iteration)[ :=]{1,12}(\d[\d,]{0,14})\b")
NUMBER = r"[ :=]{1,12}([-+]?(?:\d[\d,]*\.?\d*(?:e[-+]?\d+)?|nan|inf))(?![\w%]|\.\w)"
# The word comes first, and then what may stand before it: so a line that lacks the word is passed over at once.
LOG_FIGURES = {
    "loss": re.compile(rf"loss(?<!best loss)(?<!val loss)(?:(?<=\bloss)|(?<=\btrain_loss)){NUMBER}"),
    "lr": re.compile(rf"lr(?<=\blr){NUMBER}"),
    "tok_per_s": re.compile(rf"tok/s(?<=\btok/s){NUMBER}"),
    "avg_loss": re.compile(rf"avg_loss(?<=\bavg_loss){NUMBER}"),
    "val_loss": re.compile(rf"val[_ ]loss(?<=\bval.loss){NUMBER}"),
    "epoch": re.compile(rf"epoch(?<=\bepoch){NUMBER}"),
}
OPENING = 20  # lines that are kept of a log's beginning
STEPS = 1000  # lines that are kept of its steps

Row = dict[str, float]  # the figures of a logged step
Line = tuple[int, str]  # (its place in the log, counted from 0; the line)


class Log:
    """What is kept of a log, which may have a million lines: its opening, some steps, and all behind the last one."""

    def __init__(self):
        self.count = 0  # lines
        self.opening: list[Line] = []
        self.steps = Spread(STEPS)
        self.last_step: Line | None = None
        self.behind: list[Line] = []
        self.args: list[str] = []  # what stands behind each `Args: `

    def read(self, path: Path) -> Iterator[Row]:
        """Reads a file, and yields the figures of its steps. A last line without an end is left out if it seems to be
        cut."""
        for text in read_lines(path):
            has_end = text.endswith("\n")
            lines = text.removesuffix("\n").split("\r")  # a progress bar goes back by a bare \r
            for i, line in enumerate(lines, 1):
                if i == len(lines) and not has_end and self.seems_cut(line):
                    return
                row = step_of(line)
                self.add(line, is_step=bool(row))
                if row:
                    yield row

    def add(self, text: str, is_step: bool) -> None:
        line = (self.count, text)
        self.count += 1
        if len(self.opening) < OPENING:
            self.opening.append(line)
        if "Args: " in text:
            self.args.append(text.partition("Args: ")[2])
        if is_step:
            self.steps.add(line)
            self.last_step = line
            self.behind = []
        else:
            self.behind.append(line)

    def seems_cut(self, last: str) -> bool:
        """A step's line is cut if it looks unlike the step before it; another line if it has no words."""
        if not LOG_STEP.search(last[:500].lower()):
            return not re.search(r"[^\W\d]", last)
        return not self.last_step or form(last) != form(self.last_step[1])

    def is_empty(self) -> bool:
        return not self.last_step and not any(text.strip() for _, text in self.behind)

    def some_steps(self) -> list[Line]:
        """Lines of steps, evenly spaced, the first and the last among them."""
        if self.steps.kept[-1:] in ([], [self.last_step]):
            return self.steps.kept
        return [*self.steps.kept, self.last_step]

    def settings(self) -> dict:
        """From the line `Args: {...}` of the last start; {} where there is none."""
        for text in reversed(self.args):
            args = read_args(text)
            if args is not None:
                return args
        return {}

    def closing(self) -> list[tuple[str, str]]:
        """(time, message) of each line behind the last step, or else of that step, or else of the last line."""
        found = timed(self.behind)
        if not self.last_step:
            return found[-1:]
        return found or timed([self.last_step])


class Spread:
    """Evenly spaced items of a stream, the first among them: where they become too many, every second one goes."""

    def __init__(self, most: int):
        self.most = most
        self.kept = []
        self.every = 1
        self.count = 0

    def add(self, item) -> None:
        if self.count % self.every == 0:
            self.kept.append(item)
        self.count += 1
        if len(self.kept) > self.most:
            self.kept = self.kept[::2]
            self.every *= 2


def timed(lines: list[Line]) -> list[tuple[str, str]]:
    """(time, message) of those that have a time."""
    found = []
    for _, text in lines:
        match = LOG_LINE.match(text)
        if match:
            found.append((match["time"].replace("T", " "), match["message"]))
    return found


def form(line: str) -> tuple[int, str]:
    """How many fields a step's line has, and how its last one looks, digit by digit behind the point."""
    last_field = line.rpartition("|")[2]
    shape = re.sub(r"\d+(?=\.|$)", "0", last_field, count=1)
    return line.count("|"), shape.replace("0.", ".")


def step_of(line: str) -> Row | None:
    """The figures of a log line that tells of a step; None if it doesn't."""
    line = line[:2000].lower()
    head = LOG_STEP.search(line[:500])
    if not head:
        return None
    row: Row = {"step": int(head[1].replace(",", ""))}
    for key, pattern in LOG_FIGURES.items():
        found = pattern.search(line, head.end())
        if found:
            row[key] = float(found[1].replace(",", ""))
    if "loss" in row or "val_loss" in row:
        return row
    return None


def read_args(text: str) -> dict | None:
    """The settings behind `Args: `: this program writes JSON there, other programs write Python."""
    if not text.startswith("{"):
        return None
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            value = read(text)
            if isinstance(value, dict):
                return value
    return None
