"""report/run.py: what is read of a run directory, and what is passed over."""

from __future__ import annotations

import io
import shutil
import sys
import time
import tracemalloc

import pytest
from run_kit import block, in_tmp_path, run_dir_fixture, update, write_csv, write_readme  # noqa: F401  (fixtures)

import update_readme
from report import lines
from report.blocks import lines_to_show
from report.lines import read_lines
from report.log import Log, step_of
from report.run import read_run


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


def test_without_a_csv_the_log_serves(run_dir, tmp_path):
    readme = write_readme(tmp_path, "SUMMARY", "METRICS")
    (run_dir / "logs" / "train_metrics.csv").unlink()
    (run_dir / "run.json").unlink()
    assert update() == 0
    assert "Best loss: **0.089094** at step **59**" in block(readme, "SUMMARY")
    assert "Logged rows: **31**" in block(readme, "SUMMARY")
    assert block(readme, "METRICS").splitlines()[0] == "| step | loss | avg_loss | lr | tok_per_s |"


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
    write_csv(run_dir, csv)
    assert update() == 0
    summary = block(readme, "SUMMARY")
    assert f"- Best loss: **{best}**" in summary
    assert f"- Last logged loss: **{last}**" in summary
    assert f"- Logged rows: **{rows}**" in summary


def test_rows_that_are_left_out_are_named(run_dir, tmp_path, capsys):
    write_readme(tmp_path, "SUMMARY")
    write_csv(run_dir, "step,loss\n1,5\n2,oops\n3,4\n4,")
    assert update() == 0
    out = capsys.readouterr().out
    assert "train_metrics.csv:3: row left out, since it isn't 2 cells, of which one is the step" in out
    assert "train_metrics.csv:5: row left out, since it has no line end, so it may be cut" in out


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


@pytest.mark.parametrize("last", ["\0\0\0", "60,0.1\r0.2,3\n", f"60,{'1' * 200_000},2\n"])
def test_a_line_that_is_no_csv_costs_no_other(last, run_dir, tmp_path):
    readme = write_readme(tmp_path, "SUMMARY")
    with open(run_dir / "logs" / "train_metrics.csv", "a", newline="") as f:
        f.write(last)
    assert update() == 0
    assert "Logged rows: **31**" in block(readme, "SUMMARY")


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
    found = read_run(run_dir, "out/own")[0].rows
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
    run, _ = read_run(run_dir, "out/own")
    _, shown = max([*run.log.opening, *run.log.some_steps(), *run.log.behind])
    assert shown.endswith(last) == kept
    assert run.rows[-1]["step"] == (60 if kept and "step" in last else 59 if "step 59" in log.read_text() else 58)


def test_a_log_in_utf16_as_powershell_writes_it(run_dir, tmp_path):
    readme = write_readme(tmp_path, "LOGS")
    log = run_dir / "logs" / "train.log"
    log.write_bytes(log.read_text().encode("utf-16"))
    assert update() == 0
    assert "step 59/60 | loss 0.089094" in block(readme, "LOGS") and "\0" not in block(readme, "LOGS")


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


def test_hostile_lines_take_no_time(run_dir, tmp_path):
    write_readme(tmp_path, "SUMMARY", "LOGS")
    (run_dir / "logs" / "train_metrics.csv").unlink()
    bars = "\r".join(f"step {i}/100000 [00:10<00:20, 3.2it/s]" for i in range(20_000))
    hostile = [bars, "step 1 " * 100_000, "Args: {" * 60_000, "\r" * 300_000 + "x", "<!--" * 50_000]
    (run_dir / "logs" / "train.log").write_text("\n".join(hostile) + "\n", newline="")
    start = time.monotonic()
    assert update() == 0
    assert time.monotonic() - start < 20  # it was minutes


def test_a_long_log_is_read_in_one_go_and_a_few_of_its_lines_are_kept(run_dir, tmp_path):
    write_readme(tmp_path, "SUMMARY", "LOGS")
    path = run_dir / "logs" / "train.log"
    opening = path.read_text().split("\n")[:5]
    steps = [f"2026-01-02 10:00:00,001 | INFO | step {i}/20000 | loss 5.0 | lr 1e-3" for i in range(1, 20_001)]
    path.write_text("\n".join([*opening, *steps, "2026-01-02 11:00:00,001 | INFO | Ended: steps done"]) + "\n")
    log = Log()
    tracemalloc.start()
    places = [row["step"] for row in log.read(path) if row["step"] % 1000 == 0]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert places == list(range(1000, 20_001, 1000))
    assert peak < path.stat().st_size / 2
    shown = [line for _, line in lines_to_show(log)]
    assert shown[:4] == opening[:4]
    numbers = [step_of(line)["step"] for line in shown[4:-1]]
    assert numbers == pytest.approx([1, 5000, 10_000, 15_000, 20_000], abs=50)
    assert numbers[-1] == 20_000
    assert shown[-1].endswith("Ended: steps done")
    assert log.count == 20_006


def test_reading_takes_one_line_at_a_time_and_shows_a_bar_if_it_takes_long(tmp_path, monkeypatch):
    path = tmp_path / "train_metrics.csv"
    path.write_bytes(b"1,5.0\r\n" * 200_000)
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(lines, "BAR_AFTER", 60.0)
    tracemalloc.start()
    assert all(line == "1,5.0\n" for line in read_lines(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < path.stat().st_size / 4
    assert terminal.getvalue() == ""
    monkeypatch.setattr(lines, "BAR_AFTER", 0.0)
    assert next(read_lines(path)) == "1,5.0\n"
    assert "train_metrics.csv:   0%" in terminal.getvalue()


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


def test_bytes_that_are_no_utf8_in_the_files_of_a_run(run_dir, tmp_path):
    readme = write_readme(tmp_path, "SAMPLES", "LOGS")
    for path in (run_dir / "logs" / "train.log", run_dir / "samples" / "samples.txt"):
        path.write_bytes(path.read_bytes() + b"\xff\xfe caf\xe9\n")
    assert update() == 0
    assert "caf\ufffd" in readme.read_text()


def test_avg_loss_counts_only_after_a_full_pass(run_dir, tmp_path):
    readme = write_readme(tmp_path, "SUMMARY", "CURVE")
    csv = run_dir / "logs" / "train_metrics.csv"
    csv.write_text("step,epoch,loss,avg_loss\n1,0.3,5,5\n2,0.6,4,0.02\n3,0.9,3,0.3\n")
    assert update() == 0
    assert "avg_loss" not in block(readme, "SUMMARY") and "![loss of" in block(readme, "CURVE")
    csv.write_text("step,epoch,loss,avg_loss\n1,0.5,5,0.02\n2,1.0,4,3\n3,1.5,3,2\n")
    assert update() == 0
    assert "Best avg_loss: **2.000000** at step **3** (a full pass)" in block(readme, "SUMMARY")
