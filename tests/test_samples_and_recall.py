"""What the model is asked for on the way: samples from prompts, and how much of the text it knows by heart."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from conftest import PLAY, log_of, rows_of, same_weights, weights_of, without_times
from hypothesis import given
from hypothesis import strategies as st

import train
from support import inference
from support.cli import UsageError
from support.machine import Runtime
from support.record import recall_of

CPU = Runtime(torch.device("cpu"), None, None, "")


def go_on() -> None:
    """A poll that never stops."""


# ---- samples ----


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_sampling_and_proving_change_no_training_step(quick, tmp_path, amp):
    settings = {"steps": 12, "dropout": 0.2, "amp": amp}
    often = train.train(quick(out_dir=str(tmp_path / "often"), sample_every=1, num_prompts=3, **settings))
    never = train.train(quick(out_dir=str(tmp_path / "never"), num_prompts=0, **settings))
    assert without_times(rows_of(tmp_path / "often")) == without_times(rows_of(tmp_path / "never"))
    assert same_weights(weights_of(tmp_path / "often"), weights_of(tmp_path / "never"))
    assert often["avg_loss"] == never["avg_loss"]
    assert (tmp_path / "often" / "samples" / "samples.txt").read_text().count("STEP ") == 12
    assert not (tmp_path / "never" / "samples" / "samples.txt").exists()


def test_each_sample_is_a_prompt_and_as_many_new_tokens_as_asked_for(quick, make_trainer):
    trainer = make_trainer(quick(num_prompts=3, max_new_tokens=80))
    polls = []
    texts = trainer.sample(lambda: polls.append(1))
    assert [prompt for prompt, _ in texts] == trainer.prompts()
    assert [len(text) for _, text in texts] == [80, 80, 80]  # a token is a character here
    assert len(polls) == 3 * 80  # a signal is heard before each of them


def test_a_sample_is_the_same_each_time_and_another_at_another_step(quick, make_trainer):
    trainer = make_trainer(quick(max_new_tokens=80))
    texts = trainer.sample(go_on)
    assert trainer.sample(go_on) == texts
    trainer.progress.step += 1
    assert trainer.sample(go_on) != texts


# ---- prompts ----


def test_prompts_are_the_given_one_and_openings_from_the_text(tiny, make_trainer):
    trainer = make_trainer(tiny(num_prompts=4, prompt="TILDA:\n"))
    prompts = trainer.prompts()
    assert prompts[0] == "TILDA:\n"
    assert len(set(prompts)) == 4
    assert all(prompt in PLAY.read_text(encoding="utf-8") for prompt in prompts)
    assert prompts == trainer.prompts()
    assert prompts != make_trainer(tiny(num_prompts=4, prompt="TILDA:\n", seed=1)).prompts()


def test_an_unknown_character_in_a_prompt_is_said_before_anything_is_written(quick, tmp_path):
    with pytest.raises(UsageError, match="not '€': leave them out of the prompt"):
        train.train(quick(prompt="€"))
    assert not (tmp_path / "out").exists()


def test_the_default_prompt_goes_where_the_text_lacks_its_characters(tmp_path, quick, make_trainer):
    (tmp_path / "digits.txt").write_text("0123456789\n\n" * 30)
    trainer = make_trainer(quick(input_file=str(tmp_path / "digits.txt")))
    assert trainer.prompts()
    assert all(set(prompt) <= set("0123456789\n") for prompt in trainer.prompts())


# ---- what is known by heart ----


class Parrot(torch.nn.Module):
    """A model that knows what follows each token of a text in which none comes twice, from its `known`-th on."""

    def __init__(self, tokens: list[int], known: int = 0):
        super().__init__()
        self.config = train.GPTConfig(block_size=64, vocab_size=512)
        self.follows = torch.zeros(512, dtype=torch.int64)
        for i, (token, next_token) in enumerate(itertools.pairwise(tokens), 1):
            if i >= known:
                self.follows[token] = next_token

    def new_cache(self) -> None:
        return None

    def forward(self, idx: torch.Tensor, cache: None) -> tuple[torch.Tensor, None]:
        """Logits of the last position, which are highest for what follows."""
        return torch.nn.functional.one_hot(self.follows[idx[:, -1:]], 512).float(), None


def recall(tokens: list[int], known: int = 0, every: int = 1) -> float | None:
    """Of a parrot, at 50 places."""
    return inference.recall(Parrot(tokens, known), CPU, np.array(tokens, dtype=np.uint16), 50, 1337, every)


def test_recall_is_the_share_of_tokens_that_greedy_decoding_gives():
    tokens = list(range(1, 400))
    assert recall(tokens) == 1.0
    # The first token that it doesn't know loses the thread: then all that follow are wrong.
    places = random.Random(1337).sample(range(len(tokens) - 63), 50)
    known = [place for place in places if place + 32 >= 200]
    assert 0.2 < recall(tokens, known=200) == len(known) / 50 < 0.8
    assert recall(tokens, known=200, every=64) == 3 / 6  # at 192, 256 and 320, not at 0, 64 and 128
    assert recall(tokens[:64]) == 1.0  # one place
    assert recall(tokens[:63]) is None  # not one with 32 tokens behind 32


def test_recall_is_that_of_the_model_itself(quick, make_trainer):
    """Against greedy decoding of each place alone; the model can't tell much, so the text is what it says itself."""
    model = make_trainer(quick()).model.eval()
    text = inference.generate(model, torch.tensor([[5, 9, 10]]), 300, temperature=0)[0].numpy()
    text[100:140] = np.arange(40)
    right = 0
    for place in random.Random(1337).sample(range(len(text) - 63), 70):
        row = torch.from_numpy(text[None, place : place + 32])
        told = inference.generate(model, row, 32, temperature=0)[0, 32:].numpy()
        right += (told == text[place + 32 : place + 64]).sum()
    share = inference.recall(model, CPU, text.astype(np.uint16), 70, 1337)
    assert 0 < share < 1
    assert share == pytest.approx(right / (70 * 32))


