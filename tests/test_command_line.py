"""The program as it is typed: exit codes, signals, terminal."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, rows_of, same_weights, tiny_flags, weights_of, without_times

import train

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(*flags, **options):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**ENV, "XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"]},
        **options,
    )


def run(*flags):
    process = start(*flags)
    stdout, stderr = process.communicate(timeout=120)
    return process.returncode, stdout, stderr


def test_a_run_from_start_to_proof(tmp_path):
    code, stdout, stderr = run(*tiny_flags(tmp_path / "out", steps=300, lr=3e-3, target_loss=9.5, log_every=20))
    assert (code, stderr) == (0, "")  # no bar where stderr is no terminal
    closing = stdout[stdout.index("Ended: ") :]
    assert "Ended: target reached at step" in closing
    for start_of_line in (
        "Trained: ",
        "Loss: avg_loss 9.",
        "Checkpoints: ",
        "To sample: python sample.py --checkpoint",
    ):
        assert re.search(rf"^{start_of_line}", closing, re.M), start_of_line
    assert "--- sample at step" in stdout
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["command"].startswith("python train.py --out_dir ")
    command = next(line for line in closing.splitlines() if line.startswith("To sample: python "))
    sample = subprocess.run(
        [sys.executable, *command.removeprefix("To sample: python ").split(), "--max_new_tokens", "5"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=ENV,
    )
    assert sample.returncode == 0 and sample.stdout.strip().startswith("BIANCA:")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_a_checkpoint_and_resuming_loses_nothing(tmp_path, signum, code):
    flags = {"steps": 150, "save_every": 1000, "num_prompts": 0, "log_every": 10, "target_loss": 0}
    process = start(*tiny_flags(tmp_path / "out", **flags))
    for line in process.stdout:
        if line.startswith("step 20/"):
            process.send_signal(signum)
            break
    rest, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (code, "")
    assert "Ended: interrupted at step" in rest and "To train on: python train.py --resume" in rest
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["ended"] == "interrupted" and 20 <= record["steps"] < 150
    assert train.load_checkpoint(tmp_path / "out" / "checkpoints" / "last.pt")["step"] == record["steps"]
    last = str(tmp_path / "out" / "checkpoints" / "last.pt")
    assert run("--resume", last)[0] == 0  # all else comes from the checkpoint
    assert run(*tiny_flags(tmp_path / "whole", **flags))[0] == 0
    assert same_weights(weights_of(tmp_path / "out"), weights_of(tmp_path / "whole"))
    assert without_times(rows_of(tmp_path / "out")) == without_times(rows_of(tmp_path / "whole"))
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["resumed"] == [f"python train.py --resume {last}"] and record["ended"] == "steps done"


def test_a_signal_during_a_long_sample_is_heard(tmp_path):
    process = start(*tiny_flags(tmp_path / "out", steps=5, sample_every=1, max_new_tokens=1_000_000))
    for line in process.stdout:
        if line.startswith("step 1/"):
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert train.load_checkpoint(tmp_path / "out" / "checkpoints" / "last.pt")["step"] == 1


def test_a_second_signal_is_left_to_the_system():
    before = signal.getsignal(signal.SIGTERM)
    with train.StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signum == signal.SIGTERM
        for either in (signal.SIGTERM, signal.SIGINT):
            assert signal.getsignal(either) is signal.SIG_DFL
        with pytest.raises(train.Stopped):
            stop.poll()
    assert signal.getsignal(signal.SIGTERM) is before


def test_bad_flags_exit_with_2_and_a_sentence_each(tmp_path):
    code, stdout, stderr = run(*tiny_flags(tmp_path / "out", lr=-1, n_embd=17), "--stepz", "4")
    assert (code, stdout) == (2, "")
    assert sorted(line.split()[1] for line in stderr.splitlines()) == ["--stepz", "lr", "n_embd"]
    assert not (tmp_path / "out").exists()


def test_an_existing_run_exits_with_2_and_stays(tmp_path):
    assert train.main(tiny_flags(tmp_path / "out")) == 0
    before = (tmp_path / "out" / "run.json").read_bytes()
    assert train.main(tiny_flags(tmp_path / "out")) == 2
    assert (tmp_path / "out" / "run.json").read_bytes() == before
    assert train.main([*tiny_flags(tmp_path / "out"), "--overwrite"]) == 0


def test_a_damaged_checkpoint_exits_with_1(tmp_path, capsys):
    path = tmp_path / "last.pt"
    path.write_bytes(b"PK\x03\x04 not really")
    assert train.main([*tiny_flags(tmp_path / "out"), "--resume", str(path)]) == 1
    error = capsys.readouterr().err
    assert "is damaged or isn't a checkpoint" in error and error.count("\n") == 1


def test_resume_auto_starts_anew_where_there_is_nothing(tmp_path):
    assert train.main([*tiny_flags(tmp_path / "out"), "--resume", "auto"]) == 0
    assert len(rows_of(tmp_path / "out")) == 6


def test_the_out_dir_of_a_moved_run_is_where_its_checkpoint_lies(tmp_path):
    assert train.main(tiny_flags(tmp_path / "out")) == 0
    (tmp_path / "out").rename(tmp_path / "moved")
    assert train.main(["--resume", str(tmp_path / "moved" / "checkpoints" / "last.pt"), "--steps", "9"]) == 0
    assert not (tmp_path / "out").exists() and len(rows_of(tmp_path / "moved")) == 9


def test_resuming_from_within_the_folder_of_checkpoints_goes_on_in_the_same_run(tmp_path, monkeypatch):
    assert train.main(tiny_flags(tmp_path / "out")) == 0
    monkeypatch.chdir(tmp_path / "out" / "checkpoints")
    assert train.main(["--resume", "last.pt", "--steps", "9"]) == 0
    assert sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir()) == ["last.pt", "previous.pt"]
    assert len(rows_of(tmp_path / "out")) == 9


def test_a_closed_stderr_ends_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert train.main(tiny_flags(tmp_path / "out", steps=45)) == 0


def test_help_is_grouped_and_fits_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        train.main(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert all(f"--{name}" in text for name in train.FIELDS)
    assert all(f"\n{group}:\n" in text for group in ("Run", "Data", "Model", "Training", "Output", "Machine"))
    flags = text[text.index("\nRun:\n") : text.index("examples:")]
    assert max(map(len, flags.splitlines())) <= 80


@pytest.mark.parametrize("program", ["train", "sample", "export_hf", "update_readme"])
def test_help_fits_into_80_columns(program, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = importlib.import_module(program).build_parser().format_help()
    assert max(map(len, text.splitlines())) <= 80
    assert f"usage: python {program}.py" in text and "examples:\n  " in text
