"""The stopping rule: avg_loss under the target over a full pass, then final_loss, the proof, under it too."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import log_of, rows_of

import train
from support.checkpoint import load_checkpoint
from support.cli import Stopped, StopSignals

FAR = 1000.0  # a target that any model is under
PASS = 21  # batches in a pass over the quick text


# ---- the proof ----


def test_the_proof_counts_each_target_once(quick, make_trainer):
    trainer = make_trainer(quick(dropout=0.5))
    tokens = torch.from_numpy(trainer.corpus.tokens.astype("int64"))
    trainer.model.eval()
    losses = {}  # place of a target -> its loss, from the windows of training
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


def test_a_proof_can_be_stopped(quick, make_trainer):
    trainer = make_trainer(quick())

    def poll():
        raise Stopped

    with pytest.raises(Stopped):
        trainer.evaluate(poll, trainer.batcher)


def test_a_fault_in_the_proof_loses_nothing(quick, tmp_path, monkeypatch):
    def fault(self, *args):
        raise RuntimeError("the device fell off the bus")

    monkeypatch.setattr(train.Trainer, "evaluate", fault)
    with pytest.raises(RuntimeError):
        train.train(quick(steps=100, target_loss=FAR, save_every=1000))
    assert load_checkpoint(tmp_path / "out" / "checkpoints" / "last.pt")["step"] == PASS


# ---- the stop ----


def test_the_run_stops_when_the_target_is_proven(quick):
    result = train.train(quick(steps=400, lr=1e-2, target_loss=2.9, log_every=50))
    assert result["ended"] == "target reached"
    assert PASS < result["steps"] < 400
    assert result["avg_loss"] < 2.9
    assert result["final_loss"] < 2.9
    assert result["tokens_to_target"] == result["tokens"] == result["steps"] * 64
    assert 0 < result["seconds_to_target"] <= result["seconds"]
    rows = rows_of(result["config"]["out_dir"])
    assert int(rows[-1]["step"]) == result["steps"]  # the last step has its row
    # avg_loss decides: it is under the target for the first time.
    assert float(rows[-1]["avg_loss"]) < 2.9
    assert all(float(row["avg_loss"]) >= 2.9 for row in rows[:-1])


def test_a_first_full_pass_comes_before_any_stop(quick):
    result = train.train(quick(steps=100, target_loss=FAR, log_every=7))
    assert result["ended"] == "target reached"
    assert result["steps"] == PASS  # though every loss was under the target


def test_the_target_is_strict(quick, make_trainer, tmp_path):
    trainer = make_trainer(quick(target_loss=5.0))
    loop = train.Loop(trainer, train.RunDirectory(tmp_path), logging.Logger("x"), StopSignals(), "")
    trainer.batcher.position = trainer.batcher.n_batches
    loop.save = lambda: None
    trainer.evaluate = lambda *_: 4.0
    assert not loop.target_proven(5.0)
    assert loop.target_proven(4.999)
    loop.checkpoints.close()


def test_target_0_never_stops(quick):
    result = train.train(quick(steps=25, target_loss=0.0))
    assert (result["ended"], result["steps"]) == ("steps done", 25)
    assert result["final_loss"] is not None
    assert result["tokens_to_target"] is None


# ---- a proof that fails ----


@pytest.fixture
def proofs(monkeypatch):
    """Steps of the proofs. A proof gives 1 where its step is in `proofs.good`, else 2000."""

    class Steps(list):
        good = ()

    steps = Steps()

    def evaluate(trainer, poll, batcher, first=0):
        steps.append(trainer.progress.step)
        return 1.0 if trainer.progress.step in steps.good else 2000.0

    monkeypatch.setattr(train.Trainer, "evaluate", evaluate)
    return steps


def test_a_failed_proof_lets_the_run_go_on(quick, proofs, tmp_path):
    proofs.good = (3 * PASS,)
    result = train.train(quick(steps=500, target_loss=FAR))
    assert proofs == [PASS, 2 * PASS, 3 * PASS]  # tried again a pass later, not at each step
    assert (result["ended"], result["steps"], result["final_loss"]) == ("target reached", 3 * PASS, 1.0)
    assert log_of(tmp_path / "out").count("The proof isn't under the target: training goes on") == 2


def test_a_target_met_by_the_last_step_is_reached(quick, proofs):
    """The last step is proven even where a pass since the failed proof isn't over."""
    proofs.good = (30,)
    result = train.train(quick(steps=30, target_loss=FAR))
    assert (result["ended"], result["final_loss"]) == ("target reached", 1.0)
    assert proofs == [PASS, 30]


def test_a_proof_that_fails_at_the_last_step_is_not_made_twice(quick, proofs, tmp_path):
    result = train.train(quick(steps=PASS, target_loss=FAR))
    assert (result["ended"], result["final_loss"]) == ("steps done", 2000.0)
    assert proofs == [PASS]
    told = log_of(tmp_path / "out")
    assert "The proof isn't under the target, and all steps are done" in told
    assert "training goes on" not in told
