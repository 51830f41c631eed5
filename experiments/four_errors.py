"""Four errors that leave a model without sense, and the loss that each of them gives.

    python experiments/four_errors.py                         # several minutes on a CPU
    python experiments/four_errors.py --input_file FILE

A small model of mla_moe.py is trained with each error on the characters of a text, and on fresh random tokens of 64
kinds. No model can know a random token before it sees it: a loss under ln 64 = 4.159 is an error. The last error is one
of sampling. It leaves the loss alone, so the loss of what was sampled is measured, by the model that sampled it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import mla_moe  # noqa: E402
from mla_moe import MLAMoE, MLAMoEConfig  # noqa: E402
from support import cli, inference  # noqa: E402
from support.text import load_text  # noqa: E402

SHAPE = MLAMoEConfig(
    vocab_size=64,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    q_lora_rank=24,
    kv_lora_rank=24,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=16,
    moe_intermediate_size=32,
    max_position_embeddings=256,
)
B, T = 16, 32
PEAK = 1e-2  # of the learning rate


# ---- the errors ----


@contextlib.contextmanager
def none() -> Iterator[int]:
    """Each yields how far the targets are shifted."""
    yield 1


@contextlib.contextmanager
def no_layers_called() -> Iterator[int]:
    with replaced(MLAMoE, "hidden", lambda model, idx, cache=None: model.model.norm(model.model.embed_tokens(idx))):
        yield 1


@contextlib.contextmanager
def labels_not_shifted() -> Iterator[int]:
    yield 0


@contextlib.contextmanager
def no_mask() -> Iterator[int]:
    with replaced(mla_moe, "attention_by_products", lambda q, k, v, dropout: F.scaled_dot_product_attention(q, k, v)):
        yield 1


@contextlib.contextmanager
def replaced(place, name: str, value) -> Iterator[None]:
    real = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, real)


# ---- training ----


def text_batches(tokens: torch.Tensor) -> Callable[[], torch.Tensor]:
    def draw() -> torch.Tensor:
        starts = torch.randint(len(tokens) - T - 1, (B,))
        return torch.stack([tokens[start : start + T + 1] for start in starts.tolist()])

    return draw


def random_batch() -> torch.Tensor:
    return torch.randint(64, (B, T + 1))


def trained(vocab_size: int, draw: Callable[[], torch.Tensor], shift: int, steps: int) -> tuple[MLAMoE, float, int]:
    """(the model, its mean loss in the last 20 steps, how many of its parameters got no gradient)."""
    torch.manual_seed(0)
    model = MLAMoE(dataclasses.replace(SHAPE, vocab_size=vocab_size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK * min(1.0, (step + 1) / 20) * (1 - step / steps)
        rows = draw()
        loss = model(rows[:, :-1], rows[:, shift : shift + T], keep_logits=False)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    idle = sum(1 for p in model.parameters() if p.grad is None)
    return model, sum(losses[-20:]) / 20, idle


# ---- sampling ----


def softmax_twice(logits, temperature, top_k, generator, top_p=1.0):
    """The error: probabilities are taken for logits."""
    return torch.multinomial(logits.softmax(dim=-1).softmax(dim=-1), 1, generator=generator)


@torch.no_grad()
def sampled(model: MLAMoE, start: torch.Tensor) -> tuple[float, torch.Tensor]:
    """(the mean loss of 100 sampled tokens in each of 16 rows, the rows)."""
    model.eval()
    rows = inference.generate(model, start, 100, generator=torch.Generator().manual_seed(0))
    logits, _ = model(rows[:, :-1])
    losses = F.cross_entropy(logits[:, -100:].flatten(0, 1), rows[:, -100:].flatten())
    return losses.item(), rows


def main(argv: Sequence[str] | None = None) -> None:
    flags = cli.program_parser("four_errors.py", "python experiments/four_errors.py [--FLAG VALUE ...]", __doc__)
    flags.add_argument("--input_file", default="data/input.txt", help="(default: data/input.txt)")
    flags.add_argument("--steps", type=int, default=200, help="(default: 200)")
    args = flags.parse_args(argv)
    tokenizer, corpus = load_text(args.input_file, "char", "")
    draw = text_batches(torch.from_numpy(corpus.tokens[:].astype("int64")))
    print(f"{args.steps} steps of {B} x {T} tokens; ln 64 = {math.log(64):.3f}")
    print("| error | loss on the text | loss on random tokens | parameters without a gradient |")
    print("|---|---:|---:|---:|")
    for error in (none, no_layers_called, labels_not_shifted, no_mask):
        with error() as shift:
            model, on_text, idle = trained(tokenizer.vocab_size, draw, shift, args.steps)
            _, on_random, _ = trained(64, random_batch, shift, args.steps)
        total = sum(1 for _ in model.parameters())
        print(f"| {error.__name__} | {on_text:.3f} | {on_random:.3f} | {idle} of {total} |", flush=True)
        if error is none:
            sound = model
    start = draw()[:, :8]
    for name, pick in (("as it should be", inference.pick_token), ("by softmax of softmax", softmax_twice)):
        with replaced(inference, "pick_token", pick):
            loss, rows = sampled(sound, start)
        print(f"sampled {name}: {loss:.3f} nats a token: {tokenizer.decode(rows[0].tolist())!r}", flush=True)


if __name__ == "__main__":
    main()
