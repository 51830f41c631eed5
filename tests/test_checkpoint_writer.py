"""Checkpoints are written in the background, by one thread; what a full disk or memory does; which one is best.pt."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import threading
import time

import pytest
import torch
from checkpoint_kit import (  # noqa: F401  (fixtures)
    SETTINGS,
    finished_fixture,
    needs_root,
    no_space,
    out_fixture,
    small_disk,
    step_in,
    steps_of,
    stop_at,
)
from conftest import log_of, rows_of, same_weights, tiny_flags, without_times

import train
from support import checkpoint, files
from support.checkpoint import load_checkpoint
from support.cli import RunError
from support.files import PatientFile
from support.machine import HostCopies
from support.rundir import RunDirectory


@pytest.fixture
def writer(tmp_path):
    """A CheckpointWriter in tmp_path, where there is no checkpoint yet."""
    run_dir = RunDirectory(tmp_path)
    run_dir.prepare(overwrite=False, resumed=None)
    before = [PatientFile(run_dir.metrics, pytest.fail)]
    writer = train.CheckpointWriter(run_dir, before, logging.Logger("test"), HostCopies(torch.device("cpu")), best=9.0)
    yield writer
    writer.close()


def a_state(step: int) -> dict:
    """A checkpoint's content, with a tensor that gets a buffer of its own."""
    weights = torch.full((1 << 19,), float(step))
    return {
        **dict.fromkeys(("model_config", "loss", "val_loss", "tokenizer", "corpus_sha256", "origin")),
        "format": checkpoint.FORMAT,
        "config": {},
        "step": step,
        "progress": {"best_saved": 9.0},
        "model": {"wte": weights, "head": weights},
        "optimizer": {"state": {0: {"exp_avg": weights + 1}}, "groups": [(1, "x"), None]},
    }


def save(writer, step: int, best: float | None = None) -> None:
    """Saves a state, and waits until it is written."""
    writer.save(a_state(step), best)
    writer.wait()


# ---- in the background ----


def test_training_goes_on_while_a_checkpoint_is_written(tiny, monkeypatch):
    go_on = threading.Event()
    written = []
    real_save = checkpoint.save_checkpoint
    real_step = train.Trainer.train_step

    def slow(path, content, *rest, **options):
        assert go_on.wait(60)
        written.append((path.name, content["step"]))
        real_save(path, content, *rest, **options)

    def train_step(trainer, *args):
        real_step(trainer, *args)
        if trainer.progress.step == 19:  # nine steps behind the save at 10: nothing waited for it
            assert not written
            go_on.set()

    monkeypatch.setattr(checkpoint, "save_checkpoint", slow)
    monkeypatch.setattr(train.Trainer, "train_step", train_step)
    train.train(tiny(**SETTINGS))
    assert [pair for pair in written if pair[0] == "last.pt"] == [("last.pt", 10), ("last.pt", 20), ("last.pt", 30)]


def test_one_thread_writes_all_checkpoints_from_the_start_of_the_run_to_its_end(tiny, monkeypatch):
    """A thread costs memory: better it fails before the first step than at a save."""
    alive = []
    wrote = []
    real_save = checkpoint.save_checkpoint
    real_step = train.Trainer.train_step

    def save_checkpoint(*args, **options):
        wrote.append(threading.current_thread())
        real_save(*args, **options)

    def train_step(trainer, *args):
        alive.append(writers())
        real_step(trainer, *args)

    def writers() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name == "checkpoint writer"} - others

    others = set()  # of tests before this one
    others = writers()
    monkeypatch.setattr(checkpoint, "save_checkpoint", save_checkpoint)
    monkeypatch.setattr(train.Trainer, "train_step", train_step)
    train.train(tiny(**SETTINGS))
    (thread,) = alive[0]
    assert alive == [{thread}] * 30
    assert wrote == [thread] * 6  # last.pt and best.pt, three times
    thread.join(60)
    assert not thread.is_alive()


def test_where_no_thread_can_be_started_one_sentence_says_so_before_the_first_step(tmp_path, monkeypatch, capsys):
    real = threading.Thread.start

    def start(thread):
        if thread.name == "checkpoint writer":
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    assert train.main(tiny_flags(tmp_path / "out", tokenizer="char")) == 1
    assert "no more threads can be started here" in capsys.readouterr().err
    assert not (tmp_path / "out" / "logs" / "train_metrics.csv").exists()


