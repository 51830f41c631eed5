"""The model is GPT-2: its size, its start, its logits, and how it generates."""

from __future__ import annotations

import math
import os

import pytest
import torch
from conftest import PLAY, same_weights

import train

os.environ["HF_HUB_OFFLINE"] = "1"  # the reference is made here, not downloaded

SMALL = train.GPTConfig(block_size=32, vocab_size=101, n_layer=3, n_head=4, n_embd=32)


def small_model(seed=0, config=SMALL, spread=0.15):
    """A model whose weights are large enough for its logits to differ a lot."""
    torch.manual_seed(seed)
    model = train.GPT(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=spread)
    return model


@pytest.fixture(scope="module")
def gpt2():
    return train.GPT(train.GPTConfig(), torch.Generator().manual_seed(1337)).eval()


def test_gpt2_has_124439808_parameters(gpt2):
    counts = gpt2.parameter_counts()
    assert sum(counts.values()) == sum(p.numel() for p in gpt2.parameters()) == 124_439_808
    assert counts["token embedding and head"] == 50257 * 768
    assert counts["position embedding"] == 1024 * 768
    assert counts["LayerNorm"] == 25 * 2 * 768


def test_head_and_embedding_are_one_tensor(gpt2):
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight


def test_initial_weights(gpt2):
    blocks = gpt2.transformer.h
    assert blocks[0].attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.01)
    for projection in (blocks[3].attn.c_proj, blocks[3].mlp.c_proj):
        assert projection.weight.std().item() == pytest.approx(0.02 / math.sqrt(24), rel=0.01)
    assert gpt2.transformer.wpe.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert not blocks[0].mlp.c_fc.bias.any() and torch.all(blocks[0].ln_1.weight == 1)


def test_first_loss(gpt2, tokenizer):
    tokens = torch.tensor([tokenizer.encode(PLAY.read_text(encoding="utf-8"))[:1025]])
    with torch.no_grad():
        loss = gpt2(tokens[:, :-1], tokens[:, 1:])[1].item()
    assert loss == pytest.approx(math.log(50257) + 0.1, abs=0.15)


def test_initial_weights_are_a_function_of_the_generator():
    torch.manual_seed(1)
    a = train.GPT(SMALL, torch.Generator().manual_seed(5)).state_dict()
    torch.manual_seed(2)
    b = train.GPT(SMALL, torch.Generator().manual_seed(5)).state_dict()
    c = train.GPT(SMALL, torch.Generator().manual_seed(6)).state_dict()
    assert same_weights(a, b) and not same_weights(a, c)


def hugging_face_twin(model):
    """transformers' GPT2LMHeadModel with the same weights: its Conv1D layers hold matrices transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    c = model.config
    twin = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head
        )
    ).eval()
    conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    weights = {k: v.t().contiguous() if k.endswith(conv1d) else v for k, v in model.state_dict().items()}
    twin.load_state_dict(weights, strict=True)
    return twin


@pytest.mark.parametrize("length", [1, 2, 17, 32])
def test_logits_equal_those_of_transformers_at_large_weights(length):
    model = small_model()
    idx = torch.randint(101, (3, length), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        ours, theirs = model(idx)[0], hugging_face_twin(model)(idx).logits
    assert ours.std() > 0.5
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_logits_equal_those_of_transformers_at_full_size(gpt2):
    twin = hugging_face_twin(gpt2)
    for length in (1, 5, 128, 300):
        idx = torch.randint(50257, (1, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            torch.testing.assert_close(gpt2(idx)[0], twin(idx).logits, atol=1e-4, rtol=0)


def test_targets_of_minus_one_do_not_count():
    model, idx = small_model(), torch.arange(8).view(1, 8)
    targets = idx + 1
    masked = targets.clone()
    masked[0, :3] = -1
    with torch.no_grad():
        logits, loss = model(idx, masked)
    by_hand = torch.nn.functional.cross_entropy(logits[0, 3:], targets[0, 3:])
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-6)


def test_an_explicit_mask_gives_the_same_logits():
    model, idx = small_model(), torch.arange(20).view(1, 20)
    with torch.no_grad():
        expected = model(idx)[0]
        for block in model.transformer.h:
            block.attn.explicit_mask = True
        torch.testing.assert_close(model(idx)[0], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def greedy_without_cache(model, idx, n):
    for _ in range(n):
        idx = torch.cat((idx, model(idx)[0][:, -1].argmax(-1, keepdim=True)), dim=1)
    return idx


@pytest.mark.parametrize("length", [1, 5, 12])
def test_the_cache_changes_no_token(length):
    model = small_model()
    idx = torch.randint(101, (3, length), generator=torch.Generator().manual_seed(1))
    assert torch.equal(model.generate(idx, 20, temperature=0), greedy_without_cache(model, idx, 20))


def test_generation_goes_on_past_the_context():
    model = small_model()
    idx = torch.randint(101, (2, 50), generator=torch.Generator().manual_seed(1))  # longer than the context of 32
    out = model.generate(idx, 40, temperature=0)
    assert out.shape == (2, 90) and torch.equal(out[:, :50], idx)
    # While the context isn't full again, only its last tokens count.
    assert torch.equal(model.generate(idx[:, -32:], 1, temperature=0)[:, -1], out[:, 50])


def test_too_long_an_input_is_refused():
    with pytest.raises(ValueError, match="33 tokens don't fit into a context of 32"):
        small_model()(torch.zeros(1, 33, dtype=torch.long))


def test_top_k_and_temperature():
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]])
    generator = torch.Generator().manual_seed(0)
    drawn = {train.pick_token(logits, 1.0, 2, generator).item() for _ in range(100)}
    assert drawn == {1, 2}
    assert {train.pick_token(logits, 100.0, 0, generator).item() for _ in range(200)} == {0, 1, 2, 3}
    assert {train.pick_token(logits, 0.05, 0, generator).item() for _ in range(50)} == {1}
    assert train.pick_token(logits, 0, 0, None).item() == 1
    assert train.pick_token(logits, 1e-40, 0, generator).item() == 1


def test_dropout_acts_in_training_only():
    config = train.GPTConfig(block_size=32, vocab_size=101, n_layer=1, n_head=4, n_embd=32, dropout=0.5)
    model, idx = small_model(config=config), torch.arange(20).view(1, 20)
    with torch.no_grad():
        assert torch.equal(model(idx)[0], model(idx)[0])
        model.train()
        assert not torch.equal(model(idx)[0], model(idx)[0])
