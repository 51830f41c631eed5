"""Is everybody there? Each of several processes watches another one, and ends with a sentence where it is gone."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from concurrent import futures

import torch.distributed as dist

from support.cli import is_out_of_memory
from support.files import WINDOWS, is_running
from support.meeting import ANSWER, Meeting, within

GRACE = 3.0  # seconds in which a process should end by itself when another one is gone
REMEDY = "go on with the same command and --resume auto"


class Watch:
    """A thread that shows the others that this process is alive, and looks whether the next one is: 0 looks at 1, 1 at
    2, and the last at 0. What is found stands in the store under the key `lost`, which all of them read. There a
    process that fails also writes why."""

    def __init__(self, meeting: Meeting, wait_minutes: float):
        self.meeting = meeting
        self.store = meeting.store.clone()  # a call of the other thread's would block this one's
        self.next = (meeting.rank + 1) % meeting.world_size
        self.wait_seconds = 60 * wait_minutes
        self.pause = min(1.0, self.wait_seconds / 10)
        self.count = 0  # of this process's signs
        self.sign = ""  # the next process's latest
        self.looked = time.monotonic()  # when this process looked last
        self.seen = self.looked  # and when it saw a new sign
        self.lost = ""  # what happened, in words
        self.found = threading.Event()  # something did
        self.ending = threading.Event()  # the program ends by itself
        self.last_words: Callable[[str], None] = lambda sentence: None
        self.thread = threading.Thread(target=self.run, name="watch", daemon=True)
        self.thread.start()

    def run(self) -> None:
        """What the thread does."""
        while not self.lost and not self.ending.wait(self.pause):
            self.lost = self.look()
        if self.lost:
            self.found.set()
            self.end()

    def look(self) -> str:
        """Shows that this process is alive. Returns what is lost, "" where nothing is."""
        try:
            lost, sign = within(self.wait_seconds, self.exchange_signs)
            if lost:
                return lost
            problem = self.problem(sign)
            return within(self.wait_seconds, self.tell, problem) if problem else ""
        except futures.TimeoutError:
            return f"doesn't answer: the first one, or its torchrun, {self.has_been_silent()}"
        except RuntimeError:  # the store ended with it
            return "has ended: the first one, or its torchrun"

    def exchange_signs(self) -> tuple[str, str]:
        """Says that this process is alive. Returns what is lost, and the next one's sign."""
        self.count += 1
        self.store.set(f"alive {self.meeting.rank}", f"{place()} {os.getpid()} {self.count}")
        return self.read("lost"), self.read(f"alive {self.next}")

    def read(self, key: str) -> str:
        return self.store.get(key).decode() if self.store.check([key]) else ""

    def problem(self, sign: str) -> str:
        """What is wrong with the next process, whose latest sign this is; "" where nothing is."""
        now = time.monotonic()
        was_stopped = now - self.looked > 10 * self.pause + 1  # this process itself, and maybe the others too
        if sign != self.sign or was_stopped:
            self.sign = sign
            self.seen = now
        self.looked = now
        if sign == "left":
            return ""
        if sign and was_killed(sign):
            return f"has ended: process {self.next} was killed"
        if now - self.seen > self.wait_seconds:
            return f"doesn't answer: process {self.next} {self.has_been_silent()}"
        return ""

    def has_been_silent(self) -> str:
        return f"has been silent for {self.wait_seconds / 60:g} minutes"

    def tell(self, problem: str) -> str:
        """Writes what happened for all to read. Returns what they read: whatever was written first."""
        return self.store.compare_set("lost", "", problem).decode()

    def sentence(self) -> str:
        what = self.lost or "has ended or can't be reached"
        return f"another process of this run {what}; {REMEDY}"

    def others_are_to_blame(self, e: BaseException) -> bool:
        """Did this process fail only because another one did? The connection breaks first, and the reason comes after:
        so this waits for it a little."""
        if not isinstance(e, RuntimeError) or is_out_of_memory(e):
            return False
        broken = isinstance(e, dist.DistError) or "gloo" in str(e)
        if self.found.wait(GRACE) or broken:
            self.ending.set()
            return True
        return False

    def end(self) -> None:
        """Ends this process, unless it does so by itself: it may wait forever for the one that is gone."""
        if self.ending.wait(GRACE):
            return
        self.meeting.say("train.py", self.sentence())
        last_words = threading.Thread(target=self.last_words, args=(self.sentence(),), daemon=True)
        last_words.start()
        last_words.join(GRACE)  # the disk may be what hangs
        os._exit(1)

    def leave(self, why: str = "") -> None:
        """This process ends: as it should or, with `why`, for a reason that the others should know."""
        self.ending.set()
        self.thread.join()
        with contextlib.suppress(RuntimeError, futures.TimeoutError):
            self.store.set(f"alive {self.meeting.rank}", "left")
            if why:
                within(ANSWER, self.tell, f"has ended: process {self.meeting.rank}: {why}")


def place() -> str:
    """Which of the machines is this? torchrun counts them."""
    return os.environ.get("GROUP_RANK", "?")


def was_killed(sign: str) -> bool:
    """Is the process that gave this sign gone? Only on its own machine that can be asked, and on Windows not at all."""
    its_place, number, _ = sign.split()
    return its_place == place() != "?" and not WINDOWS and not is_running(int(number))
