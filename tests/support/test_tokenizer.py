"""A tokenizer from a file: trained, used in a run, resumed, sampled, exported, and what won't do as one."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import shutil

import pytest
import torch
from conftest import PLAY, ROOT, TINY, log_of, rows_of, same_weights, tiny_flags, weights_of, without_times

import export_hf
import sample
import train
from support.checkpoint import load_checkpoint, load_model
from support.cli import UsageError
from support.inference import generate
from support.text import load_text
from support.tokenizer import END_OF_TEXT, load_tokenizer, saved_tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
import transformers

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(ROOT / "tools"))
    train_tokenizer = importlib.import_module("train_tokenizer")

ALPHABETS = "".join(map(chr, range(1, 0x250)))
HARD_TEXTS = ["", "a\r\n\tb  ", "Ünïcödé 🎭 \u200b中文", f"as a text: {END_OF_TEXT}", ALPHABETS]


def trained(path, vocab_size=400, *flags) -> int:
    words = ["--input_file", str(PLAY), "--vocab_size", str(vocab_size), "--out", str(path)]
    return train_tokenizer.main([*words, *flags])


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    assert trained(path) == 0
    return path


@pytest.fixture(scope="module")
def run(file, tmp_path_factory):
    """(the run directory, the exported folder) of a model with such a tokenizer. The file is gone afterwards."""
    base = tmp_path_factory.mktemp("run")
    copy = shutil.copyfile(file, base / "moved.json")
    settings = {**TINY, "tokenizer": str(copy), "out_dir": str(base / "out"), "num_prompts": 1, "val_fraction": 0.1}
    train.train(train.TrainConfig(**settings))
    copy.unlink()
    last = str(base / "out" / "checkpoints" / "last.pt")
    assert export_hf.main(["--checkpoint", last, "--out_dir", str(base / "hf")]) == 0
    return base / "out", base / "hf"


# ---- training one ----


def test_training_a_tokenizer_twice_gives_the_same_bytes(file, tmp_path):
    assert trained(tmp_path / "again.json") == 0
    assert (tmp_path / "again.json").read_bytes() == file.read_bytes()
    assert load_tokenizer(str(file)).vocab_size == 400


def test_merges_shorten_the_text(file, tmp_path):
    text = PLAY.read_text(encoding="utf-8")
    assert trained(tmp_path / "bytes.json", 257) == 0
    lengths = [len(load_tokenizer(str(path)).encode(text)) for path in (tmp_path / "bytes.json", file)]
    assert lengths[0] == len(text.encode())
    assert lengths[1] < 0.7 * lengths[0]


def test_a_text_without_more_pairs_gives_a_smaller_vocabulary(tmp_path, capsys):
    (tmp_path / "short.txt").write_text("aab aab")
    words = ["--vocab_size", "300", "--out", str(tmp_path / "tokenizer.json")]
    assert train_tokenizer.main(["--input_file", str(tmp_path / "short.txt"), *words]) == 0
    size = load_tokenizer(str(tmp_path / "tokenizer.json")).vocab_size
    assert 257 < size < 300
    assert f"no more pairs to merge than for {size} tokens" in capsys.readouterr().out


def test_what_the_trainer_cannot_do_is_told_at_once(tmp_path, file, capsys):
    assert train_tokenizer.main(["--input_file", "nowhere.txt", "--vocab_size", "9", "--out", str(file)]) == 2
    err = capsys.readouterr().err
    for sentence in ("nowhere.txt doesn't exist", "vocab_size 9 is out of bounds", f"{file} exists: add --overwrite"):
        assert sentence in err
    assert trained(tmp_path) == 2
    assert "is a folder" in capsys.readouterr().err


# ---- as a tokenizer ----


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_every_text_comes_back_as_it_was(file, text):
    tokenizer = load_tokenizer(str(file))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_text not in ids
    assert b"".join(tokenizer.decode_bytes([i]) for i in ids) == text.encode()  # also token by token


def test_texts_are_kept_apart_by_the_tokenizers_own_token(file, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "in" / name).write_text("Come in.")
    tokenizer, corpus = load_text(str(tmp_path / "in"), str(file))
    one = tokenizer.encode("Come in.")
    assert corpus.tokens.tolist() == [*one, tokenizer.end_of_text, *one]


def test_ids_in_the_cache_are_of_this_tokenizer_alone(file, tmp_path):
    assert trained(tmp_path / "other.json", 300) == 0
    ids = []
    for path in (file, tmp_path / "other.json", file):
        _, corpus = load_text(str(PLAY), str(path), str(tmp_path / "cache"))
        ids.append(corpus.tokens.tolist())
    assert ids[0] == ids[2] != ids[1]


def test_settings_of_transformers_beside_it_say_which_token_ends_a_text(file, tmp_path):
    content = json.loads(file.read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 400, "content": "<stop>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(str(tmp_path)).end_of_text == 0
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<stop>"}}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.end_of_text, tokenizer.vocab_size) == (400, 401)
    assert tokenizer.decode([400]) == "<stop>"


def without_byte_level(content):
    content["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}


def without_an_end(content):
    content["added_tokens"] = []
    content["model"]["vocab"]["\u0100\u0100"] = content["model"]["vocab"].pop(END_OF_TEXT)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without_byte_level, "isn't byte-level"),
        (without_an_end, "has no token that ends a text"),
        (lambda content: content["model"]["vocab"].update({"\u20ac": 400}), "won't do ('\u20ac')"),  # no byte
        (lambda content: content.pop("model"), "isn't a tokenizer.json"),
    ],
)
def test_a_file_that_will_not_do_is_one_sentence(file, tmp_path, capsys, spoil, words):
    content = json.loads(file.read_text())
    spoil(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert train.main(tiny_flags(tmp_path / "out", tokenizer=tmp_path / "tokenizer.json")) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_more_tokens_than_16_bits_can_number_are_refused(file, monkeypatch):
    monkeypatch.setattr("support.tokenizer.MOST", 399)
    with pytest.raises(UsageError, match="it has 400 tokens, and 399 are the most"):
        load_tokenizer(str(file))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.json", "tokenizer nowhere.json is neither gpt2 nor char, and there is no such file"),
        ("", "tokenizer (empty) is neither gpt2 nor char"),
        (str(ROOT / "data"), "is a folder without a tokenizer.json"),
    ],
)
def test_a_path_without_a_tokenizer_is_a_problem_of_the_flags(tiny, name, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        tiny(tokenizer=name).validate()


# ---- in a run ----


def test_the_checkpoint_holds_the_whole_file(file, run):
    state = load_checkpoint(run[0] / "checkpoints" / "best.pt")["tokenizer"]
    assert state["tokenizer_json"] == file.read_text()
    assert state["name"] == f"file-{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}"
    tokenizer = saved_tokenizer(state)
    for text in HARD_TEXTS:
        assert tokenizer.encode(text) == load_tokenizer(str(file)).encode(text)


def test_the_first_loss_is_that_of_its_vocabulary(run):
    assert float(rows_of(run[0])[0]["loss"]) == pytest.approx(torch.tensor(400.0).log().item(), abs=0.05)
    assert "token embedding and head 6,400" in log_of(run[0])  # 400 rows of 16


def test_a_resumed_run_is_the_one_that_never_stopped(file, tmp_path):
    flags = {"tokenizer": file, "steps": 8, "save_every": 4, "num_prompts": 0}
    for name in ("whole", "cut"):
        assert train.main(tiny_flags(tmp_path / name, **flags)) == 0
    moved = shutil.copyfile(file, tmp_path / "moved.json")  # the path may be another, the content may not
    previous = str(tmp_path / "cut" / "checkpoints" / "previous.pt")
    assert train.main(["--resume", previous, "--tokenizer", str(moved)]) == 0
    assert without_times(rows_of(tmp_path / "cut")) == without_times(rows_of(tmp_path / "whole"))
    assert same_weights(weights_of(tmp_path / "cut"), weights_of(tmp_path / "whole"))


def test_a_run_does_not_go_on_with_other_tokens(file, tmp_path, capsys):
    path = shutil.copyfile(file, tmp_path / "tokenizer.json")
    assert train.main(tiny_flags(tmp_path / "out", tokenizer=path, num_prompts=0)) == 0
    changed = path.read_text().replace('"single_word": false', '"single_word": true')
    assert changed != path.read_text()
    path.write_text(changed)
    capsys.readouterr()
    assert train.main(["--resume", str(tmp_path / "out" / "checkpoints" / "last.pt"), "--steps", "9"]) == 2
    assert f"tokenizer {path} (file-" in capsys.readouterr().err
    path.unlink()
    assert train.main(["--resume", str(tmp_path / "out" / "checkpoints" / "last.pt"), "--steps", "9"]) == 2
    assert "there is no such file: check its path" in capsys.readouterr().err


def test_weights_start_a_run_with_their_own_tokenizer_alone(file, run, tmp_path, capsys):
    best = str(run[0] / "checkpoints" / "best.pt")
    shape = {"init_from": best, "steps": 2, "num_prompts": 0}
    assert train.main(tiny_flags(tmp_path / "gpt2", **shape)) == 2
    assert "was trained with another tokenizer" in capsys.readouterr().err
    assert train.main(tiny_flags(tmp_path / "own", **shape, tokenizer=file)) == 0


def test_sampling_needs_no_file(run, capsys):
    best = str(run[0] / "checkpoints" / "best.pt")
    assert sample.main(["--checkpoint", best, "--prompt", "AMBROSE:", "--max_new_tokens", "5", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("AMBROSE:")


# ---- exported ----


def test_transformers_loads_the_export_and_its_tokens_agree(file, run):
    tokenizer = load_tokenizer(str(file))
    theirs = transformers.AutoTokenizer.from_pretrained(run[1])
    for text in (PLAY.read_text(encoding="utf-8"), *HARD_TEXTS[:3]):
        ids = theirs(text)["input_ids"]
        assert ids == tokenizer.encode(text)
        assert theirs.decode(ids) == text
    assert (theirs.eos_token, theirs.eos_token_id) == (END_OF_TEXT, tokenizer.end_of_text)


def test_a_pipeline_writes_what_the_model_writes(run):
    model, tokenizer, _ = load_model(run[0] / "checkpoints" / "last.pt", train.ARCHITECTURES)
    write = transformers.pipeline("text-generation", model=str(run[1]))
    assert write.model.config.eos_token_id == tokenizer.end_of_text
    written = write("AMBROSE:\n", max_new_tokens=12, do_sample=False)[0]["generated_text"]
    expected = generate(model.eval(), torch.tensor([tokenizer.encode("AMBROSE:\n")]), 12, temperature=0)
    assert written == tokenizer.decode(expected[0].tolist())


def test_what_a_file_puts_round_a_text_is_no_part_of_the_export(file, tmp_path):
    """Training puts nothing there: a token at the start would be one that the model has never seen."""
    content = json.loads(file.read_text())
    piece = {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}
    special = {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [0], "tokens": [END_OF_TEXT]}}
    single = [piece, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, "post_processor": template}))
    assert train.main(tiny_flags(tmp_path / "out", tokenizer=tmp_path, steps=1, num_prompts=0)) == 0
    last = str(tmp_path / "out" / "checkpoints" / "last.pt")
    assert export_hf.main(["--checkpoint", last, "--out_dir", str(tmp_path / "hf")]) == 0
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")("Come in.")["input_ids"]
    assert ids == load_tokenizer(str(file)).encode("Come in.")
