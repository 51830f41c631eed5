"""A run that starts from weights that were trained before: --init_from."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from conftest import PLAY, TINY, rows_of, same_weights, tiny_flags, weights_of

import export_hf
import train
from support.checkpoint import load_checkpoint, origin_of
from support.cli import UsageError
from support.settings import from_flags

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
import transformers


@pytest.fixture(scope="module")
def theirs():
    """A small GPT-2 of transformers, with weights drawn by its seed."""
    torch.manual_seed(3)
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=64, vocab_size=50257)
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained") / "gpt2"
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    """The best.pt of a run."""
    out_dir = tmp_path_factory.mktemp("before") / "out_before"
    train.train(train.TrainConfig(**{**TINY, "out_dir": str(out_dir), "steps": 45, "num_prompts": 0}))
    return out_dir / "checkpoints" / "best.pt"


SHAPE = ("n_layer", "n_head", "n_embd", "block_size")


def flags(out_dir, source, **changes) -> list[str]:
    """TINY as a command line that leaves the shape to the weights."""
    settings = {"out_dir": str(out_dir), "init_from": str(source), "num_prompts": 0, **TINY}
    for name in SHAPE:
        del settings[name]
    words = []
    for name, value in (settings | changes).items():
        words.append(f"--{name}")
        if value is not True:
            words.append(str(value))
    return words


def said(capsys, words) -> tuple[int, str]:
    """(exit code, the sentence); nothing was written."""
    capsys.readouterr()
    exit_code = train.main(words)
    err = capsys.readouterr().err
    assert err.startswith("train.py: ")
    assert err.count("\n") == 1
    out_dir = words[words.index("--out_dir") + 1]
    assert not os.path.exists(out_dir)
    return exit_code, err


# ---- the weights ----


@pytest.mark.parametrize("form", ["safetensors", "bin", "without prefix"])
def test_the_first_step_is_of_the_folders_weights(theirs, tmp_path, tokenizer, form):
    source = tmp_path / "gpt2"
    if form == "without prefix":
        theirs.transformer.save_pretrained(source)
    else:
        theirs.save_pretrained(source)
    if form == "bin":
        (source / "model.safetensors").unlink()
        torch.save(theirs.state_dict(), source / "pytorch_model.bin")
    assert train.main(flags(tmp_path / "out", source)) == 0
    tokens = torch.tensor(tokenizer.encode(PLAY.read_text(encoding="utf-8"))[:65])
    with torch.no_grad():
        first = theirs(tokens[:64].view(2, 32)).logits.flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(first, tokens[1:])
    rows = rows_of(tmp_path / "out")
    assert [int(row["step"]) for row in rows] == list(range(1, 7))
    assert float(rows[0]["loss"]) == pytest.approx(loss.item(), abs=1e-4)


def test_a_checkpoint_gives_its_weights_alone_to_a_new_run(best, tmp_path, make_trainer):
    config = from_flags(train.TrainConfig, flags(tmp_path / "out", best, seed=5))
    trainer = make_trainer(config)
    assert same_weights(trainer.model.state_dict(), load_checkpoint(best)["model"])
    assert trainer.progress.step == 0
    assert trainer.batcher.position == 0
    assert not trainer.optimizer.state_dict()["state"]


def test_what_was_exported_is_what_comes_back(best, tmp_path, make_trainer):
    assert export_hf.main(["--checkpoint", str(best), "--out_dir", str(tmp_path / "hf")]) == 0
    trainer = make_trainer(from_flags(train.TrainConfig, flags(tmp_path / "out", tmp_path / "hf")))
    assert same_weights(trainer.model.state_dict(), load_checkpoint(best)["model"])


# ---- the settings ----


def test_the_shape_is_that_of_the_weights(folder, tmp_path):
    config = from_flags(
        train.TrainConfig, ["--init_from", str(folder), "--input_file", str(PLAY), "--device", "cpu", "--steps", "5"]
    )
    assert [getattr(config, name) for name in SHAPE] == [2, 2, 16, 64]


def test_windows_are_no_longer_than_the_context(folder, tmp_path):
    words = ["--init_from", str(folder), "--input_file", str(PLAY), "--device", "cpu", "--steps", "5"]
    assert from_flags(train.TrainConfig, words).seq_len == 64
    assert from_flags(train.TrainConfig, [*words, "--seq_len", "32"]).seq_len == 32
    with pytest.raises(UsageError, match="seq_len 65 is over block_size 64"):
        from_flags(train.TrainConfig, [*words, "--seq_len", "65"])


def test_a_longer_context_leaves_the_default_window(folder, tmp_path):
    longer = shutil.copytree(folder, tmp_path / "longer")
    config = json.loads((folder / "config.json").read_text())
    (longer / "config.json").write_text(json.dumps(config | {"n_positions": 2048}))
    found = from_flags(
        train.TrainConfig, ["--init_from", str(longer), "--input_file", str(PLAY), "--device", "cpu", "--steps", "5"]
    )
    assert (found.block_size, found.seq_len) == (2048, train.TrainConfig.seq_len)


def test_a_flag_that_says_the_same_is_no_conflict(folder, tmp_path):
    assert from_flags(train.TrainConfig, flags(tmp_path / "out", folder, n_layer=2, tokenizer="gpt2")).n_layer == 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"n_layer": 5}, "n_layer 5 isn't 2, which {} has: leave --n_layer out"),
        ({"block_size": 32}, "block_size 32 isn't 64, which {} has: leave --block_size out"),
        ({"tokenizer": "char"}, "tokenizer char isn't gpt2, which {} has: leave --tokenizer out"),
        ({"n_layer": "two"}, "n_layer 'two' isn't a whole number: use something like 12"),
    ],
)
def test_a_flag_that_says_otherwise_is_one_sentence(folder, tmp_path, capsys, changes, sentence):
    exit_code, err = said(capsys, flags(tmp_path / "out", folder, **changes))
    assert exit_code == 2
    assert err == f"train.py: {sentence.format(folder)}\n"


def test_a_preset_of_another_shape_is_not_passed_over(folder, tmp_path, capsys):
    words = ["--out_dir", str(tmp_path / "out"), "--init_from", str(folder), "--preset", "gpt2-medium"]
    assert train.main(words) == 2
    assert f"preset gpt2-medium has n_layer 24, and {folder} has 2: use --preset fine" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_preset_for_it_needs_no_other_flag(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--init_from", str(folder), "--preset", "finetune", "--input_file", str(PLAY), "--device", "cpu"]
    assert train.main([*words, "--amp", "off", "--no_mfu", "--num_prompts", "0", "--recall_places", "0"]) == 0
    record = json.loads((tmp_path / "out_finetune" / "run.json").read_text())
    assert record["ended"] == "steps done"
    assert record["config"]["optimizer"] == "adamw"
    assert record["config"]["lr"] == 3e-5
    assert record["tokens"] >= 3 * (record["corpus"]["tokens"] - 1)


# ---- a model of characters ----


@pytest.fixture(scope="module")
def characters(tmp_path_factory):
    """(last.pt, its text)"""
    base = tmp_path_factory.mktemp("characters")
    text = base / "text.txt"
    text.write_text("abc abc\n" * 200)
    settings = {"out_dir": str(base / "out"), "num_prompts": 0, "tokenizer": "char", "input_file": str(text)}
    train.train(train.TrainConfig(**{**TINY, **settings}))
    return base / "out" / "checkpoints" / "last.pt", text


def test_a_model_of_characters_is_trained_further_on_a_text_of_the_same(characters, tmp_path):
    last, _ = characters
    (tmp_path / "other.txt").write_text("cab a\n" * 200)
    words = flags(tmp_path / "out", last, input_file=str(tmp_path / "other.txt"), steps=2)
    assert train.main(words) == 0
    assert load_checkpoint(tmp_path / "out" / "checkpoints" / "last.pt")["tokenizer"]["name"] == "char"


@pytest.mark.parametrize("text", ["abd abd\n", "abc abc d\n", "ab ab\n"])
def test_a_text_of_other_characters_is_one_sentence(characters, tmp_path, capsys, text):
    """Also where they are as many: each id would stand for another character."""
    last, _ = characters
    (tmp_path / "other.txt").write_text(text * 200)
    exit_code, err = said(capsys, flags(tmp_path / "out", last, input_file=str(tmp_path / "other.txt")))
    assert exit_code == 2
    assert "knows other characters than the text has" in err


# ---- going on with such a run ----


def test_a_run_that_was_stopped_and_resumed_is_the_run_that_was_not(folder, tmp_path):
    assert train.main(flags(tmp_path / "whole", folder)) == 0
    words = flags(tmp_path / "out", folder, save_every=3)
    assert train.main([*words, "--steps", "6"]) == 0
    previous = tmp_path / "out" / "checkpoints" / "previous.pt"
    assert load_checkpoint(previous)["step"] == 3
    assert train.main(["--resume", str(previous)]) == 0
    assert same_weights(weights_of(tmp_path / "out"), weights_of(tmp_path / "whole"))


def test_auto_starts_from_the_weights_where_there_is_no_run_and_else_goes_on(folder, tmp_path):
    words = [*flags(tmp_path / "out", folder), "--resume", "auto"]
    assert train.main(words) == 0
    assert train.main(flags(tmp_path / "plain", folder)) == 0
    assert same_weights(weights_of(tmp_path / "out"), weights_of(tmp_path / "plain"))
    assert train.main([*words, "--steps", "8"]) == 0
    assert [int(row["step"]) for row in rows_of(tmp_path / "out")] == list(range(1, 9))


def test_going_on_needs_the_folder_no_more(folder, tmp_path):
    source = shutil.copytree(folder, tmp_path / "gpt2")
    words = [*flags(tmp_path / "out", source), "--resume", "auto"]
    assert train.main(words) == 0
    shutil.rmtree(source)
    assert train.main(["--resume", str(tmp_path / "out" / "checkpoints" / "last.pt"), "--steps", "8"]) == 0
    assert train.main([*words, "--steps", "9"]) == 0


def test_weights_to_start_from_and_a_checkpoint_to_go_on_from_exclude_each_other(folder, tmp_path, capsys):
    assert train.main(flags(tmp_path / "run", folder)) == 0
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    exit_code, err = said(capsys, [*flags(tmp_path / "out", folder), "--resume", str(last)])
    assert exit_code == 2
    assert err == "train.py: init_from starts a run, and resume goes on with one: give one of them\n"


@pytest.mark.parametrize("started_from", ["random weights", "other weights"])
def test_auto_does_not_go_on_with_a_run_that_started_otherwise(folder, best, tmp_path, capsys, started_from):
    words = flags(tmp_path / "out", best)
    if started_from == "random weights":
        words = tiny_flags(tmp_path / "out", num_prompts=0)
    assert train.main(words) == 0
    capsys.readouterr()
    assert train.main([*flags(tmp_path / "out", folder), "--resume", "auto"]) == 2
    start = "random weights" if started_from == "random weights" else "out_before/checkpoints/best.pt"
    assert f"isn't where the checkpoint's run started ({start})" in capsys.readouterr().err


# ---- where the weights came from ----


def test_all_that_a_run_leaves_says_where_its_weights_came_from(folder, tmp_path):
    out = tmp_path / "out"
    assert train.main(flags(out, folder, steps=45)) == 0
    assert train.main(["--resume", str(out / "checkpoints" / "last.pt"), "--steps", "50"]) == 0
    assert load_checkpoint(out / "checkpoints" / "last.pt")["origin"] == "gpt2"
    assert load_checkpoint(out / "checkpoints" / "best.pt")["origin"] == "gpt2"
    record = json.loads((out / "run.json").read_text())
    assert record["origin"] == "gpt2"
    assert len(record["resumed"]) == 1
    assert (out / "logs" / "train.log").read_text().count("| Weights: from gpt2\n") == 2
    words = ["--checkpoint", str(out / "checkpoints" / "last.pt"), "--out_dir", str(tmp_path / "hf")]
    assert export_hf.main(words) == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "from the weights in `gpt2`" in card
    assert "from-scratch" not in card


def test_of_a_checkpoint_the_run_is_named_too_and_no_more_of_the_path(best, folder):
    assert origin_of(str(best)) == "out_before/checkpoints/best.pt"
    assert origin_of(str(folder)) == "gpt2"
    assert origin_of(f"{folder}/") == "gpt2"


def test_a_run_from_scratch_has_no_origin(best):
    assert load_checkpoint(best)["origin"] == ""


# ---- problems ----


@pytest.fixture
def odd(folder, tmp_path):
    """odd(**changes) -> a copy of the folder whose config.json says otherwise."""

    def make(**changes):
        copy = shutil.copytree(folder, tmp_path / "odd")
        config = json.loads((folder / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | changes))
        return copy

    return make


@pytest.mark.parametrize(
    ("changes", "exit_code", "sentence"),
    [
        ({"activation_function": "relu"}, 2, "isn't a GPT-2 that train.py can be: it has activation_function 'relu'"),
        ({"vocab_size": 5}, 2, "it has vocab_size 5"),
        ({"tie_word_embeddings": False}, 2, "it has tie_word_embeddings False"),
        ({"n_embd": None}, 2, "has no config.json of a GPT-2"),
        ({"n_layer": 3}, 1, "don't fit the shape it names"),
        ({"n_embd": 32}, 1, "don't fit the shape it names"),
    ],
)
def test_what_is_no_gpt2_is_one_sentence(odd, tmp_path, capsys, changes, exit_code, sentence):
    code, err = said(capsys, flags(tmp_path / "out", odd(**changes)))
    assert code == exit_code
    assert sentence in err


def test_weights_that_are_missing_or_broken_are_one_sentence(odd, tmp_path, capsys):
    source = odd()
    (source / "model.safetensors").write_bytes(b"x" * 100)
    code, err = said(capsys, flags(tmp_path / "out", source))
    assert code == 1
    assert "can't be read" in err
    (source / "model.safetensors").unlink()
    code, err = said(capsys, flags(tmp_path / "out", source))
    assert code == 1
    assert "has neither model.safetensors nor pytorch_model.bin" in err


def test_a_vocabulary_of_its_own_is_one_sentence(odd, tmp_path, capsys):
    source = odd()
    (source / "vocab.json").write_text(json.dumps({"hola": 0}))
    code, err = said(capsys, flags(tmp_path / "out", source))
    assert code == 2
    assert "has a vocabulary of its own" in err


def test_a_place_that_is_nothing_of_the_kind_is_one_sentence(tmp_path, capsys):
    code, err = said(capsys, flags(tmp_path / "out", tmp_path / "nowhere"))
    assert code == 2
    assert "nowhere doesn't exist" in err
    code, err = said(capsys, flags(tmp_path / "out", tmp_path))
    assert code == 2
    assert "has no config.json of a GPT-2" in err
    code, err = said(capsys, flags(tmp_path / "out", PLAY))
    assert code == 1
    assert "is damaged or isn't a checkpoint" in err
    code, err = said(
        capsys, ["--out_dir", str(tmp_path / "out"), "--input_file", str(PLAY), "--steps", "5", "--init_from"]
    )
    assert code == 2
    assert "--init_from needs a value" in err


def test_a_checkpoint_that_lacks_its_shape_is_one_sentence(best, tmp_path, capsys):
    saved = load_checkpoint(best)
    for odd in ({"n_layer": 1}, saved["config"] | {"block_size": "x"}):
        torch.save(saved | {"config": odd}, tmp_path / "odd.pt")
        code, err = said(capsys, flags(tmp_path / "out", tmp_path / "odd.pt"))
        assert code == 1
        assert "lacks what a model needs" in err
