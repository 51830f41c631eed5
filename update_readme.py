"""Write a run's results into the README, between <!--AUTO:NAME:START--> and <!--AUTO:NAME:END-->.

    python update_readme.py                             # from out/, into README.md, docs/*.md and assets/
    python update_readme.py --run_dir records/shakespeare --check  # up to date? 0 yes, 5 no; writes nothing
    python update_readme.py --run_dir records/shakespeare --diff   # what would change; writes nothing
    python update_readme.py --html report.html          # one page for the browser, with samples from first to last
    python update_readme.py --init README_of_mine.md    # a README of your own, to be filled: --readme README_of_mine.md

SUMMARY, MODEL, CURVE, METRICS, SAMPLES, LOGS and REPRODUCE come from the run directory; report/run.py says what is read
there. COMPARE and HELDOUT also come from records/earlier_runs.json and the published runs that it names, FLAGS from the
source of train.py and support/presets.py. PLOT is another name of CURVE. A block that no file has is left alone. What a
block says comes from the run, never from the clock, so the same run directory gives the same bytes.

Exit codes: 0 written or already current, 1 broken markers (file:line), a run or a file that can't be read or written,
2 unusable flags, or a file of --init that is there, 5 stale under --check, 130 stopped by Ctrl-C.
"""

# /// script
# requires-python = ">=3.10,<3.15"
# dependencies = ["matplotlib==3.10.9", "markdown-it-py>=3,<5", "tqdm>=4.66,<5"]
# ///

from __future__ import annotations

from support import importing  # isort: skip  # first, so that Ctrl-C in the seconds of importing is one line

import argparse
import contextlib
import difflib
import glob
import os
import re
import shlex
import shutil
import sys
import textwrap
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from report import blocks, html, pictures, published
from report.flags import flags
from report.markdown import one_line, plain
from report.markers import NAMES, OTHER_NAMES, find_blocks
from report.run import ReadmeError, Run, read_run, relative

HERE = Path(__file__).resolve().parent
README = Path("README.md")
TEMPLATE = HERE / "report" / "template.md"
BYTE_ORDER_MARK = "\ufeff"


def no_curve(run: Run) -> str:
    """What stands above the picture of CURVE."""
    return "" if run.rows else "There is no curve yet, since no step has been logged."


BLOCKS: dict[str, Callable[[Run], str]] = {
    "SUMMARY": blocks.summary,
    "MODEL": blocks.model,
    "CURVE": no_curve,
    "METRICS": blocks.metrics,
    "SAMPLES": blocks.samples,
    "LOGS": blocks.logs,
    "REPRODUCE": blocks.reproduce,
    "COMPARE": published.compare,
    "HELDOUT": published.held_out,
    "FLAGS": lambda run: flags(HERE / "train.py", HERE / "support" / "presets.py"),
}

# (the picture that a block ends with, what it shows in words)
PICTURES: dict[str, tuple[Callable[[Run], bytes], Callable[[Run], str]]] = {
    "CURVE": (pictures.curve, pictures.describe),
    "COMPARE": (pictures.comparison, pictures.describe_comparison),
    "HELDOUT": (pictures.curve, pictures.describe),
}


