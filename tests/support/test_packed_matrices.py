"""What inference does to a model's matrices, once, so that a token costs less."""

from __future__ import annotations

import pytest
import torch

from support import kernels


def products(dtype, bias) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """(the packed layer, what it gives, what the plain one gives)"""
    torch.manual_seed(0)
    linear = torch.nn.Linear(48, 80, bias)
    x = torch.randn(2, 3, 48, dtype=dtype)
    plain = kernels.prepared(linear, dtype, on_cpu=False)
    packed = kernels.prepared(linear, dtype, on_cpu=True)
    with torch.no_grad():
        return packed, packed(x), plain(x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_matrix_gives_the_same_product(dtype, bias):
    _, y, expected = products(dtype, bias)
    torch.testing.assert_close(y, expected)
    assert y.dtype == dtype
    assert y.shape == (2, 3, 80)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_torch_without_the_operators_keeps_the_plain_matrix(dtype, monkeypatch):
    monkeypatch.setattr(kernels.PackedLinear, "forward", lambda *_: torch.ops.mkldnn.not_there())
    layer, y, expected = products(dtype, bias=True)
    assert type(layer) is torch.nn.Linear
    assert torch.equal(y, expected)


def test_the_embedding_stays_as_it_is_and_the_head_gets_a_copy():
    model = torch.nn.Module()
    model.wte = torch.nn.Embedding(80, 48)
    model.head = torch.nn.Linear(48, 80, bias=False)
    model.head.weight = model.wte.weight
    kernels.prepare_matrices(model, torch.bfloat16, on_cpu=False)
    assert model.wte.weight.dtype == torch.float32
    assert model.head.weight.dtype == torch.bfloat16
