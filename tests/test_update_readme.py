"""update_readme.py: blocks from a run directory, markers, and how files are written."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

import train
import update_readme

GOLDEN = ROOT / "tests" / "golden"
RULE = "=" * 80


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run_dir(tmp_path):
    """The finished golden run, at out/own."""
    return shutil.copytree(GOLDEN / "own", tmp_path / "out" / "own")


def write_readme(tmp_path, *names, text="# Title\n\n{}\n## End\n"):
    path = tmp_path / "README.md"
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


# ---- blocks ----


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("name", ["own", "foreign"])
def test_golden(name, bom, newline, tmp_path):
    """A run of this program, and one of another project: three columns, Windows paths, a log and a CSV that are still
    being written. With CRLF in all files too, and with a byte order mark."""
    folder = shutil.copytree(GOLDEN / name, tmp_path / "out" / name)
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        path.write_bytes(bom.encode() + path.read_bytes().replace(b"\n", newline.encode()))
    readme = tmp_path / "README.md"
    shutil.move(folder / "before.md", readme)
    for _ in range(2):
        assert update_readme.main(["--run_dir", f"out/{name}"]) == 0
        assert readme.read_bytes().decode() == (folder / "after.md").read_bytes().decode()
        assert update_readme.main(["--run_dir", f"out/{name}", "--check"]) == 0
    assert_sound_markdown(readme.read_text())


def test_without_a_csv_the_log_serves(run_dir, tmp_path):
    readme = write_readme(tmp_path, "SUMMARY", "METRICS")
    (run_dir / "logs" / "train_metrics.csv").unlink()
    (run_dir / "run.json").unlink()
    assert update() == 0
    assert "Best loss: **0.089094** at step **59**" in block(readme, "SUMMARY")
    assert "Logged rows: **31**" in block(readme, "SUMMARY")
    assert block(readme, "METRICS").splitlines()[0] == "| step | loss | avg_loss | lr | tok_per_s |"


def test_a_run_that_was_only_opened(run_dir, tmp_path):
    readme = write_readme(tmp_path, *update_readme.NAMES)
    (run_dir / "logs" / "train_metrics.csv").unlink()
    (run_dir / "samples" / "samples.txt").write_text("")
    log = run_dir / "logs" / "train.log"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:4]))
    record = json.loads((run_dir / "run.json").read_text())
    nothing = {"ended": None, "end": None, "final_loss": None, "tokens_to_target": None, "steps": 0, "tokens": 0}
    (run_dir / "run.json").write_text(json.dumps(record | nothing))
    assert update() == 0
    summary = block(readme, "SUMMARY")
    assert "Ended: not yet: still running, or stopped without a word" in summary
    assert "final_loss: none, the target of 0.1 was not reached" in summary and "no step has been logged yet" in summary
    assert block(readme, "METRICS") == "No step has been logged yet."
    assert block(readme, "SAMPLES") == "No sample has been written yet."
    assert block(readme, "CURVE") == "There is no curve yet, since no step has been logged."
    assert "left out" not in block(readme, "LOGS") and "Tokens per step: 256" in block(readme, "LOGS")
    assert not (tmp_path / "assets").exists()


def test_a_run_that_does_not_exist_is_one_sentence(run_dir, tmp_path, capsys):
    readme = write_readme(tmp_path, "SUMMARY")
    before = readme.read_bytes()
    assert update_readme.main(["--run_dir", "out"]) == 1
    assert capsys.readouterr().err == "out holds no run: there is one in out/own: use --run_dir out/own\n"
    assert update_readme.main(["--run_dir", "nowhere"]) == 1
    assert capsys.readouterr().err == "nowhere holds no run: train first, or name another --run_dir\n"
    assert readme.read_bytes() == before


def test_a_broken_record_is_named_with_its_line(run_dir, tmp_path, capsys):
    readme = write_readme(tmp_path, "SUMMARY")
    before = readme.read_bytes()
    (run_dir / "run.json").write_text('{\n"seed": 7,\n')
    assert update() == 1
    assert capsys.readouterr().err.startswith("out/own/run.json:3: this isn't JSON")
    assert readme.read_bytes() == before


@pytest.mark.parametrize(
    ("csv", "best", "last", "rows"),
    [
        ("step,loss,lr\n1,5,1\n2,4,1\n3,3,0", "3.000000** at step **3", "3.000000** at step **3", 3),  # lr may be cut
        ("step,loss,lr\n1,5,1\n2,4,1\n3,3", "4.000000** at step **2", "4.000000** at step **2", 2),
        ("step,loss\n1,5\n2,4\n3,0", "4.000000** at step **2", "4.000000** at step **2", 2),  # 0.7, cut after the 0
        ("step,loss,lr\n1,5,1\n2,nan,1\n", "5.000000** at step **1", "nan** at step **2", 2),
        ("step,loss\n1,5\n2,oops\n3,4,9\n4,6\n", "5.000000** at step **1", "6.000000** at step **4", 2),
        ("step,loss\n1,5\n2,1\n3,2\n2,4\n3,3\n", "3.000000** at step **3", "3.000000** at step **3", 3),  # resumed
        ("step,loss\n1,5\n2,1\nstep,loss\n1,6\n", "6.000000** at step **1", "6.000000** at step **1", 1),  # begun anew
        ('"Iteration", Train_Loss\n10.0,5\n', "5.000000** at step **10", "5.000000** at step **10", 1),
        ("step,loss\r\r\n1,5\r\r\n2,4\r\r\n", "4.000000** at step **2", "4.000000** at step **2", 2),
    ],
)
def test_rows_of_a_csv(csv, best, last, rows, run_dir, tmp_path):
    readme = write_readme(tmp_path, "SUMMARY")
    (run_dir / "logs" / "train_metrics.csv").write_text(csv, newline="")
    assert update() == 0
    summary = block(readme, "SUMMARY")
    assert f"- Best loss: **{best}**" in summary
    assert f"- Last logged loss: **{last}**" in summary
    assert f"- Logged rows: **{rows}**" in summary


def test_rows_that_are_left_out_are_named(run_dir, tmp_path, capsys):
    write_readme(tmp_path, "SUMMARY")
    (run_dir / "logs" / "train_metrics.csv").write_text("step,loss\n1,5\n2,oops\n3,4\n4,")
    assert update() == 0
    out = capsys.readouterr().out
    assert "train_metrics.csv:3: row left out, since it isn't 2 cells, of which one is the step" in out
    assert "train_metrics.csv:5: row left out, since it has no line end, so it may be cut" in out


def test_a_log_in_utf16_as_powershell_writes_it(run_dir, tmp_path):
    readme = write_readme(tmp_path, "LOGS")
    log = run_dir / "logs" / "train.log"
    log.write_bytes(log.read_text().encode("utf-16"))
    assert update() == 0
    assert "step 59/60 | loss 0.089094" in block(readme, "LOGS") and "\0" not in block(readme, "LOGS")


def test_the_log_is_thinned_and_says_how_much(run_dir, tmp_path):
    readme = write_readme(tmp_path, "LOGS")
    assert update() == 0
    log = (run_dir / "logs" / "train.log").read_text().splitlines()
    shown = block(readme, "LOGS").splitlines()[1:-1]
    notes = [line for line in shown if line.startswith("[...")]
    assert [line for line in shown if line not in notes] == [line for line in log if line in shown]  # in order
    assert shown[0] == log[0] and shown[-1] == log[-1]
    left_out, between = map(int, re.findall(r"\d+", notes[0]))
    assert left_out == len(log) - (len(shown) - len(notes))
    assert between == left_out + update_readme.LOG_MIDDLE


def test_a_torn_line_of_the_log_is_left_out(run_dir, tmp_path):
    readme = write_readme(tmp_path, "LOGS")
    log = run_dir / "logs" / "train.log"
    whole = log.read_text().rstrip("\n")
    log.write_text(whole)  # a last line without a newline, but complete
    assert update() == 0
    assert whole.splitlines()[-1] in block(readme, "LOGS")
    torn = "2026-01-02 10:01:00,000 | INFO | step 60/60 | loss 0.0"
    log.write_text(f"{whole}\n{torn}")
    assert update() == 0
    assert torn not in block(readme, "LOGS")


def test_the_latest_sample_with_output_is_shown_whole(run_dir, tmp_path):
    readme = write_readme(tmp_path, "SAMPLES")
    with open(run_dir / "samples" / "samples.txt", "a") as f:
        f.write(f"{RULE}\nSTEP 60\n\nPROMPT:\nTILDA:\nOUTPUT:\n")  # still being written
    assert update() == 0
    expected = (GOLDEN / "own" / "samples" / "samples.txt").read_text().split("STEP 59\n")[1].strip("\n")
    assert block(readme, "SAMPLES") == f"What the model wrote at step 59:\n\n```text\n{expected}\n```"


def test_a_very_long_sample_is_cut_at_a_border_and_says_so(run_dir, tmp_path):
    readme, path = write_readme(tmp_path, "SAMPLES"), run_dir / "samples" / "samples.txt"
    verse = [f"line {i}" for i in range(150)]
    parts = ["PROMPT:\nA\nOUTPUT:", *verse, "", "PROMPT:\nB\nOUTPUT:", *verse]
    path.write_text("\n".join([RULE, "STEP 9", "", *parts, ""]))
    assert update() == 0
    shown = block(readme, "SAMPLES")
    assert "PROMPT:\nB" not in shown and shown.count("\nline 149\n") == 1 and "153 more lines are left out" in shown
    path.write_text("\n".join([RULE, "STEP 9", "", "PROMPT:\nA\nOUTPUT:", *verse, *verse, ""]))
    assert update() == 0
    assert "\nline 46\n```\n\n103 more lines are left out." in block(readme, "SAMPLES")


def test_samples_of_another_form_are_taken_whole(run_dir, tmp_path):
    readme = write_readme(tmp_path, "SAMPLES")
    (run_dir / "samples" / "samples.txt").write_text("just\ntext\n")
    assert update() == 0
    assert block(readme, "SAMPLES") == "The latest sample:\n\n```text\njust\ntext\n```"


def test_a_foreign_record_breaks_nothing(run_dir, tmp_path):
    readme = write_readme(tmp_path, *update_readme.NAMES)
    odd = {key: [1, {"a": None}] for key in json.loads((run_dir / "run.json").read_text())}
    for record in (odd, dict.fromkeys(odd, 3), dict.fromkeys(odd, "*x* | <b>"), {"other": True}, {}):
        (run_dir / "run.json").write_text(json.dumps(record))
        assert update() == 0
        tokens = assert_sound_markdown(readme.read_text())
        assert not any(child.type in ("html_inline", "em_open") for t in tokens for child in t.children or [])


def test_flags_are_those_of_train_config(run_dir, tmp_path):
    readme = write_readme(tmp_path, "FLAGS")
    assert update() == 0
    tokens = MarkdownIt("commonmark").enable("table").parse(block(readme, "FLAGS"))
    cells = [plain_text(t) for t in tokens if t.type == "inline"][3:]
    rows = [tuple(cells[i : i + 3]) for i in range(0, 3 * (len(cells) // 3), 3)]
    expected = []
    for f in dataclasses.fields(train.TrainConfig):
        if f.metadata["group"]:
            expected.append((f.metadata["group"], "", ""))
        default = "" if f.default is False or f.default in (None, "") else repr(f.default)
        choices = " or ".join(c for c in f.metadata.get("choices", ()) if c)
        expected.append((f"--{f.name}", default, f.metadata["help"] + (f" ({choices})" if choices else "")))
    assert rows == expected
    assert "`--preset shakespeare` stands for the defaults.\n" in block(readme, "FLAGS")
    said = re.findall(r"^`--preset (\S+)` stands for `(.*)`\.$", block(readme, "FLAGS"), re.M)
    assert [name for name, _ in said] == [name for name, preset in train.PRESETS.items() if preset]
    for name, words in said:  # typed as they stand there, they are the preset
        typed, problems = train.read_flags(shlex.split(words))
        typed = {key: train.unescape(value) if key == "prompt" else value for key, value in typed.items()}
        assert typed == train.PRESETS[name] and not problems


def plain_text(token) -> str:
    return "".join(child.content for child in token.children)


def test_flags_without_train_py_are_one_sentence(run_dir, tmp_path, monkeypatch, capsys):
    write_readme(tmp_path, "FLAGS")
    monkeypatch.setattr(update_readme, "HERE", tmp_path)
    assert update() == 1
    path = tmp_path / "train.py"
    assert (
        capsys.readouterr().err
        == f"{path} can't be read (No such file or directory), and the block FLAGS comes from it\n"
    )
    for source in (
        "x = 1",
        "def",
        "class TrainConfig: pass\nPRESETS: dict = []",
        "class TrainConfig:\n a: int = flag(x, 1)",
    ):
        path.write_text(source)
        assert update() == 1
        assert capsys.readouterr().err.startswith(f"{path}: there is no TrainConfig of flag(...) fields with PRESETS")


@pytest.mark.parametrize(
    ("lines", "rows"),
    [
        # steps alone count, and neither val loss nor best loss is the training loss
        (
            ["step 3/9 | loss 7.0 | lr 1e-3", "step 3/9 | val loss 9.0 | ppl 3"],
            [{"step": 3, "loss": 7.0, "val_loss": 9.0}],
        ),
        (
            ["step 4/9 | loss 9.5", "Finished at step 4/9, best loss 7.0", "step 4/9 | new best loss 7.0"],
            [{"step": 4, "loss": 9.5}],
        ),
        (["step 5/9 | loss 4.0", "Resumed from out\\last.pt at step 3 | best loss 5.0"], [{"step": 5, "loss": 4.0}]),
        # other ways to write the same
        (["step 1,000/30,000 | loss 5.5 | tok/s 1,647.7"], [{"step": 1000, "loss": 5.5, "tok_per_s": 1647.7}]),
        (["step     10/30000 | loss 5.5"], [{"step": 10, "loss": 5.5}]),
        (["Step 1/30 | Loss 5.5 | LR 3E-4"], [{"step": 1, "loss": 5.5, "lr": 3e-4}]),
        (["iter 100: loss 4.25, time 3ms"], [{"step": 100, "loss": 4.25}]),
        (["step 250: train loss 1.9, val loss 2.1"], [{"step": 250, "loss": 1.9, "val_loss": 2.1}]),
        (["step 2/9 | loss nan"], [{"step": 2, "loss": float("inf")}]),
        (["step 1/9 | loss 3\rstep 2/9 | loss 2"], [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]),
        (["loss 5 at step 3", "steps 4 | loss 1", "step x | loss 1", "step 7 | loss 12.5k"], []),
    ],
)
def test_steps_of_a_log(lines, rows, run_dir):
    (run_dir / "logs" / "train_metrics.csv").unlink()
    (run_dir / "logs" / "train.log").write_text(
        "".join(f"2025-12-14 02:29:41,162 | INFO | {line}\n" for line in lines), newline=""
    )
    found = update_readme.read_run(run_dir, "out/own")[0].rows
    found = [{k: v if v == v else float("inf") for k, v in row.items()} for row in found]
    assert [{k: v for k, v in row.items() if k in want} for row, want in zip(found, rows, strict=True)] == rows


@pytest.mark.parametrize(
    ("last", "kept"),
    [
        ("step 60/60 | loss 0.089094 | lr 4.71e-05 | tok/s 530.0 | avg_loss 0.070586", True),
        ("step 60/60 | loss 0.089094 | lr 4.71e-05 | tok/s 530.0 | avg_loss 0.0", False),
        ("step 60/60 | loss 0.089094 | lr 4.71e-05 | tok/s 5", False),
        ("step 60/60 | loss 0.0", False),
        ("Training complete.", True),
    ],
)
def test_a_last_line_without_an_end(last, kept, run_dir):
    log = run_dir / "logs" / "train.log"
    log.write_text("\n".join([*log.read_text().split("\n")[:-3], f"2026-01-02 10:01:00,000 | INFO | {last}"]))
    (run_dir / "logs" / "train_metrics.csv").unlink()
    run, _ = update_readme.read_run(run_dir, "out/own")
    assert run.log[-1].endswith(last) == kept
    assert run.rows[-1]["step"] == (60 if kept and "step" in last else 59 if "step 59" in log.read_text() else 58)


def test_a_last_line_of_a_traceback_is_shown(run_dir, tmp_path):
    readme = write_readme(tmp_path, "LOGS")
    with open(run_dir / "logs" / "train.log", "a") as f:
        f.write("Traceback (most recent call last):\nRuntimeError: CUDA out of memory")
    assert update() == 0
    assert "RuntimeError: CUDA out of memory\n```" in block(readme, "LOGS")


def test_a_long_log_without_steps_shows_both_ends(run_dir, tmp_path):
    readme = write_readme(tmp_path, "LOGS")
    lines = [f"2026-01-02 10:00:00,001 | INFO | line {i}" for i in range(60)]
    (run_dir / "logs" / "train.log").write_text("\n".join(lines) + "\n")
    assert update() == 0
    shown = block(readme, "LOGS").splitlines()[1:-1]
    edge = update_readme.LOG_EDGE
    assert shown == [*lines[:edge], "[... 20 of the 20 lines between are left out ...]", *lines[-edge:]]


def test_a_long_log_line_is_cut_and_says_so(run_dir, tmp_path):
    readme = write_readme(tmp_path, "LOGS")
    (run_dir / "logs" / "train.log").write_text(f"2026-01-02 10:00:00,001 | INFO | {'x' * 1_000_000}\n")
    assert update() == 0
    assert len(block(readme, "LOGS")) < 3000 and "[... 998,033 more]" in block(readme, "LOGS")


def test_hostile_lines_take_no_time(run_dir, tmp_path):
    write_readme(tmp_path, "SUMMARY", "LOGS")
    (run_dir / "logs" / "train_metrics.csv").unlink()
    bars = "\r".join(f"step {i}/100000 [00:10<00:20, 3.2it/s]" for i in range(20_000))
    hostile = [bars, "step 1 " * 100_000, "Args: {" * 60_000, "\r" * 300_000 + "x", "<!--" * 50_000]
    (run_dir / "logs" / "train.log").write_text("\n".join(hostile) + "\n", newline="")
    start = time.monotonic()
    assert update() == 0
    assert time.monotonic() - start < 20  # it was minutes


def test_avg_loss_counts_only_after_a_full_pass(run_dir, tmp_path):
    readme = write_readme(tmp_path, "SUMMARY", "CURVE")
    csv = run_dir / "logs" / "train_metrics.csv"
    csv.write_text("step,epoch,loss,avg_loss\n1,0.3,5,5\n2,0.6,4,0.02\n3,0.9,3,0.3\n")
    assert update() == 0
    assert "avg_loss" not in block(readme, "SUMMARY") and "![loss of" in block(readme, "CURVE")
    csv.write_text("step,epoch,loss,avg_loss\n1,0.5,5,0.02\n2,1.0,4,3\n3,1.5,3,2\n")
    assert update() == 0
    assert "Best avg_loss: **2.000000** at step **3** (a full pass)" in block(readme, "SUMMARY")


def test_the_first_of_equal_losses_is_the_best_and_always_in_the_table(run_dir, tmp_path):
    readme = write_readme(tmp_path, "SUMMARY", "METRICS")
    rows = "".join(f"{i},{1 if i in (38, 42) else 5}\n" for i in range(1, 101))
    (run_dir / "logs" / "train_metrics.csv").write_text(f"step,loss\n{rows}")
    assert update() == 0
    assert "Best loss: **1.000000** at step **38**" in block(readme, "SUMMARY")
    assert block(readme, "METRICS").count("| **1.000000** |") == 1 and "| 38 | **1.000000** |" in block(
        readme, "METRICS"
    )
    assert "13 of 100 logged rows" in block(readme, "METRICS")


def test_cells_that_nobody_needs_cost_no_row(run_dir, tmp_path, capsys):
    readme = write_readme(tmp_path, "SUMMARY", "METRICS")
    csv = run_dir / "logs" / "train_metrics.csv"
    csv.write_text('step,loss,epoch,note,train_loss,val_loss\n1,5,1/3,"a,b",9,\n1,,,,,6\n2,4,2/3,x,9,\n')
    assert update() == 0
    assert "Best loss: **4.000000** at step **2**" in block(readme, "SUMMARY")
    assert "Best val_loss: **6.000000** at step **1**" in block(readme, "SUMMARY")
    assert "left out" not in capsys.readouterr().out
    csv.write_text("step,loss\n" + "no,row\n" * 100 + "1,5\n")
    assert update() == 0
    assert "97 more rows left out" in capsys.readouterr().out
    csv.write_text("epoch,step,loss\n0,1,5\n0,2,4\n1,1,3\n")
    assert update() == 0
    assert "1 rows left out, since the run went back behind their steps" in capsys.readouterr().out
    csv.write_text("time,value\n1,2\n")
    assert update() == 0
    out = capsys.readouterr().out
    assert "train_metrics.csv:1: the columns step and loss aren't there" in out
    assert "out/own has no CSV with steps: the log serves" in out


def test_files_at_unusual_places(run_dir, tmp_path, capsys):
    """The last by number; but nothing that is no log, CSV or sample by its name."""
    readme = write_readme(tmp_path, "SUMMARY", "SAMPLES", "LOGS")
    log = (run_dir / "logs" / "train.log").read_text()
    shutil.rmtree(run_dir)
    (run_dir / "logs").mkdir(parents=True)
    (run_dir / "sample.py").write_text("OUTPUT: code")
    (run_dir / "logs" / "prices.csv").write_text("step,loss\n1,777\n")
    assert update() == 1
    assert "out/own holds no run" in capsys.readouterr().err
    (run_dir / "logs" / "run_9.log").write_text("other\n")
    (run_dir / "logs" / "run_10.log").write_text(log)
    (run_dir / "loss_history.csv").write_text("step,loss\n1,7\n")
    (run_dir / "sample_5.txt").write_text("the sample")
    assert update() == 0
    assert "out/own/logs/train.log isn't there: out/own/logs/run_10.log serves" in capsys.readouterr().out
    assert "Best loss: **7.000000**" in block(readme, "SUMMARY") and "the sample" in block(readme, "SAMPLES")
    assert "Ended: target reached at step 59 of 60" in block(readme, "LOGS")


@pytest.mark.parametrize(
    "record",
    [
        '{"target_loss": true, "final_loss": "x", "steps": 1' + "0" * 400 + ', "ended": "  "}',
        '{"config": {"target_loss": 1' + "0" * 400 + "}}",
        '{"corpus": {}, "versions": {}, "resumed": [3], "git_commit": 5}',
    ],
)
def test_a_record_beyond_measure_breaks_nothing(record, run_dir, tmp_path):
    readme = write_readme(tmp_path, *update_readme.NAMES)
    (run_dir / "run.json").write_text(record)
    assert update() == 0
    assert "None" not in block(readme, "REPRODUCE") and "****" not in block(readme, "SUMMARY")


@pytest.mark.parametrize("record", ["[1]", "[" * 100_000, '{"a": 1' + "0" * 5000 + "}"])
def test_a_record_that_is_no_object_is_one_sentence(record, run_dir, tmp_path, capsys):
    write_readme(tmp_path, "SUMMARY")
    (run_dir / "run.json").write_text(record)
    code = update()
    err = capsys.readouterr().err
    assert (code == 1 and err.startswith("out/own/run.json:1: ") and err.count("\n") == 1) or record[0] == "{"


@pytest.mark.parametrize(
    "args", ["{...}", "{1, 2}", "{[1]: 2}", "{" * 5000, '{"target_loss": 1' + "0" * 400 + "}", "{'a'"]
)
def test_odd_args_in_a_log_break_nothing(args, run_dir, tmp_path):
    readme = write_readme(tmp_path, "SUMMARY", "CURVE")
    (run_dir / "run.json").unlink()
    (run_dir / "logs" / "train.log").write_text(f"2026-01-02 10:00:00,001 | INFO | Args: {args}\n")
    assert update() == 0
    assert "Not on record: final_loss\n" in block(readme, "SUMMARY")


def test_the_settings_are_those_of_the_last_start(run_dir, tmp_path):
    readme = write_readme(tmp_path, "SUMMARY")
    (run_dir / "run.json").unlink()
    starts = "".join(f"2026-01-02 10:00:00,001 | INFO | Args: {{'target_loss': {x}}}\n" for x in (0.5, 0.25))
    (run_dir / "logs" / "train.log").write_text(starts)
    assert update() == 0
    assert "whether the target of 0.25 was met" in block(readme, "SUMMARY")


@pytest.mark.parametrize(("final", "verdict"), [(0.0999, "under the target"), (0.1, "not under the target")])
def test_the_target_is_strict(final, verdict, run_dir, tmp_path):
    readme = write_readme(tmp_path, "SUMMARY")
    record = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps({**record, "final_loss": final, "seconds_to_target": 119.6}))
    assert update() == 0
    assert f"**{final:.6f}**, {verdict} of 0.1" in block(readme, "SUMMARY")
    assert "**15,104 tokens** in **2 min 00 s**" in block(readme, "SUMMARY")


def test_a_run_that_ended_without_the_target(run_dir, tmp_path):
    readme = write_readme(tmp_path, "SUMMARY")
    record = json.loads((run_dir / "run.json").read_text())
    nothing = {"ended": "steps done", "final_loss": None, "tokens_to_target": None}
    (run_dir / "run.json").write_text(json.dumps({**record, **nothing}))
    assert update() == 0
    assert "Trained: 15,104 tokens in 1 h 02 min" in block(readme, "SUMMARY")


def test_bytes_that_are_no_utf8_in_the_files_of_a_run(run_dir, tmp_path):
    readme = write_readme(tmp_path, "SAMPLES", "LOGS")
    for path in (run_dir / "logs" / "train.log", run_dir / "samples" / "samples.txt"):
        path.write_bytes(path.read_bytes() + b"\xff\xfe caf\xe9\n")
    assert update() == 0
    assert "caf\ufffd" in readme.read_text()


# ---- runs on the same text ----

EARLIER = json.loads((ROOT / "benchmarks" / "earlier_runs.json").read_text(encoding="utf-8"))


def put_record(folder, **changes) -> None:
    path = folder / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_runs_on_the_same_text_are_compared(run_dir, tmp_path, monkeypatch):
    """The earlier ones on record, this one, and the published ones that are there."""
    readme = write_readme(tmp_path, "COMPARE")
    home = tmp_path / "home"
    (home / "benchmarks").mkdir(parents=True)
    known = EARLIER | {"published": ["out/second", "out/own", "out/not_there"]}
    (home / "benchmarks" / "earlier_runs.json").write_text(json.dumps(known))
    monkeypatch.setattr(update_readme, "HERE", home)
    shakespeare, muon = {"sha256": EARLIER["sha256"]}, {"optimizer": "muon", "lr": 0.0015}
    put_record(
        run_dir, corpus=shakespeare, steps=700, tokens=2_867_200, final_loss=0.0712, config=muon | {"embed_lr": 0.005}
    )
    second = shutil.copytree(run_dir, home / "out" / "second")
    put_record(second, ended=None, end=None, final_loss=None, config=muon | {"embed_lr": 0.0015})
    (home / "out" / "own").symlink_to(run_dir)  # this run itself, which is there once
    assert update() == 0
    lines = block(readme, "COMPARE").split("\n")
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")][2:]
    ours = ["`out/own`", "`home/out/second`"]
    assert [row[0] for row in rows] == [*(past["name"] for past in EARLIER["runs"]), *ours]
    assert rows[0][2:5] == ["2,048", "6,702", "13,725,696"] and rows[1][1] == "not on record"
    assert rows[3][1] == "Muon, peak 0.0015"
    assert rows[2][1:5] == ["Muon, peak 0.0015, of the embeddings 0.005", "4,096", "700", "2,867,200"]
    assert rows[2][5].startswith("**0.0712**, final_loss over the whole text; ")
    assert rows[3][3] == "59" and rows[3][5].endswith("not ended yet")  # from its rows: its record is of the start
    assert lines[-1].endswith("(assets/compare.svg)")
    svg = (tmp_path / "assets" / "compare.svg").read_text()
    assert "tokens, millions" in svg and all(
        f">{name}<" in svg for name in ("second", "own", "earlier script, in steps")
    )
    assert update("--check") == 0
    put_record(run_dir, final_loss=0.2, config={"optimizer": {"name": "sgd"}})
    assert update() == 0
    row = next(line for line in block(readme, "COMPARE").split("\n") if "`out/own`" in line)
    assert "| not on record | 4,096 |" in row and row.endswith("the target wasn't reached |")


def test_a_run_on_a_text_of_its_own_is_compared_with_nothing(run_dir, tmp_path):
    readme = write_readme(tmp_path, "COMPARE")
    assert update() == 0
    assert [line for line in block(readme, "COMPARE").split("\n") if "earlier" in line] == []
    assert "`out/own`" in block(readme, "COMPARE")


def test_earlier_runs_add_up():
    assert all((ROOT / name / "run.json").is_file() for name in EARLIER["published"] + EARLIER["held_out"])
    (steps, _) = EARLIER["runs"]
    assert steps["tokens"] == steps["steps"] * steps["tokens_per_step"] == steps["points"][-1][0]
    at = [200, 1000, 2000, 3000, 4000, 5000, 6000, 6702]
    assert [tokens for tokens, _ in steps["points"]] == [2048 * step for step in at]


def test_runs_with_held_out_text_are_told_from_records(run_dir, tmp_path, monkeypatch):
    """Earlier ones, published ones, and this one if it held text out; the picture is the largest model's."""
    readme = write_readme(tmp_path, "SUMMARY", "HELDOUT")
    home = tmp_path / "home"
    (home / "benchmarks").mkdir(parents=True)
    known = EARLIER | {"held_out": ["out/char", "out/not_there"]}
    (home / "benchmarks" / "earlier_runs.json").write_text(json.dumps(known))
    monkeypatch.setattr(update_readme, "HERE", home)
    char = shutil.copytree(run_dir, home / "out" / "char")
    text = {"file": "data/own.txt", "sha256": EARLIER["sha256"], "held_out": 100}
    put_record(run_dir, corpus={"sha256": EARLIER["sha256"]})
    put_record(char, corpus=text, config={"tokenizer": "char", "seq_len": 1024}, parameters=2_500_000, seconds=75)
    put_record(char, steps=5000, tokens=2_560_000, final_loss=1.5)
    rows = [(1000, 2.5), (2000, 1.75), (5000, 1.8125)]
    (char / "logs" / "train_metrics.csv").write_text(
        "step,loss,val_loss\n" + "".join(f"{step},2.0,{loss}\n{step + 1},2.0,\n" for step, loss in rows)
    )
    assert update() == 0
    lines = block(readme, "HELDOUT").split("\n")
    found = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")][2:]
    assert [row[0] for row in found] == ["earlier script, small", "earlier script, medium", "`home/out/char`"]
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
    assert "val_loss was lowest at step 2000, 1.75, and 1.812 at the end" in lines[-1]
    assert "(assets/heldout.svg)" in lines[-1] and "over all of the text but what was held out is 1.5" in lines[-1]
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


