"""Checkpoints as files: whole or not at all, with checksums, what older programs wrote, and is it the same run?"""

from __future__ import annotations

import dataclasses
import errno
import math
import zipfile
from pathlib import Path

import torch
import torch.nn as nn

from support.cli import DamagedError, RunError, UsageError
from support.files import atomic_write
from support.text import Corpus, Tokenizer, saved_tokenizer

FORMAT = 2  # raised when an older program couldn't read a newer file

# In files from before these were settings.
EARLIER_SETTINGS = {"optimizer": "adamw", "embed_lr": 0.0, "val_fraction": 0.0, "best_by": "train"}
EARLIER_SETTINGS["shift_windows"] = False


def save_checkpoint(path: Path, content: dict, previous: Path | None = None, spare: Path | None = None) -> None:
    """Writes plain dicts and tensors atomically, keeping the file before as `previous`. On a full disk the file `spare`
    is given up for it. Raises RunError when it can't be written; the file before it stays intact."""
    try:
        with atomic_write(path, previous, cached=False) as f:
            torch.save(content, f)
    except (OSError, RuntimeError) as e:  # torch hides a failed write behind a RuntimeError
        cause = e if isinstance(e, OSError) else e.__context__
        if getattr(cause, "errno", 0) == errno.ENOSPC and spare and spare.exists():
            spare.unlink()
            return save_checkpoint(path, content, previous)
        reason = getattr(cause, "strerror", None) or str(e).splitlines()[0]
        kept = "the one before it is intact" if path.exists() else "there is none before it"
        raise RunError(f"checkpoint {path} can't be written ({reason}): {kept}; make room for it, then resume") from e


def load_checkpoint(path: str | Path, lazy: bool = False) -> dict:
    """A checkpoint, on the CPU. Never runs code that the file may hold. `lazy` reads a tensor only when it is used;
    else the whole file is read and compared with its checksums.

    Raises UsageError for a file that isn't there, RunError for one that is damaged, or of another program or a newer
    version."""
    try:
        check_archive(path, lazy)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=lazy)
    except FileNotFoundError:
        raise UsageError(f"checkpoint {path} doesn't exist: check the path") from None
    except PermissionError as e:
        raise RunError(f"checkpoint {path} can't be read ({e.strerror}): check its permissions") from None
    except Exception as e:  # arbitrary bytes make torch's reader raise almost anything
        raise DamagedError(
            f"checkpoint {path} is damaged or isn't a checkpoint ({type(e).__name__}): resume from the previous.pt"
            " beside it, sample from its best.pt, or start anew with --overwrite"
        ) from None
    known = isinstance(content, dict) and {"format", "model", "config", "step"} <= content.keys()
    if not (known and isinstance(content["format"], int) and isinstance(content["config"], dict)):
        raise RunError(f"checkpoint {path} isn't of this program: name a last.pt that train.py wrote")
    if content["format"] > FORMAT:
        raise RunError(f"checkpoint {path} is of a newer version of train.py: update this one")
    return upgrade(content)


