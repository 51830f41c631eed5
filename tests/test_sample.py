"""Text from a checkpoint."""

from __future__ import annotations

import pytest

import sample
import train


@pytest.fixture
def checkpoint(tiny, tmp_path):
    train.train(tiny(num_prompts=0, prompt="TILDA:\n"))
    return str(tmp_path / "out" / "checkpoints" / "last.pt")


def test_the_same_seed_gives_the_same_text(checkpoint, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        flags = ["--checkpoint", checkpoint, "--prompt", r"AMBROSE:\nCome", "--max_new_tokens", "8", "--seed", seed]
        assert sample.main(flags) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("AMBROSE:\nCome")


def test_the_prompt_of_training_is_the_default_and_samples_are_apart(checkpoint, capsys):
    assert sample.main(["--checkpoint", checkpoint, "--num_samples", "3", "--max_new_tokens", "3"]) == 0
    parts = capsys.readouterr().out.split("-" * 40 + "\n")
    assert len(parts) == 3 and all(part.startswith("TILDA:\n") for part in parts)


def test_problems_are_sentences(checkpoint, capsys):
    assert sample.main(["--checkpoint", "nowhere.pt"]) == 1
    assert capsys.readouterr().err == "sample.py: checkpoint nowhere.pt doesn't exist: check the path\n"
    assert sample.main(["--checkpoint", checkpoint, "--temperature", "nan", "--num_samples", "0"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
