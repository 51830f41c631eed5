"""What a run leaves behind: log, CSV, samples, run.json, checkpoints."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re

import pytest
import torch
from conftest import PLAY, rows_of

import train

LINE = re.compile(
    r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} \| INFO \| step (\d+)/20 \| loss \d+\.\d{6} \| lr \d\.\d\de[-+]\d\d"
    r" \| tok/s \d+\.\d( \| |$)"
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The run directory of one finished run."""
    from conftest import TINY

    out = tmp_path_factory.mktemp("run") / "out"
    settings = {"out_dir": str(out), "steps": 20, "log_every": 8, "sample_every": 2, "no_mfu": False}
    config = train.TrainConfig(**{**TINY, **settings})
    train.train(config, command="python train.py --steps 20")
    return out


def test_log_lines_have_their_form(finished):
    lines = (finished / "logs" / "train.log").read_text().splitlines()
    assert [int(m[1]) for line in lines if (m := LINE.match(line))] == [1, 8, 16, 20]
    assert all(re.match(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} \| [A-Z]+ \| ", line) for line in lines)


def test_the_log_opens_with_what_decides_the_run_and_closes_with_its_end(finished):
    messages = [line.split(" | ", 2)[2] for line in (finished / "logs" / "train.log").read_text().splitlines()]
    first_step = next(i for i, m in enumerate(messages) if m.startswith("step "))
    opening, closing = messages[:first_step], messages[first_step:]
    for start in (
        "Device: cpu",
        "Precision: fp32, because",
        "Optimizer: ",
        "Args: {",
        "Parameters: ",
        "Tokens: 2,547 in 40",
        "Causality: ",
    ):
        assert any(m.startswith(start) for m in opening), start
    assert "Tokens per step: 64 (batch_size 2 x seq_len 32 x grad_accum 1 x processes 1)" in opening
    args = json.loads(next(m for m in opening if m.startswith("Args: ")).removeprefix("Args: "))
    assert args["steps"] == 20 and args["warmup_steps"] == 2 and args["save_every"] == 2
    assert "Ended: steps done at step 20 of 20" in closing


def test_the_csv_has_a_row_each_log(finished):
    rows = rows_of(finished)
    assert (finished / "logs" / "train_metrics.csv").read_text().splitlines()[0] == (
        "step,epoch,tokens,loss,avg_loss,best_loss,lr,grad_norm,tok_per_s,elapsed_s,mfu"
    )
    assert [row["step"] for row in rows] == ["1", "8", "16", "20"]
    assert [row["tokens"] for row in rows] == ["64", "512", "1024", "1280"]
    assert [row["epoch"] for row in rows] == ["0.025", "0.2", "0.4", "0.5"]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    elapsed = [float(row["elapsed_s"]) for row in rows]
    assert elapsed == sorted(elapsed)


def test_mfu_is_the_share_of_the_limit_in_log_and_csv(finished):
    """6 x parameters x tok/s of the limit that the log's opening states."""
    log = (finished / "logs" / "train.log").read_text()
    limit = 1e9 * float(re.search(r"Limit for mfu: ([\d,]+) GFLOP/s", log)[1].replace(",", ""))
    parameters = json.loads((finished / "run.json").read_text())["parameters"]
    rows = rows_of(finished)
    for row in rows:
        share = 6 * parameters * float(row["tok_per_s"]) / limit
        assert float(row["mfu"]) == pytest.approx(share, rel=0.5 / (limit / 1e9) + 0.01, abs=0.001)
    assert re.findall(r"step .* \| mfu (\S+)$", log, re.M) == [row["mfu"] for row in rows]


def test_an_unknown_limit_is_called_so(tiny, tmp_path):
    train.train(tiny(no_mfu=True))
    assert {row["mfu"] for row in rows_of(tmp_path / "out")} == {"unknown"}
    log = (tmp_path / "out" / "logs" / "train.log").read_text()
    assert "Limit for mfu: unknown, --no_mfu" in log
    assert " | mfu unknown\n" in log


def test_rows_of_an_older_file_without_mfu_stay(tiny, tmp_path):
    train.train(tiny(steps=4, save_every=2))
    file = tmp_path / "out" / "logs" / "train_metrics.csv"
    before = rows_of(tmp_path / "out")
    file.write_text("".join(line.rsplit(",", 1)[0] + "\n" for line in file.read_text().splitlines()))
    train.train(tiny(steps=6, save_every=2, resume="auto", no_mfu=False))
    rows = rows_of(tmp_path / "out")
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert [row["loss"] for row in rows[:4]] == [row["loss"] for row in before]
    assert [row["mfu"] for row in rows[:4]] == ["unknown"] * 4


def test_samples_stand_in_blocks(finished):
    text = (finished / "samples" / "samples.txt").read_text(encoding="utf-8")
    blocks = text.split("=" * 80 + "\n")[1:]
    assert [b.splitlines()[0] for b in blocks] == [f"STEP {n}" for n in range(2, 21, 2)]
    assert all(b.count("PROMPT:\n") == b.count("OUTPUT:\n") == 2 for b in blocks)
    assert all("PROMPT:\nBIANCA:\nOUTPUT:\n" in b for b in blocks)


def test_run_json_tells_the_whole_run(finished):
    record = json.loads((finished / "run.json").read_text())
    assert record["command"] == "python train.py --steps 20"
    assert record["config"]["steps"] == 20 and record["seed"] == 1337
    assert set(record["versions"]) >= {"python", "torch", "numpy", "tiktoken", "platform"}
    assert record["device"].startswith("cpu") and record["precision"] == "fp32"
    assert record["corpus"]["sha256"] == train.hashlib.sha256(PLAY.read_bytes()).hexdigest()
    assert record["corpus"]["tokens"] == 2547
    assert record["parameters"] == sum(p.numel() for p in train.GPT(train.GPTConfig(64, 50257, 2, 2, 16)).parameters())
    assert record["start"] <= record["end"]
    assert (record["ended"], record["steps"], record["tokens"]) == ("steps done", 20, 1280)
    assert record["target_loss"] == 0.1 and record["tokens_to_target"] is None


def test_checkpoints_hold_plain_data_and_gpt2_names(finished):
    last = torch.load(finished / "checkpoints" / "last.pt", weights_only=True)
    assert {
        "model",
        "optimizer",
        "scheduler",
        "scaler",
        "batcher",
        "rng",
        "losses",
        "step",
        "config",
        "tokenizer",
    } <= set(last)
    assert last["scaler"] is None
    assert {"transformer.wte.weight", "transformer.h.0.attn.c_attn.weight", "lm_head.weight"} <= set(last["model"])
    assert last["config"]["steps"] == 20 and last["config"]["warmup_steps"] is None  # as given, not as filled in


def test_best_pt_holds_the_lowest_avg_loss_of_a_save(tiny, tmp_path, monkeypatch):
    best = tmp_path / "out" / "checkpoints" / "best.pt"
    losses = {20: 1.0, 40: 5.0, 80: 4.0, 85: 2.0, 120: 6.0}  # step 20 is before a first full pass, 85 is no save point
    monkeypatch.setattr(train.Trainer, "avg_loss", lambda self: losses.get(self.step, 7.0))
    saved = []

    def look(loop):
        loop.writer.wait()
        saved.append(best.exists() and loop.trainer.best_saved)

    monkeypatch.setattr(train.Loop, "write_samples", look)
    train.train(tiny(steps=120, save_every=20, sample_every=20))
    assert saved == [False, 5.0, 5.0, 4.0, 4.0, 4.0]
    content = train.load_checkpoint(best)
    assert (content["step"], content["loss"]) == (80, 4.0) and "optimizer" not in content
    assert [float(r["best_loss"]) for r in rows_of(tmp_path / "out")][-1] == 2.0


def test_a_compiler_that_fails_is_one_sentence(tiny, monkeypatch):
    def no_compiler(model):
        def fail(*args, **kwargs):
            raise RuntimeError("No working C++ compiler found\nand much more")

        return fail

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(train.RunError, match=r"^torch.compile fails here \(No working C\+\+ compiler found\): leave"):
        train.train(tiny(compile=True))


def test_checkpoints_of_a_compiled_model_have_the_same_names(tiny, tmp_path, monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: real(model, backend="eager"))
    train.train(tiny(compile=True, steps=2))
    saved = train.load_checkpoint(tmp_path / "out" / "checkpoints" / "last.pt")["model"]
    assert set(saved) == set(train.GPT(train.GPTConfig(64, 50257, 2, 2, 16)).state_dict())


# ---- writing ----


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), train.atomic_write(path) as f:
        f.write(b"half of the n")
        raise RuntimeError("power cut")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]
    with train.atomic_write(path) as f:
        f.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["file"]


