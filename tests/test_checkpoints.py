"""Checkpoints: in the background, on failing disks, damaged, locked, after a kill; and other systems."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import ROOT, rows_of, tiny_flags, weights_of, without_times
from hypothesis import example, given, settings
from hypothesis import strategies as st

import train

SETTINGS = {"steps": 30, "save_every": 10, "num_prompts": 0, "target_loss": 0}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The run directory of a run of 30 steps that saved at 10, 20 and 30."""
    from conftest import TINY

    out = tmp_path_factory.mktemp("run") / "out"
    train.train(train.TrainConfig(**{**TINY, "out_dir": str(out), **SETTINGS}))
    return out


@pytest.fixture
def out(finished, tmp_path):
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "out")


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def log_of(out) -> str:
    return (out / "logs" / "train.log").read_text()


# ---- in the background ----


def make_writer(tmp_path, log=None):
    run_dir = train.RunDirectory(tmp_path)
    run_dir.prepare(overwrite=False, path=None)
    return train.CheckpointWriter(run_dir, log or logging.Logger("test"), torch.device("cpu"), best=9.0)


def a_state(step=1, size=1 << 19):
    weights = torch.full((size,), float(step))
    return dict.fromkeys(train.WEIGHTS) | {
        "format": 1,
        "config": {},
        "step": step,
        "model": {"wte": weights, "head": weights},
        "optimizer": {"state": {0: {"exp_avg": weights + 1}}, "groups": [(1, "x"), None]},
    }


def test_training_goes_on_while_a_checkpoint_is_written(tiny, tmp_path, monkeypatch):
    go_on, written, real = threading.Event(), [], train.save_checkpoint

    def slow(path, content, *rest, **options):
        assert go_on.wait(60)
        written.append((path.name, content["step"]))
        real(path, content, *rest, **options)

    real_step = train.Trainer.train_step

    def step(trainer):
        real_step(trainer)
        if trainer.step == 19:  # nine steps behind the save at 10: nothing waited for it
            assert not written
            go_on.set()

    monkeypatch.setattr(train, "save_checkpoint", slow)
    monkeypatch.setattr(train.Trainer, "train_step", step)
    train.train(tiny(**SETTINGS))
    assert written == [("last.pt", 10), ("last.pt", 20), ("last.pt", 30)]  # one after the other


def test_a_snapshot_is_of_its_moment(tmp_path, monkeypatch):
    """What changes after save() returned doesn't reach the file; tied weights are written once."""
    go_on, real = threading.Event(), train.save_checkpoint
    monkeypatch.setattr(train, "save_checkpoint", lambda *args, **options: (go_on.wait(60), real(*args, **options)))
    writer, state = make_writer(tmp_path), a_state() | {"losses": torch.ones(3)}
    writer.save(state, best=5.0)
    state["losses"].zero_()
    state["model"]["wte"].fill_(-1)
    state["optimizer"]["state"][0]["exp_avg"].zero_()
    state["step"] = 2
    go_on.set()
    writer.wait()
    saved = train.load_checkpoint(tmp_path / "checkpoints" / "last.pt")
    assert saved["losses"].tolist() == [1, 1, 1]
    assert saved["step"] == 1 and saved["optimizer"]["groups"] == [(1, "x"), None]
    assert (saved["model"]["head"] == 1).all() and (saved["optimizer"]["state"][0]["exp_avg"] == 2).all()
    assert (tmp_path / "checkpoints" / "last.pt").stat().st_size < 2.5 * 4 * (1 << 19)
    best = train.load_checkpoint(tmp_path / "checkpoints" / "best.pt")
    assert (best["model"]["wte"] == 1).all() and "optimizer" not in best and writer.best == 5.0


def test_rows_reach_the_disk_before_the_checkpoint_behind_them(tmp_path, monkeypatch):
    writer, synced, real = make_writer(tmp_path), [], train.sync_file
    writer.run_dir.metrics.write_text("rows")
    monkeypatch.setattr(train, "sync_file", lambda handle: (synced.append(os.fstat(handle).st_ino), real(handle)))
    writer.save(a_state(), best=None)
    writer.wait()
    assert synced == [path.stat().st_ino for path in (writer.run_dir.metrics, writer.run_dir.last)]


def test_what_a_killed_run_left_half_written_is_removed(out):
    for name in ("checkpoints/last.pt.0.part", "checkpoints/previous.pt.part", "run.json.0.part"):
        (out / name).write_bytes(b"half")
    assert train.main(["--resume", str(out / "checkpoints" / "last.pt"), "--steps", "31"]) == 0
    assert not list(out.rglob("*.part"))


def test_the_copies_are_used_again(tmp_path):
    writer, state = make_writer(tmp_path), a_state()
    for step in range(3):
        state["step"] = step
        writer.save(state, best=None)
    writer.wait()
    assert len(writer.buffers) == 2  # the tied weights, and one average
    assert train.load_checkpoint(tmp_path / "checkpoints" / "previous.pt")["step"] == 1


