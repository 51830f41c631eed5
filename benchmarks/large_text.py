"""Does memory grow with the text? Trains a small GPT-2 for a few steps on texts of several sizes, made here.

    python benchmarks/large_text.py --megabytes 10 100 1000
    python benchmarks/large_text.py --megabytes 1              # a first try: some seconds

For each size, the first start, which tokenizes, and a second one, which finds the tokens in the cache: seconds, and the
most memory that the process ever had (its maximum resident set, mapped files included). Linux and macOS.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from common import SMALL, apart, parser, peak_memory, print_header, print_row, run_train

FLAGS = ["--optimizer", "adamw", "--steps", "20", "--num_prompts", "0", "--target_loss", "0", "--overwrite"]


def write_text(path: Path, megabytes: int) -> None:
    """Lines of words that aren't any language's, some with accents, in paragraphs; the same each time."""
    draw = random.Random(megabytes)
    syllables = [a + b for a in "bdfghklmnprstvwz" for b in "aeiouéäø"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(20_000)]
    with open(path, "w", encoding="utf-8", newline="\n") as f:
        while f.tell() < megabytes * 10**6:
            for _ in range(200):
                line = " ".join(draw.choices(words, k=draw.randint(4, 14)))
                f.write(line.capitalize() + ".\n")
                if draw.random() < 0.1:
                    f.write("\n")


def memory_of_run(flags: Sequence[str]) -> int:
    """Trains, and returns the most memory of this process."""
    run_train(flags)
    return peak_memory()


def start(folder: Path, tokenizer: str) -> str:
    """Two cells of the table: seconds, and the most memory, of one run on folder/text.txt."""
    places = ["--input_file", f"{folder}/text.txt", "--out_dir", f"{folder}/out", "--cache_dir", f"{folder}/cache"]
    begin = time.perf_counter()
    memory = apart(memory_of_run, [*SMALL, *FLAGS, *places, "--tokenizer", tokenizer])
    seconds = time.perf_counter() - begin
    return f"{seconds:.1f} s | {memory / 1e6:,.0f} MB"


def main(argv: Sequence[str] | None = None) -> None:
    flags = parser(__file__, __doc__)
    flags.add_argument("--megabytes", type=int, nargs="+", default=[10, 100, 1000], help="(default: 10 100 1000)")
    flags.add_argument("--tokenizer", default="gpt2", choices=("gpt2", "char"), help="(default: gpt2)")
    args = flags.parse_args(argv)
    print_header("text", "first start", "most memory", "second start", "most memory")
    for megabytes in args.megabytes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_text(folder / "text.txt", megabytes)
            first = start(folder, args.tokenizer)
            second = start(folder, args.tokenizer)
        print_row(f"{megabytes:,} MB", first, second)


if __name__ == "__main__":
    main()
