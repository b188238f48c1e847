"""The evaluations of run.py: which split each decodes, and the files that it leaves in --output_dir."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """An evaluation: the split it decodes, and its files."""

    split: str
    predictions: str
    results: str
    threshold: str  # what an adaptive one has learnt

    @property
    def outcomes(self) -> tuple[str, ...]:
        """What is written once all predictions are there."""
        return self.results, self.threshold


STAGES = {
    "eval": Stage("validation", "predictions.jsonl", "eval_results.json", "adaptive_threshold.json"),
    "predict": Stage(
        "test", "predictions_test.jsonl", "predict_results.json", "adaptive_threshold_test.json"
    ),
}