@pytest.mark.parametrize("config", [{"recall_places": 40}, {}])
def test_what_was_learned_stands_below_the_metrics(run_dir, tmp_path, config):
    readme = write_readme(tmp_path, "METRICS")
    assert update() == 0 and "recall" not in block(readme, "METRICS")
    samples = [{"prompt": "A", "characters": 640, "verbatim": 93}, {"prompt": "B", "characters": 7, "verbatim": 7}]
    put_record(run_dir, recall=0.875, recall_at_windows=0.96875, samples=samples, config=config)
    assert update() == 0
    first, windows, second = block(readme, "METRICS").split("\n")[-3:]
    assert windows == "- recall_at_windows: **0.9688**, the same where windows of training begin"
    assert "recall: **0.8750** of the next 32 tokens" in first and ("up to 40 places" in first) == bool(config)
    assert second.endswith("in characters: **93** of 640, **7** of 7")
    assert_sound_markdown(readme.read_text())
    for odd in ([1], "x", [{}], [{"verbatim": "a", "characters": None}], {}):
        put_record(run_dir, samples=odd, recall="high", recall_at_windows=None)
        assert update() == 0 and "recall" not in block(readme, "METRICS")


# ---- the curve ----


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
    said = "avg_loss of out/own fell from 9.881 to 0.07059 at step 59, under the target of 0.1"
    assert root.find("{*}title").text.startswith(said)
    words = {"".join(e.itertext()).strip() for e in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"loss (one step)", "avg_loss (a full pass)", "best: 0.07059 at step 59", "target 0.1", "lr"} <= words
    (image,) = (c for t in MarkdownIt().parse(readme.read_text()) for c in t.children or [] if c.type == "image")
    assert image.attrs["src"] == "assets/curve.svg" and image.content.startswith(said)


