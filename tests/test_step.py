"""One training step: accumulation, clipping, loss scaling, and what it files and reports."""

from __future__ import annotations

import collections
import math

import pytest
import torch
from conftest import rows_of, same_weights
from torch.utils._python_dispatch import TorchDispatchMode

import train
from support.machine import Runtime
from support.text import load_text


def one_step(make_trainer, config) -> train.Trainer:
    trainer = make_trainer(config)
    trainer.train_step()
    return trainer


# ---- accumulation ----


def test_accumulation_divides_right(tiny, make_trainer):
    """1 x 8 equals 8 x 1 within rounding: the same loss, gradient norm and weights."""
    at_once = one_step(make_trainer, tiny(batch_size=8, grad_accum=1, warmup_steps=0))
    in_parts = one_step(make_trainer, tiny(batch_size=1, grad_accum=8, warmup_steps=0))
    assert in_parts.progress.loss.item() == pytest.approx(at_once.progress.loss.item(), rel=1e-6)
    assert in_parts.progress.grad_norm.item() == pytest.approx(at_once.progress.grad_norm.item(), rel=1e-5)
    for a, b in zip(at_once.model.parameters(), in_parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4)
    assert at_once.batcher.tokens_taken() == in_parts.batcher.tokens_taken() == 256


def test_accumulation_in_bf16_sums_the_gradients_of_its_micro_batches(quick, make_trainer):
    """To the bit: holding the casts changes nothing."""
    held = make_trainer(quick(amp="bf16", grad_accum=3, clip_grad=0.0))
    plain = make_trainer(quick(amp="bf16", grad_accum=3, clip_grad=0.0))
    gradients = []

    def keep_gradients(*_):
        for p in held.model.parameters():
            gradients.append(p.grad.clone())

    held.optimizer.register_step_pre_hook(keep_gradients)
    held.train_step()
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            loss = plain.model(*plain.batcher.next_batch(), keep_logits=False)[1]
        (loss / 3).backward()
    for mine, p in zip(gradients, plain.model.parameters(), strict=True):
        assert torch.equal(mine, p.grad)


def test_a_step_reports_the_mean_over_its_micro_batches(quick, make_trainer):
    trainer = make_trainer(quick(grad_accum=5))
    fresh = make_trainer(quick(grad_accum=5))
    with torch.no_grad():
        losses = [fresh.model(*fresh.batcher.batch(i))[1].item() for i in range(5)]
    trainer.train_step()
    assert trainer.measure()["loss"] == pytest.approx(sum(losses) / 5, rel=1e-6)
    assert len(set(losses)) == 5


# ---- precision and loss scaling ----


