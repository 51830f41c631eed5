"""The model is GPT-2: its size, its first weights, its logits and its loss."""

from __future__ import annotations

import dataclasses
import math
import os

import pytest
import torch
import torch.nn.functional as F
from conftest import PLAY, same_weights
from model_kit import SMALL, random_ids, small_model

import train
from support import record
from support.presets import PRESETS
from train import GPT, GPTConfig

os.environ["HF_HUB_OFFLINE"] = "1"  # the reference is made here, not downloaded


@pytest.fixture(scope="module")
def gpt2():
    return GPT(GPTConfig(), torch.Generator().manual_seed(1337)).eval()


# ---- size and first weights ----


def test_gpt2_has_124439808_parameters(gpt2):
    counts = record.parameter_counts(gpt2)
    assert sum(counts.values()) == sum(p.numel() for p in gpt2.parameters()) == 124_439_808
    assert counts["token embedding and head"] == 50257 * 768
    assert counts["position embedding"] == 1024 * 768
    assert counts["LayerNorm"] == 25 * 2 * 768


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        ("char-small", 206_272),
        ("char-medium", 2_688_192),
    ],
)
def test_presets_have_exactly_the_parameters_of_their_shape(preset, count):
    config = dataclasses.replace(train.TrainConfig(), **PRESETS.get(preset, {}))
    shape = config.model_config(vocab_size=65 if config.tokenizer == "char" else 50257)
    with torch.device("meta"):  # has shapes and no numbers
        model = GPT(shape)
    assert sum(p.numel() for p in model.parameters()) == count


def test_head_and_embedding_are_one_tensor(gpt2):
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight


def test_initial_weights(gpt2):
    blocks = gpt2.transformer.h
    assert blocks[0].attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.01)
    for projection in (blocks[3].attn.c_proj, blocks[3].mlp.c_proj):
        assert projection.weight.std().item() == pytest.approx(0.02 / math.sqrt(24), rel=0.01)
    assert gpt2.transformer.wpe.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert torch.all(blocks[0].mlp.c_fc.bias == 0)
    assert torch.all(blocks[0].ln_1.weight == 1)


def test_first_loss(gpt2, tokenizer):
    tokens = torch.tensor([tokenizer.encode(PLAY.read_text(encoding="utf-8"))[:129]])
    with torch.no_grad():
        loss = gpt2(tokens[:, :-1], tokens[:, 1:])[1].item()
    assert loss == pytest.approx(math.log(50257) + 0.1, abs=0.15)


def test_initial_weights_are_a_function_of_the_generator():
    def weights(global_seed: int, seed: int) -> dict:
        torch.manual_seed(global_seed)
        return GPT(SMALL, torch.Generator().manual_seed(seed)).state_dict()

    assert same_weights(weights(1, 5), weights(2, 5))
    assert not same_weights(weights(1, 5), weights(1, 6))


# ---- logits ----


def hugging_face_twin(model):
    """transformers' GPT2LMHeadModel with the same weights: its Conv1D layers hold matrices transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {name: getattr(model.config, name) for name in ("vocab_size", "n_embd", "n_layer", "n_head")}
    twin = GPT2LMHeadModel(GPT2Config(n_positions=model.config.block_size, **shape)).eval()
    weights = {}
    for name, weight in model.state_dict().items():
        is_conv1d = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        weights[name] = weight.t().contiguous() if is_conv1d else weight
    twin.load_state_dict(weights, strict=True)
    return twin


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 17, 32])
def test_logits_equal_those_of_transformers_at_large_weights(length):
    model = small_model()
    idx = random_ids(3, length, seed=length)
    logits = model(idx)[0]
    assert logits.std() > 0.5
    torch.testing.assert_close(logits, hugging_face_twin(model)(idx).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_logits_equal_those_of_transformers_at_full_size(gpt2):
    twin = hugging_face_twin(gpt2)
    for length in (1, 100):
        idx = torch.randint(50257, (1, length), generator=torch.Generator().manual_seed(length))
        torch.testing.assert_close(gpt2(idx)[0], twin(idx).logits, atol=1e-4, rtol=0)


def test_too_long_an_input_is_refused():
    with pytest.raises(ValueError, match="33 tokens don't fit into a context of 32"):
        small_model()(torch.zeros(1, 33, dtype=torch.long))


def test_beside_a_cpu_attention_is_by_torchs_kernel_until_the_model_is_told_to_mask(monkeypatch):
    calls = []
    real = train.attention_by_products
    monkeypatch.setattr(train, "attention_by_products", lambda *args: calls.append(args) or real(*args))
    model = small_model().to("meta")  # has shapes and no numbers, and isn't a CPU
    idx = torch.zeros(1, 8, dtype=torch.long, device="meta")
    model(idx)
    assert not calls
    model.mask_explicitly()
    model(idx)
    assert len(calls) == SMALL.n_layer


# ---- loss and gradients ----


@torch.no_grad()
def test_targets_of_minus_one_do_not_count():
    model = small_model()
    idx = torch.arange(8).view(1, 8)
    targets = idx + 1
    masked = targets.clone()
    masked[0, :3] = -1
    logits, loss = model(idx, masked)
    by_hand = F.cross_entropy(logits[0, 3:], targets[0, 3:])
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-6)


def test_a_loss_without_logits_is_the_same_loss():
    model = small_model()
    idx = torch.arange(40).view(2, 20)
    logits, loss = model(idx, idx + 1)
    assert logits.shape[:2] == (2, 20)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    nothing, same = model(idx, idx + 1, keep_logits=False)
    same.backward()
    assert nothing is None
    assert same.item() == pytest.approx(loss.item(), rel=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], atol=1e-5, rtol=1e-3, msg=name)


@torch.no_grad()
def test_dropout_acts_in_training_only():
    model = small_model(config=dataclasses.replace(SMALL, dropout=0.5))
    idx = torch.arange(20).view(1, 20)
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


def test_gradient_checkpoints_change_no_gradient():
    """With dropout too, whose random numbers are drawn again."""

    def gradients(grad_checkpoint: bool) -> dict:
        model = small_model(config=dataclasses.replace(SMALL, dropout=0.2)).train()
        model.grad_checkpoint = grad_checkpoint
        torch.manual_seed(5)
        idx = torch.arange(40).view(2, 20)
        model(idx, idx + 1, keep_logits=False)[1].backward()
        return {name: p.grad for name, p in model.named_parameters()}

    assert same_weights(gradients(grad_checkpoint=False), gradients(grad_checkpoint=True))


def test_gradient_checkpoints_keep_fewer_activations():
    def kept(grad_checkpoint: bool) -> int:
        """How many numbers does the forward pass keep?"""
        model = small_model()
        model.grad_checkpoint = grad_checkpoint
        sizes = []

        def count(tensor):
            sizes.append(tensor.numel())
            return tensor

        idx = torch.arange(40).view(2, 20)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(idx, idx + 1, keep_logits=False)
        return sum(sizes)

    assert kept(True) < kept(False) / 2
