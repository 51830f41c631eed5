"""Each kernel computes what torch's plain operators do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from support.kernels import LinearCrossEntropy, attention_by_products


def torchs_attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def our_attention(q, k, v):
    return attention_by_products(q, k, v, dropout=0.0)


def with_gradients(attend, inputs, grad) -> list[torch.Tensor]:
    """[result, gradient of each input]"""
    inputs = [t.clone().requires_grad_() for t in inputs]
    result = attend(*inputs)
    result.backward(grad)
    return [result.detach(), *(t.grad for t in inputs)]


@pytest.mark.parametrize("length", [20, 256, 300, 513])
def test_attention_by_products_is_torchs_own(length):
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(2, 3, length, 8) for _ in range(4))
    theirs = with_gradients(torchs_attention, (q, k, v), grad)
    ours = with_gradients(our_attention, (q, k, v), grad)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    late = our_attention(q[:, :, 7:], k, v)  # the last queries of a longer sequence
    torch.testing.assert_close(late, theirs[0][:, :, 7:], atol=1e-5, rtol=1e-4)


def plain_head(x, weight, targets, dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss of the plain head and, of three times the loss, the gradients of x and weight."""
    x = x.detach().requires_grad_()
    weight = weight.detach().requires_grad_()
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
    x = torch.randn(rows, 32, requires_grad=True)
    weight = torch.randn(517, 32, requires_grad=True)
    targets = torch.randint(517, (rows,))
    targets[1::3] = -1  # as the proof has them, for targets that a batch repeats
    loss = LinearCrossEntropy.apply(x, weight, targets, dtype)
    (3 * loss).backward()
    expected, x_grad, weight_grad = plain_head(x, weight, targets, dtype)
    assert loss.item() == pytest.approx(expected.item(), rel=loss_error)
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    assert (x.grad - x_grad).norm() <= gradient_error * x_grad.norm()
    assert (weight.grad - weight_grad).norm() <= gradient_error * weight_grad.norm()
    with torch.no_grad():
        assert LinearCrossEntropy.apply(x, weight, targets, dtype).item() == loss.item()


def test_the_chunked_head_has_a_finite_loss_where_a_probability_is_zero():
    x = torch.tensor([[1000.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    loss = LinearCrossEntropy.apply(x, weight, torch.tensor([1]), torch.float32)
    loss.backward()
    assert 87 < loss.item() < 88
    assert x.grad.item() == pytest.approx(2.0)