def test_recall_needs_positions_that_were_trained(quick, make_trainer):
    assert recall_of(make_trainer(quick(seq_len=63, batch_size=1)), go_on) is None
    assert recall_of(make_trainer(quick(seq_len=64, batch_size=1)), go_on) is not None


def test_recall_asks_for_nothing_held_out(quick, make_trainer, monkeypatch):
    trainer = make_trainer(quick(val_fraction=0.5, seq_len=64, batch_size=1, recall_places=500))
    seen = set()

    def stream(model, rows, *args, **options):
        seen.update(tuple(row) for row in rows.tolist())
        return iter([])

    monkeypatch.setattr(inference, "stream", stream)
    recall_of(trainer, go_on)
    held = trainer.held_out.tokens.tolist()
    held_rows = {tuple(held[i : i + 32]) for i in range(len(held) - 31)}
    assert len(seen) == 500
    assert not seen & held_rows


@given(st.text(alphabet="ab\n", max_size=12), st.text(alphabet="ab\n", max_size=30))
def test_the_longest_verbatim_run_is_that_of_all_pieces(text, source):
    pieces = [text[i:j] for i in range(len(text) + 1) for j in range(i, len(text) + 1)]
    longest = max(len(piece) for piece in pieces if piece in source)
    assert inference.longest_verbatim(text, source) == longest


def test_the_record_says_what_was_learned(quick, short_text, tmp_path, monkeypatch):
    with open(short_text, encoding="utf-8") as f:
        heart = f.read()[100:180]
    texts = [("A", heart), ("B", f"\u2603{heart[:40]}\u2603")]
    monkeypatch.setattr(train.Trainer, "sample", lambda trainer, poll: texts)
    record = train.train(quick(seq_len=64, batch_size=1))
    assert record["samples"] == [
        {"prompt": "A", "characters": 80, "verbatim": 80},
        {"prompt": "B", "characters": 42, "verbatim": 40},
    ]
    assert 0 <= record["recall"] <= 1
    log = log_of(tmp_path / "out")
    assert f"recall {record['recall']:.4f} (of the next 32 tokens, after 32 from the text)" in log
    assert f"recall_at_windows {record['recall_at_windows']:.4f} (the same, where windows of training begin)" in log
    assert "Longest verbatim run of each sample, in characters: 80 of 80, 40 of 42" in log


def test_without_prompts_and_places_nothing_is_said_to_be_learned(quick, tmp_path):
    record = train.train(quick(seq_len=64, batch_size=1, num_prompts=0, recall_places=0))
    assert (record["recall"], record["recall_at_windows"], record["samples"]) == (None, None, None)
    assert "recall" not in log_of(tmp_path / "out").split("Args:")[1].split("\n", 1)[1]
