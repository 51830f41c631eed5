"""Killed at any moment, as by kill -9: no file is half written, and the run goes on as if it had never stopped."""

from __future__ import annotations

import json
import os
import random
import signal
import time

import pytest
from checkpoint_kit import (  # noqa: F401  (fixtures)
    SETTINGS,
    assert_same_run,
    finished_fixture,
    kill,
    out_fixture,
    start_process,
    start_run,
    step_in,
    steps_of,
)
from conftest import tiny_flags

import train

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kill -9 is of POSIX")


def train_until_killed(flags: list[str], call: str, name: str, before: bool) -> None:
    """In a process of its own: trains, and kills itself before or after the second call of os.replace or os.link whose
    target is `name`."""
    real = getattr(os, call)
    count = 0

    def patched(source, target):
        nonlocal count
        if not str(target).endswith(name):
            return real(source, target)
        count += 1
        if before and count == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)
        if count == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(os, call, patched)
    train.main(flags)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    ("call", "name"), [("replace", "last.pt"), ("replace", "previous.pt"), ("link", "previous.pt.part")]
)
def test_killed_at_the_moment_of_a_rename(call, name, before, tmp_path, finished):
    out = tmp_path / "out"
    flags = tiny_flags(out, **SETTINGS, resume="auto")
    process = start_process(train_until_killed, flags, call, name, before)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert step_in(out / "checkpoints" / "last.pt") in (10, 20, 30)  # whole
    assert train.main(flags) == 0
    assert not list(out.rglob("*.part"))
    assert_same_run(out, finished)


def test_what_a_killed_run_left_half_written_is_removed(out):
    for name in ("checkpoints/last.pt.x.5.part", "checkpoints/previous.pt.part", "run.json.x.5.part"):
        (out / name).write_bytes(b"half")
    assert train.main(["--resume", str(out / "checkpoints" / "last.pt"), "--steps", "31"]) == 0
    assert not list(out.rglob("*.part"))


def kill_at_random_moments(out, times: int, seed: int) -> None:
    """A run that saves constantly is killed again and again, and loses no step and no row."""
    last = out / "checkpoints" / "last.pt"
    rng = random.Random(seed)
    changes = {"steps": 100_000, "save_every": 1, "num_prompts": 1, "sample_every": 7}
    flags = tiny_flags(out, **{**SETTINGS, **changes}, resume="auto")
    reached = [0]
    for _ in range(times):
        process = start_run(out, flags)
        time.sleep(rng.uniform(0, 0.3))
        kill(process)
        if last.exists():  # else it was killed before its first save was done
            reached.append(step_in(last))
    assert reached == sorted(reached)
    assert reached[-1] > times
    end = reached[-1] + 5
    assert train.main([*flags, "--steps", str(end)]) == 0
    assert steps_of(out) == list(range(1, end + 1))
    samples = (out / "samples" / "samples.txt").read_text()
    sampled = [int(line.split()[1]) for line in samples.splitlines() if line.startswith("STEP ")]
    assert sampled == [*range(7, end, 7), end]


def test_killed_at_random_moments(tmp_path):
    kill_at_random_moments(tmp_path / "out", times=4, seed=1)


@pytest.mark.slow
def test_killed_at_thirty_random_moments(tmp_path):
    kill_at_random_moments(tmp_path / "out", times=30, seed=2)


PASS = 21  # batches in a pass over the short text


def train_until_killed_in(flags: list[str], method: str, count: int) -> None:
    """In a process of its own: trains, of which the proofs before the fifth fail, and kills itself in the middle of the
    `count`-th call of a method of Trainer; 0: of none."""
    real = {name: getattr(train.Trainer, name) for name in ("evaluate", "sample")}
    calls = 0

    def counted(trainer, poll, *args):
        nonlocal calls
        calls += 1
        polls = 0

        def kill_at_the_second():
            nonlocal polls
            polls += 1
            if calls == count and polls == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        return real[method](trainer, kill_at_the_second, *args)

    setattr(train.Trainer, method, counted)
    evaluate = train.Trainer.evaluate
    train.Trainer.evaluate = lambda trainer, *args: evaluate(trainer, *args) + 2000 * (trainer.progress.step < 5 * PASS)
    train.main(flags)


def run_until_killed_in(out, short_text, method: str = "evaluate", count: int = 0) -> int:
    """The exit code of such a run, which goes on from where one in the same folder was."""
    settings = {"input_file": short_text, "tokenizer": "char", "steps": 200, "target_loss": 1000.0, "save_every": 10}
    flags = tiny_flags(out, **settings, sample_every=15, log_every=7, num_prompts=2, resume="auto")
    process = start_process(train_until_killed_in, flags, method, count)
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def proven(tmp_path_factory, short_text):
    """The run directory of such a run that nobody killed."""
    out = tmp_path_factory.mktemp("proven") / "out"
    assert run_until_killed_in(out, short_text) == 0
    return out


@pytest.mark.parametrize(("method", "count"), [("evaluate", 3), ("evaluate", 5), ("sample", 4), ("sample", 7)])
def test_killed_in_a_later_proof_or_in_a_sample(tmp_path, short_text, proven, method, count):
    out = tmp_path / "out"
    assert run_until_killed_in(out, short_text, method, count) == -signal.SIGKILL
    assert run_until_killed_in(out, short_text) == 0
    assert_same_run(out, proven)
    assert (out / "samples" / "samples.txt").read_bytes() == (proven / "samples" / "samples.txt").read_bytes()
    record = json.loads((out / "run.json").read_text())
    expected = json.loads((proven / "run.json").read_text())
    for name in ("ended", "steps", "tokens", "final_loss", "tokens_to_target", "samples", "recall"):
        assert record[name] == expected[name], name
    assert (record["ended"], record["steps"]) == ("target reached", 5 * PASS)
