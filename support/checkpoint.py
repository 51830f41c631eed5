"""Checkpoints as files: whole or not at all, with checksums, what older programs wrote, and is it the same run?"""

from __future__ import annotations

import dataclasses
import errno
import math
import os
import zipfile
from pathlib import Path

import torch
import torch.nn as nn

from support import machine
from support.cli import DamagedError, RunError, UsageError, first_line, is_out_of_memory
from support.files import atomic_write, odd_kind
from support.text import Corpus
from support.tokenizer import Tokenizer, saved_tokenizer

FORMAT = 2  # raised when an older program couldn't read a newer file

# In files from before these were settings.
EARLIER_SETTINGS = {"optimizer": "adamw", "embed_lr": 0.0, "val_fraction": 0.0, "best_by": "train", "arch": "gpt2"}
EARLIER_SETTINGS |= {"dataset": "", "val_dataset": "", "val_documents": 0, "text_field": "text", "avg_steps": 100}
EARLIER_SETTINGS |= {"shift_windows": False, "n_expert": 7, "n_expert_active": 2, "expert_width": 0}


def weights_of(content: dict) -> dict:
    """What best.pt has of a checkpoint: the weights, and where they come from."""
    kept = ("model", "model_config", "config", "step", "loss", "val_loss", "tokenizer", "corpus_sha256", "origin")
    return {name: content[name] for name in ("format", *kept)}


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
        reason = getattr(cause, "strerror", None) or first_line(e)
        kept = "the one before it is intact" if path.exists() else "there is none before it"
        raise RunError(f"checkpoint {path} can't be written ({reason}): {kept}; make room for it, then resume") from e


def load_checkpoint(path: str | Path, lazy: bool = False) -> dict:
    """A checkpoint, on the CPU. Never runs code that the file may hold. `lazy` reads a tensor only when it is used;
    else the whole file is read and compared with its checksums.

    Raises UsageError for a file that isn't there or is no file, RunError for one that is damaged, or of another program
    or a newer version."""
    content = read_archive(path, lazy)
    kinds = {"format": int, "model": dict, "config": dict, "step": int}
    known = isinstance(content, dict) and kinds.keys() <= content.keys()
    if not known or not all(isinstance(content[name], kind) for name, kind in kinds.items()):
        raise RunError(f"checkpoint {path} isn't of this program: name a last.pt that train.py wrote")
    if content["format"] > FORMAT:
        raise RunError(f"checkpoint {path} is of a newer version of train.py: update this one")
    try:
        content = upgrade(content)
    except (KeyError, TypeError, ValueError) as e:
        raise damaged(path, repr(e)) from None
    check_content(path, content)
    if not lazy:
        check_weights(path, content["model"])
    return content


def read_archive(path: str | Path, lazy: bool):
    """What a file of torch holds. Raises as load_checkpoint does, and what tells of a full memory."""
    odd = odd_kind(path)
    if odd:
        raise UsageError(f"checkpoint {path} is {odd}: name a last.pt or best.pt that train.py wrote")
    try:
        check_archive(path, lazy)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=lazy)
    except FileNotFoundError:
        raise UsageError(f"checkpoint {path} doesn't exist: check the path") from None
    except PermissionError as e:
        raise RunError(f"checkpoint {path} can't be read ({e.strerror}): check its permissions") from None
    except Exception as e:  # arbitrary bytes make torch's reader raise almost anything
        if is_out_of_memory(e):
            raise
        raise damaged(path, type(e).__name__) from None


def damaged(path: str | Path, why: str) -> DamagedError:
    return DamagedError(
        f"checkpoint {path} is damaged or isn't a checkpoint ({why:.80}): resume from the previous.pt beside it, sample"
        " from its best.pt, or start anew with --overwrite"
    )


