"""Checkpoints: what is in them, damage, checksums, and what may differ where a run goes on."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import zipfile

import pytest
import torch
from checkpoint_kit import (  # noqa: F401  (fixtures)
    SETTINGS,
    assert_same_run,
    finished_fixture,
    no_space,
    out_fixture,
)
from conftest import TINY, log_of, tiny_flags
from hypothesis import example, given, settings
from hypothesis import strategies as st

import train
from support import checkpoint, machine, rundir, text
from support.checkpoint import load_checkpoint, save_checkpoint
from support.cli import DamagedError, RunError, UsageError
from support.rundir import RunDirectory
from support.tokenizer import Tokenizer

# ---- what is in it ----


def test_a_checkpoint_holds_plain_data_and_gpt2_names(finished):
    last = torch.load(finished / "checkpoints" / "last.pt", weights_only=True)
    parts = {"model", "optimizer", "scheduler", "scaler", "batcher", "rng", "losses", "step", "progress", "tokenizer"}
    assert parts <= last.keys()
    assert last["scaler"] is None
    assert {"transformer.wte.weight", "transformer.h.0.attn.c_attn.weight", "lm_head.weight"} <= last["model"].keys()
    assert last["config"]["steps"] == 30
    assert last["config"]["warmup_steps"] is None  # as given, not as filled in


def test_a_checkpoint_of_a_compiled_model_has_the_same_names(tiny, tmp_path, monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: real(model, backend="eager"))
    train.train(tiny(**{**SETTINGS, "steps": 2}, compile=True))
    last = load_checkpoint(tmp_path / "out" / "checkpoints" / "last.pt")
    model = train.GPT(train.GPTConfig(**last["model_config"]))
    assert last["model"].keys() == model.state_dict().keys()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_size_that_the_log_tells_is_that_of_weights_and_averages(tiny, make_trainer, optimizer):
    trainer = make_trainer(tiny(**SETTINGS, optimizer=optimizer, lr=1e-3))
    trainer.train_step()
    saved = [p.numel() for p in trainer.model.parameters()]
    for averages in trainer.optimizer.state_dict()["state"].values():
        for name, average in averages.items():
            if name != "step":
                saved.append(average.numel())
    assert machine.saved_bytes(trainer.model, optimizer) == 4 * sum(saved)


# ---- writing ----


def test_a_checkpoint_that_cannot_be_written_is_one_sentence_and_keeps_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(RunError, match=r"No space left on device\): the one before it is intact"):
            save_checkpoint(path, {"step": 2})
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="posix_fadvise is of Linux")
def test_once_a_checkpoint_is_on_the_disk_its_bytes_are_dropped_from_the_page_cache(tmp_path, monkeypatch):
    """Before that they couldn't be: the kernel keeps what it has still to write."""
    path = tmp_path / "last.pt"
    calls = []
    real_fsync = os.fsync

    def fsync(handle):
        real_fsync(handle)
        calls.append(("fsync", os.fstat(handle).st_ino))

    def fadvise(handle, offset, length, advice):
        calls.append(("fadvise", os.fstat(handle).st_ino))
        assert (offset, length, advice) == (0, 0, os.POSIX_FADV_DONTNEED)  # of the whole file
        assert not path.exists()

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "posix_fadvise", fadvise)
    save_checkpoint(path, {"step": 1})
    file = path.stat().st_ino
    folder = tmp_path.stat().st_ino
    assert calls == [("fsync", file), ("fadvise", file), ("fsync", folder)]


# ---- damage ----


def flip(data: bytes, place: int, bit: int) -> bytes:
    return data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :]


DAMAGE = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "flipped": lambda data: flip(data, len(data) // 3, bit=2),
    "other": lambda data: b"something else\n" * 1000,
    "zeros": lambda data: bytes(len(data)),
}


def damage(path, kind: str) -> None:
    path.write_bytes(DAMAGE[kind](path.read_bytes()))


@pytest.mark.parametrize("kind", DAMAGE)
def test_auto_goes_on_from_the_checkpoint_before_a_damaged_one(kind, out, finished):
    last = out / "checkpoints" / "last.pt"
    damage(last, kind)
    damaged = last.read_bytes()
    assert train.main(tiny_flags(out, **SETTINGS, resume="auto")) == 0
    assert "Resumed: step 20" in log_of(out)
    assert f"{last} is damaged or isn't a checkpoint" in log_of(out)
    assert_same_run(out, finished)
    assert (out / "checkpoints" / "aside.pt").read_bytes() == damaged  # kept, for whoever wants to look
    assert not list(out.rglob("*.part"))


def test_auto_goes_on_from_the_checkpoint_before_a_missing_one(out, finished):
    (out / "checkpoints" / "last.pt").unlink()
    assert train.main(tiny_flags(out, **SETTINGS, resume="auto")) == 0
    assert "Resumed: step 20" in log_of(out)
    assert_same_run(out, finished)


