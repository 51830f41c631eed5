"""Train a byte-level BPE tokenizer on a text, for train.py's --tokenizer.

    python tools/train_tokenizer.py --vocab_size 4096 --out tokenizer.json    # on data/input.txt: a second
    python train.py --tokenizer tokenizer.json --steps 1000 --out_dir out_own
    python tools/train_tokenizer.py --input_file texts/ --input_file more.txt --vocab_size 16384 --out tokenizer.json

Texts are read and cut into words as in training GPT-2: any text can be encoded, and comes back as it was. The first 256
tokens of the vocabulary are the bytes, behind the one that ends a text.

Exit codes: 0 written, 1 a file that can't be written, 2 unusable flags or input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import tokenizers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from support import cli, text  # noqa: E402
from support.cli import UsageError  # noqa: E402
from support.files import atomic_write  # noqa: E402
from support.tokenizer import END_OF_TEXT, MOST  # noqa: E402

LEAST = 257  # the bytes, and the end of a text


def train(files: Sequence[Path], vocab_size: int) -> tokenizers.Tokenizer:
    """Sennrich et al. 2016: begins with the bytes, and merges the most frequent pair of tokens over and over. Raises
    UsageError for a file that is no text."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)  # by GPT-2's pattern
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),  # also bytes that the text doesn't have
        show_progress=bool(sys.stderr) and sys.stderr.isatty(),
    )
    pieces = text.cut_between_words(text.read_texts(files, text.Reading()))
    bpe.train_from_iterator((piece for piece in pieces if piece), trainer)
    return bpe


def build_parser() -> argparse.ArgumentParser:
    usage = "python tools/train_tokenizer.py --vocab_size N --out FILE [--input_file FILE ...]"
    parser = cli.program_parser("train_tokenizer.py", usage, __doc__)
    files = "UTF-8 text, or a folder of .txt files; given several times, all are read (default: data/input.txt)"
    parser.add_argument("--input_file", action="append", help=files)
    parser.add_argument("--vocab_size", type=int, required=True, help=f"tokens, from {LEAST} to {MOST:,}")
    parser.add_argument("--out", type=Path, required=True, help="the tokenizer.json to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    return parser


def start(args: argparse.Namespace) -> int:
    """Does what the command line says. Raises UsageError or OSError."""
    problems = text.input_problems(args.input_file or str(text.CORPUS_PATH))
    if not LEAST <= args.vocab_size <= MOST:
        problems.append(f"vocab_size {args.vocab_size} is out of bounds: use {LEAST} to {MOST:,}")
    if args.out.is_dir():
        problems.append(f"out {args.out} is a folder: name a file in it, as {args.out / 'tokenizer.json'}")
    elif args.out.exists() and not args.overwrite:
        problems.append(f"out {args.out} exists: add --overwrite to replace it, or name another")
    if problems:
        raise UsageError(*problems)
    bpe = train(text.input_files(args.input_file or str(text.CORPUS_PATH)), args.vocab_size)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.out) as f:
        f.write(bpe.to_str(pretty=True).encode())
    size = bpe.get_vocab_size()
    if size < args.vocab_size:
        print(f"The text has no more pairs to merge than for {size:,} tokens", flush=True)
    print(f"Written: {args.out}, {size:,} tokens. Train with it: python train.py --tokenizer {args.out}", flush=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code; faults are one sentence each, on stderr."""
    args = build_parser().parse_args(argv)
    return cli.run_program("train_tokenizer.py", lambda: start(args), "give less text, or a smaller --vocab_size")


if __name__ == "__main__":
    raise SystemExit(main())