def test_saves_come_by_time_too_and_leave_best_pt_alone(tiny, tmp_path, monkeypatch):
    clock, real = [0.0], time.monotonic
    monkeypatch.setattr(train.time, "monotonic", lambda: real() + clock[0])
    saved = []
    monkeypatch.setattr(train.CheckpointWriter, "save", lambda writer, state, best: saved.append((state["step"], best)))
    monkeypatch.setattr(train.CheckpointWriter, "check", lambda writer: None)
    monkeypatch.setattr(
        train.Trainer, "train_step", late(train.Trainer.train_step, clock, {45: 61.0, 60: 59.0, 62: 2.0})
    )
    train.train(tiny(steps=70, save_every=1000, save_minutes=1.0, target_loss=0, num_prompts=0))
    assert [(step, best is not None) for step, best in saved] == [(45, False), (62, False), (70, True)]


def late(real, clock, seconds):
    def train_step(trainer):
        real(trainer)
        clock[0] += seconds.get(trainer.step, 0)

    return train_step


def test_a_clock_that_is_set_back_changes_nothing(tiny, tmp_path, monkeypatch):
    real = time.time
    started = real()
    monkeypatch.setattr(time, "time", lambda: real() - 86_400 * (real() - started > 0.2))
    result = train.train(tiny(steps=40, save_every=5))
    assert result["seconds"] > 0 and all(float(row["tok_per_s"]) > 0 for row in rows_of(tmp_path / "out"))


# ---- a disk that fails ----


def failing(monkeypatch, steps, error=no_space):
    """Writes of last.pt at these steps fail."""
    real = train.torch.save

    def save(content, f):
        if content["step"] in steps and "optimizer" in content:
            f.write(b"half")
            error()
        real(content, f)

    monkeypatch.setattr(train.torch, "save", save)


def test_a_failed_write_is_said_at_once_keeps_the_old_file_and_is_tried_again(tiny, tmp_path, monkeypatch, capsys):
    failing(monkeypatch, {20})
    last, seen = tmp_path / "out" / "checkpoints" / "last.pt", []
    real = train.Loop.save
    monkeypatch.setattr(
        train.Loop, "save", lambda loop, *a, **k: (loop.writer.wait(), seen.append(step_in(last)), real(loop, *a, **k))
    )
    assert train.train(tiny(**SETTINGS))["exit_code"] == 0
    assert seen == [None, 10, 10, 30] and step_in(last) == 30  # the last call is that of the end
    assert log_of(tmp_path / "out").count("WARNING") == 1
    warning = capsys.readouterr().out.split("can't be written (")[1].splitlines()[0]
    assert warning.startswith("No space left on device): the one before it is intact; make room for it")
    assert not list((tmp_path / "out").rglob("*.part"))


def step_in(path):
    return train.load_checkpoint(path)["step"] if path.exists() else None


def test_no_fault_of_the_writer_vanishes_with_its_thread(tiny, monkeypatch):
    def fault(*_):
        raise TypeError("can't pickle this")

    monkeypatch.setattr(train, "save_checkpoint", fault)
    with pytest.raises(train.RunError, match=r"no checkpoint \(TypeError\(.can't pickle this"):
        train.train(tiny())


def test_without_any_checkpoint_going_on_is_in_vain(tiny, tmp_path, monkeypatch):
    failing(monkeypatch, {10})
    with pytest.raises(train.RunError, match=r"No space left on device.*there is none before it"):
        train.train(tiny(**SETTINGS))
    assert 10 <= int(rows_of(tmp_path / "out")[-1]["step"]) < 20
    assert json.loads((tmp_path / "out" / "run.json").read_text())["ended"].startswith("failed: checkpoint")


def test_a_last_write_that_fails_ends_the_run_with_1(tmp_path, monkeypatch, capsys):
    failing(monkeypatch, {30})
    assert train.main(tiny_flags(tmp_path / "out", **SETTINGS)) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert step_in(tmp_path / "out" / "checkpoints" / "last.pt") == 20
    monkeypatch.undo()
    assert train.main(["--resume", str(tmp_path / "out" / "checkpoints" / "last.pt")]) == 0
    assert [int(row["step"]) for row in rows_of(tmp_path / "out")] == list(range(1, 31))


def test_previous_pt_makes_room_when_the_disk_is_full(tmp_path, monkeypatch):
    writer = make_writer(tmp_path)
    for step in (1, 2):
        writer.save(a_state(step), best=None)
    writer.wait()
    run_dir, real = writer.run_dir, torch.save
    monkeypatch.setattr(train.torch, "save", lambda *args: no_space() if run_dir.previous.exists() else real(*args))
    writer.save(a_state(3), best=None)
    writer.wait()
    assert writer.failure is None and (step_in(run_dir.last), step_in(run_dir.previous)) == (3, 2)


