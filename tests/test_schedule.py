"""Optimizers and OneCycleLR: the rate of step k is a function of the configuration and k alone."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import train
from support import kernels


def small_model(n_layer: int = 1, n_embd: int = 4) -> train.GPT:
    return train.GPT(train.GPTConfig(block_size=8, vocab_size=11, n_layer=n_layer, n_head=1, n_embd=n_embd))


def optimizer_of(config) -> torch.optim.Optimizer:
    return train.build_optimizer(small_model(), config)


def curve(config, start: int = 0) -> list[float]:
    """lr of each step from start + 1 on."""
    config = config.completed(1, 1)
    optimizer = optimizer_of(config)
    scheduler = train.build_scheduler(optimizer, config, start)
    rates = []
    for step in range(start, config.steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step + 1 < config.steps:
            scheduler.step()
    return rates


# ---- the curve ----


def test_first_peak_and_last_rate(tiny):
    rates = curve(tiny(steps=400, warmup_steps=30, lr=1e-3))
    assert len(rates) == 400
    assert rates[0] == pytest.approx(1e-3 / 25)
    assert rates[29] == max(rates) == pytest.approx(1e-3)  # the peak is step warmup_steps
    assert rates[-1] == min(rates) == pytest.approx(1e-3 / 25 / 1e4)
    assert rates[:30] == sorted(rates[:30])
    assert rates[29:] == sorted(rates[29:], reverse=True)


def test_a_rate_can_fall_along_a_line(tiny):
    config = {"steps": 101, "warmup_steps": 21, "lr": 1.0}
    line = curve(tiny(**config, anneal="linear"))
    cosine = curve(tiny(**config))
    falls = [line[step] - line[step + 1] for step in range(20, 100)]
    assert falls == pytest.approx([falls[0]] * 80, rel=1e-3)
    assert line[20] == cosine[20] == pytest.approx(1.0)
    assert line[100] == pytest.approx(1 / 25 / 1e4)
    assert line[40] < cosine[40] - 0.05  # a cosine stays near the peak at first


def test_a_long_run_does_not_warm_up_for_a_third_of_it(tiny):
    config = tiny(steps=200_000, optimizer="adamw").completed(1, 1)
    scheduler = train.build_scheduler(optimizer_of(config), config, 299)
    assert scheduler.get_last_lr() == [pytest.approx(config.lr)] * 3


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_any_warm_up_of_any_length_is_finite_and_never_over_the_peak(tiny, steps):
    for warmup in range(steps + 1):
        rates = curve(tiny(steps=steps, warmup_steps=warmup, lr=1.0))
        assert all(math.isfinite(rate) and 0 < rate <= 1.0 + 1e-12 for rate in rates), (warmup, rates)
        if warmup > 1:
            assert rates[warmup - 1] == pytest.approx(1.0)


def test_the_curve_does_not_depend_on_where_it_is_resumed(tiny):
    config = tiny(steps=25, warmup_steps=5)
    whole = curve(config)
    for start in range(25):
        assert curve(config, start) == whole[start:]


def test_a_loaded_optimizer_brings_back_no_old_rate(tiny):
    old = tiny(steps=10, lr=1.0).completed(1, 1)
    saved = optimizer_of(old)
    train.build_scheduler(saved, old)
    new = tiny(steps=40, lr=1e-2, warmup_steps=4).completed(1, 1)
    optimizer = optimizer_of(new)
    optimizer.load_state_dict(saved.state_dict())
    train.build_scheduler(optimizer, new, 7)
    assert optimizer.param_groups[0]["lr"] == curve(new)[7]


@pytest.mark.parametrize("embed_lr", [1e-2, 0.0])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_embeddings_have_a_rate_of_their_own_at_each_step_and_after_a_resume(tiny, optimizer, embed_lr):
    config = tiny(steps=20, warmup_steps=4, embed_lr=embed_lr, optimizer=optimizer).completed(1, 1)
    ratio = (embed_lr or config.lr) / config.lr
    whole = curve(config)
    for start in (0, 7):
        built = optimizer_of(config)
        scheduler = train.build_scheduler(built, config, start)
        for step in range(start, config.steps):
            rate = whole[step]
            for group in built.param_groups:
                has_tables = any(p.shape == (11, 4) for p in group["params"])
                assert group["lr"] == pytest.approx(rate * ratio if has_tables else rate)
            built.step()
            if step + 1 < config.steps:
                scheduler.step()


def test_the_schedule_leaves_the_betas_alone(tiny):
    config = tiny(optimizer="adamw", beta1=0.9, beta2=0.95).completed(1, 1)
    optimizer = optimizer_of(config)
    scheduler = train.build_scheduler(optimizer, config)
    for _ in range(5):
        assert all(group["betas"] == (0.9, 0.95) for group in optimizer.param_groups)
        optimizer.step()
        scheduler.step()


# ---- what each optimizer trains ----


def test_only_matrices_decay(tiny):
    groups = optimizer_of(tiny(optimizer="adamw", weight_decay=0.3)).param_groups
    for group, decay in zip(groups, (0.3, 0.3, 0.0), strict=True):
        assert group["weight_decay"] == decay
        assert all((p.dim() >= 2) == (decay > 0) for p in group["params"])
    assert sum(len(group["params"]) for group in groups) == 2 + 12 + 2  # all of them, the tied head once


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest(tiny):
    model = small_model(n_layer=2)
    optimizer = train.build_optimizer(model, tiny(optimizer="muon", weight_decay=0.3, lr=1e-2))
    names = {id(p): name for name, p in model.named_parameters()}
    muon, tables, rest = ([names[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    assert len(muon) == 2 * 4
    assert all(name.startswith("transformer.h.") and name.endswith("weight") for name in muon)
    assert tables == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert all("ln_" in name or name.endswith("bias") for name in rest)
    assert len(muon) + len(tables) + len(rest) == len(list(model.parameters()))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.3, 0.0]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_adamw_is_one_fused_kernel(tiny, optimizer):
    assert optimizer_of(tiny(optimizer=optimizer)).defaults["fused"]


# ---- Muon ----


def plain_muon(p: torch.Tensor, average: torch.Tensor, lr: float, momentum: float, decay: float) -> None:
    """One matrix's update as the papers write it, with an exact polar factor: U V^T of the SVD."""
    average.mul_(momentum).add_(p.grad, alpha=1 - momentum)
    ahead = (1 - momentum) * p.grad + momentum * average
    rows, columns = p.shape
    if rows == 3 * columns:  # query, key and value, each by itself
        ahead = ahead.view(3, columns, columns)
    u, _, v = torch.linalg.svd(ahead, full_matrices=False)
    p.data -= lr * decay * p.data + lr * 0.2 * max(ahead.shape[-2:]) ** 0.5 * (u @ v).view(p.shape)


