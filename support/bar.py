"""The progress bar of training: one over all steps or, of a run by epochs, one over each epoch."""

from __future__ import annotations

import math
import sys

from tqdm import tqdm


def no_bar(wanted: bool = True) -> bool | None:
    """tqdm's `disable`: None draws a bar only where stderr is a terminal, but a closed stderr it can't see."""
    return None if wanted and sys.stderr else True


class StepBar:
    """A tqdm over steps. `epoch_length`, in steps, need not be whole; 0 means that the run has no epochs."""

    def __init__(self, steps: int, done: int, epoch_length: float, enabled: bool):
        self.steps = steps
        self.epoch_length = epoch_length
        self.val_loss: float | None = None  # the latest
        disable = no_bar(enabled)
        if not epoch_length:
            self.bar = tqdm(total=steps, initial=done, unit="step", disable=disable)
            return
        epoch = self.epoch_of(min(done + 1, steps))
        before = self.first_step(epoch) - 1
        total = self.last_step(epoch) - before
        self.bar = tqdm(total=total, initial=done - before, unit="step", desc=self.name(epoch), disable=disable)

    def epoch_of(self, step: int) -> int:
        """Which epoch a step is in, counted from 1."""
        return int(round((step - 1) / self.epoch_length, 6)) + 1

    def steps_of(self, epochs: int) -> int:
        """Steps in so many epochs. Rounded, since 27 epochs of 7/3 steps are 63 and not a trace more."""
        return math.ceil(round(epochs * self.epoch_length, 6))

    def first_step(self, epoch: int) -> int:
        return self.steps_of(epoch - 1) + 1

    def last_step(self, epoch: int) -> int:
        return min(self.steps, self.steps_of(epoch))

    def name(self, epoch: int) -> str:
        return f"epoch {epoch}/{self.epoch_of(self.steps)}"

    def ends_epoch(self, step: int) -> bool:
        return bool(self.epoch_length) and step > 0 and step == self.last_step(self.epoch_of(step))

    def update(self) -> None:
        self.bar.update()

    def show(self, row: dict, tokens_per_step: int) -> None:
        rate = (self.bar.format_dict["rate"] or 0) * tokens_per_step
        figures = f"loss {row['loss']:.3f}, avg {row['avg_loss']:.3f}, lr {row['lr']:.1e}, {rate:.0f} tok/s"
        if row["val_loss"] != "":
            self.val_loss = row["val_loss"]
        if self.val_loss is not None:
            figures += f", val {self.val_loss:.3f}"
        self.bar.set_postfix_str(figures, refresh=False)

    def end_epoch(self, progress, seconds: float) -> str:
        """A log line with the epoch's mean loss, then the next one's bar in the place of this one's. `progress` is
        train.py's Progress, `seconds` the run's time so far."""
        name = self.name(self.epoch_of(progress.step)).capitalize()
        loss = float(progress.epoch_loss) / progress.epoch_steps
        line = f"{name}: average loss {loss:.4f}, {seconds - progress.epoch_start:.1f} s"
        progress.epoch_loss = 0.0
        progress.epoch_steps = 0
        progress.epoch_start = seconds
        if progress.step < self.steps:
            epoch = self.epoch_of(progress.step + 1)
            self.bar.reset(total=self.last_step(epoch) - self.first_step(epoch) + 1)
            self.bar.set_description(self.name(epoch), refresh=False)
        return line

    def close(self) -> None:
        self.bar.close()
