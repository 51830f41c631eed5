"""A run's directory: what a run leaves in it, who may write there, and going back to a checkpoint."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import math
import os
import re
import shutil
import sys

import pytest
from checkpoint_kit import (  # noqa: F401  (fixtures)
    SETTINGS,
    assert_same_run,
    finished_fixture,
    kill,
    out_fixture,
    start_run,
    step_in,
    steps_of,
    stop_at,
)
from conftest import PLAY, TINY, log_of, rows_of, tiny_flags

import train
from support import rundir
from support.cli import UsageError
from support.rundir import RunDirectory

# ---- what a run leaves ----


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The run directory of a finished run with samples, of which few steps were logged. Not to be changed."""
    out = tmp_path_factory.mktemp("told") / "out"
    changes = {"steps": 20, "log_every": 8, "target_loss": 0.1, "no_mfu": False}
    changes |= {"sample_every": 2, "num_prompts": 2, "prompt": "BIANCA:\n"}
    config = train.TrainConfig(**{**TINY, **changes, "out_dir": str(out)})
    train.train(config, command="python train.py --steps 20")
    return out


LINE = re.compile(
    r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} \| INFO \| step (\d+)/20 \| loss \d+\.\d{6} \| lr \d\.\d\de[-+]\d\d"
    r" \| tok/s \d+\.\d( \| |$)"
)


def test_log_lines_have_their_form(told):
    lines = log_of(told).splitlines()
    found = [LINE.match(line) for line in lines]
    assert [int(match[1]) for match in found if match] == [1, 8, 16, 20]
    for line in lines:
        assert re.match(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} \| [A-Z]+ \| ", line)


def test_the_log_opens_with_what_decides_the_run_and_closes_with_its_end(told):
    messages = [line.split(" | ", 2)[2] for line in log_of(told).splitlines()]
    steps = [i for i, message in enumerate(messages) if message.startswith("step ")]
    opening = messages[: steps[0]]
    closing = messages[steps[-1] :]
    for start in (
        "Device: cpu",
        "Precision: fp32, because",
        "Optimizer: ",
        "Args: {",
        "Parameters: ",
        "Tokens: 2,547 in 40",
        "Causality: ",
    ):
        assert any(message.startswith(start) for message in opening), start
    assert "Tokens per step: 64 (batch_size 2 x seq_len 32 x grad_accum 1 x processes 1)" in opening
    (args,) = (message.removeprefix("Args: ") for message in opening if message.startswith("Args: "))
    config = json.loads(args)
    assert config["steps"] == 20
    assert config["warmup_steps"] == 2
    assert config["save_every"] == 2
    assert "Ended: steps done at step 20 of 20" in closing


def test_the_csv_has_a_row_each_log(told):
    rows = rows_of(told)
    assert (told / "logs" / "train_metrics.csv").read_text().splitlines()[0] == (
        "step,epoch,tokens,loss,avg_loss,best_loss,lr,grad_norm,tok_per_s,elapsed_s,mfu"
    )
    assert [row["step"] for row in rows] == ["1", "8", "16", "20"]
    assert [row["tokens"] for row in rows] == ["64", "512", "1024", "1280"]
    assert [row["epoch"] for row in rows] == ["0.025", "0.2", "0.4", "0.5"]
    for row in rows:
        assert all(math.isfinite(float(value)) for value in row.values())
    elapsed = [float(row["elapsed_s"]) for row in rows]
    assert elapsed == sorted(elapsed)


def test_mfu_is_the_share_of_the_limit_in_log_and_csv(told):
    """6 x parameters x tok/s of the limit that the log's opening states."""
    limit = 1e9 * float(re.search(r"Limit for mfu: ([\d,]+) GFLOP/s", log_of(told))[1].replace(",", ""))
    parameters = json.loads((told / "run.json").read_text())["parameters"]
    rows = rows_of(told)
    for row in rows:
        share = 6 * parameters * float(row["tok_per_s"]) / limit
        assert float(row["mfu"]) == pytest.approx(share, rel=0.5 / (limit / 1e9) + 0.01, abs=0.001)
    assert re.findall(r"step .* \| mfu (\S+)$", log_of(told), re.M) == [row["mfu"] for row in rows]


