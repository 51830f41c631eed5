"""report/pictures.py: the curve and the comparison."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from conftest import ROOT
from markdown_it import MarkdownIt
from run_kit import GOLDEN, block, in_tmp_path, put_record, run_dir_fixture, svg_of, update, write_csv, write_readme  # noqa: F401  (fixtures)

import update_readme
from report import pictures
from report.run import read_run


def test_no_folder_is_taken_for_a_formula(run_dir, tmp_path, monkeypatch):
    write_readme(tmp_path, "COMPARE")
    run_dir.rename(run_dir.parent / r"a$\no$b")
    assert update_readme.main(["--run_dir", r"out/a$\no$b"]) == 0
    assert r">a$\no$b<" in (tmp_path / "assets" / "compare.svg").read_text()


def test_the_curve_is_the_same_to_the_byte_and_states_the_result(run_dir, tmp_path):
    readme = write_readme(tmp_path, "CURVE")
    drawn = []
    for seed, zone in (("1", "UTC"), ("2", "Asia/Tokyo")):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "TZ": zone, "MPLCONFIGDIR": str(tmp_path / f"mpl{seed}")}
        command = [sys.executable, str(ROOT / "update_readme.py"), "--run_dir", "out/own"]
        subprocess.run(command, check=True, env=environment, capture_output=True)
        drawn.append((tmp_path / "assets" / "curve.svg").read_bytes())
        (tmp_path / "assets" / "curve.svg").unlink()
    assert drawn[0] == drawn[1]
    root = ElementTree.fromstring(drawn[0])
    said = "avg_loss of out/own fell from 4.371 to 0.07059 at step 59, under the target of 0.1"
    assert root.find("{*}title").text.startswith(said)
    words = {"".join(e.itertext()).strip() for e in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"loss (one step)", "avg_loss (a full pass)", "best: 0.07059 at step 59", "target 0.1", "lr"} <= words
    (image,) = (c for t in MarkdownIt().parse(readme.read_text()) for c in t.children or [] if c.type == "image")
    assert image.attrs["src"] == "assets/curve.svg" and image.content.startswith(said)


def test_avg_loss_is_drawn_from_the_first_full_pass_on(run_dir, tmp_path):
    write_readme(tmp_path, "CURVE")
    write_csv(run_dir, "step,epoch,loss,avg_loss\n1,0.3,5,5\n2,0.6,4,4.5\n")
    assert update() == 0
    words, _ = svg_of(tmp_path)
    assert "loss" in words and "avg_loss (a full pass)" not in words
    write_csv(run_dir, "step,epoch,loss,avg_loss\n1,0.5,5,5\n2,1.0,4,4.5\n3,1.5,3,3.5\n")
    assert update() == 0
    words, _ = svg_of(tmp_path)
    assert "avg_loss (a full pass)" in words
    run, _ = read_run(run_dir, "out/own")
    assert pictures.series(run, "avg_loss") == ([2, 3], [4.5, 3.5])
    assert pictures.describe(run).startswith("avg_loss of out/own fell from 4.5 to 3.5 at step 3")


def test_every_colour_of_the_curve_has_a_dark_one(run_dir):
    svg = pictures.curve(read_run(run_dir, "out/own")[0]).decode()
    rules, body = svg.split("<style>@media (prefers-color-scheme: dark)")[1].split("</style>", 1)
    colours = set(re.findall(r"(?:fill|stroke): (#\w+)", body))
    assert pictures.PAPER in colours and pictures.LOSS in colours
    for colour in colours:
        assert f'[style*="stroke: {colour}"]' in rules


def contrast(a: str, b: str) -> float:
    """WCAG 2 contrast ratio."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    lighter, darker = sorted((luminance(a), luminance(b)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_words_and_lines_of_the_curve_stand_out_on_both_backgrounds():
    for colour in (
        pictures.INK,
        pictures.LOSS,
        pictures.HELD_OUT,
        pictures.TARGET,
        pictures.LR,
    ):
        assert contrast(colour, pictures.PAPER) > 4.5
        assert contrast(pictures.DARK[colour], pictures.DARK[pictures.PAPER]) > 4.5


@pytest.mark.parametrize(
    "csv",
    [
        "step,loss\n1,5\n",
        "step,loss,lr\n1,nan,0\n2,inf,0\n",
        "step,loss,val_loss\n1,5,6\n2,4,\n3,3,5\n",
        "step,loss\n1,0\n",
    ],
)
def test_curves_of_odd_rows(csv, run_dir, tmp_path):
    write_readme(tmp_path, "CURVE")
    write_csv(run_dir, csv)
    assert update() == 0
    svg = (tmp_path / "assets" / "curve.svg").read_text()
    ElementTree.fromstring(svg)
    assert ("val_loss (held out)" in svg) == ("val_loss" in csv)


def test_a_hundred_thousand_rows_make_a_small_picture(run_dir, tmp_path):
    write_readme(tmp_path, "CURVE")
    rows = "".join(f"{i},{5 + i % 7},0.001\n" for i in range(1, 100_001))
    write_csv(run_dir, f"step,loss,lr\n{rows}")
    assert update() == 0
    assert (tmp_path / "assets" / "curve.svg").stat().st_size < 200_000


