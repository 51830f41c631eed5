"""The command line of all programs: errors with a remedy, a dataclass's flags, signals, and one wrapper for main()."""

from __future__ import annotations

from support import importing  # isort: skip  # first, as programs import this module first

import argparse
import contextlib
import dataclasses
import difflib
import errno
import math
import re
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

# SIGBREAK is Ctrl-Break, which only Windows has.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]
DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "fp16", "bf16", "off")
REMEDIES = {  # of faults of a disk
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), ": make room, then try again"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), ": change its permissions, or name another place"),
}


# ---- errors ----


class UsageError(Exception):
    """What was asked for can't be done: exit code 2. Holds every problem found, one sentence each."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class RunError(Exception):
    """A fault while running: exit code 1."""


class BetweenStepsError(RunError):
    """A fault before a step began: what a checkpoint has is as the step before left it."""


class DamagedError(RunError):
    """A checkpoint that isn't whole."""


class Stopped(Exception):
    """A signal asked for the end in the middle of a proof or a sample."""


def say(name: str, sentence: str) -> None:
    """A sentence on stderr, which may be closed, or None as under pythonw."""
    with contextlib.suppress(OSError, AttributeError):
        printable = sentence.encode(errors="backslashreplace").decode()
        print(f"{name}: {printable}", file=sys.stderr, flush=True)


def run_program(
    name: str, body: Callable[[], int], when_memory_is_full: str, say: Callable[[str, str], None] = say
) -> int:
    """Calls `body` and returns its exit code. Every known fault becomes one sentence on stderr and a code of its own:
    1 a fault while running, 2 unusable flags or input, 130 Ctrl-C. A fault that nobody foresaw keeps its traceback."""
    importing.hand_over()
    try:
        return body()
    except UsageError as e:
        for problem in e.problems:
            say(name, problem)
        return 2
    except RunError as e:
        say(name, str(e))
    except (RuntimeError, MemoryError) as e:
        if "can't start new thread" in str(e):
            say(name, "no more threads can be started here: stop other programs, or raise the limits (ulimit -u, -v)")
        elif is_out_of_memory(e):
            say(name, f"the memory is full: {when_memory_is_full}")
        else:
            raise
    except OSError as e:
        say(name, f"{e.strerror or e} ({e.filename or 'no file named'}){REMEDIES.get(e.errno, '')}")
    except KeyboardInterrupt:
        say(name, "interrupted")
        return 128 + signal.SIGINT
    return 1


def is_out_of_memory(e: Exception) -> bool:
    """Is this a full memory? torch says so in a plain RuntimeError, so its words are all there is."""
    words = str(e).lower()
    told = ("can't allocate memory", "cannot allocate memory", "out of memory", "bad_alloc")
    return isinstance(e, MemoryError) or any(one in words for one in told)


def first_line(e: BaseException) -> str:
    """Of what a fault says, as torch's may have hundreds; the fault's kind where it says nothing."""
    lines = str(e).strip().splitlines() or [type(e).__name__]
    return lines[0][:200]


def duration(seconds: float) -> str:
    """1 h 02 min, 2 min 03 s or 4 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes_left:02d} min"
    if minutes:
        return f"{minutes} min {rest:02d} s"
    return f"{rest} s"


# ---- settings: a dataclass whose fields are flags ----


def flag(default, help: str, group: str = "", **rules):
    """A field that is a flag. Rules: `choices`, and the bounds `least` (value >= least), `above` (>), `below` (<).
    A `group` begins a group of flags in --help; the fields after it belong to it too."""
    return field(default=default, metadata={"help": help, "group": group, **rules})


@dataclass(frozen=True)
class Unreadable:
    """Stands in a setting's place when its text on the command line has no meaning there."""

    problem: str


def fields_of(settings) -> dict[str, dataclasses.Field]:
    """The fields of such a dataclass, or of an object of it, by name."""
    return {f.name: f for f in dataclasses.fields(settings)}


def value_problems(settings) -> dict[str, str]:
    """{name: what is wrong with its value}, of each setting by itself."""
    found = {}
    for name, one in fields_of(settings).items():
        problem = value_problem(one, getattr(settings, name))
        if problem:
            found[name] = problem
    return found


