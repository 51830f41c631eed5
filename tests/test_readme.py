"""The README says what the program does: flags, commands, figures."""

from __future__ import annotations

import json
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


RECORD = json.loads((ROOT / "out" / "demo" / "run.json").read_text(encoding="utf-8"))


def test_figures_of_the_demo_are_those_of_its_record():
    words = " ".join(README.split("## Results")[0].split())
    claim = r"after ([\d,]+) steps and ([\d,]+) tokens GPT-2 knows the play by heart, at a proven loss of ([\d.]+)"
    steps, tokens, loss = re.search(claim, words).groups()
    assert (steps, tokens, loss) == (f"{RECORD['steps']:,}", f"{RECORD['tokens']:,}", f"{RECORD['final_loss']:.3f}")
    assert int(re.search(r"the training takes (\d+) seconds", words)[1]) == round(RECORD["seconds"])


def test_the_demo_record_is_of_the_settings_of_the_preset():
    for name, value in train.PRESETS["demo"].items():
        assert name == "out_dir" or RECORD["config"][name] == value


@pytest.mark.parametrize("command", [c for c in COMMANDS if "train.py" in c])
def test_each_command_of_the_readme_is_understood(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sample.txt").write_text("text")
    argv = shlex.split(command.split("train.py")[1].split(";")[0])
    given, problems = train.read_flags(argv)
    assert given and not problems
    if "resume" not in given:
        train.config_from_flags(argv)


def test_ci_runs_the_test_command_word_for_word():
    (command,) = (c for c in COMMANDS if "pytest" in c)
    assert f"\n{command}\n" in (ROOT / ".ci" / "run").read_text()


def test_each_promise_names_a_test_that_is_there():
    named = re.findall(r'"(test_\w+)"', README.split("### What is promised")[1].split("###")[0])
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    assert len(named) > 12
    for name in named:
        assert f"def {name}(" in tests, name


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\]\((?!http)([^)#\s]+)", README))))
def test_links_lead_to_files(name):
    assert (ROOT / name).exists()
