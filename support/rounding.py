"""Weights in half the bytes: fp16 or bf16 in place of fp32, and how far that moves the model's logits."""

from __future__ import annotations

import argparse

import torch

from support.checkpoint import not_finite
from support.cli import UsageError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PLACES = 256  # at which logits are compared


@torch.no_grad()
def round_weights(model: torch.nn.Module, dtype: str) -> None:
    """Rounds the weights of a model on the CPU to a name of DTYPES, and prints how far that moves its logits. They stay
    float32, as kernels of a CPU want them, and can be stored in the other type without a further loss.

    Raises UsageError where one is too large for fp16, which ends at 65,504."""
    if dtype == "fp32":
        return
    model.eval()
    size = min(model.config.block_size, PLACES)
    idx = torch.randint(model.config.vocab_size, (1, size), generator=torch.Generator().manual_seed(0))
    before, _ = model(idx)
    for p in model.parameters():
        p.copy_(p.to(DTYPES[dtype]))
    name = not_finite(dict(model.named_parameters()))
    if name:
        raise UsageError(f"{name} has weights too large for {dtype}: use --dtype bf16")
    after, _ = model(idx)
    print(f"Weights rounded to {dtype}: {difference(before, after)}", flush=True)


def stored_as(dtype: str, tensors: dict[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a model in the type of that name. Buffers, as the bias of a router, stay in fp32: they weren't
    rounded, and transformers keeps them so too."""
    buffers = dict(model.named_buffers())
    stored = {}
    for name, tensor in tensors.items():
        stored[name] = tensor if name in buffers else tensor.to(DTYPES[dtype])
    return stored


def difference(before: torch.Tensor, after: torch.Tensor) -> str:
    """What to say of two tensors of logits, (1, T, V)."""
    most = (after - before).abs().max().item()
    same = (after.argmax(-1) == before.argmax(-1)).sum().item()
    places = before.size(1)
    largest = before.abs().max().item()
    moved = f"after {places:,} random tokens, logits of up to {largest:.3g} differ by {most:.2g} at most"
    return f"{moved}; the likeliest next token is the same at {same:,} of {places:,} places"


def add_dtype_flag(parser: argparse.ArgumentParser) -> None:
    """--dtype, for the programs that write a trained model for others."""
    text = "what the weights are stored as; fp16 and bf16 take half the bytes (default: fp32)"
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES), help=text)
