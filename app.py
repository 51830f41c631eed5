"""A web page that continues prompts with a trained checkpoint, and shows how it was trained.

    python app.py                                            # the newest run in out*/, at http://127.0.0.1:7860
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
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
import gradio as gr

from report import blocks, pictures
from report.markdown import code, plain
from report.run import ReadmeError, read_run
from support import cli
from support.checkpoint import load_checkpoint
from support.cli import RunError, UsageError
from support.files import whole_folder
from support.inference import Request, Writer
from support.machine import machine_problems
from support.rundir import chosen_checkpoint, run_around
from train import ARCHITECTURES

HERE = Path(__file__).resolve().parent
# (least, most) of what a request may ask for; sample.py allows more
BOUNDS = {
    "max_new_tokens": (1, 1000),
    "num_samples": (1, 4),
    "temperature": (0.0, 5.0),
    "top_k": (0, 50257),
    "seed": (0, 2**32 - 1),
}
FIELDS = ("prompt", *BOUNDS)
SLIDERS = ("max_new_tokens", "num_samples")
BOXES = BOUNDS["num_samples"][1]
PROMPT_CHARACTERS = 20_000
QUEUE = 20  # requests that may wait
EXAMPLES = ["ROMEO:\n", "BIANCA:\n", "First Citizen:\nBefore we proceed any further, hear me speak.\n", "KING HENRY"]
INFO = {
    "prompt": "What the model continues.",
    "max_new_tokens": "Tokens to write, at most 1,000; a token is about four letters.",
    "num_samples": "Continuations, written side by side.",
    "temperature": "0: always the likeliest token; over 1: wilder.",
    "top_k": "Draw from the k likeliest tokens (0: from all).",
    "seed": "The same seed gives the same text.",
}


# ======== What the page does ==========================================================================================


def read_request(values: dict) -> tuple[Request, dict[str, str]]:
    """(the request, {field: what to put right}). The browser may send anything."""
    prompt = values["prompt"] if isinstance(values["prompt"], str) else ""
    request = Request(prompt, **{name: as_number(values[name]) for name in BOUNDS})
    problems = request.problems(BOUNDS)
    for name, (least, most) in BOUNDS.items():
        emptied = name in SLIDERS and values[name] == 0  # an emptied slider becomes its minimum
        if emptied or values[name] in (None, ""):
            problems[name] = f"this is empty: enter a number from {least:,} to {most:,}"
    if len(prompt) > PROMPT_CHARACTERS:
        problems["prompt"] = f"{len(prompt):,} characters are too many: at most {PROMPT_CHARACTERS:,}"
    return request, problems


def as_number(value):
    """A browser's numbers may all be floats."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def fields(problems: dict[str, str]) -> list[dict]:
    """An update of each field: what is wrong stands where its help stands."""
    updates = []
    for name in FIELDS:
        if name in problems:
            updates.append(gr.update(info=f"\u26a0 {problems[name]}", elem_classes=["wrong"]))
        else:
            updates.append(gr.update(info=INFO[name], elem_classes=[]))
    return updates


def boxes(texts: Sequence[str]) -> list[dict]:
    """An update of each box for a sample: those that have no text are hidden."""
    updates = [gr.update(visible=True, value=text) for text in texts]
    while len(updates) < BOXES:
        updates.append(gr.update(visible=False, value=""))
    return updates