def value_problem(one: dataclasses.Field, value) -> str:
    """What is wrong with the value of a field; "" where nothing is."""
    if isinstance(value, Unreadable):
        return value.problem
    if value is None and one.type.endswith("| None"):
        return ""
    if not has_type(one, value):
        return f"{one.name} {value!r} isn't of type {kind_of(one)}: the default is {one.default!r}"
    if "choices" in one.metadata and value not in one.metadata["choices"]:
        return f"{one.name} {value!r} is unknown: {nearest_choice(one, value)}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{one.name} {value} isn't a finite number: use something like {one.default or 1.0}"
    return bound_problem(one, value)


def settings_problems(settings) -> list[str]:
    """What is wrong with the settings: with each by itself, and by its method conflicts(), which yields (names of
    settings that don't go together, what to do about it). Those that are unsound by themselves aren't compared."""
    unsound = value_problems(settings)
    problems = list(unsound.values())
    defaults = {name: fields_of(settings)[name].default for name in unsound}
    sound = dataclasses.replace(settings, **defaults)
    for names, problem in sound.conflicts():
        if not unsound.keys() & set(names.split()):
            problems.append(problem)
    return problems


def kind_of(one: dataclasses.Field) -> str:
    """int, float, bool or str: the type of a field, without `| None` and the like."""
    return one.type.split()[0]


def has_type(one: dataclasses.Field, value) -> bool:
    if "tuple" in one.type and isinstance(value, tuple):
        return all(isinstance(part, str) for part in value)
    types = {"int": int, "float": (int, float), "bool": bool, "str": str}
    return isinstance(value, types[kind_of(one)])


def nearest_choice(one: dataclasses.Field, value) -> str:
    choices = [choice for choice in one.metadata["choices"] if choice]
    near = difflib.get_close_matches(str(value), choices, n=1)
    if near:
        return f"did you mean {near[0]}?"
    return "use " + " or ".join(choices)


def bound_problem(one: dataclasses.Field, value) -> str:
    rules = one.metadata
    if "least" in rules and value < rules["least"]:
        return f"{one.name} {value} is too small: use {rules['least']} or more"
    if "above" in rules and value <= rules["above"]:
        return f"{one.name} {value} is too small: use a number over {rules['above']}"
    if "below" in rules and value >= rules["below"]:
        return f"{one.name} {value} is too large: use a number under {rules['below']}"
    return ""


# ---- flags ----


def read_flags(settings, argv: Sequence[str]) -> dict:
    """{name: value} of the settings that a command line gives. Given twice, the last one wins, but a field that may
    hold a tuple collects. What can't be read is Unreadable; so is an unknown flag, which stands under its own name.

    argparse would stop at the first problem. Here all of them are collected, to be told at once."""
    fields = fields_of(settings)
    given = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        flag_name, equals, text = word.partition("=")
        name = flag_name.removeprefix("--")
        switch = fields.get(name.removeprefix("no-"))
        if not word.startswith("--") or not (name in fields or is_switch(switch)):
            key = flag_name if word.startswith("-") else repr(word)  # a lone word may be the name of a field
            given[key] = unknown_word(fields, word)
            if word.startswith("-") and not equals and words and not words[0].startswith("-"):
                words.pop(0)  # the value of the unknown flag
        elif is_switch(switch):
            given[switch.name] = read_switch(word, switch.name, equals)
        elif equals:
            add_value(given, fields[name], text)
        elif words and not words[0].startswith("--"):  # "-1" is a value: no flag of ours has one dash
            add_value(given, fields[name], words.pop(0))
        else:
            given[name] = Unreadable(f"{word} needs a value: python train.py --help says which")
    return given


def is_switch(one: dataclasses.Field | None) -> bool:
    return one is not None and one.type == "bool"


def read_switch(word: str, name: str, equals: str) -> bool | Unreadable:
    if equals:
        return Unreadable(f"{word} takes no value: use --{name} or --no-{name}")
    return not word.startswith("--no-")


def unknown_word(fields: dict, word: str) -> Unreadable:
    if not word.startswith("-"):
        return Unreadable(f"{word!r} stands alone: put the flag that it belongs to before it")
    near = difflib.get_close_matches(word.lstrip("-").split("=")[0], fields, n=1)
    remedy = f"did you mean --{near[0]}?" if near else "python train.py --help lists all"
    return Unreadable(f"{word} is unknown: {remedy}")


