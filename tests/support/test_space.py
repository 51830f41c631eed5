"""The folder of a Space: what is in it, and that the page starts from it alone."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys

import pytest
import torch
from conftest import TINY

import app
import train
from support import space
from support.checkpoint import load_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("run") / "out"
    train.train(train.TrainConfig(**{**TINY, "out_dir": str(out_dir), "num_prompts": 1}))
    return out_dir / "checkpoints" / "best.pt"


@pytest.fixture(scope="module")
def space_dir(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("space") / "space"
    assert app.main(["--checkpoint", str(checkpoint), "--make_space", str(folder)]) == 0
    return folder


def test_a_space_says_what_it_is_and_needs(space_dir):
    front = (space_dir / "README.md").read_text(encoding="utf-8").split("---\n")[1]
    settings = dict(re.findall(r"^(\w+): (.*)$", front, re.M))
    assert settings["sdk"] == "gradio"
    assert settings["sdk_version"] == importlib.metadata.version("gradio")
    assert (space_dir / settings["app_file"]).is_file()
    needed = (space_dir / "requirements.txt").read_text(encoding="utf-8")
    assert "torch" in needed
    assert "export_hf" not in needed


def test_the_page_starts_from_a_space_alone(space_dir):
    """In an interpreter of its own that sees this folder and the installed packages, and nothing else of ours."""
    code = (
        "import app, pathlib; p = app.Page(app.chosen_checkpoint('app.py', None)); app.build(p)\n"
        "print(p.status(), p.training()[0], 'svg' in p.training()[1])\n"
        "import train; print(pathlib.Path(train.__file__).parent)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=space_dir, capture_output=True, text=True)
    assert "811,728 parameters" in done.stdout, done.stderr
    assert "steps done" in done.stdout
    assert "True" in done.stdout
    assert done.stdout.splitlines()[-1] == str(space_dir.resolve())


def test_a_space_is_written_into_an_empty_folder_alone(space_dir, checkpoint, capsys):
    assert app.main(["--checkpoint", str(checkpoint), "--make_space", str(space_dir)]) == 2
    assert "isn't empty" in capsys.readouterr().err


def test_a_space_that_cannot_be_written_leaves_nothing(checkpoint, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device", "best.pt")

    folder = tmp_path / "space"
    assert app.main(["--checkpoint", "nowhere.pt", "--make_space", str(folder)]) == 2
    monkeypatch.setattr(space, "copy_run", full)
    capsys.readouterr()
    assert app.main(["--checkpoint", str(checkpoint), "--make_space", str(folder)]) == 1
    assert capsys.readouterr().err == "app.py: No space left on device (best.pt): make room, then try again\n"
    assert not list(tmp_path.iterdir())


def test_a_space_can_hold_its_weights_in_half_the_bytes(checkpoint, tmp_path, capsys):
    last = checkpoint.with_name("last.pt")  # which also holds what only training needs
    before = last.read_bytes()
    folder = tmp_path / "space"
    assert app.main(["--checkpoint", str(last), "--make_space", str(folder), "--dtype", "fp16"]) == 0
    assert "likeliest next token" in capsys.readouterr().out
    assert last.read_bytes() == before
    half = folder / "out" / "checkpoints" / "best.pt"
    assert half.stat().st_size < 0.6 * checkpoint.stat().st_size
    whole, _, _ = load_model(last, train.ARCHITECTURES)
    rounded, _, _ = load_model(half, train.ARCHITECTURES, lazy=False)
    for (name, p), q in zip(whole.named_parameters(), rounded.parameters(), strict=True):
        assert q.dtype == torch.float32
        assert torch.equal(p.half().float(), q), name


def test_without_a_space_dtype_is_refused(checkpoint, capsys):
    assert app.main(["--checkpoint", str(checkpoint), "--dtype", "fp16"]) == 2
    assert "--dtype is of what --make_space writes" in capsys.readouterr().err
