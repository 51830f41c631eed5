"""README.md and docs/ say what the program does: flags, commands, figures, links."""

from __future__ import annotations

import json
import re
import shlex

import pytest
from conftest import ROOT

import train
from support.cli import Unreadable, read_flags
from support.presets import PRESETS, RECORDS

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "data" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
RESUMING = (ROOT / "docs" / "resuming.md").read_text(encoding="utf-8")
DEMO = json.loads((ROOT / "records" / "demo" / "run.json").read_text(encoding="utf-8"))


def commands_of(page) -> list[str]:
    """The lines of a page's shell fences."""
    fences = re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    lines = [line.strip() for fence in fences for line in fence.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line]


COMMANDS = [(page.name, command) for page in PAGES for command in commands_of(page)]


def test_figures_of_the_demo_are_those_of_its_record():
    words = " ".join(README.split("## Results")[0].split())
    claim = r"after ([\d,]+) steps and ([\d,]+) tokens GPT-2 knows the play by heart, at a loss of ([\d.]+)"
    steps, tokens, loss = re.search(claim, words).groups()
    assert (steps, tokens, loss) == (f"{DEMO['steps']:,}", f"{DEMO['tokens']:,}", f"{DEMO['final_loss']:.3f}")
    assert int(re.search(r"the training takes (\d+) seconds", words)[1]) == round(DEMO["seconds"])


@pytest.mark.parametrize("name", RECORDS)
def test_the_figures_of_a_preset_are_those_of_its_record(name):
    known = RECORDS[name]
    record = json.loads((ROOT / known["record"] / "run.json").read_text(encoding="utf-8"))
    assert known["sha256"] == record["corpus"]["sha256"]
    assert known["tokens"] == (record["tokens_to_target"] or 0)
    assert known["seconds"] == round(record["seconds"])


def test_the_demo_record_is_of_the_settings_of_the_preset():
    for name, value in PRESETS["demo"].items():
        assert name == "out_dir" or DEMO["config"][name] == value


@pytest.mark.parametrize(("page", "command"), [pair for pair in COMMANDS if "train.py" in pair[1]])
def test_each_command_of_the_docs_is_understood(page, command):
    argv = shlex.split(command.split("train.py")[1].split(";")[0].split("#")[0])
    given = read_flags(train.TrainConfig, argv)
    assert not [value.problem for value in given.values() if isinstance(value, Unreadable)]


def test_ci_runs_the_test_command_word_for_word():
    (command,) = [command for command in commands_of(ROOT / "README.md") if "pytest" in command]
    assert f"\n{command}\n" in (ROOT / ".ci" / "run").read_text()


def test_each_promise_names_a_test_that_is_there():
    links = re.findall(
        r'\]\(\.\./(tests/[\w/.]+) "(test_\w+)"\)', RESUMING.split("### What is promised")[1].split("###")[0]
    )
    assert len(links) > 12
    for file, name in links:
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for name in re.findall(r"\]\((?!http)([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / name).exists(), name


def test_the_readme_stays_short():
    assert len(README.splitlines()) <= 260
    assert len(README.encode()) <= 16 * 1024
