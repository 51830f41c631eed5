"""Text token by token, how a token is picked, and the check that no token sees a later one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from model_kit import random_ids, small_model

import train
from support.cli import RunError
from support.inference import check_causality, generate, leaks_future, pick_token
from support.machine import Runtime

# ---- token by token ----


@torch.no_grad()
def greedy_without_cache(model, idx, count):
    for _ in range(count):
        likeliest = model(idx)[0][:, -1].argmax(-1, keepdim=True)
        idx = torch.cat((idx, likeliest), dim=1)
    return idx


@pytest.mark.parametrize("length", [1, 5, 12])
def test_the_cache_changes_no_token(length):
    model = small_model()
    idx = random_ids(3, length)
    assert torch.equal(generate(model, idx, 20, temperature=0), greedy_without_cache(model, idx, 20))


def test_generation_goes_on_past_the_context():
    model = small_model()
    idx = random_ids(2, 50)  # longer than the context of 32
    out = generate(model, idx, 40, temperature=0)
    assert out.shape == (2, 90)
    assert torch.equal(out[:, :50], idx)
    # The prompt's last 32 tokens fill the context, and nothing before them counts.
    assert torch.equal(generate(model, idx[:, -32:], 1, temperature=0)[:, -1], out[:, 50])
    # Then the newer half, 16 tokens, is read again.
    assert torch.equal(generate(model, out[:, 35:51], 15, temperature=0)[:, 16:], out[:, 51:66])


def test_rows_are_continued_as_each_by_itself():
    """To beyond the context's end, where all rows are read again."""
    model = small_model(seed=3)
    rows = random_ids(3, 9)
    together = generate(model, rows, 40, temperature=0)
    for row, expected in zip(rows, together, strict=True):
        assert torch.equal(generate(model, row[None], 40, temperature=0)[0], expected)


# ---- picking a token ----

LOGITS = torch.tensor([[0.0, 3.0, 2.0, 1.0]])
SHARES = torch.tensor([[0.1, 0.5, 0.15, 0.25]])


def drawn(logits, count, temperature=1.0, top_k=0, top_p=1.0) -> set[int]:
    """Which tokens come up in so many draws?"""
    generator = torch.Generator().manual_seed(0)
    return {pick_token(logits, temperature, top_k, generator, top_p).item() for _ in range(count)}


def test_tokens_are_drawn_as_often_as_the_model_says():
    """A softmax of a softmax would draw the likeliest token here 36% of the times, and not 64%."""
    generator = torch.Generator().manual_seed(0)
    for temperature in (1.0, 0.5):
        tokens = pick_token(LOGITS.expand(20_000, -1), temperature, 0, generator)
        often = tokens.flatten().bincount(minlength=4) / 20_000
        torch.testing.assert_close(often, (LOGITS[0] / temperature).softmax(dim=-1), atol=0.02, rtol=0)


def test_top_k_draws_from_the_likeliest():
    assert drawn(LOGITS, 100, top_k=2) == {1, 2}


def test_a_temperature_flattens_or_sharpens_the_choice():
    assert drawn(LOGITS, 200, temperature=100.0) == {0, 1, 2, 3}
    assert drawn(LOGITS, 50, temperature=0.05) == {1}
    assert drawn(LOGITS, 1, temperature=1e-40) == {1}


def test_at_temperature_0_the_likeliest_is_taken_and_no_number_is_drawn():
    assert pick_token(LOGITS, 0, 0, None).item() == 1


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.3, {1}), (0.5, {1}), (0.6, {1, 3}), (0.8, {1, 2, 3}), (0.95, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_fewest_likeliest_that_reach_it_together(top_p, kept):
    assert drawn(SHARES.log(), 200, top_p=top_p) == kept


def test_top_p_is_of_what_top_k_has_left():
    # the two likeliest have 2/3 and 1/3 of what is left
    assert drawn(SHARES.log(), 200, top_k=2, top_p=0.7) == {1, 3}
    assert drawn(SHARES.log(), 200, top_k=2, top_p=0.6) == {1}


# ---- causality ----

SOUND = F.scaled_dot_product_attention


def runtime(amp_dtype=None) -> Runtime:
    return Runtime(torch.device("cpu"), amp_dtype, None, "")


@pytest.mark.parametrize("seq_len", [1, 2, 3, 17, 32])
@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16])
def test_sound_attention_passes(seq_len, amp_dtype):
    assert check_causality(small_model(), runtime(amp_dtype), seq_len) == "a moved token changed no earlier logit"


def leaky_in_groups(q, k, v):
    """What MPS did in half precision: one causal mask for each group of four queries, that of the last one."""
    last_of_group = torch.arange(q.size(2)) // 4 * 4 + 3
    mask = torch.arange(k.size(2))[None, :] <= last_of_group[:, None]
    return SOUND(q, k, v, mask)


@pytest.mark.parametrize("seq_len", [8, 17, 32])
def test_a_leak_within_groups_of_four_is_found_and_masked(monkeypatch, seq_len):
    model = small_model()
    sound = train.attention_by_products

    def attend(q, k, v, dropout):
        """As on a GPU: its own kernel, which leaks, until the model is told to mask."""
        if model.transformer.h[0].attn.masks_explicitly:
            return sound(q, k, v, dropout)
        return leaky_in_groups(q, k, v)

    monkeypatch.setattr(train, "attention_by_products", attend)
    assert leaks_future(model, runtime(), seq_len)
    assert "explicit mask" in check_causality(model, runtime(), seq_len)
    assert not leaks_future(model, runtime(), seq_len)


def test_a_leak_in_half_precision_falls_back_to_fp32(monkeypatch):
    sound = train.attention_by_products

    def leaky_in_half(q, k, v, dropout):
        if q.dtype == torch.float32:
            return sound(q, k, v, dropout)
        return SOUND(q, k, v)

    monkeypatch.setattr(train, "attention_by_products", leaky_in_half)
    half = runtime(torch.bfloat16)
    assert "fp32" in check_causality(small_model(), half, 16)
    assert half.amp_dtype is None


def test_a_leak_that_nothing_stops_ends_the_run(monkeypatch):
    monkeypatch.setattr(train, "attention_by_products", lambda q, k, v, dropout: SOUND(q, k, v))
    with pytest.raises(RunError, match="leaks future tokens"):
        check_causality(small_model(), runtime(), 16)
