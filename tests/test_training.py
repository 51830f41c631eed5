"""The training loop: losses, early stop and proof, sampling, exact resume, several processes."""

from __future__ import annotations

import collections
import dataclasses
import io
import itertools
import json
import logging
import math
import os
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import PLAY, ROOT, rows_of, same_weights, tiny_flags, weights_of, without_times
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import train

# ---- one step ----


def one_step(make_trainer, config):
    trainer = make_trainer(config)
    trainer.train_step()
    return trainer


def test_accumulation_divides_right(tiny, make_trainer):
    """1 x 8 equals 8 x 1 within rounding: the same loss, gradient norm and weights."""
    at_once = one_step(make_trainer, tiny(batch_size=8, grad_accum=1, warmup_steps=0))
    in_parts = one_step(make_trainer, tiny(batch_size=1, grad_accum=8, warmup_steps=0))
    assert in_parts.step_loss.item() == pytest.approx(at_once.step_loss.item(), rel=1e-6)
    assert in_parts.grad_norm.item() == pytest.approx(at_once.grad_norm.item(), rel=1e-5)
    for a, b in zip(at_once.model.parameters(), in_parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4)
    assert at_once.tokens() == in_parts.tokens() == 256


class CountCasts(TorchDispatchMode):
    """Counts what is made bf16, by shape."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16:
            self.counts[tuple(args[0].shape)] += 1
        return function(*args, **(kwargs or {}))


def test_weights_are_cast_once_a_step(tiny, make_trainer):
    trainer = make_trainer(tiny(amp="bf16", grad_accum=3, seq_len=24))
    with CountCasts() as casts:
        trainer.train_step()
        assert casts.counts[64, 16] == trainer.config.n_layer  # c_fc of each block
        trainer.train_step()
        assert casts.counts[64, 16] == 2 * trainer.config.n_layer  # anew after each update


def test_accumulation_in_bf16_sums_the_gradients_of_its_micro_batches(tiny, make_trainer):
    """To the bit: holding the casts changes nothing."""
    held = make_trainer(tiny(amp="bf16", grad_accum=3, clip_grad=0.0))
    plain = make_trainer(tiny(amp="bf16", grad_accum=3, clip_grad=0.0))
    held.optimizer.register_step_pre_hook(
        lambda *_: gradients.append([p.grad.clone() for p in held.model.parameters()])
    )
    gradients = []
    held.train_step()
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            loss = plain.model(*plain.batcher.next_batch(), keep_logits=False)[1]
        (loss / 3).backward()
    for mine, p in zip(gradients[0], plain.model.parameters(), strict=True):
        assert torch.equal(mine, p.grad)


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


def test_a_step_reads_no_value_back(tiny, make_trainer):
    """What would make a GPU wait: nothing in a step asks a tensor for its value."""
    trainer = make_trainer(tiny(grad_accum=2))

    class NoReads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function is not torch.ops.aten._local_scalar_dense.default, "a value was read"
            return function(*args, **(kwargs or {}))

    with NoReads():
        trainer.train_step()
        with pytest.raises(AssertionError, match="a value was read"):
            trainer.step_loss.item()


def test_the_model_compiles_into_one_graph():
    model = train.GPT(train.GPTConfig(block_size=32, vocab_size=50, n_layer=1, n_head=1, n_embd=8))
    idx = torch.arange(32).view(2, 16)
    explanation = torch._dynamo.explain(model)(idx, idx + 1, keep_logits=False)
    assert explanation.graph_break_count == 0


def test_a_step_reports_the_mean_over_its_micro_batches(tiny, make_trainer):
    trainer = make_trainer(tiny(grad_accum=5))
    fresh = make_trainer(tiny(grad_accum=5))
    with torch.no_grad():
        losses = [fresh.model(*fresh.batcher.batch(i))[1].item() for i in range(5)]
    trainer.train_step()
    assert trainer.measure()["loss"] == pytest.approx(sum(losses) / 5, rel=1e-6)
    assert len(set(losses)) == 5


def test_clipping_limits_the_update_and_not_the_report(tiny, make_trainer):
    free = one_step(make_trainer, tiny(clip_grad=0.0))
    clipped = one_step(make_trainer, tiny(clip_grad=1e-12))
    assert clipped.grad_norm.item() == free.grad_norm.item() > 0.1
    start = make_trainer(tiny()).model.state_dict()["transformer.wpe.weight"]

    def moved(trainer):
        return (trainer.model.state_dict()["transformer.wpe.weight"] - start).abs().max().item()

    assert moved(clipped) < moved(free) / 10  # gradients under AdamW's epsilon of 1e-8


def test_avg_loss_is_the_mean_of_the_last_pass_whatever_the_order(tiny, make_trainer):
    trainer = make_trainer(tiny(steps=100, randomize_batches=True, grad_accum=3))
    seen = {}
    for _ in range(40):
        first = trainer.batcher.position
        before = trainer.losses.clone()
        trainer.train_step()
        for micro in range(3):
            index = trainer.batcher.index(first + micro)
            seen[index] = trainer.losses[index].item()
        untouched = [
            i for i in range(trainer.batcher.n_batches) if i not in map(trainer.batcher.index, range(first, first + 3))
        ]
        assert torch.equal(trainer.losses[untouched], before[untouched])
        assert trainer.avg_loss() == pytest.approx(sum(seen.values()) / len(seen), rel=1e-6)
    assert len(seen) == trainer.batcher.n_batches and trainer.seen_all()


def test_loss_scaling_changes_neither_norm_nor_step(tiny, make_trainer):
    plain, scaled = make_trainer(tiny(warmup_steps=0)), make_trainer(tiny(warmup_steps=0))
    scaled.runtime.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plain.train_step()
    scaled.train_step()
    assert scaled.grad_norm.item() == pytest.approx(plain.grad_norm.item(), rel=1e-5) and plain.grad_norm > 1
    for a, b in zip(plain.model.parameters(), scaled.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4)


def test_the_loss_is_computed_in_fp32(tiny, make_trainer):
    trainer = make_trainer(tiny(amp="bf16"))
    with trainer.runtime.autocast():
        logits, loss = trainer.model(*trainer.batcher.batch(0))
    assert (logits.dtype, loss.dtype) == (torch.bfloat16, torch.float32)


def test_dropout_acts_in_training(tiny, tmp_path):
    for name, dropout in (("without", 0.0), ("with", 0.3)):
        train.train(tiny(out_dir=str(tmp_path / name), dropout=dropout))
    losses = [[row["loss"] for row in rows_of(tmp_path / name)] for name in ("without", "with")]
    assert all(a != b for a, b in zip(*losses, strict=True))


def test_each_process_drops_other_activations(tiny, tokenizer):
    config = tiny()
    corpus, states = train.load_corpus(config.input_file, tokenizer), []
    for rank in (0, 1):
        runtime = train.Runtime(torch.device("cpu"), None, None, "", rank=rank)
        weights = train.Trainer(config, corpus, tokenizer, runtime).model.state_dict()
        states.append((torch.get_rng_state(), weights))
    assert not torch.equal(states[0][0], states[1][0])
    assert same_weights(states[0][1], states[1][1])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_loss_scaling_skips_a_bad_step_and_the_schedule_goes_on(tiny, make_trainer, optimizer):
    config = tiny(steps=10, warmup_steps=5, optimizer=optimizer)
    trainer, plain = make_trainer(config), make_trainer(config)
    trainer.runtime.scaler = torch.amp.GradScaler("cpu", init_scale=1e38)  # overflows in the first backward pass
    start = [p.clone() for p in trainer.model.parameters()]
    trainer.train_step()
    assert all(torch.equal(a, b) for a, b in zip(start, trainer.model.parameters(), strict=True))
    assert not math.isfinite(trainer.measure()["grad_norm"])  # reported, and no reason to stop
    trainer.runtime.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plain.train_step()
    for _ in range(3):
        trainer.train_step()
        plain.train_step()
        assert trainer.lr == plain.lr
    assert not torch.equal(start[0], next(trainer.model.parameters()))


# ---- early stop and proof ----


def test_the_proof_counts_each_target_once(tiny, make_trainer):
    trainer = make_trainer(tiny(dropout=0.5))
    tokens = torch.from_numpy(trainer.corpus.tokens.astype("int64"))
    trainer.model.eval()
    losses = {}  # target position -> loss, from the windows of training
    with torch.no_grad():
        for i in range(trainer.batcher.n_batches):
            start = min(i * 64, len(tokens) - 1 - 64)
            idx = tokens[start : start + 64].view(2, 32)
            log_p = trainer.model(idx)[0].log_softmax(-1).view(64, -1)
            for j in range(64):
                losses.setdefault(start + j + 1, -log_p[j, tokens[start + j + 1]].item())
    assert sorted(losses) == list(range(1, len(tokens)))
    expected = sum(losses.values()) / len(losses)
    trainer.model.train()  # which the proof must not take over, with its dropout
    assert trainer.evaluate(lambda: None, trainer.batcher) == pytest.approx(expected, rel=1e-6)


def test_the_run_stops_when_the_target_is_proven(tiny):
    result = train.train(tiny(steps=400, lr=3e-3, target_loss=9.0, log_every=50))
    assert result["ended"] == "target reached" and result["steps"] < 400
    assert result["avg_loss"] < 9.0 and result["final_loss"] < 9.0
    assert result["tokens_to_target"] == result["tokens"] == result["steps"] * 64
    assert 0 < result["seconds_to_target"] <= result["seconds"]
    rows = rows_of(result["config"]["out_dir"])
    assert int(rows[-1]["step"]) == result["steps"]  # the last step has its row
    # avg_loss decides: it is under the target for the first time.
    assert float(rows[-1]["avg_loss"]) < 9.0 and all(float(r["avg_loss"]) >= 9.0 for r in rows[:-1])


def test_a_first_full_pass_comes_before_any_stop(tiny):
    result = train.train(tiny(steps=100, target_loss=1000.0, log_every=7))
    assert result["ended"] == "target reached"
    assert result["steps"] == 40  # the batches of a pass, though every loss was under the target


def test_the_target_is_strict(tiny, make_trainer):
    loop = train.Loop(make_trainer(tiny(target_loss=5.0)), None, train.logging.Logger("x"), train.StopSignals(), "")
    loop.trainer.batcher.position = loop.trainer.batcher.n_batches
    loop.save = lambda: None
    loop.trainer.evaluate = lambda *_: 4.0
    assert not loop.target_proven(5.0)
    assert loop.target_proven(4.999)


def test_a_failed_proof_lets_the_run_go_on(tiny, monkeypatch):
    proofs = []

    def evaluate(self, poll, batcher, first):
        proofs.append(self.step)
        return 2000.0 if len(proofs) < 3 else 1.0

    monkeypatch.setattr(train.Trainer, "evaluate", evaluate)
    result = train.train(tiny(steps=500, target_loss=1000.0))
    assert proofs == [40, 80, 120]  # tried again a pass later, not at each step
    assert (result["ended"], result["steps"], result["final_loss"]) == ("target reached", 120, 1.0)


def test_tokens_a_second_are_over_the_wall_clock_of_the_window(tiny, tmp_path):
    train.train(tiny(steps=60, log_every=20, save_every=15))
    rows = [{k: float(v) for k, v in row.items() if k != "mfu"} for row in rows_of(tmp_path / "out")]
    for before, row in itertools.pairwise(rows):
        window = row["elapsed_s"] - before["elapsed_s"]
        assert row["tok_per_s"] == pytest.approx((row["tokens"] - before["tokens"]) / window, rel=0.1)


def test_the_bar_shows_loss_average_rate_and_speed(tiny, make_trainer):
    trainer = make_trainer(tiny(steps=50, log_every=1000))
    loop = train.Loop(trainer, None, train.logging.Logger("x"), train.StopSignals(), "")
    with train.tqdm(total=50, file=io.StringIO(), mininterval=0) as bar:
        for _ in range(3):
            trainer.train_step()
            bar.update()
            loop.log_step = lambda row: None  # the first step is logged
            assert loop.after_step(bar) == ""
        row = trainer.measure()
        start = "loss {loss:.3f}, avg {avg_loss:.3f}, lr {lr:.1e}, ".format(**row)
        assert bar.postfix.startswith(start)
        speed = float(bar.postfix.removeprefix(start).removesuffix(" tok/s"))
        assert speed == pytest.approx(bar.format_dict["rate"] * 64, rel=0.5)


def test_target_0_never_stops(tiny):
    result = train.train(tiny(steps=45, target_loss=0.0))
    assert (result["ended"], result["steps"]) == ("steps done", 45)
    assert result["final_loss"] is not None and result["tokens_to_target"] is None


# ---- samples ----


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_sampling_and_proving_change_no_training_step(tiny, tmp_path, amp):
    settings = {"steps": 12, "dropout": 0.2, "amp": amp}
    often = train.train(tiny(out_dir=str(tmp_path / "a"), sample_every=1, num_prompts=3, **settings))
    never = train.train(tiny(out_dir=str(tmp_path / "b"), num_prompts=0, **settings))
    assert without_times(rows_of(tmp_path / "a")) == without_times(rows_of(tmp_path / "b"))
    assert same_weights(weights_of(tmp_path / "a"), weights_of(tmp_path / "b"))
    assert often["avg_loss"] == never["avg_loss"]
    assert (tmp_path / "a" / "samples" / "samples.txt").read_text().count("STEP ") == 12
    assert not (tmp_path / "b" / "samples" / "samples.txt").exists()


def test_prompts_are_the_given_one_and_openings_from_the_text(tiny, make_trainer):
    trainer = make_trainer(tiny(num_prompts=4, prompt="TILDA:\n"))
    prompts = trainer.prompts()
    assert prompts[0] == "TILDA:\n" and len(set(prompts)) == 4
    assert all(p in PLAY.read_text(encoding="utf-8") for p in prompts)
    assert prompts == trainer.prompts()
    assert prompts != make_trainer(tiny(num_prompts=4, prompt="TILDA:\n", seed=1)).prompts()


# ---- what was learned ----


class Parrot(torch.nn.Module):
    """A model that knows what follows each token of a text in which none comes twice, from its `known`-th on."""

    def __init__(self, tokens: list[int], known: int = 0):
        super().__init__()
        self.follows = {a: b if i >= known else 0 for i, (a, b) in enumerate(itertools.pairwise(tokens), 1)}

    def stream(self, rows, max_new_tokens, temperature):
        assert temperature == 0
        for _ in range(max_new_tokens):
            rows = torch.tensor([[self.follows.get(int(row[-1]), 0)] for row in rows])
            yield rows


def test_recall_is_the_share_of_tokens_that_greedy_decoding_gives(tiny, make_trainer):
    def recall(tokens, known=0):
        trainer.batcher.tokens = np.array(tokens, dtype=np.uint16)
        trainer.model = Parrot(tokens, known)
        return trainer.recall(lambda: None)

    trainer, tokens = make_trainer(tiny(recall_places=50, seq_len=64)), list(range(1, 400))
    assert recall(tokens) == 1.0
    # The first token that it doesn't know loses the thread: then all that follow are wrong.
    known = [i + 32 >= 200 for i in random.Random(1337).sample(range(len(tokens) - 63), 50)]
    assert 0.2 < recall(tokens, known=200) == sum(known) / 50 < 0.8
    assert trainer.recall(lambda: None, every=64) == 3 / 6  # at 192, 256 and 320, not at 0, 64 and 128
    assert recall(tokens[:64]) == 1.0  # one place
    assert recall(tokens[:63]) is None  # not one with 32 tokens behind 32


def test_recall_is_that_of_the_model_itself(tiny, make_trainer):
    """Against greedy decoding of each place alone; the model can't tell much, so the text is what it says itself."""
    trainer = make_trainer(tiny(recall_places=70, seq_len=64))
    trainer.model.eval()
    start = torch.tensor([[5, 99, 1000]])
    text = trainer.model.generate(start, 300, temperature=0)[0].numpy()
    text[100:140] = np.arange(40)
    trainer.batcher.tokens = text.astype(np.uint16)
    right = 0
    for i in random.Random(1337).sample(range(len(text) - 63), 70):
        row = torch.from_numpy(text[i : i + 32].astype(np.int64))[None]
        right += (trainer.model.generate(row, 32, temperature=0)[0, 32:].numpy() == text[i + 32 : i + 64]).sum()
    recall = trainer.recall(lambda: None)
    assert 0 < recall < 1 and recall == pytest.approx(right / (70 * 32))


