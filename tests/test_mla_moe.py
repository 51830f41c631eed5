"""mla_moe.py's model is DeepSeek-V3's: its size, logits, gradients, what a token sees, how experts share the work."""

from __future__ import annotations

import dataclasses
import math
import os

import pytest
import torch
from conftest import same_weights

import mla_moe
from mla_moe import MLAMoE, MLAMoEConfig
from support import deepseek
from support.inference import leaks_future
from support.kernels import Muon, orthogonalized
from support.machine import start_runtime

os.environ["HF_HUB_OFFLINE"] = "1"  # the reference is made here, not downloaded

SMALL = MLAMoEConfig(
    vocab_size=101,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=16,
    kv_lora_rank=24,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=16,
    moe_intermediate_size=16,
    routed_scaling_factor=1.5,
    max_position_embeddings=64,
    balance_rate=1e-2,
)


def small_model(**changes) -> MLAMoE:
    """Its blocks' weights are so large that its logits differ a lot, and its routers prefer some experts."""
    torch.manual_seed(0)
    model = MLAMoE(dataclasses.replace(SMALL, **changes)).eval()
    with torch.no_grad():
        for block in model.model.layers:
            for p in block.parameters():
                p.add_(torch.randn_like(p), alpha=0.2)
            block.mlp.gate.e_score_correction_bias.normal_(0, 0.2)
    return model


def random_ids(rows: int, length: int, seed=1) -> torch.Tensor:
    return torch.randint(SMALL.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def runtime():
    return start_runtime("cpu", "off")


@pytest.fixture(scope="module")
def twin():
    """transformers' DeepseekV3ForCausalLM with the weights of small_model()."""
    transformers = pytest.importorskip("transformers")
    model = small_model()
    settings = deepseek.hf_config(dataclasses.asdict(model.config), 0)
    del settings["architectures"], settings["model_type"]
    config = transformers.DeepseekV3Config(**settings, attn_implementation="eager")
    theirs = transformers.DeepseekV3ForCausalLM(config).eval()
    weights = model.state_dict()
    if theirs.state_dict().keys() != weights.keys():  # release 4 keeps each expert by itself
        weights = deepseek.hf_weights(model)
    theirs.load_state_dict(weights, strict=True)
    return theirs


# ---- size and first weights ----


def test_the_defaults_make_1075293184_parameters_of_which_509062144_work_on_a_token():
    with torch.device("meta"):  # has shapes and no numbers
        model = MLAMoE(MLAMoEConfig())
    assert sum(p.numel() for p in model.parameters()) == 1_075_293_184
    assert model.flops_per_token() == 6 * 509_062_144


def test_initial_weights():
    model = MLAMoE(dataclasses.replace(SMALL, hidden_size=128), torch.Generator().manual_seed(1))
    block = model.model.layers[0]
    assert block.mlp.experts.gate_up_proj.std().item() == pytest.approx(0.02, rel=0.05)
    for projection in (block.self_attn.o_proj.weight, block.mlp.experts.down_proj):
        assert projection.std().item() == pytest.approx(0.02 / math.sqrt(4), rel=0.05)
    assert torch.all(block.input_layernorm.weight == 1)


@torch.no_grad()
def test_first_loss_is_that_of_a_guess():
    idx = random_ids(4, 64)
    loss = MLAMoE(SMALL, torch.Generator().manual_seed(1))(idx, idx)[1].item()
    assert loss == pytest.approx(math.log(SMALL.vocab_size), abs=0.05)


# ---- the same as transformers ----


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 33, 64])
def test_logits_equal_those_of_transformers(twin, length):
    idx = random_ids(3, length, seed=length)
    logits = small_model()(idx)[0]
    assert logits.std() > 0.05
    torch.testing.assert_close(logits, twin(idx).logits, atol=1e-6, rtol=0)


def test_gradients_equal_those_of_transformers(twin):
    model = small_model()
    idx = random_ids(2, 33)
    model(idx[:, :-1], idx[:, 1:])[1].backward()
    twin.zero_grad()
    twin(idx, labels=idx).loss.backward()
    theirs = {name: p.grad for name, p in twin.named_parameters()}
    compared = 0
    for name, p in model.named_parameters():
        if name in theirs:  # of release 4, all but the experts
            torch.testing.assert_close(p.grad, theirs[name], atol=1e-6, rtol=1e-4, msg=name)
            compared += 1
    assert compared > 20


