"""What train.py is compared with: the same GPT-2 on the same batches, trained in other ways.

Each peer is a function (setup, batcher) -> step, where step() takes the batcher's next micro-batches, trains on them up
to updated weights, and returns a loss as a tensor. Packages are imported only by the peer that needs them.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from common import SAMPLE

import train
from support import machine, text
from support.presets import PRESETS
from support.tokenizer import load_tokenizer

Step = Callable[[], torch.Tensor]
LR = 3e-4
BETAS = (0.9, 0.95)
DECAY = 0.1
CLIP = 1.0


@dataclass(frozen=True)
class Setup:
    """What is trained, and for how long. The width is always GPT-2's 768."""

    device: str = "cpu"
    batch_size: int = 8
    seq_len: int = 256
    grad_accum: int = 1
    n_layer: int = 12
    steps: int = 6  # timed ones
    warmup: int = 3  # steps before them

    def tokens(self) -> int:
        """Of a step."""
        return self.batch_size * self.seq_len * self.grad_accum

    def block_size(self) -> int:
        return max(1024, self.seq_len)


def make_batcher(setup: Setup) -> train.TokenBatcher:
    """Batches of the bundled text, repeated where it is too short."""
    tokens = text.load_corpus(str(SAMPLE), load_tokenizer()).tokens
    times = math.ceil((setup.batch_size * setup.seq_len + 1) / len(tokens))
    return train.TokenBatcher(np.tile(tokens, times), setup.batch_size, setup.seq_len, device=setup.device)


def own(setup: Setup, batcher: train.TokenBatcher, preset: str = "", **changes) -> Step:
    """train.py itself: its Trainer, with accumulation, clipping, optimizer and schedule. Without a preset it has the
    peers' optimizer."""
    settings = {"optimizer": "adamw", "lr": LR, "weight_decay": DECAY, "steps": 10**6}
    if preset:
        settings = PRESETS[preset]
    for name in ("device", "batch_size", "seq_len", "grad_accum", "n_layer"):
        changes[name] = getattr(setup, name)
    config = train.TrainConfig(**{**settings, **changes, "block_size": setup.block_size()})
    runtime = machine.start_runtime(config.device, config.amp)
    corpus = text.Corpus("benchmark", "", "", 0, batcher.tokens)
    trainer = train.Trainer(config, corpus, load_tokenizer(), runtime)

    def step() -> torch.Tensor:
        trainer.train_step()
        return trainer.progress.loss

    return step


def torch_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


def plain(setup: Setup, batcher: train.TokenBatcher, autocast: bool, compiled: bool = False) -> Step:
    """The loop of nanoGPT and of most scripts: torch's attention kernel, whole logits (with the vocabulary padded to
    50,304, as nanoGPT has it), AdamW in torch's default implementation on a CPU and fused on a GPU. On a CPU, nanoGPT
    itself runs in fp32; with `autocast` it is what one gets by adding bf16 autocast to it."""
    train.attention_by_products = torch_attention  # what train.py's model calls on a CPU
    shape = train.GPTConfig(block_size=setup.block_size(), vocab_size=50304, n_layer=setup.n_layer)
    model = train.GPT(shape).to(setup.device)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=setup.device == "cuda")
    forward = torch.compile(model) if compiled else model

    def step() -> torch.Tensor:
        for _ in range(setup.grad_accum):
            idx, targets = batcher.next_batch()
            with torch.autocast(setup.device, torch.bfloat16, enabled=autocast):
                _, loss = forward(idx, targets)
            (loss / setup.grad_accum).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def transformers_trainer(setup: Setup, batcher: train.TokenBatcher) -> Step:
    """transformers' own Trainer with GPT2LMHeadModel in bf16. It owns its loop, so it trains in a thread of its own and
    is let go on by one step at a time."""
    import transformers

    transformers.logging.set_verbosity_error()
    batcher.device = torch.device("cpu")  # where its data loader expects them
    turn = threading.Semaphore(0)
    done = threading.Semaphore(0)
    losses = []

    class Windows(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                idx, _ = batcher.next_batch()
                for row in idx.clone():
                    yield {"input_ids": row, "labels": row}  # the model shifts labels itself

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            turn.acquire()

        def on_step_end(self, *_, **__):
            done.release()

    class Trainer(transformers.Trainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            losses.append(loss)
            return loss

    shape = {"n_layer": setup.n_layer, "n_positions": setup.block_size()}
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **dropouts))
    options = transformers.TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=setup.batch_size,
        gradient_accumulation_steps=setup.grad_accum,
        max_steps=10**6,
        learning_rate=LR,
        weight_decay=DECAY,
        max_grad_norm=CLIP,
        bf16=True,
        use_cpu=setup.device == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model, options, train_dataset=Windows(), callbacks=[Turns()])
    threading.Thread(target=trainer.train, daemon=True).start()

    def step() -> torch.Tensor:
        turn.release()
        done.acquire()
        return losses[-1]

    return step


