"""Checkpoints and transformers' folders, both ways, without a network."""

from __future__ import annotations

import json
import os

import pytest
import torch
from conftest import PLAY, SHAKESPEARE, TINY, needs_shakespeare, rows_of

import export_hf
import train

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
import transformers


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("export") / "out"
    train.train(train.TrainConfig(**{**TINY, "out_dir": str(out_dir), "steps": 45, "num_prompts": 1}))
    return out_dir


@pytest.fixture(scope="module")
def folder(run_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "tiny-gpt2"
    assert export_hf.main(["--checkpoint", str(run_dir / "checkpoints" / "best.pt"), "--out_dir", str(folder)]) == 0
    return folder


def ours(run_dir, name="best.pt") -> train.GPT:
    checkpoint = train.load_checkpoint(run_dir / "checkpoints" / name)
    model = train.GPT(train.GPTConfig(**checkpoint["model_config"]))
    model.load_state_dict(checkpoint["model"])
    return model.eval()


def test_transformers_computes_the_same_logits(run_dir, folder):
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(theirs).__name__ == "GPT2LMHeadModel" and theirs.dtype == torch.float32
    assert theirs.lm_head.weight.data_ptr() == theirs.transformer.wte.weight.data_ptr()
    idx = torch.randint(50257, (3, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = (ours(run_dir)(idx)[0] - theirs.eval()(idx).logits).abs().max()
    assert difference < 1e-4


def test_all_files_can_be_read_by_whom_the_umask_lets(folder):
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_token_ids_are_the_same(folder, tokenizer):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    odd = "Naïve café — 3½ \U0001f642\n\n\tif (x) {  }  don't I'LL   \r\n<|endoftext"
    for text in (PLAY.read_text(encoding="utf-8"), odd, " ", ""):
        ids = theirs(text)["input_ids"]
        assert ids == tokenizer.encode(text) and theirs.decode(ids, clean_up_tokenization_spaces=False) == text
    assert theirs.eos_token_id == 50256 and len(theirs) == 50257 and theirs.model_max_length == 64


@needs_shakespeare
def test_token_ids_of_tiny_shakespeare_are_the_same(folder, tokenizer):
    text = SHAKESPEARE.read_text(encoding="utf-8")
    assert transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == tokenizer.encode(text)


def test_a_pipeline_continues_a_prompt(run_dir, folder, tokenizer):
    write = transformers.pipeline("text-generation", model=str(folder))
    text = write("AMBROSE:\n", max_new_tokens=12, do_sample=False)[0]["generated_text"]
    ids = torch.tensor([tokenizer.encode("AMBROSE:\n")])
    expected = tokenizer.decode(ours(run_dir).generate(ids, 12, temperature=0)[0].tolist())
    assert text == expected and text.startswith("AMBROSE:\n")


def test_the_card_has_the_results_of_the_run(run_dir, folder):
    from huggingface_hub import ModelCard

    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    record = json.loads((run_dir / "run.json").read_text())
    assert f"final_loss, over the whole text: **{record['final_loss']:.6f}**" in card.content
    assert f"{record['parameters']:,} parameters" in card.content and "by heart" in card.content
    assert record["corpus"]["sha256"] in card.content


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 0.0, "top_k": 50}, {"do_sample": False}),
        ({"temperature": 0.7, "top_k": 0}, {"do_sample": True, "temperature": 0.7, "top_k": 0}),
    ],
)
def test_generation_is_as_the_run_sampled(run_dir, tmp_path, settings, expected):
    content = train.load_checkpoint(run_dir / "checkpoints" / "best.pt")
    torch.save(content | {"config": content["config"] | settings}, tmp_path / "weights.pt")
    assert export_hf.main(["--checkpoint", str(tmp_path / "weights.pt"), "--out_dir", str(tmp_path / "hf")]) == 0
    found = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert expected.items() <= found.items() and (found["do_sample"] or "top_k" not in found)


def test_checkpoints_that_lack_something_are_one_sentence(run_dir, tmp_path, capsys):
    content = train.load_checkpoint(run_dir / "checkpoints" / "best.pt")
    for part, value in (("model_config", None), ("tokenizer", {}), ("model", {})):
        torch.save(content | {part: value}, tmp_path / "odd.pt")
        assert export_hf.main(["--checkpoint", str(tmp_path / "odd.pt"), "--out_dir", str(tmp_path / "hf")]) == 1
        err = capsys.readouterr().err
        assert "lacks what a model needs" in err and err.count("\n") == 1