def test_a_snapshot_is_of_its_moment(writer, monkeypatch):
    """What changes after save() returned doesn't reach the file; tied weights are written once."""
    go_on = threading.Event()
    real = checkpoint.save_checkpoint

    def slow(*args, **options):
        assert go_on.wait(60)
        real(*args, **options)

    monkeypatch.setattr(checkpoint, "save_checkpoint", slow)
    state = a_state(1)
    writer.save(state, best=5.0)
    state["step"] = 2
    state["model"]["wte"].fill_(-1)
    state["optimizer"]["state"][0]["exp_avg"].zero_()
    go_on.set()
    writer.wait()
    saved = load_checkpoint(writer.run_dir.last)
    assert saved["step"] == 1
    assert saved["optimizer"]["groups"] == [(1, "x"), None]
    assert (saved["model"]["head"] == 1).all()
    assert (saved["optimizer"]["state"][0]["exp_avg"] == 2).all()
    assert writer.run_dir.last.stat().st_size < 2.5 * 4 * (1 << 19)
    best = load_checkpoint(writer.run_dir.best)
    assert (best["model"]["wte"] == 1).all()
    assert "optimizer" not in best
    assert writer.best == 5.0


def test_rows_reach_the_disk_before_the_checkpoint_behind_them(writer, monkeypatch):
    synced = []
    real = files.sync_file

    def sync_file(handle):
        synced.append(os.fstat(handle).st_ino)
        real(handle)

    monkeypatch.setattr(files, "sync_file", sync_file)
    writer.before[0].append("rows\n")
    save(writer, 1)
    assert synced == [path.stat().st_ino for path in (writer.run_dir.metrics, writer.run_dir.last)]


def test_the_last_checkpoint_but_one_is_kept(writer):
    for step in (1, 2, 3):
        save(writer, step)
    assert step_in(writer.run_dir.last) == 3
    assert step_in(writer.run_dir.previous) == 2


class Clock:
    """In the place of time.monotonic: goes ahead when it is told to."""

    def __init__(self):
        self.ahead = 0.0
        self.real = time.monotonic

    def __call__(self) -> float:
        return self.real() + self.ahead


def test_saves_come_by_time_too_and_choose_no_best_pt(quick, monkeypatch):
    """They write one where there is none, so that each run that saved has one, but it counts for nothing."""
    clock = Clock()
    seconds = {45: 61.0, 60: 59.0, 62: 2.0}  # what these steps take
    saved = []
    real_step = train.Trainer.train_step

    def train_step(trainer, *args):
        real_step(trainer, *args)
        clock.ahead += seconds.get(trainer.progress.step, 0.0)

    def save(writer, state, best):
        saved.append((state["step"], best))

    monkeypatch.setattr(time, "monotonic", clock)
    monkeypatch.setattr(train.CheckpointWriter, "save", save)
    monkeypatch.setattr(train.Trainer, "train_step", train_step)
    train.train(quick(**{**SETTINGS, "steps": 70, "save_every": 1000}, save_minutes=1.0))
    nothing = (True, math.inf)
    assert saved[:2] == [(45, nothing), (62, nothing)]
    assert saved[2][0] == 70
    assert saved[2][1] < nothing


def test_a_clock_that_is_set_back_changes_nothing(tiny, tmp_path, monkeypatch):
    real = time.time
    asked = []

    def set_back() -> float:
        """A day behind, from the hundredth call on."""
        asked.append(1)
        return real() - (86_400 if len(asked) > 100 else 0)

    monkeypatch.setattr(time, "time", set_back)
    result = train.train(tiny(**{**SETTINGS, "steps": 100}))
    assert len(asked) > 100
    assert result["seconds"] > 0
    assert all(float(row["tok_per_s"]) > 0 for row in rows_of(tmp_path / "out"))


# ---- a disk that fails, and a memory ----


def failing(monkeypatch, steps: set[int]) -> None:
    """From here on, the disk has no room for a last.pt of these steps."""
    real = torch.save

    def save(content, f):
        if content["step"] in steps and "optimizer" in content:
            f.write(b"half")
            no_space()
        real(content, f)

    monkeypatch.setattr(torch, "save", save)


def look_before_each_save(last, monkeypatch) -> list:
    """Returns what will be a list of the steps in last.pt before each call of Loop.save."""
    seen = []
    real = train.Loop.save

    def save(loop, *args, **options):
        loop.checkpoints.wait()
        seen.append(step_in(last))
        real(loop, *args, **options)

    monkeypatch.setattr(train.Loop, "save", save)
    return seen


