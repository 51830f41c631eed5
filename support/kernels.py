"""What torch lacks: the head's loss in chunks, attention by plain products on a CPU, and the Muon optimizer."""

from __future__ import annotations

import collections
import contextlib
import math
from collections.abc import Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F


def linear_cross_entropy(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy, in nats, of the head's logits x @ weight.T: x (N, C), weight (V, C), targets (N,) of class
    ids, or -1 for rows that don't count. Products run in autocast's type."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return LinearCrossEntropy.apply(x, weight, targets, dtype)


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of the head, F.cross_entropy(x @ weight.T, targets), without the logits of all rows at once:
    50,257 of them a row, in fp32 and with their gradients, would take more memory than the rest of the model.

    A chunk of rows makes its logits, its loss and, since these need nothing from behind the loss, its gradients in one
    go (Hsu et al. 2024, "Liger Kernel"); backward only scales them. Products run in `dtype`, softmax and sums in fp32.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, dtype):
        """x (N, C), weight (V, C), targets (N,) of class ids or -1 for rows that don't count -> loss, in nats."""
        V = weight.size(0)
        differentiate = any(ctx.needs_input_grad)
        # Processors and GPUs multiply aligned sizes faster: 50,257 becomes 50,304. Padding has no probability.
        w = weight.new_zeros(-(-V // 64) * 64, weight.size(1), dtype=dtype)
        w[:V] = weight
        counts = targets >= 0
        number = counts.sum()
        total = 0.0
        dx = []
        dw = None
        rows = 512 if x.device.type == "cpu" else 4096
        chunks = zip(x.to(dtype).split(rows), targets.split(rows), counts.split(rows), strict=True)
        for xc, tc, counted in chunks:
            logits = xc @ w.t()
            logits[:, V:] = -math.inf
            p = F.softmax(logits, dim=-1, dtype=torch.float32)
            target = (torch.arange(len(tc), device=tc.device), tc.clamp(min=0))
            p_target = p[target]
            # A probability below the smallest float is a loss of 87 nats, not an infinite one.
            total -= (p_target.clamp(min=torch.finfo(p.dtype).tiny).log() * counted).sum()
            if differentiate:  # d loss / d logits = (p - one-hot) / number of rows; the division is left to backward
                logits.copy_(p)
                logits[target] = (p_target - 1).to(dtype)  # rounded after the difference, which may be tiny
                dx.append((logits @ w).mul_(counted[:, None]))
                # /32: the sum of a frequent token's rows must fit into fp16
                part = (logits.t() @ (xc / 32 * counted[:, None]))[:V]
                dw = part.float() if dw is None else dw.add_(part)
        if differentiate:
            ctx.save_for_backward(torch.cat(dx), dw, number)
        ctx.dtypes = (x.dtype, weight.dtype)
        return total / number

    @staticmethod
    def backward(ctx, grad):
        dx, dw, number = ctx.saved_tensors
        x_dtype, weight_dtype = ctx.dtypes
        scale = grad / number
        return dx.to(x_dtype) * scale, dw.mul_(32 * scale).to(weight_dtype), None, None


def attention_by_products(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float) -> torch.Tensor:
    """Causal attention of the last T positions of S: q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D).

    On CPUs with native bf16, plain products take 40 to 60% of the time of torch's own kernel, forward and backward
    together. Blocks of 256 queries, each against no more keys than its last query sees, save work where T is long."""
    B, H, T, D = q.shape
    past = k.size(2) - T
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    blocks = []
    for start in range(0, T, 256):
        block = q[:, start : start + 256]
        seen = past + start + block.size(1)
        mask = q.new_full((block.size(1), seen), -math.inf).triu(past + start + 1)  # row t sees columns up to its own
        scores = torch.baddbmm(mask, block, k[:, :seen].transpose(1, 2), alpha=1 / math.sqrt(D))
        blocks.append(F.dropout(scores.softmax(dim=-1), dropout) @ v[:, :seen])
    return torch.cat(blocks, dim=1).unflatten(0, (B, H))


# A step takes each singular value s to s * (a + b s^2 + c s^4). These four (a, b, c) bring all from 1/100 to 1 near 1
# in the fewest steps (Amsel et al. 2025, "The Polar Express"). Two steps share one Gram matrix.
POLAR_EXPRESS = (
    ((7.8623, -21.6722, 15.3059), (3.5802, -2.5753, 0.4871)),
    ((2.6486, -1.8941, 0.4133), (1.9763, -1.3584, 0.3860)),
)


def orthogonalized(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A stack of matrices (N, rows, columns), each with its singular values brought near 1 (but for the smallest),
    by products in `dtype`: what the gradient says rarely then moves the weights about as much as what it says always.

    Each step multiplies x from the left by a polynomial of its Gram matrix x x^T. That one is small, and the next
    step's follows from it, so the steps are made on it, and x is multiplied once in two steps."""
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-30)).to(dtype)
    for i, pair in enumerate(POLAR_EXPRESS):
        gram = x @ x.mT
        if i == 0:  # gram's norm is the root of the sum of all s^4: no s^2 is over it
            bound = gram.norm(dim=(1, 2), keepdim=True, dtype=torch.float32).clamp(min=1e-30)
            gram = (gram / bound).to(dtype)
            x = x / bound.sqrt().to(dtype)
        x = two_steps(gram, *pair) @ x
    return x.mT if tall else x


def two_steps(gram: torch.Tensor, first: tuple, second: tuple) -> torch.Tensor:
    """What two Newton-Schulz steps multiply x by, from its Gram matrices (N, rows, rows)."""
    p = polynomial(gram, *first)
    return polynomial(p @ gram @ p, *second) @ p


def polynomial(gram: torch.Tensor, a: float, b: float, c: float) -> torch.Tensor:
    """a I + b gram + c gram^2."""
    p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    p.diagonal(dim1=1, dim2=2).add_(a)
    return p


def updates_here(directions: dict, shapes: dict, dtype: torch.dtype) -> Iterator[tuple]:
    """Yields (parameter, its direction, orthogonalized by products in `dtype`). `shapes` says what each parameter is: a
    matrix (rows, columns), or N of them, (N, rows, columns), each of which is worked on by itself. Those of one shape
    go together: a GPU would wait longer for the next small product than it works on it."""
    groups = collections.defaultdict(list)
    for p in directions:
        groups[tuple(shapes[p])].append(p)
    for shape, group in groups.items():
        stack = torch.stack([directions[p].view(shape) for p in group])
        updates = orthogonalized(stack.flatten(0, -3), dtype)
        for p, update in zip(group, updates.view_as(stack), strict=True):
            yield p, update.view(p.shape)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized (Jordan et al. 2024, "Muon"). Updates are scaled to the size of AdamW's (Liu et al.
    2025, section 2.2), so that the usual learning rates do."""

    def __init__(self, params, dtype: torch.dtype, updates=updates_here, shapes: dict | None = None, **options):
        """params: matrices or stacks of them (N, rows, columns), such as experts', or groups of both; options: lr,
        momentum and weight_decay. Several processes share the work by `updates` of theirs. `shapes`: of parameters that
        are to be seen as stacks, as updates_here has it."""
        super().__init__(params, options)
        self.dtype = dtype
        self.updates = updates
        self.shapes = shapes or {}

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """The directions take the place of the gradients. (_foreach: one call for all parameters. A GPU would wait
        longer for the next of many small calls than it works on it.)"""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            gradients = [p.grad for p in params]
            averages = [self.average(p) for p in params]
            torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
            torch._foreach_lerp_(gradients, averages, group["momentum"])  # Nesterov's: the average, a step ahead
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            directions = dict(zip(params, gradients, strict=True))
            shapes = {p: self.shapes.get(p, p.shape) for p in params}
            for p, update in self.updates(directions, shapes, self.dtype):
                p.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(shapes[p][-2:])))

    def average(self, p: torch.Tensor) -> torch.Tensor:
        """Of its gradients so far."""
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for some groups and AdamW for the rest, as one optimizer: one state in the checkpoint,
    and a loss scaler that skips an update in both or in neither. To know whether to skip, the scaler waits for the
    device once a step: unlike fused AdamW, Muon can't look at its flag there."""

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW):
        self.muon = muon
        self.adamw = adamw
        super().__init__([*muon.param_groups, *adamw.param_groups], adamw.defaults)
        self.share()

    def share(self) -> None:
        """The two work on this optimizer's own groups and states, so that these are all there is."""
        count = len(self.muon.param_groups)
        self.muon.param_groups = self.param_groups[:count]
        self.adamw.param_groups = self.param_groups[count:]
        self.muon.state = self.state
        self.adamw.state = self.state

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self.share()  # loading made new groups and a new dict of states

    def step(self, closure=None) -> None:
        self.muon.step()
        self.adamw.step()