def check_archive(path: str | Path, lazy: bool) -> None:
    """Reads the files of the archive to their ends, where zipfile compares their CRC-32: torch itself doesn't look at
    it. `lazy` leaves the large ones out. Raises BadZipFile or OSError."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.external_attr & 0x10:  # marked as a folder: torch would read nothing, and leave what memory held
                raise zipfile.BadZipFile(f"{member.filename} is a folder")
            if lazy and member.file_size >= 1 << 20:
                continue
            with archive.open(member) as f:
                while f.read(1 << 22):
                    pass


def upgrade(content: dict) -> dict:
    """An older checkpoint as this program would have written it."""
    content["config"] = EARLIER_SETTINGS | content["config"]
    if content["format"] == 1:
        if content["config"].get("steps") == 1300 and content["config"].get("warmup_steps") is None:
            content["config"]["warmup_steps"] = 60  # which was the default of that many steps
        if "optimizer" in content:
            content["progress"] = progress_of_format_1(content)
    return content


def progress_of_format_1(content: dict) -> dict:
    """Format 1 kept where the run is in many places, some of them lists."""
    names = ("seconds", "best_loss", "best_saved", "next_proof", "skipped")
    progress = {name: content.pop(name) for name in names}
    progress["step"] = content["step"]
    progress["best_saved"] = (math.isinf(progress["best_saved"]), progress["best_saved"])  # it was of full passes only
    last_step = content.pop("last_step")
    progress |= {"loss": last_step["loss"], "grad_norm": last_step["grad_norm"], "lr": last_step["lr"]}
    if "held_out" in content:  # not in the earliest files
        progress |= dict(zip(("val_loss", "best_val_loss", "val_step", "stale"), content.pop("held_out"), strict=True))
        progress |= dict(zip(("epoch_loss", "epoch_steps", "epoch_start"), content.pop("epoch"), strict=True))
    return progress


# ---- the model in it ----


def load_model(path: str | Path, architectures: dict, lazy: bool = True) -> tuple[nn.Module, Tokenizer, dict]:
    """(the model, its tokenizer, all that the checkpoint holds). `architectures` has what makes a model, by name.

    Raises RunError for a checkpoint that can't be used, UsageError where its tokenizer isn't installed."""
    checkpoint = load_checkpoint(path, lazy)
    try:
        make = architectures[checkpoint["config"].get("architecture", "gpt2")]
        model = make(checkpoint["model_config"])
        model.load_state_dict(checkpoint["model"])
        return model, saved_tokenizer(checkpoint["tokenizer"]), checkpoint
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        raise RunError(f"checkpoint {path} lacks what a model needs ({e!r:.80}): use another one") from e


# ---- is it the same run? ----

# Another value of one of these makes another run, which a checkpoint can't go on with.
FIXED = ("block_size", "n_layer", "n_head", "n_embd", "dropout", "tokenizer", "batch_size", "seq_len", "seed")
FIXED = (*FIXED, "randomize_batches", "shift_windows", "optimizer", "val_fraction", "best_by")
# These belong to one start and not to the run.
PASSING = ("preset", "out_dir", "resume", "overwrite", "init_from", "input_file", "cache_dir")


def check_same_run(checkpoint: dict, given: dict, corpus: Corpus) -> None:
    """Raises UsageError with every setting in `given`, and the text, that makes this another run."""
    if "optimizer" not in checkpoint:
        raise UsageError(f"{given['resume']} holds weights only: resume from the last.pt beside it")
    saved = checkpoint["config"]
    problems = []
    for name in FIXED:
        if given[name] != saved[name]:
            problems.append(
                f"{name} {given[name]} conflicts with the checkpoint's {saved[name]}: leave --{name} out, or start anew"
                " with another --out_dir"
            )
    if checkpoint["corpus_sha256"] != corpus.sha256:
        problems.append(
            f"input_file {corpus.path} (SHA-256 {corpus.sha256[:12]}...) isn't the checkpoint's text"
            f" ({checkpoint['corpus_sha256'][:12]}...): give that one, or start anew with another --out_dir"
        )
    if given["init_from"] and origin_of(given["init_from"]) != checkpoint.get("origin"):
        start = checkpoint.get("origin") or "random weights"
        problems.append(
            f"init_from {given['init_from']} isn't where the checkpoint's run started ({start}): leave --init_from out,"
            " or start anew with another --out_dir"
        )
    if problems:
        raise UsageError(*problems)


def origin_of(source: str) -> str:
    """What a run keeps of where its first weights came from, for its log and its model card. Of a checkpoint, the run
    directory too; no more of the path, which is nobody else's business."""
    path = Path(source).resolve()
    if path.is_file():
        return "/".join(path.parts[-3:])
    return path.name


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """The averages of `state`, but the betas and the decay of this start's flags."""
    settings = []
    for group in optimizer.param_groups:
        settings.append({name: value for name, value in group.items() if name != "params"})
    optimizer.load_state_dict(state)
    for group, mine in zip(optimizer.param_groups, settings, strict=True):
        group.update(mine)


def changes_since(state: dict, trainer) -> list[str]:
    """For the log: what is no longer as it was when the checkpoint was made: settings, the learning rate, the machine.
    `trainer` is train.py's Trainer, which has loaded it."""
    given = dataclasses.asdict(trainer.given)
    machine = trainer.runtime.describe()
    notes = []
    saved = state["config"]
    settings = []
    for name in sorted(saved.keys() & given.keys()):
        if name not in PASSING and saved[name] != given[name]:
            settings.append(f"{name} {saved[name]} -> {given[name]}")
    if settings:
        notes.append(f"Changed since the checkpoint: {', '.join(settings)}")
    before = state["optimizer"]["param_groups"][0]["lr"]
    after = trainer.optimizer.param_groups[0]["lr"]
    if state["step"] < trainer.config.steps and before != after:
        notes.append(f"Learning rate of step {state['step'] + 1}: {after:.6e} (it was to be {before:.6e})")
    there = state["made_on"]
    other = [f"{name} {there.get(name)} -> {machine[name]}" for name in machine if there.get(name) != machine[name]]
    if other:
        notes.append(f"Not bit for bit the run that never stopped, since this differs: {', '.join(other)}")
    return notes
