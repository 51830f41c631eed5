"""A folder that is a Hugging Face Space: the web page, the program it needs, a checkpoint and its run's records."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path

from support.checkpoint import load_checkpoint, load_model, save_checkpoint
from support.cli import UsageError
from support.files import whole_folder
from support.rounding import DTYPES, round_weights
from support.rundir import run_around

ROOT = Path(__file__).resolve().parent.parent

SPACE = """---
title: GPT-2 from scratch
emoji: \U0001f3ad
colorFrom: indigo
colorTo: gray
sdk: gradio
sdk_version: {version}
app_file: app.py
pinned: false
license: mit
---

GPT-2 124M, trained from scratch on one text by `train.py`, and a page that continues prompts with it. Written by
`python app.py --make_space`; push this folder to a Space as it is.
"""


def make_space(checkpoint: Path, folder: Path, architectures: dict, dtype: str = "fp32") -> None:
    """All that a Space needs, in one folder. Raises RunError, UsageError or OSError."""
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"{folder} isn't empty: name another folder")
    load_checkpoint(checkpoint)  # whole, by its checksums
    gradio = importlib.metadata.version("gradio")
    with whole_folder(folder) as part:
        copy_program(part)
        copy_run(checkpoint, part / "out")
        if dtype != "fp32":
            round_checkpoint(part / "out" / "checkpoints" / "best.pt", architectures, dtype)
        (part / "README.md").write_text(SPACE.format(version=gradio), encoding="utf-8")
        (part / ".gitattributes").write_text("*.pt filter=lfs diff=lfs merge=lfs -text\n", encoding="utf-8")
    print(f"Written: push {folder} to a Gradio Space", flush=True)


def copy_program(folder: Path) -> None:
    """What the page runs on, and the packages that this needs."""
    for name in ("app.py", "train.py", "mla_moe.py", "LICENSE"):
        shutil.copyfile(ROOT / name, folder / name)
    for name in ("support", "report"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    needed = [line for line in lines if "export_hf.py" not in line]
    (folder / "requirements.txt").write_text("\n".join(needed) + "\n", encoding="utf-8")


def copy_run(checkpoint: Path, out_dir: Path) -> None:
    """The checkpoint, and of its run's records what the page shows."""
    run_dir = run_around(checkpoint)
    files = {checkpoint: out_dir / "checkpoints" / "best.pt"}
    if run_dir:
        for name in ("run.json", "logs/train_metrics.csv", "samples/samples.txt"):
            files[run_dir / name] = out_dir / name
    for source, target in files.items():
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def round_checkpoint(path: Path, architectures: dict, dtype: str) -> None:
    """Makes the file half as large: its weights rounded to `dtype`, which load as fp32 again."""
    model, _, content = load_model(path, architectures, lazy=False)
    round_weights(model, dtype)
    content.pop("optimizer", None)  # a last.pt has it, and nobody trains in a Space
    for p in model.parameters():
        p.data = p.data.to(DTYPES[dtype])
    save_checkpoint(path, content | {"model": model.state_dict()})  # which has tied weights once