class CountCasts(TorchDispatchMode):
    """Counts what is made bf16, by shape."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16:
            self.counts[tuple(args[0].shape)] += 1
        return function(*args, **(kwargs or {}))


def test_weights_are_cast_once_a_step(quick, make_trainer):
    trainer = make_trainer(quick(amp="bf16", grad_accum=3, seq_len=24))
    with CountCasts() as casts:
        trainer.train_step()
        assert casts.counts[64, 16] == trainer.config.n_layer  # c_fc of each block
        trainer.train_step()
        assert casts.counts[64, 16] == 2 * trainer.config.n_layer  # anew after each update


def test_the_loss_is_computed_in_fp32(quick, make_trainer):
    trainer = make_trainer(quick(amp="bf16"))
    with trainer.runtime.autocast():
        logits, loss = trainer.model(*trainer.batcher.batch(0))
    assert (logits.dtype, loss.dtype) == (torch.bfloat16, torch.float32)


def test_loss_scaling_changes_neither_norm_nor_step(tiny, make_trainer):
    plain = make_trainer(tiny(warmup_steps=0))
    scaled = make_trainer(tiny(warmup_steps=0))
    scaled.runtime.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plain.train_step()
    scaled.train_step()
    assert plain.progress.grad_norm > 1  # so that clipping acts
    assert scaled.progress.grad_norm.item() == pytest.approx(plain.progress.grad_norm.item(), rel=1e-5)
    for a, b in zip(plain.model.parameters(), scaled.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # which is what is wanted here
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_loss_scaling_skips_a_bad_step_and_the_schedule_goes_on(quick, make_trainer, optimizer):
    config = quick(steps=10, warmup_steps=5, optimizer=optimizer)
    trainer = make_trainer(config)
    plain = make_trainer(config)
    trainer.runtime.scaler = torch.amp.GradScaler("cpu", init_scale=1e38)  # overflows in the first backward pass
    start = [p.clone() for p in trainer.model.parameters()]
    trainer.train_step()
    assert all(torch.equal(a, b) for a, b in zip(start, trainer.model.parameters(), strict=True))
    assert not math.isfinite(trainer.measure()["grad_norm"])  # reported, and no reason to stop
    assert int(trainer.progress.skipped) == 1
    trainer.runtime.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plain.train_step()
    for _ in range(3):
        trainer.train_step()
        plain.train_step()
        assert trainer.progress.lr == plain.progress.lr
    assert int(trainer.progress.skipped) == 1
    assert not torch.equal(start[0], next(trainer.model.parameters()))


# ---- clipping, dropout ----


def test_clipping_limits_the_update_and_not_the_report(tiny, make_trainer):
    free = one_step(make_trainer, tiny(clip_grad=0.0))
    clipped = one_step(make_trainer, tiny(clip_grad=1e-12))
    assert clipped.progress.grad_norm.item() == free.progress.grad_norm.item() > 0.1
    start = make_trainer(tiny()).model.transformer.wpe.weight

    def moved(trainer) -> float:
        return (trainer.model.transformer.wpe.weight - start).abs().max().item()

    assert moved(clipped) < moved(free) / 10  # gradients under AdamW's epsilon of 1e-8


def test_dropout_acts_in_training(quick, tmp_path):
    train.train(quick(out_dir=str(tmp_path / "without"), dropout=0.0))
    train.train(quick(out_dir=str(tmp_path / "with"), dropout=0.3))
    for a, b in zip(rows_of(tmp_path / "without"), rows_of(tmp_path / "with"), strict=True):
        assert a["loss"] != b["loss"]


def test_each_process_drops_other_activations(quick):
    config = quick()
    tokenizer, corpus = load_text(config.input_file, config.tokenizer)
    generators = []
    weights = []
    for rank in (0, 1):
        runtime = Runtime(torch.device("cpu"), None, None, "", rank=rank)
        trainer = train.Trainer(config, corpus, tokenizer, runtime)
        generators.append(torch.get_rng_state())
        weights.append(trainer.model.state_dict())
    assert not torch.equal(*generators)
    assert same_weights(*weights)


# ---- the losses that avg_loss is the mean of ----


def test_avg_loss_is_the_mean_of_the_last_pass_whatever_the_order(quick, make_trainer):
    trainer = make_trainer(quick(steps=100, randomize_batches=True, grad_accum=2))
    batches = trainer.batcher.n_batches
    seen = {}
    for _ in range(2 * batches):
        first = trainer.batcher.position
        before = trainer.losses.clone()
        trainer.train_step()
        in_step = [trainer.batcher.index(first), trainer.batcher.index(first + 1)]
        for index in in_step:
            seen[index] = trainer.losses[index].item()
        untouched = [i for i in range(batches) if i not in in_step]
        assert torch.equal(trainer.losses[untouched], before[untouched])
        assert trainer.avg_loss() == pytest.approx(sum(seen.values()) / len(seen), rel=1e-6)
        assert trainer.seen_all() == (len(seen) == batches)
    assert trainer.seen_all()


# ---- what a GPU would wait for ----


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_waits_for_no_gpu(tiny, make_trainer, compiled):
    trainer = make_trainer(tiny(device="cuda", amp="auto", grad_accum=2, compile=compiled, clip_grad=1.0))
    for _ in range(3):
        trainer.train_step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            trainer.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


class NoReads(TorchDispatchMode):
    """Fails where a tensor is asked for its value."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a value was read"
        return function(*args, **(kwargs or {}))


def test_a_step_reads_no_value_back(quick, make_trainer):
    trainer = make_trainer(quick(grad_accum=2))
    with NoReads():
        trainer.train_step()
        with pytest.raises(AssertionError, match="a value was read"):
            trainer.progress.loss.item()


def test_the_model_compiles_into_one_graph():
    model = train.GPT(train.GPTConfig(block_size=32, vocab_size=50, n_layer=1, n_head=1, n_embd=8))
    idx = torch.arange(32).view(2, 16)
    explanation = torch._dynamo.explain(model)(idx, idx + 1, keep_logits=False)
    assert explanation.graph_break_count == 0