def test_rows_wait_in_memory_while_the_disk_is_full(tiny, tmp_path, monkeypatch):
    train.train(tiny(out_dir=str(tmp_path / "whole"), steps=20, save_every=5))
    full = [False]

    class Full:
        """A file that takes half of a row and no more."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            return self.file.write(data[: len(data) // 2])

    def open_file(path, mode="r", *args, **kwargs):
        file = open(path, mode, *args, **kwargs)  # noqa: SIM115
        return Full(file) if full[0] and mode == "ab" else file

    monkeypatch.setattr(train, "open", open_file, raising=False)
    real_step = train.Trainer.train_step

    def train_step(trainer):
        real_step(trainer)
        full[0] = trainer.step in range(7, 13)

    monkeypatch.setattr(train.Trainer, "train_step", train_step)
    train.train(tiny(steps=20, save_every=5))
    assert without_times(rows_of(tmp_path / "out")) == without_times(rows_of(tmp_path / "whole"))
    assert log_of(tmp_path / "out").count("what is missing is kept in memory") == 1
    assert "Training goes on, and the next save tries again" in log_of(tmp_path / "out")  # the save at step 10


@contextlib.contextmanager
def small_disk(path, size: str):
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True)
    if done.returncode:
        pytest.skip("no right to mount a small disk here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.skipif(not shutil.which("mount") or not hasattr(os, "geteuid") or os.geteuid(), reason="needs root")
def test_on_a_disk_that_is_really_full(tmp_path, monkeypatch):
    """It fills up after step 20, and has room again before the end."""
    disk = tmp_path / "disk"
    with small_disk(disk, "64m"):
        ballast, real = disk / "ballast", train.Trainer.train_step

        def train_step(trainer):
            real(trainer)
            if trainer.step == 11:
                trainer_writer_wait()
                ballast.write_bytes(bytes(shutil.disk_usage(disk).free - 100_000))
            if trainer.step == 25:
                ballast.unlink()

        def trainer_writer_wait():
            while any(t.name == "checkpoint writer" for t in threading.enumerate()):
                time.sleep(0.01)

        monkeypatch.setattr(train.Trainer, "train_step", train_step)
        assert train.main(tiny_flags(disk / "out", **SETTINGS)) == 0
        assert "No space left on device): the one before it is intact" in log_of(disk / "out")
        assert step_in(disk / "out" / "checkpoints" / "last.pt") == 30
        assert [int(row["step"]) for row in rows_of(disk / "out")] == list(range(1, 31))


def test_too_little_space_is_said_before_training(tiny, tmp_path, monkeypatch):
    parameters = sum(p.numel() for p in train.GPT(train.GPTConfig(64, 50257, 2, 2, 16)).parameters())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(train.shutil, "disk_usage", lambda _: usage._replace(free=28 * parameters - 1))
    with pytest.raises(
        train.RunError, match=r"two of them with best.pt take 0.0227 GB: make room, or choose an --out_dir"
    ):
        train.train(tiny())
    assert not (tmp_path / "out" / "logs").exists()
    monkeypatch.setattr(train.shutil, "disk_usage", lambda _: usage._replace(free=28 * parameters))
    train.train(tiny())
    monkeypatch.setattr(train.shutil, "disk_usage", lambda _: usage._replace(free=0))
    with pytest.raises(train.RunError, match="make room"):
        train.train(tiny(overwrite=True))
    assert len(rows_of(tmp_path / "out")) == 6  # nothing was overwritten


# ---- damaged files ----

DAMAGE = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "flipped": lambda data: data[: len(data) // 3] + bytes([data[len(data) // 3] ^ 4]) + data[len(data) // 3 + 1 :],
    "other": lambda data: b"something else\n" * 1000,
    "zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("kind", [*DAMAGE, "missing"])
def test_auto_goes_on_from_the_checkpoint_before_a_damaged_one(kind, out, finished, tmp_path):
    last = out / "checkpoints" / "last.pt"
    last.unlink() if kind == "missing" else last.write_bytes(DAMAGE[kind](last.read_bytes()))
    assert train.main(tiny_flags(out, **SETTINGS, resume="auto")) == 0
    log = log_of(out)
    assert "Resumed: step 20" in log
    assert kind == "missing" or f"{last} is damaged or isn't a checkpoint" in log
    assert weights_equal(out, finished)
    assert without_times(rows_of(out)) == without_times(rows_of(finished))
    assert kind == "missing" or (out / "checkpoints" / "aside.pt").exists()  # kept, for whoever wants to look
    assert not list(out.rglob("*.part"))


def weights_equal(a, b) -> bool:
    a, b = weights_of(a), weights_of(b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_that_is_named_is_an_error(kind, out, capsys):
    last = out / "checkpoints" / "last.pt"
    last.write_bytes(DAMAGE[kind](last.read_bytes()))
    before = (out / "logs" / "train_metrics.csv").read_bytes()
    assert train.main(["--resume", str(last), "--steps", "40"]) == 1
    err = capsys.readouterr().err
    assert "resume from the previous.pt beside it, sample from its best.pt, or start anew with --overwrite" in err
    assert err.count("\n") == 1 and (out / "logs" / "train_metrics.csv").read_bytes() == before
    assert train.main(["--resume", str(out / "checkpoints" / "previous.pt"), "--steps", "30"]) == 0


def test_two_damaged_checkpoints_are_an_error(out, capsys):
    for name in ("last.pt", "previous.pt"):
        (out / "checkpoints" / name).write_bytes(b"")
    assert train.main(tiny_flags(out, **SETTINGS, resume="auto")) == 1
    assert "last.pt is damaged" in capsys.readouterr().err


def test_a_newer_checkpoint_is_no_damage(out, capsys):
    last = out / "checkpoints" / "last.pt"
    train.save_checkpoint(last, train.load_checkpoint(last) | {"format": 99})
    assert train.main(tiny_flags(out, **SETTINGS, resume="auto")) == 1
    assert "is of a newer version of train.py: update this one" in capsys.readouterr().err


@settings(max_examples=60, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), lazy=st.booleans())
def test_a_flipped_bit_is_noticed_or_without_effect(tmp_path_factory, small_checkpoint, place, bit, lazy):
    data, content = small_checkpoint
    path = tmp_path_factory.mktemp("flip") / "last.pt"
    i = int(place * len(data))
    path.write_bytes(data[:i] + bytes([data[i] ^ (1 << bit)]) + data[i + 1 :])
    with contextlib.suppress(train.RunError):
        loaded = train.load_checkpoint(path, lazy)
        assert str(loaded) == str(content)


def test_a_tensor_that_became_a_folder_is_noticed(tmp_path, small_checkpoint):
    """One bit of the archive's directory, outside of what the checksums cover."""
    data, _ = small_checkpoint
    path = tmp_path / "last.pt"
    place = data.index(b"archive/data/0", data.index(b"PK\x01\x02")) - 8
    path.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
    with pytest.raises(train.DamagedError, match="is damaged"):
        train.load_checkpoint(path)


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "last.pt"
    content = {
        "format": 1,
        "model": {"w": torch.arange(50.0)},
        "config": {**train.BEFORE_A_CHOICE, "steps": 3},
        "step": 2,
    }
    train.save_checkpoint(path, content)
    return path.read_bytes(), content


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=300))
def test_random_bytes_in_any_file_of_a_run_give_no_traceback(tmp_path_factory, small_checkpoint, data):
    root = tmp_path_factory.mktemp("bytes")
    run_dir = train.RunDirectory(root)
    run_dir.prepare(overwrite=False, path=None)
    for path in (run_dir.last, run_dir.metrics, run_dir.samples, run_dir.record):
        path.write_bytes(data)
    with pytest.raises(train.RunError):
        run_dir.load("auto")
    run_dir.last.write_bytes(small_checkpoint[0][: len(data) * 5] + data)
    with pytest.raises(train.RunError):
        run_dir.load("auto", lazy=True)
    run_dir.rewind(5)
    assert isinstance(run_dir.read_record(), dict)
    (root / "ids.npy").write_bytes(data)
    tokenizer = train.Tokenizer("x", 300, lambda text: list(text.encode()), None)
    encoded = functools.partial(train.encode_pieces, ["text"], tokenizer, 4)
    assert train.cached_tokens(root / "ids.npy", encoded, 300)[0].tolist() == list(b"text")
    (root / "text").write_bytes(data)
    with contextlib.suppress(train.UsageError):
        assert train.load_corpus(str(root / "text"), tokenizer, str(root)).text.strip()


