"""Which recipe of Muon brings the loss under the target in the fewest tokens? Tried on a GPU, on the whole text.

    python experiments/muon_sweep.py "" "--embed_lr 2.5e-3" "--batch_size 16 --seq_len 128 --anneal cos"
    python experiments/muon_sweep.py --seconds 200 --json out.jsonl --file recipes.txt

Each argument, or line of the file, is one recipe: what differs from `--preset shakespeare`. A step is recorded once as
a CUDA graph and then replayed, so that Python has nothing to do: a run of 1,300 steps takes 17 seconds on an H100, with
several of them side by side (--runs). It does what train.py does in bf16 without clipping and without decay, and a
recipe may have what train.py has no flag for. `--behind 4:2.9` in a recipe ends its run early if avg_loss is over 2.9
after pass 4. Prints a line of JSON for each run: avg_loss after each pass, and the tokens at which it was under 0.1.

Without a GPU it runs too, step by step, for small models: --n_layer 4 --n_head 4 --n_embd 256 --tokens 20480.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from support import cli, kernels, machine, text  # noqa: E402
from support.tokenizer import load_tokenizer  # noqa: E402

TARGET = 0.1
FLAT = 0.3  # of the steps are at the peak, with --anneal flat
CHOICES = {
    "anneal": ("linear", "cos", "flat"),
    "attention": ("qkv", "whole", "heads"),
    "way": ("polar", "mud1", "mud2"),
}


@dataclass
class Recipe:
    """The first settings are those of train.py, with the values of `--preset shakespeare`."""

    batch_size: int = 8
    seq_len: int = 256
    steps: int = 1300
    lr: float = 3e-3
    embed_lr: float = 8e-4  # 0: lr
    beta1: float = 0.7
    beta2: float = 0.999
    warmup_steps: int = 60
    anneal: str = "linear"  # flat: at the peak first, then a line
    seed: int = 1337
    shift_windows: bool = False
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    position_rate: float = 1.0  # of the position embedding, times embed_lr
    vector_rate: float = 1.0  # of biases and LayerNorms, times lr
    adamw_beta1: float = -1.0  # of AdamW alone; -1: beta1
    eps: float = 1e-8  # of AdamW
    attention: str = "qkv"  # what is orthogonalized by itself: query, key and value, c_attn as a whole, or heads
    mlp_block: int = 0  # neurons whose weights are orthogonalized together; 0: all
    way: str = "polar"  # mud1, mud2: so many passes of `decorrelated`
    tokens: int = 0  # of the text's beginning; 0: all
    behind: str = ""  # PASS:LOSS: ends the run if avg_loss is higher after that pass


def read_recipe(words: str) -> Recipe:
    """Ends the program, with what is wrong, for words that aren't a recipe."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for field in dataclasses.fields(Recipe):
        if field.default is False:
            parser.add_argument(f"--{field.name}", action="store_true")
        else:
            options = {"type": type(field.default), "default": field.default, "choices": CHOICES.get(field.name)}
            parser.add_argument(f"--{field.name}", **options)
    recipe = Recipe(**vars(parser.parse_args(shlex.split(words))))
    if recipe.mlp_block and 4 * recipe.n_embd % recipe.mlp_block:
        parser.error(f"--mlp_block {recipe.mlp_block} doesn't divide the {4 * recipe.n_embd} neurons of a block")
    if recipe.behind and not re.fullmatch(r"\d+:[\d.]+", recipe.behind):
        parser.error(f"--behind {recipe.behind} isn't PASS:LOSS, as 4:2.9")
    return recipe


def rates(recipe: Recipe) -> torch.Tensor:
    """The learning rate of each step, as a share of its peak: (steps,)."""
    if recipe.anneal == "flat":
        steps = torch.arange(recipe.steps)
        up = 1 / 25 + (1 - 1 / 25) * steps / max(1, recipe.warmup_steps - 1)
        down = (1 - steps / recipe.steps) / (1 - FLAT)
        return torch.minimum(up, down).clamp(max=1.0)
    config = train.TrainConfig(lr=1.0, steps=recipe.steps, warmup_steps=recipe.warmup_steps, anneal=recipe.anneal)
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1, requires_grad=True)], "rate": "lr"}], lr=1.0)
    scheduler = train.build_scheduler(optimizer, config)
    shares = []
    for _ in range(recipe.steps):
        shares.append(scheduler.get_last_lr()[0])
        optimizer.step()
        if len(shares) < recipe.steps:
            scheduler.step()
    return torch.tensor(shares)


def batch_starts(recipe: Recipe, length: int) -> tuple[torch.Tensor, int]:
    """(where in the text each step's batch begins, (steps,); batches in a pass)."""
    places = np.arange(length)  # a batch of these says where it is
    batcher = train.TokenBatcher(
        places, recipe.batch_size, recipe.seq_len, shift=recipe.shift_windows, seed=recipe.seed
    )
    starts = [int(batcher.next_batch()[0][0, 0]) for _ in range(recipe.steps)]
    return torch.tensor(starts), batcher.n_batches


