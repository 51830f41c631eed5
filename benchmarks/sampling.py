"""What the cache of keys and values brings: sample.py beside the same model without one.

    python benchmarks/sampling.py --checkpoint out_demo/checkpoints/best.pt        # on a CPU: a few minutes
    python benchmarks/sampling.py --tokens 8 --rounds 1                            # a first try

Both write the likeliest continuation of the prompt; without a cache, each token costs a pass over all tokens so far.
In turns, in one process: cached, uncached, cached, uncached, ... Prints a Markdown table: tokens a second, medians with
lowest and highest, and the ratio in the same round.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from common import parser, print_header, print_row, spread

import train
from support.inference import Request, Writer


def cached(writer: Writer, request: Request) -> str:
    return "".join(pieces[0] for pieces in writer.write(request))


@torch.no_grad()
def uncached(writer: Writer, request: Request) -> str:
    """The model, as it is called in training, over all tokens so far for each token."""
    prompt, _ = writer.encode(request.prompt)
    rows = torch.tensor([prompt], device=writer.runtime.device)
    for _ in range(request.max_new_tokens):
        with writer.runtime.autocast():
            logits = writer.model(rows)[0][:, -1]
        rows = torch.cat((rows, logits.argmax(dim=-1, keepdim=True)), dim=1)
    return writer.tokenizer.decode(rows[0, len(prompt) :].tolist())


def timed(way: Callable[[Writer, Request], str], writer: Writer, request: Request) -> tuple[float, str]:
    """(tokens a second, the text)"""
    start = time.perf_counter()
    text = way(writer, request)
    return request.max_new_tokens / (time.perf_counter() - start), text


def table_row(writer: Writer, request: Request, rounds: int) -> list[str]:
    cached(writer, dataclasses.replace(request, max_new_tokens=2))  # warms up
    fast = []
    slow = []
    same = True
    for _ in range(rounds):
        rate, text = timed(cached, writer, request)
        slow_rate, slow_text = timed(uncached, writer, request)
        fast.append(rate)
        slow.append(slow_rate)
        same = same and text == slow_text
    ratio = statistics.median(a / b for a, b in zip(fast, slow, strict=True))
    precision = writer.runtime.describe_precision()
    tokens = str(request.max_new_tokens)
    return [precision, tokens, spread(fast), spread(slow), f"{ratio:.1f}", "yes" if same else "no"]


def main(argv: Sequence[str] | None = None) -> None:
    flags = parser(__file__, __doc__)
    default = "out_demo/checkpoints/best.pt"
    flags.add_argument("--checkpoint", default=default, help=f"(default: {default})")
    flags.add_argument("--tokens", type=int, default=200, help="to write (default: 200)")
    flags.add_argument("--rounds", type=int, default=3, help="(default: 3)")
    args = flags.parse_args(argv)
    print_header("precision", "tokens", "cached, tok/s", "uncached, tok/s", "cached is faster by", "the same text")
    for amp in ("auto", "off"):
        writer = Writer(args.checkpoint, train.ARCHITECTURES, amp=amp)
        request = Request(writer.trained_prompt, max_new_tokens=args.tokens, temperature=0)
        print_row(*table_row(writer, request, args.rounds))


if __name__ == "__main__":
    main()
