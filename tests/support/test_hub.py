"""A folder on the Hugging Face Hub: what is sent there, and each refusal in one sentence."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

import huggingface_hub
import pytest
from conftest import ROOT, TINY
from hub_kit import TOKEN, FakeHub

import app
import export_hf
import train
from support import hub
from support.cli import RunError, UsageError

NAME = "ada/tiny"


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A Hub on this machine, where huggingface_hub looks for the real one."""
    constants = huggingface_hub.constants
    with FakeHub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a protocol that is left to the library
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "nobody's token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "README.md").write_text("# A card\n")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("run") / "out"
    train.train(train.TrainConfig(**{**TINY, "out_dir": str(out_dir), "num_prompts": 1}))
    return out_dir / "checkpoints" / "best.pt"


def files_of(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- what is sent ----


@pytest.mark.parametrize(("kind", "sdk"), [("model", None), ("space", "gradio")])
@pytest.mark.parametrize("private", [False, True])
def test_a_folder_is_sent_whole(fake, folder, capsys, kind, sdk, private):
    hub.push_folder(folder, NAME, kind, private)
    repo = fake.repos[kind, NAME]
    assert repo["files"] == files_of(folder)
    assert (bool(repo["private"]), repo["sdk"]) == (private, sdk)
    assert fake.url in capsys.readouterr().out


def test_an_export_is_sent_from_the_command_line(fake, best, tmp_path):
    """In a process of its own, told only by the variables of the environment that the library reads."""
    folder = tmp_path / "hf"
    command = [sys.executable, "export_hf.py", "--checkpoint", str(best), "--out_dir", str(folder)]
    command += ["--push_to_hub", NAME, "--private"]
    told = {"HF_ENDPOINT": fake.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | told, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    repo = fake.repos["model", NAME]
    assert repo["private"]
    assert repo["files"] == files_of(folder)
    card = repo["files"]["README.md"].decode()
    assert f'pipeline("text-generation", model="{NAME}")' in card  # works as it stands, for whoever reads it there
    assert "Ended: **steps done** at step 6" in card  # the figures of the run


def test_a_space_is_sent_by_the_page(fake, best, tmp_path):
    folder = tmp_path / "space"
    assert app.main(["--checkpoint", str(best), "--make_space", str(folder), "--push_to_hub", NAME]) == 0
    repo = fake.repos["space", NAME]
    assert repo["files"] == files_of(folder)
    assert "out/checkpoints/best.pt" in repo["files"]


# ---- names that are taken ----


def test_a_taken_name_is_one_sentence_and_the_export_stays(fake, best, tmp_path, capsys):
    fake.create("model", NAME, private=False)
    flags = ["--checkpoint", str(best), "--out_dir", str(tmp_path / "hf"), "--push_to_hub", NAME]
    assert export_hf.main(flags) == 2
    error = capsys.readouterr().err
    assert f"{NAME} is there already: choose another name" in error
    assert f"`hf upload {NAME} {tmp_path / 'hf'} --repo-type model` sends it" in error
    assert error.count("\n") == 1
    assert (tmp_path / "hf" / "model.safetensors").is_file()
    assert fake.repos["model", NAME]["files"] == {}
    assert export_hf.main([*flags, "--overwrite"]) == 0
    assert fake.repos["model", NAME]["files"] == files_of(tmp_path / "hf")


def test_what_should_be_private_is_not_sent_where_all_can_see_it(fake, folder):
    fake.create("model", NAME, private=False)
    with pytest.raises(UsageError, match="for all to see"):
        hub.push_folder(folder, NAME, "model", private=True, replace=True)
    assert fake.repos["model", NAME]["files"] == {}


# ---- refusals ----


def test_without_a_token_nothing_is_written(fake, best, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    checkpoint = ["--checkpoint", str(best), "--push_to_hub", NAME]
    assert export_hf.main([*checkpoint, "--out_dir", str(tmp_path / "hf")]) == 2
    assert app.main([*checkpoint, "--make_space", str(tmp_path / "space")]) == 2
    for error in capsys.readouterr().err.splitlines():
        assert "needs a token: log in with `hf auth login`, or set HF_TOKEN" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--private"], "--private is of --push_to_hub USER/NAME: give both"),
        (["--push_to_hub", "tiny"], "(it has no slash): write it as USER/NAME"),
        (["--push_to_hub", "a/b/c"], "write it as USER/NAME"),
        (["--push_to_hub", "ada/a b"], "write it as USER/NAME"),
    ],
)
def test_flags_that_cannot_be_right_are_refused_at_once(fake, best, tmp_path, capsys, flags, words):
    assert export_hf.main(["--checkpoint", str(best), "--out_dir", str(tmp_path / "hf"), *flags]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_page_alone_is_not_sent(fake, best, capsys):
    assert app.main(["--checkpoint", str(best), "--push_to_hub", NAME]) == 2
    assert "sends what --make_space writes: give both" in capsys.readouterr().err


def test_a_refused_token_is_one_sentence_and_the_folder_stays(fake, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody")
    with pytest.raises(RunError, match=r"the Hub refuses the token \(Invalid username or password\.\)") as caught:
        hub.push_folder(folder, NAME, "model", private=False)
    assert "hf_of_somebody" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(files_of(folder)) == 2


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/api/repos/create", 402, "A Gradio Space needs a subscription"),
        ("/preupload/", 403, "You may not write here"),
        ("/commit/", 413, "Your storage is full"),
    ],
)
def test_what_the_hub_refuses_is_told_in_its_words(fake, folder, path, status, words):
    fake.trouble = (path, status, words)
    with pytest.raises(RunError) as caught:
        hub.push_folder(folder, NAME, "space", private=False)
    assert words in str(caught.value)
    assert f"`hf upload {NAME} {folder} --repo-type space` sends it" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_a_network_it_is_one_sentence(fake, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    folder = folder.rename(folder.with_name("my model"))
    with pytest.raises(RunError, match=r"the Hub can't be reached \(ConnectError\): check the network; ") as caught:
        hub.push_folder(folder, NAME, "model", private=True)
    told = shlex.split(str(caught.value).split("`")[1])
    assert told == ["hf", "upload", NAME, str(folder), "--repo-type", "model", "--private"]
    assert len(files_of(folder)) == 2


def test_offline_by_the_librarys_own_switch_it_is_one_sentence(fake, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RunError, match="the Hub can't be reached"):
        hub.push_folder(folder, NAME, "model", private=False)
