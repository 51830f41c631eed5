"""Held-out text: the split, val_loss, and what goes by it."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from conftest import PLAY, log_of, rows_of, same_weights, weights_of, without_times
from tqdm import tqdm

import train
from support.checkpoint import load_checkpoint
from support.cli import UsageError
from support.text import held_out_from

HELD = {"steps": 20, "val_fraction": 0.1, "eval_every": 5, "num_prompts": 0, "recall_places": 0, "target_loss": 0.0}


# ---- the split ----


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.5, 0.9])
def test_the_held_out_end_begins_on_a_line_and_none_of_it_is_trained_on(tiny, make_trainer, tokenizer, fraction):
    trainer = make_trainer(tiny(val_fraction=fraction))
    taught = trainer.batcher.tokens.tolist()
    held = trainer.held_out.tokens.tolist()
    assert taught + held == tokenizer.encode(PLAY.read_text(encoding="utf-8"))
    assert tokenizer.decode(taught).endswith("\n")
    assert 0.8 * fraction < len(held) / len(taught + held) <= fraction
    assert trainer.batcher.n_targets == len(taught) - 1


def test_a_text_without_lines_is_cut_where_the_fraction_says(tokenizer):
    tokens = tokenizer.encode("a word " * 50)
    assert held_out_from(tokens, 0.2, tokenizer) == len(tokens) - int(0.2 * len(tokens))
    assert held_out_from(tokens, 0.0, tokenizer) == len(tokens)


def test_held_out_text_too_short_for_a_window_is_a_usage_error(quick):
    with pytest.raises(UsageError, match=r"val_fraction 0.005 holds out .* one window takes 33"):
        train.train(quick(val_fraction=0.005))


# ---- val_loss ----


def test_val_loss_is_the_mean_over_all_held_out_targets(quick, make_trainer):
    trainer = make_trainer(quick(val_fraction=0.3, dropout=0.5))
    held = torch.from_numpy(trainer.held_out.tokens.astype("int64"))
    targets = len(held) - 1
    starts = [*range(0, targets - 64, 64), targets - 64]  # two windows of 32 each; the last two are moved back
    losses = {}
    trainer.model.eval()
    with torch.no_grad():
        for start in starts:
            logits = trainer.model(held[start : start + 64].view(2, 32))[0]
            each = F.cross_entropy(logits.flatten(0, 1), held[start + 1 : start + 65], reduction="none")
            for place, loss in enumerate(each.tolist(), start + 1):
                losses.setdefault(place, loss)
    assert len(losses) == targets
    trainer.model.train()
    expected = sum(losses.values()) / targets
    assert trainer.evaluate(lambda: None, trainer.held_out) == pytest.approx(expected, rel=1e-5)


def test_eval_batches_measures_the_first_ones_alone(quick, make_trainer):
    trainer = make_trainer(quick(val_fraction=0.3))
    idx, targets = trainer.held_out.batch(0)
    trainer.model.eval()
    with torch.no_grad():
        first = F.cross_entropy(trainer.model(idx)[0].flatten(0, 1), targets.flatten()).item()
    assert trainer.evaluate(lambda: None, trainer.held_out, 1) == pytest.approx(first, rel=1e-5)
    everything = trainer.evaluate(lambda: None, trainer.held_out)
    assert everything == trainer.evaluate(lambda: None, trainer.held_out, 10**6)
    assert everything != pytest.approx(first, rel=1e-5)


def test_measuring_changes_nothing_in_training(quick, tmp_path):
    """To the bit, with dropout, which draws random numbers in each step."""
    rows = {}
    for name, every in (("often", 1), ("once", 20)):
        train.train(quick(**HELD | {"eval_every": every, "dropout": 0.2, "out_dir": str(tmp_path / name)}))
        rows[name] = without_times(rows_of(tmp_path / name))
        measured = [int(row["step"]) for row in rows[name] if row.pop("val_loss")]
        assert measured == list(range(every, 21, every))
    assert rows["often"] == rows["once"]
    assert same_weights(weights_of(tmp_path / "often"), weights_of(tmp_path / "once"))


def test_val_loss_is_in_log_csv_record_and_checkpoint(quick, tmp_path):
    record = train.train(quick(**HELD, log_every=7))
    rows = rows_of(tmp_path / "out")
    assert [row["step"] for row in rows] == ["1", "5", "7", "10", "14", "15", "20"]  # a row for each measurement too
    measured = {int(row["step"]): float(row["val_loss"]) for row in rows if row["val_loss"]}
    best = min(measured.values())
    assert list(measured) == [5, 10, 15, 20]
    assert record["val_loss"] == pytest.approx(measured[20])
    assert record["best_val_loss"] == pytest.approx(best)
    assert record["corpus"]["held_out"] == 121
    log = log_of(tmp_path / "out")
    for step, loss in measured.items():
        assert re.search(rf"step {step}/20 \| .* \| val_loss {loss:.6f}$", log, re.M)
    assert f"Held out: val_loss {measured[20]:.6f} at step 20, best {best:.6f}" in log
    assert "and the last 121 held out" in log
    assert load_checkpoint(tmp_path / "out" / "checkpoints" / "last.pt")["val_loss"] == record["val_loss"]


def test_the_bar_shows_the_latest_val_loss(quick, monkeypatch):
    shown = []
    monkeypatch.setattr(tqdm, "set_postfix_str", lambda bar, text, refresh: shown.append(text))
    record = train.train(quick(**HELD))
    assert ["val" in text for text in shown] == [False] * 4 + [True] * 16
    assert shown[-1].endswith(f"tok/s, val {record['val_loss']:.3f}")


def test_without_held_out_text_there_is_no_column(quick, tmp_path):
    record = train.train(quick())
    assert "val_loss" not in rows_of(tmp_path / "out")[0]
    assert record["val_loss"] is None
    behind_the_settings = log_of(tmp_path / "out").split("Args:")[1].split("\n", 1)[1]
    assert "val_loss" not in behind_the_settings


@pytest.mark.parametrize("save_every", [5, 8])
def test_a_resumed_run_measures_as_the_one_that_was_not_stopped(quick, tmp_path, save_every):
    settings = HELD | {"dropout": 0.1, "patience": 50, "save_every": save_every}
    whole = tmp_path / "whole"
    cut = tmp_path / "cut"
    for out_dir in (whole, cut):
        train.train(quick(**settings, out_dir=str(out_dir)))
    previous = cut / "checkpoints" / "previous.pt"
    assert load_checkpoint(previous)["step"] in (15, 16)
    assert train.main(["--resume", str(previous)]) == 0
    assert without_times(rows_of(whole)) == without_times(rows_of(cut))
    a = load_checkpoint(whole / "checkpoints" / "last.pt")["progress"]
    b = load_checkpoint(cut / "checkpoints" / "last.pt")["progress"]
    for name in ("val_loss", "val_step", "best_val_loss", "stale"):
        assert a[name] == b[name], name


# ---- what goes by it ----


def measure_as(monkeypatch, losses: list[float]) -> None:
    """val_loss, one measurement after the other, in the place of the real one."""
    losses = iter(losses)
    monkeypatch.setattr(train.Trainer, "evaluate", lambda trainer, poll, batcher, first=0: next(losses))


def test_patience_stops_a_run_whose_val_loss_no_longer_falls(quick, tmp_path, monkeypatch):
    settings = HELD | {"steps": 60, "patience": 2}
    measure_as(monkeypatch, [5.0, 4.0, 4.5, 3.0, 3.0, 3.5, 9.0, 9.0])
    record = train.train(quick(**settings))
    assert (record["ended"], record["steps"], record["best_val_loss"]) == ("patience over", 30, 3.0)
    assert re.search(r"To train on: python train.py --resume \S+/last.pt --patience 4\n", log_of(tmp_path / "out"))
    assert train.train(quick(**settings, resume="auto"))["ended"] == "nothing to do"
    assert "this run has ended (patience over); to go on, give more --patience" in log_of(tmp_path / "out")
    measure_as(monkeypatch, [2.0] + [1.0] * 9)
    assert train.train(quick(**settings | {"patience": 3}, resume="auto"))["steps"] == 55  # measured at 35, 40, ... 55


@pytest.mark.parametrize(("best_by", "step"), [("val", 10), ("train", 40)])
def test_best_pt_is_of_the_lowest_loss_of_the_chosen_kind(quick, tmp_path, monkeypatch, best_by, step):
    measure_as(monkeypatch, [5.0, 4.0, 4.5, 4.2, 4.1, 4.3, 4.4, 6.0, 7.0])
    train.train(quick(**HELD | {"steps": 40, "save_every": 40}, lr=1e-2, best_by=best_by))
    best = load_checkpoint(tmp_path / "out" / "checkpoints" / "best.pt")
    assert best["step"] == step
    assert best["val_loss"] == {"val": 4.0, "train": 6.0}[best_by]
