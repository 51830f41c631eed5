"""A finished run, READMEs to write it into, and what their tests ask of both."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree

import pytest
from conftest import ROOT
from markdown_it import MarkdownIt

import update_readme

GOLDEN = ROOT / "tests" / "golden"
RULE = "=" * 80  # above each block of samples


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(name="run_dir")
def run_dir_fixture(tmp_path):
    """The finished golden run, at out/own."""
    return shutil.copytree(GOLDEN / "own", tmp_path / "out" / "own")


def write_csv(run_dir, text: str) -> None:
    (run_dir / "logs" / "train_metrics.csv").write_text(text, newline="")


def write_readme(tmp_path, *names, text="# Title\n\n{}\n## End\n"):
    path = tmp_path / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.format("\n".join(f"<!--AUTO:{n}:START-->\nold\n<!--AUTO:{n}:END-->\n" for n in names)))
    return path


def block(path, name) -> str:
    return path.read_text().split(f"<!--AUTO:{name}:START-->\n")[1].split(f"<!--AUTO:{name}:END-->\n")[0].strip()


def update(*argv) -> int:
    return update_readme.main(["--run_dir", "out/own", *map(str, argv)])


def assert_sound_markdown(text: str) -> list:
    """Every fence is closed, and every row of a table has as many cells as its header. Returns the tokens."""
    lines = re.split(r"\r\n|\r|\n", text)
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    for token in tokens:
        if token.type == "fence":
            assert re.fullmatch(rf"\s*{token.markup}\s*", lines[token.map[1] - 1]), f"line {token.map[0] + 1} opens"
        if token.type == "table_open":
            cells = [len(re.findall(r"(?<!\\)\|", line)) for line in lines[slice(*token.map)]]
            assert len(set(cells)) == 1, lines[slice(*token.map)]
    return tokens


def put_record(folder, **changes) -> None:
    path = folder / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def svg_of(tmp_path) -> tuple[set[str], str]:
    """(the words in the picture, the file)"""
    svg = (tmp_path / "assets" / "curve.svg").read_text()
    texts = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    return {"".join(e.itertext()).strip() for e in texts}, svg
