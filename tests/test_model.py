"""The model is GPT-2: its size, its start, its logits, and how it generates."""

from __future__ import annotations

import dataclasses
import math
import os

import pytest
import torch
import torch.nn.functional as F
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


@pytest.mark.parametrize("length", [20, 256, 300, 513])
def test_attention_by_products_is_torchs_own(length):
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(2, 3, length, 8) for _ in range(4))
    found = []
    for attend in (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        lambda q, k, v: train.attention_by_products(q, k, v, 0.0),
    ):
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        y = attend(*inputs)
        y.backward(grad)
        found.append([y.detach(), *(t.grad for t in inputs)])
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)
    late = train.attention_by_products(q[:, :, 7:], k, v, 0.0)  # the last queries of a longer sequence
    torch.testing.assert_close(late, found[0][0][:, :, 7:], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_both_ways_of_attention_give_the_same_logits():
    model, idx = small_model(), torch.arange(20).view(1, 20)
    logits = []
    for by_products in (None, True, False):
        for block in model.transformer.h:
            block.attn.by_products = by_products
        logits.append(model(idx)[0])
    assert torch.equal(logits[0], logits[1])  # a CPU's own choice
    torch.testing.assert_close(logits[2], logits[1], atol=1e-4, rtol=1e-4)


def head_by_hand(x, weight, targets, dtype):
    """Loss and gradients of the plain head."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    logits = x.to(dtype) @ weight.to(dtype).t()
    loss = F.cross_entropy(logits.float(), targets, ignore_index=-1)
    (3 * loss).backward()
    return loss.detach(), x.grad, weight.grad


@pytest.mark.parametrize(
    ("dtype", "loss_error", "gradient_error"),
    [(torch.float32, 1e-6, 1e-5), (torch.bfloat16, 1e-5, 1e-2), (torch.float16, 1e-5, 1e-2)],
)
@pytest.mark.parametrize("rows", [1, 5, 512, 700, 1300])
def test_the_chunked_head_has_the_loss_and_the_gradients_of_the_plain_one(rows, dtype, loss_error, gradient_error):
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 32, requires_grad=True), torch.randn(517, 32, requires_grad=True)
    targets = torch.randint(517, (rows,))
    targets[1::3] = -1  # as the proof has them, for targets that a batch repeats
    loss = train.LinearCrossEntropy.apply(x, weight, targets, dtype)
    (3 * loss).backward()
    expected = head_by_hand(x, weight, targets, dtype)
    assert loss.item() == pytest.approx(expected[0].item(), rel=loss_error)
    for mine, plain in ((x.grad, expected[1]), (weight.grad, expected[2])):
        assert mine.dtype == torch.float32
        assert (mine - plain).norm() <= gradient_error * plain.norm()
    with torch.no_grad():
        assert train.LinearCrossEntropy.apply(x, weight, targets, dtype).item() == loss.item()


def test_the_chunked_head_has_a_finite_loss_where_a_probability_is_zero():
    x, weight = torch.tensor([[1000.0]], requires_grad=True), torch.tensor([[1.0], [-1.0]], requires_grad=True)
    loss = train.LinearCrossEntropy.apply(x, weight, torch.tensor([1]), torch.float32)
    loss.backward()
    assert 87 < loss.item() < 88
    assert x.grad.item() == pytest.approx(2.0)


def test_a_loss_without_logits_is_the_same_loss():
    model, idx = small_model(), torch.arange(40).view(2, 20)
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
    shares = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    for top_p, kept in ((0.3, {1}), (0.5, {1}), (0.6, {1, 3}), (0.8, {1, 2, 3}), (0.95, {0, 1, 2, 3})):
        drawn = {train.pick_token(shares, 1.0, 0, generator, top_p).item() for _ in range(200)}
        assert drawn == kept  # the fewest likeliest that reach it together
    drawn = {train.pick_token(shares, 1.0, 2, generator, 0.7).item() for _ in range(200)}
    assert drawn == {1, 3}  # of the two likeliest, which have 2/3 and 1/3 of what is left
    assert train.pick_token(logits, 1e-40, 0, generator).item() == 1


def test_dropout_acts_in_training_only():
    config = train.GPTConfig(block_size=32, vocab_size=101, n_layer=1, n_head=4, n_embd=32, dropout=0.5)
    model, idx = small_model(config=config), torch.arange(20).view(1, 20)
    with torch.no_grad():
        assert torch.equal(model(idx)[0], model(idx)[0])
        model.train()
        assert not torch.equal(model(idx)[0], model(idx)[0])


@torch.no_grad()
def test_rows_of_unequal_length_are_continued_as_each_by_itself():
    """To beyond the context's end, where all rows are read again."""
    model = small_model(seed=3)
    prompts = [torch.arange(5), torch.arange(9) + 30, torch.arange(1) + 60]
    lengths = torch.tensor([len(p) for p in prompts])
    rows = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=7)
    new = torch.cat(list(model.stream(rows, 40, temperature=0, lengths=lengths)), dim=1)
    for row, prompt, length in zip(new, prompts, lengths, strict=True):
        alone = model.generate(prompt[None], 40, temperature=0)[0, length:]
        assert torch.equal(row[length - lengths.min() :][:40], alone)
    assert new.shape == (3, 8 + 40)


def test_gradient_checkpoints_change_no_gradient():
    """With dropout too, whose random numbers are drawn again."""
    config = train.GPTConfig(block_size=32, vocab_size=101, n_layer=3, n_head=4, n_embd=32, dropout=0.2)
    idx, found = torch.arange(40).view(2, 20), []
    for grad_checkpoint in (False, True):
        model = small_model(config=config).train()
        model.grad_checkpoint = grad_checkpoint
        torch.manual_seed(5)
        model(idx, idx + 1, keep_logits=False)[1].backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient), name


def test_gradient_checkpoints_keep_fewer_activations():
    def kept(grad_checkpoint):
        model, sizes = small_model(), []
        model.grad_checkpoint = grad_checkpoint
        idx = torch.arange(40).view(2, 20)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(idx, idx + 1, keep_logits=False)
        return sum(sizes)

    assert kept(True) < kept(False) / 2


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
    config = dataclasses.replace(train.TrainConfig(), **train.PRESETS.get(preset, {}))
    shape = train.GPTConfig(
        vocab_size=65 if config.tokenizer == "char" else 50257,
        **{name: getattr(config, name) for name in train.MODEL_FLAGS},
    )
    with torch.device("meta"):  # has shapes and no numbers
        model = train.GPT(shape)
    assert sum(p.numel() for p in model.parameters()) == train.count_parameters(shape) == count
