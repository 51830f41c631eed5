"""Settings: names, defaults, presets, and problems reported all at once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import train

# The command line that users have in their notes: a name or a default may only change on purpose.
CONTRACT = {
    "input_file": "data/input.txt",
    "out_dir": "out",
    "seed": 1337,
    "block_size": 1024,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "batch_size": 16,
    "seq_len": 256,
    "grad_accum": 1,
    "steps": 1300,
    "optimizer": "muon",
    "lr": 2.5e-3,
    "embed_lr": 0.0,
    "weight_decay": 0.0,
    "beta1": 0.9,
    "beta2": 0.95,
    "clip_grad": 1.0,
    "randomize_batches": False,
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
    with pytest.raises(train.UsageError) as caught:
        config.validate()
    return caught.value.problems


def flag_problems(*argv: str) -> list[str]:
    with pytest.raises(train.UsageError) as caught:
        train.config_from_flags(argv)
    return caught.value.problems


@pytest.mark.parametrize("name", CONTRACT)
def test_flags_keep_their_names_and_defaults(name):
    assert getattr(train.TrainConfig(), name) == CONTRACT[name]


def test_every_setting_explains_itself():
    assert all(f.metadata["help"] for f in train.FIELDS.values())


@pytest.mark.parametrize("preset", train.PRESETS)
def test_a_short_trial_of_any_preset_needs_no_other_flag(preset, tmp_path):
    run_dir = str(tmp_path / "run")
    train.config_from_flags(["--preset", preset, "--steps", "5", "--device", "cpu", "--out_dir", run_dir]).validate()


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
        ({"warmup_steps": 7}, "warmup_steps 7 is over steps 6"),
        ({"preset": "demoo"}, "preset 'demoo' is unknown: did you mean demo?"),
        ({"amp": "fp17"}, "amp 'fp17' is unknown: did you mean fp16?"),
        ({"amp": "fp16"}, "amp fp16 on a CPU is about a thousand times slower than fp32: use --amp auto"),
        ({"device": "tpu"}, "device 'tpu' is unknown"),
        ({"seed": 2**32}, "seed 4294967296 is too large"),
        ({"lr": "fast"}, "lr 'fast' isn't of type float"),
        ({"input_file": ""}, "input_file (empty) doesn't exist"),
        ({"out_dir": __file__ + "/run"}, "out_dir"),
        ({"out_dir": "x" * 5000}, "out_dir"),
        ({"resume": "auto", "overwrite": True}, "resume and overwrite exclude each other"),
        ({"input_file": "nowhere.txt"}, "input_file nowhere.txt doesn't exist"),
        ({"input_file": "assets"}, "input_file assets is a folder without .txt files"),
        ({"input_file": ("data/sample.txt", "nowhere.txt")}, "input_file nowhere.txt doesn't exist"),
        ({"input_file": ("data/sample.txt", 7)}, "input_file ('data/sample.txt', 7) isn't of type str"),
    ],
)
def test_each_problem_has_its_sentence(tiny, changes, sentence):
    (problem,) = problems_of(tiny(**changes))
    assert problem.startswith(sentence)


def test_problems_are_reported_all_at_once(tiny):
    problems = problems_of(tiny(lr=-1.0, n_embd=17, seq_len=65, input_file="nowhere.txt"))
    assert [p.split()[0] for p in problems] == ["lr", "n_embd", "seq_len", "input_file"]


def test_unreadable_flags_and_unsound_values_are_reported_together():
    problems = flag_problems("--stepz", "5", "--lr", "fast", "--n_embd", "770", "--batch_size", "-1", "--seed")
    assert {p.split()[0].lstrip("-") for p in problems} == {"stepz", "lr", "n_embd", "batch_size", "seed"}
    assert "--stepz is unknown: did you mean --steps?" in problems


def test_a_value_that_cannot_be_read_causes_no_second_complaint():
    assert len(flag_problems("--steps", "many", "--input_file", __file__)) == 1


def test_a_negative_number_is_a_value_and_not_a_flag(tmp_path):
    argv = ["--preset", "demo", "--out_dir", str(tmp_path / "run"), "--lr", "-3e-4"]
    assert flag_problems(*argv) == ["lr -0.0003 is too small: use a number over 0"]


def test_explicit_flags_win_over_the_preset(tmp_path):
    config = train.config_from_flags(["--preset", "demo", "--lr", "1e-5", "--out_dir", str(tmp_path / "run")])
    assert (config.lr, config.batch_size) == (1e-5, train.PRESETS["demo"]["batch_size"])


def test_a_given_length_replaces_the_one_of_the_preset(tmp_path):
    config = train.config_from_flags(["--preset", "demo", "--epochs", "2", "--out_dir", str(tmp_path / "run")])
    assert (config.steps, config.epochs) == (None, 2.0)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--compile=yes"], "--compile=yes takes no value"),
        (["--epochs", "inf"], "epochs inf isn't a finite number"),
        (["--prompt", "caf\udce9"], "prompt 'caf\\udce9' isn't UTF-8"),
        (["word"], "'word' stands alone"),
    ],
)
def test_odd_flags_have_their_sentence_beside_the_others(argv, sentence, tmp_path):
    first, second = flag_problems("--preset", "demo", "--out_dir", str(tmp_path / "run"), *argv, "--lr", "-1")
    assert sentence in first + second and "lr -1.0 is too small" in first + second


def test_the_prompt_takes_escapes(tmp_path):
    argv = ["--preset", "demo", "--out_dir", str(tmp_path / "run"), "--prompt", r"TILDA:\n\tA\\n"]
    assert train.config_from_flags(argv).prompt == "TILDA:\n\tA\\n"


def test_switches_can_be_turned_off(tmp_path):
    argv = ["--preset", "demo", "--out_dir", str(tmp_path / "run"), "--compile", "--no-compile"]
    assert train.config_from_flags(argv).compile is False


def test_what_is_left_open_follows_the_length_of_the_run(tiny):
    long = tiny(steps=200_000).resolved(100, 1)
    assert (long.warmup_steps, long.save_every, long.sample_every) == (300, 1000, 1000)
    short = tiny(steps=50).resolved(100, 1)
    assert (short.warmup_steps, short.save_every, short.sample_every) == (5, 5, 100)
    assert tiny(steps=train.TrainConfig.steps).resolved(100, 1).warmup_steps == 60  # as in the published run
    assert tiny(steps=50, sample_every=7).resolved(100, 1).sample_every == 7
    assert tiny(steps=None, epochs=1.5).resolved(101, 2).steps == 76  # 151.5 batches, two a step


def test_an_existing_run_is_not_overwritten_silently(tiny, tmp_path):
    (tmp_path / "out" / "logs").mkdir(parents=True)
    (tmp_path / "out" / "logs" / "train.log").touch()
    (problem,) = problems_of(tiny())
    assert "--resume auto" in problem and "--overwrite" in problem
    tiny(overwrite=True).validate()
    tiny(resume="auto").validate()
    (problem,) = problems_of(tiny(resume=str(tmp_path / "other" / "checkpoints" / "last.pt")))
    assert "already holds a run" in problem


NUMBERS = st.one_of(st.integers(-5, 5), st.floats(), st.none(), st.text(max_size=3))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(train.FIELDS)), NUMBERS), max_size=5))
def test_no_flags_ever_end_in_a_traceback(pairs):
    argv = [part for name, value in pairs for part in ((f"--{name}",) if value is None else (f"--{name}", str(value)))]
    try:
        train.config_from_flags(argv)
    except (train.UsageError, train.RunError) as e:
        assert str(e)
    except SystemExit as e:  # -h
        assert e.code == 0


def test_input_file_may_be_given_several_times(tmp_path):
    sample, license_ = str(train.HERE / "data" / "sample.txt"), str(train.HERE / "LICENSE")
    flags = ["--input_file", sample, "--input_file", license_, "--out_dir", str(tmp_path / "out")]
    assert train.config_from_flags(flags).input_file == (sample, license_)
    assert train.config_from_flags(flags[2:]).input_file == license_
