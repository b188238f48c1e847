"""Scores against the packages and formulas they claim to be."""

from __future__ import annotations

import importlib.util
import random
import re
import string
from collections import Counter

import pytest
import sacrebleu
from real_rows import available, read_rows
from rouge_score import rouge_scorer, scoring
from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest

from util.calibration.consistency import sample_scores
from util.evaluation.metrics import METRICS, compute_scores, make_metric, measure
from util.evaluation.rouge import UnicodeTokenizer, split_sentences
from util.evaluation.significance import confidence_intervals, draw_scores, paired_bootstrap
from util.evaluation.writing import bleu_tokenizer, warn_of_unspaced_text

PREDICTIONS = ["The cat sat on the mat.", "A library for C. It is small.", "tools to build packages"]
REFERENCES = ["The cat is on the mat.", "A small library for C. It is free.", "tools for building packages"]


def test_bleu_is_sacrebleu():
    scores = compute_scores("translation", PREDICTIONS, REFERENCES)
    assert scores["bleu"] == pytest.approx(sacrebleu.corpus_bleu(PREDICTIONS, [REFERENCES]).score)
    assert scores["chrf"] == pytest.approx(sacrebleu.corpus_chrf(PREDICTIONS, [REFERENCES]).score)
    assert METRICS["bleu"](None).signatures["bleu"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp")


def test_a_single_sentence_has_a_bleu():
    score = compute_scores("translation", ["a cat"], ["a cat"])["bleu"]
    assert score == pytest.approx(sacrebleu.sentence_bleu("a cat", ["a cat"]).score) == pytest.approx(100)


def test_rouge_is_rouge_score():
    scorer = rouge_scorer.RougeScorer(["rouge2", "rougeLsum"], use_stemmer=True)
    expected = scorer.score("A small library for C.\nIt is free.", "A library for C.\nIt is small.")
    scores = compute_scores("summarization", PREDICTIONS[1:2], REFERENCES[1:2])
    assert scores["rougeLsum"] == pytest.approx(100 * expected["rougeLsum"].fmeasure)
    assert scores["rouge2"] == pytest.approx(100 * expected["rouge2"].fmeasure)


@pytest.mark.parametrize(
    "sentences",
    [
        ["One.", "Two!", "Three?", "3.5 four"],
        ["Mr. X met Dr. J. Smith of the U.S. Army at 5 p.m. Sunday.", "They left."],
        ['"I have no regrets."', "He said 'no.'", "(It was late.)", "They left."],
        ["Couple only wanted a girl to 'complete their family'", "It was feared ...", "But she was sold."],
        [
            "She lives in the U.S.",
            "It is written in C.",
            "The flight left on Nov. 28 with Lufthansa Inc. and others.",
        ],
    ],
)
def test_sentences_are_split_offline(sentences):
    """At line breaks too, as between the highlights of CNN/DailyMail."""
    assert split_sentences("\n".join(sentences)) == "\n".join(sentences)
    assert split_sentences(" ".join(sentences)).split("\n")[-1] == sentences[-1]


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
    small = confidence_intervals(draw_scores(measure(task, PREDICTIONS * 5, REFERENCES * 5)))
    large = confidence_intervals(draw_scores(measure(task, PREDICTIONS * 80, REFERENCES * 80)))
    for name, score in compute_scores(task, PREDICTIONS * 5, REFERENCES * 5).items():
        assert small[name][0] <= score <= small[name][1]
        assert large[name][1] - large[name][0] <= small[name][1] - small[name][0]


def test_statistics_are_scored_by_another_metric_of_the_kind():
    statistics = make_metric("translation").statistics(PREDICTIONS, REFERENCES)
    expected = compute_scores("translation", PREDICTIONS, REFERENCES)
    assert make_metric("translation").scores(statistics) == expected


def bootstrap(system, baseline):
    return paired_bootstrap(system, draw_scores(system), baseline)


def test_several_references_are_one_but_for_answers():
    predictions, several = ["a small library"], [["the old tool", "a small library"]]
    assert compute_scores("translation", predictions, several)["bleu"] < 100
    assert compute_scores("summarization", predictions, several)["rougeL"] < 100
    assert compute_scores("question_answering", predictions, several)["exact_match"] == 100


def test_paired_bootstrap_agrees_with_sacrebleu():
    worse = ["The mat.", "A library. It is small.", "tools to build packages"]
    references = REFERENCES * 10
    corpora = [measure("translation", texts * 10, references) for texts in (PREDICTIONS, worse)]
    ours = bootstrap(*corpora)["bleu"]
    systems = [("worse", worse * 10), ("ours", PREDICTIONS * 10)]
    _, results = PairedTest(systems, {"BLEU": BLEU(references=[references])}, None, "bs", n_samples=1000)()
    assert ours["difference"] == pytest.approx(results["BLEU"][1].score - results["BLEU"][0].score)
    assert (ours["p_value"] < 0.05) == (results["BLEU"][1].p_value < 0.05)


def test_paired_bootstrap_of_equal_systems_finds_nothing():
    corpus = measure("summarization", PREDICTIONS, REFERENCES)
    result = bootstrap(corpus, corpus)["rougeLsum"]
    assert result["difference"] == 0 and result["interval"] == [0, 0] and result["p_value"] == 1


def noisy(text, seed):
    """What a mediocre system might have written: words lost, swapped and cut short."""
    generator, words = random.Random(seed), text.split()
    kept = [word if generator.random() < 0.9 else word[:3] for word in words if generator.random() < 0.85]
    if len(kept) > 3:
        index = generator.randrange(len(kept) - 1)
        kept[index], kept[index + 1] = kept[index + 1], kept[index]
    return " ".join(kept)


@pytest.mark.slow
@pytest.mark.parametrize("name", available("iwslt2017", "debian_de_en"))
@pytest.mark.parametrize("language", ["de", "en"])
def test_bleu_and_chrf_of_real_rows_are_sacrebleus(name, language):
    references = [row["translation"][language] for row in read_rows(name, 400)]
    predictions = [noisy(text, seed) for seed, text in enumerate(references)]
    predictions[3] = ""
    scores = compute_scores("translation", predictions, references)
    bleu = sacrebleu.corpus_bleu(predictions, [references])
    assert 20 < bleu.score < 90
    assert scores["bleu"] == pytest.approx(bleu.score, rel=1e-12)
    chrf = sacrebleu.corpus_chrf(predictions, [references]).score
    assert scores["chrf"] == pytest.approx(chrf, rel=1e-12)
    metric = METRICS["bleu"](None)
    packages = sacrebleu.BLEU(), sacrebleu.CHRF()
    for package in packages:
        package.corpus_score(predictions, [references])
    assert metric.signatures == {
        "bleu": str(packages[0].get_signature()),
        "chrf": str(packages[1].get_signature()),
    }


SUMMARIES = {
    "samsum": ("dialogue", "summary"),
    "cnn_dailymail": ("article", "highlights"),
    "multi_news": ("document", "summary"),
    "big_patent": ("description", "abstract"),
    "debian_synopsis": ("document", "summary"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", available(*SUMMARIES))
def test_rouge_of_real_rows_is_rouge_scores(name):
    """The first words of each document against its summary; scorer and aggregator of the package."""
    source, target = SUMMARIES[name]
    rows = read_rows(name, 60)
    predictions = [" ".join(row[source].split()[:50]) for row in rows]
    references = [row[target] for row in rows]
    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = rouge_scorer.RougeScorer(kinds, use_stemmer=True)
    aggregator = scoring.BootstrapAggregator(n_samples=300)
    samples = []
    for prediction, reference in zip(predictions, references, strict=True):
        samples.append(scorer.score(split_sentences(reference), split_sentences(prediction)))
        aggregator.add_scores(samples[-1])
    scores, aggregated = compute_scores("summarization", predictions, references), aggregator.aggregate()
    for kind in kinds:
        mean = 100 * sum(sample[kind].fmeasure for sample in samples) / len(samples)
        assert scores[kind] == pytest.approx(mean, rel=1e-12)
        low, middle, high = (100 * part.fmeasure for part in aggregated[kind])
        assert low <= scores[kind] <= high and scores[kind] == pytest.approx(middle, abs=(high - low) / 4)
    assert scores["rougeLsum"] >= scores["rougeL"] > 0


def official_squad(predictions, answers):
    """evaluate-v1.1.py of the SQuAD authors, over lists instead of its JSON files."""

    def normalize(text):
        text = "".join(char for char in text.lower() if char not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

    def f1_score(prediction, truth):
        predicted, expected = normalize(prediction).split(), normalize(truth).split()
        same = sum((Counter(predicted) & Counter(expected)).values())
        if same == 0:
            return 0
        precision, recall = same / len(predicted), same / len(expected)
        return 2 * precision * recall / (precision + recall)

    exact = f1 = 0
    for prediction, truths in zip(predictions, answers, strict=True):
        exact += max(normalize(prediction) == normalize(truth) for truth in truths)
        f1 += max(f1_score(prediction, truth) for truth in truths)
    return {"exact_match": 100.0 * exact / len(answers), "f1": 100.0 * f1 / len(answers)}


@pytest.mark.parametrize("name", available("squad", "questions"))
def test_squad_scores_of_real_rows_are_the_official_ones(name):
    rows = read_rows(name, 1000)
    answers = [row["answers"]["text"] for row in rows]
    predictions = [noisy(texts[-1], seed) for seed, texts in enumerate(answers)]
    predictions[0] = f"The {answers[0][0].upper()}!"
    predictions[1::7] = [" ".join(row["context"].split()[:6]) for row in rows[1::7]]
    expected = official_squad(predictions, answers)
    assert 10 < expected["exact_match"] < expected["f1"] < 95
    assert compute_scores("question_answering", predictions, answers) == pytest.approx(expected, rel=1e-12)


CHINESE = ["我喜欢读书和写字。", "今天天气很好"], ["我很喜欢读书和写字。", "今天的天气很好"]


@pytest.mark.parametrize(
    ("language", "tokenizer"),
    [
        ("zh", "zh"),
        ("zh_CN", "zh"),
        ("zho_Hans", "zh"),
        ("yue", "zh"),
        ("tha_Thai", "char"),
        ("my_MM", "char"),
        ("de", "13a"),
        ("eng_Latn", "13a"),
        ("ru", "13a"),
        (None, "13a"),
    ],
)
def test_bleu_takes_sacrebleus_tokenizer_of_the_language(language, tokenizer):
    predictions, references = CHINESE
    expected = sacrebleu.corpus_bleu(predictions, [references], tokenize=tokenizer)
    scores = compute_scores("translation", predictions, references, language)
    assert scores["bleu"] == pytest.approx(expected.score) and (scores["bleu"] > 60) == (tokenizer != "13a")
    assert f"|tok:{tokenizer}|" in make_metric("translation", language).signatures["bleu"]
    ours = measure("translation", *CHINESE, language)
    interval = confidence_intervals(draw_scores(ours))["bleu"]
    assert interval[0] <= scores["bleu"] <= interval[1]
    compared = bootstrap(measure("translation", references, references, language), ours)
    perfect = sacrebleu.corpus_bleu(references, [references], tokenize=tokenizer).score
    assert compared["bleu"]["difference"] == pytest.approx(perfect - expected.score)


@pytest.mark.parametrize("language", ["ja", "ko"])
def test_without_mecab_characters_count_and_that_is_said(language, caplog):
    bleu_tokenizer.cache_clear()
    tokenizer = bleu_tokenizer(language)
    if importlib.util.find_spec("MeCab" if language == "ja" else "mecab_ko"):
        assert tokenizer == f"{language}-mecab"
    else:
        assert tokenizer == "char" and f"pip install 'sacrebleu[{language}]'" in caplog.text


def test_texts_without_spaces_and_language_are_warned_of(caplog):
    warn_of_unspaced_text.cache_clear()
    compute_scores("translation", PREDICTIONS, REFERENCES)
    compute_scores("translation", *CHINESE, "zh")
    sample_scores("translation", *CHINESE)
    assert not caplog.text
    compute_scores("translation", *CHINESE)
    assert "--target_lang" in caplog.text


SAME = {
    "ru": "Мама мыла раму. Папа спал на диване.",
    "el": "Η γάτα κάθεται στο χαλί.",
    "hi": "बिल्ली चटाई पर बैठी है। कुत्ता सो रहा है।",
    "ar": "القطة تجلس على السجادة.",
    "zh": "今天天气很好。我们去公园。",
    "ja": "今日は天気がいいです。公園へ行きます。",
    "th": "วันนี้อากาศดี",
    "ko": "오늘은 날씨가 좋습니다.",
}


@pytest.mark.parametrize("language", SAME)
def test_rouge_of_equal_and_of_other_texts_in_any_script(language):
    text = SAME[language]
    scores = compute_scores("summarization", [text], [text])
    assert set(scores.values()) == {100.0}
    other = next(value for name, value in SAME.items() if name not in (language, "zh", "ja"))
    assert compute_scores("summarization", [other], [text])["rouge1"] == 0.0


def test_rouge_of_other_scripts_counts_words_or_characters():
    """By hand: 3 of 4 words, and 4 of 6 characters, are shared."""
    cyrillic = compute_scores("summarization", ["Мама мыла белую раму"], ["Мама мыла чёрную раму"])
    assert cyrillic["rouge1"] == pytest.approx(75) and cyrillic["rouge2"] == pytest.approx(100 / 3)
    assert compute_scores("summarization", ["今天天气不好"], ["今天天气很坏"])["rouge1"] == pytest.approx(
        400 / 6
    )
    assert UnicodeTokenizer().tokenize("हिन्दी, ABC-12 和 ок!") == ["हिन्दी", "abc", "12", "和", "ок"]


def test_each_reference_chooses_its_words():
    """A mixed corpus: Latin rows as rouge_score counts them, whatever stands beside them."""
    mixed = compute_scores("summarization", [PREDICTIONS[1], SAME["ru"]], [REFERENCES[1], SAME["ru"]])
    alone = compute_scores("summarization", PREDICTIONS[1:2], REFERENCES[1:2])
    assert mixed["rouge1"] == pytest.approx((alone["rouge1"] + 100) / 2)
    assert "tok:latin-stemmed,else-unicode" in make_metric("summarization").signatures["rouge"]


def test_sentences_of_other_scripts_end_at_their_own_stops():
    assert split_sentences(SAME["zh"]).split("\n") == ["今天天气很好。", "我们去公园。"]
    assert split_sentences(SAME["hi"]).split("\n") == ["बिल्ली चटाई पर बैठी है।", "कुत्ता सो रहा है।"]
    assert split_sentences("He said 好。 and left.") == "He said 好。 and left."


@pytest.mark.parametrize("language", ["de", "en", None])
def test_chrf_needs_no_language(language):
    expected = sacrebleu.corpus_chrf(CHINESE[0], [CHINESE[1]]).score
    assert compute_scores("translation", *CHINESE, language)["chrf"] == pytest.approx(expected)
    assert sample_scores("translation", CHINESE[1], CHINESE[1]).tolist() == [1.0, 1.0]