def decorrelated(x: torch.Tensor, passes: int) -> torch.Tensor:
    """Rows made nearly orthogonal one after another, with an eighth of Newton-Schulz's work (Southworth & Thomas 2026,
    "Beyond Muon: MUD")."""
    tall = x.size(1) > x.size(2)
    x = x.mT if tall else x
    for _ in range(passes):
        x = torch.nn.functional.normalize(x, dim=2)
        x = torch.linalg.solve_triangular((x @ x.mT).tril(), x, upper=False)
        x = torch.nn.functional.normalize(x, dim=2)
    return (x.mT if tall else x).contiguous()


class Run:
    """A recipe in training."""

    def __init__(self, words: str, tokens: np.ndarray, device: torch.device):
        self.words = words
        self.recipe = recipe = read_recipe(words)
        self.device = device
        tokens = tokens[: recipe.tokens or len(tokens)].astype(np.int64)
        starts, self.a_pass = batch_starts(recipe, len(tokens))
        self.tokens = torch.from_numpy(tokens).to(device)
        self.starts = starts.to(device)
        self.rates = rates(recipe).to(device)
        self.losses = torch.zeros(recipe.steps, device=device)
        self.step_now = torch.zeros(1, dtype=torch.long, device=device)  # on the device: the graph counts by itself
        self.done = 0
        self.passes: list[float] = []
        self.under: int | None = None  # the step at which avg_loss was under the target
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None
        self.half = machine.native_bf16(device)
        self.build()

    def build(self) -> None:
        """Model and optimizers. Matrices of one shape are kept as stacks, by their name in a block."""
        recipe = self.recipe
        config = train.GPTConfig(n_layer=recipe.n_layer, n_head=recipe.n_head, n_embd=recipe.n_embd)
        self.model = train.GPT(config, torch.Generator().manual_seed(recipe.seed)).to(self.device)
        self.matrices = defaultdict(list)
        for block in self.model.transformer.h:
            for name, p in block.named_parameters():
                if p.dim() == 2:
                    self.matrices[name].append(p)
        self.momentum = {name: torch.zeros_like(torch.stack(stack)) for name, stack in self.matrices.items()}
        groups = self.model.parameter_groups()
        tokens, positions = groups["embeddings"]
        embed_lr = recipe.embed_lr or recipe.lr
        self.peaks = [embed_lr, embed_lr * recipe.position_rate, recipe.lr * recipe.vector_rate]
        parameters = [[tokens], [positions], groups["vectors"]]
        self.adamw = torch.optim.AdamW(
            [{"params": group, "lr": torch.zeros((), device=self.device)} for group in parameters],
            betas=(recipe.beta1 if recipe.adamw_beta1 < 0 else recipe.adamw_beta1, recipe.beta2),
            eps=recipe.eps,
            weight_decay=0.0,
            fused=True,
            capturable=self.stream is not None,
        )

    # ---- a step ----

    def step(self) -> None:
        recipe = self.recipe
        start = self.starts[self.step_now]
        row = self.tokens[start + torch.arange(recipe.batch_size * recipe.seq_len + 1, device=self.device)]
        idx = row[:-1].view(recipe.batch_size, recipe.seq_len)
        targets = row[1:].view(recipe.batch_size, recipe.seq_len)
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False, enabled=self.half):
            _, loss = self.model(idx, targets, keep_logits=False)
        for p in self.model.parameters():
            p.grad = None
        loss.backward()
        self.losses[self.step_now] = loss.detach()
        self.update(self.rates[self.step_now])
        self.step_now += 1

    @torch.no_grad()
    def update(self, rate: torch.Tensor) -> None:
        recipe = self.recipe
        for name, stack in self.matrices.items():
            gradients = torch.stack([p.grad for p in stack])
            average = self.momentum[name].lerp_(gradients, 1 - recipe.beta1)
            ahead = gradients.lerp(average, recipe.beta1)
            moves = self.orthogonalized(name, ahead) * (-recipe.lr * rate)
            torch._foreach_add_(stack, list(moves.unbind()))
        for group, peak in zip(self.adamw.param_groups, self.peaks, strict=True):
            group["lr"].copy_(peak * rate[0])
        self.adamw.step()

    def orthogonalized(self, name: str, stack: torch.Tensor) -> torch.Tensor:
        """The update at a rate of 1: of each block that the recipe takes by itself."""
        blocks = self.cut(name, stack)
        if self.recipe.way.startswith("mud"):
            done = decorrelated(blocks.flatten(0, 1), int(self.recipe.way[3:]))
        else:
            done = kernels.orthogonalized(blocks.flatten(0, 1), torch.bfloat16 if self.half else torch.float32)
        scale = 0.2 * math.sqrt(max(blocks.shape[-2:]))
        together = done.float().view(blocks.shape) * scale
        if name.endswith("c_proj.weight"):  # its blocks stood side by side
            return together.transpose(1, 2).reshape(stack.shape)
        return together.reshape(stack.shape)

    def cut(self, name: str, stack: torch.Tensor) -> torch.Tensor:
        """A stack of matrices (N, rows, columns) as blocks (N, blocks, rows, columns): of what goes into heads or
        neurons, one above another, and of what comes out of them, side by side."""
        count = self.blocks_of(name)
        N, rows, columns = stack.shape
        if name.endswith("c_proj.weight"):
            return stack.view(N, rows, count, columns // count).transpose(1, 2)
        return stack.view(N, count, rows // count, columns)

    def blocks_of(self, name: str) -> int:
        recipe = self.recipe
        if name.startswith("mlp"):
            return 4 * recipe.n_embd // recipe.mlp_block if recipe.mlp_block else 1
        heads = recipe.n_head if recipe.attention == "heads" else 1
        if name == "attn.c_proj.weight" or recipe.attention == "whole":
            return heads
        return 3 * heads

    # ---- all steps ----

    def advance(self) -> bool:
        """One step. Is the run over?"""
        if self.stream is None:
            self.step()
        else:
            with torch.cuda.stream(self.stream):
                self.replay()
        self.done += 1
        if self.done % self.a_pass and self.done < self.recipe.steps:
            return False
        return self.note_pass()

    def replay(self) -> None:
        if self.done < 2:  # AdamW makes its averages in a first step
            self.step()
            return
        if self.graph is None:
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.step()
        self.graph.replay()

    def note_pass(self) -> bool:
        """avg_loss, now that a pass or the run ends. Is the run over?"""
        if self.stream is not None:
            self.stream.synchronize()
        losses = self.losses[: self.done].cpu()
        avg_loss = losses[-self.a_pass :].mean().item()
        self.passes.append(round(avg_loss, 4) if math.isfinite(avg_loss) else None)  # JSON has no NaN
        if self.done >= self.a_pass:
            means = losses.unfold(0, self.a_pass, 1).mean(dim=1)  # avg_loss at each step from the first full pass on
            reached = (means < TARGET).nonzero()
            if len(reached):
                self.under = int(reached[0]) + self.a_pass
        return bool(self.under) or self.done >= self.recipe.steps or self.passes[-1] is None or self.is_behind()

    def is_behind(self) -> bool:
        if not self.recipe.behind:
            return False
        at, most = self.recipe.behind.split(":")
        return len(self.passes) == int(at) and self.passes[-1] > float(most)

    def row(self) -> dict:
        tokens = None
        if self.under:
            tokens = self.under * self.recipe.batch_size * self.recipe.seq_len
        return {"recipe": self.words, "steps": self.done, "avg_loss": self.passes, "tokens_under_target": tokens}


def read_tokens(input_file: str) -> np.ndarray:
    return text.load_corpus(input_file, load_tokenizer()).tokens


def sweep(recipes: Sequence[str], args: argparse.Namespace) -> None:
    """Prints a line for each run as it ends. When the time is over, for those that aren't over too."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens = read_tokens(args.input_file)
    waiting = list(recipes)
    running = []
    end = time.monotonic() + args.seconds
    while (waiting or running) and time.monotonic() < end:
        while waiting and len(running) < args.runs:
            running.append(Run(waiting.pop(0), tokens, device))
        for run in list(running):
            if run.advance():
                tell(run, args.json)
                running.remove(run)
    for run in running:
        tell(run, args.json)


def tell(run: Run, path: str) -> None:
    line = json.dumps(run.row())
    print(line, flush=True)
    if path:
        with open(path, "a", encoding="utf-8") as f:
            f.write(line + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    flags = cli.program_parser(
        "muon_sweep.py", 'python experiments/muon_sweep.py [--FLAG VALUE ...] "RECIPE" ...', __doc__
    )
    flags.add_argument("recipes", nargs="*", help="what differs from --preset shakespeare, as one argument")
    flags.add_argument("--file", help="a file with a recipe in each line")
    default = str(ROOT / "data" / "input.txt")
    flags.add_argument("--input_file", default=default, help="(default: data/input.txt)")
    flags.add_argument("--runs", type=int, default=3, help="side by side (default: 3)")
    flags.add_argument("--seconds", type=float, default=math.inf, help="after which all end (default: never)")
    flags.add_argument("--json", default="", help="a file to which the lines are added")
    args = flags.parse_args(argv)
    recipes = list(args.recipes)
    if args.file:
        recipes += Path(args.file).read_text(encoding="utf-8").splitlines()
    for words in recipes:
        read_recipe(words)  # a mistake is told before the first run
    sweep(recipes, args)


if __name__ == "__main__":
    main()
