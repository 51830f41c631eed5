"""Resuming: bit for bit the run that never stopped; nothing lost, nothing doubled; and never another run."""

from __future__ import annotations

import json
import logging
import random

import numpy as np
import pytest
import torch
from conftest import PLAY, TINY, log_of, rows_of, same_weights, weights_of, without_times

import train
from support import checkpoint, record, rundir
from support.checkpoint import load_checkpoint
from support.cli import Stopped, UsageError


def stop_at(monkeypatch, step: int | None) -> None:
    """The run is asked to stop at a step, as by a signal. None: it isn't."""
    monkeypatch.setattr(train.Loop, "stop_asked", lambda loop: loop.progress.step == step)


def samples_of(out_dir) -> str:
    return (out_dir / "samples" / "samples.txt").read_text(encoding="utf-8")


def checkpoint_of(out_dir, name: str = "last.pt") -> dict:
    return load_checkpoint(out_dir / "checkpoints" / name)


# ---- the same run, bit for bit ----


def without_passing(state: dict) -> dict:
    """A checkpoint without what may differ: times, the flags of a start, and the schedule, which is made anew."""
    state = dict(state)
    state.pop("config")
    state.pop("scheduler", None)
    if "progress" in state:
        state["progress"] = state["progress"] | {"seconds": 0, "epoch_start": 0}
    return state


def assert_same(a, b) -> None:
    """Equal, bit for bit, all the way down."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            assert_same(a[name], b[name])
    elif isinstance(a, list | tuple):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": "muon", "shift_windows": True},
        {"grad_accum": 2, "dropout": 0.3, "randomize_batches": True},
    ],
)
def test_a_resumed_run_equals_one_that_never_stopped(quick, tmp_path, monkeypatch, options):
    """Interrupted twice in the middle of a pass, at a save and between two: the same rows, samples and checkpoints."""
    settings = {"steps": 60, "save_every": 20, "sample_every": 20, "log_every": 4, **options}
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    train.train(quick(out_dir=str(whole), **settings))
    for step in (20, 47, None):
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            train.train(quick(out_dir=str(parts), resume="auto", **settings))
    assert without_times(rows_of(whole)) == without_times(rows_of(parts))
    assert samples_of(whole) == samples_of(parts)
    for name in ("last.pt", "best.pt"):
        assert_same(without_passing(checkpoint_of(whole, name)), without_passing(checkpoint_of(parts, name)))


def test_every_random_generator_goes_on_where_it_was(quick, tmp_path, monkeypatch):
    """No step draws from Python's or NumPy's own generators; a change of the program that did would still resume."""
    drawn = {}
    real = train.Trainer.train_step

    def draw(trainer, *args):
        numbers = (random.random(), np.random.rand(), torch.rand(1).item())
        drawn.setdefault(trainer.progress.step, []).append(numbers)
        real(trainer, *args)

    monkeypatch.setattr(train.Trainer, "train_step", draw)
    settings = {"steps": 6, "save_every": 3}
    train.train(quick(**settings))
    (tmp_path / "out" / "checkpoints" / "previous.pt").replace(tmp_path / "out" / "checkpoints" / "last.pt")
    train.train(quick(resume="auto", **settings))
    assert [len(drawn[step]) for step in range(6)] == [1, 1, 1, 2, 2, 2]
    assert all(len(set(numbers)) == 1 for numbers in drawn.values())


NEWER = ("recent", "first_under", "figures")  # parts of a progress that format 1 hasn't


def in_format_1(state: dict) -> dict:
    """A checkpoint as the program before wrote it: where the run is stood in many places, some of them lists."""
    state = dict(state)
    progress = state.pop("progress")
    for name in ("seconds", "best_loss", "best_saved", "next_proof", "skipped"):
        state[name] = progress[name]
    if isinstance(progress["best_saved"], tuple):
        state["best_saved"] = progress["best_saved"][1]
    state["format"] = 1
    state["last_step"] = {name: progress[name] for name in ("loss", "grad_norm", "lr")}
    state["held_out"] = [progress[name] for name in ("val_loss", "best_val_loss", "val_step", "stale")]
    state["epoch"] = [progress[name] for name in ("epoch_loss", "epoch_steps", "epoch_start")]
    return state


def test_each_part_of_format_1_comes_to_its_place(quick, make_trainer):
    state = make_trainer(quick()).state_dict()
    state["progress"] = {name: float(i) for i, name in enumerate(state["progress"]) if name not in NEWER}
    state["step"] = state["progress"]["step"]
    old = checkpoint.upgrade(in_format_1(state))
    state["progress"]["best_saved"] = (False, state["progress"]["best_saved"])  # chosen by a full pass
    assert old["progress"] == state["progress"]


def test_a_checkpoint_of_format_1_goes_on_to_the_same_result(quick, tmp_path):
    """With all that it kept elsewhere: held-out losses, epochs, the best loss, the last step."""
    settings = {"steps": None, "epochs": 2.5, "steps_per_epoch": 20, "save_every": 30, "log_every": 7}
    settings |= {"val_fraction": 0.2, "eval_every": 8, "patience": 50, "best_by": "val", "dropout": 0.1}
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    for out_dir in (whole, parts):
        train.train(quick(out_dir=str(out_dir), **settings))
    previous = parts / "checkpoints" / "previous.pt"
    state = load_checkpoint(previous)
    assert state["step"] < 50
    checkpoint.save_checkpoint(previous, in_format_1(state))
    known = {name: value for name, value in state["progress"].items() if name not in NEWER}
    assert_same(load_checkpoint(previous)["progress"], known)

    assert train.main(["--resume", str(previous)]) == 0
    assert checkpoint_of(parts)["format"] == 2
    states = [without_passing(checkpoint_of(run)) for run in (whole, parts)]
    for state in states:
        state["progress"] = {name: value for name, value in state["progress"].items() if name in known}
    assert_same(*states)
    assert without_times(rows_of(whole)) == without_times(rows_of(parts))


def test_the_earliest_checkpoints_of_format_1_can_be_resumed(quick, tmp_path):
    """They had no held-out text, no epochs, and only AdamW, so these settings aren't in them."""
    settings = {"steps": 20, "save_every": 10, "optimizer": "adamw", "embed_lr": 0.0}
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    for out_dir in (whole, parts):
        train.train(quick(out_dir=str(out_dir), **settings))
    previous = parts / "checkpoints" / "previous.pt"
    state = in_format_1(load_checkpoint(previous))
    for name in ("held_out", "epoch", "origin"):
        del state[name]
    for name in ("optimizer", "embed_lr", "val_fraction", "best_by", "epochs", "patience"):
        state["config"].pop(name)
    checkpoint.save_checkpoint(previous, state)
    assert train.main(["--resume", str(previous)]) == 0
    assert same_weights(weights_of(whole), weights_of(parts))
    assert without_times(rows_of(whole)) == without_times(rows_of(parts))


