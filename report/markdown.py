"""Markdown that no text of a run can break out of."""

from __future__ import annotations

import re
from collections.abc import Sequence

HIDDEN = re.compile(r"[^\S \n\t]|[\x00-\x08\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
MARKUP = re.compile(r"[\\`*\[\]<>|~$&]|(?<!\w)_|_(?!\w)")


def harmless(text: str) -> str:
    """Text for a code fence, in which no line can pass for a marker.

    Control characters become visible, and so do those that turn the direction of writing."""
    text = HIDDEN.sub(lambda m: m[0].encode("unicode_escape").decode(), text)
    return re.sub("<!--(?=AUTO:)", "<!-- ", text, flags=re.I)


def one_line(text: str) -> str:
    return " ".join(harmless(text).split())


def ticks(text: str, least: int) -> str:
    """A run of backticks that is longer than any in the text."""
    count = least
    for found in re.findall("`+", text):
        count = max(count, len(found) + 1)
    return "`" * count


def fence(text: str, language: str = "text") -> str:
    """A code fence."""
    text = harmless(text)
    edge = ticks(text, 3)
    return f"{edge}{language}\n{text}\n{edge}"


def code(text: str) -> str:
    """A code span, on one line."""
    text = one_line(text) or "?"
    edge = ticks(text, 1)
    if text.startswith("`") or text.endswith("`"):
        text = f" {text} "  # else the text's own backticks would lengthen the edge
    return f"{edge}{text}{edge}"


def plain(text: str) -> str:
    """Text outside code, on one line, of which nothing is markup."""
    return MARKUP.sub(r"\\\g<0>", one_line(text))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str = "---") -> str:
    """A table. Its cells are Markdown already."""
    lines = [table_row(header), "|" + f" {align} |" * len(header)]
    for row in rows:
        lines.append(table_row(row))
    return "\n".join(lines)


def table_row(cells: Sequence[str]) -> str:
    joined = []
    for cell in cells:
        words = " ".join(cell.split())
        joined.append(re.sub(r"(?<!\\)\|", r"\\|", words))  # an escaped `|` is text even inside a code span
    return "| " + " | ".join(joined) + " |"


def duration(seconds: float) -> str:
    """Seconds in the two largest units that they fill."""
    minutes, left = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{left} s"
    if minutes < 60:
        return f"{minutes} min {left:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
