"""What the benchmarks share: flags, tables, and work in a process of its own."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from support.cli import program_parser  # noqa: E402

SAMPLE = ROOT / "data" / "sample.txt"
# A model for a first try: a step takes milliseconds.
SMALL = ["--n_layer", "2", "--n_head", "2", "--n_embd", "64", "--batch_size", "1", "--seq_len", "64"]
SMALL += ["--recall_places", "0", "--no_mfu"]

# ---- flags and tables ----


def parser(file: str, docstring: str) -> argparse.ArgumentParser:
    """--help opens with the script's docstring."""
    name = Path(file).name
    return program_parser(name, f"python benchmarks/{name} [--FLAG VALUE ...]", docstring)


def print_header(*names: str) -> None:
    print_row(*names)
    print_row(*["---"] * len(names))


def print_row(*cells) -> None:
    """A row of a Markdown table."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def spread(values: Sequence[float], digits: int = 1) -> str:
    """The median, with the lowest and the highest."""
    median = statistics.median(values)
    return f"{median:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def describe_machine() -> str:
    """Cores and name of the processor."""
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            for line in f:
                if line.startswith("model name"):
                    name = line.split(":")[1].strip()
    return f"{os.cpu_count()} cores of {name}"


# ---- work in a process of its own ----

CHILD = """
import importlib, json, os, sys
folder, module, name, arguments = json.loads(sys.argv[1])
sys.path.insert(0, folder)
result = getattr(importlib.import_module(module), name)(*arguments)
print()
print(json.dumps(result), flush=True)
os._exit(0)  # a thread of what was measured may still wait for something
"""


class Failed(Exception):
    """The last line that the process wrote to stderr."""


def apart(function: Callable, *arguments):
    """What a function of a benchmark returns in a process of its own, where nothing that ran before has left memory
    or threads behind. Arguments and result go through JSON. Raises Failed."""
    path = Path(inspect.getfile(function)).resolve()
    call = json.dumps([str(path.parent), path.stem, function.__name__, arguments])
    done = subprocess.run([sys.executable, "-c", CHILD, call], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no words"]
        raise Failed(lines[-1])
    return json.loads(done.stdout.splitlines()[-1])


def run_train(flags: Sequence[str]) -> None:
    """train.py with these flags, in this process. Ends the process if it fails."""
    import train

    code = train.main(flags)
    if code:
        raise SystemExit(code)


def watch(owner: type, name: str, spans: list) -> None:
    """From here on, each call of the method leaves (name, begin, end) in `spans`, in seconds since 1970."""
    inner = getattr(owner, name)

    def outer(*args, **kwargs):
        begin = time.time()
        try:
            return inner(*args, **kwargs)
        finally:
            spans.append((name, begin, time.time()))

    setattr(owner, name, outer)


def peak_memory() -> int:
    """The most bytes that this process ever had in memory, mapped files included. Linux and macOS."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
