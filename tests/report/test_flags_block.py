"""report/flags.py: the flags of train.py and the presets, read from their sources."""

from __future__ import annotations

import ast
import re
import shlex

import pytest
from conftest import ROOT
from markdown_it import MarkdownIt
from run_kit import assert_sound_markdown

from report.flags import flags
from report.run import ReadmeError

TRAIN = """
class TrainConfig:
    preset: str = flag("", "a named set", "Run", choices=("", *PRESETS))
    out_dir: str = flag("out", "run | directory")
    seed: int = flag(0, "a seed", least=0)
    amp: str = flag("auto", "mixed precision", "Machine", choices=("auto", "off", ""))
    compile: bool = flag(False, "slower to start")
    epochs: float | None = flag(None, "passes")
    run: int = 3
"""
PRESETS = """
PRESETS: dict[str, dict] = {
    "plain": {},
    "demo": {"lr": 3e-5, "compile": True, "tensorboard": False, "prompt": "A:\\nB c"},
}
"""


def flags_of(folder, train=TRAIN, presets=PRESETS) -> str:
    (folder / "train.py").write_text(train)
    (folder / "presets.py").write_text(presets)
    return flags(folder / "train.py", folder / "presets.py")


@pytest.mark.parametrize("presets", [PRESETS, PRESETS.replace(": dict[str, dict]", ""), f"RECORDS = {{}}{PRESETS}"])
@pytest.mark.parametrize("choices", ['("", *PRESETS)', "PRESET_NAMES", "tuple(PRESETS)", '("", "old")'])
def test_flags_and_presets_are_read_from_their_sources(presets, choices, tmp_path):
    """An annotated assignment or a plain one, and names of presets that the class takes from elsewhere."""
    text = flags_of(tmp_path, TRAIN.replace('("", *PRESETS)', choices), presets)
    assert text.split("\n") == [
        "| Flag | Default | What it does |",
        "| --- | --- | --- |",
        "| **Run** |  |  |",
        "| `--preset` |  | a named set (`plain` or `demo`) |",
        "| `--out_dir` | `'out'` | run \\| directory |",
        "| `--seed` | `0` | a seed |",
        "| **Machine** |  |  |",
        "| `--amp` | `'auto'` | mixed precision (`auto` or `off`) |",
        "| `--compile` |  | slower to start |",
        "| `--epochs` |  | passes |",
        "",
        "`--preset plain` stands for the defaults.",
        r"`--preset demo` stands for `--lr 3e-05 --compile --no-tensorboard --prompt 'A:\nB c'`.",
    ]
    assert_sound_markdown(text)


def test_flags_are_those_of_train_config():
    """Of this project: each field of the class has a row, and each preset, as it is typed, has all its settings."""
    text = flags(ROOT / "train.py", ROOT / "support" / "presets.py")
    tree = ast.parse((ROOT / "train.py").read_text(encoding="utf-8"))
    (config,) = (node for node in tree.body if getattr(node, "name", "") == "TrainConfig")
    fields = [node.target.id for node in config.body if isinstance(node, ast.AnnAssign)]
    assert re.findall(r"^\| `--(\w+)`", text, re.M) == fields
    for words in re.findall(r"stands for `(.*)`\.$", text, re.M):
        assert {word[2:] for word in shlex.split(words) if word.startswith("--")} <= set(fields)
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    assert sum(token.type == "table_open" for token in tokens) == 1


def test_flags_without_train_py_are_one_sentence(tmp_path):
    missing = tmp_path / "train.py"
    (tmp_path / "presets.py").write_text(PRESETS)
    with pytest.raises(ReadmeError) as e:
        flags(missing, tmp_path / "presets.py")
    assert str(e.value) == f"{missing} can't be read (No such file or directory), and the block FLAGS comes from it"


def test_flags_without_presets_are_one_sentence(tmp_path):
    missing = tmp_path / "presets.py"
    with pytest.raises(ReadmeError) as e:
        flags(tmp_path / "train.py", missing)
    assert str(e.value) == f"{missing} can't be read (No such file or directory), and the block FLAGS comes from it"


@pytest.mark.parametrize(
    "source",
    [
        "x = 1",
        "def",
        "class TrainConfig:\n a: int = flag(x, 1)",
        "class TrainConfig:\n a: int = flag()",
        "class TrainConfig:\n a: str = flag(1, 'help', choices=NAMES)",
    ],
)
def test_a_train_py_without_flags_is_one_sentence(source, tmp_path):
    with pytest.raises(ReadmeError, match=r"train\.py: there is no TrainConfig of flag\(\.\.\.\) fields"):
        flags_of(tmp_path, train=source)


@pytest.mark.parametrize("source", ["x = 1", "def", "PRESETS: dict = []", "PRESETS = {'a': b}", "PRESETS: dict"])
def test_presets_that_are_no_literals_are_one_sentence(source, tmp_path):
    with pytest.raises(ReadmeError, match=r"presets\.py: there is no PRESETS"):
        flags_of(tmp_path, presets=source)