class PackedLinear(nn.Module):
    """nn.Linear for few rows on a CPU, with its matrix in oneDNN's own order: otherwise each call reorders it, which
    takes as long as the product. The two operators are those of torch.compile's frozen models."""

    def __init__(self, linear: nn.Linear):
        """Raises RuntimeError, AttributeError or TypeError where torch lacks the operators."""
        super().__init__()
        self.bias = linear.bias
        self.dtype = linear.weight.dtype
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)
        self(linear.weight.new_zeros(1, linear.in_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.packed, self.bias, "none", [], "")


def prepare_matrices(model: nn.Module, dtype: torch.dtype, on_cpu: bool) -> None:
    """For inference: gives each matrix, once, the type that autocast would cast it to for every token anew, and on a
    CPU the order that oneDNN would bring it into. The embedding stays as it is, so the head gets a copy of its own."""
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, nn.Linear):
                setattr(parent, name, prepared(module, dtype, on_cpu))


def prepared(linear: nn.Linear, dtype: torch.dtype, on_cpu: bool) -> nn.Module:
    """The same product, with all that can be done before it done."""
    own = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    for name, p in linear.named_parameters():
        setattr(own, name, nn.Parameter(p.detach().to(dtype), requires_grad=False))
    if on_cpu:
        with contextlib.suppress(RuntimeError, AttributeError, TypeError):
            return PackedLinear(own)
    return own