# ======================================================================================================================
# Files
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
        """Where the new content waits. The id tells apart two files whose long names begin alike."""
        return self.target().with_name(f".{self.path.name[:40]}.{os.getpid()}.{id(self)}.part")

    def clear_up(self) -> None:
        """Removes what a killed process left where it put new content."""
        target = self.target()
        for part in target.parent.glob(f".{glob.escape(self.path.name[:40])}.*.*.part"):
            number = part.name.split(".")[-3]
            if number.isdigit() and not is_running(int(number)):
                with contextlib.suppress(OSError):
                    part.unlink()

    def check(self) -> None:
        """Raises ReadmeError for a file that isn't to be replaced."""
        if self.old is None:
            return
        about = self.target().stat()
        if not about.st_mode & 0o222:
            raise ReadmeError(f"{self.path} is write-protected: chmod u+w {shlex.quote(str(self.path))} permits it")
        if not os.access(self.target(), os.W_OK):
            raise ReadmeError(f"{self.path} can't be written: it is another user's, or the disk is read-only")
        if about.st_nlink > 1:
            remedy = "put a copy in its place, which is a file of its own"
            raise ReadmeError(f"{self.path} has other names (hard links), which would keep the old text: {remedy}")

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

    def undo(self) -> None:
        """The file is again as it was before it was replaced."""
        if self.old is None:
            self.target().unlink()
        else:
            self.target().write_bytes(self.old)

    def diff(self) -> str:
        if self.path.suffix == ".svg":
            return f"{self.path}: would be drawn anew\n"
        old = lines_of(text_of(self.old or b""))
        new = lines_of(text_of(self.new))
        shown = []
        for line in difflib.unified_diff(old, new, str(self.path), f"{self.path} (updated)"):
            shown.append(line)
            if not line.endswith(("\n", "\r")):
                shown.append("\n\\ No newline at end of file\n")
        return "".join(shown)


