"""Imported by the programs before all else: Ctrl-C, or a memory that is too small, while they import the rest, which
takes seconds, is one line too.

Where something else imports it, such as a test, it does nothing: that is the other program's own affair."""

from __future__ import annotations

import os
import signal
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROGRAM = os.path.basename(sys.argv[0])
MEMORY_IS_FULL = ("MemoryError", "bad_alloc", "failed to map segment", "annot allocate memory")


def end(signum, frame) -> None:
    """Ends the process at once. Raised in the middle of an import, KeyboardInterrupt may come out as anything."""
    try:
        os.write(2, f"{PROGRAM}: interrupted\n".encode())
    finally:  # stderr may be closed
        os._exit(128 + signum)


def tell(kind, error, trace) -> None:
    """Takes the place of sys.excepthook, which writes the traceback of what ends a program."""
    words = f"{kind.__name__}: {error}"
    if any(sign in words for sign in MEMORY_IS_FULL):
        reason = words.strip().splitlines()[-1].rstrip(": ")
        print(f"{PROGRAM}: the memory is too small to begin ({reason:.120}): stop other programs", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def is_program_of_ours() -> bool:
    """Was this process started as one of the programs beside this folder?"""
    path = getattr(sys.modules["__main__"], "__file__", None)
    return bool(path) and os.path.dirname(os.path.abspath(path)) == ROOT


def hand_over() -> None:
    """All is imported: from here on Ctrl-C raises KeyboardInterrupt again, and the program itself tells of faults."""
    if sys.excepthook is tell:
        sys.excepthook = sys.__excepthook__
    if signal.getsignal(signal.SIGINT) is end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if is_program_of_ours():
    sys.excepthook = tell
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else this is a background job, which ignores it
        signal.signal(signal.SIGINT, end)