def test_without_matplotlib_only_the_curve_is_out_of_reach(run_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    readme = write_readme(tmp_path, "SUMMARY", "CURVE")
    before = readme.read_bytes()
    assert update() == 1
    assert "pip install -r requirements.txt" in capsys.readouterr().err
    assert readme.read_bytes() == before
    write_readme(tmp_path, "SUMMARY")
    assert update() == 0


@pytest.mark.parametrize(
    ("high", "low"), [(9.5, 2.5), (4.2, 1.2), (3.01, 3.002), (10.9, 0.05), (1e5, 1e-5), (0.3, 0.3)]
)
def test_the_axis_of_the_loss_has_numbers(high, low, run_dir, tmp_path):
    write_readme(tmp_path, "CURVE")
    (run_dir / "run.json").unlink()
    (run_dir / "logs" / "train.log").unlink()
    write_csv(run_dir, f"step,loss\n1,{high}\n2,{low}\n")
    assert update() == 0
    _, svg = svg_of(tmp_path)
    axis = svg.split('id="matplotlib.axis_2"')[1].split('id="line2d')[0:]
    numbers = re.findall(r">([-+.e\d]+)</text>", "".join(axis))
    assert 3 <= len(set(numbers)) <= 12


def test_the_key_fits_into_the_picture(run_dir, tmp_path):
    """Four entries and a step of six digits; text is about 0.55 of its size wide a letter."""
    write_readme(tmp_path, "CURVE")
    write_csv(run_dir, "step,epoch,loss,avg_loss,val_loss\n1,1,5,6,7\n200000,9,0.1234,0.1234,0.1234\n")
    assert update() == 0
    _, svg = svg_of(tmp_path)
    places = re.findall(
        r'<text [^>]*(?:translate\(|x=")([\d.]+)[^>]*>([^<]*at step 200000|[^<]*held out[^<]*)</text>', svg
    )
    assert len(places) == 2
    for x, words in places:
        assert float(x) + 0.55 * 10 * len(words) < 576


def test_a_learning_rate_of_0_is_drawn(run_dir, tmp_path):
    write_csv(run_dir, "step,loss,lr\n1,5,0\n2,4,0.001\n3,3,0\n")
    run, _ = read_run(run_dir, "out/own")
    assert pictures.series(run, "lr") == ([1, 2, 3], [0, 0.001, 0])
    assert pictures.series(run, "loss") == ([1, 2, 3], [5, 4, 3])


def test_a_loss_that_did_not_fall_is_not_said_to(run_dir, tmp_path):
    readme = write_readme(tmp_path, "CURVE")
    write_csv(run_dir, "step,loss\n1,2.0\n2,5.0\n")
    assert update() == 0
    assert "![loss of out/own was lowest at step 1, 2;" in block(readme, "CURVE")


def test_the_user_s_own_style_of_matplotlib_changes_nothing(run_dir, tmp_path, monkeypatch):
    write_readme(tmp_path, "CURVE")
    assert update() == 0
    expected = (tmp_path / "assets" / "curve.svg").read_bytes()
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "lines.linewidth", 9)
    monkeypatch.setitem(matplotlib.rcParams, "axes.labelsize", 30)
    monkeypatch.setenv("MPLBACKEND", "module://nowhere")
    assert update("--check") == 0
    assert (tmp_path / "assets" / "curve.svg").read_bytes() == expected


def test_a_folder_with_control_characters_in_its_name(tmp_path):
    shutil.copytree(GOLDEN / "own", tmp_path / "r\x1b\x01\nn")
    write_readme(tmp_path, "SUMMARY", "CURVE")
    assert update_readme.main(["--run_dir", "r\x1b\x01\nn"]) == 0
    svg_of(tmp_path)


def test_the_load_of_experts_is_in_picture_table_and_summary(run_dir, tmp_path):
    readme = write_readme(tmp_path, "CURVE", "METRICS", "SUMMARY")
    put_record(run_dir, config={"n_expert": 7})
    assert update() == 0
    assert not {"experts", "busiest"} & svg_of(tmp_path)[0]
    assert "busiest" not in readme.read_text()
    write_csv(run_dir, "step,loss,lr,load_entropy,busiest\n1,5,1e-3,0.71,0.5\n2,4,2e-3,0.98,0.2234\n")
    assert update() == 0
    words, _ = svg_of(tmp_path)
    assert {"experts", "busiest", "entropy", "lr"} <= words
    run, _ = read_run(run_dir, "out/own")
    assert "at the end the busiest expert had 0.22 of its layer's load" in pictures.describe(run)
    assert "| 2 | **4.000000** | 2.00e-03 | 0.9800 | 0.2234 |" in block(readme, "METRICS")
    assert "the busiest one of a layer had **22%** of its work (evenly shared: 14%)" in block(readme, "SUMMARY")
