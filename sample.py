"""Text from a checkpoint, on the terminal.

python sample.py --checkpoint out_demo/checkpoints/best.pt --prompt "TILDA:" --num_samples 3
"""

from __future__ import annotations

import argparse
import sys

import torch

import train

LEAST = {"num_samples": 1, "max_new_tokens": 1, "temperature": 0.0, "top_k": 0, "seed": 0}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="out/checkpoints/best.pt", help="a best.pt or last.pt of train.py")
    parser.add_argument("--prompt", help="what to continue (default: the prompt that the model was trained with)")
    parser.add_argument("--num_samples", type=int, default=1, help="how many continuations")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="tokens in a continuation")
    parser.add_argument("--temperature", type=float, default=0.9, help="0: always the likeliest token")
    parser.add_argument("--top_k", type=int, default=50, help="sample from the k likeliest tokens (0: from all)")
    parser.add_argument("--seed", type=int, default=1337, help="the same seed gives the same text")
    return parser


def load_model(path: str) -> tuple[train.GPT, train.Tokenizer, str]:
    """(model in eval mode on the CPU, its tokenizer, the prompt of its training). Raises train.RunError."""
    checkpoint = train.load_checkpoint(path, lazy=True)
    model = train.GPT(train.GPTConfig(**checkpoint["model_config"]))
    model.load_state_dict(checkpoint["model"])
    return model.eval(), train.load_tokenizer(checkpoint["tokenizer"]["name"]), checkpoint["config"]["prompt"]


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if problems := [f"{name} is too small or no number" for name in LEAST if not getattr(args, name) >= LEAST[name]]:
        print(*(f"sample.py: {problem}" for problem in problems), sep="\n", file=sys.stderr)
        return 2
    try:
        model, tokenizer, trained_prompt = load_model(args.checkpoint)
    except (train.RunError, train.UsageError) as e:
        print(f"sample.py: {e}", file=sys.stderr)
        return 1
    prompt = (trained_prompt if args.prompt is None else train.unescape(args.prompt)) or "\n"
    idx = torch.tensor([tokenizer.encode(prompt)])
    generator = torch.Generator().manual_seed(args.seed % 2**63)
    for i in range(args.num_samples):
        tokens = model.generate(idx, args.max_new_tokens, args.temperature, args.top_k, generator)[0].tolist()
        train.show(("-" * 40 + "\n" if i else "") + tokenizer.decode(tokens))
        if sys.stdout is None:  # whoever read it is gone
            break
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
