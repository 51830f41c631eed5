"""How far has training moved the embeddings of frequent and of rare tokens, and how far all alike?

    python experiments/embeddings.py --checkpoint out/checkpoints/last.pt

Compares the checkpoint's token embedding with the initial weights of its seed, by how often each token stands in the
text. A way that all rows went together tells no token from another. Prints a Markdown table.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from support import checkpoint, cli, text  # noqa: E402
from support.tokenizer import saved_tokenizer  # noqa: E402

EVER = 10**12
TIMES = ((0, 0), (1, 1), (2, 5), (6, 20), (21, 100), (101, 1000), (1001, EVER))


def token_counts(state: dict) -> torch.Tensor:
    """How often each token of the vocabulary stands in the text that a checkpoint was trained on."""
    config = state["config"]
    tokenizer = saved_tokenizer(state["tokenizer"])
    corpus = text.load_corpus(config["input_file"], tokenizer, config.get("cache_dir", ""))
    return torch.from_numpy(np.bincount(corpus.tokens, minlength=tokenizer.vocab_size))


def initial_embedding(state: dict) -> torch.Tensor:
    """As it was drawn by the run's seed."""
    if state.get("origin"):
        raise SystemExit(f"embeddings.py: this run began with the weights of {state['origin']}, not with drawn ones")
    generator = torch.Generator().manual_seed(state["config"]["seed"])
    model = train.GPT(train.GPTConfig(**state["model_config"]), generator)
    return model.transformer.wte.weight.detach()


def describe_times(least: int, most: int) -> str:
    if most == EVER:
        return f"over {least - 1:,}"
    if most > least:
        return f"{least:,} to {most:,}"
    return str(least)


def distances(before: torch.Tensor, now: torch.Tensor) -> tuple[float, float, float]:
    """Of some rows: (mean length, how far they moved on average, how far their mean moved)."""
    moved = now - before
    length = now.norm(dim=1).mean()
    each = moved.norm(dim=1).mean()
    together = moved.mean(dim=0).norm()
    return length.item(), each.item(), together.item()


def main(argv: Sequence[str] | None = None) -> None:
    flags = cli.program_parser("embeddings.py", "python experiments/embeddings.py --checkpoint PATH", __doc__)
    flags.add_argument("--checkpoint", required=True, help="a last.pt or best.pt")
    args = flags.parse_args(argv)
    state = checkpoint.load_checkpoint(args.checkpoint, lazy=True)
    count = token_counts(state)
    before = initial_embedding(state)
    now = state["model"]["transformer.wte.weight"]
    print(f"{args.checkpoint}, step {state['step']}\n")
    print("| times in the text | tokens | length of a row | rows moved by | all together by |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for least, most in TIMES:
        rows = (count >= least) & (count <= most)
        if rows.any():
            length, each, together = distances(before[rows], now[rows])
            times = describe_times(least, most)
            print(f"| {times} | {int(rows.sum()):,} | {length:.2f} | {each:.2f} | {together:.2f} |")


if __name__ == "__main__":
    main()
