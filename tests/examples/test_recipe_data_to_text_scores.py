"""BLEU and ROUGE-L by their libraries."""

import math

import pytest

pytest.importorskip("sacrebleu")
pytest.importorskip("rouge_score")

import data_to_text

REFERENCE = "the old mill is a cheap pub near the station"


def test_a_reference_itself_has_all_points():
    found = data_to_text.scores([REFERENCE, "a b c d"], [["other words", REFERENCE], ["a b c d"]])
    assert found == pytest.approx({"bleu": 100, "rougeL": 100})


def test_both_scores_in_closed_form():
    """Of 5 words, 4 are right: n-gram precisions 4/5, 3/4, 2/3, 1/2, no brevity penalty; F of the subsequence 4/5."""
    found = data_to_text.scores(["a b c d x"], [["a b c d e"]])
    assert found["bleu"] == pytest.approx(100 * math.prod([4 / 5, 3 / 4, 2 / 3, 1 / 2]) ** 0.25)
    assert found["rougeL"] == pytest.approx(80)


def test_the_best_reference_counts_where_texts_have_different_numbers_of_them():
    found = data_to_text.scores(["a b c d", "e f g h"], [["x y", "a b c d", "z"], ["e f g h"]])
    assert found == pytest.approx({"bleu": 100, "rougeL": 100})
