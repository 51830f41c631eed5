"""The progress bar: its figures, and one bar for each epoch."""

from __future__ import annotations

import io

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tqdm import tqdm

from support.bar import StepBar

ROW = {"step": 3, "loss": 2.5, "avg_loss": 3.25, "lr": 1.5e-4, "val_loss": ""}


@pytest.fixture
def drawn():
    """A bar of 50 steps that is drawn, to nowhere."""
    bar = StepBar(50, done=0, epoch_length=0.0, enabled=True)
    bar.bar = tqdm(total=50, file=io.StringIO(), mininterval=0)
    yield bar
    bar.close()


def test_the_bar_shows_loss_average_rate_and_speed(drawn):
    for _ in range(3):
        drawn.update()
    drawn.show(ROW, tokens_per_step=64)
    figures, speed = drawn.bar.postfix.removesuffix(" tok/s").rsplit(", ", 1)
    assert figures == "loss 2.500, avg 3.250, lr 1.5e-04"
    assert float(speed) == pytest.approx(drawn.bar.format_dict["rate"] * 64, rel=0.5)
    assert drawn.bar.n == 3


def test_a_val_loss_stays_until_the_next_one(drawn):
    drawn.show(ROW, 64)
    assert "val" not in drawn.bar.postfix
    drawn.show(ROW | {"val_loss": 4.0}, 64)
    drawn.show(ROW, 64)
    assert drawn.bar.postfix.endswith("tok/s, val 4.000")
    drawn.show(ROW | {"val_loss": 3.5}, 64)
    assert drawn.bar.postfix.endswith("tok/s, val 3.500")


def test_a_run_by_steps_has_no_epochs():
    bar = StepBar(50, done=0, epoch_length=0.0, enabled=True)
    assert not any(bar.ends_epoch(step) for step in range(51))


@pytest.mark.parametrize(
    ("done", "epoch_length", "shown", "total", "name"),
    [
        (20, 0.0, 20, 50, None),
        (0, 20.0, 0, 20, "epoch 1/3"),
        (25, 20.0, 5, 20, "epoch 2/3"),
        (20, 20.0, 0, 20, "epoch 2/3"),
        (50, 20.0, 10, 10, "epoch 3/3"),
    ],
)
def test_a_resumed_run_s_bar_begins_where_the_run_is(monkeypatch, done, epoch_length, shown, total, name):
    asked = {}
    monkeypatch.setattr("support.bar.tqdm", lambda **options: asked.update(options))
    StepBar(50, done, epoch_length, enabled=True)
    assert (asked["initial"], asked["total"], asked.get("desc")) == (shown, total, name)


@given(st.integers(1, 100), st.integers(1, 100), st.integers(1, 12))
@example(steps=66, batches=7, batches_per_step=3)
def test_every_step_is_in_one_epoch(steps, batches, batches_per_step):
    """Even where an epoch's length isn't whole, and rounding makes it a trace longer than it is."""
    epoch_length = max(batches, batches_per_step) / batches_per_step
    bar = StepBar(steps, done=0, epoch_length=epoch_length, enabled=False)
    ends = [step for step in range(1, steps + 1) if bar.ends_epoch(step)]
    assert ends[-1] == steps
    assert len(ends) == bar.epoch_of(steps)
    first = 1
    for epoch, end in enumerate(ends, 1):
        assert (bar.first_step(epoch), bar.last_step(epoch)) == (first, end)
        assert {bar.epoch_of(step) for step in range(first, end + 1)} == {epoch}
        first = end + 1
