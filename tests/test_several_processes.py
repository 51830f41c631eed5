"""Several processes under torchrun: what they compute together, on what they agree, and how they end."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import ROOT, log_of, rows_of, same_weights, tiny_flags, weights_of, without_times

import train
from support import meeting, watch
from support.cli import StopSignals
from support.machine import Runtime, shared_grad_accum
from support.meeting import Meeting, check_restarts, differences, told_once
from support.watch import Watch, place, was_killed

ENV = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
SETTINGS = {"tokenizer": "char", "target_loss": 0, "num_prompts": 1, "seq_len": 64, "batch_size": 1}
PLAIN = {"steps": 25, "save_every": 25, "val_fraction": 0.2, **SETTINGS, "optimizer": "muon"}
EXPERTS = {"arch": "mla_moe", "steps": 10, **SETTINGS, "expert_width": 8, "optimizer": "muon"}
DROPPING = {"steps": 16, "dropout": 0.3, "n_layer": 4, **SETTINGS}
BIAS = "model.layers.0.mlp.gate.e_score_correction_bias"
REMEDY = "; go on with the same command and --resume auto\n"


def torchrun(processes: int, *words) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *words]


def record_of(out_dir) -> dict:
    return json.loads((out_dir / "run.json").read_text())


def said_in(stderr: str) -> list[str]:
    """What train.py said there, of all that torchrun says."""
    return re.findall(r"^train\.py: (.*\n)", stderr, re.M)


# ---- one process ----


def test_for_one_process_the_verbs_change_nothing():
    alone = Runtime(torch.device("cpu"), None, None, "")
    value = {"step": 3}
    tensor = torch.ones(2)
    model = torch.nn.Linear(1, 1)
    assert alone.first(value) is value
    assert alone.any(15) == 15
    assert alone.any(0) == 0
    assert alone.gather(value) == [value]
    assert alone.gather(tensor)[0] is tensor
    assert alone.wait() is None
    assert alone.wrap(model) is model
    assert alone.talk_is_free


def test_a_signal_that_comes_while_the_processes_talk_is_not_forgotten():
    def hear(value: int) -> int:
        signal.raise_signal(signal.SIGTERM)
        return value

    with StopSignals() as stop:
        assert not stop.asked_of_any(hear)
        assert stop.asked_of_any(lambda value: value)
    assert stop.signum == signal.SIGTERM


# ---- what they agree on ----


def test_a_problem_of_all_processes_is_told_once_and_one_of_a_single_process_with_its_number():
    assert told_once([["lr is bad"], ["lr is bad"]]) == ["lr is bad"]
    assert told_once([["lr is bad"], ["no text", "lr is bad"]]) == ["lr is bad", "process 1: no text"]
    assert told_once([[], []]) == []


def test_a_difference_names_the_setting_the_process_and_both_values():
    everyones = [{"lr": 0.1, "seed": 1}, {"lr": 0.1, "seed": 1}, {"lr": 0.2, "seed": 1}]
    assert differences(everyones) == ["lr is 0.1 in process 0 and 0.2 in process 2: start all processes alike"]
    assert differences(everyones[:2]) == []


def test_another_number_of_processes_keeps_the_tokens_of_a_step(monkeypatch):
    for there, grad_accum in [(1, 6), (2, 3), (3, 2), (6, 1)]:
        monkeypatch.setenv("WORLD_SIZE", str(there))
        assert shared_grad_accum(3, 2) == grad_accum
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(
        train.UsageError, match=r"have 6 micro-batches .* 4 processes can't share: start 1 or 2 or 3 or 6"
    ):
        shared_grad_accum(3, 2)


def test_restarts_on_several_machines_need_a_store_that_ends_with_the_processes(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    check_restarts()
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(train.UsageError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        check_restarts()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    check_restarts()


def test_code_that_does_not_know_a_setting_differs_like_any_other():
    everyones = [{"code": "new", "shift": 1}, {"code": "old"}]
    assert differences(everyones)[1] == "shift is 1 in process 0 and None in process 1: start all processes alike"


# ---- the watch ----


class StoppedStore:
    """As a store whose process was stopped: what is sent there is taken, and no question is answered."""

    def clone(self):
        return self

    def set(self, key, value):
        pass

    def check(self, keys):
        threading.Event().wait()

    def compare_set(self, key, expected, value):
        threading.Event().wait()

    def add(self, key, value):
        threading.Event().wait()


def meeting_of(rank: int, store) -> Meeting:
    made = Meeting.__new__(Meeting)
    made.rank = rank
    made.world_size = 3
    made.speaks = None
    made.store = store
    return made


def test_a_process_that_keeps_the_store_and_is_stopped_keeps_nobody_waiting(monkeypatch):
    monkeypatch.setattr(meeting, "ANSWER", 0.05)
    monkeypatch.setattr(watch, "ANSWER", 0.05)
    of_first = Watch(meeting_of(1, StoppedStore()), 0.001)
    assert of_first.found.wait(10)
    of_first.ending.set()  # or it would end this program
    of_first.leave("why")
    assert of_first.sentence().startswith(
        "another process of this run doesn't answer: the first one, or its torchrun, has"
    )
    assert [meeting_of(rank, StoppedStore()).takes_the_word() for rank in (1, 2)] == [True, False]


def test_only_on_its_own_machine_it_can_be_asked_whether_a_process_runs(monkeypatch):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    monkeypatch.setenv("GROUP_RANK", "0")
    assert was_killed(f"{place()} {gone.pid} 7")
    assert not was_killed(f"{place()} {os.getpid()} 7")
    assert not was_killed(f"1 {gone.pid} 7")
    monkeypatch.setattr(watch, "WINDOWS", True)
    assert not was_killed(f"{place()} {gone.pid} 7")


# ---- two of them ----

# What the two processes do, one run after the other: they start once, which takes longer than all of it.
PROGRAM = """
import json, os, sys, time
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
import train
from support import inference, kernels, launch, machine
from support.processes import Processes

