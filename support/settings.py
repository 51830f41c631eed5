"""From a command line to the settings of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from support import cli, pretrained, record
from support.cli import UsageError
from support.presets import OTHER_NAMES, PRESETS
from support.rundir import RunDirectory


def flags_of_experts(config) -> Iterator[tuple[str, str]]:
    """Yields (a flag that needs --arch mla_moe, what to do about it)."""
    for name in ("n_expert", "n_expert_active", "expert_width", "balance_rate"):
        if getattr(config, name) != getattr(type(config), name):
            yield f"{name} arch", f"{name} is for --arch mla_moe: add that, or leave --{name} out"


def problems_of_length(config) -> Iterator[tuple[str, str]]:
    """Yields (settings of a run's length that don't go together, what to do about it)."""
    if not (config.steps or config.epochs):
        yield "steps epochs", record.NO_LENGTH
    if config.steps and config.epochs:
        yield "steps epochs", "steps and epochs exclude each other: give one of them"
    if config.steps_per_epoch and not config.epochs:
        yield "steps_per_epoch epochs", "steps_per_epoch is for runs by epochs: add --epochs N, or leave it out"
    if config.steps and config.warmup_steps and config.warmup_steps > config.steps:
        yield "steps warmup_steps", record.late_warmup(config)


def from_flags(kind: type, argv: Sequence[str]):
    """Settings of `kind`, which is train.py's TrainConfig: defaults, overridden by the preset or, on resuming, by the
    checkpoint's settings, overridden by the flags given.

    Raises UsageError with all problems of the flags at once; RunError for a checkpoint that can't be read."""
    fields = cli.fields_of(kind)
    given = cli.read_flags(kind, argv)
    problems = [value.problem for name, value in given.items() if name not in fields]
    known = {name: value for name, value in given.items() if name in fields}
    readable = {name: value for name, value in known.items() if not isinstance(value, cli.Unreadable)}
    if "prompt" in readable:
        known["prompt"] = cli.unescape(readable["prompt"])
    if readable.get("preset") in OTHER_NAMES:
        known["preset"] = readable["preset"] = OTHER_NAMES[readable["preset"]]
    try:
        config = dataclasses.replace(kind(), **(base_settings(kind, readable) | known))
        problems += cli.settings_problems(config)
    except UsageError as e:  # without what stands below the flags, only each of them by itself can be judged
        problems += e.problems
        problems += cli.value_problems(dataclasses.replace(kind(), **known)).values()
    if problems:
        raise UsageError(*problems)
    return config


def base_settings(kind: type, given: dict) -> dict:
    """What stands below the flags: the preset's settings and the shape of weights to start from or, on resuming, the
    checkpoint's settings. Raises UsageError or RunError for a place that can't be read."""
    base = dict(PRESETS.get(given.get("preset"), {}))
    out_dir = given.get("out_dir") or base.get("out_dir") or kind.out_dir
    saved = RunDirectory(out_dir).saved_settings(given.get("resume", ""), "grad_accum" in given)
    if saved:
        fields = cli.fields_of(kind)
        base = {name: value for name, value in saved.items() if name in fields}
    elif given.get("init_from"):
        base = pretrained.with_shape(given["init_from"], {"seq_len": kind.seq_len, **base}, given)
    # a given length replaces the one below it, and a preset's warm-up, which was meant for that
    if "steps" in given:
        base |= {"epochs": None, "steps_per_epoch": None}
    elif "epochs" in given:
        base["steps"] = None
    if not saved and given.keys() & {"steps", "epochs"}:
        base.pop("warmup_steps", None)
    return base
