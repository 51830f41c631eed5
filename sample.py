"""Text from a checkpoint, on the terminal, as it is written.

    python sample.py --prompt "TILDA:" --num_samples 3       # of out/checkpoints/best.pt
    python sample.py --checkpoint out_demo/checkpoints/best.pt --temperature 0
    echo "TILDA:" | python sample.py --prompt -              # from stdin
    python sample.py --prompt @scene.txt --json              # from a file, for a program

The samples are written at once: the first is shown token by token, the others when it is done. The same command gives
the same text on the same machine; the random numbers of sample i come from seed + i. What was counted and timed goes to
stderr.

Exit codes: 0 written, 1 the checkpoint can't be used, 2 unusable flags, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import train

RULE = "-" * 40


@dataclass(frozen=True)
class Request:
    """What to write."""

    prompt: str = ""
    num_samples: int = 1
    max_new_tokens: int = 200
    temperature: float = 0.9
    top_k: int = 50
    top_p: float = 1.0
    seed: int = 1337

    def problems(self) -> dict[str, str]:
        """{field: what is wrong with it, and what would be right}."""
        found = {}
        for name, (low, high, kind) in BOUNDS.items():
            value = getattr(self, name)
            if not isinstance(value, (int, float) if kind is float else int) or isinstance(value, bool):
                found[name] = f"{name} {value!r} isn't a {'whole ' * (kind is int)}number: use one from {low} to {high}"
            elif not low <= value <= high:  # so is "not a number"
                found[name] = f"{name} {value} is out of bounds: use {low} to {high}"
        return found


# (least, most, type)
BOUNDS = {
    "num_samples": (1, 100, int),
    "max_new_tokens": (1, 100_000, int),
    "temperature": (0.0, 100.0, float),
    "top_k": (0, 1_000_000, int),
    "top_p": (0.01, 1.0, float),
    "seed": (0, 2**63 - 1, int),
}


class PackedLinear(torch.nn.Module):
    """torch.nn.Linear for few rows on a CPU, with its matrix in oneDNN's own order: otherwise each call reorders it,
    which takes as long as the product. The two operators are those of torch.compile's frozen models."""

    def __init__(self, linear: torch.nn.Linear):
        """Raises RuntimeError, AttributeError or TypeError where torch lacks the operators."""
        super().__init__()
        self.bias, self.dtype = linear.bias, linear.weight.dtype
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)
        self(linear.weight.new_zeros(1, linear.in_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.packed, self.bias, "none", [], "")


def prepared(linear: torch.nn.Linear, dtype: torch.dtype, on_cpu: bool) -> torch.nn.Module:
    """The same product, with all that can be done before it done."""
    own = torch.nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    for name, p in linear.named_parameters():
        setattr(own, name, torch.nn.Parameter(p.detach().to(dtype), requires_grad=False))
    with contextlib.suppress(RuntimeError, AttributeError, TypeError):
        return PackedLinear(own) if on_cpu else own
    return own


class Writer:
    """A model from a checkpoint, which continues prompts."""

    def __init__(self, path: str | Path, device: str = "auto", amp: str = "auto"):
        """Raises train.RunError for a checkpoint that can't be used, train.UsageError for its tokenizer."""
        checkpoint = train.load_checkpoint(path, lazy=True)
        try:
            self.model = train.GPT(train.GPTConfig(**checkpoint["model_config"]))
            self.model.load_state_dict(checkpoint["model"])
            self.tokenizer = train.saved_tokenizer(checkpoint["tokenizer"])
        except (KeyError, TypeError, ValueError, RuntimeError) as e:
            raise train.RunError(f"checkpoint {path} lacks what a model needs ({e!r:.80}): use another one") from e
        self.path, self.step, self.loss = str(path), checkpoint["step"], checkpoint.get("loss")
        known = self.tokenizer.knows
        self.nothing = "\n" if known("\n") else self.tokenizer.vocabulary[0]  # what an empty prompt stands for
        prompt = checkpoint["config"].get("prompt") or "\n"
        self.trained_prompt = prompt if known(prompt) else self.nothing
        self.runtime = train.start_runtime(train.TrainConfig(device=device, amp=amp))
        self.model.to(self.runtime.device).eval()
        train.check_causality(self.model, self.runtime, min(64, self.model.config.block_size))
        self.context = self.model.config.block_size
        self.parameters = sum(self.model.parameter_counts().values())
        self.prepare_matrices()

    def prepare_matrices(self) -> None:
        """Gives each matrix, once, the type that autocast would cast it to for every token anew, and on a CPU the order
        that oneDNN would bring it into. The embedding stays as it is, so the head gets a copy of its own."""
        dtype, on_cpu = self.runtime.amp_dtype or torch.float32, self.runtime.device.type == "cpu"
        for parent in list(self.model.modules()):
            for name, module in list(parent.named_children()):
                if isinstance(module, torch.nn.Linear):
                    setattr(parent, name, prepared(module, dtype, on_cpu))

    def encode(self, prompt: str) -> tuple[list[int], int]:
        """(token ids that fit into the context, how many were cut off before them); an empty prompt is a line break.
        Raises train.UsageError for a character that a model of characters doesn't know."""
        ids = self.tokenizer.encode(prompt or self.nothing)
        return ids[-self.context :], max(0, len(ids) - self.context)

    def write(self, request: Request) -> Iterator[list[str]]:
        """Yields, token by token, the text by which each sample grew; a character comes when it is whole."""
        ids, _ = self.encode(request.prompt)
        rows = torch.tensor([ids] * request.num_samples, device=self.runtime.device)
        generators = [torch.Generator().manual_seed((request.seed + i) % 2**63) for i in range(request.num_samples)]
        decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in generators]
        tokens = self.model.stream(
            rows, request.max_new_tokens, request.temperature, request.top_k, generators, top_p=request.top_p
        )
        while True:
            with self.runtime.autocast():  # not round the yield: who reads may compute something else in between
                fresh = next(tokens, None)
            if fresh is None:
                return
            pieces = (self.tokenizer.decode_bytes([token]) for token in fresh[:, 0].tolist())
            yield [decoder.decode(piece) for decoder, piece in zip(decoders, pieces, strict=True)]