def test_every_colour_of_the_curve_has_a_dark_one(run_dir):
    svg = update_readme.curve(update_readme.read_run(run_dir, "out/own")[0]).decode()
    rules, body = svg.split("<style>@media (prefers-color-scheme: dark)")[1].split("</style>", 1)
    colours = set(re.findall(r"(?:fill|stroke): (#\w+)", body))
    assert update_readme.PAPER in colours and update_readme.LOSS in colours
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
        update_readme.INK,
        update_readme.LOSS,
        update_readme.HELD_OUT,
        update_readme.TARGET,
        update_readme.LR,
    ):
        assert contrast(colour, update_readme.PAPER) > 4.5
        assert contrast(update_readme.DARK[colour], update_readme.DARK[update_readme.PAPER]) > 4.5


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
    (run_dir / "logs" / "train_metrics.csv").write_text(csv)
    assert update() == 0
    svg = (tmp_path / "assets" / "curve.svg").read_text()
    ElementTree.fromstring(svg)
    assert ("val_loss (held out)" in svg) == ("val_loss" in csv)


@pytest.mark.parametrize("last", ["\0\0\0", "60,0.1\r0.2,3\n", f"60,{'1' * 200_000},2\n"])
def test_a_line_that_is_no_csv_costs_no_other(last, run_dir, tmp_path):
    readme = write_readme(tmp_path, "SUMMARY")
    with open(run_dir / "logs" / "train_metrics.csv", "a", newline="") as f:
        f.write(last)
    assert update() == 0
    assert "Logged rows: **31**" in block(readme, "SUMMARY")