def test_a_folder_in_the_place_of_last_pt_is_fallen_back_from(out):
    last = out / "checkpoints" / "last.pt"
    last.unlink()
    last.mkdir()
    assert RunDirectory(out).find_checkpoint("auto")[0].name == "previous.pt"


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_that_is_named_is_an_error(kind, out, capsys):
    last = out / "checkpoints" / "last.pt"
    damage(last, kind)
    rows = (out / "logs" / "train_metrics.csv").read_bytes()
    assert train.main(["--resume", str(last), "--steps", "40"]) == 1
    err = capsys.readouterr().err
    assert "resume from the previous.pt beside it, sample from its best.pt, or start anew with --overwrite" in err
    assert err.count("\n") == 1
    assert (out / "logs" / "train_metrics.csv").read_bytes() == rows


def test_the_checkpoint_before_a_damaged_one_can_be_named(out, finished):
    damage(out / "checkpoints" / "last.pt", "truncated")
    assert train.main(["--resume", str(out / "checkpoints" / "previous.pt")]) == 0
    assert_same_run(out, finished)


def test_two_damaged_checkpoints_are_an_error(out, capsys):
    damage(out / "checkpoints" / "last.pt", "empty")
    damage(out / "checkpoints" / "previous.pt", "empty")
    assert train.main(tiny_flags(out, **SETTINGS, resume="auto")) == 1
    assert "last.pt is damaged" in capsys.readouterr().err


class Evil:
    """Unpickled as usual, it would make a folder."""

    def __reduce__(self):
        return (os.mkdir, ("evil",))


@pytest.mark.parametrize("content", ["truncated", "empty", "flipped", "other", "zeros", "code", "foreign", "newer"])
def test_a_bad_checkpoint_is_one_sentence(finished, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = shutil.copy(finished / "checkpoints" / "last.pt", tmp_path)
    if content == "code":
        torch.save(Evil(), path)
    elif content == "foreign":
        torch.save({"model": {}, "iter_num": 3}, path)
    elif content == "newer":
        torch.save(load_checkpoint(path) | {"format": 99}, path)
    else:
        damage(tmp_path / "last.pt", content)
    with pytest.raises(RunError) as caught:
        load_checkpoint(path)
    assert "last.pt" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "evil").exists()  # code in a pickle is never run


def test_a_newer_checkpoint_is_no_damage(out, capsys):
    last = out / "checkpoints" / "last.pt"
    save_checkpoint(last, load_checkpoint(last) | {"format": 99})
    assert train.main(tiny_flags(out, **SETTINGS, resume="auto")) == 1
    assert "is of a newer version of train.py: update this one" in capsys.readouterr().err


def test_a_checkpoint_without_permission_is_not_called_damaged(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(zipfile, "ZipFile", refuse)
    with pytest.raises(RunError, match=r"can't be read \(Permission denied\): check its permissions"):
        load_checkpoint(tmp_path / "last.pt")


@pytest.mark.parametrize("part", ["losses", "optimizer", "batcher"])
def test_a_checkpoint_that_lacks_a_part_is_one_sentence(out, capsys, part):
    last = out / "checkpoints" / "last.pt"
    save_checkpoint(last, load_checkpoint(last) | {part: {}})
    assert train.main(["--resume", str(last), "--steps", "40"]) == 1
    assert "lacks what a run needs" in capsys.readouterr().err


@pytest.mark.parametrize(
    "part", [{"optimizer": None}, {"made_on": [1]}, {"config": {"input_file": 7}}, {"rng": 3}, {"progress": [1]}]
)
def test_a_checkpoint_of_wrong_types_is_a_sentence(part, out, capsys):
    last = out / "checkpoints" / "last.pt"
    state = load_checkpoint(last)
    for name, value in part.items():
        state[name] = state[name] | value if name == "config" else value
    save_checkpoint(last, state)
    assert train.main(["--resume", str(last), "--steps", "40"]) in (1, 2)
    err = capsys.readouterr().err
    assert err.startswith("train.py: ")
    assert "Traceback" not in err


# ---- checksums ----


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory):
    """(bytes, content) of a checkpoint."""
    path = tmp_path_factory.mktemp("small") / "last.pt"
    content = {
        "format": checkpoint.FORMAT,
        "model": {"w": torch.arange(50.0)},
        "config": {**checkpoint.EARLIER_SETTINGS, "steps": 3},
        "step": 2,
    }
    save_checkpoint(path, content)
    return path.read_bytes(), content


@settings(max_examples=60, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), lazy=st.booleans())
def test_a_flipped_bit_is_noticed_or_without_effect(tmp_path_factory, small_checkpoint, place, bit, lazy):
    data, content = small_checkpoint
    path = tmp_path_factory.mktemp("flip") / "last.pt"
    path.write_bytes(flip(data, int(place * len(data)), bit))
    with contextlib.suppress(RunError):
        assert str(load_checkpoint(path, lazy)) == str(content)


def test_a_tensor_that_became_a_folder_is_noticed(tmp_path, small_checkpoint):
    """One bit of the archive's directory, outside of what the checksums cover."""
    data, _ = small_checkpoint
    place = data.index(b"archive/data/0", data.index(b"PK\x01\x02")) - 8
    (tmp_path / "last.pt").write_bytes(flip(data, place, bit=4))
    with pytest.raises(DamagedError, match="is damaged"):
        load_checkpoint(tmp_path / "last.pt")