class Page:
    """What is loaded, and what each button does with it."""

    def __init__(self, checkpoint: Path, device: str = "auto", amp: str = "auto"):
        self.writer: Writer | None = None
        self.trouble = ""
        self.run_dir = run_around(checkpoint)
        try:
            self.writer = Writer(checkpoint, ARCHITECTURES, device, amp)
        except (RunError, UsageError) as e:
            self.trouble = str(e)

    def status(self) -> str:
        """Which checkpoint is loaded, or what to do."""
        if not self.writer:
            return (
                f"**There is no model:** {plain(self.trouble)}. Train one, `python train.py --preset demo` takes"
                " minutes, then start this page with `python app.py --checkpoint out_demo/checkpoints/best.pt`."
            )
        loss = f", loss {self.writer.loss:.4f}" if self.writer.loss else ""
        model = f"{self.writer.parameters:,} parameters, step {self.writer.step:,}{loss}"
        runtime = self.writer.runtime
        return f"{code(self.writer.path)}: {model}; on {runtime.describe_device()}, {runtime.describe_precision()}"

    def write(self, *values) -> Iterator[list]:
        """Updates of the texts, the fields and the line below, as the text grows."""
        request, problems = read_request(dict(zip(FIELDS, values, strict=True)))
        note = ""
        if self.writer and not problems:
            try:
                note = self.about_prompt(request.prompt)
            except UsageError as e:  # a character that a model of characters doesn't know
                problems["prompt"] = str(e)
        if problems:
            yield [*boxes([""]), *fields(problems), "Please put right what is marked."]
        elif not self.writer:
            yield [*boxes([""]), *fields({}), self.status()]
        else:
            for texts, line in self.grow(request):
                yield [*boxes(texts), *fields({}), line + note]

    def about_prompt(self, prompt: str) -> str:
        """What to say of its length. Raises UsageError for a prompt that the model can't read."""
        _, cut = self.writer.encode(prompt)
        if not cut:
            return ""
        return f" The prompt is longer than the context: its last {self.writer.context:,} tokens are read."

    def grow(self, request: Request) -> Iterator[tuple[list[str], str]]:
        """(the texts so far, how far they are), ten times a second and at the end."""
        texts = [request.prompt] * request.num_samples
        start = time.monotonic()
        shown = 0.0
        for count, pieces in enumerate(self.writer.write(request), 1):
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
            now = time.monotonic()
            if now - shown > 0.1 or count == request.max_new_tokens:
                shown = now
                rate = count * request.num_samples / max(now - start, 1e-9)
                yield texts, f"{count:,} of {request.max_new_tokens:,} tokens, {rate:.0f} tok/s."

    def training(self) -> tuple[str, str]:
        """(the run's summary as Markdown, its curve as SVG), from the records beside the checkpoint."""
        if not self.run_dir:
            return "The records of this training aren't beside the checkpoint.", ""
        try:
            run, _ = read_run(self.run_dir, self.run_dir.name)
            svg = pictures.curve(run).decode() if run.rows else ""
        except (ReadmeError, OSError) as e:
            return f"The records of this training aren't there ({plain(str(e))}).", ""
        text = "\n".join([blocks.summary(run), *blocks.learned(run)])
        return text, svg[svg.find("<svg") :]  # without the lines that an SVG in a file begins with

    def examples(self) -> list[str]:
        """Prompts that the model can read, its own first."""
        if not self.writer:
            return EXAMPLES
        own = self.writer.trained_prompt
        return [own, *(text for text in EXAMPLES if text != own and self.writer.tokenizer.knows(text))]


# ======== The page ====================================================================================================

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
    colours = {}
    pale = ("body_text_color_subdued", "block_info_text_color", "block_label_text_color", "block_title_text_color")
    for name in pale:
        colours[name] = "*neutral_600"
        colours[f"{name}_dark"] = "*neutral_300"
    for name in ("background_fill", "background_fill_hover", "border_color"):
        colours[f"button_primary_{name}"] = "*primary_700"
        colours[f"button_primary_{name}_dark"] = "*primary_700"
    return base.set(**colours)


def build(page: Page) -> gr.Blocks:
    with gr.Blocks(title="GPT-2 from scratch", analytics_enabled=False) as layout:
        gr.Markdown("# GPT-2, trained from scratch")
        gr.Markdown(page.status(), elem_id="status")
        with gr.Tab("Write"):
            add_writing(page)
        with gr.Tab("Training"):
            summary, curve = page.training()
            gr.Markdown(summary, elem_id="summary")
            gr.HTML(f'<div class="curve">{curve}</div>', elem_id="curve")
    return layout.queue(max_size=QUEUE, default_concurrency_limit=1, api_open=False)  # no way past the queue


def add_writing(page: Page) -> None:
    """The tab in which the model writes."""
    with gr.Row():
        with gr.Column(min_width=280):
            asked = add_fields(page.examples()[0] if page.writer else "")
            with gr.Row():
                go = gr.Button("Generate", variant="primary", elem_id="generate")
                stop = gr.Button("Stop", elem_id="stop")
        with gr.Column(min_width=280, scale=2):
            line = gr.Markdown("", elem_id="line")
            samples = [add_box(i) for i in range(BOXES)]
    gr.Examples([[text] for text in page.examples()], asked[0], label="Example prompts")
    writing = go.click(
        page.write,
        asked,
        [*samples, *asked, line],
        concurrency_limit=1,
        concurrency_id="model",
        preprocess=False,  # every value comes through: read_request says beside the field what is wrong
    )
    stop.click(lambda: "Stopped.", None, line, cancels=[writing], queue=False)


