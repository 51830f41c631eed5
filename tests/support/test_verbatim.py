"""What stands word for word in another text."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import PLAY

from support.verbatim import LEAST, Verbatim, pieces

TEXT = PLAY.read_text(encoding="utf-8")


def covered_pieces(source: str, text: str) -> list[str]:
    return [piece for piece, is_known in pieces(text, Verbatim(source).covers(text)) if is_known]


@pytest.mark.parametrize("length", [LEAST, LEAST + 1, 300])
def test_a_piece_of_the_text_is_found_whole_and_nothing_beside_it(length):
    known = TEXT[1000 : 1000 + length]
    assert covered_pieces(TEXT, f"\u2603\u2603{known}\u2603 and so on") == [known]


def test_a_piece_that_is_too_short_does_not_count():
    assert covered_pieces(TEXT, f"\u2603{TEXT[1000 : 1000 + LEAST - 1]}\u2603") == []


def test_two_pieces_with_a_word_between_them_are_two():
    first = TEXT[:50]
    second = TEXT[2000:2060]
    assert covered_pieces(TEXT, f"{first}\u2603{second}") == [first, second]


def test_the_first_and_the_last_piece_of_the_text_are_found():
    assert covered_pieces(TEXT, TEXT[:LEAST]) == [TEXT[:LEAST]]
    assert covered_pieces(TEXT, TEXT[-LEAST:]) == [TEXT[-LEAST:]]


def test_one_other_letter_in_the_middle_is_seen():
    changed = TEXT[:60] + "\u2603" + TEXT[61:120]
    assert covered_pieces(TEXT, changed) == [TEXT[:60], TEXT[61:120]]


def test_any_characters_can_be_looked_up():
    text = "\U0001f642\ud800e\u0301" * 20
    assert covered_pieces(text, text) == [text]


@pytest.mark.parametrize(("source", "text"), [("", TEXT[:99]), (TEXT, ""), ("", ""), ("short", "short")])
def test_where_there_is_too_little_nothing_is_found(source, text):
    covered = Verbatim(source).covers(text)
    assert covered.shape == (len(text),)
    assert not covered.any()


def test_pieces_put_together_are_the_text():
    covered = np.array([True, True, False, True, False, False])
    assert pieces("abcdef", covered) == [("ab", True), ("c", False), ("d", True), ("ef", False)]
    assert pieces("", np.zeros(0, dtype=bool)) == []
