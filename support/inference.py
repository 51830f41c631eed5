"""Using a model: text token by token with a cache, what it knows by heart, and whether a token sees a later one."""

from __future__ import annotations

import codecs
import contextlib
import random
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from support.bar import no_bar
from support.checkpoint import load_model
from support.cli import RunError
from support.kernels import prepare_matrices
from support.machine import Runtime, start_runtime

RECALL_GIVEN = 32  # tokens of the text before the place that recall asks about
RECALL_ASKED = 32  # and after it
# All but cuDNN's, which makes a plan for each new number of keys: 50 ms a token on an H200, where the rest takes 6.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def do_nothing() -> None:
    pass


# ---- text ----


@torch.no_grad()
def stream(
    model, idx, max_new_tokens: int, temperature=1.0, top_k=0, generator=None, top_p=1.0
) -> Iterator[torch.Tensor]:
    """Yields the next token of each row, (B, 1), given the rows so far, (B, T) with T >= 1, max_new_tokens times.

    Keys and values of earlier tokens are cached, so a token costs one position's work. When the context is full, its
    newer half is read again and becomes the start of the next one."""
    size = model.config.block_size
    rows = idx[:, -size:]
    fresh = rows
    cache = model.new_cache()
    for _ in range(max_new_tokens):
        if rows.size(1) > size:
            rows = rows[:, -max(1, size // 2) :]
            fresh = rows
            cache = model.new_cache()
        with sdpa_kernel(ATTENTION):
            logits, _ = model(fresh, cache=cache)
        fresh = pick_token(logits[:, -1].float().cpu(), temperature, top_k, generator, top_p).to(idx.device)
        rows = torch.cat((rows, fresh), dim=1)
        yield fresh


def generate(model, idx, max_new_tokens: int, temperature=1.0, top_k=0, generator=None) -> torch.Tensor:
    """(B, T) -> (B, T + max_new_tokens): the rows, continued. `generator` is a CPU torch.Generator."""
    return torch.cat((idx, *stream(model, idx, max_new_tokens, temperature, top_k, generator)), dim=1)


def pick_token(logits: torch.Tensor, temperature: float, top_k: int, generator, top_p: float = 1.0) -> torch.Tensor:
    """Logits (B, V) -> token ids (B, 1): the likeliest at temperature 0, else drawn from the top_k (0: all), and of
    these from the fewest likeliest whose probabilities reach top_p (Holtzman et al. 2020, section 3.1).

    `generator` is one for all rows, or a list of one for each."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = (logits - logits.max(dim=-1, keepdim=True).values) / max(temperature, 1e-6)  # finite at any temperature
    ids = None
    if 0 < top_k < logits.size(-1) or top_p < 1:
        # drawing from a few is much quicker than from all, the rest with probability 0
        logits, ids = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))
    weights = F.softmax(logits, dim=-1)
    if top_p < 1:
        weights = weights.masked_fill(weights.cumsum(dim=-1) - weights >= top_p, 0)
    if isinstance(generator, list):
        rows = zip(weights, generator, strict=True)
        drawn = torch.stack([torch.multinomial(row, 1, generator=one) for row, one in rows])
    else:
        drawn = torch.multinomial(weights, 1, generator=generator)
    return drawn if ids is None else ids.gather(1, drawn)


def continue_prompts(
    model, tokenizer, runtime: Runtime, prompts: list[str], settings, generator, poll=do_nothing
) -> list[tuple[str, str]]:
    """(prompt, what the model writes after it) of each. `settings` has max_new_tokens, temperature and top_k."""
    model.eval()
    texts = []
    with runtime.autocast():  # round all of them, so that it casts the weights once
        for prompt in prompts:
            ids = tokenizer.encode(prompt)[-model.config.block_size :]
            idx = torch.tensor([ids], device=runtime.device)
            tokens = stream(model, idx, settings.max_new_tokens, settings.temperature, settings.top_k, generator)
            new = []
            hidden = no_bar(runtime.rank == 0)
            for token in tqdm(tokens, total=settings.max_new_tokens, desc="sample", leave=False, disable=hidden):
                poll()
                new.append(token.item())
            texts.append((prompt, tokenizer.decode(new).rstrip("\ufffd")))  # no half character at the end
    return texts


# ---- loss ----


@torch.no_grad()
def evaluate(model, runtime: Runtime, batcher, count: int, name: str, poll=do_nothing) -> float:
    """Mean loss in nats per token over the first `count` of a TokenBatcher's batches, in eval mode, each target counted
    once. The processes share the batches, and add up their losses in order: so any number of them gets the same."""
    model.eval()
    count = min(count, batcher.n_batches)
    losses = []
    rounds = range(0, count, runtime.world_size)
    for first in tqdm(rounds, desc=name, leave=False, disable=no_bar(runtime.rank == 0)):
        poll()
        i = min(first + runtime.rank, count - 1)  # all processes have as many rounds; a batch too many isn't counted
        idx, targets = batcher.batch(i)
        # -1: what the batch before has counted
        repeated = torch.arange(batcher.repeated(i), device=targets.device)
        with runtime.autocast():
            _, loss = model(idx, targets.flatten().index_fill(0, repeated, -1), keep_logits=False)
        losses.append(loss.item())
    total = 0.0
    targets_seen = 0
    everyones = runtime.gather(losses)
    for i in range(count):
        counted = batcher.batch_tokens - batcher.repeated(i)
        total += everyones[i % runtime.world_size][i // runtime.world_size] * counted
        targets_seen += counted
    return total / targets_seen


# ---- what is known by heart ----


@torch.no_grad()
def recall(
    model, runtime: Runtime, tokens: np.ndarray, places: int, seed: int, every: int = 1, poll=do_nothing
) -> float | None:
    """How much of the text the model knows by heart: after 32 tokens from each of so many places, drawn by seed, the
    share of the next 32 tokens that greedy decoding gives, each in its place (after Carlini et al. 2023, section 3).
    None where there is no such place.

    With `every` = seq_len, only places where a window of training begins are drawn. There the model meets the text
    at the positions at which it learned it; elsewhere it doesn't, and may not know it again."""
    length = RECALL_GIVEN + RECALL_ASKED
    starts = range(0, len(tokens) - length + 1, every)
    drawn = random.Random(seed).sample(starts, min(len(starts), places))
    if not drawn:
        return None
    model.eval()
    right = 0
    rows = torch.from_numpy(np.stack([tokens[i : i + length] for i in drawn]).astype(np.int64))
    with runtime.autocast():
        # 64 at a time: their keys and values take 0.3 GB in fp32
        for group in tqdm(rows.split(64), desc="recall", leave=False, disable=no_bar(runtime.rank == 0)):
            told = stream(model, group[:, :RECALL_GIVEN].to(runtime.device), RECALL_ASKED, temperature=0)
            for position, token in enumerate(told, RECALL_GIVEN):
                poll()
                right += (token.cpu()[:, 0] == group[:, position]).sum().item()
    return right / (len(drawn) * RECALL_ASKED)


def longest_verbatim(text: str, source: str, poll: Callable[[], None] = do_nothing) -> int:
    """Characters in the longest piece of `text` that stands in `source` as it is."""
    length = 0
    for start in range(len(text)):
        poll()
        while start + length < len(text) and text[start : start + length + 1] in source:
            length += 1
    return length


# ---- causality ----


@torch.no_grad()
def leaks_future(model, runtime: Runtime, seq_len: int) -> bool:
    """Does a logit change when a later token does, by more than the device's own noise?

    A broken kernel was seen to mask by groups of four positions, each group seeing its own last one (pytorch 195910):
    so the token that is moved ends a group, of 32, or for shorter sequences of the next smaller power of two."""
    model.eval()
    group = min(32, 1 << (seq_len.bit_length() - 1))
    t = seq_len // group * group - 1
    if t < 1:
        return False
    idx = torch.randint(model.config.vocab_size, (1, seq_len), generator=torch.Generator().manual_seed(0))
    moved = idx.clone()
    moved[0, t] = (idx[0, t] + 1) % model.config.vocab_size

    def earlier_logits(rows: torch.Tensor) -> torch.Tensor:
        return model(rows.to(runtime.device))[0][0, :t].float().cpu()

    with runtime.autocast(), steady(model):
        once = earlier_logits(idx)
        noise = (earlier_logits(idx) - once).abs().max()
        change = (earlier_logits(moved) - once).abs().max()
    return bool(change > noise)


@contextlib.contextmanager
def steady(model):
    """Within, experts don't share the tokens out: in groups of another size, the same sums round differently."""
    experts = [module for module in model.modules() if hasattr(module, "in_groups")]
    for one in experts:
        one.in_groups = False
    try:
        yield
    finally:
        for one in experts:
            one.in_groups = True


def check_causality(model, runtime: Runtime, seq_len: int) -> str:
    """Makes sure that no token sees a later one, and says how. Raises RunError if nothing helps.

    A leak would bring a loss under 0.1 that means nothing."""
    if not leaks_future(model, runtime, seq_len):
        return "a moved token changed no earlier logit"
    model.mask_explicitly()
    if not leaks_future(model, runtime, seq_len):
        return "is_causal attention leaks future tokens on this device, so an explicit mask takes its place"
    runtime.amp_dtype = None
    runtime.scaler = None
    if not leaks_future(model, runtime, seq_len):
        return "attention in half precision leaks future tokens on this device, so fp32 takes its place"
    raise RunError(f"attention leaks future tokens on {runtime.device}, even in fp32: use --device cpu")


# ---- a model from a checkpoint ----


# (least, most) of each number in a request
BOUNDS = {
    "num_samples": (1, 100),
    "max_new_tokens": (1, 100_000),
    "temperature": (0.0, 100.0),
    "top_k": (0, 1_000_000),
    "top_p": (0.01, 1.0),
    "seed": (0, 2**63 - 1),
}
# Of the web page, where a request costs others their time. Over 2^53 a browser's whole numbers aren't exact.
PAGE_BOUNDS = BOUNDS | {"num_samples": (1, 4), "max_new_tokens": (1, 1000), "seed": (0, 2**53 - 1)}


@dataclass(frozen=True)
class Request:
    """What to write."""

    prompt: str = ""
    num_samples: int = 1
    max_new_tokens: int = 200
    temperature: float = 0.9
    top_k: int = 50
    top_p: float = 1.0
    seed: int = 1337

    def problems(self, bounds: dict[str, tuple] = BOUNDS) -> dict[str, str]:
        """{field: what is wrong with it, and what would be right}. Its values may be of any type."""
        found = {}
        problem = prompt_problem(self.prompt)
        if problem:
            found["prompt"] = problem
        for name, (least, most) in bounds.items():
            problem = number_problem(getattr(self, name), least, most)
            if problem:
                found[name] = problem
        return found


def prompt_problem(value) -> str:
    """What is wrong with a value that should be a text that UTF-8 can hold."""
    if not isinstance(value, str):
        return f"{reprlib.repr(value)} isn't a text: type a prompt"
    if any("\ud800" <= character <= "\udfff" for character in value):
        return "half a character stands in it (a lone surrogate): type it again"
    return ""


def number_problem(value, least: float, most: float) -> str:
    """What is wrong with a value that should be a number between these two, and whole if they are."""
    whole = isinstance(least, int)
    if value is None or value == "":
        return f"this is empty: enter a number from {least:,} to {most:,}"
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        kind = "whole number" if whole else "number"
        return f"{reprlib.repr(value)} isn't a {kind}: use one from {least:,} to {most:,}"
    if not least <= value <= most:  # true of nan too
        return f"{value:,} is out of bounds: use {least:,} to {most:,}"
    return ""


class Writer:
    """A model from a checkpoint, which continues prompts."""

    def __init__(self, path: str | Path, architectures: dict, device: str = "auto", amp: str = "auto"):
        """Raises RunError for a checkpoint that can't be used, UsageError for its tokenizer, device or precision."""
        self.model, self.tokenizer, checkpoint = load_model(path, architectures)
        self.path = str(path)
        self.step = checkpoint["step"]
        self.loss = checkpoint.get("loss")
        self.context = self.model.config.block_size
        self.parameters = sum(p.numel() for p in self.model.parameters())
        # what an empty prompt stands for
        self.nothing = "\n" if self.tokenizer.knows("\n") else self.tokenizer.vocabulary[0]
        prompt = checkpoint["config"].get("prompt") or "\n"
        self.trained_prompt = prompt if self.tokenizer.knows(prompt) else self.nothing
        self.trained_on = (checkpoint["config"].get("input_file") or "", checkpoint.get("corpus_sha256"))
        self.runtime = start_runtime(device, amp)
        self.model.to(self.runtime.device).eval()
        check_causality(self.model, self.runtime, min(64, self.context))
        dtype = self.runtime.amp_dtype or torch.float32
        prepare_matrices(self.model, dtype, on_cpu=self.runtime.device.type == "cpu")

    def encode(self, prompt: str) -> tuple[list[int], int]:
        """(token ids that fit into the context, how many were cut off before them). Raises UsageError for a character
        that a model of characters doesn't know."""
        ids = self.tokenizer.encode(prompt or self.nothing)
        return ids[-self.context :], max(0, len(ids) - self.context)

    def write(self, request: Request) -> Iterator[list[str]]:
        """Yields, token by token, the text by which each sample grew; a character comes when it is whole."""
        ids, _ = self.encode(request.prompt)
        rows = torch.tensor([ids] * request.num_samples, device=self.runtime.device)
        seeds = range(request.seed, request.seed + request.num_samples)
        generators = [torch.Generator().manual_seed(seed % 2**63) for seed in seeds]
        decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in seeds]
        tokens = stream(
            self.model, rows, request.max_new_tokens, request.temperature, request.top_k, generators, request.top_p
        )
        while True:
            with self.runtime.autocast():  # not round the yield: who reads may compute something else in between
                fresh = next(tokens, None)
            if fresh is None:
                return
            grown = []
            for token, decoder in zip(fresh[:, 0].tolist(), decoders, strict=True):
                grown.append(decoder.decode(self.tokenizer.decode_bytes([token])))
            yield grown