def test_a_failed_write_is_said_at_once_keeps_the_old_file_and_is_tried_again(tiny, tmp_path, monkeypatch, capsys):
    last = tmp_path / "out" / "checkpoints" / "last.pt"
    seen = look_before_each_save(last, monkeypatch)
    failing(monkeypatch, {20})
    assert train.train(tiny(**SETTINGS))["exit_code"] == 0
    assert seen == [None, 10, 10, 30]  # the last call is that of the end
    assert step_in(last) == 30
    assert log_of(tmp_path / "out").count("WARNING") == 1
    warning = capsys.readouterr().out.split("can't be written (")[1].splitlines()[0]
    assert warning.startswith("No space left on device): the one before it is intact; make room for it")
    assert not list((tmp_path / "out").rglob("*.part"))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_copy_that_cannot_be_made_is_a_failed_write_and_is_tried_again(tiny, tmp_path, monkeypatch, error):
    last = tmp_path / "out" / "checkpoints" / "last.pt"
    seen = look_before_each_save(last, monkeypatch)
    real = HostCopies.take

    def take(copies, content):
        if content["step"] == 20:
            raise error
        return real(copies, content)

    monkeypatch.setattr(HostCopies, "take", take)
    result = train.train(tiny(**SETTINGS))
    assert result["exit_code"] == 0
    assert result["ended"] == "steps done"
    assert seen == [None, 10, 10, 30]
    assert step_in(last) == 30
    log = log_of(tmp_path / "out")
    assert log.count("WARNING") == 1
    assert f"no checkpoint ({error!r}). Training goes on, and the next save tries again" in log


def test_no_fault_of_the_writer_vanishes_with_its_thread(tiny, monkeypatch):
    def fault(*args, **options):
        raise TypeError("can't pickle this")

    monkeypatch.setattr(checkpoint, "save_checkpoint", fault)
    with pytest.raises(RunError, match=r"no checkpoint \(TypeError\(.can't pickle this"):
        train.train(tiny(**SETTINGS))


def test_without_any_checkpoint_going_on_is_in_vain(tiny, tmp_path, monkeypatch):
    real = train.CheckpointWriter.save

    def save_and_wait(writer, *args):
        real(writer, *args)
        writer.wait()

    failing(monkeypatch, {10})
    monkeypatch.setattr(train.CheckpointWriter, "save", save_and_wait)
    with pytest.raises(RunError, match=r"No space left on device.*there is none before it"):
        train.train(tiny(**SETTINGS))
    assert steps_of(tmp_path / "out")[-1] == 11
    assert json.loads((tmp_path / "out" / "run.json").read_text())["ended"].startswith("failed: checkpoint")


def test_a_last_write_that_fails_ends_the_run_with_1(tmp_path, monkeypatch, capsys):
    last = tmp_path / "out" / "checkpoints" / "last.pt"
    with monkeypatch.context() as patch:
        failing(patch, {30})
        assert train.main(tiny_flags(tmp_path / "out", **SETTINGS)) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert step_in(last) == 20
    assert train.main(["--resume", str(last)]) == 0
    assert steps_of(tmp_path / "out") == list(range(1, 31))


def test_previous_pt_makes_room_when_the_disk_is_full(writer, monkeypatch):
    save(writer, 1)
    save(writer, 2)
    run_dir = writer.run_dir
    real = torch.save

    def save_if_there_is_room(content, f):
        if run_dir.previous.exists():
            no_space()
        real(content, f)

    monkeypatch.setattr(torch, "save", save_if_there_is_room)
    save(writer, 3)
    assert writer.failure is None
    assert step_in(run_dir.last) == 3
    assert step_in(run_dir.previous) == 2


class Disk:
    """Has room for rows, or not."""

    def __init__(self):
        self.full = False

    def append(self, path, data) -> None:
        if self.full:
            no_space()
        files.append_whole(path, data)


def test_rows_wait_in_memory_while_the_disk_is_full(tiny, tmp_path, monkeypatch):
    settings = {**SETTINGS, "save_every": 5}
    train.train(tiny(**settings, out_dir=str(tmp_path / "whole")))
    disk = Disk()
    real_init = train.MetricsCSV.__init__
    real_step = train.Trainer.train_step

    def init(metrics, *args):
        real_init(metrics, *args)
        metrics.file.write = disk.append

    def train_step(trainer, *args):
        real_step(trainer, *args)
        disk.full = 7 <= trainer.progress.step < 13

    monkeypatch.setattr(train.MetricsCSV, "__init__", init)
    monkeypatch.setattr(train.Trainer, "train_step", train_step)
    train.train(tiny(**settings))
    assert without_times(rows_of(tmp_path / "out")) == without_times(rows_of(tmp_path / "whole"))
    log = log_of(tmp_path / "out")
    assert log.count("what is missing is kept in memory") == 1
    assert "Training goes on, and the next save tries again" in log  # of the save at step 10


