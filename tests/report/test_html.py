"""A run's report as one HTML file."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
from run_kit import RULE, in_tmp_path, run_dir_fixture, update  # noqa: F401

import update_readme

HTML = ["--html", "report.html"]


class Reader(HTMLParser):
    """Which elements a page has, with their attributes, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.elements = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def write_samples(run_dir, samples: dict[int, str]) -> None:
    blocks = [f"{RULE}\nSTEP {step}\nPROMPT:\nTILDA:\nOUTPUT:\n{text}\n" for step, text in samples.items()]
    (run_dir / "samples" / "samples.txt").write_text("\n".join(blocks))


def test_the_report_has_the_result_the_curve_samples_figures_and_the_command(run_dir, tmp_path):
    assert update(*HTML) == 0
    page = (tmp_path / "report.html").read_text()
    record = json.loads((run_dir / "run.json").read_text())
    text = Reader(page).text
    assert f"{record['final_loss']:.4f}" in text
    assert f"{record['parameters']:,}" in text
    assert record["command"] in text
    assert page.count("<svg") == 1
    for title in ("The curve", "How its text grew", "Figures", "The model", "How to repeat it", "The log"):
        assert f"<h2>{title}</h2>" in page


def test_samples_stand_side_by_side_from_the_first_to_the_last(run_dir, tmp_path):
    write_samples(run_dir, {step: f"text of step {step}" for step in range(10, 110, 10)})
    assert update(*HTML) == 0
    page = (tmp_path / "report.html").read_text()
    assert re.findall(r"<b>step (\d+)</b>", page) == ["10", "30", "50", "80", "100"]
    assert "text of step 10\n" not in page.split("How its text grew")[0]
    assert page.count("After the prompt") == 1


def test_nothing_of_a_run_becomes_html_or_script(run_dir, tmp_path):
    attack = '<script>alert(1)</script><img src="http://example.com/x" onerror=alert(1)>'
    write_samples(run_dir, {10: attack})
    record = json.loads((run_dir / "run.json").read_text())
    record |= {"command": f"python train.py {attack}", "ended": attack, "device": attack}
    (run_dir / "run.json").write_text(json.dumps(record))
    with (run_dir / "logs" / "train.log").open("a") as f:
        f.write(f"2026-01-01 00:00:00,000 | INFO | {attack}\n")
    assert update(*HTML) == 0
    elements = Reader((tmp_path / "report.html").read_text()).elements
    assert not {"script", "img", "iframe", "object", "form"} & {tag for tag, _ in elements}
    assert not any(name.startswith("on") for _, attributes in elements for name in attributes)


def test_the_report_asks_no_network_for_anything(run_dir, tmp_path):
    assert update(*HTML) == 0
    for tag, attributes in Reader((tmp_path / "report.html").read_text()).elements:
        if tag != "a":
            links = [attributes.get(name) or "" for name in ("src", "href", "xlink:href")]
            assert all(link.startswith(("data:", "#")) for link in links if link), (tag, attributes)


def test_the_same_run_gives_the_same_report(run_dir, tmp_path):
    assert update(*HTML) == 0
    first = (tmp_path / "report.html").read_bytes()
    assert update(*HTML) == 0
    assert (tmp_path / "report.html").read_bytes() == first


def test_a_file_that_is_no_report_is_not_replaced(run_dir, tmp_path, capsys):
    (tmp_path / "report.html").write_text("<p>mine</p>")
    assert update(*HTML) == 2
    assert "is there, and is no report: name another file with --html" in capsys.readouterr().err
    assert (tmp_path / "report.html").read_text() == "<p>mine</p>"


@pytest.mark.parametrize("other", ["--check", "--diff"])
def test_a_report_is_only_written(run_dir, other, capsys):
    assert update(*HTML, other) == 2
    assert "--html only writes a report" in capsys.readouterr().err


def test_a_run_without_samples_rows_and_record_has_a_report_too(tmp_path):
    (tmp_path / "bare" / "logs").mkdir(parents=True)
    (tmp_path / "bare" / "logs" / "train.log").write_text("2026-01-01 00:00:00,000 | INFO | Device: cpu\n")
    assert update_readme.main(["--run_dir", "bare", *HTML]) == 0
    assert "How its text grew" not in (tmp_path / "report.html").read_text()
