"""Several processes, as torchrun starts them: they agree before the first step, talk to each other, and notice when one
of them is gone. train.py imports this only where there are several."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn

from support import cli
from support.cli import RunError, UsageError, is_out_of_memory
from support.machine import Alone, Runtime

ROOT = Path(__file__).resolve().parent.parent
JOIN = timedelta(minutes=5)  # for all processes to start and to read their flags
PATIENT = timedelta(days=7)  # for what one process does while the others wait for it, such as tokenizing a long text
GRACE = 5.0  # seconds in which a process should end by itself when another one is gone
REMEDY = "go on with the same command and --resume auto"


# ---- before the first step ----


class Meeting(Alone):
    """Where processes leave notes for each other: a store of torch's, which needs neither device nor process group."""

    def __init__(self):
        self.rank = int(os.environ["RANK"])
        self.world_size = int(os.environ["WORLD_SIZE"])
        self.exchanges = 0

    @functools.cached_property
    def store(self) -> dist.Store:
        """Raises UsageError where restarts couldn't work, RunError if the other processes can't be reached."""
        check_restarts()
        try:
            store, _, _ = next(dist.rendezvous("env://", timeout=JOIN))
        except (ValueError, RuntimeError) as e:
            raise RunError(f"the other processes can't be reached ({first_line(e)}): start all with torchrun") from e
        # torchrun's own store outlives a restart: without a prefix, new processes would read the dead ones' addresses.
        return dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)

    def exchange(self, value) -> list:
        """What all processes give here, in order of rank. The values are plain types. Raises RunError."""
        self.exchanges += 1
        keys = [f"exchange {self.exchanges} of {rank}" for rank in range(self.world_size)]
        self.store.set(keys[self.rank], json.dumps(value))
        values = []
        for rank, key in enumerate(keys):
            try:
                self.store.wait([key], JOIN)
            except dist.DistError:
                minutes = JOIN.total_seconds() / 60
                raise RunError(f"process {rank} hasn't come to the start within {minutes:g} minutes") from None
            values.append(json.loads(self.store.get(key)))
        return values

    def agreed(self, make: Callable, essence: Callable[[object], dict]):
        """See Alone. The errors raised are the same in all processes, and hold the problems of all."""
        made = None
        mine = {"problems": [], "fault": "", "essence": {}}
        try:
            made = make()
            mine["essence"] = essence(made)
        except UsageError as e:
            mine["problems"] = e.problems
        except RunError as e:
            mine["fault"] = str(e)
        everyone = self.exchange(mine)
        problems = told_once([one["problems"] for one in everyone])
        faults = told_once([[one["fault"]] if one["fault"] else [] for one in everyone])
        if not problems and not faults:
            problems = differences([one["essence"] for one in everyone])
        if problems:
            raise UsageError(*problems)
        if faults:
            raise RunError("; ".join(faults))
        return made

    @functools.cached_property
    def speaks(self) -> bool:
        """Is this the process that says how the run ended? The first one that asks for it is."""
        try:
            return self.store.add("spoken", 1) == 1
        except (UsageError, RunError, RuntimeError):  # nobody can be asked
            return self.rank == 0

    def say(self, name: str, sentence: str) -> None:
        if self.speaks:
            cli.say(name, sentence)


def check_restarts() -> None:
    """Raises UsageError for restarts on several machines with a store that outlives them: there, unlike on one machine,
    the processes don't count the restarts alike, so nothing keeps the addresses of the dead apart."""
    several = int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
    if several and restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise UsageError(
            "max_restarts on several machines needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of each"
            " torchrun, with --rdzv_backend c10d: set it, or leave --max_restarts out"
        )


def told_once(lists: Sequence[list[str]]) -> list[str]:
    """The problems of all processes: what all of them have, once; the rest with whose it is."""
    told = []
    for rank, problems in enumerate(lists):
        for problem in problems:
            if all(problem in others for others in lists):
                told.append(problem)
            else:
                told.append(f"process {rank}: {problem}")
    return list(dict.fromkeys(told))