# An example is a file's bytes.
@example(data=b"")
@example(data=b"step,epoch\n1,\0\n")
@example(data=b"[]")
@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=300))
def test_random_bytes_in_any_file_of_a_run_give_no_traceback(tmp_path_factory, small_checkpoint, data):
    root = tmp_path_factory.mktemp("bytes")
    run_dir = RunDirectory(root)
    run_dir.prepare(overwrite=False, resumed=None)
    for path in (run_dir.last, run_dir.metrics, run_dir.samples, run_dir.record):
        path.write_bytes(data)
    with pytest.raises(RunError):
        run_dir.find_checkpoint("auto")
    run_dir.last.write_bytes(small_checkpoint[0][: len(data) * 5] + data)
    with pytest.raises(RunError):
        run_dir.find_checkpoint("auto", lazy=True)
    assert rundir.rewind_rows(run_dir.metrics, train.CSV_FIELDS, 5) <= 5
    assert rundir.rewind_samples(run_dir.samples, train.RULE, 5) <= 5
    assert isinstance(run_dir.read_record(), dict)
    (root / "ids.npy").write_bytes(data)
    tokenizer = Tokenizer("x", 300, lambda any_text: list(any_text.encode()), None)
    encoded = functools.partial(text.encode_pieces, ["text"], tokenizer, 4)
    assert text.cached_tokens(root / "ids.npy", encoded, 300)[0].tolist() == list(b"text")
    (root / "text").write_bytes(data)
    with contextlib.suppress(UsageError):
        assert text.load_corpus(str(root / "text"), tokenizer, str(root)).text.strip()


# ---- other settings, another machine ----


def test_what_changed_since_the_checkpoint_is_said(out):
    last = out / "checkpoints" / "last.pt"
    train.main(["--resume", str(last), "--steps", "40", "--lr", "1e-3", "--log_every", "5"])
    log = log_of(out)
    assert "Changed since the checkpoint: log_every 1 -> 5, lr 0.0003 -> 0.001, steps 30 -> 40" in log
    before = rate_of_step(30, steps=30, lr=3e-4)  # of its last step, which the checkpoint still has
    after = rate_of_step(31, steps=40, lr=1e-3)
    assert f"Learning rate of step 31: {after:.6e} (it was to be {before:.6e})" in log


def rate_of_step(step: int, **changes) -> float:
    config = train.TrainConfig(**{**TINY, **changes}).completed(batches_per_pass=1, batches_per_step=1)
    group = {"params": [torch.nn.Parameter(torch.zeros(1))], "rate": "lr"}
    optimizer = torch.optim.AdamW([group], lr=config.lr)
    train.build_scheduler(optimizer, config, step - 1)
    return optimizer.param_groups[0]["lr"]


def test_where_nothing_changed_nothing_is_said(out):
    train.main(["--resume", str(out / "checkpoints" / "previous.pt")])
    log = log_of(out)
    assert "Resumed: step 20" in log
    for words in ("Changed since", "Learning rate of", "Not bit for bit"):
        assert words not in log


def test_another_machine_is_resumed_on_and_said(out):
    """A checkpoint of CUDA in fp16, as far as a CPU can tell."""
    last = out / "checkpoints" / "last.pt"
    state = load_checkpoint(last)
    state["scaler"] = torch.amp.GradScaler("cpu", init_scale=512.0).state_dict()
    state["made_on"] |= {"device": "cuda (NVIDIA H200)", "precision": "float16 autocast with loss scaling"}
    state["rng"][0]["cuda"] = torch.zeros(16, dtype=torch.uint8)
    save_checkpoint(last, state)
    assert train.main(["--resume", str(last), "--steps", "33"]) == 0
    log = log_of(out)
    assert "Not bit for bit the run that never stopped, since this differs: device cuda (NVIDIA H200) -> cpu" in log
    assert "precision float16 autocast with loss scaling -> fp32" in log


def test_a_loss_scaler_starts_anew_where_the_checkpoint_has_none(tiny, make_trainer, finished):
    trainer = make_trainer(tiny(**SETTINGS))
    trainer.runtime.scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    trainer.load_state_dict(load_checkpoint(finished / "checkpoints" / "previous.pt"))
    trainer.train_step()
    assert trainer.state_dict()["scaler"]["scale"] == 512.0


def test_updates_that_the_scaler_skips_are_counted_and_kept(tiny, make_trainer):
    trainer = make_trainer(tiny(**SETTINGS))
    trainer.runtime.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    trainer.train_step()
    assert trainer.progress.skipped == 0
    hook = trainer.model.lm_head.weight.register_hook(lambda grad: grad * float("inf"))
    trainer.train_step()
    hook.remove()
    trainer.train_step()
    assert trainer.progress.skipped == 1
    again = make_trainer(tiny(**SETTINGS))
    again.load_state_dict(trainer.state_dict())
    assert again.progress.skipped == 1