def test_muon_and_adamw_do_together_what_each_does_alone(tiny, monkeypatch):
    """The same updates as the two by hand, with a state that is loaded on the way."""
    monkeypatch.setattr(kernels, "orthogonalized", exactly_orthogonal)
    config = tiny(optimizer="muon", steps=8, warmup_steps=3, lr=1e-2, beta1=0.9, beta2=0.95, weight_decay=0.2)
    config = config.completed(1, 1)
    torch.manual_seed(0)
    a = small_model()
    b = copy.deepcopy(a)
    optimizer = train.build_optimizer(a, config)
    scheduler = train.build_scheduler(optimizer, config)
    blocks = [p for p in b.transformer.h.parameters() if p.dim() == 2]
    averages = [torch.zeros_like(p) for p in blocks]
    tables = [b.transformer.wte.weight, b.transformer.wpe.weight]
    vectors = [p for p in b.parameters() if p.dim() == 1]
    groups = [{"params": tables, "weight_decay": 0.2}, {"params": vectors, "weight_decay": 0.0}]
    adamw_alone = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    for step, rate in enumerate(curve(config), 1):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for group in adamw_alone.param_groups:
            group["lr"] = rate
        optimizer.step()
        adamw_alone.step()
        for p, average in zip(blocks, averages, strict=True):
            plain_muon(p, average, rate, 0.9, 0.2)
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        if step == 4:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = train.build_optimizer(a, config)
            optimizer.load_state_dict(state)
            scheduler = train.build_scheduler(optimizer, config, 4)
        elif step < 8:
            scheduler.step()