def halves_rotated(x, rope):
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def softmax_router(router, x):
    scores = (x @ router.weight.T).softmax(dim=-1)
    experts = (scores + router.e_score_correction_bias).topk(router.top_k).indices
    weights = scores.gather(1, experts)
    return weights / weights.sum(dim=-1, keepdim=True) * router.scale, experts


def router_without_a_norm(router, x):
    scores = (x @ router.weight.T).sigmoid()
    experts = (scores + router.e_score_correction_bias).topk(router.top_k).indices
    return scores.gather(1, experts) * router.scale, experts


def router_that_weighs_by_its_bias(router, x):
    scores = (x @ router.weight.T).sigmoid() + router.e_score_correction_bias
    weights, experts = scores.topk(router.top_k)
    return weights / weights.sum(dim=-1, keepdim=True) * router.scale, experts


def router_without_a_bias(router, x):
    weights, experts = (x @ router.weight.T).sigmoid().topk(router.top_k)
    return weights / weights.sum(dim=-1, keepdim=True) * router.scale, experts


def set_all(model, kind, name, value) -> None:
    for module in model.modules():
        if isinstance(module, kind):
            setattr(module, name, value)


def other_eps(model, patch):
    set_all(model, mla_moe.RMSNorm, "eps", 1e-5)


def halves(model, patch):
    patch.setattr(mla_moe, "rotated", halves_rotated)


def other_theta(model, patch):
    model.config = dataclasses.replace(model.config, rope_theta=500.0)


def positions_from_one(model, patch):
    def late(x, rope):  # a position of keys and queries alike cancels out, so only queries are late
        return real(x, rope) if x.dim() == 3 else real(x.roll(1, dims=-2), rope)

    real = mla_moe.rotated
    patch.setattr(mla_moe, "rotated", late)


def scale_of_nope(model, patch):
    real = mla_moe.attention_by_products
    patch.setattr(mla_moe, "attention_by_products", lambda q, k, v, dropout: real(q * math.sqrt(2), k, v, dropout))


def no_mask(model, patch):
    def attend(q, k, v, dropout):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    patch.setattr(mla_moe, "attention_by_products", attend)


def no_latent_norm(model, patch):
    for block in model.model.layers:
        block.self_attn.kv_a_layernorm = torch.nn.Identity()


def no_last_norm(model, patch):
    model.model.norm = torch.nn.Identity()


def no_shared_expert(model, patch):
    patch.setattr(mla_moe.SharedExpert, "forward", lambda shared, x: torch.zeros_like(x))


def up_before_gate(model, patch):
    for block in model.model.layers:
        block.mlp.experts.gate_up_proj.data = block.mlp.experts.gate_up_proj.roll(SMALL.moe_intermediate_size, dims=1)


def gelu(model, patch):
    patch.setattr(mla_moe.F, "silu", torch.nn.functional.gelu)


def router(forward):
    def change(model, patch):
        patch.setattr(mla_moe.Router, "forward", forward)

    change.__name__ = forward.__name__
    return change


WRONG = [other_eps, halves, other_theta, positions_from_one, scale_of_nope, no_mask, no_latent_norm, no_last_norm]
WRONG += [no_shared_expert, up_before_gate, gelu, router(softmax_router), router(router_without_a_norm)]
WRONG += [router(router_that_weighs_by_its_bias), router(router_without_a_bias)]


@torch.no_grad()
@pytest.mark.parametrize("change", WRONG, ids=lambda change: change.__name__)
def test_the_comparison_with_transformers_notices_a_wrong(change, twin, monkeypatch):
    model = small_model()
    idx = random_ids(2, 33)
    expected = twin(idx).logits
    change(model, monkeypatch)
    assert (model(idx)[0] - expected).abs().max() > 1e-4


# ---- nothing is left out ----


def test_every_parameter_gets_a_gradient_and_belongs_to_one_group():
    model = small_model()
    idx = random_ids(4, 33)
    model(idx[:, :-1], idx[:, 1:], keep_logits=False)[1].backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name
    grouped = [p for group in model.parameter_groups().values() for p in group]
    assert len(grouped) == len({*grouped}) == len(list(model.parameters()))