def test_a_model_of_characters_trains_resumes_and_keeps_its_vocabulary(tiny, tmp_path):
    text = PLAY.read_text(encoding="utf-8")
    train.train(tiny(tokenizer="char", prompt="AMBROSE:\n", steps=12, save_every=6, num_prompts=2))
    state = checkpoint_of(tmp_path / "out")
    assert state["tokenizer"] == {"name": "char", "vocab_size": len(set(text)), "vocabulary": sorted(set(text))}
    assert state["model_config"]["vocab_size"] == len(set(text))
    previous = tmp_path / "out" / "checkpoints" / "previous.pt"
    assert train.main(["--resume", str(previous)]) == 0  # which takes the tokenizer from the checkpoint
    assert same_weights(state["model"], weights_of(tmp_path / "out"))
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["corpus"]["tokens"] == len(text)


def test_several_texts_are_trained_on_and_resumed(tmp_path, quick, short_text):
    (tmp_path / "more.txt").write_text("FINIS\n" * 20)
    given = (short_text, str(tmp_path / "more.txt"))
    train.train(quick(input_file=given, steps=6, save_every=3))
    weights = weights_of(tmp_path / "out")
    assert train.main(["--resume", str(tmp_path / "out" / "checkpoints" / "previous.pt")]) == 0
    assert same_weights(weights, weights_of(tmp_path / "out"))
    with pytest.raises(UsageError, match="isn't the checkpoint's text"):
        train.train(quick(input_file=given[::-1], resume="auto"))


# ---- nothing lost, nothing doubled ----


def test_what_came_after_the_checkpoint_is_done_again_and_not_doubled(quick, tmp_path, monkeypatch):
    """As after a power cut: rows and samples are past the last checkpoint, and the last row is torn."""
    settings = {"steps": 30, "save_every": 10, "sample_every": 5}
    out = tmp_path / "out"
    train.train(quick(**settings))
    rows = rows_of(out)
    samples = samples_of(out)
    with monkeypatch.context() as patch:  # a checkpoint of step 20, as it was at that moment
        stop_at(patch, 20)
        train.train(quick(out_dir=str(tmp_path / "short"), **settings))
    (tmp_path / "short" / "checkpoints" / "last.pt").replace(out / "checkpoints" / "last.pt")
    with open(out / "logs" / "train_metrics.csv", "a") as f:
        f.write("31,0.7")
    train.train(quick(resume="auto", **settings))
    assert without_times(rows_of(out)) == without_times(rows)
    assert samples_of(out) == samples


