"""report/published.py: the runs on record, in the blocks COMPARE and HELDOUT."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import ROOT
from run_kit import (  # noqa: F401  (fixtures)
    assert_sound_markdown,
    block,
    in_tmp_path,
    put_record,
    run_dir_fixture,
    update,
    write_csv,
    write_readme,
)

from report import published

EARLIER = json.loads((ROOT / "records" / "earlier_runs.json").read_text(encoding="utf-8"))
FIRST_STEP = "first_step_loss_under_target"
FIRST_MEAN = "first_mean_of_100_under_target"


def at_home(tmp_path, monkeypatch, **changes):
    """A project of its own, whose records are EARLIER with these changes."""
    home = tmp_path / "home"
    (home / "records").mkdir(parents=True)
    (home / "records" / "earlier_runs.json").write_text(json.dumps(EARLIER | changes))
    monkeypatch.setattr(published, "ROOT", home)
    return home


def table_of(readme, name) -> list[list[str]]:
    """The rows of a block's table, without its header."""
    lines = [line for line in block(readme, name).split("\n") if line.startswith("|")]
    return [line.strip("| ").split(" | ") for line in lines[2:]]


def test_runs_on_the_same_text_are_compared(run_dir, tmp_path, monkeypatch):
    """The earlier ones on record, this one, and the published ones that are there."""
    readme = write_readme(tmp_path, "COMPARE")
    home = at_home(tmp_path, monkeypatch, published=["records/second", "records/own", "records/not_there"])
    muon = {"optimizer": "muon", "lr": 0.0015}
    put_record(run_dir, corpus={"sha256": EARLIER["sha256"]}, steps=700, tokens=2_867_200, final_loss=0.0712)
    put_record(run_dir, config=muon | {"embed_lr": 0.005})
    second = shutil.copytree(run_dir, home / "records" / "second")
    put_record(second, ended=None, end=None, final_loss=None, config=muon | {"embed_lr": 0.0015})
    (home / "records" / "own").symlink_to(run_dir)  # this run itself, which is there once
    assert update() == 0
    rows = table_of(readme, "COMPARE")
    assert [row[0] for row in rows[:-2]] == [past["name"] for past in EARLIER["runs"]]
    own, other = rows[-2:]
    assert own[:5] == ["`out/own`", "Muon, peak 0.0015, of the embeddings 0.005", "4,096", "700", "2,867,200"]
    assert own[7].startswith("**0.0712**, final_loss over the whole text; ")
    assert other[:2] == ["`home/records/second`", "Muon, peak 0.0015"]
    assert other[3] == "59" and other[7].endswith("not ended yet")  # from its rows: its record is of the start
    assert block(readme, "COMPARE").endswith("(assets/compare.svg)")
    svg = (tmp_path / "assets" / "compare.svg").read_text()
    for words in ("tokens, millions", ">second<", ">own<", ">earlier script, in steps<"):
        assert words in svg
    assert update("--check") == 0
    put_record(run_dir, final_loss=0.2, config={"optimizer": {"name": "sgd"}})
    assert update() == 0
    own = table_of(readme, "COMPARE")[-2]
    assert own[1:3] == ["not on record", "4,096"] and own[7].endswith("the target wasn't reached")


def test_what_earlier_runs_stopped_at_is_said_as_far_as_it_is_known(run_dir, tmp_path):
    readme = write_readme(tmp_path, "COMPARE")
    put_record(run_dir, corpus={"sha256": EARLIER["sha256"]})
    assert update() == 0
    rows = {row[0]: row[1:] for row in table_of(readme, "COMPARE")}
    unknown = "not on record"
    assert rows["earlier script, in steps"][1:6] == ["2,048", "6,702", "13,725,696", unknown, "13,725,696"]
    assert rows["earlier script, on Colab"][3:] == ["about 9,400,000", "about 9,400,000", unknown, "one step's loss"]
    assert rows["earlier script, in rounds"][3:6] == ["14,336,000", unknown, unknown]
    assert rows["earlier script, on a T4 in 21 minutes"] == [*[unknown] * 3, "about 16,000,000", *[unknown] * 3]


@pytest.mark.parametrize(
    ("on_record", "first_step", "first_mean"),
    [
        ({FIRST_STEP: {"step": 50, "tokens": 12_800}, FIRST_MEAN: None}, "12,800", "not reached"),
        ({FIRST_STEP: {"step": 50}, FIRST_MEAN: {"step": 99, "tokens": 25_344}}, "not on record", "25,344"),
        ({FIRST_STEP: "odd", FIRST_MEAN: {"tokens": "odd"}}, "not on record", "not on record"),
        ({"target_loss": 0.0}, "no target", "no target"),
        ({}, "not on record", "not on record"),  # not every step has a row in the CSV
    ],
)
def test_where_other_ways_to_stop_would_have_stopped_is_in_the_record(
    on_record, first_step, first_mean, run_dir, tmp_path
):
    readme = write_readme(tmp_path, "COMPARE")
    put_record(run_dir, **on_record)
    assert update() == 0
    assert table_of(readme, "COMPARE")[-1][5:7] == [first_step, first_mean]