def differences(essences: Sequence[dict]) -> list[str]:
    """A sentence for each name that hasn't the same value in all processes."""
    first = essences[0]
    found = {}
    for rank, essence in enumerate(essences):
        for name in essence.keys() | first.keys():
            if essence.get(name) != first.get(name):
                found.setdefault(name, (rank, essence.get(name)))
    return [
        f"{name} is {first.get(name)!r} in process 0 and {value!r} in process {rank}: start all processes alike"
        for name, (rank, value) in sorted(found.items())
    ]


def program() -> dict[str, str]:
    """What all processes must have alike beside their settings: torch, and the code."""
    digest = hashlib.sha256()
    for path in [ROOT / "train.py", *sorted((ROOT / "support").glob("*.py"))]:
        digest.update(path.read_bytes())
    return {"version of torch": str(torch.__version__), "code": digest.hexdigest()[:12]}


def first_line(e: BaseException) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0][:200]


# ---- is everybody there? ----


class Watch:
    """A thread in each process that shows the others that this one is alive, and notices when one of them isn't.

    Each process counts up under its own key. The first one looks at all the others', and these look at the first one's.
    What is found, or what a process writes when it fails, stands under the key `lost`, which all of them read."""

    def __init__(self, meeting: Meeting, wait_minutes: float):
        self.rank = meeting.rank
        self.wait_seconds = 60 * wait_minutes
        self.pause = min(1.0, self.wait_seconds / 10)
        self.store = meeting.store.clone()  # a call of another thread would block this one's
        self.me = [platform.node(), os.getpid()]
        places = meeting.exchange(self.me)
        others = range(1, meeting.world_size) if self.rank == 0 else [0]
        self.places = {rank: places[rank] for rank in others}
        self.seen = {rank: ("", time.monotonic()) for rank in others}  # (the latest count, when it was new)
        self.lost = ""  # what happened, in words
        self.when_lost: Callable[[str], None] = lambda sentence: None  # what the thread does before it ends the process
        self.over = threading.Event()
        self.found = threading.Event()
        self.thread = threading.Thread(target=self.run, name="watch", daemon=True)
        self.thread.start()

    def run(self) -> None:
        """What the thread does."""
        count = 0
        last = time.monotonic()
        while not self.over.wait(self.pause):
            now = time.monotonic()
            if now - last > 10 * self.pause + 1:  # this process was stopped itself, perhaps with all the others
                self.seen = {rank: (value, now) for rank, (value, _) in self.seen.items()}
            last = now
            count += 1
            self.look(str(count), now)
            if self.lost:
                self.found.set()
                return self.end()

    def look(self, count: str, now: float) -> None:
        """Shows that this process is alive, and looks at the others."""
        try:
            self.store.set(f"alive {self.rank}", count)
            if self.store.check(["lost"]):
                self.lost = self.store.get("lost").decode()
                return
            for rank in self.seen:
                problem = self.problem_of(rank, now)
                if problem:
                    self.lost = self.tell(problem)
        except RuntimeError:  # DistError is one: whoever keeps the store is gone
            self.lost = self.lost or "has ended: the one that keeps the list of all"

    def problem_of(self, rank: int, now: float) -> str:
        key = f"alive {rank}"
        value = self.store.get(key).decode() if self.store.check([key]) else ""
        before, since = self.seen[rank]
        if value == "left":
            return ""
        if value != before:
            self.seen[rank] = (value, now)
            return ""
        node, pid = self.places[rank]
        if node == self.me[0] and not is_running(pid):
            return f"has ended: process {rank} was killed"
        if now - since > self.wait_seconds:
            return f"doesn't answer: process {rank} has been silent for {self.wait_seconds / 60:g} minutes"
        return ""

    def tell(self, problem: str) -> str:
        """Writes what happened for all to read. Returns what they read: whatever was written first."""
        return self.store.compare_set("lost", "", problem).decode()

    def end(self) -> None:
        """Ends this process, unless it does so by itself: it may wait for the one that is gone until the end of time."""
        if self.over.wait(GRACE):
            return
        last_words = threading.Thread(target=self.when_lost, args=(self.sentence(),), daemon=True)
        last_words.start()
        last_words.join(GRACE)  # it may wait for the device, and that for the one that is gone
        os._exit(1)

    def sentence(self) -> str:
        problem = self.lost or "has ended"
        return f"another process of this run {problem}; {REMEDY}"

    def leave(self, why: str = "") -> None:
        """This process ends: as it should or, with `why`, for a reason that the others should know."""
        self.over.set()
        self.thread.join()
        with contextlib.suppress(RuntimeError):
            self.store.set(f"alive {self.rank}", "left")
            if why:
                self.tell(f"has ended: process {self.rank}: {why}")


