"""train.py as it is typed: flags, help, exit codes, signals."""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys

import pytest
from conftest import PLAY, ROOT, rows_of, same_weights, tiny_flags, weights_of, without_times
from hypothesis import given, settings
from hypothesis import strategies as st

import sample
import train
from support import cli, inference
from support.checkpoint import load_checkpoint
from support.cli import RunError, UsageError
from support.presets import PRESETS
from support.settings import from_flags


def read(tmp_path, *words: str) -> train.TrainConfig:
    """What the flags of a run of the demo mean."""
    return from_flags(train.TrainConfig, ["--preset", "demo", "--out_dir", str(tmp_path / "run"), *words])


def flag_problems(tmp_path, *words: str) -> list[str]:
    with pytest.raises(UsageError) as caught:
        read(tmp_path, *words)
    return caught.value.problems


# ---- flags ----


def test_unreadable_flags_and_unsound_values_are_reported_together(tmp_path):
    words = ["--stepz", "5", "--lr", "fast", "--n_embd", "770", "--batch_size", "-1", "--seed"]
    problems = flag_problems(tmp_path, *words)
    names = {problem.split()[0].lstrip("-") for problem in problems}
    assert names == {"stepz", "lr", "n_embd", "batch_size", "seed"}
    assert "--stepz is unknown: did you mean --steps?" in problems


def test_a_value_that_cannot_be_read_causes_no_second_complaint(tmp_path):
    assert len(flag_problems(tmp_path, "--steps", "many", "--input_file", __file__)) == 1


def test_a_negative_number_is_a_value_and_not_a_flag(tmp_path):
    assert flag_problems(tmp_path, "--lr", "-3e-4") == ["lr -0.0003 is too small: use a number over 0"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--compile=yes"], "--compile=yes takes no value"),
        (["--epochs", "inf"], "epochs inf isn't a finite number"),
        (["--prompt", "caf\udce9"], "prompt 'caf\\udce9' isn't UTF-8"),
        (["word"], "'word' stands alone"),
    ],
)
def test_odd_flags_have_their_sentence_beside_the_others(words, sentence, tmp_path):
    first, second = flag_problems(tmp_path, *words, "--lr", "-1")
    assert sentence in first + second
    assert "lr -1.0 is too small" in first + second


def test_explicit_flags_win_over_the_preset(tmp_path):
    config = read(tmp_path, "--lr", "1e-5")
    assert config.lr == 1e-5
    assert config.batch_size == PRESETS["demo"]["batch_size"]


def test_a_given_length_replaces_the_one_of_the_preset(tmp_path):
    by_epochs = read(tmp_path, "--epochs", "2")
    assert (by_epochs.steps, by_epochs.epochs) == (None, 2.0)


def test_the_prompt_takes_escapes(tmp_path):
    assert read(tmp_path, "--prompt", r"TILDA:\n\tA\\n").prompt == "TILDA:\n\tA\\n"


def test_switches_can_be_turned_off(tmp_path):
    assert read(tmp_path, "--compile").compile is True
    assert read(tmp_path, "--compile", "--no-compile").compile is False


def test_the_last_of_two_flags_wins(tmp_path):
    assert read(tmp_path, "--lr", "1e-5", "--lr", "2e-5").lr == 2e-5
    assert read(tmp_path, "--preset", "char-small").tokenizer == "char"


def test_input_file_may_be_given_several_times(tmp_path):
    license_ = str(ROOT / "LICENSE")
    assert read(tmp_path, "--input_file", str(PLAY), "--input_file", license_).input_file == (str(PLAY), license_)
    assert read(tmp_path, "--input_file", license_).input_file == license_


NUMBERS = st.one_of(st.integers(-5, 5), st.floats(), st.none(), st.text(max_size=3))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(cli.fields_of(train.TrainConfig))), NUMBERS), max_size=5))
def test_no_flags_ever_end_in_a_traceback(pairs):
    words = []
    for name, value in pairs:
        words.append(f"--{name}")
        if value is not None:
            words.append(str(value))
    try:
        from_flags(train.TrainConfig, words)
    except (UsageError, RunError) as e:
        assert str(e)