def litgpt_fabric(setup: Setup, batcher: train.TokenBatcher) -> Step:
    """litgpt's GPT in Lightning Fabric's bf16-mixed, compiled, in the steps of litgpt's own pretraining loop. It has no
    learned positions, so this is GPT-2's shape with none at all: a little less work. AdamW is fused on a CPU too, which
    litgpt itself does on CUDA only."""
    import lightning
    import litgpt
    import litgpt.utils

    shape = {"n_layer": setup.n_layer, "n_head": 12, "n_embd": 768, "block_size": setup.block_size()}
    kind = {"parallel_residual": False, "bias": True, "rotary_percentage": 0.0, "gelu_approximate": "tanh"}
    sizes = {"vocab_size": 50257, "padded_vocab_size": 50304, "intermediate_size": 3072}
    fabric = lightning.Fabric(devices=1, accelerator=setup.device, precision="bf16-mixed")
    model = litgpt.GPT(litgpt.Config(name="gpt2", **shape, **kind, **sizes))
    model.lm_head.weight = model.transformer.wte.weight
    for p in model.parameters():
        if p.dim() >= 2:
            torch.nn.init.normal_(p, std=0.02)  # litgpt's own start is meant for an untied head
    model = fabric.setup(torch.compile(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY, fused=True)
    optimizer = fabric.setup_optimizers(optimizer)

    def step() -> torch.Tensor:
        for i in range(setup.grad_accum):
            idx, targets = batcher.next_batch()
            with fabric.no_backward_sync(model, enabled=i < setup.grad_accum - 1):
                loss = litgpt.utils.chunked_cross_entropy(model(idx), targets)
                fabric.backward(loss / setup.grad_accum)
        fabric.clip_gradients(model, optimizer, max_norm=CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


@dataclass(frozen=True)
class Peer:
    """A row of the table."""

    make: Callable[..., Step]
    options: dict
    dtype: torch.dtype | None = torch.bfloat16  # of its matrix products; None: whatever --amp auto picks

    def setup(self, setup: Setup) -> Setup:
        """A preset brings its own batch."""
        preset = self.options.get("preset")
        if not preset:
            return setup
        config = train.TrainConfig(**PRESETS[preset])
        batch = {name: getattr(config, name) for name in ("batch_size", "seq_len", "grad_accum")}
        return dataclasses.replace(setup, **batch)


PEERS = {
    "train.py": Peer(own, {"amp": "bf16"}),
    "train.py --compile": Peer(own, {"amp": "bf16", "compile": True}),
    "train.py --preset shakespeare": Peer(own, {"preset": "shakespeare"}, None),
    "train.py --preset adamw": Peer(own, {"preset": "adamw"}, None),
    "train.py --preset demo": Peer(own, {"preset": "demo"}, None),
    "plain loop, bf16 autocast": Peer(plain, {"autocast": True}),
    "plain loop, fp32": Peer(plain, {"autocast": False}, torch.float32),
    "plain loop, bf16 autocast, compiled": Peer(plain, {"autocast": True, "compiled": True}),
    "transformers Trainer, bf16": Peer(transformers_trainer, {}),
    "litgpt + Fabric, bf16-mixed, compiled": Peer(litgpt_fabric, {}),
    "train.py --amp fp16": Peer(own, {"amp": "fp16"}, torch.float16),
    "train.py --amp fp16 --compile": Peer(own, {"amp": "fp16", "compile": True}, torch.float16),
    "train.py --grad_checkpoint": Peer(own, {"amp": "bf16", "grad_checkpoint": True}),
    "train.py --amp off": Peer(own, {"amp": "off"}, torch.float32),
}
# Left out without --only.
UNUSUAL = {
    "cpu": ("train.py --amp fp16", "train.py --amp fp16 --compile", "train.py --grad_checkpoint", "train.py --amp off"),
    "cuda": ("plain loop, fp32", "train.py --grad_checkpoint", "train.py --amp off"),
}
