"""Held-out text, val_loss, patience, and runs by epochs."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from conftest import PLAY, rows_of

import train

HELD = {"steps": 20, "val_fraction": 0.1, "eval_every": 5, "num_prompts": 0, "recall_places": 0, "target_loss": 0.0}


def without_times(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in ("tok_per_s", "elapsed_s", "mfu")} for row in rows]


def log_of(out_dir) -> str:
    return (out_dir / "logs" / "train.log").read_text(encoding="utf-8")


# ---- the split ----


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.5, 0.9])
def test_the_held_out_end_begins_on_a_line_and_none_of_it_is_trained_on(tiny, make_trainer, tokenizer, fraction):
    trainer = make_trainer(tiny(val_fraction=fraction))
    text = PLAY.read_text(encoding="utf-8")
    taught, held = trainer.batcher.tokens.tolist(), trainer.held_out.tokens.tolist()
    assert taught + held == tokenizer.encode(text)
    assert tokenizer.decode(taught).endswith("\n") and 0.8 * fraction < len(held) / len(taught + held) <= fraction
    assert trainer.batcher.n_targets == len(taught) - 1


def test_a_text_without_lines_is_cut_where_the_fraction_says(tokenizer):
    tokens = tokenizer.encode("a word " * 50)
    assert train.held_out_from(tokens, 0.2, tokenizer) == len(tokens) - int(0.2 * len(tokens))
    assert train.held_out_from(tokens, 0.0, tokenizer) == len(tokens)


def test_held_out_text_too_short_for_a_window_is_a_usage_error(tiny):
    with pytest.raises(train.UsageError, match=r"val_fraction 0.005 holds out .* one window takes 33"):
        train.train(tiny(val_fraction=0.005))


# ---- val_loss ----


def test_val_loss_is_the_mean_over_all_held_out_targets(tiny, make_trainer):
    trainer = make_trainer(tiny(val_fraction=0.1, dropout=0.5))
    held = torch.from_numpy(trainer.held_out.tokens.astype("int64"))
    total, covered = 0.0, len(held) - 1
    trainer.model.eval()
    windows = list(range(0, covered - 64, 64))  # two windows of 32 each; the last two are moved back to the end
    seen = set()
    with torch.no_grad():
        for start in [*windows, covered - 64]:
            logits = trainer.model(held[start : start + 64].view(2, 32))[0]
            losses = F.cross_entropy(logits.flatten(0, 1), held[start + 1 : start + 65], reduction="none")
            for place, loss in enumerate(losses.tolist(), start + 1):
                total += loss * (place not in seen)
                seen.add(place)
    assert len(seen) == covered
    trainer.model.train()
    assert trainer.evaluate(lambda: None, trainer.held_out) == pytest.approx(total / covered, rel=1e-5)


def test_eval_batches_measures_the_first_ones_alone(tiny, make_trainer):
    trainer = make_trainer(tiny(val_fraction=0.2))
    idx, targets = trainer.held_out.batch(0)
    trainer.model.eval()
    with torch.no_grad():
        first = F.cross_entropy(trainer.model(idx)[0].flatten(0, 1), targets.flatten()).item()
    assert trainer.evaluate(lambda: None, trainer.held_out, 1) == pytest.approx(first, rel=1e-5)
    everything = trainer.evaluate(lambda: None, trainer.held_out)
    assert everything == trainer.evaluate(lambda: None, trainer.held_out, 10**6) != pytest.approx(first, rel=1e-5)


def test_measuring_changes_nothing_in_training(tiny, tmp_path):
    """To the bit, with dropout, which draws random numbers in each step."""
    runs = {}
    for name, every in (("often", 1), ("once", 20)):
        out_dir = tmp_path / name
        train.train(tiny(**{**HELD, "eval_every": every, "dropout": 0.2, "out_dir": str(out_dir)}))
        rows = without_times(rows_of(out_dir))
        assert [row["step"] for row in rows if row["val_loss"]] == [str(s) for s in range(every, 21, every)]
        state = train.load_checkpoint(out_dir / "checkpoints" / "last.pt")
        runs[name] = [{k: v for k, v in row.items() if k != "val_loss"} for row in rows], state
    assert runs["often"][0] == runs["once"][0]
    a, b = (state["model"] for _, state in runs.values())
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_val_loss_is_in_log_csv_record_and_checkpoint(tiny, tmp_path):
    record = train.train(tiny(**HELD, log_every=7))
    rows = rows_of(tmp_path / "out")
    assert [row["step"] for row in rows] == ["1", "5", "7", "10", "14", "15", "20"]  # a row for each measurement too
    measured = {int(row["step"]): float(row["val_loss"]) for row in rows if row["val_loss"]}
    assert list(measured) == [5, 10, 15, 20]
    assert record["val_loss"] == pytest.approx(measured[20]) and record["best_val_loss"] == pytest.approx(
        min(measured.values())
    )
    log = log_of(tmp_path / "out")
    for step, loss in measured.items():
        assert re.search(rf"step {step}/20 \| .* \| val_loss {loss:.6f}$", log, re.M)
    assert f"Held out: val_loss {measured[20]:.6f} at step 20, best {min(measured.values()):.6f}" in log
    assert "and the last 249 held out" in log
    assert train.load_checkpoint(tmp_path / "out" / "checkpoints" / "last.pt")["val_loss"] == record["val_loss"]


def test_the_bar_shows_the_latest_val_loss(tiny, monkeypatch):
    shown = []
    monkeypatch.setattr(train.tqdm, "set_postfix_str", lambda bar, text, refresh: shown.append(text))
    record = train.train(tiny(**HELD))
    assert ["val" in text for text in shown] == [False] * 4 + [True] * 16
    assert shown[-1].endswith(f"tok/s, val {record['val_loss']:.3f}")


def test_without_held_out_text_there_is_no_column(tiny, tmp_path):
    record = train.train(tiny())
    assert "val_loss" not in rows_of(tmp_path / "out")[0] and record["val_loss"] is None
    assert "val_loss" not in log_of(tmp_path / "out").split("Args:")[1].split("\n", 1)[1]


@pytest.mark.parametrize("save_every", [5, 8])
def test_a_resumed_run_measures_as_the_one_that_was_not_stopped(tiny, tmp_path, save_every):
    settings = HELD | {"dropout": 0.1, "patience": 50, "save_every": save_every}
    for name in ("whole", "cut"):
        train.train(tiny(**settings, out_dir=str(tmp_path / name)))
    previous = tmp_path / "cut" / "checkpoints" / "previous.pt"
    assert train.load_checkpoint(previous)["step"] in (15, 16)
    assert train.main(["--resume", str(previous)]) == 0
    whole, cut = (without_times(rows_of(tmp_path / name)) for name in ("whole", "cut"))
    assert whole == cut
    states = [train.load_checkpoint(tmp_path / name / "checkpoints" / "last.pt") for name in ("whole", "cut")]
    assert states[0]["held_out"] == states[1]["held_out"]


# ---- what goes by it ----


def falling_then_rising(monkeypatch, losses):
    losses = iter(losses)
    monkeypatch.setattr(train.Trainer, "evaluate", lambda self, poll, batcher, first=0: next(losses))


def test_patience_stops_a_run_whose_val_loss_no_longer_falls(tiny, tmp_path, monkeypatch):
    settings = HELD | {"steps": 60, "patience": 2}
    falling_then_rising(monkeypatch, [5.0, 4.0, 4.5, 3.0, 3.0, 3.5, 9.0, 9.0])
    record = train.train(tiny(**settings))
    assert (record["ended"], record["steps"], record["best_val_loss"]) == ("patience over", 30, 3.0)
    assert train.train(tiny(**settings, resume="auto"))["ended"] == "nothing to do"
    assert "this run has ended (patience over); to go on, give more --patience" in log_of(tmp_path / "out")
    falling_then_rising(monkeypatch, [2.0] + [1.0] * 9)
    assert train.train(tiny(**settings | {"patience": 3}, resume="auto"))["steps"] == 55  # measured at 35, 40, ... 55


@pytest.mark.parametrize(("best_by", "step"), [("val", 10), ("train", 40)])
def test_best_pt_is_of_the_lowest_loss_of_the_chosen_kind(tiny, tmp_path, monkeypatch, best_by, step):
    falling_then_rising(monkeypatch, [5.0, 4.0, 4.5, 4.2, 4.1, 4.3, 4.4, 6.0, 7.0])
    train.train(tiny(**{**HELD, "steps": 40, "save_every": 40}, lr=1e-2, best_by=best_by))
    best = train.load_checkpoint(tmp_path / "out" / "checkpoints" / "best.pt")
    assert best["step"] == step and (best_by == "train" or best["val_loss"] == 4.0)


@pytest.mark.parametrize("settings", [{"patience": 3}, {"best_by": "val"}])
def test_what_goes_by_val_loss_needs_held_out_text(tiny, settings):
    with pytest.raises(train.UsageError, match="need held-out text"):
        tiny(**settings).validate()


# ---- epochs ----


def test_epochs_end_with_their_average(tiny, tmp_path):
    record = train.train(tiny(steps=None, epochs=2.5, steps_per_epoch=8, num_prompts=0))
    assert record["steps"] == 20
    rows = {int(row["step"]): float(row["loss"]) for row in rows_of(tmp_path / "out")}
    lines = re.findall(r"Epoch (\d)/3: average loss ([\d.]+), [\d.]+ s", log_of(tmp_path / "out"))
    means = [sum(rows[s] for s in steps) / len(steps) for steps in (range(1, 9), range(9, 17), range(17, 21))]
    assert lines == [(str(n), f"{mean:.4f}") for n, mean in enumerate(means, 1)]


def test_an_epoch_is_a_pass_unless_told_otherwise(tiny, tmp_path):
    record = train.train(tiny(steps=None, epochs=2, grad_accum=3, num_prompts=0))  # 40 batches, 3 a step: 13.3 steps
    assert record["steps"] == 27
    ends = re.findall(r"step (\d+)/27 [^\n]*\n[^\n]*Epoch", log_of(tmp_path / "out"))
    assert ends == ["14", "27"]


def test_an_epoch_goes_on_after_a_resume(tiny, tmp_path):
    settings = {"steps": None, "epochs": 3, "steps_per_epoch": 8, "num_prompts": 0, "save_every": 11}
    lines = []
    for name in ("whole", "cut"):
        out_dir = tmp_path / name
        train.train(tiny(**settings, out_dir=str(out_dir)))
        if name == "cut":
            previous = out_dir / "checkpoints" / "previous.pt"
            assert train.load_checkpoint(previous)["step"] == 22
            train.main(["--resume", str(previous)])
        lines.append(re.findall(r"Epoch (\d/3: average loss [\d.]+)", log_of(out_dir)))
    assert lines[1] == lines[0] + lines[0][-1:]


def test_steps_per_epoch_needs_epochs(tiny):
    with pytest.raises(train.UsageError, match="add --epochs N"):
        tiny(steps_per_epoch=5).validate()
