"""TrainConfig: names, defaults, presets, and each problem with its remedy."""

from __future__ import annotations

import pytest
from conftest import PLAY, ROOT

import train
from support import cli
from support.cli import UsageError
from support.presets import PRESETS
from support.settings import from_flags

# The command line that users have in their notes: a name or a default may only change on purpose.
CONTRACT = {
    "input_file": "data/input.txt",
    "out_dir": "out",
    "seed": 1337,
    "block_size": 1024,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "batch_size": 8,
    "seq_len": 256,
    "grad_accum": 1,
    "steps": None,
    "optimizer": "adamw",
    "lr": 3e-4,
    "embed_lr": 0.0,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "clip_grad": 1.0,
    "randomize_batches": False,
    "shift_windows": False,
    "target_loss": 0.1,
    "log_every": 10,
    "save_every": None,
    "sample_every": None,
    "resume": "",
    "prompt": "BIANCA:\n",
    "num_prompts": 2,
    "max_new_tokens": 200,
    "top_k": 50,
    "temperature": 0.9,
    "compile": False,
    "amp": "auto",
}


def problems_of(config: train.TrainConfig) -> list[str]:
    with pytest.raises(UsageError) as caught:
        config.validate()
    return caught.value.problems


@pytest.mark.parametrize("name", CONTRACT)
def test_flags_keep_their_names_and_defaults(name):
    assert getattr(train.TrainConfig(), name) == CONTRACT[name]


def test_every_setting_explains_itself():
    assert all(one.metadata["help"] for one in cli.fields_of(train.TrainConfig).values())


# ---- problems ----


def test_a_sound_configuration_passes(tiny):
    tiny().validate()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"n_embd": 770, "n_head": 12}, "n_embd 770 isn't divisible by n_head 12: try 768"),
        ({"seq_len": 65}, "seq_len 65 is over block_size 64: use at most that"),
        ({"lr": -1.0}, "lr -1.0 is too small: use a number over 0"),
        ({"lr": float("nan")}, "lr nan isn't a finite number"),
        ({"batch_size": 0}, "batch_size 0 is too small: use 1 or more"),
        ({"grad_accum": -2}, "grad_accum -2 is too small"),
        ({"beta2": 1.0}, "beta2 1.0 is too large: use a number under 1"),
        ({"dropout": 1.0}, "dropout 1.0 is too large"),
        ({"target_loss": -0.1}, "target_loss -0.1 is too small"),
        ({"steps": None}, "the run has no length: give --steps N or --epochs N"),
        ({"epochs": 2.0}, "steps and epochs exclude each other"),
        ({"steps_per_epoch": 5}, "steps_per_epoch is for runs by epochs: add --epochs N"),
        ({"warmup_steps": 7}, "warmup_steps 7 is over steps 6"),
        ({"patience": 3}, "patience and best_by val need held-out text: add --val_fraction 0.1"),
        ({"best_by": "val"}, "patience and best_by val need held-out text"),
        ({"preset": "demoo"}, "preset 'demoo' is unknown: did you mean demo?"),
        ({"amp": "fp17"}, "amp 'fp17' is unknown: did you mean fp16?"),
        ({"amp": "fp16"}, "amp fp16 on a CPU is about a thousand times slower than fp32: use --amp auto"),
        ({"device": "tpu"}, "device 'tpu' is unknown"),
        ({"seed": 2**32}, "seed 4294967296 is too large"),
        ({"lr": "fast"}, "lr 'fast' isn't of type float"),
        ({"input_file": ""}, "input_file (empty) doesn't exist"),
        ({"out_dir": ""}, "out_dir is empty: name a folder for the run"),
        ({"out_dir": __file__ + "/run"}, "out_dir"),
        ({"out_dir": "x" * 5000}, "out_dir"),
        ({"resume": "auto", "overwrite": True}, "resume and overwrite exclude each other"),
        ({"init_from": "elsewhere", "resume": "last.pt"}, "init_from starts a run, and resume goes on with one"),
        ({"input_file": "nowhere.txt"}, "input_file nowhere.txt doesn't exist"),
        ({"input_file": str(ROOT / "assets")}, f"input_file {ROOT / 'assets'} is a folder without .txt files"),
        ({"input_file": ("data/sample.txt", "nowhere.txt")}, "input_file nowhere.txt doesn't exist"),
        ({"input_file": ("data/sample.txt", 7)}, "input_file ('data/sample.txt', 7) isn't of type str"),
    ],
)
def test_each_problem_has_its_sentence(tiny, changes, sentence):
    (problem,) = problems_of(tiny(**changes))
    assert problem.startswith(sentence)


