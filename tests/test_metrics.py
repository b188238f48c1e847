"""Scores against the packages and formulas they claim to be."""

from __future__ import annotations

import pytest
import sacrebleu
from rouge_score import rouge_scorer

from util.metrics import bleu, rouge, split_sentences, squad

PREDICTIONS = ["The cat sat on the mat.", "A library for C. It is small."]
REFERENCES = ["The cat is on the mat.", "A small library for C. It is free."]


def test_bleu_is_sacrebleu():
    scores = bleu(PREDICTIONS, REFERENCES)
    assert scores["bleu"] == sacrebleu.BLEU().corpus_score(PREDICTIONS, [REFERENCES]).score
    assert scores["chrf"] == sacrebleu.CHRF().corpus_score(PREDICTIONS, [REFERENCES]).score


def test_rouge_is_rouge_score():
    scorer = rouge_scorer.RougeScorer(["rouge2", "rougeLsum"], use_stemmer=True)
    expected = scorer.score("A small library for C.\nIt is free.", "A library for C.\nIt is small.")
    scores = rouge(PREDICTIONS[1:], REFERENCES[1:])
    assert scores["rougeLsum"] == pytest.approx(100 * expected["rougeLsum"].fmeasure)
    assert scores["rouge2"] == pytest.approx(100 * expected["rouge2"].fmeasure)


def test_sentences_are_split_offline():
    assert split_sentences("One. Two! Three? 3.5 four") == "One.\nTwo!\nThree?\n3.5 four"


@pytest.mark.parametrize(
    ("prediction", "reference", "exact", "f1"),
    [
        ("The Eiffel Tower!", "eiffel tower", 100, 100),
        ("in Paris, France", "Paris", 0, 50),
        ("London", "Paris", 0, 0),
        ("", "Paris", 0, 0),
        ("The", "a", 100, 0),
    ],
)
def test_squad_scores(prediction, reference, exact, f1):
    assert squad([prediction], [reference]) == {"exact_match": exact, "f1": pytest.approx(f1)}
