"""What a run reads: a text, or a stream of documents. What only streams need is loaded only for them. `config` is
train.py's TrainConfig."""

from __future__ import annotations

from collections.abc import Iterator

from support.text import Corpus, input_problems, load_text
from support.tokenizer import Tokenizer, tokenizer_problems


def problems(config) -> Iterator[tuple[str, str]]:
    """Yields (settings, what to do about them)."""
    if config.dataset or config.val_dataset or config.val_documents:
        from support import stream

        yield from stream.problems(config)
    else:
        for problem in input_problems(config.input_file):
            yield "input_file", problem
    for problem in tokenizer_problems(config.tokenizer):
        yield "tokenizer", problem


def open_corpus(config, write_cache: bool = True) -> tuple[Tokenizer, Corpus]:
    """The tokenizer, and what to train on. Raises UsageError, of a stream also RunError."""
    if config.dataset:
        from support import stream

        return stream.open_dataset(config)
    return load_text(config.input_file, config.tokenizer, config.cache_dir, write_cache)
