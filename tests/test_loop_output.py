"""What the loop tells on the way: speed, the time to the target, epochs, and faults."""

from __future__ import annotations

import itertools
import json
import math
import re

import pytest
import torch
from conftest import log_of, rows_of, weights_of

import train
from support.checkpoint import load_checkpoint
from support.cli import RunError

# ---- speed and the time to the target ----


def test_tokens_a_second_are_over_the_wall_clock_of_the_window(tiny, tmp_path):
    train.train(tiny(steps=40, log_every=10, save_every=15))
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 5
    for before, row in itertools.pairwise(rows):
        seconds = float(row["elapsed_s"]) - float(before["elapsed_s"])
        tokens = int(row["tokens"]) - int(before["tokens"])
        assert float(row["tok_per_s"]) == pytest.approx(tokens / seconds, rel=0.1)


def test_the_time_to_target_is_said_once(quick, tmp_path):
    train.train(quick(steps=125, log_every=7, num_prompts=0))
    log = log_of(tmp_path / "out").splitlines()
    (at,) = (i for i, line in enumerate(log) if "Time to target" in line)
    assert "step 105/125" in log[at - 1]  # the first that is logged after a hundred
    form = r"at \d+ tok/s: \d s, at \d{4}-\d\d-\d\d \d\d:\d\d, when all steps are done, or before$"
    assert re.search(form, log[at])


def test_without_a_target_no_time_to_it_is_said(quick, tmp_path):
    train.train(quick(steps=101, log_every=100, target_loss=0.0, num_prompts=0))
    assert "Time to" not in log_of(tmp_path / "out")


# ---- epochs ----


def test_epochs_end_with_their_average(quick, tmp_path):
    record = train.train(quick(steps=None, epochs=2.5, steps_per_epoch=8, num_prompts=0))
    assert record["steps"] == 20
    losses = [float(row["loss"]) for row in rows_of(tmp_path / "out")]
    lines = re.findall(r"Epoch (\d)/3: average loss ([\d.]+), [\d.]+ s", log_of(tmp_path / "out"))
    expected = []
    for number, epoch in enumerate((losses[:8], losses[8:16], losses[16:]), 1):
        expected.append((str(number), f"{sum(epoch) / len(epoch):.4f}"))
    assert lines == expected


def test_an_epoch_is_a_pass_unless_told_otherwise(quick, tmp_path):
    record = train.train(quick(steps=None, epochs=2, grad_accum=2, num_prompts=0))  # 21 batches, 2 a step: 10.5 steps
    assert record["steps"] == 21
    ends = re.findall(r"step (\d+)/21 [^\n]*\n[^\n]*Epoch", log_of(tmp_path / "out"))
    assert ends == ["11", "21"]


def test_an_epoch_goes_on_after_a_resume(quick, tmp_path):
    settings = {"steps": None, "epochs": 3, "steps_per_epoch": 8, "num_prompts": 0, "save_every": 11}
    lines = {}
    for name in ("whole", "cut"):
        out_dir = tmp_path / name
        train.train(quick(**settings, out_dir=str(out_dir)))
        if name == "cut":
            previous = out_dir / "checkpoints" / "previous.pt"
            assert load_checkpoint(previous)["step"] == 22
            assert train.main(["--resume", str(previous)]) == 0
        lines[name] = re.findall(r"Epoch (\d/3: average loss [\d.]+)", log_of(out_dir))
    assert lines["cut"] == lines["whole"] + lines["whole"][-1:]


# ---- faults ----


def break_at(monkeypatch, step: int) -> None:
    """The step after this one begins with a weight that isn't a number."""
    real = train.Trainer.train_step

    def train_step(trainer, *args):
        if trainer.progress.step == step:
            with torch.no_grad():
                trainer.model.transformer.ln_f.weight.fill_(math.nan)
        real(trainer, *args)

    monkeypatch.setattr(train.Trainer, "train_step", train_step)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(quick, tmp_path, monkeypatch):
    break_at(monkeypatch, 8)
    with pytest.raises(RunError, match=r"the loss is nan, .* at step 9: .*lower --lr"):
        train.train(quick(steps=20, save_every=4))
    assert load_checkpoint(tmp_path / "out" / "checkpoints" / "last.pt")["step"] == 8
    assert all(weight.isfinite().all() for weight in weights_of(tmp_path / "out").values())
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["ended"].startswith("failed: the loss is nan")
    assert record["exit_code"] == 1


def test_weights_that_broke_unseen_do_not_replace_a_good_checkpoint(quick, tmp_path, monkeypatch):
    """On a GPU losses are read now and then, so a save must look by itself."""
    real = train.Loop.__init__

    def rarely_reading(loop, *args):
        real(loop, *args)
        loop.reads_each_step = False

    break_at(monkeypatch, 6)
    monkeypatch.setattr(train.Loop, "__init__", rarely_reading)
    with pytest.raises(RunError, match="at step 8"):
        train.train(quick(steps=20, save_every=4, log_every=100, eval_every=100))
    assert load_checkpoint(tmp_path / "out" / "checkpoints" / "last.pt")["step"] == 4


def test_the_record_of_a_failed_run_is_strict_json(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(train.Trainer, "avg_loss", lambda trainer: math.nan)
    with pytest.raises(RunError):
        train.train(quick(steps=3))
    text = (tmp_path / "out" / "run.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["avg_loss"] is None