def test_recall_needs_positions_that_were_trained(tiny, make_trainer):
    assert make_trainer(tiny(seq_len=63)).recall(lambda: None) is None
    assert make_trainer(tiny(seq_len=64)).recall(lambda: None) is not None


@given(st.text(alphabet="ab\n", max_size=12), st.text(alphabet="ab\n", max_size=30))
def test_the_longest_verbatim_run_is_that_of_all_pieces(text, source):
    pieces = (text[i:j] for i in range(len(text) + 1) for j in range(i, len(text) + 1))
    assert train.longest_verbatim(text, source) == max(len(piece) for piece in pieces if piece in source)


def test_the_record_says_what_was_learned(tiny, tmp_path, monkeypatch):
    heart = PLAY.read_text(encoding="utf-8")[100:180]
    texts = [("A", heart), ("B", f"\u2603{heart[:40]}\u2603")]
    monkeypatch.setattr(train.Trainer, "sample", lambda self, poll: texts)
    record = train.train(tiny(seq_len=64))
    assert record["samples"] == [
        {"prompt": "A", "characters": 80, "verbatim": 80},
        {"prompt": "B", "characters": 42, "verbatim": 40},
    ]
    assert 0 <= record["recall"] <= 1
    log = (tmp_path / "out" / "logs" / "train.log").read_text(encoding="utf-8")
    assert f"recall {record['recall']:.4f} (of the next 32 tokens, after 32 from the text)" in log
    assert f"recall_at_windows {record['recall_at_windows']:.4f} (the same, where windows of training begin)" in log
    assert "Longest verbatim run of each sample, in characters: 80 of 80, 40 of 42" in log
    none = train.train(tiny(out_dir=str(tmp_path / "none"), num_prompts=0, recall_places=0))
    assert none["recall"] is None and none["samples"] is None


