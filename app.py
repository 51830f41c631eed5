"""A web page that continues prompts with a trained checkpoint, and shows how it was trained.

    python app.py                                            # out/checkpoints/best.pt, at http://127.0.0.1:7860
    python app.py --checkpoint out_demo/checkpoints/best.pt
    python app.py --make_space space                         # a folder to push as a Hugging Face Space

Text streams in token by token. One request is computed at a time, others wait in a queue. What a request may ask for is
limited on the server, not only in the page. Nothing is fetched from other hosts and nothing is sent to any.

Exit codes: 0 stopped by Ctrl-C, or the Space is written; 1 the port or a file can't be used; 2 unusable flags.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
import gradio as gr

import sample
import train
import update_readme

HERE = Path(__file__).resolve().parent
MOST = {"num_samples": 4, "max_new_tokens": 1000, "temperature": 5.0, "top_k": 50257, "seed": 2**32 - 1}
PROMPT_CHARACTERS = 20_000
QUEUE = 20  # requests that may wait
EXAMPLES = ["ROMEO:\n", "BIANCA:\n", "First Citizen:\nBefore we proceed any further, hear me speak.\n", "KING HENRY"]
SLIDERS = ("max_new_tokens", "num_samples")
FIELDS = ("prompt", "max_new_tokens", "num_samples", "temperature", "top_k", "seed")
INFO = {
    "prompt": "What the model continues.",
    "max_new_tokens": f"Tokens to write, at most {MOST['max_new_tokens']:,}; a token is about four letters.",
    "num_samples": "Continuations, written side by side.",
    "temperature": "0: always the likeliest token; over 1: wilder.",
    "top_k": "Draw from the k likeliest tokens (0: from all).",
    "seed": "The same seed gives the same text.",
}

# ======================================================================================================================
# What the page does
# ======================================================================================================================


def problems_of(values: dict) -> tuple[sample.Request | None, dict[str, str]]:
    """(the request, or None; {field: what to put right}). The browser may send anything."""
    found, numbers = {}, {}
    for name in FIELDS[1:]:
        value = values[name]
        if value in (None, "") or (name in SLIDERS and value == 0):  # an emptied slider becomes its minimum
            found[name] = f"this is empty: enter a number up to {MOST[name]:,}"
        else:
            whole = sample.BOUNDS[name][2] is int and isinstance(value, float) and value.is_integer()
            numbers[name] = int(value) if whole else value
    prompt = values["prompt"] if isinstance(values["prompt"], str) else ""
    request = sample.Request(prompt=prompt, **numbers)
    found |= {k: v.removeprefix(f"{k} ") for k, v in request.problems().items()}
    for name, most in MOST.items():
        if name not in found and getattr(request, name) > most:
            found[name] = f"{getattr(request, name):,} is too much: at most {most:,}"
    if len(prompt) > PROMPT_CHARACTERS:
        found["prompt"] = f"{len(prompt):,} characters are too many: at most {PROMPT_CHARACTERS:,}"
    return (None if found else request), found


def fields(problems: dict[str, str]) -> list[dict]:
    """An update of each field: what is wrong stands where its help stands."""
    return [
        gr.update(
            info=f"\u26a0 {problems[name]}" if name in problems else INFO[name],
            elem_classes=["wrong"] * (name in problems),
        )
        for name in FIELDS
    ]


class Page:
    """What is loaded, and what each button does with it."""

    def __init__(self, checkpoint: str, device: str = "auto", amp: str = "auto"):
        self.writer, self.trouble = None, ""
        try:
            self.writer = sample.Writer(checkpoint, device, amp)
        except train.RunError as e:
            self.trouble = str(e)
        folder = Path(checkpoint).absolute().parent
        # of a checkpoint elsewhere, the folder above may hold anything
        known = folder.name == "checkpoints" and (folder.parent / "run.json").is_file()
        self.run_dir = folder.parent if known else None

    def status(self) -> str:
        """Which checkpoint is loaded, or what to do."""
        if not self.writer:
            return (
                f"**There is no model:** {update_readme.plain(self.trouble)}. Train one, "
                "`python train.py --preset demo` takes minutes, then start this page with "
                "`python app.py --checkpoint out_demo/checkpoints/best.pt`."
            )
        loss = f", loss {self.writer.loss:.4f}" if self.writer.loss else ""
        size = self.writer.parameters
        where = f"{self.writer.runtime.describe_device()}, {self.writer.runtime.describe_precision()}"
        return (
            f"{update_readme.code(self.writer.path)}: {size:,} parameters, step {self.writer.step:,}{loss}; on {where}"
        )

    def write(self, *values) -> Iterator[list]:
        """Updates of the texts, the fields and the line below, as the text grows."""
        request, found = problems_of(dict(zip(FIELDS, values, strict=True)))
        none = [gr.update(visible=i == 0, value="") for i in range(MOST["num_samples"])]
        if request and self.writer:
            try:
                _, cut = self.writer.encode(request.prompt)
            except train.UsageError as e:  # a character that a model of characters doesn't know
                found["prompt"] = str(e)
        if found or not self.writer:
            yield [*none, *fields(found), "Please put right what is marked." if found else self.status()]
            return
        note = (
            f" The prompt is longer than the context: its last {self.writer.context:,} tokens are read." if cut else ""
        )
        texts, start, shown = [request.prompt] * request.num_samples, time.monotonic(), 0.0
        for count, pieces in enumerate(self.writer.write(request), 1):
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
            if (now := time.monotonic()) - shown > 0.1 or count == request.max_new_tokens:
                shown, rate = now, count * request.num_samples / max(now - start, 1e-9)
                line = f"{count:,} of {request.max_new_tokens:,} tokens, {rate:.0f} tok/s.{note}"
                yield [*self.boxes(texts), *fields({}), line]

    def boxes(self, texts: list[str]) -> list[dict]:
        unused = MOST["num_samples"] - len(texts)
        return [
            *(gr.update(visible=True, value=text) for text in texts),
            *[gr.update(visible=False, value="")] * unused,
        ]

    def training(self) -> tuple[str, str]:
        """(the run's summary as Markdown, its curve as SVG), from the records beside the checkpoint."""
        if not self.run_dir:
            return "The records of this training aren't beside the checkpoint.", ""
        try:
            run, _ = update_readme.read_run(self.run_dir, self.run_dir.name)
            curve = update_readme.curve(run).decode() if run.rows else ""
        except (update_readme.ReadmeError, OSError) as e:
            return f"The records of this training aren't there ({update_readme.plain(str(e))}).", ""
        return update_readme.summary(run) + "\n" + "\n".join(update_readme.learned(run)), curve[curve.find("<svg") :]


# ======================================================================================================================
# The page
# ======================================================================================================================

CSS = """
.wrong span, .wrong .info { color: var(--error-text-color, #b91c1c) !important; font-weight: 600; }
.curve svg { max-width: 100%; height: auto; }
.sample textarea { font-family: ui-monospace, monospace; }
button.selected { color: var(--body-text-color) !important; font-weight: 600; }
footer { display: none !important; }
"""


def theme() -> gr.themes.Base:
    """Gradio's, with the fonts of the reader's machine (none is fetched), and its pale words dark enough to be read:
    a contrast of 4.5 at least (WCAG 2, criterion 1.4.3)."""
    base = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    names = ("body_text_color_subdued", "block_info_text_color", "block_label_text_color", "block_title_text_color")
    words = dict.fromkeys(names, "*neutral_600") | {f"{name}_dark": "*neutral_300" for name in names}
    buttons = ("button_primary_background_fill", "button_primary_background_fill_hover", "button_primary_border_color")
    orange = {name + dark: "*primary_700" for name in buttons for dark in ("", "_dark")}
    return base.set(**words, **orange)


def build(page: Page) -> gr.Blocks:
    with gr.Blocks(title="GPT-2 from scratch", analytics_enabled=False) as blocks:
        gr.Markdown("# GPT-2, trained from scratch")
        gr.Markdown(page.status(), elem_id="status")
        with gr.Tab("Write"):
            with gr.Row():
                with gr.Column(min_width=280):
                    prompt = gr.Textbox(
                        label="Prompt",
                        info=INFO["prompt"],
                        lines=4,
                        elem_id="prompt",
                        value=page.writer.trained_prompt if page.writer else "",
                    )
                    ranges = {
                        "max_new_tokens": gr.Slider(0, MOST["max_new_tokens"], 200, step=1, label="Maximum length"),
                        "num_samples": gr.Slider(0, MOST["num_samples"], 2, step=1, label="Samples"),
                        "temperature": gr.Number(0.9, label="Temperature", step=0.1),
                        "top_k": gr.Number(50, label="Top-k"),
                        "seed": gr.Number(1337, label="Seed"),
                    }
                    for name, knob in ranges.items():
                        knob.info, knob.elem_id = INFO[name], name
                    knobs = list(ranges.values())
                    with gr.Row():
                        go = gr.Button("Generate", variant="primary", elem_id="generate")
                        stop = gr.Button("Stop", elem_id="stop")
                with gr.Column(min_width=280, scale=2):
                    line = gr.Markdown("", elem_id="line")
                    boxes = [
                        gr.Textbox(
                            label=f"Sample {i + 1}",
                            lines=8,
                            max_lines=40,
                            visible=i == 0,
                            interactive=False,
                            elem_classes=["sample"],
                            buttons=["copy"],
                        )
                        for i in range(MOST["num_samples"])
                    ]
            examples = EXAMPLES
            if page.writer:
                known = page.writer.tokenizer.knows
                examples = dict.fromkeys([page.writer.trained_prompt, *filter(known, EXAMPLES)])
            gr.Examples([[text] for text in examples], prompt, label="Example prompts")
            asked = go.click(
                page.write,
                [prompt, *knobs],
                [*boxes, prompt, *knobs, line],
                concurrency_limit=1,
                concurrency_id="model",
                preprocess=False,  # every value comes through: problems_of says beside the field what is wrong
            )
            stop.click(lambda: "Stopped.", None, line, cancels=[asked], queue=False)
        with gr.Tab("Training"):
            summary, curve = page.training()
            gr.Markdown(summary, elem_id="summary")
            gr.HTML(f'<div class="curve">{curve}</div>', elem_id="curve")
    return blocks.queue(max_size=QUEUE, default_concurrency_limit=1, api_open=False)  # no way past the queue


# ======================================================================================================================
# A Hugging Face Space
# ======================================================================================================================

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


def make_space(checkpoint: Path, folder: Path) -> None:
    """All that a Space needs, in one folder. Raises train.RunError, train.UsageError or OSError."""
    if folder.is_dir() and any(folder.iterdir()):
        raise train.UsageError(f"{folder} isn't empty: name another folder")
    train.load_checkpoint(checkpoint)  # whole, by its checksums
    (folder / "out" / "checkpoints").mkdir(parents=True)
    for name in ("app.py", "sample.py", "train.py", "update_readme.py", "LICENSE"):
        shutil.copyfile(HERE / name, folder / name)
    shutil.copyfile(checkpoint, folder / "out" / "checkpoints" / "best.pt")
    run_dir = checkpoint.absolute().parent.parent
    for name in ("run.json", "logs/train_metrics.csv"):
        if (run_dir / name).is_file():
            (folder / "out" / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(run_dir / name, folder / "out" / name)
    (folder / "README.md").write_text(SPACE.format(version=gr.__version__), encoding="utf-8")
    (folder / ".gitattributes").write_text("*.pt filter=lfs diff=lfs merge=lfs -text\n", encoding="utf-8")
    lines = (HERE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if "export_hf.py" not in line]
    (folder / "requirements.txt").write_text("\n".join(kept) + "\n", encoding="utf-8")
    print(f"Written: push {folder} to a Gradio Space", flush=True)


# ======================================================================================================================
# Command line
# ======================================================================================================================


def build_parser() -> argparse.ArgumentParser:
    summary, examples = train.help_texts(__doc__)
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "app.py", "python app.py [--FLAG VALUE ...]", summary, examples, formatter_class=style, allow_abbrev=False
    )
    parser.add_argument("--checkpoint", default="out/checkpoints/best.pt", help="(default: out/checkpoints/best.pt)")
    host = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")  # a Space sets it
    parser.add_argument("--host", default=host, help="address to listen on; 0.0.0.0: all (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=7860, help="(default: 7860)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="(default: auto)")
    parser.add_argument("--amp", default="auto", choices=("auto", "fp16", "bf16", "off"), help="(default: auto)")
    parser.add_argument("--make_space", metavar="DIR", type=Path, help="write a Hugging Face Space instead")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code; faults are one sentence each, on stderr."""
    args = build_parser().parse_args(argv)
    try:
        if problems := [text for _, text in train.TrainConfig(steps=1, device=args.device, amp=args.amp).conflicts()]:
            raise train.UsageError(*problems)
        if not 0 < args.port < 65536:
            raise train.UsageError(f"port {args.port} isn't from 1 to 65535: choose another --port")
        if args.make_space:
            make_space(Path(args.checkpoint), args.make_space)
            return 0
        print(f"Loading {args.checkpoint} ...", flush=True)
        blocks = build(Page(args.checkpoint, args.device, args.amp))
        with contextlib.suppress(KeyboardInterrupt):
            blocks.launch(
                server_name=args.host,
                server_port=args.port,
                theme=theme(),
                css=CSS,
                ssr_mode=False,
                show_error=True,
                max_file_size="1kb",  # nothing is uploaded here
            )
    except train.UsageError as e:
        print(*(f"app.py: {problem}" for problem in e.problems), sep="\n", file=sys.stderr)
        return 2
    except train.RunError as e:
        print(f"app.py: {e}", file=sys.stderr)
        return 1
    except (OSError, ValueError) as e:  # Gradio's words for a port that is taken, or an address it can't reach
        remedy = "" if args.make_space else ": choose another --host or --port"
        print(f"app.py: {e}{remedy}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
