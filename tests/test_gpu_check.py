"""benchmarks/gpu_check.py, on a CPU with small models: what it prints and leaves, and that its parts find faults."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(ROOT / "benchmarks"))
    gpu_check = importlib.import_module("gpu_check")

# A tenth of a minute each; and of the rows of throughput.py, one is like the other.
LONG = ["compiled", "torchrun", "throughput"]


def run(*words) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, cwd=ROOT)


def check_small(program: str, folder: Path, *flags) -> tuple[subprocess.CompletedProcess, dict]:
    """(the command, its record)"""
    places = ["--json", folder / "found" / "check.json", "--keep", folder / "runs"]
    done = run(program, "--device", "cpu", "--small", *places, *flags)
    return done, json.loads((folder / "found" / "check.json").read_text())


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """(folder, command, record) of all parts but the longest."""
    folder = tmp_path_factory.mktemp("gpu")
    return folder, *check_small("benchmarks/gpu_check.py", folder, "--skip", *LONG)


@pytest.fixture(scope="module")
def checked_kit(tmp_path_factory):
    """The same of the parts of gpu_check_kit.py."""
    folder = tmp_path_factory.mktemp("kit")
    return folder, *check_small("tests/gpu_check_kit.py", folder, "--slower", "0.1")


def test_all_parts_pass_on_a_cpu(checked):
    _, done, record = checked
    assert {row["name"]: row["why"] for row in record["parts"] if row["result"] != "passed"} == {}
    assert done.returncode == 0
    assert len(record["parts"]) == sum(not part.name.startswith(tuple(LONG)) for part in gpu_check.PARTS)
    assert all(row["figures"] for row in record["parts"])


def test_the_table_is_printed_and_left_beside_its_figures(checked):
    folder, done, record = checked
    page = (folder / "found" / "check.md").read_text()
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(record["parts"])
    assert page.endswith("\n".join(table) + "\n")
    assert record["machine"]["torch"] == torch.__version__
    assert "torch " + torch.__version__ in page
    assert "benchmarks/gpu_check.py --device cpu --small" in record["command"]


def test_a_preset_leaves_its_run_without_checkpoints(checked):
    folder, _, record = checked
    for name in ("demo", "shakespeare"):
        left = json.loads((folder / "runs" / name / "run.json").read_text())
        row = next(row for row in record["parts"] if row["name"] == name)
        assert left["ended"] == "target reached"
        assert row["figures"]["final_loss"] == left["final_loss"] < left["target_loss"]
        assert (folder / "runs" / name / "logs" / "train.log").exists()
        assert not (folder / "runs" / name / "checkpoints").exists()


@pytest.mark.slow
def test_what_fails_or_hangs_costs_only_itself(checked_kit):
    folder, done, record = checked_kit
    assert done.returncode == 1
    assert [(row["result"], row["why"]) for row in record["parts"][:6]] == [
        ("passed", ""),
        ("failed", "two and two are five"),
        ("failed", "ended with -11; its last words: none"),
        ("failed", "no end within 2 seconds; its last words: and then"),
        ("not tried", "this machine has no such thing"),
        ("passed", ""),
    ]
    assert r"figure: 0.123; words: a \| b |" in (folder / "found" / "check.md").read_text()
    assert_ended(int((folder / "runs" / "sleeper").read_text()))


def assert_ended(pid: int) -> None:
    """Is the process, which the one that hung had started, gone too?"""
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{pid}/stat").exists() and ") Z " in Path(f"/proc/{pid}/stat").read_text():
            return  # ended, and nobody asked how
        time.sleep(0.05)
    raise AssertionError("it still runs")


FAULTS = {
    "wrong_logits": "logits are",
    "blind_causality": "the check doesn't find attention that looks ahead",
    "looks_ahead": "a token sees a later one",
    "never_skips": "an update that overflowed changed the weights",
    "trains_only_in_fp32": "in fp16, a loss is",
    "reads_the_loss": "a value was read",
    "saves_without_a_copy": "isn't what training had when it was saved",
    "forgets_its_place": "with --deterministic, a loss is",
    "forgets_its_weights": "nats from that of the run that stayed on the device",
}


def test_each_part_finds_a_fault_of_its_kind(checked_kit):
    _, _, record = checked_kit
    rows = {row["name"].rsplit("-", 1)[0]: row for row in record["parts"][6:]}
    assert rows.keys() == FAULTS.keys()
    for name, words in FAULTS.items():
        assert rows[name]["result"] == "failed"
        assert words in rows[name]["why"], name


def test_a_part_that_no_time_is_left_for_is_not_tried():
    part = gpu_check.PARTS[0]
    row = gpu_check.try_one(part, None, left=part.takes / 2 - 1, slower=1.0)
    assert (row["name"], row["result"], row["why"]) == (part.name, "not tried", "no time left")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_a_usage_error():
    done = run("benchmarks/gpu_check.py", "--device", "cuda")
    assert done.returncode == 2
    assert done.stderr == "gpu_check.py: device cuda isn't available here: use --device auto\n"
    assert done.stdout == ""


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--only", "nonsense"], "there is no part nonsense: use logits, causality"),
        (["--device", "cpu"], "a CPU takes hours for all of it: add --small"),
    ],
)
def test_flags_that_mean_nothing_are_refused(flags, sentence, capsys):
    assert gpu_check.main(flags) == 2
    assert sentence in capsys.readouterr().err


def test_a_name_stands_for_all_that_begin_with_it():
    names = [part.name for part in gpu_check.chosen(["throughput", "kill"], ["throughput-fp16"])]
    assert names[0] == "kill"
    assert "throughput-bf16-64x1024" in names
    assert not any("fp16" in name for name in names)
    everything = [part.name for part in gpu_check.PARTS]
    assert len(everything) == len(set(everything))


@pytest.mark.slow
def test_the_long_parts_pass_too(tmp_path):
    done, record = check_small("benchmarks/gpu_check.py", tmp_path, "--only", *LONG)
    assert done.returncode == 0
    passed = [row["name"] for row in record["parts"] if row["result"] == "passed"]
    assert {"torchrun", "compiled", "throughput-bf16-8x256"} <= set(passed)
