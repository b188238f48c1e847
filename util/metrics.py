"""Quality of predictions, without network access: BLEU and chrF, ROUGE, SQuAD's EM and F1.

Every metric maps (predictions, references) to a dict of scores on a 0-100 scale.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable

import numpy as np
import sacrebleu
from rouge_score import rouge_scorer
from transformers import EvalPrediction, PreTrainedTokenizerBase

from util.tasks import TASKS

SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
ARTICLES = re.compile(r"\b(a|an|the)\b")
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def bleu(predictions: list[str], references: list[str]) -> dict[str, float]:
    """Corpus sacreBLEU and chrF (Post, 2018; Popović, 2015)."""
    return {
        "bleu": sacrebleu.corpus_bleu(predictions, [references]).score,
        "chrf": sacrebleu.corpus_chrf(predictions, [references]).score,
    }


def rouge(predictions: list[str], references: list[str]) -> dict[str, float]:
    """Mean ROUGE F1 with stemming (Lin, 2004); for ROUGE-Lsum one sentence is one line."""
    scorer = rouge_scorer.RougeScorer(list(ROUGE_TYPES), use_stemmer=True)
    pairs = zip(predictions, references, strict=True)
    scores = [scorer.score(split_sentences(reference), split_sentences(text)) for text, reference in pairs]
    return {kind: 100 * sum(score[kind].fmeasure for score in scores) / len(scores) for kind in ROUGE_TYPES}


def split_sentences(text: str) -> str:
    """One sentence a line, split after . ! ? (nltk's splitter needs a download)."""
    return SENTENCE_END.sub("\n", text.strip())


def squad(predictions: list[str], references: list[str]) -> dict[str, float]:
    """SQuAD v1.1 exact match and token F1, one reference each (Rajpurkar et al., 2016)."""
    pairs = list(zip(predictions, references, strict=True))
    exact = [normalize_answer(text) == normalize_answer(reference) for text, reference in pairs]
    return {
        "exact_match": 100 * sum(exact) / len(pairs),
        "f1": 100 * sum(token_f1(*pair) for pair in pairs) / len(pairs),
    }


def normalize_answer(text: str) -> str:
    """Lower-case, without punctuation, articles and extra spaces, as SQuAD's official script does."""
    kept = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(ARTICLES.sub(" ", kept).split())


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of token precision and recall of two normalized answers."""
    predicted, expected = normalize_answer(prediction).split(), normalize_answer(reference).split()
    shared = sum((Counter(predicted) & Counter(expected)).values())
    if shared == 0:  # also for two empty answers, as in the official script
        return 0.0
    return 2 * shared / (len(predicted) + len(expected))


METRICS: dict[str, Callable[[list[str], list[str]], dict[str, float]]] = {
    "bleu": bleu,
    "rouge": rouge,
    "squad": squad,
}


def token_metrics(
    task: str, tokenizer: PreTrainedTokenizerBase
) -> Callable[[EvalPrediction], dict[str, float]]:
    """A Trainer's `compute_metrics`: decode padded token ids, then score them."""

    def decode(token_ids: np.ndarray) -> list[str]:
        return tokenizer.batch_decode(
            np.where(token_ids < 0, tokenizer.pad_token_id, token_ids), skip_special_tokens=True
        )

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        texts, references = decode(prediction.predictions), decode(prediction.label_ids)
        return METRICS[TASKS[task].metric](texts, references)

    return compute