def add_fields(prompt: str) -> list:
    """Where a request is typed, in the order of FIELDS."""
    added = {
        "prompt": gr.Textbox(prompt, label="Prompt", lines=4),
        "max_new_tokens": gr.Slider(0, BOUNDS["max_new_tokens"][1], 200, step=1, label="Maximum length"),
        "num_samples": gr.Slider(0, BOUNDS["num_samples"][1], 2, step=1, label="Samples"),
        "temperature": gr.Number(0.9, label="Temperature", step=0.1),
        "top_k": gr.Number(50, label="Top-k"),
        "seed": gr.Number(1337, label="Seed"),
    }
    for name, one in added.items():
        one.info = INFO[name]
        one.elem_id = name
    return list(added.values())


def add_box(i: int) -> gr.Textbox:
    return gr.Textbox(
        label=f"Sample {i + 1}",
        lines=8,
        max_lines=40,
        visible=i == 0,
        interactive=False,
        elem_classes=["sample"],
        buttons=["copy"],
    )


def serve(layout: gr.Blocks, host: str, port: int) -> None:
    """Until Ctrl-C. Raises RunError."""
    try:
        with contextlib.suppress(KeyboardInterrupt):
            layout.launch(
                server_name=host,
                server_port=port,
                theme=theme(),
                css=CSS,
                ssr_mode=False,
                show_error=True,
                max_file_size="1kb",  # nothing is uploaded here
            )
    except (OSError, ValueError) as e:  # Gradio's words for a port that is taken, or an address it can't reach
        raise RunError(f"{e}: choose another --host or --port") from None


# ======== A Hugging Face Space ========================================================================================

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
    """All that a Space needs, in one folder. Raises RunError, UsageError or OSError."""
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"{folder} isn't empty: name another folder")
    load_checkpoint(checkpoint)  # whole, by its checksums
    with whole_folder(folder) as part:
        copy_program(part)
        copy_run(checkpoint, part / "out")
        (part / "README.md").write_text(SPACE.format(version=gr.__version__), encoding="utf-8")
        (part / ".gitattributes").write_text("*.pt filter=lfs diff=lfs merge=lfs -text\n", encoding="utf-8")
    print(f"Written: push {folder} to a Gradio Space", flush=True)


def copy_program(folder: Path) -> None:
    for name in ("app.py", "train.py", "mla_moe.py", "LICENSE"):
        shutil.copyfile(HERE / name, folder / name)
    for name in ("support", "report"):
        shutil.copytree(HERE / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    lines = (HERE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    needed = [line for line in lines if "export_hf.py" not in line]
    (folder / "requirements.txt").write_text("\n".join(needed) + "\n", encoding="utf-8")


def copy_run(checkpoint: Path, out_dir: Path) -> None:
    """The checkpoint, and of its run's records what the page shows."""
    run_dir = run_around(checkpoint)
    files = {checkpoint: out_dir / "checkpoints" / "best.pt"}
    if run_dir:
        for name in ("run.json", "logs/train_metrics.csv"):
            files[run_dir / name] = out_dir / name
    for source, target in files.items():
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


# ======== Command line ================================================================================================


def build_parser() -> argparse.ArgumentParser:
    parser = cli.program_parser("app.py", "python app.py [--FLAG VALUE ...]", __doc__)
    parser.add_argument("--checkpoint", type=Path, help="a best.pt or last.pt (default: of the newest run in out*/)")
    host = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")  # a Space sets it
    parser.add_argument("--host", default=host, help="address to listen on; 0.0.0.0: all (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=7860, help="(default: 7860)")
    cli.add_machine_flags(parser)
    parser.add_argument("--make_space", metavar="DIR", type=Path, help="write a Hugging Face Space instead")
    return parser


def start(args: argparse.Namespace) -> int:
    """Does what the command line says. Raises UsageError or RunError."""
    problems = machine_problems(args.device, args.amp)
    if not 0 < args.port < 65536:
        problems.append(f"port {args.port} isn't from 1 to 65535: choose another --port")
    if problems:
        raise UsageError(*problems)
    checkpoint = chosen_checkpoint("app.py", args.checkpoint)
    if args.make_space:
        make_space(checkpoint, args.make_space)
        return 0
    print(f"Loading {checkpoint} ...", flush=True)
    serve(build(Page(checkpoint, args.device, args.amp)), args.host, args.port)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code; faults are one sentence each, on stderr."""
    args = build_parser().parse_args(argv)
    return cli.run_program("app.py", lambda: start(args), "use a smaller model, or --device cpu")


if __name__ == "__main__":
    raise SystemExit(main())
