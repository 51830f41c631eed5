"""Checkpoints made to do harm, or that are no files: one sentence in every program, and no memory for it."""

from __future__ import annotations

import contextlib
import os
import struct
import zipfile

import pytest
import torch
from checkpoint_kit import finished_fixture, out_fixture  # noqa: F401  (fixtures)

import export_hf
import sample
import train
from support.checkpoint import load_checkpoint, load_model
from support.cli import DamagedError, RunError
from support.rundir import RunDirectory

WEIGHT = "transformer.wte.weight"


def changed(state: dict, part: str, **values) -> None:
    state[part] = state[part] | values


def whole(state: dict, **values) -> None:
    state.update(values)


def with_weight(state: dict, weight) -> None:
    state["model"] = state["model"] | {WEIGHT: weight, "lm_head.weight": weight}


def one_nan(state: dict) -> None:
    weight = state["model"][WEIGHT].clone()
    weight[3, 2] = float("nan")
    with_weight(state, weight)


def laughs() -> list:
    """A list that takes a few bytes in a file; written out, it would take petabytes."""
    one = ["ha"]
    for _ in range(40):
        one = [one, one]
    return one


# {what is wrong: (how it is made, a word of the sentence)}
HOSTILE = {
    "nan": (one_nan, "isn't finite"),
    "infinity": (lambda state: with_weight(state, state["model"][WEIGHT] / 0), "isn't finite"),
    "step of words": (lambda state: whole(state, step="seven"), "isn't of this program"),
    "step of nothing": (lambda state: whole(state, step=None), "isn't of this program"),
    "step under 0": (lambda state: whole(state, step=-5), "its step is no number of 0 or more"),
    "loss of nan": (lambda state: whole(state, loss=float("nan")), "its loss is no number of 0 or more"),
    "loss of lists": (lambda state: whole(state, loss=laughs()), "its loss is no number of 0 or more"),
    "origin": (lambda state: whole(state, origin=7), "its origin is no text"),
    "prompt": (lambda state: changed(state, "config", prompt=7), "its prompt is no text"),
    "temperature": (lambda state: changed(state, "config", temperature=-1), "its temperature is no number"),
    "numbers": (lambda state: with_weight(state, [1.0, 2.0]), "its weights aren't plain tensors"),
    "whole numbers": (lambda state: with_weight(state, torch.ones(9, dtype=torch.long)), "aren't plain tensors"),
    "sparse": (lambda state: with_weight(state, torch.eye(9).to_sparse()), "its weights aren't plain tensors"),
    "repeated": (lambda state: with_weight(state, torch.ones(1).expand(10**12)), "are larger than the file"),
}
# What only the programs ask that make a model of it.
NO_MODEL = {
    "layers": (lambda state: changed(state, "model_config", n_layer=10**9), "fewer weights than layers"),
    "no layers": (lambda state: changed(state, "model_config", n_layer=0), "aren't of the shape"),
    "width": (lambda state: changed(state, "model_config", n_embd=10**9, n_head=1), "lacks what a model needs"),
    "context": (lambda state: changed(state, "model_config", block_size=10**15), "lacks what a model needs"),
    "heads": (lambda state: changed(state, "model_config", n_head=5), "isn't divisible by its heads"),
    "no heads": (lambda state: changed(state, "model_config", n_head=0), "isn't divisible by its heads"),
    "shape": (lambda state: whole(state, model_config=[1]), "lacks what a model needs"),
    "tokens": (lambda state: changed(state, "tokenizer", vocabulary=["a"]), "1 tokens, and a model of"),
    "half characters": (lambda state: changed(state, "tokenizer", vocabulary=["\ud800"]), "UnicodeEncodeError"),
    "no characters": (lambda state: changed(state, "tokenizer", vocabulary=[7]), "lacks what a model needs"),
}


def spoil(path, how) -> None:
    state = torch.load(path, weights_only=True)
    how(state)
    torch.save(state, path)


def assert_one_sentence(call, path, capsys, exit_code: int, words: str) -> None:
    assert call(str(path)) == exit_code
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


PROGRAMS = {
    "train.py": lambda path: train.main(["--resume", path, "--steps", "40"]),
    "sample.py": lambda path: sample.main(["--checkpoint", path, "--device", "cpu"]),
    "export_hf.py": lambda path: export_hf.main(["--checkpoint", path, "--out_dir", f"{path}.hf"]),
}
on_posix = pytest.mark.skipif(os.name != "posix", reason="pipes and links of POSIX")
programs = pytest.mark.parametrize("program", PROGRAMS)


@pytest.mark.parametrize("what", [*HOSTILE, *NO_MODEL])
@pytest.mark.parametrize("lazy", [True, False])
def test_what_cannot_be_in_a_checkpoint_is_told_before_anything_is_made_of_it(out, what, lazy):
    last = out / "checkpoints" / "last.pt"
    how, words = (HOSTILE | NO_MODEL)[what]
    spoil(last, how)
    with pytest.raises(RunError) as caught:
        load_model(last, train.ARCHITECTURES, lazy)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@programs