def is_running(pid: int) -> bool:
    """Is there such a process on this machine?"""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's: then it can't be known
        return True
    return True


# ---- the run itself ----


class Processes(Runtime):
    """One of several processes, each with a copy of the whole model (DistributedDataParallel)."""

    talk_is_free = False

    def join(self, wait_minutes: float) -> Processes:
        """Joins the others. Tensors travel by the device's own library, which gives up after `wait_minutes`. What one
        process may keep the others waiting for goes by a group of its own, over the CPU, which doesn't."""
        self.watch = Watch(self.meeting, wait_minutes)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        timeout = timedelta(minutes=wait_minutes, seconds=3 * GRACE)  # the watch knows more, so it comes first
        store = dist.PrefixStore("group", self.meeting.store)
        dist.init_process_group(backend, timeout, self.world_size, self.rank, store)
        self.patient = dist.new_group(backend="gloo", timeout=PATIENT)
        return self

    def first(self, value):
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.patient)
        return values[0]

    def any(self, value: int) -> int:
        largest = torch.tensor(float(value), device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
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

    def wrap(self, model: nn.Module) -> nn.Module:
        """After its first step, DistributedDataParallel sorts the gradients anew into what travels together, and with
        three processes or more other sums round differently. So a first pass is made here, of one token, and a run that
        is resumed rounds as one that never stopped."""
        wrapped = nn.parallel.DistributedDataParallel(model)
        was_training = model.training
        model.eval()  # draws nothing from the random generators
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        for _ in range(2):  # the second one sorts, and the third is the first that nothing changes any more
            _, loss = wrapped(token, token, keep_logits=False)
            loss.backward()
        model.zero_grad(set_to_none=True)
        model.train(was_training)
        return wrapped

    # ---- how it ends ----

    def when_lost(self, do: Callable[[str], None]) -> None:
        self.watch.when_lost = do

    def explain(self, e: BaseException) -> str:
        if self.is_of_others(e):
            return self.watch.sentence()
        return super().explain(e)

    def is_of_others(self, e: BaseException) -> bool:
        """Did this process fail only because another one did? A broken connection comes first, and the reason after."""
        if isinstance(e, (RunError, UsageError)) or not isinstance(e, RuntimeError) or is_out_of_memory(e):
            return False
        broken = isinstance(e, dist.DistError) or any(words in str(e) for words in BROKEN)
        return self.watch.found.wait(GRACE if broken else 2 * self.watch.pause) or broken

    def __exit__(self, kind, e, traceback) -> None:
        of_others = e is not None and self.is_of_others(e)
        sentence = self.watch.sentence()
        why = "" if e is None or of_others else first_line(e)
        self.watch.leave(why)
        if e is None:
            dist.destroy_process_group()
        elif of_others:
            raise RunError(sentence) from e


# What gloo says in a plain RuntimeError when a connection breaks.
BROKEN = ("Connection closed", "Connection reset", "Connection refused", "Broken pipe", "Timed out", "timed out", "gloo")