# ---- the estimate ----


def test_the_time_to_target_is_said_once(tiny, tmp_path):
    train.train(tiny(steps=125, log_every=7, num_prompts=0))
    log = (tmp_path / "out" / "logs" / "train.log").read_text(encoding="utf-8").splitlines()
    (at,) = (i for i, line in enumerate(log) if "Time to target" in line)
    assert "step 105/125" in log[at - 1]  # the first that is logged after a hundred
    form = r"at \d+ tok/s: \d s, at \d{4}-\d\d-\d\d \d\d:\d\d, when all steps are done, or before$"
    assert re.search(form, log[at])
    train.train(tiny(out_dir=str(tmp_path / "never"), steps=101, log_every=100, target_loss=0.0, num_prompts=0))
    assert "Time to" not in (tmp_path / "never" / "logs" / "train.log").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("steps", "known", "said"),
    [
        (1000, 0, "at 128 tok/s: 7 min 30 s, at "),  # 900 steps at half a second
        (1000, 64 * 300, "at 128 tok/s: 1 min 40 s, at "),
        (1000, 64 * 50, "at 128 tok/s: 7 min 30 s, at "),  # the published run took fewer tokens than these already are
        (10**12, 0, " h "),
    ],
)
def test_the_estimate_is_what_is_left_over_the_speed(
    tiny, make_trainer, tmp_path, monkeypatch, caplog, steps, known, said
):
    trainer = make_trainer(tiny(steps=steps))
    loop = train.Loop(trainer, train.RunDirectory(tmp_path), logging.getLogger("estimate"), train.StopSignals(), "")
    trainer.step, trainer.batcher.position = 100, 100
    clock = loop.steps_start + 50.0
    monkeypatch.setattr(train.time, "monotonic", lambda: clock)
    monkeypatch.setattr(train, "published_tokens", lambda *_: known)
    with caplog.at_level("INFO"):
        loop.tell_estimate()
    assert said in caplog.text
    assert ("if it takes the 19,200 tokens of the published run" in caplog.text) == (known == 19_200)


