"""A small model with large weights, for tests of the model and of what is done with it."""

from __future__ import annotations

import torch

from train import GPT, GPTConfig

SMALL = GPTConfig(block_size=32, vocab_size=101, n_layer=3, n_head=4, n_embd=32)


def small_model(seed=0, config=SMALL) -> GPT:
    """Its weights are so large that its logits differ a lot."""
    torch.manual_seed(seed)
    model = GPT(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.15)
    return model


def random_ids(rows: int, length: int, seed=1) -> torch.Tensor:
    """Token ids of the small model, (rows, length)."""
    return torch.randint(SMALL.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))