rank = int(os.environ["RANK"])

# the verbs
meeting = launch.meet()
alone = machine.start_runtime("cpu", "off")
with launch.join(meeting, alone, train.TrainConfig()) as runtime:
    assert isinstance(runtime, Processes)
    assert runtime.first(f"of {rank}") == "of 0"
    assert runtime.any(0) == 0
    assert runtime.any(15 * rank) == 15
    assert runtime.gather({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert [one.tolist() for one in runtime.gather(torch.tensor([rank, 7]))] == [[0, 7], [1, 7]]
    runtime.wait()
    runtime.check_alike({"text": "the same"})
    try:
        runtime.check_alike({"text": f"of {rank}"})
        raise AssertionError("another text passed")
    except train.UsageError as e:
        assert str(e) == "text is 'of 0' in process 0 and 'of 1' in process 1: start all processes alike"

    # a proof by two is that by one, to the last bit; there is an odd number of batches
    torch.manual_seed(0)
    model = train.GPT(train.GPTConfig(64, 65, 2, 2, 16))
    tokens = torch.randint(65, (900,)).numpy()
    batcher = train.TokenBatcher(tokens, 1, 64)
    assert batcher.n_batches % 2 == 1
    by_two = inference.evaluate(model, runtime, batcher, 100, "proof")
    assert by_two == inference.evaluate(model, alone, batcher, 100, "proof")

    # each matrix of Muon is orthogonalized by one of them: of five, three and two
    shapes = [(4, 8), (4, 4), (4, 8), (4, 4), (4, 8)]
    matrices = [torch.randn(shape) for shape in shapes]
    real = kernels.orthogonalized
    worked_on = []

    def orthogonalized(stack, dtype):
        worked_on.append(len(stack))
        return real(stack, dtype)

    kernels.orthogonalized = orthogonalized
    directions = {p: p for p in matrices}
    updates = list(runtime.muon_updates(directions, {p: p.shape for p in matrices}, torch.float32))
    kernels.orthogonalized = real
    assert sum(worked_on) == 3 - rank
    for p, update in updates:
        torch.testing.assert_close(update, real(p[None], torch.float32)[0])
    assert {id(p) for p, _ in updates} == {id(p) for p in matrices}

    # what the first one still writes at the end, the other waits for
    if rank == 0:
        time.sleep(0.5)
        open("written", "w").close()
assert os.path.exists("written")

# the same in parts: some of one row, of which the second process holds nothing
with launch.join(launch.meet(), alone, train.TrainConfig(parallel="fsdp")) as runtime:
    mesh = init_device_mesh("cpu", (2,))
    shapes = [(5, 8), (1, 4), (5, 8), (8, 5), (4, 4)]
    matrices = [torch.randn(shape) for shape in shapes]
    shards = [distribute_tensor(matrix, mesh, [Shard(0)]) for matrix in matrices]
    directions = {p: p for p in shards}
    for shard, update in runtime.muon_updates(directions, {p: p.shape for p in shards}, torch.float32):
        whole = real(shard.full_tensor()[None], torch.float32)[0]
        torch.testing.assert_close(update.full_tensor(), whole)

    # the first process alone has whole weights, the table that the head shares once
    runtime.wrap(model)
    weights = runtime.whole(model, torch.optim.AdamW(model.parameters()))["model"]
    assert weights["lm_head.weight"] is weights["transformer.wte.weight"]
    assert (weights["lm_head.weight"] is None) == (rank == 1)

# a signal that only the second process hears
real = train.Loop.stop_asked

def stop_asked(loop):
    first_start = "parts" in loop.config.out_dir and not loop.trainer.given.resume
    if first_start and rank == 1 and loop.progress.step == 8:
        loop.stop.signum = 15
    return real(loop)

train.Loop.stop_asked = stop_asked

# a fault that only the second process has
real_step = train.Trainer.train_step

def train_step(trainer, *rest):
    if trainer.given.out_dir.endswith("burns") and rank == 1 and trainer.progress.step == 10:
        raise train.RunError("the machine burns")
    real_step(trainer, *rest)

train.Trainer.train_step = train_step

# the runs
codes = []
for flags, of_second in json.loads(sys.argv[1]):
    codes.append(train.main(flags + of_second * rank))
    assert codes[-1] in (1, 2) or not torch.distributed.is_initialized()
if rank == 0:
    with open("codes.json", "w") as f:
        json.dump(codes, f)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, short_text):
    """Where two processes together have made these runs: pair, whole, and parts, which was stopped and resumed; the
    same with a model in parts. Then come some that could not begin. In `stderr` is what was said."""
    folder = tmp_path_factory.mktemp("two")
    program = folder / "program.py"
    program.write_text(PROGRAM)
    never = tiny_flags(folder / "never", **PLAIN, input_file=short_text)
    runs = [  # (flags, flags of the second process alone)
        (tiny_flags(folder / "pair", **PLAIN, grad_accum=2, input_file=short_text), []),
        (tiny_flags(folder / "whole", **DROPPING, input_file=short_text), []),
        (tiny_flags(folder / "parts", **DROPPING, input_file=short_text), []),
        (["--resume", str(folder / "parts" / "checkpoints" / "last.pt")], []),
        (tiny_flags(folder / "pair_fsdp", **PLAIN, grad_accum=2, input_file=short_text, parallel="fsdp"), []),
        (tiny_flags(folder / "whole_fsdp", **DROPPING, input_file=short_text, parallel="fsdp"), []),
        (tiny_flags(folder / "parts_fsdp", **DROPPING, input_file=short_text, parallel="fsdp"), []),
        (["--resume", str(folder / "parts_fsdp" / "checkpoints" / "last.pt")], []),
        (tiny_flags(folder / "experts", **EXPERTS, input_file=short_text), []),
        (tiny_flags(folder / "experts_fsdp", **EXPERTS, input_file=short_text, parallel="fsdp"), []),
        (["--resume", str(folder / "experts_fsdp" / "checkpoints" / "last.pt"), "--steps", "12"], []),
        ([*never, "--steps", "x"], []),
        (never, ["--n_head", "3"]),
        (never, ["--lr", "0.5", "--seed", "3"]),
        (tiny_flags(folder / "burns", **PLAIN, input_file=short_text), []),
    ]
    command = torchrun(2, str(program), json.dumps(runs))
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=200, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "codes.json").read_text()) == [0, 0, 143, 0, 0, 0, 143, 0, 0, 0, 0, 2, 2, 2, 1]
    (folder / "stderr").write_text(done.stderr)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory, short_text):
    """What one process does with twice the accumulation."""
    out = tmp_path_factory.mktemp("one") / "alone"
    assert train.main(tiny_flags(out, **PLAIN, grad_accum=4, input_file=short_text)) == 0
    return out


