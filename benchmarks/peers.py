"""What train.py is compared with: the same GPT-2 on the same batches, trained in other ways.

Each peer is a function (args, batcher) -> step, where step() takes the batcher's next micro-batches, trains on them up
to updated weights, and returns a loss as a tensor. Packages are imported only by the peer that needs them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402

Step = Callable[[], torch.Tensor]
LR, BETAS, DECAY, CLIP = 3e-4, (0.9, 0.95), 0.1, 1.0


def settings(args: argparse.Namespace, **changes) -> train.TrainConfig:
    shape = {"batch_size": args.batch_size, "seq_len": args.seq_len, "n_layer": args.n_layer}
    shape["block_size"] = max(1024, args.seq_len)
    source = {"input_file": str(ROOT / "data" / "sample.txt"), "device": args.device, "out_dir": "unused"}
    same = {"optimizer": "adamw", "lr": LR, "weight_decay": DECAY}  # as the peers have it
    return train.TrainConfig(**{"steps": 10**6, **source, **shape, **same, **changes})


def make_batcher(args: argparse.Namespace) -> train.TokenBatcher:
    """Batches of the bundled text, repeated where it is too short."""
    tokens = train.load_corpus(str(ROOT / "data" / "sample.txt"), train.load_tokenizer("gpt2")).tokens
    tokens = np.tile(tokens, 1 + (args.batch_size * args.seq_len + 1) // len(tokens))
    return train.TokenBatcher(tokens, args.batch_size, args.seq_len, device=args.device)


def own(args: argparse.Namespace, batcher: train.TokenBatcher, **changes) -> Step:
    """train.py itself: its Trainer, with accumulation, clipping, optimizer and schedule."""
    config = settings(args, grad_accum=args.grad_accum, **changes)
    tokenizer, runtime = train.load_tokenizer("gpt2"), train.start_runtime(config)
    corpus = train.Corpus("benchmark", "", "", 0, batcher.tokens)
    trainer = train.Trainer(config, corpus, tokenizer, runtime)

    def step() -> torch.Tensor:
        trainer.train_step()
        return trainer.step_loss

    return step


def plain(args: argparse.Namespace, batcher: train.TokenBatcher, autocast: bool, compiled: bool = False) -> Step:
    """The loop of nanoGPT and of most scripts: torch's attention kernel, whole logits (with the vocabulary padded to
    50,304, as nanoGPT has it), AdamW in torch's default implementation on a CPU and fused on a GPU. On a CPU, nanoGPT
    itself runs in fp32; with `autocast` it is what one gets by adding bf16 autocast to it."""
    config = settings(args)
    shape = {name: getattr(config, name) for name in train.MODEL_FLAGS}
    model = train.GPT(train.GPTConfig(vocab_size=50304, **shape)).to(args.device)
    for block in model.transformer.h:
        block.attn.by_products = False
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=args.device == "cuda")
    forward = torch.compile(model) if compiled else model

    def step() -> torch.Tensor:
        for _ in range(args.grad_accum):
            idx, targets = batcher.next_batch()
            with torch.autocast(args.device, torch.bfloat16, enabled=autocast):
                _, loss = forward(idx, targets)
            (loss / args.grad_accum).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def transformers_trainer(args: argparse.Namespace, batcher: train.TokenBatcher) -> Step:
    """transformers' own Trainer with GPT2LMHeadModel in bf16. It owns its loop, so it trains in a thread of its own and
    is let go on by one step at a time."""
    import threading

    import transformers

    transformers.logging.set_verbosity_error()
    batcher.device = torch.device("cpu")  # where its data loader expects them
    turn, done, losses = threading.Semaphore(0), threading.Semaphore(0), []

    class Windows(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                idx, targets = batcher.next_batch()
                rows = torch.cat((idx[:, :1], targets), dim=1)  # the model shifts labels itself
                yield from ({"input_ids": row, "labels": row} for row in rows[:, : args.seq_len].clone())

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            turn.acquire()

        def on_step_end(self, *_, **__):
            done.release()

    class Trainer(transformers.Trainer):
        def training_step(self, *a, **k):
            losses[:] = [super().training_step(*a, **k)]
            return losses[0]

    shape = {"n_layer": args.n_layer, "n_positions": max(1024, args.seq_len)}
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **dropouts))
    options = transformers.TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.grad_accum,
        max_steps=10**6,
        learning_rate=LR,
        weight_decay=DECAY,
        max_grad_norm=CLIP,
        bf16=True,
        use_cpu=args.device == "cpu",
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
        return losses[0]

    return step


def litgpt_fabric(args: argparse.Namespace, batcher: train.TokenBatcher) -> Step:
    """litgpt's GPT in Lightning Fabric's bf16-mixed, compiled, in the steps of litgpt's own pretraining loop. It has no
    learned positions, so this is GPT-2's shape with none at all: a little less work. AdamW is fused on a CPU too, which
    litgpt itself does on CUDA only."""
    import lightning
    import litgpt
    import litgpt.utils

    shape = {"n_layer": args.n_layer, "n_head": 12, "n_embd": 768, "block_size": max(1024, args.seq_len)}
    kind = {"parallel_residual": False, "bias": True, "rotary_percentage": 0.0, "gelu_approximate": "tanh"}
    sizes = {"vocab_size": 50257, "padded_vocab_size": 50304, "intermediate_size": 3072}
    fabric = lightning.Fabric(devices=1, accelerator=args.device, precision="bf16-mixed")
    model = litgpt.GPT(litgpt.Config(name="gpt2", **shape, **kind, **sizes))
    model.lm_head.weight = model.transformer.wte.weight
    for p in model.parameters():
        if p.dim() >= 2:
            torch.nn.init.normal_(p, std=0.02)  # litgpt's own start is meant for an untied head
    model = fabric.setup(torch.compile(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY, fused=True)
    optimizer = fabric.setup_optimizers(optimizer)

    def step() -> torch.Tensor:
        for i in range(args.grad_accum):
            idx, targets = batcher.next_batch()
            with fabric.no_backward_sync(model, enabled=i < args.grad_accum - 1):
                loss = litgpt.utils.chunked_cross_entropy(model(idx), targets)
                fabric.backward(loss / args.grad_accum)
        fabric.clip_gradients(model, optimizer, max_norm=CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


# name -> (peer, options, precision of its matrix products)
PEERS: dict[str, tuple[Callable[..., Step], dict, torch.dtype]] = {
    "train.py": (own, {"amp": "bf16"}, torch.bfloat16),
    "train.py --compile": (own, {"amp": "bf16", "compile": True}, torch.bfloat16),
    "plain loop, bf16 autocast": (plain, {"autocast": True}, torch.bfloat16),
    "plain loop, fp32": (plain, {"autocast": False}, torch.float32),
    "plain loop, bf16 autocast, compiled": (plain, {"autocast": True, "compiled": True}, torch.bfloat16),
    "transformers Trainer, bf16": (transformers_trainer, {}, torch.bfloat16),
    "litgpt + Fabric, bf16-mixed, compiled": (litgpt_fabric, {}, torch.bfloat16),
    "train.py --amp fp16": (own, {"amp": "fp16"}, torch.float16),
    "train.py --amp fp16 --compile": (own, {"amp": "fp16", "compile": True}, torch.float16),
    "train.py --grad_checkpoint": (own, {"amp": "bf16", "grad_checkpoint": True}, torch.bfloat16),
    "train.py --amp off": (own, {"amp": "off"}, torch.float32),
}
USUAL = {  # without --only
    "cpu": [name for name in PEERS if not any(word in name for word in ("fp16", "off", "grad_"))],
    "cuda": [name for name in PEERS if not any(word in name for word in ("off", "fp32", "grad_"))],
}
