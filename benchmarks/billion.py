"""One forward and one backward pass of mla_moe.py's model of 1,075,293,184 parameters, on a CPU: time and peak memory.

    python benchmarks/billion.py                # 256 tokens: takes about 9 GB, and minutes
    python benchmarks/billion.py --layers 2     # a small part of it, to see that it runs

Weights and gradients are in fp32. There is no optimizer, whose averages would take as much memory again.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from common import parser, peak_memory

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from mla_moe import MLAMoE, MLAMoEConfig  # noqa: E402


def main(argv: Sequence[str] | None = None) -> None:
    flags = parser("billion.py", __doc__)
    flags.add_argument("--tokens", type=int, default=256, help="(default: 256)")
    flags.add_argument("--layers", type=int, default=24, help="(default: 24)")
    args = flags.parse_args(argv)
    config = MLAMoEConfig(num_hidden_layers=args.layers)
    model = MLAMoE(config, torch.Generator().manual_seed(1337))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {model.flops_per_token() // 6:,} of which work on a token", flush=True)
    print(f"made: peak {peak_memory() / 1e9:.2f} GB", flush=True)
    idx = torch.randint(config.vocab_size, (1, args.tokens + 1), generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    _, loss = model(idx[:, :-1], idx[:, 1:], keep_logits=False)
    seconds = time.perf_counter() - start
    print(f"forward: {seconds:.1f} s, loss {loss.item():.4f} (a guess: {math.log(config.vocab_size):.4f})", flush=True)
    start = time.perf_counter()
    loss.backward()
    seconds = time.perf_counter() - start
    print(f"backward: {seconds:.1f} s, peak {peak_memory() / 1e9:.2f} GB, with {torch.get_num_threads()} threads")
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    print(f"parameters without a gradient: {', '.join(without) or 'none'}")


if __name__ == "__main__":
    main()
