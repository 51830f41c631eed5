"""What the losses of a run say: where others stop."""

from __future__ import annotations

from support import figures


def test_where_others_stop_is_noted_once(make_trainer, quick):
    """The first step whose loss, and the first at which the mean of the last hundred, is under the target."""
    trainer = make_trainer(quick(target_loss=1.0))
    step_tokens = trainer.tokens_per_step
    losses = [2.0] * 50 + [0.5] * 100 + [3.0] + [0.5] * 10
    for loss in losses:
        trainer.progress.step += 1
        trainer.batcher.position += trainer.batches_per_step
        figures.note_losses(trainer, [loss])
    first = trainer.progress.first_under
    assert first["loss"] == {"step": 51, "tokens": 51 * step_tokens}
    # the mean of steps k-99 .. k is under 1 from the step on at which less than a third of them are at 2
    assert first["mean_of_100"] == {"step": 117, "tokens": 117 * step_tokens}
    assert len(trainer.progress.recent) == 100


def test_losses_read_late_are_noted_under_their_own_steps(make_trainer, quick):
    trainer = make_trainer(quick(target_loss=1.0))
    trainer.progress.step = 7
    trainer.batcher.position = 7 * trainer.batches_per_step
    figures.note_losses(trainer, [3.0, 0.9, 0.8])
    assert trainer.progress.first_under["loss"] == {"step": 6, "tokens": 6 * trainer.tokens_per_step}
