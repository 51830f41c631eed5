"""Flags of a dataclass, all problems at once, exit codes and signals."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

import pytest
import torch

from support import cli
from support.cli import DamagedError, RunError, Stopped, StopSignals, Unreadable, UsageError, flag


@dataclass
class Oven:
    """Settings to try the rules on."""

    dish: str = flag("bread", "what to bake", "Food", choices=("", "bread", "cake"))
    recipe: str | tuple[str, ...] = flag("book.txt", "may be given several times")
    degrees: float = flag(180.0, "how hot", "Heat", above=0, below=300)
    minutes: int | None = flag(None, "how long", least=1)
    fan: bool = flag(False, "with the fan")

    def conflicts(self):
        if self.dish == "cake" and self.degrees > 200:
            yield "dish degrees", "a cake burns over 200: lower degrees"


def read(*words: str) -> dict:
    return cli.read_flags(Oven, words)


def problem_of(*words: str) -> str:
    """The one problem of these flags."""
    (value,) = read(*words).values()
    assert isinstance(value, Unreadable)
    return value.problem


# ---- flags ----


def test_a_flag_gives_a_value_of_its_field_s_type():
    given = read("--dish", "cake", "--degrees", "200", "--minutes=30", "--fan")
    assert given == {"dish": "cake", "degrees": 200.0, "minutes": 30, "fan": True}
    assert isinstance(given["degrees"], float)


def test_of_a_flag_that_is_given_twice_the_last_one_wins():
    assert read("--minutes", "30", "--dish", "cake", "--minutes", "40") == {"minutes": 40, "dish": "cake"}
    assert read("--minutes=30", "--minutes=40") == {"minutes": 40}
    assert read("--fan", "--no-fan") == {"fan": False}
    assert read("--no-fan", "--fan") == {"fan": True}


def test_a_field_that_may_hold_several_collects():
    assert read("--recipe", "a.txt") == {"recipe": "a.txt"}
    assert read("--recipe", "a.txt", "--recipe=b.txt") == {"recipe": ("a.txt", "b.txt")}
    assert read("--recipe", "a", "--recipe", "b", "--recipe", "c") == {"recipe": ("a", "b", "c")}


def test_an_unreadable_value_is_not_hidden_by_a_sound_one_before_it():
    assert isinstance(read("--minutes", "30", "--minutes", "long")["minutes"], Unreadable)
    assert isinstance(read("--recipe", "a.txt", "--recipe", "caf\udce9")["recipe"], Unreadable)


def test_a_negative_number_is_a_value():
    assert read("--degrees", "-3e-4", "--minutes", "-1") == {"degrees": -3e-4, "minutes": -1}


def test_a_value_may_hold_an_equals_sign_or_be_empty():
    assert read("--recipe=a=b.txt") == {"recipe": "a=b.txt"}
    assert read("--recipe=", "--dish", "") == {"recipe": "", "dish": ""}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--minuts", "5"], "--minuts is unknown: did you mean --minutes?"),
        (["--zzz"], "--zzz is unknown: python train.py --help lists all"),
        (["--no-dish"], "--no-dish is unknown"),
        (["-x", "5"], "-x is unknown"),
        (["word"], "'word' stands alone: put the flag that it belongs to before it"),
        (["--minutes"], "--minutes needs a value"),
        (["--minutes", "--minutes"], "--minutes needs a value"),
        (["--minutes", "1.5"], "minutes '1.5' isn't a whole number: use something like 100"),
        (["--degrees", "hot"], "degrees 'hot' isn't a number: use something like 180.0"),
        (["--recipe", "caf\udce9"], "recipe 'caf\\udce9' isn't UTF-8"),
        (["--fan=yes"], "--fan=yes takes no value: use --fan or --no-fan"),
        (["--no-fan=yes"], "--no-fan=yes takes no value"),
    ],
)
def test_what_cannot_be_read_has_its_sentence(words, sentence):
    assert problem_of(*words).startswith(sentence)


def test_what_stands_behind_an_unknown_flag_is_still_read():
    given = read("--minuts", "5", "--fan", "--zzz=3", "--dish", "cake")
    assert given.pop("fan") is True
    assert given.pop("dish") == "cake"
    assert list(given) == ["--minuts", "--zzz"]


def test_a_lone_word_is_told_even_where_it_is_the_name_of_a_flag():
    given = read("minutes", "--minutes", "5")
    assert given.pop("minutes") == 5
    (problem,) = given.values()
    assert problem.problem.startswith("'minutes' stands alone")


def test_a_prompt_s_escapes_become_what_they_stand_for():
    assert cli.unescape(r"A:\n\tB\\n \x") == "A:\n\tB\\n \\x"


# ---- problems of settings ----


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"minutes": 0}, "minutes 0 is too small: use 1 or more"),
        ({"degrees": 0.0}, "degrees 0.0 is too small: use a number over 0"),
        ({"degrees": 300}, "degrees 300 is too large: use a number under 300"),
        ({"degrees": float("nan")}, "degrees nan isn't a finite number: use something like 180.0"),
        ({"degrees": None}, "degrees None isn't of type float: the default is 180.0"),
        ({"minutes": "long"}, "minutes 'long' isn't of type int"),
        ({"recipe": ("a", 7)}, "recipe ('a', 7) isn't of type str"),
        ({"dish": "cakes"}, "dish 'cakes' is unknown: did you mean cake?"),
        ({"dish": "soup"}, "dish 'soup' is unknown: use bread or cake"),
        ({"fan": Unreadable("--fan=yes takes no value")}, "--fan=yes takes no value"),
        ({"dish": "cake", "degrees": 250.0}, "a cake burns over 200: lower degrees"),
    ],
)
def test_a_setting_out_of_its_bounds_has_its_sentence(changes, sentence):
    (problem,) = cli.settings_problems(Oven(**changes))
    assert problem.startswith(sentence)


def test_sound_settings_have_no_problem():
    assert cli.settings_problems(Oven()) == []
    assert cli.settings_problems(Oven(degrees=200, minutes=1, recipe=("a", "b"), fan=True)) == []


def test_settings_that_are_unsound_by_themselves_are_not_compared():
    (problem,) = cli.settings_problems(Oven(dish="cake", degrees=999.0))
    assert problem.startswith("degrees 999.0 is too large")


# ---- one wrapper for main() ----


NOT_HERE = "change its permissions, or name another place"
NO_THREADS = "no more threads can be started here: stop other programs, or raise the limits (ulimit -u, -v)"


def raising(error: BaseException):
    def body() -> int:
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UsageError("lr is too small", "seed is too large"), 2, "bake: lr is too small\nbake: seed is too large\n"),
        (RunError("the loss is nan"), 1, "bake: the loss is nan\n"),
        (DamagedError("it is damaged"), 1, "bake: it is damaged\n"),
        (MemoryError(), 1, "bake: the memory is full: use less\n"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "bake: the memory is full: use less\n"),
        (torch.OutOfMemoryError("CUDA out of memory."), 1, "bake: the memory is full: use less\n"),
        (RuntimeError("can't start new thread"), 1, f"bake: {NO_THREADS}\n"),
        (PermissionError(13, "Permission denied", "a.txt"), 1, f"bake: Permission denied (a.txt): {NOT_HERE}\n"),
        (OSError(30, "Read-only file system", "a"), 1, f"bake: Read-only file system (a): {NOT_HERE}\n"),
        (OSError(28, "No space left", "a"), 1, "bake: No space left (a): make room, then try again\n"),
        (OSError("odd"), 1, "bake: odd (no file named)\n"),
        (KeyboardInterrupt(), 130, "bake: interrupted\n"),
        (RunError("caf\udce9"), 1, "bake: caf\\udce9\n"),
    ],
)
def test_each_known_fault_is_a_sentence_and_a_code(error, code, said, capsys):
    assert cli.run_program("bake", raising(error), "use less") == code
    assert capsys.readouterr().err == said


def test_a_program_that_ends_well_says_nothing(capsys):
    assert cli.run_program("bake", lambda: 7, "use less") == 7
    assert capsys.readouterr().err == ""


def test_a_fault_that_nobody_foresaw_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="odd"):
        cli.run_program("bake", raising(RuntimeError("odd")), "use less")


def test_a_stderr_that_is_closed_is_no_fault(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    assert cli.run_program("bake", raising(RunError("the loss is nan")), "use less") == 1


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(4.4, "4 s"), (59.6, "1 min 00 s"), (123, "2 min 03 s"), (3600, "1 h 00 min"), (90_061, "25 h 01 min")],
)
def test_a_duration_in_words(seconds, words):
    assert cli.duration(seconds) == words


@pytest.mark.parametrize(
    ("says", "line"), [("one\nand two", "one"), ("\n  one  \ntwo", "one"), ("", "ValueError"), ("x" * 999, "x" * 200)]
)
def test_the_first_line_of_a_fault(says, line):
    assert cli.first_line(ValueError(says)).rstrip() == line


# ---- signals ----


def test_a_second_signal_is_left_to_the_system():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signum == signal.SIGTERM
        for either in (signal.SIGTERM, signal.SIGINT):
            assert signal.getsignal(either) is signal.SIG_DFL
        with pytest.raises(Stopped):
            stop.poll()
    assert signal.getsignal(signal.SIGTERM) is before


def test_without_a_signal_nothing_stops():
    with StopSignals() as stop:
        stop.poll()
        assert stop.signum == 0