def is_running(number: int) -> bool:
    """Is there a process of this number? On Windows that can't be asked, but a file that is open can't be removed."""
    if os.name == "nt":
        return False
    try:
        os.kill(number, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        return True
    return True


def write(changes: Sequence[Change]) -> None:
    """All of the files or, if one can't be written, none of them."""
    for change in changes:
        change.check()
    replaced = []
    try:
        for change in changes:
            change.stage()
        for change in changes:
            os.replace(change.part(), change.target())
            replaced.append(change)
    except (OSError, KeyboardInterrupt):
        for change in replaced:
            change.undo()
        raise
    finally:
        for change in changes:
            change.part().unlink(missing_ok=True)


def text_of(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")  # bytes that aren't UTF-8 come back as they were


def lines_of(text: str) -> list[str]:
    """With their ends: as Markdown sees them, a bare \\r is one."""
    return re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+\Z", text)


# ======================================================================================================================
# Pages: the files with blocks
# ======================================================================================================================


@dataclass(frozen=True)
class Content:
    """What a block will hold."""

    text: str
    picture: Change | None = None  # which the text is followed by
    words: str = ""  # what the picture shows

    def beside(self, folder: Path) -> list[str]:
        """The lines of it in a file of the folder."""
        text = self.text
        if self.picture:
            link = urllib.parse.quote(os.fsencode(relative(self.picture.path, folder)))
            text = f"{text}\n\n![{plain(self.words)}]({link})".strip()
        return text.split("\n")


@dataclass(frozen=True)
class Page:
    """A Markdown file and its blocks."""

    path: Path
    old: bytes
    blocks: dict[str, tuple[int, int]]

    def contents(self) -> set[str]:
        """What its blocks hold, by the usual names."""
        return {OTHER_NAMES.get(name, name) for name in self.blocks}

    def filled(self, contents: dict[str, Content]) -> Change:
        """The file as it should be."""
        text = text_of(self.old)
        mark = BYTE_ORDER_MARK if text.startswith(BYTE_ORDER_MARK) else ""
        lines = lines_of(text.removeprefix(mark))
        in_order = sorted(self.blocks, key=self.blocks.get)
        for name in reversed(in_order):  # from the end, so that the indices of those before hold
            start, end = self.blocks[name]
            # As far to the right as the marker, so that it stays in the same list item.
            indent, newline = re.match(r"([ \t]*).*?([\r\n]+)\Z", lines[start]).groups()
            content = contents[OTHER_NAMES.get(name, name)]
            block = ["", *content.beside(folder_of(self.path)), ""]
            lines[start + 1 : end] = [indented(line, indent) + newline for line in block]
        if find_blocks(lines, str(self.path)).keys() != self.blocks.keys():
            raise ReadmeError(
                f"{self.path}: a block can't stand where it does: put its markers at the start of their lines"
            )
        return Change(self.path, self.old, (mark + "".join(lines)).encode("utf-8", "surrogateescape"))


def indented(line: str, indent: str) -> str:
    return indent + line if line else ""


def read_page(path: Path) -> Page:
    """Raises ReadmeError for broken markers."""
    old = path.read_bytes()
    lines = lines_of(text_of(old).removeprefix(BYTE_ORDER_MARK))
    return Page(path, old, find_blocks(lines, str(path)))


def folder_of(path: Path) -> Path:
    """Where a file lies, behind any link to it: its pictures go there, and its links are as seen from there."""
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    return path.parent


def default_pages() -> list[Page]:
    """README.md, and those files of docs/ that have a block."""
    docs = [path for path in sorted(Path("docs").glob("*.md")) if path.is_file()]
    pages = [read_page(README)]  # the first in any case, since all names are as seen from it
    for path in once([README, *docs])[1:]:
        page = read_page(path)
        if page.blocks:
            pages.append(page)
    if len(pages) == 1:
        return named_pages([README])  # then that one must have a block
    return pages


def named_pages(paths: Sequence[Path]) -> list[Page]:
    """Files that must have a block."""
    pages = [read_page(path) for path in once(paths)]
    for page in pages:
        if not page.blocks:
            remedy = "put <!--AUTO:SUMMARY:START--> and <!--AUTO:SUMMARY:END--> on two lines"
            raise ReadmeError(f"{page.path} has no block: {remedy}")
    return pages


def once(paths: Sequence[Path]) -> list[Path]:
    """Each file once, by whichever of its names comes first."""
    found: dict[str, Path] = {}
    for path in paths:
        found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def plan(readme: Path, run_dir: Path, assets_dir: Path) -> tuple[list[Change], list[str]]:
    """plan_pages of one file, for other programs."""
    return plan_pages(named_pages([readme]), run_dir, assets_dir)


def plan_pages(pages: Sequence[Page], run_dir: Path, assets_dir: Path) -> tuple[list[Change], list[str]]:
    """(the files as they should be, what to tell the user). Writes nothing.

    All pages name folders as they are seen from the first. Raises ReadmeError for a run that can't be read."""
    base = folder_of(pages[0].path)
    names = [name for name in NAMES if any(name in page.contents() for page in pages)]
    run, notes = read_run(run_dir, relative(run_dir, base))
    run = published.with_published(run, names, run_dir, base)
    contents = {name: content_of(name, run, assets_dir) for name in names}
    changes = [content.picture for content in contents.values() if content.picture]
    for page in pages:
        changes.append(page.filled(contents))
    lacking = [name for name in NAMES if name not in names]
    if lacking:
        files = " and ".join(str(page.path) for page in pages)
        verb = "has" if len(pages) == 1 else "have"
        notes.append(f"{files} {verb} no block {', '.join(lacking)}: left alone")
    return changes, notes


def content_of(name: str, run: Run, assets_dir: Path) -> Content:
    text = BLOCKS[name](run)
    shown = run
    if name == "HELDOUT":
        shown = published.largest_held_out(run)
    if name not in PICTURES or not shown or not shown.rows:
        return Content(text)
    draw, describe = PICTURES[name]
    path = assets_dir / f"{name.lower()}.svg"
    old = path.read_bytes() if path.exists() else None
    return Content(text, Change(path, old, draw(shown)), describe(shown))


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
        "--readme",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="files with the blocks (default: README.md, and those of docs/*.md that have any)",
    )
    parser.add_argument("--assets_dir", type=Path, help="where pictures go (default: assets beside the first file)")
    parser.add_argument("--init", type=Path, metavar="FILE", help="write a README with all blocks, for a run of yours")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the run's report for a browser, and no README")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 5 if a file is stale")
    parser.add_argument("--diff", action="store_true", help="write nothing; show what would change")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code; faults are one sentence each, on stderr."""
    args = build_parser().parse_args(argv)
    importing.hand_over()
    try:
        if args.init:
            return write_template(args)
        if args.html:
            return write_report(args)
        return update(args)
    except ReadmeError as e:
        say(str(e), to=sys.stderr)
    except OSError as e:
        say(f"update_readme.py: {e.strerror or e} ({e.filename or 'no file named'})", to=sys.stderr)
    except MemoryError:
        say("update_readme.py: the memory is full: stop other programs", to=sys.stderr)
    except KeyboardInterrupt:
        say("update_readme.py: interrupted", to=sys.stderr)
        return 130
    return 1


def update(args: argparse.Namespace) -> int:
    """Does what the command line says. Raises ReadmeError or OSError."""
    files = args.readme or [README]
    for path in files:
        if not path.is_file():
            say(f"update_readme.py: {path} isn't a file: name one with --readme", to=sys.stderr)
            return 2
    pages = named_pages(files) if args.readme else default_pages()
    changes, notes = plan_pages(pages, args.run_dir, args.assets_dir or folder_of(files[0]) / "assets")
    stale = [change for change in changes if change.old != change.new]
    if not args.check and not args.diff:
        for change in changes:
            change.clear_up()
        write(stale)
    done = what_is_done(args)
    for change in changes:
        notes.append(f"{change.path}: {done if change in stale else 'already up to date'}")
    say("\n".join(notes), to=sys.stderr if args.diff else sys.stdout)
    if args.diff:
        say("".join(change.diff() for change in stale).removesuffix("\n"), to=sys.stdout)
    if args.check and stale:
        return 5
    return 0


def write_template(args: argparse.Namespace) -> int:
    """A README for a run of one's own, with empty blocks. Raises OSError."""
    if args.readme or args.check or args.diff:
        say("update_readme.py: --init only writes a new file: leave out --readme, --check and --diff", to=sys.stderr)
        return 2
    fill = shlex.join(["python", "update_readme.py", "--readme", str(args.init), "--run_dir", str(args.run_dir)])
    text = TEMPLATE.read_text(encoding="utf-8").replace("FILL_THIS_PAGE", one_line(fill))
    try:
        with open(args.init, "x", encoding="utf-8", newline="\n") as f:
            f.write(text)
    except FileExistsError:
        say(f"update_readme.py: {args.init} is there already: name a new file with --init", to=sys.stderr)
        return 2
    say(f"{args.init}: written\nTo fill it: {fill}", to=sys.stdout)
    return 0


def write_report(args: argparse.Namespace) -> int:
    """The run's report for a browser. Raises ReadmeError or OSError."""
    if args.readme or args.check or args.diff:
        say("update_readme.py: --html only writes a report: leave out --readme, --check and --diff", to=sys.stderr)
        return 2
    old = args.html.read_bytes() if args.html.exists() else None
    if old and not html.is_report(old):
        say(f"update_readme.py: {args.html} is there, and is no report: name another file with --html", to=sys.stderr)
        return 2
    run, notes = read_run(args.run_dir, relative(args.run_dir, folder_of(args.html)))
    change = Change(args.html, old, html.report(run).encode())
    change.clear_up()
    write([change])
    say("\n".join([*notes, f"{args.html}: written"]), to=sys.stdout)
    return 0


def what_is_done(args: argparse.Namespace) -> str:
    """About a file that isn't up to date."""
    if args.check:
        command = ["python", "update_readme.py", "--run_dir", args.run_dir]
        if args.readme:
            command += ["--readme", *args.readme]
        if args.assets_dir:
            command += ["--assets_dir", args.assets_dir]
        return f"is stale: {shlex.join(map(str, command))} brings it up to date"
    return "would change" if args.diff else "written"


def say(text: str, to) -> None:
    """Prints, if there is anything to print to; characters that the terminal lacks are shown by their numbers."""
    if to and text:
        with contextlib.suppress(OSError):
            encoding = getattr(to, "encoding", None) or "utf-8"
            print(text.encode(encoding, "backslashreplace").decode(encoding), file=to, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
