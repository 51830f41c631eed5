"""A run's directory: its paths, lock, log, run.json and TensorBoard's files."""

from __future__ import annotations

import contextlib
import csv
import errno
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

from tqdm import tqdm

from support import source
from support.checkpoint import changes_since, load_checkpoint
from support.cli import DamagedError, RunError, UsageError, is_out_of_memory, say
from support.files import atomic_write, lock_file, odd_kind, replace
from support.machine import machine_problems, shared_grad_accum

ROOT = Path(__file__).resolve().parent.parent
ENDINGS = ("target reached", "steps done", "patience over")  # of a run that has nothing more to do
TEXTS = 10**6  # bytes that must be free for log, rows and samples
# Settings that belong to one start and not to the run.
ONE_START = ("resume", "overwrite", "preset", "out_dir", "init_from")


class RunDirectory:
    """Paths of one run's files, and what is done with them before it starts and after it ends."""

    def __init__(self, out_dir: str | Path):
        self.root = Path(out_dir)
        self.log_file = self.root / "logs" / "train.log"
        self.metrics = self.root / "logs" / "train_metrics.csv"
        self.samples = self.root / "samples" / "samples.txt"
        self.last = self.root / "checkpoints" / "last.pt"
        self.previous = self.root / "checkpoints" / "previous.pt"
        self.aside = self.root / "checkpoints" / "aside.pt"  # the last.pt of a run that went back to an earlier one
        self.best = self.root / "checkpoints" / "best.pt"
        self.record = self.root / "run.json"
        self.board = self.root / "tensorboard"

    def files(self) -> list[Path]:
        checkpoints = [self.last, self.previous, self.aside, self.best]
        return [self.log_file, self.metrics, self.samples, *checkpoints, self.record]

    def holds_a_run(self) -> bool:
        return any(os.path.exists(path) for path in self.files())  # unlike Path.exists, False for an impossible name

    # ---- before a run ----

    def problems(self, overwrite: bool, resume: str) -> list[str]:
        """Why a run can't begin in here, before it finds out."""
        problem = self.overwrite_problem(overwrite, resume)
        if problem:
            return [problem, *self.write_problems()]
        return self.write_problems()

    def write_problems(self) -> list[str]:
        for path in self.files():
            problem = self.path_problem(path)
            if problem:
                return [problem]
        return []

    def path_problem(self, path: Path) -> str:
        try:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.lstat(path)  # raises for what can't be a path, such as a name that is too long
            existing = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
            if existing != path and existing.is_file():
                return f"out_dir {self.root} can't be made, since {existing} is a file: choose another --out_dir"
            odd = odd_kind(existing)
            if odd and (existing == path or not existing.is_dir()):
                remedy = "move it away, or choose another --out_dir"
                return f"out_dir {self.root} can't be written, since {existing} is {odd}: {remedy}"
            if not os.access(existing, os.W_OK):
                remedy = f"change the permissions of {existing}, or choose another --out_dir"
                return f"out_dir {self.root} can't be written: {remedy}"
        except (OSError, ValueError) as e:  # ValueError: a NUL in the name
            why = getattr(e, "strerror", None) or e
            return f"out_dir {str(self.root)[:80]!r} can't be used ({why}): choose another --out_dir"
        return ""

    def overwrite_problem(self, overwrite: bool, resume: str) -> str:
        """An existing run is never overwritten silently: what to do in place of it, "" where there is nothing."""
        if overwrite or not self.holds_a_run() or self.can_go_on(resume):
            return ""
        remedy = "add --resume auto to continue it, --overwrite to replace it"
        if resume == "auto":
            remedy = "its last.pt is gone, so use --overwrite to replace it"
        return f"out_dir {self.root} already holds a run: {remedy}, or another --out_dir"

    def can_go_on(self, resume: str) -> bool:
        """Does `--resume` continue the run in here? auto also begins anew a run that left no checkpoint yet."""
        if resume == "auto":
            saved = self.last.exists() or self.previous.exists()
            return saved or self.read_record().get("ended") not in ENDINGS
        return bool(resume) and Path(resume).resolve().parent == self.last.resolve().parent

    def check_space(self, needed: int) -> None:
        """Raises RunError unless the checkpoints of a run, `needed` bytes of them, fit, and beside them its log."""
        mine = sum(path.stat().st_size for path in (self.last, self.previous, self.best) if path.exists())
        free = shutil.disk_usage(self.root).free
        if free + mine < needed:
            raise RunError(
                f"out_dir {self.root} has {(free + mine) / 1e9:.3g} GB free for checkpoints, and two of them with"
                f" best.pt take {needed / 1e9:.3g} GB: make room, or choose an --out_dir on another disk"
            )
        if free < TEXTS:
            raise RunError(
                f"out_dir {self.root} has {free / 1e6:.2f} MB free, and log, rows and samples take at least"
                f" {TEXTS / 1e6:.0f} MB beside the checkpoints: make room, then try again"
            )

    @contextlib.contextmanager
    def lock(self):
        """Held while a run writes here. Raises UsageError if another one does; a dead process holds no lock."""
        self.root.mkdir(parents=True, exist_ok=True)
        with open(self.root / "lock", "a+", encoding="utf-8") as f:
            try:
                lock_file(f)
            except OSError as e:
                if e.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):  # else: a drive that knows no locks
                    f.seek(0)
                    holder = f.read() or "unknown"
                    raise UsageError(
                        f"out_dir {self.root} is in use by another run (process {holder}): wait for it, stop it, or"
                        " choose another --out_dir"
                    ) from None
            f.truncate(0)
            with contextlib.suppress(OSError):  # no room: the lock holds without the number
                os.write(f.fileno(), str(os.getpid()).encode())
            yield

    def prepare(self, overwrite: bool, resumed: Path | None) -> None:
        """Makes the folders and removes what a killed run left half written; with `overwrite`, also an earlier run's
        files and nothing else. The checkpoint that is resumed becomes last.pt: rows are about to be cut to its step."""
        for file in self.files():
            file.parent.mkdir(parents=True, exist_ok=True)
            if overwrite or (file == self.best and not resumed):
                file.unlink(missing_ok=True)
        if overwrite:
            for file in self.board.glob("events.out.tfevents.*"):
                file.unlink()
        for part in (*self.root.glob("*.part"), *self.root.glob("*/*.part")):
            part.unlink(missing_ok=True)
        if resumed and resumed.resolve() != self.last.resolve():
            self.make_last(resumed)

    def make_last(self, checkpoint: Path) -> None:
        """Puts a copy of a checkpoint in last.pt's place, and last.pt aside."""
        part = self.last.with_name("last.pt.resumed.part")
        try:
            os.link(checkpoint, part)
        except OSError:  # another disk, or a file system without links
            shutil.copyfile(checkpoint, part)
        if self.last.exists():
            replace(self.last, self.aside)
        replace(part, self.last)

    def find_checkpoint(self, resume: str, lazy: bool = False) -> tuple[Path, dict, str] | None:
        """(path, content, what is wrong with a newer one) of the checkpoint that `--resume` means; None where there is
        nothing to go on from. auto takes previous.pt where last.pt is damaged or missing.

        Raises RunError for a checkpoint that is named but can't be read, or if none in here can."""
        if not resume:
            return None
        if resume != "auto":
            return Path(resume), load_checkpoint(resume, lazy), ""
        problem = None
        for path in (self.last, self.previous):
            if not path.exists():
                continue
            try:
                return path, load_checkpoint(path, lazy), str(problem or "")
            except (DamagedError, UsageError) as e:  # the latter for a folder in its place
                problem = problem or e
        if problem:
            raise problem
        return None

    def saved_settings(self, resume: str, accumulates: bool = False) -> dict:
        """The settings of the run that `--resume` means, {} where there is none; its folder is what out_dir says.
        Another number of processes keeps the tokens of a step, unless a flag says how the run `accumulates` them.
        Raises UsageError where that can't be."""
        found = self.find_checkpoint(resume, lazy=True)
        if not found:
            return {}
        path, state, _ = found
        settings = {name: value for name, value in state["config"].items() if name not in ONE_START}
        folder = path.parent if path.parent.name else path.absolute().parent  # "last.pt" alone has no parents
        settings["out_dir"] = str(folder.parent if folder.absolute().name == "checkpoints" else self.root)
        if not accumulates:
            processes = state.get("made_on", {}).get("processes", 1)  # weights alone, refused later, don't say
            settings["grad_accum"] = shared_grad_accum(processes, state["config"]["grad_accum"])
        return settings

    def resume(self, trainer) -> tuple[Path | None, list[str]]:
        """Brings train.py's Trainer to the checkpoint that its `--resume` means. Returns the checkpoint's path, None
        where there is none, and what the log should say. Raises UsageError or RunError for one that won't do."""
        found = self.find_checkpoint(trainer.given.resume)
        trainer.runtime.check_alike({"the step to go on from": found[1]["step"] if found else 0})
        if not found:
            return None, []
        path, state, problem = found
        notes = [f"{problem}. Resumed from {path}"] if problem else []
        try:
            trainer.load_state_dict(state)
            return path, notes + changes_since(state, trainer)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as e:
            if is_out_of_memory(e):
                raise
            raise RunError(f"checkpoint {path} lacks what a run needs ({e!r:.80}): use another one") from e

    # ---- run.json ----

    def write_record(self, record: dict) -> None:
        text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        with atomic_write(self.record) as f:
            f.write(text.encode())

    def read_record(self) -> dict:
        """{} where there is none that can be read."""
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}


