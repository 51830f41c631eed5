"""The README says what the program does: flags, commands, figures."""

from __future__ import annotations

import dataclasses
import re
import shlex

import pytest
from conftest import ROOT

import train

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.strip()
    for fence in re.findall(r"^```sh\n(.*?)^```", README, re.M | re.S)
    for line in fence.replace("\\\n", " ").splitlines()
]


def flag_table() -> str:
    """The README's table of flags, as TrainConfig has it."""
    lines = ["| Flag | Default | What it does |", "| --- | --- | --- |"]
    for f in dataclasses.fields(train.TrainConfig):
        if f.metadata["group"]:
            lines.append(f"| **{f.metadata['group']}** | | |")
        default = "" if f.default is False or f.default in (None, "") else f"`{f.default!r}`"
        choices = " or ".join(f"`{c}`" for c in f.metadata.get("choices", ()) if c)
        lines.append(f"| `--{f.name}` | {default} | {f.metadata['help']}{f' ({choices})' if choices else ''} |")
    return "\n".join(lines)


def test_the_table_of_flags_is_that_of_the_program():
    block = README.split("<!--AUTO:FLAGS:START-->\n")[1].split("<!--AUTO:FLAGS:END-->")[0]
    assert block.strip() == flag_table(), f"put this into the README:\n{flag_table()}"


def test_the_table_of_the_demo_is_that_of_the_preset():
    flags = shlex.join(
        part for k, v in train.PRESETS["demo"].items() for part in (f"--{k}", str(v).replace("\n", r"\n"))
    )
    assert f"`{flags}`" in README


@pytest.mark.parametrize("command", [c for c in COMMANDS if "train.py" in c])
def test_each_command_of_the_readme_is_understood(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sample.txt").write_text("text")
    argv = shlex.split(command.split("train.py")[1])
    given, problems = train.read_flags(argv)
    assert given and not problems
    if "resume" not in given:
        train.config_from_flags(argv)


def test_ci_runs_the_test_command_word_for_word():
    (command,) = (c for c in COMMANDS if "pytest" in c)
    assert f"\n{command}\n" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("name", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_links_lead_to_files(name):
    assert (ROOT / name).exists()