def check_archive(path: str | Path, lazy: bool) -> None:
    """Reads the files of the archive to their ends, where zipfile compares their CRC-32: torch itself doesn't look at
    it. `lazy` leaves the large ones out. Raises BadZipFile or OSError.

    torch packs nothing. Files that are packed, or share their bytes, could fill any memory when they are read."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > os.path.getsize(path):
            raise zipfile.BadZipFile("more is in it than it is large")
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile(f"{member.filename} is packed")
            if member.external_attr & 0x10:  # marked as a folder: torch would read nothing, and leave what memory held
                raise zipfile.BadZipFile(f"{member.filename} is a folder")
            if lazy and member.file_size >= 1 << 20:
                continue
            with archive.open(member) as f:
                while f.read(1 << 22):
                    pass


def check_content(path: str | Path, content: dict) -> None:
    """Raises RunError for what can't be in a checkpoint, before anything is computed with it or sized by it."""
    given = content["config"] | content
    for name in ("origin", "prompt", "arch"):
        if not isinstance(given.get(name) or "", str):
            raise damaged(path, f"its {name} is no text")
    for name in ("step", "loss", "temperature", "top_k"):
        value = given.get(name) or 0
        if not isinstance(value, (int, float)) or not 0 <= value < 2**63:  # also true of nan
            raise damaged(path, f"its {name} is no number of 0 or more")
    made_on = content.get("made_on", {})
    if not isinstance(made_on, dict) or not isinstance(made_on.get("processes", 1), int):
        raise damaged(path, "it doesn't say what it was made on")
    weights = content["model"].values()
    if not all(map(is_plain, weights)):
        raise damaged(path, "its weights aren't plain tensors")
    if sum(tensor.nbytes for tensor in weights) > 2 * os.path.getsize(path):  # tied ones count twice
        raise damaged(path, "its weights are larger than the file")


def is_plain(tensor) -> bool:
    """Is this a tensor as a checkpoint has them? Others, as sparse ones, can stand for more than a file holds."""
    if not isinstance(tensor, torch.Tensor):
        return False
    return tensor.layout is torch.strided and tensor.device.type == "cpu" and tensor.is_floating_point()


def check_weights(path: str | Path, weights: dict[str, torch.Tensor]) -> None:
    """Raises DamagedError for weights of which one isn't finite: all that is computed with it would be nan too."""
    name = not_finite(weights)
    if name:
        raise damaged(path, f"{name} isn't finite")


def not_finite(weights: dict[str, torch.Tensor]) -> str:
    """The name of the first tensor that holds nan or an infinity, "" where all are finite."""
    for name, tensor in weights.items():
        if not tensor.numel():
            continue
        least, most = tensor.aminmax()  # nan, if one is
        if not (math.isfinite(least) and math.isfinite(most)):
            return name
    return ""


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
    """(the model, its tokenizer, all that the checkpoint holds). `architectures` is train.py's.

    Raises RunError for a checkpoint that can't be used, UsageError where its tokenizer isn't installed."""
    checkpoint = load_checkpoint(path, lazy)
    try:
        make, model_config = architectures[checkpoint["config"]["arch"]]()
        shape = model_config(**checkpoint["model_config"])
        if shape.n_layer > len(checkpoint["model"]):
            raise ValueError("it has fewer weights than layers")
        with machine.outline():
            sketch = make(shape)
        if shapes_of(sketch.state_dict()) != shapes_of(checkpoint["model"]):
            raise ValueError("its weights aren't of the shape that it names")
        model = make(shape)
        model.load_state_dict(checkpoint["model"])
        if lazy:  # else it was looked at already
            check_weights(path, model.state_dict())
        tokenizer = saved_tokenizer(checkpoint["tokenizer"])
        if tokenizer.vocab_size != model.config.vocab_size:
            raise ValueError(f"{tokenizer.vocab_size} tokens, and a model of {model.config.vocab_size}")
        return model, tokenizer, checkpoint
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as e:
        if is_out_of_memory(e):
            raise
        raise RunError(f"checkpoint {path} lacks what a model needs ({e!r:.80}): use another one") from e


def shapes_of(weights: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in weights.items()}


# ---- is it the same run? ----

# Another value of one of these makes another run, which a checkpoint can't go on with.
FIXED = (
    *("block_size", "n_layer", "n_head", "n_embd", "dropout", "batch_size", "seq_len", "seed"),
    *("randomize_batches", "shift_windows", "optimizer", "val_fraction", "best_by"),
    *("text_field", "val_documents", "avg_steps"),
    *("arch", "n_expert", "n_expert_active", "expert_width"),
)
# These belong to one start and not to the run.
PASSING = ("preset", "out_dir", "resume", "overwrite", "init_from", "input_file", "tokenizer", "cache_dir")


def check_same_run(checkpoint: dict, given: dict, corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Raises UsageError with every setting in `given`, and the text and tokens, that make this another run."""
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
    if checkpoint["tokenizer"]["name"] != tokenizer.name:
        problems.append(
            f"tokenizer {named(given['tokenizer'], tokenizer.name)} conflicts with the checkpoint's"
            f" {named(saved['tokenizer'], checkpoint['tokenizer']['name'])}: leave --tokenizer out, or start anew with"
            " another --out_dir"
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


def named(setting: str, name: str) -> str:
    """A tokenizer as errors name it: of a file, its path may be the same and its content another."""
    return setting if setting == name else f"{setting} ({name})"


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
