"""What a run says of itself: the log's lines, what was learned, and run.json. `trainer` is train.py's Trainer."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta

import torch

from support.cli import duration
from support.inference import RECALL_ASKED, RECALL_GIVEN, longest_verbatim, recall
from support.machine import Limit, saved_bytes
from support.presets import MACHINE, PRESETS, RECORDS
from support.rundir import ENDINGS, RunDirectory, git_commit, now, versions
from support.text import TEXT_KEPT


def opening(trainer, limit: Limit, causality: str) -> Iterator[str]:
    """The log's first lines: all that decides the run."""
    config = trainer.config
    runtime = trainer.runtime
    counts = parameter_counts(trainer.model)
    total = sum(counts.values())
    yield f"Device: {runtime.describe_device()}, because {why_device(config.device, runtime.device.type)}"
    yield f"Precision: {runtime.describe_precision()}, because {runtime.reason}"
    yield f"Optimizer: {describe_optimizer(trainer.optimizer)}"
    yield f"Args: {json.dumps(dataclasses.asdict(config), ensure_ascii=False)}"
    yield f"Parameters: {total:,} ({4 * total / 1e6:,.4g} MB in fp32)"
    active = trainer.model.flops_per_token() // 6
    if active != total:
        yield f"Active parameters: {active:,}, those that work on a token"
    yield "Parameters by component: " + ", ".join(f"{name} {count:,}" for name, count in counts.items())
    if trainer.origin:
        yield f"Weights: from {trainer.origin}"
    yield from trainer.corpus.describe(trainer.batcher, trainer.held_out)
    yield (
        f"Tokens per step: {trainer.tokens_per_step:,} (batch_size {config.batch_size} x seq_len {config.seq_len}"
        f" x grad_accum {config.grad_accum} x processes {runtime.world_size})"
    )
    known = f"{limit.value / 1e9:,.0f} GFLOP/s" if limit.value else "unknown"
    yield f"Limit for mfu: {known}, {limit.what}"
    yield f"Causality: {causality}"
    saves = f"Saves: every {config.save_every} steps"
    if config.save_minutes:
        saves += f", and {config.save_minutes:g} minutes after the last one"
    last_pt_bytes = saved_bytes(trainer.model, config.optimizer)
    yield f"{saves}; last.pt has {last_pt_bytes / 1e9:.3g} GB, and its copy takes as much memory while it is written"
    if trainer.progress.step:
        tokens = trainer.batcher.tokens_taken()
        yield f"Resumed: step {trainer.progress.step}, {tokens:,} tokens, avg_loss {trainer.avg_loss():.6f}"


# A parameter's name has one of these, and belongs to the first that it has.
PARTS = {
    "wte": "token embedding and head",
    "wpe": "position embedding",
    "embed_tokens": "token embedding",
    "lm_head": "head",
    "attn": "attention",
    "self_attn": "attention",
    "gate": "routers",
    "experts": "experts",
    "shared_experts": "shared experts",
    "mlp": "MLP",
    "ln_1": "LayerNorm",
    "ln_2": "LayerNorm",
    "ln_f": "LayerNorm",
}


def parameter_counts(model) -> dict[str, int]:
    """Parameters by component, by their names. GPT-2's head is its token embedding, so it isn't counted again."""
    counts = collections.Counter()
    for name, p in model.named_parameters():
        inside = [part for part in PARTS if part in name.split(".")]
        component = PARTS[inside[0]] if inside else "norms"
        counts[component] += p.numel()
    return dict(counts)


def why_device(asked: str, device: str) -> str:
    if asked != "auto":
        return f"--device {asked} asks for it"
    reasons = {"cuda": "it is there", "mps": "there is no CUDA", "cpu": "there is neither CUDA nor MPS"}
    return reasons[device]


