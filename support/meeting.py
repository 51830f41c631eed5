"""Where the processes that torchrun starts meet: before the first step they agree on settings, text and code, and one
of them speaks for all."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from concurrent import futures
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from support import cli
from support.cli import RunError, UsageError, first_line
from support.machine import Alone

ROOT = Path(__file__).resolve().parent.parent
JOIN = timedelta(minutes=5)  # for all processes to start and to read their flags
ANSWER = 10.0  # seconds in which the store should answer one that ends
OWN = ("input_file", "cache_dir")  # settings that may differ between machines; of the text, the content must agree


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