@pytest.mark.parametrize("name", train.PUBLISHED)
def test_a_published_run_is_known_by_its_settings_and_its_text(tokenizer, name):
    settings = dataclasses.replace(train.TrainConfig(), **train.PRESETS[name])
    sha256, needed = train.PUBLISHED[name]
    corpus = train.Corpus("text.txt", sha256, "", 0, np.zeros(1, dtype=np.uint16))
    same = dataclasses.replace(settings, out_dir="elsewhere", save_every=7).resolved(10, 1)
    a_step = same.batch_size * same.seq_len * same.grad_accum
    assert train.published_tokens(same, corpus, a_step) == needed
    for change in ({"lr": 1.0}, {"n_layer": 1}, {"randomize_batches": True}):
        assert train.published_tokens(dataclasses.replace(same, **change), corpus, a_step) == 0
    assert train.published_tokens(same, corpus, 2 * a_step) == 0  # two processes
    assert train.published_tokens(same, dataclasses.replace(corpus, sha256="0"), a_step) == 0


@pytest.mark.parametrize("name", train.PUBLISHED)
def test_the_published_figures_are_those_of_the_records(name):
    record = json.loads((ROOT / "out" / name / "run.json").read_text(encoding="utf-8"))
    assert train.PUBLISHED[name] == (record["corpus"]["sha256"], record["tokens_to_target"])