@pytest.mark.parametrize("name", ["pair", "pair_fsdp"])
def test_two_processes_do_what_one_does_with_twice_the_accumulation(folder, alone, name):
    """And what they measure together, of the proof, held-out text and recall, is what one measures alone."""
    pair = folder / name
    for one, two in zip(rows_of(alone), rows_of(pair), strict=True):
        for name in ("step", "epoch", "tokens", "lr"):
            assert one[name] == two[name]
        for name in ("loss", "avg_loss", "grad_norm"):
            assert float(one[name]) == pytest.approx(float(two[name]), rel=1e-4)
    one = record_of(alone)
    two = record_of(pair)
    assert (one["processes"], two["processes"]) == (1, 2)
    for name in ("final_loss", "val_loss", "best_val_loss"):
        assert one[name] == pytest.approx(two[name], rel=1e-4)
    for name in ("recall", "recall_at_windows"):
        assert one[name] == pytest.approx(two[name], abs=0.1)
    assert (pair / "samples" / "samples.txt").read_text().count("STEP ") == 1
    assert "Ended: steps done at step 25 of 25" in log_of(pair)


@pytest.mark.parametrize("kind", ["", "_fsdp"])
def test_two_processes_stop_together_and_resume_exactly(folder, kind):
    """At a signal that only the second process hears, in a run with dropout."""
    whole = folder / f"whole{kind}"
    parts = folder / f"parts{kind}"
    record = record_of(parts)
    assert "Ended: interrupted at step 8 of 16" in log_of(parts)
    assert (record["ended"], record["steps"], len(record["resumed"])) == ("steps done", 16, 1)
    assert without_times(rows_of(whole)) == without_times(rows_of(parts))
    assert same_weights(weights_of(whole), weights_of(parts))


