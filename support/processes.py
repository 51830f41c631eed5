"""Several processes, as torchrun starts them: they agree before the first step, talk to each other, and notice when one
of them is gone. train.py imports this only where there are several."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn

from support import cli
from support.cli import RunError, UsageError, is_out_of_memory
from support.files import WINDOWS, is_running
from support.kernels import updates_here
from support.machine import Alone, Runtime

ROOT = Path(__file__).resolve().parent.parent
JOIN = timedelta(minutes=5)  # for all processes to start and to read their flags
STEP = timedelta(minutes=10)  # that processes may be apart in a step; the watch looks whether they are there
PATIENT = timedelta(days=7)  # for what one process does while the others wait for it, such as tokenizing a long text
ANSWER = 10.0  # seconds in which the store should answer one that ends
GRACE = 3.0  # seconds in which a process should end by itself when another one is gone
REMEDY = "go on with the same command and --resume auto"
OWN = ("input_file", "cache_dir")  # settings that may differ between machines; of the text, the content must agree


# ---- before the first step ----


class Meeting(Alone):
    """Where processes leave notes for each other: a store of torch's, which needs neither device nor process group."""

    meetings = 0  # of this program so far; the notes of one are not read in the next

    def __init__(self):
        self.rank = int(os.environ["RANK"])
        self.world_size = int(os.environ["WORLD_SIZE"])
        self.speaks: bool | None = None  # None: not asked yet
        Meeting.meetings += 1
        self.name = f"start {starts()}, meeting {Meeting.meetings}"

    @functools.cached_property
    def store(self) -> dist.Store:
        """Raises UsageError where restarts couldn't work, RunError if the other processes can't be reached."""
        check_restarts()
        try:
            store, _, _ = next(dist.rendezvous("env://", timeout=JOIN))
        except (ValueError, RuntimeError) as e:
            raise RunError(f"the other processes can't be reached ({first_line(e)}): start all with torchrun") from e
        # torchrun's own store outlives a restart: without a prefix, new processes would read the dead ones' addresses.
        return dist.PrefixStore(self.name, store)

    def exchange(self, value: dict) -> list[dict]:
        """What all processes give here, in order of rank. The values are plain types. Raises RunError."""
        self.store.set(f"note of {self.rank}", json.dumps(value))
        values = []
        for rank in range(self.world_size):
            key = f"note of {rank}"
            try:
                self.store.wait([key], JOIN)
            except dist.DistError:
                minutes = JOIN.total_seconds() / 60
                raise RunError(f"process {rank} hasn't come to the start within {minutes:g} minutes") from None
            values.append(json.loads(self.store.get(key)))
        return values

    def agreed(self, make: Callable):
        """See Alone. The errors raised are the same in all processes, and hold the problems of all."""
        settings = None
        note = {"problems": [], "faults": [], "settings": {}}
        try:
            settings = make()
            note["settings"] = must_agree(settings)
        except UsageError as e:
            note["problems"] = e.problems
        except RunError as e:
            note["faults"] = [str(e)]
        notes = self.exchange(note)
        problems = told_once([one["problems"] for one in notes])
        faults = told_once([one["faults"] for one in notes])
        if not problems and not faults:
            problems = differences([one["settings"] for one in notes])
        if problems:
            raise UsageError(*problems)
        if faults:
            raise RunError("; ".join(faults))
        return settings

    def takes_the_word(self) -> bool:
        """Is this the process that says how the run ended? The first one that asks is."""
        if self.speaks is None:
            try:
                self.speaks = within(ANSWER, self.store.add, "spoken", 1) == 1
            except (UsageError, RunError):  # they couldn't even meet
                self.speaks = self.rank == 0
            except (RuntimeError, futures.TimeoutError):  # the store is gone, and maybe the first process with it
                self.speaks = self.rank == 1
        return self.speaks

    def say(self, name: str, sentence: str) -> None:
        if self.takes_the_word():
            cli.say(name, sentence)


def on_several_machines() -> bool:
    return int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1


def starts() -> int:
    """How often all processes were started anew. On several machines each torchrun counts for itself, so it is no name
    to meet by."""
    return 0 if on_several_machines() else int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def check_restarts() -> None:
    """Raises UsageError for restarts on several machines with a store that outlives them: there, nothing keeps the
    addresses of the dead apart."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
    if on_several_machines() and restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
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


def must_agree(settings) -> dict:
    """What all processes must have alike: settings, torch, and the code."""
    code = hashlib.sha256()
    for path in [ROOT / "train.py", ROOT / "mla_moe.py", *sorted((ROOT / "support").glob("*.py"))]:
        code.update(path.read_bytes())
    values = dataclasses.asdict(settings)
    for name in OWN:
        del values[name]
    return {**values, "version of torch": str(torch.__version__), "code": code.hexdigest()[:12]}


def differences(everyones: Sequence[dict]) -> list[str]:
    """A sentence for each name that hasn't the same value in all processes."""
    found = []
    for name, value in everyones[0].items():
        for rank, values in enumerate(everyones):
            its_value = values.get(name)  # other code may not know it
            if its_value != value:
                other = f"{name} is {value!r} in process 0 and {its_value!r} in process {rank}"
                found.append(f"{other}: start all processes alike")
                break
    return found


def first_line(e: BaseException) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0][:200]


# ---- is everybody there? ----


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

    def is_to_blame(self, e: BaseException) -> bool:
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


def within(seconds: float, ask: Callable, *args):
    """What ask(*args) returns. Raises futures.TimeoutError if it takes longer: a store's own timeouts don't hold where
    the process that keeps it is stopped."""
    answer = futures.Future()

    def run() -> None:
        try:
            answer.set_result(ask(*args))
        except Exception as e:
            answer.set_exception(e)

    threading.Thread(target=run, daemon=True).start()
    return answer.result(seconds)


# ---- the run itself ----


def dealt(matrices: Sequence, hands: int) -> list[list]:
    """Shares of about the same work: of each shape, each gets as many as the others, or one less."""
    by_shape = sorted(matrices, key=lambda p: tuple(p.shape))
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

    def muon_updates(self, matrices: Sequence, direction: Callable, dtype: torch.dtype) -> Iterator[tuple]:
        """Each process makes the updates of its own share. One all-gather brings it the others'."""
        shares = dealt(matrices, self.world_size)
        longest = max(sum(p.numel() for p in share) for share in shares)
        mine = torch.zeros(longest, dtype=dtype, device=self.device)
        start = 0
        for p, update in updates_here(shares[self.rank], direction, dtype):
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
            if self.watch.is_to_blame(e):
                raise RunError(self.watch.sentence()) from e
            raise

    def __exit__(self, kind, e, traceback) -> None:
        if e is None:
            with self.watched(lambda sentence: None):
                self.first("done")  # it may still write: when one process ends, torchrun gives the others half a minute
            self.watch.leave()
            dist.destroy_process_group()
            return
        others = self.watch.is_to_blame(e)
        self.meeting.takes_the_word()  # before the others know that this process ends
        told = isinstance(e, UsageError | RunError)
        self.watch.leave(first_line(e) if told else f"{type(e).__name__}: {first_line(e)}")
        if others:
            raise RunError(self.watch.sentence()) from e