def test_a_full_disk_leaves_no_half_file(run_dir, tmp_path, monkeypatch, capsys):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise export_hf.safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr(export_hf.safetensors.torch, "save_file", full)
    flags = ["--checkpoint", str(run_dir / "checkpoints" / "best.pt"), "--out_dir", str(tmp_path / "hf")]
    assert export_hf.main(flags) == 1
    assert "No space left" in capsys.readouterr().err and not list((tmp_path / "hf").iterdir())


def test_a_folder_is_not_overwritten_by_accident(run_dir, folder, tmp_path, capsys):
    flags = ["--checkpoint", str(run_dir / "checkpoints" / "best.pt"), "--out_dir", str(folder)]
    before = (folder / "config.json").read_bytes()
    assert export_hf.main(flags) == 2
    assert "isn't empty: add --overwrite" in capsys.readouterr().err
    assert (folder / "config.json").read_bytes() == before
    assert export_hf.main([*flags, "--overwrite"]) == 0


def test_a_checkpoint_alone_is_exported_too(run_dir, tmp_path):
    alone = tmp_path / "a" / "b" / "weights.pt"
    alone.parent.mkdir(parents=True)
    alone.write_bytes((run_dir / "checkpoints" / "last.pt").read_bytes())
    assert export_hf.main(["--checkpoint", str(alone), "--out_dir", str(tmp_path / "hf")]) == 0
    assert "The run directory wasn't there" in (tmp_path / "hf" / "README.md").read_text()
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")


