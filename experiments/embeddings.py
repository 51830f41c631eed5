"""How far has training moved the embeddings of frequent and of rare tokens, and how far all alike?

    python benchmarks/embeddings.py --checkpoint out/checkpoints/last.pt

Compares the checkpoint's token embedding with the initial weights of its seed, by how often each token stands in the
text. A way that all rows went together tells no token from another. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402

TIMES = ((0, 0), (1, 1), (2, 5), (6, 20), (21, 100), (101, 1000), (1001, None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True)
    args = parser.parse_args()
    state = train.load_checkpoint(args.checkpoint, lazy=True)
    config = train.TrainConfig(**{k: v for k, v in state["config"].items() if k in train.FIELDS})
    tokenizer = train.saved_tokenizer(state["tokenizer"])
    tokens = train.load_corpus(config.input_file, tokenizer, config.cache_dir).tokens
    count = torch.from_numpy(np.bincount(tokens, minlength=tokenizer.vocab_size))
    initial = train.GPT(train.GPTConfig(**state["model_config"]), torch.Generator().manual_seed(config.seed))
    before, now = initial.transformer.wte.weight.detach(), state["model"]["transformer.wte.weight"]
    print(f"{args.checkpoint}, step {state['step']}\n")
    print("| times in the text | tokens | length of a row | rows moved by | all together by |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for least, most in TIMES:
        rows = (count >= least) & (count <= (count.max() if most is None else most))
        if not rows.any():
            continue
        moved = (now - before)[rows]
        lengths = now[rows].norm(dim=1).mean(), moved.norm(dim=1).mean(), moved.mean(dim=0).norm()
        name = f"over {least - 1:,}" if most is None else f"{least} to {most}" if most > least else f"{least}"
        print(f"| {name} | {int(rows.sum()):,} | " + " | ".join(f"{x:.2f}" for x in lengths) + " |")


if __name__ == "__main__":
    main()