def test_a_hundred_thousand_rows_make_a_small_picture(run_dir, tmp_path):
    write_readme(tmp_path, "CURVE")
    rows = "".join(f"{i},{5 + i % 7},0.001\n" for i in range(1, 100_001))
    (run_dir / "logs" / "train_metrics.csv").write_text(f"step,loss,lr\n{rows}")
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


def svg_of(tmp_path) -> tuple[set[str], str]:
    """(the words in the picture, the file)"""
    svg = (tmp_path / "assets" / "curve.svg").read_text()
    texts = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    return {"".join(e.itertext()).strip() for e in texts}, svg


@pytest.mark.parametrize(
    ("high", "low"), [(9.5, 2.5), (4.2, 1.2), (3.01, 3.002), (10.9, 0.05), (1e5, 1e-5), (0.3, 0.3)]
)
def test_the_axis_of_the_loss_has_numbers(high, low, run_dir, tmp_path):
    write_readme(tmp_path, "CURVE")
    (run_dir / "run.json").unlink()
    (run_dir / "logs" / "train.log").unlink()
    (run_dir / "logs" / "train_metrics.csv").write_text(f"step,loss\n1,{high}\n2,{low}\n")
    assert update() == 0
    _, svg = svg_of(tmp_path)
    axis = svg.split('id="matplotlib.axis_2"')[1].split('id="line2d')[0:]
    numbers = re.findall(r">([-+.e\d]+)</text>", "".join(axis))
    assert 3 <= len(set(numbers)) <= 12