# ---- help ----


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_grouped_and_fits_80_columns(flag, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        train.main([flag])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert all(f"--{name}" in text for name in cli.fields_of(train.TrainConfig))
    assert all(f"\n{group}:\n" in text for group in ("Run", "Data", "Model", "Training", "Output", "Machine"))
    flags = text[text.index("\nRun:\n") : text.index("examples:")]
    assert max(map(len, flags.splitlines())) <= 80


@pytest.mark.parametrize("program", ["train", "sample", "export_hf", "update_readme"])
def test_help_fits_into_80_columns(program, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = importlib.import_module(program).build_parser().format_help()
    assert max(map(len, text.splitlines())) <= 80
    assert f"usage: python {program}.py" in text
    assert "examples:\n  " in text


# ---- exit codes ----


@pytest.fixture
def quick_flags(short_text, tmp_path):
    """quick_flags(**changes) -> the flags of a quick run in tmp_path/out."""
    return functools.partial(tiny_flags, tmp_path / "out", input_file=short_text, tokenizer="char")


def test_bad_flags_exit_with_2_and_a_sentence_each(tmp_path, capsys, quick_flags):
    assert train.main([*quick_flags(lr=-1, n_embd=17), "--stepz", "4"]) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert sorted(line.split()[1] for line in stderr.splitlines()) == ["--stepz", "lr", "n_embd"]
    assert not (tmp_path / "out").exists()


def test_an_existing_run_exits_with_2_and_stays(tmp_path, quick_flags):
    assert train.main(quick_flags()) == 0
    before = (tmp_path / "out" / "run.json").read_bytes()
    assert train.main(quick_flags()) == 2
    assert (tmp_path / "out" / "run.json").read_bytes() == before
    assert train.main([*quick_flags(), "--overwrite"]) == 0
    assert (tmp_path / "out" / "run.json").read_bytes() != before


def test_a_damaged_checkpoint_exits_with_1(tmp_path, capsys, quick_flags):
    path = tmp_path / "last.pt"
    path.write_bytes(b"PK\x03\x04 not really")
    assert train.main([*quick_flags(), "--resume", str(path)]) == 1
    error = capsys.readouterr().err
    assert "is damaged or isn't a checkpoint" in error
    assert error.count("\n") == 1


def test_a_closed_stderr_ends_no_run(monkeypatch, quick_flags):
    """Not even where a bar would be drawn: of the steps, the proof, samples and recall."""
    monkeypatch.setattr(sys, "stderr", None)
    assert train.main(quick_flags(steps=25, batch_size=1, seq_len=64)) == 0


def test_a_run_from_start_to_proof(tmp_path, capfd, quick_flags):
    flags = quick_flags(steps=300, lr=1e-2, target_loss=3.0, log_every=20)
    assert train.main(flags) == 0
    stdout, stderr = capfd.readouterr()
    assert stderr == ""  # no bar where stderr is no terminal
    assert "--- sample at step" in stdout
    closing = stdout[stdout.index("Ended: ") :]
    assert "Ended: target reached at step" in closing
    for beginning in ("Trained: ", "Loss: avg_loss 2.9", "Checkpoints: ", "To sample: python sample.py --checkpoint"):
        assert re.search(rf"^{beginning}", closing, re.M), beginning
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["command"] == shlex.join(["python", "train.py", *flags])

    # The command that the log gives can be typed as it is.
    command = next(line for line in closing.splitlines() if line.startswith("To sample: "))
    words = shlex.split(command.removeprefix("To sample: python sample.py "))
    assert sample.main([*words, "--device", "cpu", "--prompt", "TILDA:", "--max_new_tokens", "5"]) == 0
    assert capfd.readouterr().out.strip().startswith("TILDA:")


# ---- where a run goes on ----


def test_resume_auto_starts_anew_where_there_is_nothing(tmp_path, quick_flags):
    assert train.main([*quick_flags(), "--resume", "auto"]) == 0
    assert len(rows_of(tmp_path / "out")) == 6


def test_the_out_dir_of_a_moved_run_is_where_its_checkpoint_lies(tmp_path, quick_flags):
    assert train.main(quick_flags()) == 0
    (tmp_path / "out").rename(tmp_path / "moved")
    assert train.main(["--resume", str(tmp_path / "moved" / "checkpoints" / "last.pt"), "--steps", "9"]) == 0
    assert not (tmp_path / "out").exists()
    assert len(rows_of(tmp_path / "moved")) == 9


def test_resuming_from_within_the_folder_of_checkpoints_goes_on_in_the_same_run(tmp_path, monkeypatch, quick_flags):
    assert train.main(quick_flags()) == 0
    monkeypatch.chdir(tmp_path / "out" / "checkpoints")
    assert train.main(["--resume", "last.pt", "--steps", "9"]) == 0
    assert sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir()) == [
        "best.pt",
        "last.pt",
        "previous.pt",
    ]
    assert len(rows_of(tmp_path / "out")) == 9


def test_a_run_by_epochs_goes_on_by_steps(tmp_path, quick_flags):
    flags = quick_flags()
    steps = flags.index("--steps")
    flags[steps : steps + 2] = ["--epochs", "0.5"]
    assert train.main(flags) == 0
    assert len(rows_of(tmp_path / "out")) == 11  # of 21 batches a pass
    assert train.main(["--resume", str(tmp_path / "out" / "checkpoints" / "last.pt"), "--steps", "13"]) == 0
    assert len(rows_of(tmp_path / "out")) == 13


# ---- signals ----

LONG = {"steps": 70, "save_every": 1000, "num_prompts": 0, "log_every": 10, "target_loss": 0}


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    """The run directory of a run that no signal came to."""
    out_dir = tmp_path_factory.mktemp("whole") / "out"
    assert train.main(tiny_flags(out_dir, **LONG)) == 0
    return out_dir


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_a_checkpoint_and_resuming_loses_nothing(tmp_path, never_stopped, signum, code):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *tiny_flags(tmp_path / "out", **LONG)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("step 10/"):
            process.send_signal(signum)
            break
    rest, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (code, "")
    assert "Ended: interrupted at step" in rest
    assert "To train on: python train.py --resume" in rest
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["ended"] == "interrupted"
    assert 10 <= record["steps"] < 70
    last = str(tmp_path / "out" / "checkpoints" / "last.pt")
    assert load_checkpoint(last)["step"] == record["steps"]

    assert train.main(["--resume", last]) == 0  # all else comes from the checkpoint
    assert same_weights(weights_of(tmp_path / "out"), weights_of(never_stopped))
    assert without_times(rows_of(tmp_path / "out")) == without_times(rows_of(never_stopped))
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["resumed"] == [f"python train.py --resume {last}"]
    assert record["ended"] == "steps done"


def test_a_signal_during_a_long_sample_is_heard(tmp_path, quick_flags, monkeypatch):
    real = inference.pick_token
    calls = []

    def pick_token(*args):
        calls.append(args)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(inference, "pick_token", pick_token)
    assert train.main(quick_flags(steps=5, sample_every=1, max_new_tokens=1_000_000)) == 143
    assert len(calls) < 10
    assert load_checkpoint(tmp_path / "out" / "checkpoints" / "last.pt")["step"] == 1