@pytest.mark.parametrize(("owner", "cut"), [(train.Trainer, "evaluate"), (train.Trainer, "sample"), (record, "recall")])
@pytest.mark.parametrize("settings", [{"steps": 50, "target_loss": 1000.0}, {"steps": 25, "target_loss": 0.0}])
def test_an_ending_that_was_cut_short_is_made_up_for(quick, tmp_path, monkeypatch, owner, cut, settings):
    """Stopped in the proof, in a sample or in recall: resumed, the run ends as the one that wasn't."""
    settings = {"log_every": 7, "save_every": 1000, "sample_every": 15, "batch_size": 1, "seq_len": 64, **settings}
    whole = train.train(quick(out_dir=str(tmp_path / "whole"), **settings))
    assert whole["recall"] is not None

    def stopped(*args, **options):
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(owner, cut, stopped)
        assert train.train(quick(out_dir=str(tmp_path / "cut"), **settings))["ended"] == "interrupted"
    resumed = train.train(quick(out_dir=str(tmp_path / "cut"), resume="auto", **settings))
    for key in ("ended", "steps", "tokens", "avg_loss", "final_loss", "tokens_to_target", "recall", "samples"):
        assert resumed[key] == whole[key], key
    assert without_times(rows_of(tmp_path / "whole")) == without_times(rows_of(tmp_path / "cut"))
    assert samples_of(tmp_path / "whole") == samples_of(tmp_path / "cut")


def test_samples_survive_a_resume_to_the_byte(tmp_path):
    """Python would read a \\r that the model wrote as a line break."""
    run_dir = train.RunDirectory(tmp_path)
    samples = train.SamplesFile(run_dir, logging.Logger("x"))
    samples.write(5, [("a", "b\rc\r\nd")])
    before = run_dir.samples.read_bytes()
    assert b"b\rc\r\nd" in before
    samples.write(6, [("a", "later")])
    assert rundir.rewind_samples(run_dir.samples, train.RULE, 5) == 5
    assert run_dir.samples.read_bytes() == before


def test_torn_and_foreign_files_do_not_stop_a_resume(quick, tmp_path):
    train.train(quick(steps=10))
    out = tmp_path / "out"
    with open(out / "samples" / "samples.txt", "ab") as f:
        f.write(b"\xe2\x80")
    with open(out / "logs" / "train_metrics.csv", "ab") as f:
        f.write(b"\xff,1\n11,")
    (out / "run.json").write_text("[1]")
    assert train.train(quick(steps=20, resume="auto"))["ended"] == "steps done"
    assert [row["step"] for row in rows_of(out)] == [str(n) for n in range(1, 21)]


@pytest.mark.parametrize("damage", ["stop,epoch\n", "", "step,epoch,tokens,loss\n"])
@pytest.mark.parametrize("older", [False, True])
def test_a_damaged_header_costs_no_row(quick, tmp_path, damage, older):
    """Not even of a file from before there was a column for mfu."""
    train.train(quick(steps=4, save_every=2))
    file = tmp_path / "out" / "logs" / "train_metrics.csv"
    text = damage
    for line in file.read_text().splitlines()[1:]:
        text += (line.rsplit(",", 1)[0] if older else line) + "\n"
    file.write_text(text)
    train.train(quick(steps=6, save_every=2, resume="auto"))
    assert [row["step"] for row in rows_of(tmp_path / "out")] == ["1", "2", "3", "4", "5", "6"]


def test_time_goes_on_where_it_stopped(quick, tmp_path):
    train.train(quick(steps=5))
    before = float(rows_of(tmp_path / "out")[-1]["elapsed_s"])
    state = checkpoint_of(tmp_path / "out")
    state["progress"]["seconds"] = before + 1000
    checkpoint.save_checkpoint(tmp_path / "out" / "checkpoints" / "last.pt", state)
    train.train(quick(steps=10, resume="auto"))
    assert 1000 < float(rows_of(tmp_path / "out")[-1]["elapsed_s"]) < 1100