def test_the_key_fits_into_the_picture(run_dir, tmp_path):
    """Four entries and a step of six digits; text is about 0.55 of its size wide a letter."""
    write_readme(tmp_path, "CURVE")
    (run_dir / "logs" / "train_metrics.csv").write_text(
        "step,epoch,loss,avg_loss,val_loss\n1,1,5,6,7\n200000,9,0.1234,0.1234,0.1234\n"
    )
    assert update() == 0
    _, svg = svg_of(tmp_path)
    places = re.findall(
        r'<text [^>]*(?:translate\(|x=")([\d.]+)[^>]*>([^<]*at step 200000|[^<]*held out[^<]*)</text>', svg
    )
    assert len(places) == 2
    for x, words in places:
        assert float(x) + 0.55 * 10 * len(words) < 576


def test_a_learning_rate_of_0_is_drawn(run_dir, tmp_path):
    (run_dir / "logs" / "train_metrics.csv").write_text("step,loss,lr\n1,5,0\n2,4,0.001\n3,3,0\n")
    run, _ = update_readme.read_run(run_dir, "out/own")
    assert update_readme.series(run, "lr") == ([1, 2, 3], [0, 0.001, 0])
    assert update_readme.series(run, "loss") == ([1, 2, 3], [5, 4, 3])