# ---- other machines, other settings ----


def test_what_changed_since_the_checkpoint_is_said(out):
    train.main(["--resume", str(out / "checkpoints" / "last.pt"), "--steps", "40", "--lr", "1e-3", "--log_every", "5"])
    log = log_of(out)
    assert "Changed since the checkpoint: log_every 1 -> 5, lr 0.0003 -> 0.001, steps 30 -> 40" in log
    before = train.TrainConfig(steps=30, lr=3e-4).resolved(1, 1)
    after = train.TrainConfig(steps=40, lr=1e-3).resolved(1, 1)
    rates = [rate_of_step(config, 31 if config is after else 30) for config in (before, after)]
    assert f"Learning rate of step 31: {rates[1]:.6e} (it was to be {rates[0]:.6e})" in log


def rate_of_step(config, step) -> float:
    optimizer = torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.zeros(1))], "rate": "lr"}], lr=config.lr)
    train.build_scheduler(optimizer, config, step - 1)
    return optimizer.param_groups[0]["lr"]


def test_nothing_changed_is_not_said_to(out):
    train.main(["--resume", str(out / "checkpoints" / "previous.pt")])
    assert not any(words in log_of(out) for words in ("Changed since", "Learning rate of", "Not bit for bit"))


def test_another_machine_is_resumed_on_and_said(out):
    """A checkpoint of CUDA in fp16, as far as a CPU can tell; and back."""
    last = out / "checkpoints" / "last.pt"
    state = train.load_checkpoint(last)
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0).state_dict()
    there = {"device": "cuda (NVIDIA H200)", "precision": "float16 autocast with loss scaling"}
    rng = [state["rng"][0] | {"cuda": torch.zeros(16, dtype=torch.uint8)}]
    train.save_checkpoint(last, state | {"scaler": scaler, "made_on": state["made_on"] | there, "rng": rng})
    assert train.main(["--resume", str(last), "--steps", "33"]) == 0
    assert "Not bit for bit the run that never stopped, since this differs: device cuda (NVIDIA H200) -> cpu" in log_of(
        out
    )
    assert "precision float16 autocast with loss scaling -> fp32" in log_of(out)