# ======================================================================================================================
# Command line
# ======================================================================================================================


def build_parser() -> argparse.ArgumentParser:
    summary, examples = train.help_texts(__doc__)
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "sample.py", "python sample.py [--FLAG VALUE ...]", summary, examples, formatter_class=style, allow_abbrev=False
    )
    request = Request()
    parser.add_argument("--checkpoint", default="out/checkpoints/best.pt", help="a best.pt or last.pt of train.py")
    parser.add_argument(
        "--prompt",
        help=r"what to continue; \n is a line break, - reads stdin, @NAME a file (default: the prompt of training)",
    )
    helps = {
        "num_samples": "how many continuations",
        "max_new_tokens": "tokens in a continuation",
        "temperature": "flattens (over 1) or sharpens (under 1) the choice; 0: always the likeliest token",
        "top_k": "sample from the k likeliest tokens (0: from all)",
        "top_p": "of these, from the likeliest that together have this probability",
        "seed": "the same seed gives the same text",
    }
    for name, text in helps.items():
        default = getattr(request, name)
        parser.add_argument(f"--{name}", type=BOUNDS[name][2], default=default, help=f"{text} (default: {default})")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="(default: auto)")
    parser.add_argument("--amp", default="auto", choices=("auto", "fp16", "bf16", "off"), help="(default: auto)")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the text, for programs")
    return parser


def read_prompt(text: str) -> str:
    """Raises train.UsageError for a file that can't be read."""
    name = "stdin" if text == "-" else text[1:]
    if text != "-" and not text.startswith("@"):
        return train.unescape(text.removeprefix("\\") if text.startswith("\\@") else text)
    try:
        data = sys.stdin.buffer.read() if text == "-" else Path(name).read_bytes()
        return train.decode_text(data, name)  # line breaks as in training
    except AttributeError:
        raise train.UsageError("prompt: there is no stdin: give the prompt itself") from None
    except (OSError, ValueError) as e:
        remedy = r"; a prompt that begins with @ is written \@" if text != "-" else ""
        raise train.UsageError(f"prompt: {name} can't be read ({getattr(e, 'strerror', e)}){remedy}") from None


def emit(text: str) -> None:
    """Writes to stdout as far as the terminal has the characters. Raises BrokenPipeError if nobody reads any more."""
    if sys.stdout is None:
        raise BrokenPipeError
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def say(text: str) -> None:
    with contextlib.suppress(OSError, AttributeError):  # stderr may be gone, or None
        print(f"sample.py: {text}".encode(errors="backslashreplace").decode(), file=sys.stderr, flush=True)


def run(writer: Writer, request: Request, as_json: bool) -> int:
    """Writes the samples to stdout and returns the exit code."""
    _, cut = writer.encode(request.prompt)
    if cut:
        say(f"the prompt is {cut:,} tokens longer than the context: only its last {writer.context:,} are read")
    texts, count, code, start = [request.prompt] * request.num_samples, 0, 0, time.monotonic()
    try:
        if not as_json:
            emit(request.prompt)
        for pieces in writer.write(request):
            count += len(pieces)
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
            if not as_json:
                emit(pieces[0])
    except KeyboardInterrupt:
        code = 130
    seconds = time.monotonic() - start
    if as_json:
        samples = [{"seed": request.seed + i, "text": text[len(request.prompt) :]} for i, text in enumerate(texts)]
        about = {"checkpoint": writer.path, "step": writer.step, "request": dataclasses.asdict(request)}
        about |= {"prompt_tokens_cut": cut, "samples": samples, "tokens": count, "seconds": round(seconds, 3)}
        emit(json.dumps(about | {"interrupted": bool(code)}) + "\n")
    else:
        emit("".join(f"\n{RULE}\n{text}" for text in texts[1:]) + "\n")
    say(f"{count:,} tokens in {seconds:.1f} s, {count / max(seconds, 1e-9):.0f} tok/s" + ", interrupted" * bool(code))
    return code


def main(argv: Sequence[str] | None = None) -> int:
    args = vars(build_parser().parse_args(argv))
    path, prompt, as_json, *where = (args.pop(k) for k in ("checkpoint", "prompt", "json", "device", "amp"))
    problems = list(Request(**args).problems().values())
    problems += [remedy for _, remedy in train.TrainConfig(steps=1, device=where[0], amp=where[1]).conflicts()]
    try:
        try:
            prompt = prompt if prompt is None else read_prompt(prompt)
        except train.UsageError as e:
            problems += e.problems
        if problems:
            raise train.UsageError(*problems)
        writer = Writer(path, *where)
        request = Request(prompt=(writer.trained_prompt if prompt is None else prompt) or writer.nothing, **args)
        return run(writer, request, as_json)
    except train.UsageError as e:
        say("\nsample.py: ".join(e.problems))
        return 2
    except train.RunError as e:
        say(str(e))
    except (RuntimeError, MemoryError) as e:
        if not train.out_of_memory(e):
            raise
        say("the memory is full: lower --num_samples or --max_new_tokens")
    except BrokenPipeError:  # whoever read it has enough
        sys.stdout = None
        return 0
    except KeyboardInterrupt:
        say("interrupted before the first token")
        return 130
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