def describe_optimizer(optimizer: torch.optim.Optimizer) -> str:
    adamw = "AdamW, in one fused kernel"
    if hasattr(optimizer, "muon"):
        return f"Muon in {optimizer.muon.dtype} for the blocks' matrices, otherwise {adamw}"
    return adamw


def closing(trainer, run_dir: RunDirectory, ended: str, seconds: float, final_loss: float | None) -> Iterator[str]:
    """The log's last lines: how it ended, and what to type next."""
    progress = trainer.progress
    config = trainer.config
    last = shlex.quote(str(run_dir.last))
    best = run_dir.best if run_dir.best.exists() else run_dir.last
    final = "not computed" if final_loss is None else f"{final_loss:.6f}"
    yield f"Ended: {ended} at step {progress.step} of {config.steps}"
    yield f"Trained: {trainer.batcher.tokens_taken():,} tokens in {seconds:.1f} s"
    yield f"Loss: avg_loss {trainer.avg_loss():.6f}, final_loss {final}, target_loss {config.target_loss}"
    if trainer.held_out:
        best_val = f"best {progress.best_val_loss:.6f}"
        yield f"Held out: val_loss {progress.val_loss:.6f} at step {progress.val_step}, {best_val}"
    checkpoints = f"Checkpoints: {run_dir.last}"
    if run_dir.best.exists():
        checkpoints += f", {run_dir.best}"
    yield checkpoints
    if ended == "steps done":
        yield f"To train on: python train.py --resume {last} --steps {2 * config.steps}"
    elif ended == "patience over":
        yield f"To train on: python train.py --resume {last} --patience {progress.stale + config.patience}"
    elif ended != "target reached":
        yield f"To train on: python train.py --resume {last}"
    yield f"To sample: python sample.py --checkpoint {shlex.quote(str(best))}"
    yield f"To update the README: python update_readme.py --run_dir {shlex.quote(str(run_dir.root))}"


def step_line(row: dict, steps: int, rate: float, mfu: str, skipped: int | None, figures: Sequence[str] = ()) -> str:
    """A log line of a step. `skipped`: updates that a loss scaler left out, None where there is no scaler. `figures`:
    names of what the model counts."""
    line = (
        f"step {row['step']}/{steps} | loss {row['loss']:.6f} | lr {row['lr']:.2e} | tok/s {rate:.1f}"
        f" | avg_loss {row['avg_loss']:.6f} | grad_norm {row['grad_norm']:.3f} | epoch {row['epoch']:.3f} | mfu {mfu}"
    )
    for name in figures:
        line += f" | {name} {row[name]:.4f}"
    if row["val_loss"] != "":
        line += f" | val_loss {row['val_loss']:.6f}"
    if skipped is not None:
        line += f" | skipped {skipped}"
    return line


ESTIMATE_AFTER = 100  # steps


def estimate(trainer, rate: float) -> str:
    """How long it takes to the target at `rate` tokens a second: as many tokens as the recorded run of the same
    settings needed or, where there is none, until the steps are done."""
    done = trainer.batcher.tokens_taken()
    needed = trainer.config.steps * trainer.tokens_per_step
    why = "when all steps are done, or before"
    known = known_tokens(trainer.config, trainer.corpus.sha256)
    if known > done and trainer.runtime.world_size == 1:  # as in the recorded run
        needed = known
        why = f"if it takes the {known:,} tokens of the published run"
    seconds = min((needed - done) / rate, 10**9)
    until = (datetime.now() + timedelta(seconds=seconds)).strftime("%Y-%m-%d %H:%M")
    return f"Time to target at {rate:.0f} tok/s: {duration(seconds)}, at {until}, {why}"


# On these settings it depends how many tokens a run needs.
DECISIVE = (
    *("arch", "block_size", "n_layer", "n_head", "n_embd", "dropout", "tokenizer", "val_fraction", "target_loss"),
    *("batch_size", "seq_len", "grad_accum", "randomize_batches", "shift_windows", "steps", "warmup_steps"),
    *("optimizer", "lr", "embed_lr", "anneal", "weight_decay", "beta1", "beta2", "clip_grad"),
)