def test_a_loss_scaler_starts_anew_where_the_checkpoint_has_none(tiny, make_trainer, out):
    trainer = make_trainer(tiny(**SETTINGS))
    trainer.runtime.scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    trainer.load_state_dict(train.load_checkpoint(out / "checkpoints" / "previous.pt"))
    trainer.train_step()
    assert trainer.state_dict()["scaler"]["scale"] == 512.0


def test_updates_that_the_scaler_skips_are_counted_and_kept(tiny, make_trainer):
    trainer = make_trainer(tiny())
    trainer.runtime.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    trainer.train_step()
    assert trainer.skipped.item() == 0
    hook = trainer.model.lm_head.weight.register_hook(lambda grad: grad * float("inf"))
    trainer.train_step()
    hook.remove()
    trainer.train_step()
    assert trainer.skipped.item() == 1
    again = make_trainer(tiny())
    again.load_state_dict(trainer.state_dict())
    assert again.skipped.item() == 1


# ---- one run at a time ----


def test_a_second_run_in_the_same_directory_is_refused(tmp_path):
    """By a lock that ends with its process, however that ends."""
    flags = tiny_flags(tmp_path / "out", **{**SETTINGS, "steps": 100_000}, resume="auto")
    command = [sys.executable, str(ROOT / "train.py"), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 12/"):
            break
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 2 and second.stdout == ""
    assert f"is in use by another run (process {process.pid}): wait for it, stop it, or choose another" in second.stderr
    process.kill()
    process.communicate()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert any(line.startswith("Resumed: step") for line in process.stdout)
    process.kill()
    process.communicate()
    steps = [int(row["step"]) for row in rows_of(tmp_path / "out")]
    assert steps == list(range(1, len(steps) + 1))


def test_a_drive_without_locks_is_no_hindrance(tiny, monkeypatch):
    def no_locks(_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(train, "lock_file", no_locks)
    assert train.train(tiny())["exit_code"] == 0


def test_a_directory_with_spaces_and_other_letters(tiny, tmp_path):
    out = tmp_path / "Läufe ☃ und mehr" / "our run"
    train.train(tiny(out_dir=str(out), steps=3))
    assert train.main(["--resume", str(out / "checkpoints" / "last.pt"), "--steps", "6"]) == 0
    assert len(rows_of(out)) == 6


def test_a_checkpoint_is_loaded_under_the_lock(tiny, tmp_path, monkeypatch):
    """Else one that is being replaced would be resumed when the run that replaced it has ended."""
    train.train(tiny(**SETTINGS))
    order = []
    for owner, name in ((train, "lock_file"), (train, "load_checkpoint"), (train.RunDirectory, "prepare")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, real=real, name=name, **k: (order.append(name), real(*a, **k))[1])
    train.train(tiny(**{**SETTINGS, "steps": 40}, resume="auto"))
    assert order == ["lock_file", "load_checkpoint", "prepare"]


def tensors_of(path) -> dict:
    return train.load_checkpoint(path)["model"]


def test_best_pt_does_not_depend_on_the_clock(tiny, tmp_path):
    """Here it is of the last step, which a save by time comes before; and of a run that was stopped there."""
    settings = {"steps": 60, "save_every": 7, "lr": 3e-3, "num_prompts": 0, "target_loss": 0}
    train.train(tiny(out_dir=str(tmp_path / "a"), **settings))
    train.train(tiny(out_dir=str(tmp_path / "b"), save_minutes=1e-6, **settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Loop, "asked", lambda loop, _: (loop.trainer.step == 60, False))
        train.train(tiny(out_dir=str(tmp_path / "c"), **settings))
    train.train(tiny(out_dir=str(tmp_path / "c"), resume="auto", **settings))
    best = [train.load_checkpoint(tmp_path / run / "checkpoints" / "best.pt") for run in "abc"]
    assert {content["step"] for content in best} == {60}
    assert all(torch.equal(best[0]["model"][key], other["model"][key]) for other in best for key in best[0]["model"])


def test_best_loss_does_not_depend_on_where_a_run_was_stopped(tiny, tmp_path, monkeypatch):
    """As on CUDA, where the figures aren't read at each step; avg_loss has its minimum between two log lines."""
    real = train.Loop.__init__

    def init(loop, *args):
        real(loop, *args)
        loop.reads_each_step = False

    monkeypatch.setattr(train.Loop, "__init__", init)
    settings = {"steps": 100, "log_every": 30, "save_every": 100, "lr": 3.0, "clip_grad": 0.0, "warmup_steps": 100}
    settings |= {"num_prompts": 0, "target_loss": 0}
    train.train(tiny(out_dir=str(tmp_path / "whole"), **settings))
    with monkeypatch.context() as patch:
        patch.setattr(train.Loop, "asked", lambda loop, _: (loop.trainer.step == 44, False))
        train.train(tiny(out_dir=str(tmp_path / "parts"), **settings))
    train.train(tiny(out_dir=str(tmp_path / "parts"), resume="auto", **settings))
    assert without_times(rows_of(tmp_path / "whole")) == without_times(rows_of(tmp_path / "parts"))


@pytest.mark.parametrize("name", ["mine.pt", "aside.pt", "previous.pt"])
def test_going_back_to_any_checkpoint_loses_no_row(name, out, finished):
    """Killed before its first save, a run that went back is resumed from where it went back to."""
    folder = out / "checkpoints"
    if name != "previous.pt":
        shutil.copy(folder / "previous.pt", folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Loop, "save", lambda *_, **__: None)
        patch.setattr(train.Loop, "asked", lambda loop, _: (loop.trainer.step == 23, False))
        train.main(["--resume", str(folder / name)])
    assert step_in(folder / "last.pt") == 20 and step_in(folder / "aside.pt") == 30
    assert train.main(tiny_flags(out, **SETTINGS, resume="auto")) == 0
    assert without_times(rows_of(out)) == without_times(rows_of(finished))
    assert weights_equal(out, finished)


def test_last_pt_is_saved_even_where_best_pt_cannot_be(tmp_path, monkeypatch):
    writer = make_writer(tmp_path)
    for step in (1, 2):
        writer.save(a_state(step), best=None)
    writer.wait()
    real = torch.save
    monkeypatch.setattr(train.torch, "save", lambda c, f: real(c, f) if "optimizer" in c else no_space())
    writer.save(a_state(3), best=4.0)
    writer.wait()
    assert step_in(writer.run_dir.last) == 3 and "best.pt can't be written" in str(writer.failure)
    assert train.load_checkpoint(writer.run_dir.last)["best_saved"] == writer.best == 9.0
    monkeypatch.undo()
    writer.save(a_state(4), best=4.0)
    writer.wait()
    assert writer.failure is None and writer.best == 4.0 and step_in(writer.run_dir.best) == 4


def test_a_sample_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    run_dir = train.RunDirectory(tmp_path)
    run_dir.write_samples(1, [("a", "b")])
    before = run_dir.samples.read_bytes()
    monkeypatch.setattr(train.os, "replace", no_space)
    with pytest.raises(OSError, match="No space left"):
        run_dir.write_samples(2, [("c", "d")])
    assert run_dir.samples.read_bytes() == before
    monkeypatch.undo()
    run_dir.catch_up()
    assert run_dir.samples.read_text().count("STEP") == 2


def test_a_folder_in_the_place_of_last_pt_is_fallen_back_from(out):
    last = out / "checkpoints" / "last.pt"
    last.unlink()
    last.mkdir()
    assert train.RunDirectory(out).load("auto")[0].name == "previous.pt"


@pytest.mark.parametrize("part", [{"optimizer": None}, {"made_on": [1]}, {"config": {"input_file": 7}}, {"rng": 3}])
def test_a_checkpoint_of_wrong_types_is_a_sentence(part, out, capsys):
    last = out / "checkpoints" / "last.pt"
    state = train.load_checkpoint(last)
    part = {key: state[key] | value if key == "config" else value for key, value in part.items()}
    train.save_checkpoint(last, state | part)
    assert train.main(["--resume", str(last), "--steps", "40"]) in (1, 2)
    assert "Traceback" not in capsys.readouterr().err


# ---- killed ----


def killed_at(call: str, name: str, n: int, before: bool, flags: list[str]) -> int:
    """Runs train.py and kills it, as by kill -9, before or after the n-th call of os.`call` whose target is `name`."""
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train
real, count = os.{call}, 0
def patched(*args):
    global count
    mine = str(args[-1]).endswith({name!r})
    count += mine
    if mine and count == {n} and {before}:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*args)
    if mine and count == {n}:
        os.kill(os.getpid(), signal.SIGKILL)
os.{call} = patched
raise SystemExit(train.main({flags!r}))
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is of POSIX")
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    ("call", "name"), [("replace", "last.pt"), ("replace", "previous.pt"), ("link", "previous.pt.part")]
)
def test_killed_at_the_moment_of_a_rename(call, name, before, tmp_path, finished):
    flags = tiny_flags(tmp_path / "out", **SETTINGS, resume="auto")
    assert killed_at(call, name, 2, before, flags) == -signal.SIGKILL
    step_in_last = step_in(tmp_path / "out" / "checkpoints" / "last.pt")  # whole
    assert step_in_last in (10, 20, 30)
    assert train.main(flags) == 0
    assert not list((tmp_path / "out").rglob("*.part"))
    assert weights_equal(tmp_path / "out", finished)
    assert without_times(rows_of(tmp_path / "out")) == without_times(rows_of(finished))


def kill_at_random_moments(out, times: int, seed: int) -> None:
    """A run that saves constantly, killed again and again, is in the end the one that was never stopped."""
    rng = random.Random(seed)
    changes = {
        "steps": 60 * times,
        "save_every": 1,
        "log_every": 1,
        "num_prompts": 1,
        "sample_every": 7,
        "target_loss": 0,
    }
    flags = tiny_flags(out, **changes, resume="auto")
    reached = []
    for _ in range(times):
        process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *flags], stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith("step "):
                break
        time.sleep(rng.uniform(0, 0.8))
        process.kill()
        process.communicate()
        if (out / "checkpoints" / "last.pt").exists():
            reached.append(train.load_checkpoint(out / "checkpoints" / "last.pt")["step"])
    assert reached == sorted(reached) and reached[-1] > times
    flags = [*flags, "--steps", str(reached[-1] + 5)]
    assert train.main(flags) == 0
    assert [int(row["step"]) for row in rows_of(out)] == list(range(1, reached[-1] + 6))


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is of POSIX")
def test_killed_at_random_moments(tmp_path):
    kill_at_random_moments(tmp_path / "out", times=4, seed=1)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kill -9 is of POSIX")
