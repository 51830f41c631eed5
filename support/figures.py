"""What the losses of a run say: is training broken, where do others stop, which weights are the best? `trainer` is
train.py's Trainer."""

from __future__ import annotations

import math

from support.cli import RunError


def cell(value: float | int | str) -> str:
    """A figure as the CSV has it."""
    if isinstance(value, float):
        return f"{value:.10g}"
    return str(value)


def check_finite(trainer, avg_loss: float) -> None:
    """Raises RunError where training broke. With a loss scaler an infinite gradient only skipped the update."""
    loss = float(trainer.progress.loss)
    grad_norm = float(trainer.progress.grad_norm)
    broken = not (math.isfinite(loss) and math.isfinite(avg_loss))
    if not trainer.runtime.scaler and not math.isfinite(grad_norm):
        broken = True
    if broken:
        raise RunError(
            f"the loss is {loss}, avg_loss {avg_loss} and the gradient norm {grad_norm} at step"
            f" {trainer.progress.step}: resume from the last checkpoint, or start anew, with a lower --lr or --amp off"
        )


def score(trainer) -> tuple[bool, float]:
    """What best.pt is chosen by: lower is better. (False, loss), of a full pass or of held-out text, is lower than any
    (True, loss), of the batches seen so far."""
    avg_loss = trainer.avg_loss()
    progress = trainer.progress
    if trainer.config.best_by == "train":
        return not trainer.seen_all(), avg_loss
    if not progress.val_step:
        return True, avg_loss
    if progress.val_step == progress.step:
        return False, progress.val_loss
    return True, math.inf  # nothing is known of these weights


RECENT = 100  # steps: others stop at the mean of so many


def note_losses(trainer, losses: list[float]) -> None:
    """Notes the first step, and the tokens, at which one step's loss, and the mean of the last hundred, were under the
    target: that is where others stop. `losses` are of the steps since the last time."""
    progress = trainer.progress
    target = trainer.config.target_loss
    if progress.first_under.get("target") != target:
        progress.first_under = {"target": target}
    step = progress.step - len(losses)
    tokens = trainer.batcher.tokens_taken() - len(losses) * trainer.tokens_per_step
    for loss in losses:
        step += 1
        tokens += trainer.tokens_per_step
        progress.recent = [*progress.recent[1 - RECENT :], loss]
        if loss < target:
            progress.first_under.setdefault("loss", {"step": step, "tokens": tokens})
        if len(progress.recent) == RECENT and sum(progress.recent) / RECENT < target:
            progress.first_under.setdefault("mean_of_100", {"step": step, "tokens": tokens})
