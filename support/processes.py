"""The Runtime of one of several processes, as torchrun starts them: what they compute and tell each other in a run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn as nn

from support.cli import RunError, UsageError, first_line
from support.kernels import updates_here
from support.machine import Runtime
from support.meeting import Meeting, differences
from support.watch import Watch

STEP = timedelta(minutes=10)  # that processes may be apart in a step; the watch looks whether they are there
PATIENT = timedelta(days=7)  # for what one process does while the others wait for it, such as tokenizing a long text


def dealt(parameters: Iterable, hands: int) -> list[list]:
    """Shares of about the same work: of each shape, each gets as many as the others, or one less."""
    by_shape = sorted(parameters, key=lambda p: tuple(p.shape))
    return [by_shape[hand::hands] for hand in range(hands)]


class Processes(Runtime):
    """One of several processes, each with a copy of the whole model (DistributedDataParallel).

    Tensors of a step travel by the device's own library. What the processes tell each other, and what one of them may
    keep the others waiting for, goes by a patient group of its own, over the CPU."""

    talk_is_free = False

    def __init__(self, alone: Runtime, meeting: Meeting, wait_minutes: float):
        super().__init__(alone.device, alone.amp_dtype, alone.scaler, alone.reason, meeting.rank, meeting.world_size)
        self.meeting = meeting
        self.watch = Watch(meeting, wait_minutes)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo",
            timeout=STEP + timedelta(minutes=wait_minutes),
            world_size=self.world_size,
            rank=self.rank,
            store=dist.PrefixStore("group", meeting.store),
        )
        self.patient = dist.new_group(backend="gloo", timeout=PATIENT)

    def first(self, value):
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.patient)
        return values[0]

    def any(self, value: int) -> int:
        largest = torch.tensor(float(value))
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.patient)
        return int(largest.item())

    def gather(self, value) -> list:
        if isinstance(value, torch.Tensor):
            values = [torch.empty_like(value) for _ in range(self.world_size)]
            dist.all_gather(values, value)
            return values
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.patient)
        return values

    def wait(self) -> None:
        dist.barrier(group=self.patient)

    def check_alike(self, values: dict) -> None:
        problems = differences(self.gather(values))
        if problems:
            raise UsageError(*problems)

    def wrap(self, model: nn.Module) -> nn.Module:
        """After its first step, DistributedDataParallel sorts the gradients anew into what travels together, and with
        three processes or more other sums round differently. So a first pass is made here, of one token, and a run that
        is resumed rounds as one that never stopped."""
        wrapped = nn.parallel.DistributedDataParallel(model.to(self.device))
        was_training = model.training
        model.eval()  # draws nothing from the random generators
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        _, loss = wrapped(token, token, keep_logits=False)
        loss.backward()
        model.zero_grad(set_to_none=True)
        model.train(was_training)
        return wrapped

    def muon_updates(self, directions: dict, shapes: dict, dtype: torch.dtype) -> Iterator[tuple]:
        """Each process makes the updates of its own share. One all-gather brings it the others'."""
        shares = dealt(directions, self.world_size)
        longest = max(sum(p.numel() for p in share) for share in shares)
        mine = torch.zeros(longest, dtype=dtype, device=self.device)
        start = 0
        own = {p: directions[p] for p in shares[self.rank]}
        for p, update in updates_here(own, shapes, dtype):
            mine[start : start + p.numel()] = update.flatten()
            start += p.numel()
        for share, updates in zip(shares, self.gather(mine), strict=True):
            sizes = [p.numel() for p in share]
            for p, update in zip(share, updates[: sum(sizes)].split(sizes), strict=True):
                yield p, update.view_as(p)

    # ---- how it ends ----

    @contextlib.contextmanager
    def watched(self, last_words: Callable[[str], None]) -> Iterator[None]:
        self.watch.last_words = last_words
        try:
            yield
        except RuntimeError as e:
            if self.watch.others_are_to_blame(e):
                raise RunError(self.watch.sentence()) from e
            raise

    def __exit__(self, kind, e, traceback) -> None:
        if e is None:
            with self.watched(lambda sentence: None):
                self.first("done")  # it may still write: when one process ends, torchrun gives the others half a minute
            self.watch.leave()
            dist.destroy_process_group()
            return
        others = self.watch.others_are_to_blame(e)
        self.meeting.takes_the_word()  # before the others know that this process ends
        told = isinstance(e, UsageError | RunError)
        self.watch.leave(first_line(e) if told else f"{type(e).__name__}: {first_line(e)}")
        if others:
            raise RunError(self.watch.sentence()) from e
