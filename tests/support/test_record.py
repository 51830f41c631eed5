"""What a run says of itself: the time to the target, and how a run ended."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest
from conftest import ROOT

import train
from support import record
from support.presets import PRESETS, RECORDS

# ---- the time to the target ----


@pytest.mark.parametrize(
    ("steps", "known", "said"),
    [
        (1000, 0, "at 128 tok/s: 7 min 30 s, at "),  # 900 steps at half a second
        (1000, 64 * 300, "at 128 tok/s: 1 min 40 s, at "),
        (1000, 64 * 50, "at 128 tok/s: 7 min 30 s, at "),  # the published run took fewer tokens than these already are
        (10**12, 0, " h "),
    ],
)
def test_the_estimate_is_what_is_left_over_the_speed(quick, make_trainer, monkeypatch, steps, known, said):
    trainer = make_trainer(quick(steps=steps))
    trainer.batcher.position = 100
    monkeypatch.setattr(record, "known_tokens", lambda *_: known)
    line = record.estimate(trainer, 128.0)
    assert said in line
    assert re.search(r", at \d{4}-\d\d-\d\d \d\d:\d\d, ", line)
    by_published_run = line.endswith("if it takes the 19,200 tokens of the published run")
    by_steps = line.endswith("when all steps are done, or before")
    assert (by_published_run, by_steps) == (known == 19_200, known != 19_200)


def test_two_processes_are_not_expected_to_need_what_one_needed(quick, make_trainer, monkeypatch):
    trainer = make_trainer(quick(steps=1000))
    trainer.runtime.world_size = 2
    monkeypatch.setattr(record, "known_tokens", lambda *_: 19_200)
    assert record.estimate(trainer, 128.0).endswith("when all steps are done, or before")


@pytest.mark.parametrize("name", RECORDS)
def test_a_published_run_is_known_by_its_settings_and_its_text(name):
    recipe = train.TrainConfig(**{**PRESETS[name], "preset": name, "out_dir": "elsewhere", "save_every": 7})
    same = recipe.completed(10, 1)
    sha256 = RECORDS[name]["sha256"]
    assert record.known_tokens(same, sha256) == RECORDS[name]["tokens"]
    for change in (
        {"lr": 1.0},
        {"n_layer": 1},
        {"randomize_batches": True},
        {"grad_accum": 2},
        {"preset": ""},
        {"arch": "mla_moe"},
        {"dropout": 0.1},
        {"val_fraction": 0.1},
        {"target_loss": 1.0},
        {"weight_decay": 0.3},
        {"beta1": 0.1},
        {"clip_grad": 0.5},
        {"warmup_steps": 2},
    ):
        assert record.known_tokens(dataclasses.replace(same, **change), sha256) == 0, change
    assert record.known_tokens(same, "0" * 64) == 0


@pytest.mark.parametrize("name", RECORDS)
def test_the_published_figures_are_those_of_the_records(name):
    run = json.loads((ROOT / "records" / name / "run.json").read_text(encoding="utf-8"))
    assert RECORDS[name]["sha256"] == run["corpus"]["sha256"]
    assert RECORDS[name]["tokens"] == (run["tokens_to_target"] or 0)
    assert RECORDS[name]["seconds"] == round(run["seconds"])


# ---- run.json ----


@pytest.mark.parametrize(
    ("ended", "signum", "code"),
    [
        (None, 0, None),
        ("target reached", 0, 0),
        ("steps done", 0, 0),
        ("patience over", 0, 0),
        ("nothing to do", 0, 0),
        ("interrupted", 2, 130),
        ("interrupted", 15, 143),
        ("failed: the loss is nan", 0, 1),
    ],
)
def test_each_ending_has_its_exit_code(ended, signum, code):
    assert record.exit_code(ended, signum) == code


def test_what_json_has_no_word_for_becomes_null():
    odd = {"a": math.nan, "b": math.inf, "c": 1.5, "d": "nan", "e": None}
    assert record.as_json(odd) == {"a": None, "b": None, "c": 1.5, "d": "nan", "e": None}
