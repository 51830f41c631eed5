"""The markers <!--AUTO:NAME:START--> and <!--AUTO:NAME:END--> of a Markdown file, between which a block stands."""

from __future__ import annotations

import re
from collections.abc import Sequence

from markdown_it import MarkdownIt

from report.run import ReadmeError

NAMES = ("SUMMARY", "MODEL", "CURVE", "METRICS", "SAMPLES", "LOGS", "REPRODUCE", "COMPARE", "HELDOUT", "FLAGS")
OTHER_NAMES = {"PLOT": "CURVE"}  # that the READMEs of other programs have
KNOWN = (*NAMES, *OTHER_NAMES)
MARKER = re.compile(r"<!--AUTO:([A-Z]+):(START|END)-->")
COMMENT = re.compile(r"(?<!\\)<!--(.*?)(?:-->|$)")
MEANT_AS_MARKER = re.compile(r"\bAUTO:|\b(?i:auto\s*:\s*\w+\s*:)")
CODE_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")
RAW_HTML = re.compile(r"\s*<(pre|script|style|textarea)\b", re.I)  # what stands in such an element is no Markdown
A_MARKER = (
    "a marker is <!--AUTO:NAME:START--> or <!--AUTO:NAME:END-->, without spaces, alone on its line, and NAME is one of "
    + ", ".join(KNOWN)
)

Marker = tuple[int, str, str]  # (index of its line, name, START or END)


def find_blocks(lines: Sequence[str], path: str) -> dict[str, tuple[int, int]]:
    """{name: (index of the START line, index of the END line)}.

    Raises ReadmeError with every marker that is broken, as `path:line: what is wrong`."""
    inside_code, open_fence = lines_of_code(lines)
    markers, not_markers = read_markers(lines, inside_code)
    found, opened, problems = pair(markers)
    why = ""
    if open_fence is not None:
        why = f" (the code fence of line {open_fence + 1} is never closed)"
    for name, i in opened.items():
        problem = f"{name} starts and never ends{why}: put <!--AUTO:{name}:END--> on a line behind it"
        problems.setdefault(i, problem)
    for i, problem in not_markers.items():
        # What is inside a block will be replaced, so it need not be right.
        if not any(start < i < end for start, end in found.values()):
            problems.setdefault(i, problem)
    if problems:
        raise ReadmeError("\n".join(f"{path}:{i + 1}: {problems[i]}" for i in sorted(problems)))
    return found


def lines_of_code(lines: Sequence[str]) -> tuple[set[int], int | None]:
    """(indices of the lines that are no Markdown, index of the line that opens a fence which nothing closes).

    Code fences, indented code and elements such as <pre> are no Markdown: a marker there is text."""
    inside: set[int] = set()
    open_fence = None
    for token in MarkdownIt("commonmark").disable("inline").parse("".join(lines)):
        raw = token.type == "html_block" and RAW_HTML.match(token.content)
        if raw or token.type in ("fence", "code_block"):
            inside.update(range(*token.map))
        if token.type == "fence":
            first, end = token.map
            closing = rf"[\s>]*{token.markup}[{token.markup[:1]}]*\s*"
            if not re.fullmatch(closing, lines[end - 1]):
                open_fence = first
    return inside, open_fence


def read_markers(lines: Sequence[str], inside_code: set[int]) -> tuple[list[Marker], dict[int, str]]:
    """(the markers, {line index: what is wrong with a comment that was meant as a marker}). Code is text."""
    markers = []
    problems = {}
    for i, line in enumerate(lines):
        if i in inside_code or "<!--" not in line:
            continue
        exact = MARKER.fullmatch(line.strip())
        if exact and exact[1] in KNOWN:
            markers.append((i, exact[1], exact[2]))
            continue
        problem = broken_marker(line)
        if problem:
            problems[i] = problem
    return markers, problems


def broken_marker(line: str) -> str:
    """What is wrong with a line's comment that was meant as a marker; "" where there is none."""
    for comment in COMMENT.finditer(CODE_SPAN.sub("", line[:10_000])):
        known = MARKER.fullmatch(comment[0])
        if known and known[1] in KNOWN:
            return f"{comment[0]} must stand alone on its line"
        if MEANT_AS_MARKER.search(comment[1]):
            return f"{comment[0].strip()} is no marker: {A_MARKER}"
    return ""


def pair(markers: Sequence[Marker]) -> tuple[dict[str, tuple[int, int]], dict[str, int], dict[int, str]]:
    """(the blocks, the START lines without an END, {line index: what is wrong with its marker})."""
    found: dict[str, tuple[int, int]] = {}
    opened: dict[str, int] = {}  # in the order in which they were opened
    problems: dict[int, str] = {}
    for i, name, edge in markers:
        outer = next(reversed(opened), "")
        if edge == "START":
            problem = problem_of_start(name, outer, opened, found)
            opened.setdefault(name, i)
        elif name not in opened:
            problem = f"{name} ends without a START: remove this line, or put <!--AUTO:{name}:START--> before it"
        else:
            problem = ""
            if name != outer:
                problem = f"{name} ends inside {outer} (line {opened[outer] + 1}): two blocks can't cross"
            found.setdefault(name, (opened.pop(name), i))
        if problem:
            problems[i] = problem
    return found, opened, problems


def problem_of_start(name: str, outer: str, opened: dict[str, int], found: dict[str, tuple[int, int]]) -> str:
    """What is wrong with a START; "" if nothing is."""
    first = None
    if name in opened:
        first = opened[name]
    elif name in found:
        first, _ = found[name]
    if first is not None:
        return f"a second START of {name}, which starts in line {first + 1}: remove one of them"
    if outer:
        return f"{name} starts inside {outer}, which has no END before it (line {opened[outer] + 1})"
    return ""