@pytest.mark.parametrize("form", ["safetensors", "bin", "without prefix"])
def test_a_gpt2_folder_is_trained_further(tmp_path, form):
    torch.manual_seed(3)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 64, "vocab_size": 50257}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
    source, out = tmp_path / "gpt2", tmp_path / "out"
    if form == "without prefix":
        theirs.transformer.save_pretrained(source)
    else:
        theirs.save_pretrained(source)
    if form == "bin":
        (source / "model.safetensors").unlink()
        torch.save(theirs.state_dict(), source / "pytorch_model.bin")
    flags = ["--input_file", str(PLAY), "--steps", "12", "--batch_size", "2", "--seq_len", "32", "--log_every", "1"]
    flags += ["--device", "cpu", "--amp", "off", "--max_new_tokens", "3", "--lr", "1e-3", "--no_mfu"]
    assert export_hf.main(["--import", str(source), "--out_dir", str(out), *flags]) == 0
    last = out / "checkpoints" / "last.pt"
    settings = train.load_checkpoint(last)["config"]  # embeddings that know something learn no faster than the rest
    expected = {"optimizer": "adamw", "lr": 1e-3, "embed_lr": 0.0, "beta1": 0.9}
    assert {key: settings[key] for key in expected} == expected
    idx = torch.randint(50257, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (ours(out, "last.pt")(idx)[0] - theirs(idx).logits).abs().max() < 1e-4
        tokens = torch.tensor(train.load_tokenizer().encode(PLAY.read_text(encoding="utf-8"))[:65])
        first = theirs(tokens[:64].view(2, 32)).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(first, tokens[1:])
    assert train.main(["--resume", str(last)]) == 0
    rows = rows_of(out)
    assert [int(row["step"]) for row in rows] == list(range(1, 13))
    assert float(rows[0]["loss"]) == pytest.approx(loss.item(), abs=1e-4)  # the first batch, seen by those weights
    assert export_hf.main(["--import", str(source), "--out_dir", str(out), *flags]) == 2  # it holds a run now
    hf = tmp_path / "hf"
    assert export_hf.main(["--checkpoint", str(last), "--out_dir", str(hf)]) == 0
    card = (hf / "README.md").read_text()
    assert "trained further" in card and "from the weights in `gpt2`" in card and "from-scratch" not in card
    assert export_hf.main(["--import", str(source), "--out_dir", str(out), "--overwrite", *flags]) == 0
    assert sorted(p.name for p in out.rglob("*") if p.is_file()) == ["last.pt", "lock"]  # nothing of the run before


def test_what_is_no_gpt2_is_one_sentence(run_dir, folder, tmp_path, capsys):
    def said(*flags) -> tuple[int, str]:
        code = export_hf.main([*map(str, flags), "--out_dir", str(tmp_path / "out")])
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and err.startswith("export_hf.py: ") and not (tmp_path / "out").exists()
        return code, err

    steps = ["--input_file", PLAY, "--steps", 5, "--seq_len", 32]
    assert said("--checkpoint", "nowhere.pt") == (
        1,
        "export_hf.py: checkpoint nowhere.pt doesn't exist: check the path\n",
    )
    assert said("--checkpoint", "a.pt", "--import", "b")[0] == 2
    assert "--steps is unknown here" in said("--checkpoint", run_dir / "checkpoints" / "best.pt", "--steps", 5)[1]
    assert said("--import", tmp_path, *steps)[0] == 2
    odd = tmp_path / "odd"
    odd.mkdir()
    config = json.loads((folder / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(config | {"activation_function": "relu", "vocab_size": 5}))
    code, err = said("--import", odd, *steps)
    assert code == 2 and "activation_function 'relu', vocab_size 5" in err
    (odd / "config.json").write_text(json.dumps(config))
    assert "has neither model.safetensors nor pytorch_model.bin" in said("--import", odd, *steps)[1]
    (odd / "model.safetensors").write_bytes(b"x" * 100)
    assert said("--import", odd, *steps)[0] == 1
    (odd / "config.json").write_text(json.dumps(config | {"n_layer": 3}))
    (odd / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert "don't fit its config.json" in said("--import", odd, *steps)[1]
    for change in ({"n_embd": 32}, {"n_embd": None}, {"tie_word_embeddings": False}):
        (odd / "config.json").write_text(json.dumps(config | change))
        assert said("--import", odd, *steps)[0] in (1, 2)
    (odd / "config.json").write_text(json.dumps(config))
    (odd / "vocab.json").write_text(json.dumps({"hola": 0}))
    assert "has a vocabulary of its own" in said("--import", odd, *steps)[1]
    code, err = said("--import", folder, *steps, "--n_layer", 5)
    assert code == 2 and "n_layer 5 isn't the model's 2" in err


# ---- a model of characters ----


@pytest.mark.parametrize("several", [False, True])
def test_a_model_of_characters_is_loaded_with_its_own_tokens(tmp_path, several):
    text = PLAY.read_text(encoding="utf-8")
    given = str(PLAY)
    if several:
        (tmp_path / "in").mkdir()
        for name in ("a.txt", "b.txt"):
            (tmp_path / "in" / name).write_text(text[:2000], encoding="utf-8")
        given, text = str(tmp_path / "in"), text[:2000]
    out_dir, folder = tmp_path / "out", tmp_path / "hf"
    settings = {**TINY, "out_dir": str(out_dir), "steps": 20, "num_prompts": 0, "tokenizer": "char"}
    train.train(train.TrainConfig(**settings | {"input_file": given}))
    assert export_hf.main(["--checkpoint", str(out_dir / "checkpoints" / "last.pt"), "--out_dir", str(folder)]) == 0
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    mine = train.saved_tokenizer(train.load_checkpoint(out_dir / "checkpoints" / "last.pt")["tokenizer"])
    ids = theirs(text)["input_ids"]
    assert ids == mine.encode(text) and theirs.decode(ids) == text
    write = transformers.pipeline("text-generation", model=str(folder))
    assert write.model.config.eos_token_id == (mine.vocab_size - 1 if several else None)
    written = write("AMBROSE:\n", max_new_tokens=12, do_sample=False)[0]["generated_text"]
    expected = ours(out_dir, "last.pt").generate(torch.tensor([mine.encode("AMBROSE:\n")]), 12, temperature=0)
    assert written == mine.decode(expected[0].tolist())
    with pytest.raises(Exception, match="UNK"):
        theirs("€")


@pytest.mark.parametrize(("preset", "tuned"), [("", True), ("gpt2-medium", True), ("muon", False), ("demo", False)])
def test_a_preset_of_a_shape_says_nothing_of_training(preset, tuned):
    assert export_hf.usual_flags(preset) == (export_hf.TUNING if tuned else ())


def test_an_imported_model_has_gpt2s_tokens(folder, tmp_path, capsys):
    flags = ["--import", str(folder), "--out_dir", str(tmp_path / "out"), "--tokenizer", "char", "--steps", "5"]
    assert export_hf.main(flags) == 2
    assert "tokenizer char conflicts with the model's" in capsys.readouterr().err