@needs_root
def test_on_a_disk_that_is_really_full(tmp_path, monkeypatch):
    """It fills up before the save at step 20, and has room again before the end."""
    disk = tmp_path / "disk"
    ballast = disk / "ballast"
    real = train.Loop.after_step

    def after_step(loop, bar):
        step = loop.progress.step
        if step == 11:
            loop.checkpoints.wait()
            ballast.write_bytes(bytes(shutil.disk_usage(disk).free - 50_000))  # room for rows
        if step == 25:
            loop.checkpoints.wait()
            ballast.unlink()
        return real(loop, bar)

    monkeypatch.setattr(train.Loop, "after_step", after_step)
    with small_disk(disk, "4m"):
        assert train.main(tiny_flags(disk / "out", **SETTINGS)) == 0
        assert "No space left on device): the one before it is intact" in log_of(disk / "out")
        assert step_in(disk / "out" / "checkpoints" / "last.pt") == 30
        assert steps_of(disk / "out") == list(range(1, 31))


@needs_root
def test_to_resume_on_a_full_disk_says_how_much_is_needed_and_where(out, tmp_path, capsys):
    disk = tmp_path / "disk"
    with small_disk(disk, "2m"):
        shutil.copytree(out, disk / "out")
        (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free))
        assert train.main(["--resume", str(disk / "out" / "checkpoints" / "last.pt"), "--steps", "40"]) == 1
        assert steps_of(disk / "out") == list(range(1, 31))
    sentence = f"out_dir {disk / 'out'} has 0.00 MB free, and log, rows and samples take at least 1 MB"
    assert capsys.readouterr().err == f"train.py: {sentence} beside the checkpoints: make room, then try again\n"


def test_too_little_space_is_said_before_training(tiny, make_trainer, tmp_path, monkeypatch):
    config = tiny(**SETTINGS, n_embd=64)
    needed = 28 * sum(p.numel() for p in make_trainer(config).model.parameters())
    usage = shutil.disk_usage(tmp_path)

    def room_for(size: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size))

    room_for(needed - 1)
    sentence = f"two of them with best.pt take {needed / 1e9:.3g} GB: make room, or choose an --out_dir"
    with pytest.raises(RunError, match=sentence):
        train.train(config)
    assert not (tmp_path / "out" / "logs").exists()
    room_for(needed)
    train.train(config)
    (tmp_path / "out" / "checkpoints" / "best.pt").unlink()  # with it, the run's own files would be room enough
    room_for(0)
    with pytest.raises(RunError, match="make room"):
        train.train(tiny(**SETTINGS, n_embd=64, overwrite=True))
    assert len(rows_of(tmp_path / "out")) == 30  # nothing was overwritten


# ---- which weights are in best.pt ----


def test_best_pt_holds_the_lowest_avg_loss_of_a_save(quick, tmp_path, monkeypatch):
    """Before a first full pass, that of the batches seen so far; after it, however low that was, of full passes."""
    best = tmp_path / "out" / "checkpoints" / "best.pt"
    losses = {20: 1.0, 40: 5.0, 80: 4.0, 85: 2.0, 120: 6.0}  # step 20 is before a first full pass, 85 is no save point
    found = []

    def look(loop):
        loop.checkpoints.wait()
        if best.exists():
            found.append((loop.progress.step, loop.progress.best_saved))

    monkeypatch.setattr(train.Trainer, "avg_loss", lambda trainer: losses.get(trainer.progress.step, 7.0))
    monkeypatch.setattr(train.Loop, "write_samples", look)
    train.train(quick(**{**SETTINGS, "steps": 120, "save_every": 20}, sample_every=20))
    assert found == [
        (20, (True, 1.0)),
        (40, (False, 5.0)),
        (60, (False, 5.0)),
        (80, (False, 4.0)),
        (100, (False, 4.0)),
        (120, (False, 4.0)),
    ]
    content = load_checkpoint(best)
    assert content["step"] == 80
    assert content["loss"] == 4.0
    assert "optimizer" not in content
    assert float(rows_of(tmp_path / "out")[-1]["best_loss"]) == 2.0