def add_value(given: dict, one: dataclasses.Field, text: str) -> None:
    """Puts a flag's value into `given`: in the place of an earlier one, or beside it where the field collects."""
    value = convert(one, text)
    before = given.get(one.name)
    collects = "tuple" in one.type and before is not None
    if not collects or isinstance(value, Unreadable):
        given[one.name] = value
    elif isinstance(before, str):
        given[one.name] = (before, value)
    elif isinstance(before, tuple):
        given[one.name] = (*before, value)


def convert(one: dataclasses.Field, text: str):
    """A flag's text as a value of its field's type."""
    kinds = {"int": "a whole number", "float": "a number", "str": "UTF-8"}
    kind = kind_of(one)
    try:
        if kind == "int":
            return int(text)
        if kind == "float":
            return float(text)
        text.encode()  # fails for bytes of a terminal that isn't in UTF-8
        return text
    except ValueError:
        return Unreadable(f"{one.name} {text!r} isn't {kinds[kind]}: use something like {one.default or 100!r}")


def unescape(text: str) -> str:
    r"""A prompt as the shell passes it on: \n, \t and \\ stand for a line break, a tabulator and a backslash."""
    meaning = {"n": "\n", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nt\\])", lambda found: meaning[found[1]], text)


def program_parser(name: str, usage: str, docstring: str) -> argparse.ArgumentParser:
    """A parser whose --help opens with the program's docstring: its first paragraph, and its examples at the end."""
    summary, examples = docstring.split("\n\n")[:2]
    examples = re.sub(r"(?m)^ +(.*?) +# (.*)$", r"  # \2\n  \1", examples)  # what it does, then how
    examples = re.sub(r"(?m)^ +", "  ", examples)
    return argparse.ArgumentParser(
        name,
        usage,
        textwrap.fill(summary, 79, break_on_hyphens=False),  # within a terminal of 80 columns
        f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_setting_flags(parser: argparse.ArgumentParser, settings) -> None:
    """A flag for each field, for --help alone: values are read by read_flags."""
    group = parser
    for one in fields_of(settings).values():
        if one.metadata["group"]:
            group = parser.add_argument_group(one.metadata["group"])
        text = one.metadata["help"]
        if one.default is not False and one.default not in (None, ""):
            text += f" (default: {one.default!r})"
        if one.type == "bool":
            group.add_argument(f"--{one.name}", action=argparse.BooleanOptionalAction, default=False, help=text)
            continue
        choices = [choice for choice in one.metadata.get("choices", ()) if choice]
        metavar = "{" + ",".join(choices) + "}" if choices else kind_of(one).upper()
        if len(metavar) > 60:  # beside the flag it has to fit on one line
            metavar = "NAME"
            text += ": " + ", ".join(choices)
        group.add_argument(f"--{one.name}", metavar=metavar, help=text)


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    """--device and --amp, for the programs that use a trained model."""
    parser.add_argument("--device", default="auto", choices=DEVICES, help="(default: auto)")
    parser.add_argument("--amp", default="auto", choices=PRECISIONS, help="(default: auto)")


# ---- signals ----


class StopSignals:
    """While entered, SIGINT and SIGTERM (on Windows also SIGBREAK) only set `signum`, which the loop polls. A second
    one ends the process at once; every file is whole at every moment, so that hurts nothing."""

    def __init__(self):
        self.signum = 0
        self.previous = {}

    def __enter__(self):
        for signum in STOP_SIGNALS:
            with contextlib.suppress(ValueError):  # only the main thread may handle signals
                self.previous[signum] = signal.signal(signum, self.handle)
        return self

    def __exit__(self, *exc):
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def handle(self, signum, frame):
        self.signum = signum
        for any_signum in self.previous:
            signal.signal(any_signum, signal.SIG_DFL)

    def asked_of_any(self, largest: Callable[[int], int]) -> bool:
        """Did a signal come to any of several processes? `largest` gives the largest of their numbers to all."""
        signum = largest(self.signum)
        if signum:  # else one that came while they talked would be forgotten
            self.signum = signum
        return signum > 0

    def poll(self) -> None:
        """Raises Stopped once a signal came."""
        if self.signum:
            raise Stopped