def exactly_orthogonal(matrices, dtype):
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    return u @ v


def update_by_muon(config) -> torch.Tensor:
    """By how much one step moves a matrix."""
    torch.manual_seed(0)
    model = small_model(n_embd=32)
    matrix = model.transformer.h[0].mlp.c_fc.weight
    before = matrix.detach().clone()
    optimizer = train.build_optimizer(model, config)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    return matrix.detach() - before


def test_muon_does_without_bf16_where_it_would_crawl(tiny, monkeypatch):
    """In fp32, which gives what bf16 gives, but for the rounding."""
    real = kernels.orthogonalized
    dtypes = []

    def orthogonalized(matrix, dtype):
        dtypes.append(dtype)
        return real(matrix, dtype)

    monkeypatch.setattr(kernels, "orthogonalized", orthogonalized)
    config = tiny(optimizer="muon", lr=1e-2)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    in_bf16 = update_by_muon(config)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})
    in_fp32 = update_by_muon(config)
    assert dtypes == [torch.bfloat16] * 4 + [torch.float32] * 4  # the matrices of a block have four shapes
    assert 0 < (in_bf16 - in_fp32).norm() < 0.02 * in_fp32.norm()


def test_muon_takes_query_key_and_value_apart(tiny):
    """However small the gradient of one of them, it moves as far as the others."""
    torch.manual_seed(0)
    model = small_model(n_embd=16)
    c_attn = model.transformer.h[0].attn.c_attn.weight
    before = c_attn.detach().clone()
    optimizer = train.build_optimizer(model, tiny(optimizer="muon", lr=1e-2, weight_decay=0.0))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    c_attn.grad[:16] *= 1e-4
    optimizer.step()
    for moved in (c_attn.detach() - before).chunk(3):
        values = torch.linalg.svdvals(moved) / (optimizer.param_groups[0]["lr"] * 0.2 * 16**0.5)
        assert values.max() < 1.15
        assert values.median() > 0.85


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (24, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_orthogonalized_brings_all_singular_values_near_one(shape, dtype):
    """Whatever the size of the gradient, and of each matrix of a stack by itself."""
    torch.manual_seed(1)
    u, _, v = torch.linalg.svd(torch.randn(3, *shape), full_matrices=False)
    scales = torch.logspace(0, -1.5, min(shape))
    sizes = torch.tensor([1.0, 1e-6, 1e4])[:, None, None]
    stack = sizes * (u * scales @ v)
    inside = u.mT @ kernels.orthogonalized(stack, dtype).float() @ v.mT
    values = torch.diagonal(inside, dim1=1, dim2=2)
    assert values.min() > 0.9
    assert values.max() < 1.1
    rounding = 1e-3 if dtype == torch.float32 else 0.05
    assert torch.allclose(inside, torch.diag_embed(values), atol=rounding)  # the directions are the same


def test_orthogonalized_of_a_matrix_without_gradient_is_zero():
    assert not kernels.orthogonalized(torch.zeros(2, 8, 8), torch.bfloat16).any()


def test_small_singular_values_are_lifted_in_proportion():
    """A hundred times below the largest it is near one. Below that it grows with the value: no noise is blown up."""
    torch.manual_seed(1)
    u, _, v = torch.linalg.svd(torch.randn(1, 64, 192), full_matrices=False)
    scales = torch.ones(64)
    scales[1:4] = torch.tensor([1e-2, 1e-3, 1e-4])
    inside = u.mT @ kernels.orthogonalized(u * scales @ v, torch.float32) @ v.mT
    values = torch.diagonal(inside[0])
    assert values[0] == pytest.approx(1, abs=0.1)
    assert values[2] / values[3] == pytest.approx(10, rel=0.05)
    assert 0.2 < values[1] < 1.1