def start_problems(config) -> Iterator[tuple[str, str]]:
    """Yields (settings, what to do about them) of what keeps a run from starting: a device, a
    package, a folder, a text that isn't there."""
    if config.resume and config.overwrite:
        yield "resume overwrite", "resume and overwrite exclude each other: give one of them"
    if config.init_from and config.resume not in ("", "auto"):
        yield "init_from resume", "init_from starts a run, and resume goes on with one: give one of them"
    for problem in machine_problems(config.device, config.amp):
        yield "device amp", problem
    if not config.out_dir:
        yield "out_dir", "out_dir is empty: name a folder for the run"
    else:
        for problem in RunDirectory(config.out_dir).problems(config.overwrite, config.resume):
            yield "out_dir", problem
    yield from source.problems(config)


# ---- finding a run ----


def chosen_checkpoint(program: str, given: Path | None) -> Path:
    """The checkpoint that --checkpoint names or, without it, that of the newest run in out*/, which is then said on
    stderr. Raises UsageError if there is none."""
    if given:
        return given
    found = []
    for folder in Path().glob("out*"):
        run_dir = RunDirectory(folder)
        path = run_dir.best if run_dir.best.is_file() else run_dir.last
        if path.is_file():
            found.append(path)
    if not found:
        train = "python train.py --preset demo"
        raise UsageError(f"there is no run in out*/ yet: train one ({train}), or name a --checkpoint")
    newest = max(found, key=lambda path: path.stat().st_mtime)
    say(program, f"reading {newest}, of the newest run in out*/")
    return newest