@pytest.mark.parametrize("what", ["nan", "step of words", "step under 0"])
def test_each_program_says_it_in_one_sentence(out, capsys, program, what):
    last = out / "checkpoints" / "last.pt"
    how, words = HOSTILE[what]
    spoil(last, how)
    assert_one_sentence(PROGRAMS[program], last, capsys, 1, words)


@pytest.mark.parametrize("setting", ["n_layer", "n_embd", "block_size"])
def test_a_run_of_a_huge_model_is_refused_before_it_is_made(out, capsys, setting):
    last = out / "checkpoints" / "last.pt"
    spoil(last, lambda state: changed(state, "config", **{setting: 10**9}))
    assert_one_sentence(PROGRAMS["train.py"], last, capsys, 2, f"{setting} 1000000000 is too large")


def test_after_nan_in_last_pt_auto_goes_on_from_the_one_before(out, capsys):
    spoil(out / "checkpoints" / "last.pt", one_nan)
    assert train.main(["--resume", "auto", "--out_dir", str(out), "--steps", "22"]) == 0
    assert "Resumed: step 20" in (out / "logs" / "train.log").read_text()


# ---- archives ----


def test_a_packed_archive_is_refused_since_it_can_hold_more_than_any_memory(out):
    last = out / "checkpoints" / "last.pt"
    spoil(last, lambda state: whole(state, padding="x" * 10**7))
    packed = last.with_name("packed.pt")
    with zipfile.ZipFile(last) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert packed.stat().st_size < 10**6
    assert torch.load(packed, weights_only=True)["step"] == 30  # as far as torch goes, it is sound
    for lazy in (True, False):
        with pytest.raises(DamagedError, match="is damaged"):
            load_checkpoint(packed, lazy)


def test_an_archive_that_claims_to_hold_more_than_it_does_is_refused(out):
    last = out / "checkpoints" / "last.pt"
    data = bytearray(last.read_bytes())
    entry = data.index(b"data.pkl", data.index(b"PK\x01\x02")) - len("last/") - 46  # of the archive's directory
    entry = data.rindex(b"PK\x01\x02", 0, entry + 46)
    struct.pack_into("<II", data, entry + 20, 0xF0000000, 0xF0000000)  # its size, packed and not
    last.write_bytes(data)
    for lazy in (True, False):
        with pytest.raises(DamagedError, match="BadZipFile"):
            load_checkpoint(last, lazy)


# ---- no plain file ----


@contextlib.contextmanager
def pipe_at(path):
    os.mkfifo(path)
    both_ends = os.open(path, os.O_RDWR)  # so that to open it waits for nobody
    yield
    os.close(both_ends)


@pytest.fixture(params=["folder", "pipe", "device", "link"])
def no_file(request, tmp_path):
    """(a path, what it is)"""
    path = tmp_path / "last.pt"
    if request.param == "folder":
        path.mkdir()
        yield path, "a folder"
    elif request.param == "device":
        path.symlink_to(os.devnull)
        yield path, "a pipe or a device"
    elif request.param == "link":
        path.symlink_to(tmp_path / "gone.pt")
        yield path, f"a link that leads nowhere ({tmp_path / 'gone.pt'})"
    else:
        with pipe_at(path):
            yield path, "a pipe or a device"


@on_posix
@programs
def test_what_is_no_file_is_told_before_it_is_opened(program, no_file, capsys):
    path, kind = no_file
    words = f"checkpoint {path} is {kind}: name a last.pt or best.pt that train.py wrote"
    assert_one_sentence(PROGRAMS[program], path, capsys, 2, words)


@on_posix
def test_no_run_starts_from_a_pipe(tmp_path, capsys):
    path = tmp_path / "best.pt"
    with pipe_at(path):
        assert train.main(["--init_from", str(path), "--steps", "4"]) == 2
    assert f"checkpoint {path} is a pipe or a device" in capsys.readouterr().err


@on_posix
def test_auto_goes_on_from_the_checkpoint_before_a_pipe(out):
    run_dir = RunDirectory(out)
    run_dir.last.unlink()
    with pipe_at(run_dir.last):
        assert run_dir.find_checkpoint("auto", lazy=True)[0] == run_dir.previous


@on_posix
@pytest.mark.parametrize("name", ["checkpoints/last.pt", "logs/train.log", "run.json"])
@pytest.mark.parametrize("mode", [["--resume", "auto"], ["--overwrite"]])
def test_a_run_does_not_begin_where_no_file_can_be_written(out, no_file, capsys, name, mode):
    """A link that leads nowhere was blamed on permissions, and the log in a pipe waits for a reader."""
    path, kind = no_file
    place = out / name
    place.unlink()
    path.rename(place)
    before = sorted(out.rglob("*"))
    assert train.main(["--out_dir", str(out), "--steps", "40", *mode]) == 2
    err = capsys.readouterr().err
    assert f"can't be written, since {place} is {kind}: move it away, or choose another --out_dir" in err
    assert sorted(out.rglob("*")) == before


@on_posix
def test_a_folder_of_a_run_that_is_a_link_to_nowhere_is_told(tmp_path, capsys):
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    assert train.main(["--out_dir", str(tmp_path / "out"), "--steps", "4"]) == 2
    assert f"{tmp_path / 'out'} is a link that leads nowhere" in capsys.readouterr().err