def test_an_unknown_limit_is_called_so(finished):
    assert {row["mfu"] for row in rows_of(finished)} == {"unknown"}
    assert "Limit for mfu: unknown, --no_mfu" in log_of(finished)
    assert " | mfu unknown\n" in log_of(finished)


def test_rows_of_an_older_file_without_mfu_stay(out, finished):
    """The run goes on from its last checkpoint, with mfu."""
    file = out / "logs" / "train_metrics.csv"
    file.write_text("".join(line.rsplit(",", 1)[0] + "\n" for line in file.read_text().splitlines()))
    last = out / "checkpoints" / "last.pt"
    assert train.main(["--resume", str(last), "--steps", "32", "--no-no_mfu"]) == 0
    rows = rows_of(out)
    assert steps_of(out) == list(range(1, 33))
    assert [row["loss"] for row in rows[:30]] == [row["loss"] for row in rows_of(finished)]
    assert [row["mfu"] for row in rows[:30]] == ["unknown"] * 30
    assert float(rows[31]["mfu"]) >= 0


def test_samples_stand_in_blocks(told):
    text = (told / "samples" / "samples.txt").read_text(encoding="utf-8")
    blocks = text.split("=" * 80 + "\n")[1:]
    assert [block.splitlines()[0] for block in blocks] == [f"STEP {step}" for step in range(2, 21, 2)]
    for block in blocks:
        assert block.count("PROMPT:\n") == block.count("OUTPUT:\n") == 2
        assert "PROMPT:\nBIANCA:\nOUTPUT:\n" in block


def test_run_json_tells_the_whole_run(told, make_trainer, tiny):
    record = json.loads((told / "run.json").read_text())
    assert record["command"] == "python train.py --steps 20"
    assert record["config"]["steps"] == 20
    assert record["seed"] == 1337
    assert record["versions"].keys() >= {"python", "torch", "numpy", "tiktoken", "platform"}
    assert record["device"].startswith("cpu")
    assert record["precision"] == "fp32"
    assert record["corpus"]["sha256"] == hashlib.sha256(PLAY.read_bytes()).hexdigest()
    assert record["corpus"]["tokens"] == 2547
    assert record["parameters"] == sum(p.numel() for p in make_trainer(tiny()).model.parameters())
    assert record["start"] <= record["end"]
    assert (record["ended"], record["steps"], record["tokens"]) == ("steps done", 20, 1280)
    assert record["target_loss"] == 0.1
    assert record["tokens_to_target"] is None


def test_a_directory_with_spaces_and_other_letters(tiny, tmp_path):
    out = tmp_path / "Läufe ☃ und mehr" / "our run"
    train.train(tiny(**{**SETTINGS, "steps": 3}, out_dir=str(out)))
    assert train.main(["--resume", str(out / "checkpoints" / "last.pt"), "--steps", "6"]) == 0
    assert len(rows_of(out)) == 6


# ---- before a run ----


def test_overwriting_removes_a_run_and_nothing_else(out, tiny):
    (out / "notes.txt").write_text("mine")
    train.train(tiny(**{**SETTINGS, "steps": 3, "save_every": 3}, overwrite=True))
    assert (out / "notes.txt").read_text() == "mine"
    assert len(rows_of(out)) == 3
    assert not (out / "checkpoints" / "previous.pt").exists()