def test_a_checkpoint_of_a_model_in_parts_is_that_of_one_process(folder, alone, tmp_path, short_text):
    one = torch.load(alone / "checkpoints" / "last.pt")
    parts = torch.load(folder / "pair_fsdp" / "checkpoints" / "last.pt")
    assert {name: p.shape for name, p in one["model"].items()} == {name: p.shape for name, p in parts["model"].items()}
    for number, state in one["optimizer"]["state"].items():
        for name, average in state.items():
            torch.testing.assert_close(average, parts["optimizer"]["state"][number][name], rtol=1e-3, atol=1e-4)
    last = str(shutil.copytree(folder / "pair_fsdp", tmp_path / "out") / "checkpoints" / "last.pt")
    assert train.main(["--resume", last, "--steps", "27"]) == 0
    assert "grad_accum 4 x processes 1" in log_of(tmp_path / "out")


def test_two_processes_count_the_loads_of_their_experts_together(folder, tmp_path, short_text):
    """And do what one does with twice the accumulation, in parts too, with each expert's matrix orthogonalized."""
    assert train.main(tiny_flags(tmp_path / "alone", **EXPERTS, grad_accum=2, input_file=short_text)) == 0
    rows = rows_of(tmp_path / "alone")
    for name in ("experts", "experts_fsdp"):
        for one, two in zip(rows, rows_of(folder / name), strict=False):
            assert float(one["loss"]) == pytest.approx(float(two["loss"]), rel=1e-4)
            assert float(one["load_entropy"]) == pytest.approx(float(two["load_entropy"]), abs=0.02)
    assert len(rows_of(folder / "experts_fsdp")) == 12
    biases = [weights_of(tmp_path / "alone")[BIAS], weights_of(folder / "experts")[BIAS]]
    assert biases[0].any()
    torch.testing.assert_close(*biases)


def test_processes_that_differ_do_not_begin_and_each_problem_is_said_once(folder):
    usage, n_head, seed, lr, *_ = said_in((folder / "stderr").read_text())
    assert usage == "steps 'x' isn't a whole number: use something like 100\n"
    assert lr == "lr is 0.0003 in process 0 and 0.5 in process 1: start all processes alike\n"
    assert seed == "seed is 1337 in process 0 and 3 in process 1: start all processes alike\n"
    assert n_head == "process 1: n_embd 16 isn't divisible by n_head 3: try 15\n"
    assert not (folder / "never").exists()


# ---- one of them is gone ----


def test_a_fault_of_one_process_is_said_by_it_and_written_down_by_the_first(folder):
    assert said_in((folder / "stderr").read_text())[4:] == ["the machine burns\n"]
    sentence = f"failed: another process of this run has ended: process 1: the machine burns{REMEDY}"
    assert record_of(folder / "burns")["ended"] == sentence.strip()
    assert f"ERROR | {sentence}" in log_of(folder / "burns")