# ---- resume ----


@pytest.mark.parametrize(
    "options", [{}, {"optimizer": "muon"}, {"grad_accum": 3, "dropout": 0.3, "randomize_batches": True}]
)
def test_a_resumed_run_equals_one_that_never_stopped(tiny, tmp_path, monkeypatch, options):
    """Interrupted twice in the middle of a pass: the same rows, samples and checkpoints, bit for bit."""
    settings = {"steps": 60, "save_every": 20, "sample_every": 20, "log_every": 4, **options}
    train.train(tiny(out_dir=str(tmp_path / "whole"), **settings))
    for stop_at in (20, 47, None):  # at a save, and between two
        with monkeypatch.context() as patch:
            if stop_at:
                patch.setattr(train.Loop, "asked", lambda loop, _, at=stop_at: (loop.trainer.step == at, False))
            train.train(tiny(out_dir=str(tmp_path / "parts"), resume="auto", **settings))
    assert without_times(rows_of(tmp_path / "whole")) == without_times(rows_of(tmp_path / "parts"))
    samples = [(tmp_path / run / "samples" / "samples.txt").read_text() for run in ("whole", "parts")]
    assert samples[0] == samples[1]
    for name in ("last.pt", "best.pt"):
        whole, parts = (train.load_checkpoint(tmp_path / run / "checkpoints" / name) for run in ("whole", "parts"))
        passing = {"seconds": 0, "config": {}, "scheduler": {}}  # the schedule is made anew at each start
        assert_same(whole | passing, parts | passing)


def assert_same(a, b):
    """Equal, bit for bit, all the way down."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
    if isinstance(a, dict | list | tuple):
        for x, y in zip(a.values(), b.values(), strict=True) if isinstance(a, dict) else zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def test_every_random_generator_goes_on_where_it_was(tiny, tmp_path, monkeypatch):
    """No step draws from Python's or NumPy's own generators; a change of the program that did would still resume."""
    drawn = {}
    real = train.Trainer.train_step

    def draw(self):
        drawn.setdefault(self.step, []).append((random.random(), np.random.rand(), torch.rand(1).item()))
        real(self)

    monkeypatch.setattr(train.Trainer, "train_step", draw)
    random.seed(1)
    np.random.seed(1)
    settings = {"steps": 6, "save_every": 3}
    train.train(tiny(**settings))
    (tmp_path / "out" / "checkpoints" / "previous.pt").replace(tmp_path / "out" / "checkpoints" / "last.pt")
    train.train(tiny(resume="auto", **settings))
    assert [len(drawn[step]) for step in range(6)] == [1, 1, 1, 2, 2, 2]
    assert all(len(set(values)) == 1 for values in drawn.values())


def test_what_came_after_the_checkpoint_is_done_again_and_not_doubled(tiny, tmp_path):
    """As after a power cut: rows and samples are past the last checkpoint, and the last row is torn."""
    settings = {"steps": 30, "save_every": 10, "sample_every": 5}
    train.train(tiny(**settings))
    expected = rows_of(tmp_path / "out")
    last = tmp_path / "out" / "checkpoints" / "last.pt"
    samples = (tmp_path / "out" / "samples" / "samples.txt").read_text()
    # A checkpoint of step 20, as it was at that moment.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Loop, "asked", lambda loop, _: (loop.trainer.step == 20, False))
        train.train(tiny(out_dir=str(tmp_path / "short"), **settings))
    (tmp_path / "short" / "checkpoints" / "last.pt").replace(last)
    with open(tmp_path / "out" / "logs" / "train_metrics.csv", "a") as f:
        f.write("31,0.7")
    train.train(tiny(resume="auto", **settings))
    assert without_times(rows_of(tmp_path / "out")) == without_times(expected)
    assert (tmp_path / "out" / "samples" / "samples.txt").read_text() == samples


@pytest.mark.parametrize("cut", ["evaluate", "sample", "recall"])
@pytest.mark.parametrize("settings", [{"steps": 100, "target_loss": 1000.0}, {"steps": 45, "target_loss": 0.0}])
def test_an_ending_that_was_cut_short_is_made_up_for(tiny, tmp_path, monkeypatch, cut, settings):
    """Stopped in the proof or in a sample: resumed, the run ends as the one that wasn't."""
    settings = {"log_every": 7, "save_every": 1000, "sample_every": 20, **settings}
    whole = train.train(tiny(out_dir=str(tmp_path / "whole"), **settings))

    def stopped(self, *args, **options):
        raise train.Stopped

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, cut, stopped)
        assert train.train(tiny(out_dir=str(tmp_path / "cut"), **settings))["ended"] == "interrupted"
    resumed = train.train(tiny(out_dir=str(tmp_path / "cut"), resume="auto", **settings))
    for key in ("ended", "steps", "tokens", "avg_loss", "final_loss", "tokens_to_target", "recall", "samples"):
        assert resumed[key] == whole[key], key
    assert without_times(rows_of(tmp_path / "whole")) == without_times(rows_of(tmp_path / "cut"))
    samples = [(tmp_path / name / "samples" / "samples.txt").read_text() for name in ("whole", "cut")]
    assert samples[0] == samples[1]


def test_a_proof_can_be_stopped(tiny, make_trainer):
    trainer = make_trainer(tiny())

    def poll():
        raise train.Stopped

    with pytest.raises(train.Stopped):
        trainer.evaluate(poll, trainer.batcher)


