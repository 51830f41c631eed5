"""Everything that needs a GPU, tried, timed and written down by one command: is training right there, and how fast?

    python benchmarks/gpu_check.py                             # on CUDA or MPS: up to 8 minutes
    python benchmarks/gpu_check.py --only logits kill          # these parts alone
    python benchmarks/gpu_check.py --device cpu --small        # tries the command itself, without a GPU

Each part is a process of its own with a time limit: one that fails or hangs costs no other. What is cheap and matters
most comes first; a part that no time is left for is listed as not tried. Prints a Markdown table as it goes, and leaves
it in a file beside one in JSON. Exit codes: 0 all parts that were tried passed, 1 one failed, 2 unusable flags.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import gpu_parts
import gpu_runs
import gpu_speed
from common import Failed, parser, print_header, print_row
from gpu_kit import Check, NotHere

from support.cli import RunError, UsageError, run_program

HEADER = ("part", "result", "seconds", "what was found")


@dataclass(frozen=True)
class Part:
    """One row of the table."""

    name: str
    what: str
    function: Callable[..., dict]
    takes: float  # seconds, about, on an H100
    arguments: tuple = ()


def speed(name: str, peer: str, batch_size: int, seq_len: int, takes: float) -> Part:
    """A row of throughput.py."""
    what = f"{peer}, {batch_size} x {seq_len} tokens a step"
    arguments = (peer, batch_size, seq_len)
    return Part(f"throughput-{name}-{batch_size}x{seq_len}", what, gpu_speed.throughput, takes, arguments)


COMPILED = "plain loop, bf16 autocast, compiled"
HF = "transformers Trainer, bf16"
PARTS = [
    Part("logits", "logits beside transformers', relative to fp32", gpu_parts.logits, 14),
    Part("causality", "no token sees a later one", gpu_parts.causality, 5),
    Part("scaler", "the loss scaler meets an overflow", gpu_parts.scaler, 5),
    Part("losses", "30 losses beside a CPU's in fp32: widest gap, nats", gpu_parts.losses, 10),
    Part("waits", "a step waits for nothing", gpu_parts.waits, 5, (False,)),
    Part("newton-schulz", "Muon's Newton-Schulz beside fp32: relative gap", gpu_parts.newton_schulz, 5),
    Part("across", "fp16 on the device, then a CPU, then the device", gpu_runs.across, 6),
    Part("nccl", "one process over NCCL", gpu_runs.nccl, 8, ("ddp",)),
    Part("nccl-fsdp", "one process over NCCL, fsdp", gpu_runs.nccl, 8, ("fsdp",)),
    Part("save-bits", "a save in the background beside one that is waited for", gpu_runs.save_bits, 10),
    Part("kill", "kill -9, then --resume", gpu_runs.kill, 12),
    Part("torchrun", "torchrun --nproc_per_node 1", gpu_runs.torchrun, 15),
    Part("compiled", "a step waits for nothing, compiled", gpu_parts.waits, 30, (True,)),
    Part("sampling", "text, token by token", gpu_speed.sample_speed, 10),
    Part("memory", "peak memory and speed by batch size", gpu_speed.memory, 20),
    speed("bf16", "train.py", 64, 1024, 10),
    speed("fp16", "train.py --amp fp16", 64, 1024, 10),
    speed("bf16", "train.py", 8, 256, 6),
    speed("fp16", "train.py --amp fp16", 8, 256, 6),
    speed("transformers", HF, 64, 1024, 20),
    speed("transformers", HF, 8, 256, 15),
    Part("save-cost", "what a save costs training, seconds", gpu_speed.save_cost, 20),
    speed("bf16-compiled", "train.py --compile", 64, 1024, 45),
    speed("plain-compiled", COMPILED, 64, 1024, 45),
    speed("fp16-compiled", "train.py --amp fp16 --compile", 64, 1024, 45),
    speed("bf16-compiled", "train.py --compile", 8, 256, 45),
    speed("plain-compiled", COMPILED, 8, 256, 45),
    speed("fp16-compiled", "train.py --amp fp16 --compile", 8, 256, 45),
    Part("demo", "--preset demo to a proven loss", gpu_runs.preset, 20, ("demo",)),
    Part("shakespeare", "--preset shakespeare to a proven loss", gpu_runs.preset, 120, ("shakespeare",)),
]


# ---- one part, in a process of its own ----


def work(part: Part, check: Check, folder: str) -> None:
    """What the process does: the part's answer goes to answer.json, its words to words.txt."""
    if hasattr(os, "setsid"):
        os.setsid()  # so that it can be ended together with what it starts
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with open(Path(folder, "words.txt"), "w") as words:
        os.dup2(words.fileno(), 1)
        os.dup2(words.fileno(), 2)
    try:
        answer = {"figures": part.function(check, *part.arguments)}
    except NotHere as e:
        answer = {"not here": str(e)}
    except (Exception, SystemExit) as e:
        traceback.print_exc()
        answer = {"failed": sentence(e)}
    Path(folder, "answer.json").write_text(json.dumps(answer), encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a thread of what was tried may still wait for something


def sentence(e: BaseException) -> str:
    """What an exception says, in a line; with its name, unless it was made to carry a sentence."""
    said = str(e).strip().splitlines() or [repr(e)]
    if isinstance(e, (Failed, AssertionError)):
        return said[0]
    return f"{type(e).__name__}: {said[0]}"


def try_apart(part: Part, check: Check, seconds: float) -> dict:
    """The part's `figures`; or why it is `not here`, or `failed`; or that it was `cut` off after so many seconds."""
    sys.stdout.flush()  # what a fork finds unwritten, it would write too
    with tempfile.TemporaryDirectory(dir=check.folder) as folder:
        check = dataclasses.replace(check, folder=folder)
        process = multiprocessing.get_context(check.start).Process(target=work, args=(part, check, folder))
        process.start()
        try:
            process.join(seconds)
            ended = process.exitcode is not None
        finally:
            end(process)
        words = last_line(Path(folder, "words.txt"))
        if not ended:
            return {"cut": words}
        if process.exitcode:
            return {"failed": f"ended with {process.exitcode}; its last words: {words or 'none'}"}
        return json.loads(Path(folder, "answer.json").read_text(encoding="utf-8"))


def end(process: multiprocessing.Process) -> None:
    """Ends a process, and what it started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def last_line(path: Path) -> str:
    """Of a text that a process may have been about to write."""
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1].strip() if lines else ""


# ---- all of them ----


def try_all(parts: Sequence[Part], check: Check, end_at: float, slower: float) -> Iterator[dict]:
    """Tries one after the other until the time is over. Yields a row for each."""
    for part in parts:
        yield try_one(part, check, end_at - time.monotonic(), slower)


def try_one(part: Part, check: Check, left: float, slower: float) -> dict:
    """A row: name, what, result (passed, failed or not tried), seconds, figures, and why where it isn't passed."""
    row = {"name": part.name, "what": part.what, "result": "not tried", "seconds": 0.0, "figures": {}, "why": ""}
    if left < part.takes * slower / 2:
        return {**row, "why": "no time left"}
    limit = slower * (3 * part.takes + 20)
    begin = time.monotonic()
    found = try_apart(part, check, min(limit, left))
    row["seconds"] = round(time.monotonic() - begin, 1)
    if "figures" in found:
        return {**row, "result": "passed", "figures": found["figures"]}
    if "not here" in found:
        return {**row, "why": found["not here"]}
    if "cut" in found and left < limit:
        return {**row, "why": "not enough time was left"}
    if "cut" in found:
        why = f"no end within {limit:.0f} seconds; its last words: {found['cut'] or 'none'}"
        return {**row, "result": "failed", "why": why}
    return {**row, "result": "failed", "why": found["failed"]}


def cells(row: dict) -> list[str]:
    """A row of the table."""
    figures = [f"{name}: {shown(value)}" for name, value in row["figures"].items()]
    what = f"{row['name']}: {row['what']}"
    return [what, row["result"], f"{row['seconds']:.1f}", row["why"] or "; ".join(figures)]


def shown(value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def markdown(record: dict) -> str:
    """The whole record as a page."""
    told = [f"{name} {value}" for name, value in record["machine"].items()]
    lines = [f"# {record['command']}", "", f"{record['started']}, {record['seconds']:.0f} s: {', '.join(told)}", ""]
    for row in (HEADER, ["---"] * len(HEADER), *map(cells, record["parts"])):
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return "\n".join(lines) + "\n"


# ---- command line ----


def chosen(only: Sequence[str], skip: Sequence[str]) -> list[Part]:
    """The parts that --only and --skip leave. `throughput` stands for all whose names begin so. Raises UsageError."""

    def named(part: Part, words: Sequence[str]) -> bool:
        return any(part.name == word or part.name.startswith(word + "-") for word in words)

    for word in (*only, *skip):
        if not any(named(part, [word]) for part in PARTS):
            raise UsageError(f"there is no part {word}: use {', '.join(part.name for part in PARTS)}")
    return [part for part in PARTS if (not only or named(part, only)) and not named(part, skip)]


def find_machine(check: Check) -> tuple[Check, dict]:
    """The check with its device and its way to start processes, and what the device is. Raises UsageError where there
    is none, RunError where it can't be used."""
    # A fork has torch already, which takes seconds to import. This process never touches the GPU, so it can.
    starts = ("fork", "spawn") if sys.platform == "linux" else ("spawn",)
    part = Part("machine", "", gpu_parts.describe, 20)
    for device in ("cuda", "mps") if check.device == "auto" else (check.device,):
        for start in starts:
            this = dataclasses.replace(check, device=device, start=start)
            found = try_apart(part, this, 120)
            if "figures" in found:
                return this, found["figures"]
            if "not here" in found:
                break
        else:
            raise RunError(f"device {device} is there, but can't be used: {found}")
    if check.device == "auto":
        raise UsageError("there is neither CUDA nor MPS here: use --device cpu --small to try the command itself")
    raise UsageError(f"{found['not here']}: use --device auto")


def check_all(args: argparse.Namespace, command: str) -> int:
    """The whole program, once its flags are read."""
    begin = time.monotonic()
    parts = chosen(args.only, args.skip)
    if args.device == "cpu" and not args.small:
        raise UsageError("a CPU takes hours for all of it: add --small")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was started is ended
    with tempfile.TemporaryDirectory(prefix="gpu_check_", ignore_cleanup_errors=True) as folder:
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking whether there is CUDA leaves forks usable
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", folder + "/inductor")  # what is compiled once is there for all
        keep = str(Path(args.keep).resolve())
        check, machine = find_machine(Check(args.device, args.small, "", folder, keep))
        record = {"command": command, "started": time.strftime("%Y-%m-%d %H:%M:%S %z"), "seconds": 0.0}
        record |= {"machine": machine, "parts": []}
        print(f"{', '.join(f'{name} {value}' for name, value in machine.items())}\n")
        print_header(*HEADER)
        for row in try_all(parts, check, begin + 60 * args.minutes, args.slower):
            print_row(*cells(row))
            record["parts"].append(row)
            record["seconds"] = round(time.monotonic() - begin, 1)
            write(record, args.json)  # each time, so that an end from outside leaves what is known
    return int(any(row["result"] == "failed" for row in record["parts"]))


def write(record: dict, path: Path) -> None:
    """As JSON, and beside it as a page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(record), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    flags = parser(__file__, __doc__)
    flags.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="(default: auto)")
    flags.add_argument("--small", action="store_true", help="models so small that a CPU takes seconds")
    flags.add_argument("--minutes", type=float, default=8.0, help="for all parts together (default: 8)")
    flags.add_argument("--slower", type=float, default=1.0, help="than an H100, so many times: for the time limits")
    place = Path("out", "gpu_check.json")
    flags.add_argument("--json", type=Path, default=place, help=f"and beside it the table, in .md (default: {place})")
    flags.add_argument("--keep", default="out/gpu_check", help="for the runs of presets (default: out/gpu_check)")
    names = ", ".join(part.name for part in PARTS)
    flags.add_argument("--only", nargs="+", default=[], metavar="PART", help=f"of: {names}")
    flags.add_argument("--skip", nargs="+", default=[], metavar="PART", help="all but these")
    args = flags.parse_args(argv)
    words = sys.argv[1:] if argv is None else list(argv)
    command = shlex.join(["python", "benchmarks/gpu_check.py", *words])
    return run_program("gpu_check.py", lambda: check_all(args, command), "close other programs")


if __name__ == "__main__":
    raise SystemExit(main())