def test_a_loss_that_did_not_fall_is_not_said_to(run_dir, tmp_path):
    readme = write_readme(tmp_path, "CURVE")
    (run_dir / "logs" / "train_metrics.csv").write_text("step,loss\n1,2.0\n2,5.0\n")
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


# ---- markers ----


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
            "\n<!--AUTO:PLOT:START-->\n<!--AUTO:PLOT:END-->\n",
            ["2: <!--AUTO:PLOT:START--> is no marker: the blocks are", "3: "],
        ),
        ("<!--AUTO:SUMARY:START-->\n", ["1: <!--AUTO:SUMARY:START--> is no marker: write <!--AUTO:SUMMARY:START-->"]),
        ("<!-- AUTO:LOGS:START -->\n", ["1: <!-- AUTO:LOGS:START --> is no marker: write <!--AUTO:LOGS:START-->"]),
        ("<!--AUTO:logs:start-->\n", ["1: <!--AUTO:logs:start--> is no marker: write <!--AUTO:LOGS:START-->"]),
        ("<!--AUTO:LOGS:BEGIN-->\n", ["1: <!--AUTO:LOGS:BEGIN--> is no marker: write <!--AUTO:LOGS:START-->"]),
        ("<!--AUTO:LOGS:ENDE-->\n", ["1: <!--AUTO:LOGS:ENDE--> is no marker: write <!--AUTO:LOGS:END-->"]),
        ("<!--AUTO:LOGS-->\n", ["1: <!--AUTO:LOGS--> is no marker"]),
        ("<!--AUTO LOGS END-->\n", ["1: <!--AUTO LOGS END--> is no marker: write <!--AUTO:LOGS:END-->"]),
        ("<!--LOGS:END-->\n", ["1: <!--LOGS:END--> is no marker: write <!--AUTO:LOGS:END-->"]),
        ("<!--AUTO:LOGS:START->\n", ["1: <!--AUTO:LOGS:START-> is no marker: write <!--AUTO:LOGS:START-->"]),
        *[
            (f"{text}\n", [f"1: {text} is no marker: write <!--AUTO:{name}-->"])
            for text, name in {
                "<!--ATUO:SUMMARY:START-->": "SUMMARY:START",
                "<!--AUTO:SAMPLE-START-->": "SAMPLES:START",
                "<!--AUTO;SUMMARY;START-->": "SUMMARY:START",
                "<!--/AUTO:SUMMARY-->": "SUMMARY:START",
                "<--AUTO:SUMMARY:START-->": "SUMMARY:START",
                "<!--AUTO:SUMARY START-->": "SUMMARY:START",
                "<!--AUTO:LOGS:STOP-->": "LOGS:END",
                "<!--AUTO:LOGS:FINISH-->": "LOGS:END",
            }.items()
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
        "<!-- Metrics end -->\n<!-- flags: start of the list -->\n<!-- AUTO: false -->\n<!-- logs: end of file -->\n",
        "<!-- AUTO-GENERATED-CONTENT:START (TOC) -->\n<!-- AUTO-GENERATED-CONTENT:END -->\n",
    ],
)
def test_markers_in_code_are_text(text, run_dir, tmp_path):
    readme = write_readme(tmp_path, "LOGS", text="{}" + text)
    assert update() == 0
    assert readme.read_text().endswith(text)