def test_a_fault_in_the_proof_loses_nothing(tiny, tmp_path, monkeypatch):
    def fault(self, *args):
        raise RuntimeError("the device fell off the bus")

    monkeypatch.setattr(train.Trainer, "evaluate", fault)
    with pytest.raises(RuntimeError):
        train.train(tiny(steps=100, target_loss=1000.0, save_every=1000))
    assert train.load_checkpoint(tmp_path / "out" / "checkpoints" / "last.pt")["step"] == 40


def test_a_state_holds_what_the_next_step_depends_on(tiny, make_trainer):
    one, two = make_trainer(tiny()), make_trainer(tiny(beta1=0.5, weight_decay=0.3))
    for trainer in (one, two):
        trainer.runtime.scaler = torch.amp.GradScaler("cpu", init_scale=32.0 if trainer is one else 64.0)
    one.train_step()
    one.best_loss, one.best_saved, one.next_proof, one.seconds = 1.5, 2.5, 7, 100.0
    two.load_state_dict(one.state_dict())
    assert (two.best_loss, two.best_saved, two.next_proof, two.seconds) == (1.5, 2.5, 7, 100.0)
    assert two.runtime.scaler.get_scale() == 32.0
    assert one.measure() == two.measure()
    # The flags of this start win over those of the saved one.
    assert [(g["betas"], g["weight_decay"]) for g in two.optimizer.param_groups] == [
        ((0.5, 0.95), 0.3),
        ((0.5, 0.95), 0.3),
        ((0.5, 0.95), 0),
    ]


def test_time_goes_on_where_it_stopped(tiny, tmp_path):
    train.train(tiny(steps=5))
    before = float(rows_of(tmp_path / "out")[-1]["elapsed_s"])
    checkpoint = tmp_path / "out" / "checkpoints" / "last.pt"
    train.save_checkpoint(checkpoint, train.load_checkpoint(checkpoint) | {"seconds": before + 1000})
    train.train(tiny(steps=10, resume="auto"))
    assert 1000 < float(rows_of(tmp_path / "out")[-1]["elapsed_s"]) < 1100


def test_samples_survive_a_resume_to_the_byte(tmp_path):
    run_dir = train.RunDirectory(tmp_path)
    run_dir.prepare(overwrite=False, path=None)
    run_dir.write_samples(5, [("a", "b\rc\r\nd")])
    before = run_dir.samples.read_bytes()
    assert b"b\rc" in before
    assert run_dir.rewind(5) == (-1, 5)
    assert run_dir.samples.read_bytes() == before


def test_auto_begins_anew_only_what_left_no_result(tiny, tmp_path):
    train.train(tiny(steps=45))
    out = tmp_path / "out"
    (out / "checkpoints" / "last.pt").unlink()
    (out / "checkpoints" / "previous.pt").unlink()
    with pytest.raises(train.UsageError, match=r"already holds a run: its last.pt is gone"):
        train.train(tiny(resume="auto", steps=3))
    (out / "run.json").unlink()  # as of a run that was killed before its first checkpoint
    train.train(tiny(resume="auto", steps=3))
    assert not (out / "checkpoints" / "best.pt").exists()  # it would be another model's
    assert len(rows_of(out)) == 3


def test_a_target_met_by_the_last_step_is_reached(tiny, tmp_path, monkeypatch):
    proofs = []

    def evaluate(self, poll, batcher, first):
        proofs.append(self.step)
        return 2000.0 if self.step == 40 else 1.0

    monkeypatch.setattr(train.Trainer, "evaluate", evaluate)
    result = train.train(tiny(steps=60, target_loss=1000.0))
    assert (result["ended"], result["final_loss"], proofs) == ("target reached", 1.0, [40, 60])
    proofs.clear()
    result = train.train(tiny(steps=40, target_loss=1000.0, out_dir=str(tmp_path / "short")))
    assert (result["ended"], result["final_loss"], proofs) == ("steps done", 2000.0, [40])


def test_torn_and_foreign_files_do_not_stop_a_resume(tiny, tmp_path):
    train.train(tiny(steps=10))
    out = tmp_path / "out"
    for path, bytes_ in (("samples/samples.txt", b"\xe2\x80"), ("logs/train_metrics.csv", b"\xff,1\n11,")):
        with open(out / path, "ab") as f:
            f.write(bytes_)
    (out / "run.json").write_text("[1]")
    assert train.train(tiny(steps=20, resume="auto"))["ended"] == "steps done"
    assert [row["step"] for row in rows_of(out)] == [str(n) for n in range(1, 21)]


def test_more_steps_draw_the_curve_anew(tiny, tmp_path):
    train.train(tiny(steps=10))
    result = train.train(tiny(steps=20, resume="auto"))
    assert (result["ended"], result["steps"]) == ("steps done", 20)
    rates = [float(row["lr"]) for row in rows_of(tmp_path / "out")]
    train.train(tiny(steps=20, out_dir=str(tmp_path / "whole")))
    assert rates[10:] == [float(row["lr"]) for row in rows_of(tmp_path / "whole")][10:]


def test_a_finished_run_has_nothing_more_to_do(tiny, tmp_path):
    train.train(tiny(steps=10))
    before = (tmp_path / "out" / "run.json").read_bytes()
    assert train.train(tiny(steps=10, resume="auto"))["ended"] == "nothing to do"
    assert (tmp_path / "out" / "run.json").read_bytes() == before
    assert len(rows_of(tmp_path / "out")) == 10


