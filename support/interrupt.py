"""Imported by the programs before all else: Ctrl-C while they import the rest, which takes seconds, is one line too.

Where something else imports it, such as a test, it does nothing: Ctrl-C is that program's own affair."""

from __future__ import annotations

import os
import signal
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def end(signum, frame) -> None:
    """Ends the process at once. Raised in the middle of an import, KeyboardInterrupt may come out as anything."""
    try:
        os.write(2, f"{os.path.basename(sys.argv[0])}: interrupted\n".encode())
    finally:  # stderr may be closed
        os._exit(128 + signum)


def is_program_of_ours() -> bool:
    """Was this process started as one of the programs beside this folder?"""
    path = getattr(sys.modules["__main__"], "__file__", None)
    return bool(path) and os.path.dirname(os.path.abspath(path)) == ROOT


def hand_over() -> None:
    """All is imported: from here on Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# A shell has its background jobs ignore Ctrl-C, which then stays so.
if is_program_of_ours() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end)
