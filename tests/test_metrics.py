"""Scores against the packages and formulas they claim to be."""

from __future__ import annotations

import pytest
import sacrebleu
from rouge_score import rouge_scorer
from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest

from util.metrics import METRICS, compute_scores, split_sentences
from util.significance import confidence_intervals, paired_bootstrap

PREDICTIONS = ["The cat sat on the mat.", "A library for C. It is small.", "tools to build packages"]
REFERENCES = ["The cat is on the mat.", "A small library for C. It is free.", "tools for building packages"]


def test_bleu_is_sacrebleu():
    scores = compute_scores("translation", PREDICTIONS, REFERENCES)
    assert scores["bleu"] == pytest.approx(sacrebleu.corpus_bleu(PREDICTIONS, [REFERENCES]).score)
    assert scores["chrf"] == pytest.approx(sacrebleu.corpus_chrf(PREDICTIONS, [REFERENCES]).score)
    assert METRICS["bleu"]().signatures["bleu"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp")


def test_a_single_sentence_has_a_bleu():
    score = compute_scores("translation", ["a cat"], ["a cat"])["bleu"]
    assert score == pytest.approx(sacrebleu.sentence_bleu("a cat", ["a cat"]).score) == pytest.approx(100)


def test_rouge_is_rouge_score():
    scorer = rouge_scorer.RougeScorer(["rouge2", "rougeLsum"], use_stemmer=True)
    expected = scorer.score("A small library for C.\nIt is free.", "A library for C.\nIt is small.")
    scores = compute_scores("summarization", PREDICTIONS[1:2], REFERENCES[1:2])
    assert scores["rougeLsum"] == pytest.approx(100 * expected["rougeLsum"].fmeasure)
    assert scores["rouge2"] == pytest.approx(100 * expected["rouge2"].fmeasure)


def test_sentences_are_split_offline():
    assert split_sentences("One. Two! Three? 3.5 four") == "One.\nTwo!\nThree?\n3.5 four"


@pytest.mark.parametrize(
    ("prediction", "references", "exact", "f1"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], 100, 100),
        ("in Paris, France", ["Paris"], 0, 50),
        ("London", ["Paris"], 0, 0),
        ("", ["Paris"], 0, 0),
        ("The", ["a"], 100, 0),
        ("in Paris", ["London", "Paris", "in the city of Paris"], 0, pytest.approx(200 / 3)),
        ("Paris", ["London", "Paris"], 100, 100),
    ],
)
def test_squad_scores(prediction, references, exact, f1):
    scores = compute_scores("question_answering", [prediction], [references])
    assert scores == {"exact_match": exact, "f1": pytest.approx(f1)}


@pytest.mark.parametrize("task", ["translation", "summarization", "question_answering"])
def test_intervals_hold_the_score_and_shrink_with_samples(task):
    small = confidence_intervals(task, PREDICTIONS * 5, REFERENCES * 5)
    large = confidence_intervals(task, PREDICTIONS * 80, REFERENCES * 80)
    for name, score in compute_scores(task, PREDICTIONS * 5, REFERENCES * 5).items():
        assert small[name][0] <= score <= small[name][1]
        assert large[name][1] - large[name][0] <= small[name][1] - small[name][0]


def test_paired_bootstrap_agrees_with_sacrebleu():
    worse = ["The mat.", "A library. It is small.", "tools to build packages"]
    references = REFERENCES * 10
    ours = paired_bootstrap("translation", PREDICTIONS * 10, worse * 10, references)["bleu"]
    systems = [("worse", worse * 10), ("ours", PREDICTIONS * 10)]
    _, results = PairedTest(systems, {"BLEU": BLEU(references=[references])}, None, "bs", n_samples=1000)()
    assert ours["difference"] == pytest.approx(results["BLEU"][1].score - results["BLEU"][0].score)
    assert (ours["p_value"] < 0.05) == (results["BLEU"][1].p_value < 0.05)


def test_paired_bootstrap_of_equal_systems_finds_nothing():
    result = paired_bootstrap("summarization", PREDICTIONS, PREDICTIONS, REFERENCES)["rougeLsum"]
    assert result["difference"] == 0 and result["interval"] == [0, 0] and result["p_value"] == 1