def known_tokens(config, sha256: str) -> int:
    """Tokens that the recorded run of this preset needed to its target; 0 if the settings or the text are others."""
    record = RECORDS.get(config.preset)
    if record is None or record["sha256"] != sha256:
        return 0
    recipe = dataclasses.replace(type(config)(), **PRESETS[config.preset]).completed(1, 1)  # it gives its own steps
    for name in DECISIVE:
        if getattr(config, name) != getattr(recipe, name):
            return 0
    return record["tokens"]


def recall_of(trainer, poll: Callable[[], None], every: int = 1) -> float | None:
    """What the model knows by heart of the text that it was trained on (inference.recall). None where windows were so
    short that positions weren't trained."""
    config = trainer.config
    if config.seq_len < RECALL_GIVEN + RECALL_ASKED:
        return None
    tokens = trainer.batcher.tokens
    return recall(trainer.model, trainer.runtime, tokens, config.recall_places, config.seed, every, poll)


def learned(trainer, texts: Sequence[tuple[str, str]], poll: Callable[[], None]) -> tuple[dict, list[str]]:
    """(for run.json, for the log): recall, and how much of each sample is the text's own words."""
    anywhere = recall_of(trainer, poll)
    at_windows = recall_of(trainer, poll, every=trainer.config.seq_len)
    results = {"recall": anywhere, "recall_at_windows": at_windows}
    lines = []
    if anywhere is not None:
        lines.append(f"recall {anywhere:.4f} (of the next {RECALL_ASKED} tokens, after {RECALL_GIVEN} from the text)")
        lines.append(f"recall_at_windows {at_windows:.4f} (the same, where windows of training begin)")
    if texts and trainer.corpus.characters <= TEXT_KEPT:
        samples = []
        for prompt, text in texts:
            verbatim = longest_verbatim(text, trainer.corpus.text, poll)
            samples.append({"prompt": prompt, "characters": len(text), "verbatim": verbatim})
        results["samples"] = samples
        runs = ", ".join(f"{one['verbatim']} of {one['characters']}" for one in samples)
        lines.append(f"Longest verbatim run of each sample, in characters: {runs}")
    return results, lines


class Clock:
    """Time and speed of a run."""

    def __init__(self, seconds_before: float, tokens: int):
        """`seconds_before`: of earlier starts; `tokens` taken by them."""
        self.start = time.monotonic() - seconds_before
        self.tokens = tokens
        self.marks = {name: time.monotonic() for name in ("log", "save", "steps")}

    def seconds(self) -> float:
        """Of this run so far, earlier starts included."""
        return time.monotonic() - self.start

    def mark(self, name: str) -> None:
        self.marks[name] = time.monotonic()

    def since(self, name: str) -> float:
        """Seconds since the mark."""
        return time.monotonic() - self.marks[name]

    def rate(self, tokens: int) -> float:
        """Tokens a second over the wall clock since it was last asked, saves and samples included."""
        rate = (tokens - self.tokens) / max(self.since("log"), 1e-9)
        self.mark("log")
        self.tokens = tokens
        return rate