def test_a_run_that_reached_its_target_has_nothing_more_to_do(tiny):
    first = train.train(tiny(steps=100, target_loss=1000.0))
    again = train.train(tiny(steps=100, target_loss=1000.0, resume="auto"))
    assert (again["ended"], again["exit_code"], again["steps"]) == ("nothing to do", 0, first["steps"])
    lower = train.train(tiny(steps=100, target_loss=0.5, resume="auto"))
    assert (lower["ended"], lower["steps"]) == ("steps done", 100)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"n_embd": 32}, "n_embd 32 conflicts with the checkpoint's 16"),
        ({"seq_len": 16}, "seq_len 16 conflicts with the checkpoint's 32"),
        ({"seed": 5}, "seed 5 conflicts with the checkpoint's 1337"),
        ({"optimizer": "muon"}, "optimizer muon conflicts with the checkpoint's adamw"),
        ({"input_file": __file__}, "isn't the checkpoint's text"),
    ],
)
def test_another_run_is_not_resumed_by_mistake(tiny, tmp_path, changes, sentence):
    train.train(tiny())
    before = (tmp_path / "out" / "run.json").read_bytes()
    with pytest.raises(train.UsageError, match=sentence):
        train.train(tiny(steps=20, resume="auto", **changes))
    assert (tmp_path / "out" / "run.json").read_bytes() == before


def test_best_pt_is_not_taken_for_last_pt(tiny, tmp_path):
    train.train(tiny(steps=45))
    with pytest.raises(train.UsageError, match=r"holds weights only: resume from the last.pt beside it"):
        train.train(tiny(steps=60, resume=str(tmp_path / "out" / "checkpoints" / "best.pt")))


# ---- faults ----


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(tiny, tmp_path, monkeypatch):
    real = train.Trainer.train_step

    def broken(self):
        if self.step == 8:
            with torch.no_grad():
                self.model.transformer.ln_f.weight.fill_(math.nan)
        real(self)

    monkeypatch.setattr(train.Trainer, "train_step", broken)
    with pytest.raises(train.RunError, match=r"the loss is nan .* at step 9: .*lower --lr"):
        train.train(tiny(steps=20, save_every=4))
    assert train.load_checkpoint(tmp_path / "out" / "checkpoints" / "last.pt")["step"] == 8
    assert all(w.isfinite().all() for w in weights_of(tmp_path / "out").values())
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["ended"].startswith("failed: the loss is nan") and record["exit_code"] == 1


def test_the_record_of_a_failed_run_is_strict_json(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train.Trainer, "avg_loss", lambda self: math.nan)
    with pytest.raises(train.RunError):
        train.train(tiny(steps=3))
    text = (tmp_path / "out" / "run.json").read_text()
    assert "NaN" not in text and json.loads(text)["avg_loss"] is None


def test_weights_that_broke_unseen_do_not_replace_a_good_checkpoint(tiny, tmp_path, monkeypatch):
    """On a GPU losses are read now and then, so a save must look by itself."""
    real_step, real_init = train.Trainer.train_step, train.Loop.__init__

    def broken(self):
        if self.step == 6:
            with torch.no_grad():
                self.model.transformer.ln_f.weight.fill_(math.nan)
        real_step(self)

    def rarely_reading(self, *args):
        real_init(self, *args)
        self.reads_each_step = False

    monkeypatch.setattr(train.Trainer, "train_step", broken)
    monkeypatch.setattr(train.Loop, "__init__", rarely_reading)
    with pytest.raises(train.RunError, match="at step 8"):
        train.train(tiny(steps=20, save_every=4, log_every=100))
    assert train.load_checkpoint(tmp_path / "out" / "checkpoints" / "last.pt")["step"] == 4


def test_a_warm_up_longer_than_the_epochs_is_a_usage_error(tiny):
    with pytest.raises(train.UsageError, match="warmup_steps 500 is over steps 40"):
        train.train(tiny(steps=None, epochs=1.0, warmup_steps=500))


# ---- several processes ----


def launch(program, tmp_path, flags, processes=1):
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--rdzv_backend=c10d"]
    torchrun = [*torchrun, "--rdzv_endpoint=127.0.0.1:0"] if processes > 1 else []
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *torchrun, str(program), *flags]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=200, cwd=tmp_path)


def test_two_processes_do_what_one_does_with_twice_the_accumulation(tmp_path):
    settings = {"steps": 25, "save_every": 25, "target_loss": 0}
    alone, pair = tmp_path / "alone", tmp_path / "pair"
    for out, accum, processes in ((alone, 4, 1), (pair, 2, 2)):
        done = launch(ROOT / "train.py", tmp_path, tiny_flags(out, grad_accum=accum, **settings), processes)
        assert done.returncode == 0, done.stderr
    for one, two in zip(rows_of(alone), rows_of(pair), strict=True):
        assert all(one[k] == two[k] for k in ("step", "epoch", "tokens", "lr"))
        for figure in ("loss", "avg_loss", "grad_norm"):
            assert float(one[figure]) == pytest.approx(float(two[figure]), rel=1e-4)
    assert json.loads((pair / "run.json").read_text())["processes"] == 2