def test_problems_are_reported_all_at_once(tiny):
    problems = problems_of(tiny(lr=-1.0, n_embd=17, seq_len=65, input_file="nowhere.txt"))
    assert [problem.split()[0] for problem in problems] == ["lr", "n_embd", "seq_len", "input_file"]


def test_a_warm_up_longer_than_the_epochs_is_a_usage_error(tiny):
    """How long an epoch is, is known only when the text is."""
    with pytest.raises(UsageError, match="warmup_steps 500 is over steps 40"):
        train.train(tiny(steps=None, epochs=1.0, warmup_steps=500))


def test_an_existing_run_is_not_overwritten_silently(tiny, tmp_path):
    (tmp_path / "out" / "logs").mkdir(parents=True)
    (tmp_path / "out" / "logs" / "train.log").touch()
    (problem,) = problems_of(tiny())
    assert "--resume auto" in problem
    assert "--overwrite" in problem
    tiny(overwrite=True).validate()
    tiny(resume="auto").validate()
    (problem,) = problems_of(tiny(resume=str(tmp_path / "other" / "checkpoints" / "last.pt")))
    assert "already holds a run" in problem


# ---- what is left open ----


def test_what_is_left_open_follows_the_length_of_the_run(tiny):
    long = tiny(steps=200_000).completed(100, 1)
    assert (long.warmup_steps, long.eval_every, long.save_every, long.sample_every) == (300, 1000, 1000, 1000)
    short = tiny(steps=50).completed(100, 1)
    assert (short.warmup_steps, short.eval_every, short.save_every, short.sample_every) == (5, 5, 5, 100)
    one = tiny(steps=1).completed(100, 1)
    assert (one.warmup_steps, one.eval_every, one.save_every) == (0, 1, 1)


def test_what_is_given_stays_as_it_is(tiny):
    given = {"warmup_steps": 3, "eval_every": 4, "save_every": 6, "sample_every": 7}
    completed = tiny(steps=50, **given).completed(100, 1)
    assert {name: getattr(completed, name) for name in given} == given


def test_epochs_become_steps(tiny):
    assert tiny(steps=None, epochs=1.5).completed(101, 2).steps == 76  # 151.5 batches, two a step
    assert tiny(steps=None, epochs=2.5, steps_per_epoch=8).completed(101, 2).steps == 20
    assert tiny(steps=None, epochs=27).completed(7, 3).steps == 63  # and not 64, as 27 * (7 / 3) is just over 63
    assert tiny(steps=None, epochs=1e-9).completed(7, 3).steps == 1


# ---- presets ----


@pytest.mark.parametrize("preset", PRESETS)
def test_a_short_trial_of_any_preset_needs_no_other_flag(preset, tmp_path):
    run_dir = str(tmp_path / "run")
    flags = ["--preset", preset, "--steps", "5", "--device", "cpu", "--out_dir", run_dir]
    from_flags(train.TrainConfig, flags).completed(100, 1)  # neither complains


def test_the_published_run_warms_up_in_60_steps(tmp_path):
    config = from_flags(train.TrainConfig, ["--preset", "shakespeare", "--out_dir", str(tmp_path / "run")])
    assert config.completed(100, 1).warmup_steps == 60


def test_the_other_name_of_a_preset_is_the_same_preset(tmp_path):
    words = ["--out_dir", str(tmp_path / "run"), "--input_file", str(PLAY), "--device", "cpu"]
    configs = [from_flags(train.TrainConfig, ["--preset", name, *words]) for name in ("muon", "shakespeare")]
    assert configs[0] == configs[1]
    assert configs[0].optimizer == "muon"


@pytest.mark.parametrize(
    "words", [["--resume"], ["--resume", "nowhere.pt"], ["--init_from"], ["--init_from", "nowhere"]]
)
def test_a_place_that_cannot_be_read_hides_no_other_problem(words):
    """Nothing is known then of the settings below the flags, so that no length is asked for."""
    with pytest.raises(UsageError) as caught:
        from_flags(train.TrainConfig, ["--stepz", "5", "--lr", "-1", "--n_head", "many", *words])
    problems = caught.value.problems
    assert [problem for problem in problems if "Unreadable" in problem] == []
    for word in ("--stepz is unknown", "lr -1.0 is too small", "n_head 'many' isn't a whole number"):
        assert any(problem.startswith(word) for problem in problems), word
