"""The lines of a text file, one after another, however long it is."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

BAR_AFTER = 2.0  # seconds of reading


def read_lines(path: Path) -> Iterator[str]:
    """Lines of any newline style, in UTF-8, or in UTF-16 as PowerShell writes it. Each ends in \\n, but a last one that
    has no end. What takes long shows a bar, where stderr is a terminal."""
    no_bar = None if sys.stderr else True
    size = path.stat().st_size
    with (
        open(path, encoding=encoding_of(path), errors="replace", newline="\n") as f,
        tqdm(
            total=size, unit="B", unit_scale=True, desc=path.name, delay=BAR_AFTER, leave=False, disable=no_bar
        ) as bar,
    ):
        for line in f:
            bar.update(len(line))
            if line.endswith("\r\n"):
                line = line.rstrip("\r\n") + "\n"
            yield line


def encoding_of(path: Path) -> str:
    with open(path, "rb") as f:
        starts_as_utf16 = f.read(2) in (b"\xff\xfe", b"\xfe\xff")
    return "utf-16" if starts_as_utf16 else "utf-8-sig"
