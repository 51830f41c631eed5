"""One process, or several under torchrun: where they meet, and the Runtime that each of them gets. What only several
need is loaded only for them."""

from __future__ import annotations

import os

from support.machine import Alone, Runtime


def meet() -> Alone:
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return Alone()
    from support.meeting import Meeting

    return Meeting()


def join(meeting: Alone, alone: Runtime, settings) -> Runtime:
    """The Runtime of a process among the others of the meeting. `alone`: what it would have by itself."""
    if meeting.world_size == 1:
        return alone
    if settings.parallel == "ddp":
        from support.processes import Processes

        return Processes(alone, meeting, settings.wait_minutes)
    from support.sharding import Sharded

    return Sharded(alone, meeting, settings.wait_minutes)
