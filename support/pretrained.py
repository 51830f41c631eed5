"""Weights that were trained before: a GPT-2 folder in the layout of transformers, or a checkpoint of this program."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import torch

from support.checkpoint import load_checkpoint, not_finite
from support.cli import RunError, UsageError, is_out_of_memory
from support.tokenizer import Tokenizer, packaged_folder

GPT2_VOCAB_SIZE = 50257
# train.py's settings that give a model its shape
SHAPE = ("arch", "n_layer", "n_head", "n_embd", "block_size", "n_expert", "n_expert_active", "expert_width")
# transformers keeps these as Conv1D, whose matrices are the transposed of nn.Linear's
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def transposed(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of ours as transformers has it, or the other way round: transposing is its own inverse."""
    if name.endswith(TRANSPOSED):
        tensor = tensor.t()
    return tensor.float().contiguous()


def with_shape(source: str, below: dict, given: dict) -> dict:
    """The settings `below` the flags with the shape of such weights, and windows that fit into it. Raises UsageError
    where a flag or a preset wants another shape, or the place isn't one, RunError where it can't be read."""
    shape = read_shape(Path(source))
    problems = []
    for name, value in shape.items():
        if below.get(name, value) != value:
            preset = f"preset {given['preset']} has {name} {below[name]}"
            problems.append(f"{preset}, and {source} has {value}: use --preset finetune")
        elif given.get(name, value) != value:
            problems.append(f"{name} {given[name]} isn't {value}, which {source} has: leave --{name} out")
    if problems:
        raise UsageError(*problems)
    return below | shape | {"seq_len": min(below["seq_len"], shape["block_size"])}


def read_shape(source: Path) -> dict:
    """train.py's settings of the model in such a place. Raises UsageError if it isn't a GPT-2 like ours, RunError for
    a checkpoint that can't be read."""
    if not os.path.exists(source):  # unlike Path.exists, False for an impossible name
        raise UsageError(f"init_from {source} doesn't exist: name a folder with a GPT-2, or a best.pt")
    if not source.is_dir():
        return read_checkpoint_shape(source)
    try:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        shape = {name: int(config[name]) for name in ("n_layer", "n_head", "n_embd")}
        shape["block_size"] = int(config["n_positions"])
        vocab_size = config["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UsageError(f"{source} has no config.json of a GPT-2 ({e!r:.80}): name such a folder") from None
    check_kind(source, config, shape["n_embd"], vocab_size)
    check_vocabulary(source)
    return shape | {"arch": "gpt2", "tokenizer": "gpt2"}


def read_checkpoint_shape(path: Path) -> dict:
    checkpoint = load_checkpoint(path, lazy=True)
    try:
        shape = {name: checkpoint["config"][name] for name in SHAPE}
        shape["block_size"] = int(shape["block_size"])  # the others are looked at as flags are
        if "tokenizer_json" in checkpoint["tokenizer"]:  # whose path may be another one by now: see check_tokens
            return shape
        return shape | {"tokenizer": checkpoint["tokenizer"]["name"]}
    except (KeyError, TypeError, ValueError) as e:
        raise RunError(f"checkpoint {path} lacks what a model needs ({e!r:.80}): use another one") from None


def check_kind(folder: Path, config: dict, n_embd: int, vocab_size: int) -> None:
    """Raises UsageError for a relative of GPT-2 that computes something else."""
    usual = {
        "model_type": ("gpt2",),
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (1e-5,),
        "n_inner": (None, 4 * n_embd),
        "scale_attn_by_inverse_layer_idx": (False,),
        "scale_attn_weights": (True,),
        "tie_word_embeddings": (True,),
        "add_cross_attention": (False,),
    }
    odd = [f"{name} {config[name]!r}" for name, values in usual.items() if config.get(name, values[0]) not in values]
    if vocab_size != GPT2_VOCAB_SIZE:
        odd.append(f"vocab_size {vocab_size!r}")
    if odd:
        raise UsageError(f"{folder} isn't a GPT-2 that train.py can be: it has {', '.join(odd)}")


def check_vocabulary(folder: Path) -> None:
    """Raises UsageError if the folder names other tokens than GPT-2's: there are such of the same number."""
    found = None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # without either file there is nothing to see
        found = read_json(folder / "tokenizer.json")["model"]["vocab"]
    with contextlib.suppress(OSError, ValueError):
        found = read_json(folder / "vocab.json")
    source = packaged_folder()
    if source and found and found != read_json(source / "encoder.json"):
        raise UsageError(f"{folder} has a vocabulary of its own, and train.py knows only GPT-2's: use another one")


def check_tokens(path: Path, tokenizer: Tokenizer) -> None:
    """Raises UsageError unless the model in a checkpoint knows exactly the tokens of the new text."""
    saved = load_checkpoint(path, lazy=True)["tokenizer"]
    if saved["name"] != tokenizer.name:
        which = f"{saved['name']}, and this is {tokenizer.name}"
        raise UsageError(f"{path} was trained with another tokenizer ({which}): give its tokenizer.json by --tokenizer")
    known = saved.get("vocabulary", ())
    if list(known) != list(tokenizer.vocabulary):
        names = ", ".join(map(repr, sorted(set(known) ^ set(tokenizer.vocabulary))[:9]))
        remedy = "use a text with the same ones, or leave --init_from out"
        raise UsageError(f"{path} knows other characters than the text has ({names}): {remedy}")


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def read_weights(source: Path) -> dict[str, torch.Tensor]:
    """Weights with our names and shapes, in fp32. Raises RunError for files that are missing or broken."""
    if not source.is_dir():
        return load_checkpoint(source)["model"]
    named = {}
    for name, tensor in read_tensors(source).items():
        name = name if name.startswith("transformer.") else f"transformer.{name}"
        is_mask = name.endswith((".attn.bias", ".attn.masked_bias"))
        if "lm_head" not in name and not is_mask:
            named[name] = transposed(name, tensor)
    if "transformer.wte.weight" in named:
        named["lm_head.weight"] = named["transformer.wte.weight"]  # tied
    return named


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    try:
        if (folder / "model.safetensors").is_file():
            import safetensors.torch  # only needed here

            return safetensors.torch.load_file(folder / "model.safetensors")
        return torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunError(f"{folder} has neither model.safetensors nor pytorch_model.bin") from None
    except Exception as e:  # arbitrary bytes make both readers raise almost anything
        if is_out_of_memory(e):
            raise
        raise RunError(f"the weights in {folder} can't be read ({type(e).__name__}): get them anew") from None


def load_weights(model: torch.nn.Module, source: Path, tokenizer: Tokenizer) -> None:
    """Puts the weights into a model of their shape. Raises RunError where they don't fit, UsageError where they are of
    other characters than the new text."""
    if not source.is_dir():
        check_tokens(source, tokenizer)
    weights = read_weights(source)
    name = not_finite(weights)
    if name:
        raise RunError(f"the weights in {source} can't be right ({name} isn't finite): get them anew")
    try:
        model.load_state_dict(weights)
    except (KeyError, RuntimeError) as e:
        what = str(e).strip().splitlines()[-1].strip()
        raise RunError(f"the weights in {source} don't fit the shape it names ({what:.80}): get them anew") from None