def test_two_processes_stop_together_and_resume_exactly(tmp_path):
    """A signal that only the second process hears, in a run with dropout."""
    program = tmp_path / "signalled.py"
    program.write_text(
        "import os, train\n"
        "real = train.Loop.take_step\n"
        "def take_step(self):\n"
        "    real(self)\n"
        "    if os.environ['RANK'] == '1' and self.trainer.step == 8:\n"
        "        self.stop.signum = 15\n"
        "train.Loop.take_step = take_step\n"
        "raise SystemExit(train.main())\n"
    )
    settings = {"steps": 16, "dropout": 0.3, "num_prompts": 0, "target_loss": 0}
    assert launch(ROOT / "train.py", tmp_path, tiny_flags(tmp_path / "whole", **settings), 2).returncode == 0
    launch(program, tmp_path, tiny_flags(tmp_path / "parts", **settings), 2)
    record = json.loads((tmp_path / "parts" / "run.json").read_text())
    assert (record["ended"], record["steps"], record["exit_code"]) == ("interrupted", 8, 143)
    last = str(tmp_path / "parts" / "checkpoints" / "last.pt")
    assert launch(ROOT / "train.py", tmp_path, ["--resume", last], 2).returncode == 0
    assert without_times(rows_of(tmp_path / "whole")) == without_times(rows_of(tmp_path / "parts"))
    assert same_weights(weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts"))


def test_a_long_prompt_is_not_read_token_by_token(tiny, make_trainer):
    """Rows that stand together read what is beyond the shortest one token by token."""
    trainer = make_trainer(tiny(prompt="BIANCA:\n" * 12, num_prompts=2, max_new_tokens=4, block_size=64))
    calls = []
    trainer.sample(lambda: calls.append(1))
    assert len(calls) == 2 * 4
    near = make_trainer(tiny(prompt=trainer.prompts()[1], num_prompts=2, max_new_tokens=64, block_size=64))
    calls.clear()
    texts = near.sample(lambda: calls.append(1))
    assert 64 <= len(calls) < 80
    assert [prompt for prompt, _ in texts] == near.prompts()


@pytest.mark.parametrize("damage", ["stop,epoch\n", "", "step,epoch,tokens,loss\n"])
@pytest.mark.parametrize("older", [False, True])
def test_a_damaged_header_costs_no_row(tiny, tmp_path, damage, older):
    train.train(tiny(steps=4, save_every=2))
    file = tmp_path / "out" / "logs" / "train_metrics.csv"
    lines = file.read_text().splitlines()[1:]
    file.write_text(damage + "".join((line.rsplit(",", 1)[0] if older else line) + "\n" for line in lines))
    train.train(tiny(steps=6, save_every=2, resume="auto"))
    assert [row["step"] for row in rows_of(tmp_path / "out")] == ["1", "2", "3", "4", "5", "6"]


# ---- characters ----


CHARS = {"tokenizer": "char", "prompt": "AMBROSE:\n"}


def test_a_model_of_characters_trains_resumes_and_keeps_its_vocabulary(tiny, tmp_path):
    text = PLAY.read_text(encoding="utf-8")
    train.train(tiny(**CHARS, steps=12, save_every=6, num_prompts=2))
    last, previous = (tmp_path / "out" / "checkpoints" / name for name in ("last.pt", "previous.pt"))
    state = train.load_checkpoint(last)
    assert state["tokenizer"] == {"name": "char", "vocab_size": len(set(text)), "vocabulary": sorted(set(text))}
    assert state["model_config"]["vocab_size"] == len(set(text))
    assert train.main(["--resume", str(previous)]) == 0  # which takes the tokenizer from the checkpoint
    assert same_weights(state["model"], train.load_checkpoint(last)["model"])
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["corpus"]["tokens"] == len(text)


def test_an_unknown_character_in_a_prompt_is_said_before_anything_is_written(tiny, tmp_path):
    with pytest.raises(train.UsageError, match="not '€': leave them out of the prompt"):
        train.train(tiny(tokenizer="char", prompt="€"))
    assert not (tmp_path / "out").exists()


def test_the_default_prompt_goes_where_the_text_lacks_its_characters(tmp_path, tiny, make_trainer):
    (tmp_path / "digits.txt").write_text("0123456789\n\n" * 30)
    trainer = make_trainer(tiny(tokenizer="char", input_file=str(tmp_path / "digits.txt")))
    assert trainer.prompts() and all(set(prompt) <= set("0123456789\n") for prompt in trainer.prompts())


def test_resuming_with_another_tokenizer_is_a_conflict(tiny, tmp_path):
    train.train(tiny(**CHARS))
    with pytest.raises(train.UsageError, match="tokenizer gpt2 conflicts with the checkpoint's char"):
        train.train(tiny(prompt=CHARS["prompt"], resume="auto"))


def test_several_texts_are_trained_on_and_resumed(tmp_path, tiny):
    (tmp_path / "more.txt").write_text("FINIS\n" * 20)
    given = (str(PLAY), str(tmp_path / "more.txt"))
    train.train(tiny(input_file=given, steps=6, save_every=3))
    assert train.main(["--resume", str(tmp_path / "out" / "checkpoints" / "previous.pt")]) == 0
    with pytest.raises(train.UsageError, match="isn't the checkpoint's text"):
        train.train(tiny(input_file=given[::-1], resume="auto"))


def test_recall_asks_for_nothing_held_out(tiny, make_trainer, monkeypatch):
    trainer, seen = make_trainer(tiny(val_fraction=0.5, seq_len=64, recall_places=500)), set()

    def stream(self, rows, *args, **kwargs):
        seen.update(tuple(row) for row in rows.tolist())
        return iter([])

    monkeypatch.setattr(train.GPT, "stream", stream)
    trainer.recall(lambda: None)
    held = trainer.held_out.tokens.tolist()
    assert len(seen) == 500 and not seen & {tuple(held[i : i + 32]) for i in range(len(held) - 31)}
