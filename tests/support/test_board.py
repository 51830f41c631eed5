"""Figures and samples for TensorBoard and Trackio."""

from __future__ import annotations

import errno

import pytest
from conftest import log_of, rows_of

import train
from support import board
from support.cli import RunError, UsageError

SETTINGS = {"steps": 4, "num_prompts": 0, "target_loss": 0, "recall_places": 0}


def stop_at(step: int, monkeypatch) -> None:
    monkeypatch.setattr(train.Loop, "stop_asked", lambda loop: loop.progress.step == step)


# ---- TensorBoard ----


def board_of(out):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(out / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0}).Reload()


def figures(out, name: str) -> dict[int, float]:
    """The values of a figure by step."""
    return {event.step: event.value for event in board_of(out).Scalars(name)}


def board_steps(out) -> list[int]:
    return sorted(figures(out, "loss"))


def test_tensorboard_has_the_rows_and_the_samples(tiny, tmp_path):
    out = tmp_path / "out"
    changes = {"steps": 9, "num_prompts": 1, "sample_every": 4, "prompt": "TILDA:\n", "tensorboard": True}
    train.train(tiny(**{**SETTINGS, **changes}))
    for name in ("loss", "avg_loss", "lr", "grad_norm", "tok_per_s"):
        expected = {}
        for row in rows_of(out):
            expected[int(row["step"])] = pytest.approx(float(row[name]), rel=1e-5)
        assert figures(out, name) == expected
    texts = board_of(out).Tensors("sample 0/text_summary")
    assert [event.step for event in texts] == [4, 8, 9]
    assert texts[0].tensor_proto.string_val[0].decode().startswith("    TILDA:\n    ")


def test_tensorboard_goes_on_after_a_resume_and_is_cleared_by_overwrite(tiny, tmp_path, monkeypatch):
    out = tmp_path / "out"
    changes = {**SETTINGS, "steps": 9, "save_every": 3, "tensorboard": True}
    with monkeypatch.context() as patch:
        stop_at(7, patch)
        train.train(tiny(**changes))
    (out / "checkpoints" / "last.pt").unlink()  # so that it goes back behind what was written
    train.train(tiny(**changes, resume="auto"))
    assert board_steps(out) == list(range(1, 10))
    train.train(tiny(**{**changes, "steps": 2}, overwrite=True))
    assert board_steps(out) == [1, 2]


def test_a_fault_of_tensorboard_ends_no_run(tiny, tmp_path, monkeypatch):
    from torch.utils import tensorboard

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensorboard.SummaryWriter, "add_scalar", full)
    assert train.train(tiny(**SETTINGS, tensorboard=True))["ended"] == "steps done"
    assert log_of(tmp_path / "out").count("tensorboard can't be written to") == 1


def test_a_tensorboard_that_does_not_work_is_one_sentence(tiny, monkeypatch):
    from torch.utils import tensorboard

    def broken(*_, **__):
        raise TypeError("Descriptors cannot be created directly")

    monkeypatch.setattr(tensorboard, "SummaryWriter", broken)
    with pytest.raises(RunError, match=r"tensorboard doesn't work here \(.*: leave --tensorboard out"):
        train.train(tiny(**SETTINGS, tensorboard=True))


def test_figures_reach_the_disk_before_the_checkpoint(tiny, tmp_path, monkeypatch):
    """So that a killed run, which goes on from there, has no gap."""
    seen = []
    real = train.CheckpointWriter.save

    def save(writer, *args):
        seen.append(board_steps(tmp_path / "out"))
        real(writer, *args)

    monkeypatch.setattr(train.CheckpointWriter, "save", save)
    train.train(tiny(**{**SETTINGS, "steps": 6, "save_every": 3}, tensorboard=True))
    assert seen == [[1, 2, 3], [1, 2, 3, 4, 5, 6]]


# ---- Trackio ----


def trackio_of(out) -> list[dict]:
    """What its data base has of a run."""
    storage = pytest.importorskip("trackio.sqlite_storage")
    return storage.SQLiteStorage.get_logs("train-gpt2", str(out))


def test_a_run_with_both_shows_the_same_figures_in_both(tiny, tmp_path):
    pytest.importorskip("trackio")
    out = tmp_path / "out"
    changes = {"num_prompts": 1, "sample_every": 2, "prompt": "TILDA:\n", "tensorboard": True, "trackio": True}
    train.train(tiny(**{**SETTINGS, **changes}))
    rows = trackio_of(out)
    for name in ("loss", "avg_loss", "lr", "grad_norm", "tok_per_s"):
        of_trackio = {row["step"]: pytest.approx(row[name], rel=1e-5) for row in rows if name in row}
        assert figures(out, name) == of_trackio
    samples = {row["step"]: row["sample 0"]["_value"] for row in rows if "sample 0" in row}
    assert list(samples) == [2, 4]
    assert samples[2].startswith("    TILDA:\n    ")


def test_trackio_goes_on_in_the_same_run(tiny, tmp_path):
    pytest.importorskip("trackio")
    train.train(tiny(**SETTINGS, trackio=True))
    train.train(tiny(**SETTINGS | {"steps": 6}, trackio=True, resume="auto"))
    assert [row["step"] for row in trackio_of(tmp_path / "out")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", ["tensorboard", "trackio"])
def test_a_board_whose_package_is_not_there_is_one_sentence(tiny, monkeypatch, name):
    monkeypatch.setattr(board.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(UsageError, match=rf"{name} isn't installed: pip install {name}, or leave --{name} out"):
        tiny(**SETTINGS, **{name: True}).validate()