def test_best_pt_does_not_depend_on_the_clock(quick, tmp_path, monkeypatch):
    """Here it is of the last step, which a save by time comes before; and of a run that was stopped there."""
    settings = {**SETTINGS, "steps": 60, "save_every": 7, "lr": 3e-3}
    train.train(quick(**settings, out_dir=str(tmp_path / "plain")))
    train.train(quick(**settings, out_dir=str(tmp_path / "by_time"), save_minutes=1e-6))
    with monkeypatch.context() as patch:
        stop_at(60, patch)
        train.train(quick(**settings, out_dir=str(tmp_path / "stopped")))
    train.train(quick(**settings, out_dir=str(tmp_path / "stopped"), resume="auto"))
    plain = load_checkpoint(tmp_path / "plain" / "checkpoints" / "best.pt")
    assert plain["step"] == 60
    for name in ("by_time", "stopped"):
        other = load_checkpoint(tmp_path / name / "checkpoints" / "best.pt")
        assert other["step"] == 60
        assert same_weights(other["model"], plain["model"])


def test_best_loss_does_not_depend_on_where_a_run_was_stopped(quick, tmp_path, monkeypatch):
    """As on CUDA, where figures are read only where a log line is due or a pass ends, here at step 42. The run is
    stopped at step 44, where avg_loss is at its lowest."""
    real = train.Loop.__init__

    def init(loop, *args):
        real(loop, *args)
        loop.reads_each_step = False

    monkeypatch.setattr(train.Loop, "__init__", init)
    monkeypatch.setattr(train.Trainer, "avg_loss", lambda trainer: 1.0 + abs(trainer.progress.step - 44))
    settings = {**SETTINGS, "steps": 100, "log_every": 30, "save_every": 100}
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    train.train(quick(**settings, out_dir=str(whole)))
    with monkeypatch.context() as patch:
        stop_at(44, patch)
        train.train(quick(**settings, out_dir=str(parts)))
    train.train(quick(**settings, out_dir=str(parts), resume="auto"))
    assert without_times(rows_of(whole)) == without_times(rows_of(parts))
    assert float(rows_of(parts)[-1]["best_loss"]) == 3.0


def test_last_pt_is_saved_even_where_best_pt_cannot_be(writer, monkeypatch):
    run_dir = writer.run_dir
    save(writer, 1)
    save(writer, 2)
    real = torch.save

    def save_last_pt_alone(content, f):
        if "optimizer" not in content:
            no_space()
        real(content, f)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_last_pt_alone)
        save(writer, 3, best=4.0)
    assert step_in(run_dir.last) == 3
    assert "best.pt can't be written" in str(writer.failure)
    assert load_checkpoint(run_dir.last)["progress"]["best_saved"] == writer.best == 9.0
    save(writer, 4, best=4.0)
    assert writer.failure is None
    assert writer.best == 4.0
    assert step_in(run_dir.best) == 4


def test_a_best_pt_that_was_taken_away_is_not_replaced_by_worse_weights(quick, tmp_path, monkeypatch):
    best = tmp_path / "out" / "checkpoints" / "best.pt"
    losses = {40: 1.0}
    monkeypatch.setattr(train.Trainer, "avg_loss", lambda trainer: losses.get(trainer.progress.step, 7.0))
    train.train(quick(**{**SETTINGS, "steps": 40, "save_every": 20}))
    assert load_checkpoint(best)["step"] == 40
    best.unlink()
    train.train(quick(**{**SETTINGS, "steps": 80, "save_every": 20}, resume="auto"))
    assert not best.exists()


def test_a_run_that_is_stopped_before_its_first_save_leaves_a_best_pt_that_counts_for_nothing(
    quick, tmp_path, monkeypatch
):
    settings = {**SETTINGS, "steps": 20, "save_every": 10}
    best = tmp_path / "out" / "checkpoints" / "best.pt"
    losses = {3: 0.5, 10: 6.0}  # the mean so far is lowest where the run is stopped
    monkeypatch.setattr(train.Trainer, "avg_loss", lambda trainer: losses.get(trainer.progress.step, 7.0))
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        train.train(quick(**settings))
    assert load_checkpoint(best)["step"] == 3
    train.train(quick(**settings, resume="auto"))
    assert load_checkpoint(best)["step"] == 10
