"""All that train.py promises holds for --arch mla_moe: exact resume, kill -9, log, CSV, samples, page and export."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from checkpoint_kit import start_process
from conftest import log_of, rows_of, same_weights, tiny_flags, weights_of, without_times

import export_hf
import train
from support.checkpoint import load_checkpoint, load_model, save_checkpoint
from support.cli import UsageError
from support.inference import Request, Writer, generate

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

MLA_MOE = {"arch": "mla_moe", "tokenizer": "char", "n_embd": 32, "expert_width": 16, "balance_rate": 1e-2, "lr": 3e-3}
MLA_MOE |= {"steps": 40, "save_every": 10, "log_every": 4, "target_loss": 0, "num_prompts": 1}
OTHERS = ("n_expert", "n_expert_active", "expert_width", "balance_rate")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, short_text):
    """The run directory of a run of 40 steps. Not to be changed."""
    out = tmp_path_factory.mktemp("mla_moe") / "out"
    flags = tiny_flags(out, **MLA_MOE, input_file=short_text, grad_accum=2, grad_checkpoint=True, tensorboard=True)
    assert train.main(flags) == 0
    return out


@pytest.fixture(scope="module")
def best(finished):
    return finished / "checkpoints" / "best.pt"


# ---- what a run writes ----


def test_the_loss_falls_and_log_and_csv_have_the_load_of_the_experts(finished):
    rows = rows_of(finished)
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"]) - 0.5
    for row in rows:
        assert 1 / 7 < float(row["busiest"]) <= 0.5
        assert 0.5 < float(row["load_entropy"]) <= 1
    assert f"| load_entropy {float(rows[0]['load_entropy']):.4f} | busiest" in log_of(finished)
    assert "Active parameters: " in log_of(finished)
    assert "routers 448" in log_of(finished)
    assert (finished / "samples" / "samples.txt").read_text().startswith("=" * 80)


def test_tensorboard_gets_the_load_of_the_experts(finished):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    seen = events.EventAccumulator(str(finished / "tensorboard"))
    seen.Reload()
    rows = rows_of(finished)
    for name in ("load_entropy", "busiest"):
        logged = [event.value for event in seen.Scalars(name)]
        assert logged == pytest.approx([float(row[name]) for row in rows])


# ---- stopped, killed, resumed ----


def stop_at(monkeypatch, step: int | None) -> None:
    monkeypatch.setattr(train.Loop, "stop_asked", lambda loop: loop.progress.step == step)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_equals_one_that_never_stopped(quick, tmp_path, monkeypatch, optimizer):
    settings = {**MLA_MOE, "optimizer": optimizer, "randomize_batches": True}
    train.train(quick(out_dir=str(tmp_path / "whole"), **settings))
    for step in (10, 27, None):
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            train.train(quick(out_dir=str(tmp_path / "parts"), resume="auto", **settings))
    assert without_times(rows_of(tmp_path / "whole")) == without_times(rows_of(tmp_path / "parts"))
    assert same_weights(weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts"))


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is of POSIX")
def test_a_killed_run_goes_on_as_if_it_had_never_stopped(finished, short_text, tmp_path):
    out = tmp_path / "out"
    flags = tiny_flags(
        out, **MLA_MOE, input_file=short_text, grad_accum=2, grad_checkpoint=True, tensorboard=True, resume="auto"
    )
    process = start_process(train_until_step_25, flags)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert train.main(flags) == 0
    assert without_times(rows_of(out)) == without_times(rows_of(finished))
    assert same_weights(weights_of(out), weights_of(finished))


def train_until_step_25(flags: list[str]) -> None:
    real = train.Trainer.update_weights

    def update_weights(trainer):
        if trainer.progress.step == 25:
            os.kill(os.getpid(), signal.SIGKILL)
        real(trainer)

    train.Trainer.update_weights = update_weights
    train.main(flags)


def test_another_architecture_is_another_run(quick, finished, tmp_path):
    last = str(finished / "checkpoints" / "last.pt")
    with pytest.raises(UsageError, match="arch gpt2 conflicts with the checkpoint's mla_moe: leave --arch out"):
        settings = {**MLA_MOE, "arch": "gpt2", "expert_width": 0, "balance_rate": 1e-3, "n_head": 4}
        train.train(quick(**settings, grad_accum=2, resume=last))


def test_a_checkpoint_from_before_there_were_architectures_is_a_gpt2(quick, tmp_path):
    settings = {"steps": 20, "save_every": 10, "num_prompts": 0, "target_loss": 0}
    train.train(quick(**settings))
    last = tmp_path / "out" / "checkpoints" / "last.pt"
    state = load_checkpoint(last)
    for name in ("arch", *OTHERS):
        del state["config"][name]
    del state["progress"]["figures"]
    save_checkpoint(last, state)
    assert train.main(["--resume", str(last), "--steps", "22"]) == 0
    assert rows_of(tmp_path / "out")[-1]["step"] == "22"


# ---- what is made of its checkpoint ----


def test_a_checkpoint_writes_the_same_text_with_a_cache_as_without(best):
    writer = Writer(best, train.ARCHITECTURES, "cpu", "off")
    written = "".join(part for grown in writer.write(Request("A", max_new_tokens=30, temperature=0)) for part in grown)
    model, tokenizer, _ = load_model(best, train.ARCHITECTURES)
    rows = torch.tensor([tokenizer.encode("A")])
    with torch.no_grad():
        for _ in range(30):
            logits, _ = model.eval()(rows)
            rows = torch.cat((rows, logits[:, -1:].argmax(dim=-1)), dim=1)
    assert written == tokenizer.decode(rows[0, 1:].tolist())


def test_an_export_is_a_deepseek_v3_that_writes_the_same(best, tmp_path):
    import transformers

    assert export_hf.main(["--checkpoint", str(best), "--out_dir", str(tmp_path / "hf")]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert type(theirs).__name__ == "DeepseekV3ForCausalLM"
    model, tokenizer, _ = load_model(best, train.ARCHITECTURES)
    rows = torch.tensor([tokenizer.encode("Stand, in the name")])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(rows)[0], theirs(rows).logits, atol=1e-5, rtol=1e-5)
    greedy = theirs.generate(rows, attention_mask=torch.ones_like(rows), max_new_tokens=30, do_sample=False)
    assert generate(model, rows, 30, temperature=0).tolist() == greedy.tolist()
    assert "- deepseek_v3\n" in (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")


def test_a_run_can_start_from_its_weights(best, short_text, tmp_path):
    words = ["--init_from", str(best), "--input_file", short_text, "--seq_len", "32", "--num_prompts", "0"]
    assert train.main([*words, "--device", "cpu", "--steps", "1", "--out_dir", str(tmp_path / "out")]) == 0
    saved = load_checkpoint(tmp_path / "out" / "checkpoints" / "last.pt")
    assert saved["config"]["arch"] == "mla_moe"
    assert rows_of(tmp_path / "out")[0]["loss"] != ""


# ---- flags ----


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"n_head": 16}, "n_embd / n_head is 2: --arch mla_moe needs a multiple of 4, such as 64"),
        ({"n_embd": 36, "n_head": 3}, "n_embd 36 isn't a multiple of 8: --arch mla_moe needs one, such as 40"),
        ({"expert_width": 12}, "expert_width 12 isn't a multiple of 8: --arch mla_moe needs one, such as 16"),
        ({"n_expert_active": 8}, "n_expert_active 8 is over n_expert: use at most 7"),
        ({"dropout": 0.1}, "dropout is for --arch gpt2 alone: leave it out"),
        ({"arch": "gpt2", "balance_rate": 1e-3}, "expert_width is for --arch mla_moe: add that, or leave"),
        ({"arch": "mla"}, "arch 'mla' is unknown: did you mean mla_moe?"),
    ],
)
def test_what_this_architecture_cannot_be_is_one_sentence(quick, changes, sentence):
    with pytest.raises(UsageError) as caught:
        quick(**{**MLA_MOE, **changes}).validate()
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(sentence)