class RunRecord:
    """run.json. A resumed run keeps its first command and start, and lists the commands that followed."""

    def __init__(self, trainer, run_dir: RunDirectory, command: str):
        self.trainer = trainer
        self.run_dir = run_dir
        self.command = command
        self.start = now()
        self.resumed = trainer.progress.step > 0
        self.results: dict = {}  # final_loss, recall and the like, as they become known

    def content(self, ended: str | None, seconds: float, signum: int = 0) -> dict:
        """What this run is and, once it is over, how it ended (None: it isn't)."""
        first_under = self.trainer.progress.first_under
        results = dict.fromkeys(("final_loss", "recall", "recall_at_windows", "samples")) | self.results
        reached = ended == "target reached"
        record = {"command": self.command, **describe_run(self.trainer), **results}
        record["start"] = self.start
        record["end"] = now() if ended else None
        record["ended"] = ended
        record["seconds"] = round(seconds, 3)
        record["tokens_to_target"] = record["tokens"] if reached else None
        record["seconds_to_target"] = results.get("seconds_to_target") if reached else None
        record["first_step_loss_under_target"] = first_under.get("loss")
        record["first_mean_of_100_under_target"] = first_under.get("mean_of_100")
        record["exit_code"] = exit_code(ended, signum)
        return as_json(record)

    def write(self, ended: str | None, seconds: float, signum: int = 0) -> dict:
        """Writes it, if something was done, and returns what it says. Raises OSError."""
        record = self.content(ended, seconds, signum)
        if ended == "nothing to do":
            return record
        first = self.run_dir.read_record()
        if self.resumed and first:
            record |= {key: first[key] for key in ("command", "start") if key in first}
            record["resumed"] = list(first.get("resumed", []))
            if ended is None:
                record["resumed"].append(self.command)
        if self.trainer.runtime.rank == 0:
            self.run_dir.write_record(record)
        return record


def exit_code(ended: str | None, signum: int) -> int | None:
    if ended is None:
        return None
    if ended == "interrupted":
        return 128 + signum
    return int(ended.startswith("failed"))


def newcomers_commands() -> str:
    """The three commands that a newcomer may want, with how long each took."""
    lines = []
    for preset, one in RECORDS.items():
        command = f"python train.py --preset {preset}"
        lines.append(f"  {command:39} {duration(one['seconds']):11} {one['what']}")
    return "\n".join(lines)


NO_LENGTH = (
    "the run has no length: give --steps N or --epochs N, or begin with one of these (times are of"
    f" {MACHINE}):\n{newcomers_commands()}"
)


def late_warmup(config) -> str:
    steps = config.steps
    return f"warmup_steps {config.warmup_steps} is over steps {steps}: use --warmup_steps {steps // 10}"


# What brings more to do.
REMEDIES = {"steps done": "more --steps", "patience over": "more --patience", "target reached": "a lower --target_loss"}


def how_it_ended(trainer, before: dict) -> str:
    """How the run that is resumed has ended, by the run.json from before; "" if there is something to do."""
    config = trainer.config
    step = trainer.progress.step
    ended = before.get("ended")
    if step == 0 or before.get("steps") != step or ended not in ENDINGS:
        return ""
    still_open = {
        "steps done": step < config.steps,
        "patience over": not 0 < config.patience <= trainer.progress.stale,
        "target reached": (before.get("final_loss") or math.inf) >= config.target_loss,
    }
    return "" if still_open[ended] else ended


def describe_run(trainer) -> dict:
    """The part of run.json that says what this run is, and how far it is."""
    progress = trainer.progress
    runtime = trainer.runtime
    held_out = len(trainer.held_out.tokens) if trainer.held_out else 0
    return {
        "config": dataclasses.asdict(trainer.config),
        "seed": trainer.config.seed,
        "versions": versions(),
        "device": runtime.describe_device(),
        "precision": runtime.describe_precision(),
        "processes": runtime.world_size,
        "git_commit": git_commit(),
        "origin": trainer.origin or None,
        "corpus": {**trainer.corpus.about(), "held_out": held_out},
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "steps": progress.step,
        "tokens": trainer.batcher.tokens_taken(),
        "avg_loss": trainer.avg_loss() if progress.step else None,
        "best_loss": progress.best_loss,
        "target_loss": trainer.config.target_loss,
        "val_loss": progress.val_loss,
        "best_val_loss": progress.best_val_loss,
    }


def as_json(record: dict) -> dict:
    """JSON has no word for infinity or "not a number": they become null."""
    plain = {}
    for key, value in record.items():
        finite = not isinstance(value, float) or math.isfinite(value)
        plain[key] = value if finite else None
    return plain