PIECES = [
    *["```", "~~~", "````", "\n", "\r\n", "\r", "\t", " ", "|", "\\", "<b>", "-->", "<!--", "</details>"],
    *["\x1b[31m", "\0", "\x0c", "\x85", "\u2028", "\u202e", "\ud800", "# ", "- ", "> ", "    ", "$x$", "[a](b)"],
    *[f"<!--AUTO:{name}:{edge}-->" for name in update_readme.NAMES for edge in ("START", "END")],
]
HOSTILE = st.lists(st.sampled_from(PIECES) | st.characters(), max_size=30).map("".join)


@settings(max_examples=50, deadline=None)
@given(sample=st.lists(HOSTILE, max_size=4), line=HOSTILE, ended=HOSTILE, command=HOSTILE)
def test_no_content_breaks_out_of_its_block(tmp_path_factory, sample, line, ended, command):
    folder = tmp_path_factory.mktemp("run")
    run_dir = shutil.copytree(GOLDEN / "own", folder / "run")
    sample_file, log = run_dir / "samples" / "samples.txt", run_dir / "logs" / "train.log"
    outputs = "".join(f"PROMPT:\n{text}\nOUTPUT:\n{text}\n\n" for text in sample)
    sample_file.write_bytes(f"{RULE}\nSTEP 3\n\n{outputs}".encode("utf-8", "surrogatepass"))
    log.write_bytes(log.read_bytes() + f"2026-01-02 10:00:41,000 | INFO | {line}\n".encode("utf-8", "surrogatepass"))
    record = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps(record | {"ended": ended, "command": command, "device": line}))
    names = [name for name in update_readme.NAMES if name != "CURVE"]
    readme = write_readme(folder, *names)
    argv = ["--run_dir", str(run_dir), "--readme", str(readme)]
    assert update_readme.main(argv) == 0
    text = readme.read_bytes().decode()
    assert re.findall("<!--AUTO:(.*?)-->", text) == [f"{name}:{edge}" for name in names for edge in ("START", "END")]
    tokens = assert_sound_markdown(text)
    assert [t.content for t in tokens if t.type == "html_block"] == [
        f"<!--AUTO:{name}:{edge}-->\n" for name in names for edge in ("START", "END")
    ]
    assert [tokens[i + 1].content for i, t in enumerate(tokens) if t.type == "heading_open"] == ["Title", "End"]
    assert not any(child.type == "html_inline" for t in tokens for child in t.children or [])
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e]", text)
    assert update_readme.main([*argv, "--check"]) == 0  # twice is once


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


def test_what_is_inside_a_block_need_not_be_right(run_dir, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("<!--AUTO:LOGS:START-->\n<!-- AUTO:LOGS:BEGIN -->\n<!--AUTO:LOGS:END-->\n")
    assert update() == 0


# ---- writing ----


def test_bytes_outside_the_blocks_are_kept(run_dir, tmp_path):
    readme = tmp_path / "README.md"
    before = b"\xef\xbb\xbfcaf\xe9 \r\n\n  tail  \r<!--AUTO:SUMMARY:START-->  \r\n"
    after = b"  <!--AUTO:SUMMARY:END-->\n\n\n\x00\xff\tno newline at the end"
    readme.write_bytes(before + b"old" + b"\r\n" + after)
    assert update() == 0
    data = readme.read_bytes()
    assert data.startswith(before) and data.endswith(after)
    inside = data[len(before) : -len(after)]
    assert inside.count(b"\n") == inside.count(b"\r\n") > 5 and b"Best loss" in inside


def test_check_and_diff_write_nothing(run_dir, tmp_path, capsys):
    readme = write_readme(tmp_path, "SUMMARY", "CURVE")
    before = readme.read_bytes()
    assert update("--check") == 5
    assert "README.md: is stale: python update_readme.py --run_dir out/own" in capsys.readouterr().out
    assert update("--diff") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("assets/curve.svg: would be drawn anew\n--- README.md\n+++ README.md (updated)\n@@")
    assert "-old\n" in shown and "+- Best loss: **0.089094**" in shown
    assert update("--check", "--diff") == 5
    assert readme.read_bytes() == before and not (tmp_path / "assets").exists()
    assert update() == 0
    assert update("--check") == 0
    (tmp_path / "assets" / "curve.svg").write_text("another picture")
    assert update("--check") == 5


def test_a_current_file_is_not_written_again(run_dir, tmp_path, monkeypatch):
    write_readme(tmp_path, "SUMMARY", "CURVE")
    assert update() == 0
    monkeypatch.setattr(update_readme.Change, "stage", lambda change: pytest.fail(f"{change.path} written"))
    assert update() == 0


@pytest.mark.skipif(os.name != "posix", reason="modes and links of POSIX")
def test_mode_and_link_are_kept(run_dir, tmp_path):
    readme = write_readme(tmp_path, "SUMMARY")
    (tmp_path / "docs").mkdir()
    target = readme.rename(tmp_path / "docs" / "real.md")
    target.chmod(0o640)
    readme.symlink_to(target)
    assert update() == 0
    assert readme.is_symlink() and target.stat().st_mode & 0o777 == 0o640
    assert "Best loss" in target.read_text()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_files_and_no_other(call, run_dir, tmp_path, monkeypatch, capsys):
    readme = write_readme(tmp_path, "SUMMARY", "CURVE")
    before = readme.read_bytes()
    (tmp_path / "assets").mkdir()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    assert update() == 1
    assert "No space left on device" in capsys.readouterr().err
    assert readme.read_bytes() == before
    assert not list(tmp_path.rglob("*.part")) and not (tmp_path / "assets" / "curve.svg").exists()


def test_all_files_are_whole_on_the_disk_before_the_first_is_replaced(run_dir, tmp_path, monkeypatch):
    write_readme(tmp_path, "SUMMARY", "CURVE")
    events = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (events.append(name), real(*a)))
    assert update() == 0
    assert events == ["fsync", "fsync", "replace", "replace"]


