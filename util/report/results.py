"""What result folders hold, as the report uses it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from util.evaluation.records import Setting, Trace


@dataclass
class SettingResults(Setting):
    """A setting with its figures, and its traces by row."""

    figures: dict[str, Any] = field(default_factory=dict, kw_only=True)
    traces: dict[int, Trace] = field(default_factory=dict, kw_only=True)


@dataclass
class ResultSet:
    """The settings of one folder, on the same samples. `pareto` and `fastest_99` hold names of settings."""

    label: str
    kind: str  # "sweep" or "run"
    dataset: str | None
    split: str | None
    main_score: str
    samples: int
    settings: list[SettingResults]
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    auc: dict[str, float] = field(default_factory=dict)
    fastest_99: dict[str, str | None] = field(default_factory=dict)
    pareto: list[str] = field(default_factory=list)
    baseline: SettingResults | None = None  # of a run: the one at full depth that it is compared with
    interleaved: bool = False  # the settings decoded in turn: only then their times compare

    @property
    def origin(self) -> str:
        """Where the samples come from, as far as flags say: data set or file, folder, configuration,
        languages."""
        given = self.arguments
        place = given.get(f"{self.split}_file") or given.get("data_dir")
        languages = "-".join(filter(None, (given.get("source_lang"), given.get("target_lang"))))
        parts = filter(None, (self.dataset, place, given.get("dataset_config_name"), languages))
        return ", ".join(dict.fromkeys(parts)) or "local data"

    @property
    def data(self) -> str:
        """What a caption says of the samples; figures under different captions are in different tables."""
        return f"{self.origin}, {self.samples} {self.split} samples"

    @property
    def main_settings(self) -> list[SettingResults]:
        """Those at the smallest batch size; the others only tell of throughput."""
        smallest = min((setting.batch_size for setting in self.settings), default=0)
        return [setting for setting in self.settings if setting.batch_size == smallest]


@dataclass
class JudgeScores:
    """`scores` is laid out as `gpt_eval.report` says."""

    label: str
    scores: dict[str, Any]


@dataclass
class Results:
    sets: list[ResultSet] = field(default_factory=list)
    judges: list[JudgeScores] = field(default_factory=list)