# The second of them, in its first start, after ten steps.
HURT = """
import os, signal, sys
import train

kind, *flags = sys.argv[1:]
hurts = os.environ["RANK"] == "1" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
real = train.Trainer.train_step

def train_step(trainer, *rest):
    if hurts and trainer.progress.step == 10:
        os.kill(os.getpid(), getattr(signal, kind))
    real(trainer, *rest)

train.Trainer.train_step = train_step
raise SystemExit(train.main(flags))
"""


@pytest.fixture
def hurt(tmp_path):
    program = tmp_path / "hurt.py"
    program.write_text(HURT)
    return program


def start_directly(processes: int, *words) -> list[subprocess.Popen]:
    """Processes without a torchrun, which would end them all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
        env = {**ENV, **{name: str(value) for name, value in env.items()}, "MASTER_PORT": str(port), "GROUP_RANK": "0"}
        started.append(subprocess.Popen([sys.executable, *words], env=env, stderr=subprocess.PIPE, text=True))
    return started


@pytest.mark.slow
def test_when_one_process_does_not_answer_the_others_end_and_say_so(hurt, tmp_path, short_text):
    out = tmp_path / "out"
    flags = tiny_flags(out, **SETTINGS | {"steps": 10_000, "save_every": 5}, wait_minutes=0.03, input_file=short_text)
    first, second = start_directly(2, str(hurt), "SIGSTOP", *flags)
    _, words = first.communicate(timeout=60)
    assert second.poll() is None
    second.kill()
    second.communicate()
    assert first.returncode == 1
    silent = "doesn't answer: process 1 has been silent for 0.03 minutes"
    sentence = f"another process of this run {silent}{REMEDY}"
    assert said_in(words) == [sentence]
    assert record_of(out)["ended"] == f"failed: {sentence.strip()}"
    assert f"ERROR | failed: {sentence}" in log_of(out)
    assert torch.load(out / "checkpoints" / "last.pt")["step"] == 10


def test_a_killed_process_is_replaced_and_no_loss_changes(hurt, tmp_path, short_text, folder):
    out = tmp_path / "out"
    flags = tiny_flags(out, **DROPPING, save_every=4, resume="auto", input_file=short_text)
    command = torchrun(2, "--max_restarts=1", str(hurt), "SIGKILL", *flags)
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=200)
    assert done.returncode == 0, done.stderr
    assert said_in(done.stderr) == [f"another process of this run has ended: process 1 was killed{REMEDY}"]
    assert without_times(rows_of(out)) == without_times(rows_of(folder / "whole"))
    assert same_weights(weights_of(out), weights_of(folder / "whole"))


# ---- three of them ----


def children_of(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(word) for word in found.stdout.split()]


def wait_for_step(out, step: int) -> None:
    while not (out / "logs" / "train.log").exists() or f"step {step}/" not in log_of(out):
        time.sleep(0.1)


@pytest.mark.slow
def test_five_kills_of_three_processes_change_no_loss(tmp_path, short_text):
    """Three by SIGKILL, two by SIGSTOP, which torchrun needs half a minute to end."""
    settings = {**DROPPING, "steps": 600, "save_every": 7, "wait_minutes": 0.1, "input_file": short_text}
    program = str(ROOT / "train.py")
    whole = tmp_path / "whole"
    subprocess.run(torchrun(3, program, *tiny_flags(whole, **settings)), env=ENV, check=True)
    out = tmp_path / "out"
    command = torchrun(3, "--max_restarts=5", program, *tiny_flags(out, **settings, resume="auto"))
    run = subprocess.Popen(command, env=ENV)
    rng = random.Random(1)
    for number, signum in enumerate([signal.SIGKILL, signal.SIGSTOP, signal.SIGKILL, signal.SIGSTOP, signal.SIGKILL]):
        wait_for_step(out, 100 * number + rng.randrange(1, 90))
        os.kill(children_of(run.pid)[rng.randrange(3)], signum)
    assert run.wait(timeout=600) == 0
    assert len(record_of(out)["resumed"]) == 5
    assert without_times(rows_of(out)) == without_times(rows_of(whole))
    assert same_weights(weights_of(out), weights_of(whole))
