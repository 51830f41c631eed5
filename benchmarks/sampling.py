"""What the cache of keys and values brings: sample.py beside the same model without one.

    python benchmarks/sampling.py --checkpoint out_demo/checkpoints/best.pt        # on a CPU: a few minutes

Both write the likeliest continuation of the prompt; without a cache, each token costs a pass over all tokens so far.
In turns, in one process: cached, uncached, cached, uncached, ... Prints a Markdown table: tokens a second, medians with
lowest and highest, and the ratio in the same round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sample  # noqa: E402
import train  # noqa: E402


def cached(writer: sample.Writer, request: sample.Request) -> str:
    return "".join(pieces[0] for pieces in writer.write(request))


@torch.no_grad()
def uncached(writer: sample.Writer, request: sample.Request) -> str:
    """The model, as it is called in training, over all tokens so far for each token."""
    prompt, _ = writer.encode(request.prompt)
    rows = torch.tensor([prompt], device=writer.runtime.device)
    for _ in range(request.max_new_tokens):
        with writer.runtime.autocast():
            logits = writer.model(rows)[0][:, -1]
        rows = torch.cat((rows, logits.argmax(dim=-1, keepdim=True)), dim=1)
    return writer.tokenizer.decode(rows[0, len(prompt) :].tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", default="out_demo/checkpoints/best.pt")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    train.keep_heap()
    print("| precision | tokens | cached, tok/s | uncached, tok/s | cached is faster by | the same text |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for amp in ("auto", "off"):
        writer = sample.Writer(args.checkpoint, amp=amp)
        request = sample.Request(writer.trained_prompt, max_new_tokens=args.tokens, temperature=0)
        cached(writer, sample.Request(writer.trained_prompt, max_new_tokens=2, temperature=0))  # warms up
        rates, texts = {cached: [], uncached: []}, set()
        for _ in range(args.rounds):
            for way, found in rates.items():
                start = time.perf_counter()
                texts.add(way(writer, request))
                found.append(args.tokens / (time.perf_counter() - start))
        spreads = (f"{statistics.median(r):.1f} ({min(r):.1f} to {max(r):.1f})" for r in rates.values())
        ratio = statistics.median(a / b for a, b in zip(*rates.values(), strict=True))
        same = "yes" if len(texts) == 1 else "no"
        precision = writer.runtime.describe_precision()
        print(f"| {precision} | {args.tokens} | {' | '.join(spreads)} | {ratio:.1f} | {same} |", flush=True)


if __name__ == "__main__":
    main()