def test_a_readme_and_its_pictures_elsewhere(run_dir, tmp_path):
    (tmp_path / "my docs").mkdir()
    readme = write_readme(tmp_path / "my docs", "SUMMARY", "CURVE")
    assert update("--readme", readme, "--assets_dir", tmp_path / "pictures (all)") == 0
    assert (tmp_path / "pictures (all)" / "curve.svg").exists()
    (image,) = (c for t in MarkdownIt().parse(readme.read_text()) for c in t.children or [] if c.type == "image")
    assert image.attrs["src"] == "../pictures%20%28all%29/curve.svg"
    assert update("--readme", readme) == 0
    assert (tmp_path / "my docs" / "assets" / "curve.svg").exists()


def test_blocks_that_the_readme_lacks_are_named(run_dir, tmp_path, capsys):
    write_readme(tmp_path, "SUMMARY", "LOGS", "METRICS", "SAMPLES")
    assert update() == 0
    assert "README.md has no block CURVE, REPRODUCE, COMPARE, HELDOUT, FLAGS: left alone\n" in capsys.readouterr().out


def test_usage_errors(run_dir, tmp_path, capsys):
    assert update("--readme", "nothing.md") == 2
    assert capsys.readouterr().err == "update_readme.py: nothing.md isn't a file: name one with --readme\n"
    with pytest.raises(SystemExit) as e:
        update("--che")
    assert e.value.code == 2


# ---- this project's own ----


def test_it_imports_neither_torch_nor_train_py(run_dir, tmp_path):
    write_readme(tmp_path, *update_readme.NAMES)
    code = (
        "import sys, update_readme as u; u.main(['--run_dir', 'out/own']); print({'torch', 'train'} & set(sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_the_readme_of_this_project_is_current(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert update_readme.main(["--run_dir", "out/shakespeare", "--check"]) == 0


def test_the_readme_of_this_project_is_sound_markdown():
    tokens = assert_sound_markdown((ROOT / "README.md").read_text(encoding="utf-8"))
    assert sum(t.type == "table_open" for t in tokens) >= 4


def test_the_same_command_from_elsewhere_gives_the_same_bytes(run_dir, tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    readme = write_readme(tmp_path / "docs", "SUMMARY", "CURVE")
    assert update("--readme", "docs/README.md") == 0
    assert "Run directory: `../out/own`" in readme.read_text()
    monkeypatch.chdir(tmp_path / "docs")
    assert update_readme.main(["--run_dir", "../out/own", "--check"]) == 0
    assert update_readme.main(["--run_dir", str(run_dir), "--readme", str(readme), "--check"]) == 0


def test_the_remedy_of_check_is_the_whole_command(run_dir, tmp_path, capsys):
    (tmp_path / "my docs").mkdir()
    write_readme(tmp_path / "my docs", "SUMMARY")
    assert update("--readme", "my docs/README.md", "--assets_dir", "a b", "--check") == 5
    command = re.search("is stale: python update_readme.py (.*) brings it up to date", capsys.readouterr().out)[1]
    assert update_readme.main(shlex.split(command)) == 0
    assert update("--readme", "my docs/README.md", "--assets_dir", "a b", "--check") == 0


def test_a_diff_is_a_patch(run_dir, tmp_path, capfdbinary):
    if not shutil.which("patch"):
        pytest.skip("there is no patch program")
    readme = write_readme(tmp_path, "SUMMARY", "LOGS", text="# T\r\n\n{}no end")
    assert update("--diff") == 0
    (tmp_path / "x.patch").write_bytes(capfdbinary.readouterr().out)
    copy = tmp_path / "copy.md"
    shutil.copy(readme, copy)
    subprocess.run(["patch", "--binary", "-s", str(copy), "x.patch"], check=True)
    assert update() == 0
    assert copy.read_bytes() == readme.read_bytes()


def test_a_terminal_that_lacks_characters_or_is_closed(run_dir, tmp_path):
    write_readme(tmp_path, "SUMMARY", text="caf\u00e9 \U0001f600\n{}")
    script = str(ROOT / "update_readme.py")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, script, "--run_dir", "out/own", "--diff"]
    shown = subprocess.run(command, env=environment, check=True, capture_output=True)
    assert b"caf\\xe9" in shown.stdout and b"Traceback" not in shown.stderr
    if os.name == "posix":
        for end in (">&-", ">/dev/full", "2>&-"):
            done = subprocess.run(f"{shlex.join(command[:-1])} {end}", shell=True, capture_output=True)
            assert done.returncode == 0 and not done.stderr


@pytest.mark.parametrize("name", ["a" * 300, "nothing.md", "out"])
def test_readmes_that_cannot_be(name, run_dir, tmp_path, capsys):
    assert update("--readme", name) in (1, 2)
    err = capsys.readouterr().err
    assert err.startswith("update_readme.py: ") and err.count("\n") == 1


def test_a_loop_of_links_is_one_sentence(run_dir, tmp_path, capsys):
    write_readme(tmp_path, "CURVE")
    os.symlink("assets", tmp_path / "assets")
    assert update() == 1
    assert capsys.readouterr().err.count("\n") == 1