def run_around(checkpoint: Path) -> Path | None:
    """The run directory that a checkpoint lies in, if it has records. Of a checkpoint that lies elsewhere, the folders
    above may be anybody's."""
    folder = checkpoint.absolute().parent
    if folder.name == "checkpoints" and (folder.parent / "run.json").is_file():
        return folder.parent
    return None


# ---- going back to a step ----


def rewind_rows(path: Path, fields: Sequence[str], step: int) -> int:
    """Drops rows of the CSV past a step, which the run makes again from there, and torn ones. Returns the step of the
    last row that stays (-1: none). A column that an older program didn't write yet is `unknown`."""
    if not path.exists():
        return -1
    lines = path.read_text(encoding="utf-8", errors="replace").replace("\0", "").splitlines()
    rows = [row for row in csv.reader(lines) if row and row[0].isdigit()]
    # all rows have the width of the fullest; an older file has no mfu
    width = max((len(row) for row in rows if len(fields) - 1 <= len(row) <= len(fields)), default=len(fields))
    kept = [row for row in rows if len(row) == width and int(row[0]) <= step]
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, restval="unknown", lineterminator="\n")
    writer.writeheader()
    for row in kept:
        writer.writerow(dict(zip(fields, row, strict=False)))
    with atomic_write(path) as f:
        f.write(text.getvalue().encode())
    return int(kept[-1][0]) if kept else -1


def rewind_samples(path: Path, rule: str, step: int) -> int:
    """Drops blocks of samples past a step. Returns the step of the last one that stays (-1: none)."""
    if not path.exists():
        return -1
    text = path.read_bytes().decode("utf-8", "replace")  # read_text would change a sampled \r
    blocks = re.findall(rf"^({rule}\nSTEP (\d+)\n.*?)(?=^{rule}\nSTEP|\Z)", text, re.M | re.S)
    kept = [(block, int(number)) for block, number in blocks if int(number) <= step]
    with atomic_write(path) as f:
        f.write("".join(block for block, _ in kept).encode())
    return kept[-1][1] if kept else -1


# ---- where a run comes from ----


def git_commit() -> str | None:
    """The commit that this program is at, marked if files were changed since."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "tiktoken")}
    return {"python": platform.python_version(), **packages, "platform": platform.platform()}


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


# ---- the log ----


def show(text: str) -> None:
    """Prints above the progress bar. A terminal that went away, or lacks a character, is no reason to end a run."""
    if sys.stdout is None:
        return
    encoding = sys.stdout.encoding or "utf-8"
    try:
        tqdm.write(text.encode(encoding, "replace").decode(encoding), file=sys.stdout)
        sys.stdout.flush()
    except OSError:
        sys.stdout = None


class TerminalHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.ERROR:  # main() says errors on stderr
            show(record.getMessage())


@contextlib.contextmanager
def open_log(run_dir: RunDirectory, enabled: bool):
    """The run's logger: to the terminal and, with times, to train.log. Silent in all processes but the first."""
    logger = logging.Logger("train")  # not getLogger: two runs in one process must not share handlers
    if not enabled:
        logger.addHandler(logging.NullHandler())
        yield logger
        return
    file = logging.FileHandler(run_dir.log_file, encoding="utf-8", errors="backslashreplace")
    file.setFormatter(logging.Formatter("%(asctime)s | %(levelname)s | %(message)s"))
    file.handleError = lambda record: None  # a full disk is reported once, by what can't do without it
    logger.addHandler(file)
    logger.addHandler(TerminalHandler())
    try:
        yield logger
    finally:
        file.close()