def test_a_state_holds_what_the_next_step_depends_on(quick, make_trainer):
    one = make_trainer(quick(optimizer="adamw"))
    two = make_trainer(quick(optimizer="adamw", beta1=0.5, weight_decay=0.3))
    one.runtime.scaler = torch.amp.GradScaler("cpu", init_scale=32.0)
    two.runtime.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    one.train_step()
    changes = {"best_loss": 1.5, "best_saved": 2.5, "next_proof": 7, "seconds": 100.0, "stale": 3, "epoch_start": 9.0}
    for name, value in changes.items():
        setattr(one.progress, name, value)
    two.load_state_dict(one.state_dict())
    assert two.progress.state_dict() == one.progress.state_dict()
    assert changes.items() <= two.progress.state_dict().items()
    assert two.runtime.scaler.get_scale() == 32.0
    assert one.measure() == two.measure()
    # The flags of this start win over those of the saved one.
    assert all(group["betas"] == (0.5, 0.95) for group in two.optimizer.param_groups)
    assert [group["weight_decay"] for group in two.optimizer.param_groups] == [0.3, 0.3, 0]


# ---- going on with other settings ----


def test_more_steps_draw_the_curve_anew(quick, tmp_path):
    train.train(quick(steps=10))
    result = train.train(quick(steps=20, resume="auto"))
    assert (result["ended"], result["steps"]) == ("steps done", 20)
    train.train(quick(steps=20, out_dir=str(tmp_path / "whole")))
    resumed = [row["lr"] for row in rows_of(tmp_path / "out")]
    whole = [row["lr"] for row in rows_of(tmp_path / "whole")]
    assert resumed[10:] == whole[10:]
    assert resumed[:10] != whole[:10]


def test_a_finished_run_has_nothing_more_to_do(quick, tmp_path):
    train.train(quick(steps=10))
    before = (tmp_path / "out" / "run.json").read_bytes()
    assert train.train(quick(steps=10, resume="auto"))["ended"] == "nothing to do"
    assert (tmp_path / "out" / "run.json").read_bytes() == before
    assert len(rows_of(tmp_path / "out")) == 10
    assert "this run has ended (steps done); to go on, give more --steps" in log_of(tmp_path / "out")


def test_a_run_that_reached_its_target_has_nothing_more_to_do(quick):
    first = train.train(quick(steps=40, target_loss=1000.0))
    again = train.train(quick(steps=40, target_loss=1000.0, resume="auto"))
    assert (again["ended"], again["exit_code"], again["steps"]) == ("nothing to do", 0, first["steps"])
    lower = train.train(quick(steps=40, target_loss=0.5, resume="auto"))
    assert (lower["ended"], lower["steps"]) == ("steps done", 40)


def test_auto_begins_anew_only_what_left_no_result(quick, tmp_path):
    train.train(quick(steps=25))
    out = tmp_path / "out"
    assert (out / "checkpoints" / "best.pt").exists()
    (out / "checkpoints" / "last.pt").unlink()
    (out / "checkpoints" / "previous.pt").unlink()
    with pytest.raises(UsageError, match=r"already holds a run: its last.pt is gone"):
        train.train(quick(resume="auto", steps=3))
    (out / "run.json").unlink()  # as of a run that was killed before its first checkpoint
    train.train(quick(resume="auto", steps=3))
    assert load_checkpoint(out / "checkpoints" / "best.pt")["step"] <= 3  # not that of the model before
    assert len(rows_of(out)) == 3


# ---- never another run ----


@pytest.fixture(scope="module")
def finished(tmp_path_factory, short_text):
    """Settings of a run that is over: long enough for a best.pt."""
    out_dir = tmp_path_factory.mktemp("finished") / "out"
    settings = {**TINY, "out_dir": str(out_dir), "input_file": short_text, "tokenizer": "char", "steps": 25}
    train.train(train.TrainConfig(**settings))
    return settings


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"n_embd": 32}, "n_embd 32 conflicts with the checkpoint's 16"),
        ({"seq_len": 16}, "seq_len 16 conflicts with the checkpoint's 32"),
        ({"seed": 5}, "seed 5 conflicts with the checkpoint's 1337"),
        ({"optimizer": "muon"}, "optimizer muon conflicts with the checkpoint's adamw"),
        ({"tokenizer": "gpt2", "batch_size": 1}, "tokenizer gpt2 conflicts with the checkpoint's char"),
        ({"input_file": str(PLAY)}, "isn't the checkpoint's text"),
    ],
)
def test_another_run_is_not_resumed_by_mistake(finished, changes, sentence):
    run = train.RunDirectory(finished["out_dir"]).record
    before = run.read_bytes()
    with pytest.raises(UsageError, match=sentence):
        train.train(train.TrainConfig(**finished | {"steps": 50, "resume": "auto"} | changes))
    assert run.read_bytes() == before


def test_best_pt_is_not_taken_for_last_pt(finished, capsys):
    best = train.RunDirectory(finished["out_dir"]).best
    assert train.main(["--resume", str(best), "--steps", "50"]) == 2
    assert capsys.readouterr().err == f"train.py: {best} holds weights only: resume from the last.pt beside it\n"