def test_gradient_checkpoints_change_no_gradient_and_count_each_load_once():
    gradients = []
    loads = []
    for grad_checkpoint in (False, True):
        model = small_model().train()
        model.grad_checkpoint = grad_checkpoint
        idx = random_ids(2, 33)
        model(idx[:, :-1], idx[:, 1:], keep_logits=False)[1].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        loads.append(model.load)
    assert same_weights(*gradients)
    assert loads[0].sum() == 2 * 2 * 32 * 2  # layers x rows x tokens x experts of a token
    assert torch.equal(*loads)


# ---- what a token sees ----


def test_a_moved_token_changes_no_earlier_logit(runtime, monkeypatch):
    for seed in range(5):  # groups of other sizes round differently, which is no leak
        model = MLAMoE(SMALL, torch.Generator().manual_seed(seed))
        assert not leaks_future(model, runtime, 48)
    no_mask(None, monkeypatch)
    assert leaks_future(small_model(), runtime, 48)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[1] * 20, [7, 1, 1, 11], [19, 1], [3, 17]])
def test_with_a_cache_the_logits_are_the_same(chunks):
    model = small_model()
    idx = random_ids(2, 20)
    cache = model.new_cache()
    logits = [model.lm_head(model.hidden(chunk, cache)) for chunk in idx.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(idx)[0], atol=1e-5, rtol=1e-5)
    assert cache[0].keys() == {"left"}
    assert cache[0]["left"].shape == (2, 20, SMALL.kv_lora_rank + SMALL.qk_rope_head_dim)


@torch.no_grad()
def test_absorbed_attention_is_expanded_attention():
    attention = small_model().model.layers[0].self_attn
    torch.manual_seed(3)
    q_nope, q_rope = torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    left = torch.randn(2, 9, SMALL.kv_lora_rank + SMALL.qk_rope_head_dim)
    expanded = attention.expanded(q_nope, q_rope, left)
    torch.testing.assert_close(attention.absorbed(q_nope, q_rope, left), expanded, atol=1e-5, rtol=1e-5)
    late = attention.absorbed(q_nope[:, :, 5:], q_rope[:, :, 5:], left)
    torch.testing.assert_close(late, expanded[:, :, 5:], atol=1e-5, rtol=1e-5)


def test_too_long_an_input_is_refused():
    with pytest.raises(ValueError, match="65 tokens don't fit into a context of 64"):
        small_model()(random_ids(1, 65))


# ---- random tokens can't be predicted ----


