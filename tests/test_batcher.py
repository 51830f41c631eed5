"""Batches: each token is a target in every pass, in an order that follows from seed and position alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.cli import UsageError
from train import TokenBatcher


def batcher_of(n_tokens, batch_size, seq_len, **options):
    return TokenBatcher(np.arange(n_tokens), batch_size, seq_len, **options)


def one_pass(batcher):
    return [batcher.next_batch() for _ in range(batcher.n_batches)]


def order_of(count: int, seed: int) -> list[int]:
    """The first batches of a shuffled run over 100 batches."""
    batcher = batcher_of(1000, 1, 10, shuffle=True, seed=seed)
    return [batcher.index(k) for k in range(count)]


def test_tiny_shakespeare_at_4_x_256_has_331_batches():
    assert batcher_of(338_025, 4, 256).n_batches == 331


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 100), st.booleans(), st.booleans())
def test_every_token_is_a_target_in_every_pass(batch_size, seq_len, extra, shuffle, shift):
    n_tokens = batch_size * seq_len + 1 + extra
    batcher = batcher_of(n_tokens, batch_size, seq_len, shuffle=shuffle, shift=shift, seed=extra)
    for _ in range(2):
        targets = torch.cat([targets.flatten() for _, targets in one_pass(batcher)])
        assert set(targets.tolist()) == set(range(1, n_tokens))
    unshifted = math.ceil(batcher.n_targets / batcher.batch_tokens)
    unique = sum(batcher.batch_tokens - batcher.repeated(i) for i in range(unshifted))
    assert unique == n_tokens - 1


def test_targets_are_the_next_tokens_across_window_borders():
    batcher = batcher_of(100, 2, 8)
    for idx, targets in one_pass(batcher):
        assert idx.shape == targets.shape == (2, 8)
        assert torch.equal(targets, idx + 1)
    first_targets = batcher.batch(0)[1]
    second_idx = batcher.batch(1)[0]
    assert second_idx[0, 0] == first_targets[-1, -1]  # the last target of a batch opens the next one


def test_the_windows_are_the_same_in_every_pass_and_in_order():
    batcher = batcher_of(100, 2, 8)
    first = one_pass(batcher)
    second = one_pass(batcher)
    for (a, _), (b, _) in zip(first, second, strict=True):
        assert torch.equal(a, b)
    starts = [int(idx[0, 0]) for idx, _ in first]
    assert starts == [0, 16, 32, 48, 64, 80, 83]  # the last one ends where the corpus does
    assert batcher.repeated(6) == 13
    assert batcher.repeated(5) == 0


def test_shuffling_is_a_function_of_seed_and_position():
    order = order_of(200, seed=5)
    first_pass = order[:100]
    second_pass = order[100:]
    assert order == order_of(200, seed=5)
    assert sorted(first_pass) == sorted(second_pass) == list(range(100))
    assert first_pass != second_pass
    assert first_pass != list(range(100))
    assert order != order_of(200, seed=6)


def test_shifted_windows_begin_elsewhere_in_each_pass_but_meet_inside_it():
    batcher = batcher_of(1000, 2, 10, shift=True, seed=3)
    assert batcher.n_batches == 51
    shifts = set()
    for _ in range(20):
        starts = [int(idx[0, 0]) for idx, _ in one_pass(batcher)]
        assert starts[0] == 0
        assert starts[-1] == 1000 - 1 - 20
        assert starts[1:-2] == list(range(starts[1], 961, 20))
        shifts.add(20 - starts[1])
    assert shifts <= set(range(10))
    assert len(shifts) > 5


def test_processes_share_the_batches():
    alone = batcher_of(1000, 1, 10, shuffle=True)
    expected = [alone.next_batch()[0] for _ in range(60)]
    ranks = [batcher_of(1000, 1, 10, shuffle=True, rank=r, world_size=3) for r in range(3)]
    shared = [rank.next_batch()[0] for _ in range(20) for rank in ranks]
    for a, b in zip(expected, shared, strict=True):
        assert torch.equal(a, b)


def test_a_batcher_goes_on_where_its_state_was_taken():
    batcher = batcher_of(1000, 2, 7, shuffle=True, seed=3)
    for _ in range(90):
        batcher.next_batch()
    other = batcher_of(1000, 2, 7, shuffle=True, seed=3)
    other.load_state_dict(batcher.state_dict())
    for _ in range(90):
        assert torch.equal(batcher.next_batch()[0], other.next_batch()[0])
    with pytest.raises(ValueError, match="isn't of these batches"):
        batcher_of(1000, 2, 8).load_state_dict(batcher.state_dict())


@pytest.mark.parametrize(("n_tokens", "batch_size", "seq_len"), [(100, 8, 32), (20, 8, 32), (100, 1, 100), (2, 1, 2)])
def test_a_short_text_is_told_what_would_fit(n_tokens, batch_size, seq_len):
    with pytest.raises(UsageError, match=f"the text has {n_tokens} tokens") as caught:
        batcher_of(n_tokens, batch_size, seq_len)
    words = str(caught.value).split()
    fitting_batch_size = int(words[words.index("--batch_size") + 1])
    fitting_seq_len = int(words[words.index("--seq_len") + 1])
    batcher_of(n_tokens, fitting_batch_size, fitting_seq_len)  # and it does fit
