"""report/markers.py: which lines are markers, and what is wrong with those that are broken."""

from __future__ import annotations

import pytest
from markdown_it import MarkdownIt
from run_kit import assert_sound_markdown, block, in_tmp_path, run_dir_fixture, update, write_readme  # noqa: F401  (fixtures)


@pytest.mark.parametrize(
    ("text", "errors"),
    [
        ("a\n<!--AUTO:LOGS:START-->\n", ["2: LOGS starts and never ends"]),
        ("a\n<!--AUTO:LOGS:END-->\n", ["2: LOGS ends without a START"]),
        (
            "<!--AUTO:LOGS:START-->\n<!--AUTO:SUMMARY:START-->\n<!--AUTO:LOGS:END-->\n<!--AUTO:SUMMARY:END-->\n",
            ["2: SUMMARY starts inside LOGS", "3: LOGS ends inside SUMMARY (line 2): two blocks can't cross"],
        ),
        (
            "<!--AUTO:LOGS:START-->\n<!--AUTO:SUMMARY:START-->\n<!--AUTO:SUMMARY:END-->\n<!--AUTO:LOGS:END-->\n",
            ["2: SUMMARY starts inside LOGS, which has no END before it (line 1)"],
        ),
        (
            "<!--AUTO:LOGS:START-->\n<!--AUTO:LOGS:END-->\n\n<!--AUTO:LOGS:START-->\n<!--AUTO:LOGS:END-->\n",
            ["4: a second START of LOGS, which starts in line 1"],
        ),
        (
            "<!--AUTO:LOGS:START-->\n<!--AUTO:LOGS:START-->\n<!--AUTO:LOGS:END-->\n",
            ["2: a second START of LOGS, which starts in line 1"],
        ),
        ("<!--AUTO:LOGS:START-->\n<!--AUTO:LOGS:END-->\n<!--AUTO:LOGS:END-->\n", ["3: LOGS ends without a START"]),
        (
            "\n<!--AUTO:GRAPH:START-->\n<!--AUTO:GRAPH:END-->\n",
            ["2: <!--AUTO:GRAPH:START--> is no marker: a marker is <!--AUTO:NAME:START--> or", "3: "],
        ),
        *[
            (f"{text}\n", [f"1: {text} is no marker: a marker is <!--AUTO:NAME:START--> or <!--AUTO:NAME:END-->"])
            for text in (
                "<!--AUTO:SUMARY:START-->",
                "<!-- AUTO:LOGS:START -->",
                "<!--AUTO:logs:start-->",
                "<!--auto:logs:start-->",
                "<!--Auto : LOGS : START-->",
                "<!--AUTO:LOGS:BEGIN-->",
                "<!--AUTO:LOGS-->",
                "<!--AUTO:LOGS:START->",
                "<!--/AUTO:SUMMARY-->",
                "<!-- AUTO: false -->",
            )
        ],
        ("`<!--AUTO:LOGS:START-->` <!-- AUTO:LOGS:END -->\n", ["1: <!-- AUTO:LOGS:END --> is no marker"]),
        ("<pre>\n<!--AUTO:LOGS:START-->\n<!--AUTO:LOGS:END-->\n</pre>\n", [" has no block"]),
        ("so: <!--AUTO:LOGS:START-->\n", ["1: <!--AUTO:LOGS:START--> must stand alone on its line"]),
        ("<!--AUTO:LOGS:START--> <!--AUTO:LOGS:END-->\n", ["1: <!--AUTO:LOGS:START--> must stand alone on its line"]),
        ("- a\n\n  - <!--AUTO:LOGS:START-->\n", ["3: <!--AUTO:LOGS:START--> must stand alone on its line"]),
        (
            "<!--AUTO:LOGS:START-->\n```text\nnever closed\n<!--AUTO:LOGS:END-->\n",
            ["1: LOGS starts and never ends (the code fence of line 2 is never closed)"],
        ),
        ("no block at all\n", [" has no block: put <!--AUTO:SUMMARY:START--> and"]),
        ("```\n<!--AUTO:LOGS:START-->\n<!--AUTO:LOGS:END-->\n```\n", [" has no block"]),
    ],
)
def test_broken_markers_are_named_with_their_line_and_nothing_is_written(text, errors, run_dir, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    assert update() == 1
    found = capsys.readouterr().err.splitlines()
    for line, error in zip(found, errors, strict=True):
        assert line.startswith(f"README.md:{error}" if error[0].isdigit() else f"README.md{error}")
    assert readme.read_text() == text and not (tmp_path / "assets").exists()


@pytest.mark.parametrize(
    "text",
    [
        "```html\n<!--AUTO:LOGS:START-->\n```\n",
        "~~~\n```\n<!--AUTO:NONE:START-->\n~~~\n",
        "````\n```\n<!--AUTO:LOGS:END-->\n````\n",
        "1. a list\n\n   ```\n   <!--AUTO:LOGS:START-->\n   ```\n",
        "> ```\n> <!--AUTO:LOGS:START-->\n> ```\n",
        "text\n\n    <!--AUTO:LOGS:START-->\n\ntext\n",
        "write `<!--AUTO:LOGS:START-->` and ``<!--AUTO:LOGS:END-->`` on lines of their own\n",
        "<!-- auto: this comment is someone's own -->\n<!-- the logs end here -->\n",
        "<!-- Metrics end -->\n<!-- flags: start of the list -->\n<!-- logs: end of file -->\n<!--LOGS:END-->\n",
        "<!--ATUO:SUMMARY:START-->\n<!--AUTO LOGS END-->\n<--AUTO:SUMMARY:START-->\n",
        "<!-- AUTO-GENERATED-CONTENT:START (TOC) -->\n<!-- AUTO-GENERATED-CONTENT:END -->\n",
    ],
)
def test_markers_in_code_are_text(text, run_dir, tmp_path):
    readme = write_readme(tmp_path, "LOGS", text="{}" + text)
    assert update() == 0
    assert readme.read_text().endswith(text)


def test_what_is_inside_a_block_need_not_be_right(run_dir, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("<!--AUTO:LOGS:START-->\n<!-- AUTO:LOGS:BEGIN -->\n<!--AUTO:LOGS:END-->\n")
    assert update() == 0


@pytest.mark.parametrize("indent", ["", "  ", "   ", "    ", "\t"])
@pytest.mark.parametrize("name", ["SUMMARY", "METRICS", "SAMPLES", "LOGS", "REPRODUCE"])
def test_a_block_in_a_list_item_stays_in_it(name, indent, run_dir, tmp_path):
    readme = tmp_path / "README.md"
    text = f"1. Train it.\n\n{indent}<!--AUTO:{name}:START-->\n{indent}<!--AUTO:{name}:END-->\n\n2. Look.\n\nEnd.\n"
    readme.write_text(text)
    lists = [(t.type, t.level) for t in MarkdownIt().parse(text) if "list" in t.type and t.level < 2]
    for _ in range(2):
        assert update() == 0
        tokens = assert_sound_markdown(readme.read_text())
        assert [t.content for t in tokens if t.type == "inline"][-2:] == ["Look.", "End."]
        if len(indent) > 2:  # else the marker itself ends the list
            assert [(t.type, t.level) for t in tokens if "ordered_list" in t.type] == [
                ("ordered_list_open", 0),
                ("ordered_list_close", 0),
            ], lists