def loss_on_random_tokens(seen: int = 1, steps: int = 120) -> float:
    """The mean loss of the last steps on fresh random tokens of 64 kinds; `seen` = 0: the labels aren't shifted."""
    torch.manual_seed(0)
    model = MLAMoE(dataclasses.replace(SMALL, vocab_size=64, num_attention_heads=4, qk_nope_head_dim=4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        idx = torch.randint(64, (16, 33))
        loss = model(idx[:, :-1], idx[:, seen : seen + 32], keep_logits=False)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


def test_on_random_tokens_the_loss_stays_at_their_entropy():
    assert loss_on_random_tokens() == pytest.approx(math.log(64), abs=0.06)


def test_on_random_tokens_labels_that_are_not_shifted_are_noticed():
    assert loss_on_random_tokens(seen=0) < 0.1


def test_on_random_tokens_a_missing_mask_is_noticed(monkeypatch):
    no_mask(None, monkeypatch)
    assert loss_on_random_tokens() < 3.0


# ---- experts ----


def loads_of(model, runtime, idx) -> torch.Tensor:
    model(idx[:, :-1], idx[:, 1:], keep_logits=False)[1].backward()
    return model.load.clone()


def test_each_token_goes_to_two_experts_of_each_layer(runtime):
    model = small_model().train()
    for rows in (1, 4):
        load = loads_of(model, runtime, random_ids(rows, 33))
        assert load.sum(dim=1).tolist() == [rows * 32 * 2] * 2
        model.before_update(runtime)
    assert not model.load.any()


@torch.no_grad()
def test_an_expert_that_no_token_comes_to_is_no_trouble():
    model = small_model()
    idx = random_ids(1, 8)
    for block in model.model.layers:
        block.mlp.gate.e_score_correction_bias[2:] = -9.0
    before = model(idx)[0]
    for block in model.model.layers:
        block.mlp.experts.gate_up_proj[2:] = math.nan
        block.mlp.experts.down_proj[2:] = math.nan
    assert torch.equal(model(idx)[0], before)


def test_experts_in_groups_are_experts_that_work_on_all_tokens():
    model = small_model()
    idx = random_ids(2, 33)
    results = []
    for in_groups in (True, False):
        set_all(model, mla_moe.Experts, "in_groups", in_groups)
        model.zero_grad()
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        loss.backward()
        results.append((loss, *(p.grad for p in model.parameters())))
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-4)


def test_a_step_moves_each_bias_against_its_load(runtime):
    model = small_model().train()
    gate = model.model.layers[1].mlp.gate
    before = gate.e_score_correction_bias.clone()
    load = loads_of(model, runtime, random_ids(4, 33))[1]
    figures = model.before_update(runtime)
    moved = gate.e_score_correction_bias - before
    assert moved.sum().item() == pytest.approx(0, abs=1e-6)
    for expert, count in enumerate(load):
        assert (moved[expert] < 0) == (count > load.float().mean())
    assert 0 < figures["load_entropy"] < 1
    assert 1 / 7 < figures["busiest"] <= 0.5


def test_the_loads_become_even(runtime):
    model = small_model().train()
    idx = random_ids(16, 33)
    excess = []
    for _ in range(200):
        with torch.no_grad():
            model.hidden(idx)
        load = model.load.float()
        excess.append((load.max() / load.mean() - 1).item())
        model.before_update(runtime)
    assert excess[0] > 1
    assert max(excess[-20:]) < 0.3


def test_two_halves_accumulated_are_the_whole(runtime):
    idx = random_ids(4, 33)
    whole = small_model().train()
    whole(idx[:, :-1], idx[:, 1:], keep_logits=False)[1].backward()
    halves = small_model().train()
    for half in idx.split(2):
        (halves(half[:, :-1], half[:, 1:], keep_logits=False)[1] / 2).backward()
    assert whole.before_update(runtime) == halves.before_update(runtime)
    assert same_weights(whole.state_dict(), halves.state_dict())
    for (name, p), q in zip(whole.named_parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_loads_of_all_processes_count_together(runtime, monkeypatch):
    alone = small_model().train()
    both = small_model().train()
    here = loads_of(alone, runtime, random_ids(1, 33))
    there = loads_of(both, runtime, random_ids(3, 33, seed=9))
    both.load.copy_(here)
    monkeypatch.setattr(type(runtime), "gather", lambda _, load: [load, there])
    figures = both.before_update(runtime)
    assert figures["busiest"].item() == pytest.approx(((here + there) / (here + there)[0].sum()).max().item())


def test_muon_takes_each_experts_matrix_by_itself():
    torch.manual_seed(0)
    stack = torch.nn.Parameter(torch.zeros(3, 8, 16))
    stack.grad = torch.randn(3, 8, 16) * torch.tensor([1.0, 100.0, 0.01])[:, None, None]
    Muon([stack], torch.float32, lr=1.0, momentum=0.0, weight_decay=0.0).step()
    for moved, grad in zip(stack.detach(), stack.grad, strict=True):
        torch.testing.assert_close(-moved / (0.2 * 4), orthogonalized(grad[None], torch.float32)[0])
        assert torch.linalg.svdvals(moved).min() > 0.5 * 0.2 * 4


def test_in_half_precision_experts_work_in_it_and_the_router_does_not(monkeypatch):
    kinds = []
    real = mla_moe.F.grouped_mm
    monkeypatch.setattr(
        mla_moe.F, "grouped_mm", lambda a, b, **more: kinds.append((a.dtype, b.dtype)) or real(a, b, **more)
    )
    model = small_model()
    router = model.model.layers[0].mlp.gate
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logits = model(random_ids(2, 33))[0]
        weights, _ = router(torch.randn(4, 32, dtype=torch.bfloat16))
    assert {*kinds} == {(torch.bfloat16, torch.bfloat16)}
    assert weights.dtype == torch.float32
    torch.testing.assert_close(logits.float(), model(random_ids(2, 33))[0], atol=0.1, rtol=0)
