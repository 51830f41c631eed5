"""Whatever is typed: a configuration, or a sentence for each problem. Never a traceback."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

import train
from support import cli
from support.cli import RunError, UsageError
from support.settings import from_flags

FLAGS = [f"--{name}" for name in cli.fields_of(train.TrainConfig)]
WORDS = [*FLAGS, "--no-compile", "-h2", "--", "-", "=", "--lr=", "--steps=-0"]
NUMBERS = ["0", "-1", "1e400", "nan", "inf", "9" * 400, "0x10"]
TEXTS = ["", " ", "auto", "demo", "\0", "\ud800", "é", "{}", "../..", "*"]
ANYTHING = st.sampled_from(WORDS) | st.sampled_from(NUMBERS) | st.sampled_from(TEXTS) | st.text(max_size=5)


@example(words=["--out_dir", "\0"])
@example(words=["--n_embd", "9" * 400])
@example(words=["--init_from", "9" * 400])  # too long for the name of a file
@settings(max_examples=200, deadline=None)
@given(words=st.lists(ANYTHING, max_size=8))
def test_random_flags_give_no_traceback(words):
    try:
        config = from_flags(train.TrainConfig, words)
    except (UsageError, RunError) as e:
        assert str(e).strip()
    else:
        config.validate()
