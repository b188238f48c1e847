"""Quality of predictions, without network access: BLEU and chrF, ROUGE, SQuAD's EM and F1.

`compute_scores("translation", predictions, references, language="zh")`: the language that texts are written
in chooses BLEU's tokenizer; the script of each reference chooses ROUGE's (`util.evaluation.rouge`).

Every metric maps predictions and references to sufficient statistics, one row a sample, and those to scores
on a 0-100 scale; resampling rows of statistics is all that confidence intervals need.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from sacrebleu.metrics import BLEU, CHRF

from util.evaluation.writing import bleu_tokenizer, warn_of_script
from util.tasks import TASKS

ARTICLES = re.compile(r"\b(a|an|the)\b")
Reference = str | list[str]
"""One reference text, or several: SQuAD's scores take the best of them, the others the first."""


class Metric(Protocol):
    names: tuple[str, ...]

    @property
    def signatures(self) -> dict[str, str]:
        """How scores were computed, by name."""

    def statistics(self, predictions: list[str], references: list[Reference]) -> np.ndarray:
        """Sufficient statistics: (N, K)."""

    def scores(self, statistics: np.ndarray) -> dict[str, float]:
        """Scores of a set of samples, each of them a row: (N, K) -> name -> score."""


class SampleMean:
    """A metric whose scores are means over samples: the statistics are the samples' own scores."""

    def __init__(
        self,
        names: tuple[str, ...],
        score_sample: Callable[[str, list[str]], tuple[float, ...]],
        signatures: dict[str, str] | None = None,
    ) -> None:
        self.names = names
        self.signatures = signatures or {}
        self.score_sample = score_sample

    def statistics(self, predictions: list[str], references: list[Reference]) -> np.ndarray:
        pairs = zip(predictions, map(as_list, references), strict=True)
        return np.array([self.score_sample(*pair) for pair in pairs])

    def scores(self, statistics: np.ndarray) -> dict[str, float]:
        return dict(zip(self.names, statistics.mean(0).tolist(), strict=True))


class CorpusBleu:
    """sacreBLEU and chrF of a corpus (Post, 2018; Popović, 2015): n-gram counts are the statistics."""

    names: tuple[str, ...] = ("bleu", "chrf")

    def __init__(self, language: str | None = None) -> None:
        tokenizer = bleu_tokenizer(language)
        self.bleu, self.chrf = BLEU(tokenize=tokenizer), CHRF()
        self.sentence_bleu = BLEU(tokenize=tokenizer, effective_order=True)
        for metric in (self.bleu, self.chrf):
            metric.num_refs = 1  # for the signatures
        self.width = 2 + 2 * self.bleu.max_ngram_order  # BLEU's: two lengths, n-grams that match, and all

    @property
    def signatures(self) -> dict[str, str]:
        return {name: str(getattr(self, name).get_signature()) for name in self.names}

    def statistics(self, predictions: list[str], references: list[Reference]) -> np.ndarray:
        columns = [[as_list(reference)[0] for reference in references]]
        counts = [
            metric._extract_corpus_statistics(predictions, columns) for metric in (self.bleu, self.chrf)
        ]
        return np.concatenate([np.array(rows, dtype=float) for rows in counts], axis=1)

    def scores(self, statistics: np.ndarray) -> dict[str, float]:
        # A single sample without some n-gram order has no corpus BLEU: its effective order counts.
        bleu = self.bleu if len(statistics) > 1 else self.sentence_bleu
        total = statistics.sum(0).astype(int).tolist()
        return {
            "bleu": bleu._compute_score_from_stats(total[: self.width]).score,
            "chrf": self.chrf._compute_score_from_stats(total[self.width :]).score,
        }


def as_list(reference: Reference) -> list[str]:
    return [reference] if isinstance(reference, str) else reference


def make_rouge() -> SampleMean:
    from util.evaluation import rouge  # slow to import

    return SampleMean(rouge.TYPES, rouge.score_sample, {"rouge": rouge.SIGNATURE})


def score_answer(text: str, references: list[str]) -> tuple[float, float]:
    """SQuAD v1.1's exact match and token F1, each against the reference that suits it best."""
    exact = max(normalize_answer(text) == normalize_answer(reference) for reference in references)
    return 100.0 * exact, 100 * max(token_f1(text, reference) for reference in references)


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


METRICS: dict[str, Callable[[str | None], Metric]] = {  # by the language of the texts, if it is known
    "bleu": CorpusBleu,
    "rouge": lambda language: make_rouge(),
    "squad": lambda language: SampleMean(("exact_match", "f1"), score_answer),
}


def make_metric(task: str, language: str | None = None) -> Metric:
    """The task's metric for texts in a language."""
    return METRICS[TASKS[task].metric](language)


@dataclass(frozen=True)
class Measured:
    """A corpus by the statistics of its samples (N, K): scores of all, of some and of resamples follow."""

    metric: Metric
    statistics: np.ndarray

    def scores(self, rows: Sequence[int] | np.ndarray | None = None) -> dict[str, float]:
        """Scores of all samples, or of these rows."""
        return self.metric.scores(self.statistics if rows is None else self.statistics[rows])


def measure(
    task: str, predictions: list[str], references: list[Reference], language: str | None = None
) -> Measured:
    """Count what the task's scores of a corpus need; the slow part of them."""
    metric = make_metric(task, language)
    if language is None and isinstance(metric, CorpusBleu):
        warn_of_script(references)
    return Measured(metric, metric.statistics(predictions, references))


def compute_scores(
    task: str, predictions: list[str], references: list[Reference], language: str | None = None
) -> dict[str, float]:
    """The task's scores of a corpus."""
    return measure(task, predictions, references, language).scores()