def test_a_written_file_has_the_usual_mode(tmp_path):
    with train.atomic_write(tmp_path / "atomic"):
        pass
    (tmp_path / "plain").touch()
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_checkpoint_that_cannot_be_written_is_one_sentence_and_keeps_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    train.save_checkpoint(path, {"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(train.RunError, match=r"No space left on device\): the one before it is intact"):
            train.save_checkpoint(path, {"step": 2})
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert os.listdir(tmp_path) == ["last.pt"]


def test_overwriting_removes_a_run_and_nothing_else(tiny, tmp_path):
    train.train(tiny())
    (tmp_path / "out" / "notes.txt").write_text("mine")
    train.train(tiny(overwrite=True, steps=3))
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert len(rows_of(tmp_path / "out")) == 3


def test_a_corpus_that_does_not_fit_leaves_nothing_behind(tiny, tmp_path):
    (tmp_path / "short.txt").write_text("Speak, speak.")
    with pytest.raises(train.UsageError, match="the text has 5 tokens"):
        train.train(tiny(input_file=str(tmp_path / "short.txt")))
    assert not (tmp_path / "out").exists()


# ---- reading ----


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil",))


@pytest.mark.parametrize("content", ["truncated", b"", b"text", "code", "foreign", "newer", "flipped"])
def test_a_bad_checkpoint_is_one_sentence(finished, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "last.pt"
    good = (finished / "checkpoints" / "last.pt").read_bytes()
    if content == "truncated":
        path.write_bytes(good[: len(good) // 2])
    elif content == "flipped":
        path.write_bytes(good[:1_000_000] + bytes([good[1_000_000] ^ 1]) + good[1_000_001:])
    elif content == "code":
        torch.save(Evil(), path)
    elif content == "foreign":
        torch.save({"model": {}, "iter_num": 3}, path)
    elif content == "newer":
        torch.save(train.load_checkpoint(finished / "checkpoints" / "last.pt") | {"format": 99}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(train.RunError) as caught:
        train.load_checkpoint(path)
    assert "last.pt" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "evil").exists()  # code in a pickle is never run


@pytest.mark.parametrize("part", ["losses", "optimizer", "batcher"])
def test_a_checkpoint_that_lacks_a_part_is_one_sentence(tiny, tmp_path, part):
    train.train(tiny())
    last = tmp_path / "out" / "checkpoints" / "last.pt"
    train.save_checkpoint(last, train.load_checkpoint(last) | {part: {}})
    with pytest.raises(train.RunError, match="lacks what a run needs"):
        train.train(tiny(resume="auto", steps=20))


def test_a_checkpoint_without_permission_is_not_called_damaged(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(train.zipfile, "ZipFile", refuse)
    with pytest.raises(train.RunError, match=r"can't be read \(Permission denied\): check its permissions"):
        train.load_checkpoint(tmp_path / "last.pt")


def test_folders_that_cannot_be_written_are_found_before_training(tiny, tmp_path, monkeypatch):
    train.train(tiny())
    locked = tmp_path / "out" / "checkpoints" / "last.pt"
    monkeypatch.setattr(train.os, "access", lambda path, mode: path != locked)
    with pytest.raises(train.UsageError, match=r"can't be written: change the permissions of .*last.pt"):
        train.train(tiny(resume="auto", steps=20))


class Terminal(io.TextIOWrapper):
    def __init__(self, encoding, error=None):
        super().__init__(io.BytesIO(), encoding=encoding)
        self.error = error

    def write(self, text):
        if self.error:
            raise self.error
        return super().write(text)


def test_a_terminal_that_lacks_a_character_or_went_away_ends_no_run(monkeypatch):
    monkeypatch.setattr(train.sys, "stdout", terminal := Terminal("ascii"))
    train.show("caf\u00e9")
    assert terminal.buffer.getvalue() == b"caf?\n"
    monkeypatch.setattr(train.sys, "stdout", Terminal("utf-8", BrokenPipeError()))
    train.show("text")
    train.show("and again, with no terminal at all")


def test_two_runs_in_one_process_do_not_share_a_log(tiny, tmp_path):
    train.train(tiny(out_dir=str(tmp_path / "a")))
    size = (tmp_path / "a" / "logs" / "train.log").stat().st_size
    train.train(tiny(out_dir=str(tmp_path / "b")))
    assert (tmp_path / "a" / "logs" / "train.log").stat().st_size == size
    assert not logging.getLogger("train").handlers


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0}).Reload()
    return {key: {e.step: e.value for e in found.Scalars(key)} for key in found.Tags()["scalars"]}, found


def test_tensorboard_has_the_rows_and_the_samples(tiny, tmp_path):
    train.train(tiny(tensorboard=True, steps=9, save_every=3, sample_every=4, prompt="TILDA:\n"))
    figures, found = events(tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    for key in ("loss", "avg_loss", "lr", "grad_norm", "tok_per_s"):
        assert figures[key] == {int(r["step"]): pytest.approx(float(r[key]), rel=1e-5) for r in rows}
    texts = found.Tensors("sample 0/text_summary")
    assert [event.step for event in texts] == [4, 8, 9]
    assert texts[0].tensor_proto.string_val[0].decode().startswith("    TILDA:\n    ")


def test_tensorboard_goes_on_after_a_resume_and_is_cleared_by_overwrite(tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train.Loop, "asked", lambda loop, _: (loop.trainer.step == 7, False))
        train.train(tiny(tensorboard=True, steps=9, save_every=3))
    (tmp_path / "out" / "checkpoints" / "last.pt").unlink()  # so that it goes back behind what was written
    train.train(tiny(tensorboard=True, steps=9, save_every=3, resume="auto"))
    assert sorted(events(tmp_path / "out")[0]["loss"]) == list(range(1, 10))
    train.train(tiny(tensorboard=True, steps=2, overwrite=True))
    assert sorted(events(tmp_path / "out")[0]["loss"]) == [1, 2]


def test_a_fault_of_tensorboard_ends_no_run(tiny, tmp_path, monkeypatch):
    from torch.utils import tensorboard

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensorboard.SummaryWriter, "add_scalar", full)
    record = train.train(tiny(tensorboard=True, steps=5))
    assert record["ended"] == "steps done"
    log = (tmp_path / "out" / "logs" / "train.log").read_text()
    assert log.count("TensorBoard's files can't be written") == 1


def test_figures_reach_the_disk_before_the_checkpoint(tiny, tmp_path, monkeypatch):
    """So that a killed run, which goes on from there, has no gap."""
    seen = []
    real = train.CheckpointWriter.save
    monkeypatch.setattr(
        train.CheckpointWriter,
        "save",
        lambda self, *args: (seen.append(sorted(events(tmp_path / "out")[0]["loss"])), real(self, *args)),
    )
    train.train(tiny(tensorboard=True, steps=6, save_every=3))
    assert seen == [[1, 2, 3], [1, 2, 3, 4, 5, 6]]


def test_without_tensorboard_it_is_one_sentence(tiny, monkeypatch):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(train.UsageError, match="tensorboard isn't installed: pip install tensorboard, or leave"):
        tiny(tensorboard=True).validate()
    assert not os.path.exists(tiny().out_dir + "/tensorboard")
