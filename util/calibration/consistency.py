"""How far early-exit outputs stray from the full model's: one loss in [0, 1] a sample.

Textual consistency compares the two outputs with each other, risk consistency compares how well they match
the references (CALM, Schuster et al., 2022, section 3).
"""

from __future__ import annotations

import numpy as np

from util.evaluation.metrics import Reference, make_metric
from util.script_arguments import CONSISTENCIES

SAMPLE_SCORES = {  # what says most about a single sample: BLEU needs a corpus
    "translation": "chrf",
    "summarization": "rougeL",
    "question_answering": "f1",
}


def sample_scores(task: str, predictions: list[str], references: list[Reference]) -> np.ndarray:
    """Each sample's score in [0, 1]: (n,)."""
    metric, name = make_metric(task), SAMPLE_SCORES[task]
    statistics = metric.statistics(predictions, references)
    scores = [metric.scores(statistics[row : row + 1])[name] for row in range(len(statistics))]
    return np.clip(np.array(scores) / 100, 0, 1)  # chrF of equal texts is 100 + 1e-14


def consistency_losses(
    task: str, early: list[str], full: list[str], references: list[Reference], full_scores: np.ndarray
) -> dict[str, np.ndarray]:
    """Losses (n,) of early-exit texts by kind of consistency.

    `textual`: one minus the score of the early text with the full model's as its reference. `risk`: by how
    much the score against the references falls below the full model's, `full_scores` (n,); gains count 0.
    Equal texts lose nothing, though the score of two empty ones is 0.
    """
    losses = {kind: np.zeros(len(early)) for kind in CONSISTENCIES}
    changed = [row for row, texts in enumerate(zip(early, full, strict=True)) if texts[0] != texts[1]]
    if changed:
        texts = [early[row] for row in changed]
        losses["textual"][changed] = 1 - sample_scores(task, texts, [full[row] for row in changed])
        scores = sample_scores(task, texts, [references[row] for row in changed])
        losses["risk"][changed] = np.maximum(full_scores[changed] - scores, 0)
    return losses