def test_a_corpus_that_does_not_fit_leaves_nothing_behind(tiny, tmp_path):
    (tmp_path / "short.txt").write_text("Speak, speak.")
    with pytest.raises(UsageError, match="the text has 13 tokens"):
        train.train(tiny(**SETTINGS, input_file=str(tmp_path / "short.txt")))
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_written_are_found_before_training(out, tiny, monkeypatch):
    locked = out / "checkpoints" / "last.pt"
    monkeypatch.setattr(os, "access", lambda path, mode: path != locked)
    with pytest.raises(UsageError, match=r"can't be written: change the permissions of .*last.pt, or choose another"):
        train.train(tiny(**SETTINGS, resume="auto"))


# ---- one run at a time ----


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is of POSIX")
def test_a_second_run_in_the_same_directory_is_refused(tmp_path, capsys):
    """By a lock that ends with its process, however that ends."""
    out = tmp_path / "out"
    flags = tiny_flags(out, **{**SETTINGS, "steps": 100_000}, resume="auto")
    process = start_run(out, flags)
    assert train.main([*flags, "--steps", "1"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert f"is in use by another run (process {process.pid}): wait for it, stop it, or choose another" in said.err
    assert process.is_alive()
    kill(process)
    end = steps_of(out)[-1] + 5
    assert train.main([*flags, "--steps", str(end)]) == 0
    assert steps_of(out) == list(range(1, end + 1))


def test_a_drive_without_locks_is_no_hindrance(tiny, monkeypatch):
    def no_locks(_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(rundir, "lock_file", no_locks)
    assert train.train(tiny(**SETTINGS))["exit_code"] == 0


def test_a_checkpoint_is_loaded_under_the_lock(out, tiny, monkeypatch):
    """Else one that is being replaced would be resumed when the run that replaced it has ended."""
    order = []

    def watch(owner, name: str) -> None:
        real = getattr(owner, name)

        def watched(*args, **options):
            order.append(name)
            return real(*args, **options)

        monkeypatch.setattr(owner, name, watched)

    watch(rundir, "lock_file")
    watch(RunDirectory, "resume")
    watch(RunDirectory, "prepare")
    train.train(tiny(**{**SETTINGS, "steps": 40}, resume="auto"))
    assert order == ["lock_file", "resume", "prepare"]


# ---- going back ----


@pytest.mark.parametrize("name", ["mine.pt", "aside.pt", "previous.pt"])
def test_going_back_to_any_checkpoint_loses_no_row(name, out, finished, monkeypatch):
    """Killed before its first save, a run that went back is resumed from where it went back to."""
    folder = out / "checkpoints"
    if name != "previous.pt":
        shutil.copy(folder / "previous.pt", folder / name)
    with monkeypatch.context() as patch:
        patch.setattr(train.Loop, "save", lambda *_, **__: None)
        stop_at(23, patch)
        train.main(["--resume", str(folder / name)])
    assert step_in(folder / "last.pt") == 20
    assert step_in(folder / "aside.pt") == 30
    assert train.main(tiny_flags(out, **SETTINGS, resume="auto")) == 0
    assert_same_run(out, finished)


# ---- terminal and log ----


class Terminal(io.TextIOWrapper):
    """In the place of stdout."""

    def __init__(self, encoding, error=None):
        super().__init__(io.BytesIO(), encoding=encoding)
        self.error = error

    def write(self, text):
        if self.error:
            raise self.error
        return super().write(text)


def test_a_terminal_that_lacks_a_character_ends_no_run(monkeypatch):
    terminal = Terminal("ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    rundir.show("caf\u00e9")
    assert terminal.buffer.getvalue() == b"caf?\n"


def test_a_terminal_that_went_away_ends_no_run(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal("utf-8", BrokenPipeError()))
    rundir.show("text")
    rundir.show("and again, with no terminal at all")


def test_two_runs_in_one_process_do_not_share_a_log(tiny, tmp_path):
    train.train(tiny(**SETTINGS, out_dir=str(tmp_path / "first")))
    before = log_of(tmp_path / "first")
    train.train(tiny(**SETTINGS, out_dir=str(tmp_path / "second")))
    assert log_of(tmp_path / "first") == before
    assert not logging.getLogger("train").handlers