def test_killed_at_thirty_random_moments(tmp_path):
    kill_at_random_moments(tmp_path / "out", times=30, seed=2)


# ---- operating systems ----


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="O_DIRECT is of Linux")
def test_a_file_past_the_page_cache_has_the_same_bytes(tmp_path, monkeypatch):
    path = tmp_path / "file"
    try:
        train.DirectFile(path).__exit__()
    except OSError:
        pytest.skip("not on this file system")
    size = 1 << 24
    for pieces in ((), (0,), (1,), (size,), (size - 1, 1), (5, size), (3 * size + 7, 9), (4095, 4097, size)):
        data = [os.urandom(n) for n in pieces]
        with train.open_direct(path) as f:
            assert isinstance(f, train.DirectFile)
            assert [f.write(part) for part in data] == list(pieces)
            f.flush()
            os.fsync(f.fileno())
        assert path.read_bytes() == b"".join(data)
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    real, refused = os.write, []

    def aligned_otherwise(handle, data):
        if not refused:
            refused.append(len(data))
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(handle, data)

    monkeypatch.setattr(train.os, "write", aligned_otherwise)
    train.save_checkpoint(tmp_path / "first.pt", a_state(4, size=1 << 23))
    assert refused == [size] and step_in(tmp_path / "first.pt") == 4
    monkeypatch.setattr(train.os, "write", lambda handle, data: len(data) // 2)
    with pytest.raises(train.RunError, match="No space left on device"):
        train.save_checkpoint(tmp_path / "last.pt", a_state())
    assert not (tmp_path / "last.pt").exists()


def test_where_the_page_cache_cannot_be_passed_a_plain_file_serves(tmp_path, monkeypatch):
    monkeypatch.delattr(train.os, "O_DIRECT", raising=False)
    with train.open_direct(tmp_path / "file") as f:
        assert not isinstance(f, train.DirectFile)
    train.save_checkpoint(tmp_path / "last.pt", a_state(7))
    assert step_in(tmp_path / "last.pt") == 7


def test_macos_empties_the_drive_s_own_cache(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    calls = []
    monkeypatch.setattr(train.sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda handle, call: calls.append(call))
    monkeypatch.setattr(train.os, "fsync", lambda handle: calls.append("fsync"))
    with train.atomic_write(tmp_path / "file"):
        pass
    assert calls == [51, "fsync"]  # the file, then its folder

    def unknown(handle, call):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "fcntl", unknown)
    train.sync_file(0)
    assert calls[2:] == ["fsync"]


def test_windows_opens_no_folder(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(train.os, "open", lambda *args: opened.append(args) or 1 / 0)
    monkeypatch.setattr(train, "WINDOWS", True)
    train.sync_folder(tmp_path)
    assert not opened


def test_windows_waits_for_a_file_that_another_program_has_open(tmp_path, monkeypatch):
    attempts, slept, real = [], [], os.replace

    def held(source, target):
        attempts.append(target)
        if len(attempts) < 3:
            raise PermissionError(13, "Access is denied")
        real(source, target)

    (tmp_path / "a").write_text("new")
    monkeypatch.setattr(train.os, "replace", held)
    monkeypatch.setattr(train.time, "sleep", slept.append)
    with pytest.raises(PermissionError):
        train.replace(tmp_path / "a", tmp_path / "b")  # elsewhere it means what it says
    monkeypatch.setattr(train, "WINDOWS", True)
    train.replace(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "new" and len(slept) == 1


def test_windows_locks_by_its_own_call(tmp_path, monkeypatch):
    import types

    calls = []
    msvcrt = types.SimpleNamespace(
        LK_NBLCK=3, locking=lambda fd, mode, size: calls.append((os.lseek(fd, 0, 1), mode, size))
    )
    monkeypatch.setitem(sys.modules, "msvcrt", msvcrt)
    monkeypatch.setattr(train, "WINDOWS", True)
    with train.RunDirectory(tmp_path).lock():
        assert (tmp_path / "lock").read_text() == str(os.getpid())  # the text is not what is locked
    assert calls == [(1 << 30, 3, 1)]

    def taken(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    msvcrt.locking = taken
    with pytest.raises(train.UsageError, match="is in use by another run"), train.RunDirectory(tmp_path).lock():
        pass


def test_a_file_system_without_links_keeps_the_previous_checkpoint_too(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(train.os, "link", no_links)
    writer = make_writer(tmp_path)
    for step in (1, 2, 3):
        writer.save(a_state(step), best=None)
    writer.wait()
    assert (step_in(writer.run_dir.last), step_in(writer.run_dir.previous)) == (3, 2)


def test_stop_signals_are_those_that_the_system_has():
    assert {signal.SIGINT, signal.SIGTERM} <= set(train.STOP_SIGNALS)
    assert hasattr(signal, "SIGBREAK") == (len(train.STOP_SIGNALS) == 3)


def test_a_spawned_process_can_train(tmp_path):
    """As macOS and Windows start processes: the module is imported anew there, with no side effects."""
    code = f"""
import multiprocessing, sys
sys.path.insert(0, {str(ROOT)!r})
import train
if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=train.main, args=({tiny_flags(tmp_path / "out")!r},))
    process.start()
    process.join()
    raise SystemExit(process.exitcode)
"""
    (tmp_path / "start.py").write_text(code)
    subprocess.run([sys.executable, str(tmp_path / "start.py")], check=True, capture_output=True)
    assert len(rows_of(tmp_path / "out")) == 6


# ---- memory, determinism, flags ----


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.96 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_a_full_memory_is_one_sentence_that_names_the_flag(tmp_path, monkeypatch, capsys, error):
    def full(_):
        raise error

    monkeypatch.setattr(train.Trainer, "train_step", full)
    assert train.main(tiny_flags(tmp_path / "out")) == 1
    err = capsys.readouterr().err
    assert err == "train.py: the memory is full: lower --batch_size or --seq_len, or add --grad_checkpoint\n"
    assert json.loads((tmp_path / "out" / "run.json").read_text())["ended"].startswith("failed: ")


def test_the_same_seed_gives_the_same_rows(tiny, tmp_path):
    runs = [tmp_path / name for name in ("a", "b")]
    for out in runs:
        train.train(tiny(out_dir=str(out), dropout=0.2))
    assert without_times(rows_of(runs[0])) == without_times(rows_of(runs[1]))
    assert weights_equal(*runs)
    train.train(tiny(out_dir=str(tmp_path / "c"), dropout=0.2, seed=7))
    assert rows_of(tmp_path / "c")[0]["loss"] != rows_of(runs[0])[0]["loss"]


def test_deterministic_asks_torch_for_it(tiny, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seen, real = [], train.Trainer.train_step

    def train_step(trainer):
        seen.append((torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
        real(trainer)

    monkeypatch.setattr(train.Trainer, "train_step", train_step)
    train.train(tiny(steps=1, deterministic=True))
    train.train(tiny(steps=1, overwrite=True))
    assert seen == [(True, ":4096:8"), (False, ":4096:8")]


WORDS = [f"--{name}" for name in train.FIELDS] + ["--no-compile", "-h2", "--", "-", "=", "--lr=", "--steps=-0"]
VALUES = [
    "0",
    "-1",
    "1e400",
    "nan",
    "inf",
    "",
    " ",
    "auto",
    "demo",
    "9" * 400,
    "0x10",
    "\0",
    "\ud800",
    "é",
    "{}",
    "../..",
    "*",
]


@example(argv=["--out_dir", "\0"])
@example(argv=["--n_embd", "9" * 400])
@settings(max_examples=200, deadline=None)
@given(argv=st.lists(st.sampled_from(WORDS) | st.sampled_from(VALUES) | st.text(max_size=5), max_size=8))
def test_random_flags_give_no_traceback(argv):
    """A configuration, or exit code 2 with a sentence for each problem; nothing else."""
    if any(word in ("-h", "--help") for word in argv):
        return
    try:
        config = train.config_from_flags(argv)
    except (train.UsageError, train.RunError) as e:
        assert str(e).strip() and "Traceback" not in str(e)
    else:
        config.validate()