@pytest.mark.parametrize(
    ("losses", "first_step", "first_mean"),
    [
        ([5.0] * 50 + [0.05] + [0.2] * 50 + [0.05] * 60, "510", "not reached"),
        ([0.1] * 100 + [0.05], "1,010", "1,010"),  # strictly under
        ([10.0] + [0.05] * 100, "20", "1,010"),
        ([5.0] * 99, "not reached", "not reached"),
    ],
)
def test_of_an_older_run_every_step_of_the_csv_tells_it(losses, first_step, first_mean, run_dir, tmp_path):
    readme = write_readme(tmp_path, "COMPARE")
    rows = "".join(f"{step},{10 * step},{loss}\n" for step, loss in enumerate(losses, 1))
    write_csv(run_dir, f"step,tokens,loss\n{rows}")
    assert update() == 0
    assert table_of(readme, "COMPARE")[-1][5:7] == [first_step, first_mean]
    write_csv(run_dir, f"step,tokens,loss\n{rows}{len(losses) + 2},1,0.01\n")  # a step is missing
    assert update() == 0
    assert table_of(readme, "COMPARE")[-1][5:7] == ["not on record"] * 2


def test_a_run_on_a_text_of_its_own_is_compared_with_nothing(run_dir, tmp_path):
    readme = write_readme(tmp_path, "COMPARE")
    assert update() == 0
    assert [line for line in block(readme, "COMPARE").split("\n") if "earlier" in line] == []
    assert "`out/own`" in block(readme, "COMPARE")


def test_earlier_runs_add_up():
    assert all((ROOT / name / "run.json").is_file() for name in EARLIER["published"] + EARLIER["held_out"])
    in_steps = [past for past in EARLIER["runs"] if past["steps"]]
    (steps,) = in_steps
    assert steps["tokens"] == steps["steps"] * steps["tokens_per_step"] == steps["points"][-1][0]
    at = [200, 1000, 2000, 3000, 4000, 5000, 6000, 6702]
    assert [tokens for tokens, _ in steps["points"]] == [2048 * step for step in at]


def test_runs_with_held_out_text_are_told_from_records(run_dir, tmp_path, monkeypatch):
    """Earlier ones, published ones, and this one if it held text out; the picture is the largest model's."""
    readme = write_readme(tmp_path, "SUMMARY", "HELDOUT")
    home = at_home(tmp_path, monkeypatch, held_out=["records/char", "records/not_there"])
    char = shutil.copytree(run_dir, home / "records" / "char")
    text = {"file": "data/own.txt", "sha256": EARLIER["sha256"], "held_out": 100}
    put_record(run_dir, corpus={"sha256": EARLIER["sha256"]})
    put_record(char, corpus=text, config={"tokenizer": "char", "seq_len": 1024}, parameters=2_500_000, seconds=75)
    put_record(char, steps=5000, tokens=2_560_000, final_loss=1.5)
    write_csv(char, "step,loss,val_loss\n1000,2.0,2.5\n1001,2.0,\n2000,2.0,1.75\n5000,2.0,1.8125\n")
    assert update() == 0
    found = table_of(readme, "HELDOUT")
    assert [row[0] for row in found] == ["earlier script, small", "earlier script, medium", "`home/records/char`"]
    assert found[0][1:] == [
        "`data/input.txt`",
        "209,729 (0.86 MB)",
        "char",
        "32",
        "5,000 of 512 tokens",
        "not on record",
        "1.6658",
        "1.8275",
    ]
    words = "**1.7500** at step 2,000, 1.8125 at the end"
    assert found[2][1:] == [
        "`data/own.txt`",
        "2,500,000 (10.00 MB)",
        "char",
        "1,024",
        "5,000 of 512 tokens",
        "1 min 15 s",
        "1.5000",
        words,
    ]
    picture = block(readme, "HELDOUT").split("\n")[-1]
    assert "val_loss was lowest at step 2000, 1.75, and 1.812 at the end" in picture
    assert "(assets/heldout.svg)" in picture and "over all of the text but what was held out is 1.5" in picture
    assert ">val_loss (held out)<" in (tmp_path / "assets" / "heldout.svg").read_text()
    assert update("--check") == 0 and "over the whole text" in block(readme, "SUMMARY")
    put_record(run_dir, corpus=text)
    shutil.copy(char / "logs" / "train_metrics.csv", run_dir / "logs" / "train_metrics.csv")
    assert update() == 0
    assert "over all of the text but what was held out: " in block(readme, "SUMMARY")
    assert "Best val_loss: **1.750000** at step **2000**" in block(readme, "SUMMARY")
    assert "| `out/own` | " in block(readme, "HELDOUT")
    assert_sound_markdown(readme.read_text())


def test_without_any_run_with_held_out_text_it_says_so(run_dir, tmp_path):
    readme = write_readme(tmp_path, "HELDOUT")
    assert update() == 0
    assert block(readme, "HELDOUT") == "No run with held-out text is on record."
