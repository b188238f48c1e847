"""The flags of the scripts that compare, choose and calibrate, as dataclasses validated where they enter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from util.arguments import (
    Parser,
    expand_argument_file,
    flag,
    list_flag,
    require,
    require_positive,
    require_unit_interval,
)
from util.evaluation.method_names import BASELINE, SWEPT

CERTIFIERS = ("ltt", "crc", "ucb")  # the methods of util.calibration.risk_control
P_VALUES = ("hoeffding_bentkus", "betting")
CONSISTENCIES = ("textual", "risk")
THRESHOLDS = tuple(step / 20 for step in range(20, -1, -1))
PRESETS = {path.stem: path for path in Path(__file__).parents[1].glob("scripts/presets/*.yaml")}


@dataclass
class PresetArgument:
    preset: str | None = flag(None, "Flags to start from; those given override them.", tuple(sorted(PRESETS)))


def expand_preset(argv: list[str]) -> list[str]:
    """Replace --preset by the flags of scripts/presets/NAME.yaml, before all others, which override them."""
    argument, rest = Parser((PresetArgument,), add_help=False).parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    return rest if argument.preset is None else expand_argument_file([str(PRESETS[argument.preset]), *rest])


@dataclass
class SweepArguments(PresetArgument):
    _argument_group_name = "Sweep"

    free: str | None = flag(None, "Checkpoint trained for FREE; decodes all methods but CALM.")
    calm: str | None = flag(None, "Checkpoint trained for CALM; decodes CALM and Static (default: --free's).")
    methods: list[str] = list_flag(SWEPT, f"Of {', '.join(SWEPT)}; {BASELINE} always runs.")
    static_layers: list[int] = list_flag([], "Depths of Static (default: all but the last).")
    calm_methods: list[str] = list_flag([], "Those that --calm decodes, if others than --methods.")
    calm_static_layers: list[int] = list_flag([], "Those on --calm, if others than --static_layers.")
    shallow_layers: list[int] = list_flag([], "FREE's exits (default: the checkpoint's own).")
    free_thresholds: list[float] = list_flag([0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], "FREE's.")
    lossless_thresholds: list[float] = list_flag([0.1, 0.2, 0.3, 0.4, 0.5, 0.7], "Those of FREE, lossless.")
    adapt_zetas: list[float] = list_flag([0.4, 0.6, 0.8, 0.9], "Zetas of the adaptive threshold.")
    calm_thresholds: list[float] = list_flag([0.3, 0.5, 0.7, 0.8, 0.9, 0.95], "CALM's.")
    exit_layers: list[int] = list_flag([], "CALM also with tests after these layers only.")
    conf_shortlist: str | None = flag(None, "File of scripts/learn_shortlist.py, for FREE shortlist.")
    batch_sizes: list[int] = list_flag([1], "Samples decoded together; every setting runs at each.")
    split: str = flag("test", "Which split is decoded.", ("validation", "test"))
    num_samples: int | None = flag(None, "Only the first samples.")
    trace_samples: int = flag(8, "Samples of each setting that are traced, for the report's heat maps.")
    threads: int | None = flag(None, "CPU threads (default: PyTorch's choice).")
    output_dir: str = flag("save/sweep", "Where results go.")

    def __post_init__(self) -> None:
        require(bool(self.free or self.calm), "Name a checkpoint with --free or --calm.")
        for name in ("methods", "calm_methods"):
            unknown = ", ".join(sorted(set(getattr(self, name)) - set(SWEPT)))
            require(not unknown, f"--{name}: there is no {unknown}; choose of {', '.join(SWEPT)}.")
        for name in ("free_thresholds", "lossless_thresholds", "adapt_zetas", "calm_thresholds"):
            for value in getattr(self, name):
                require_unit_interval(name, value)
        require_positive("num_samples", self.num_samples)
        require(bool(self.batch_sizes) and min(self.batch_sizes) > 0, "--batch_sizes must be positive.")
        largest = max(self.batch_sizes)
        require(
            all(largest % size == 0 for size in self.batch_sizes),
            f"--batch_sizes must divide the largest, {largest}: all settings decode the same blocks.",
        )
        require(
            self.conf_shortlist is None or Path(self.conf_shortlist).is_file(),
            f"--conf_shortlist: there is no file {self.conf_shortlist}.",
        )


@dataclass
class ChooserArguments:
    _argument_group_name = "Choice"

    model_name_or_path: str | None = flag(None, "Checkpoint: hub id or folder.")
    split: str = flag("validation", "Which split is decoded.", ("validation", "test"))
    num_samples: int | None = flag(200, "Only the first samples.")
    shallow_layers: list[int] = list_flag([], "Candidate exits (default: all but the last layer).")
    thresholds: list[float] = list_flag([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], "Candidates.")
    min_agreement: float = flag(0.98, "Least share of tokens that must equal full depth's.")
    measured: int = flag(5, "How many candidates, the recommended one first, are decoded to compare.")
    threads: int | None = flag(None, "CPU threads (default: PyTorch's choice).")
    output_dir: str = flag("save/choose_exit", "Gets choice.json.")

    def __post_init__(self) -> None:
        require(bool(self.model_name_or_path), "Name a checkpoint with --model_name_or_path.")
        require(bool(self.thresholds), "--thresholds: name at least one.")
        require_positive("num_samples", self.num_samples)
        require(self.measured >= 0, f"--measured must not be negative, got {self.measured}.")
        require_unit_interval("min_agreement", self.min_agreement)
        for value in self.thresholds:
            require_unit_interval("thresholds", value)


@dataclass
class CalibrationArguments:
    _argument_group_name = "Calibration"

    delta: float = flag(0.05, "Tolerated loss against full depth, in (0, 1): 0.05 are 5 points of the score.")
    epsilon: float = flag(0.05, "Tolerated probability that the loss exceeds --delta all the same.")
    method: str = flag(
        "ltt",
        "Learn then test, conformal risk control (in expectation), or upper confidence bounds.",
        CERTIFIERS,
    )
    p_value: str = flag("hoeffding_bentkus", "The test of ltt and ucb.", P_VALUES)
    consistency: str = flag(
        "textual", "Loss against full depth's text, or in the task's score.", CONSISTENCIES
    )
    thresholds: list[float] = list_flag(
        THRESHOLDS,
        "Candidates; a token exits above, so that 1.0 is full depth.",
    )
    fastest_by: str = flag("layers", "What the fastest is measured by.", ("layers", "seconds"))
    split: str = flag("validation", "Held-out samples to calibrate on.", ("validation", "test"))

    def __post_init__(self) -> None:
        for name in ("delta", "epsilon"):
            value = getattr(self, name)
            require(0 < value < 1, f"--{name} must lie between 0 and 1, got {value}.")
        for value in self.thresholds:
            require_unit_interval("thresholds", value)
        self.thresholds = sorted(set(self.thresholds), reverse=True)


@dataclass
class TokenizerArguments:
    _argument_group_name = "Tokenizer"

    output_dir: str = flag("save/tokenizer", "Gets the tokenizer, for run.py --tokenizer_name.")
    vocab_size: int = flag(4096, "Pieces, special ones included: the vocab_size of the model's config.")

    def __post_init__(self) -> None:
        require(self.vocab_size > 3, f"--vocab_size must leave room for pieces, got {self.vocab_size}.")


@dataclass
class ShortlistArguments:
    _argument_group_name = "Shortlist"

    model_name_or_path: str | None = flag(None, "Checkpoint whose tokenizer counts and which decodes.")
    output_file: str = flag("save/shortlist.json", "For --conf_shortlist of run.py and scripts/sweep.py.")
    split: str = flag("train", "Whose targets are counted.", ("train", "validation", "test"))
    size: int = flag(500, "Tokens on the shortlist, at least 2.")
    shallow_layer: int | None = flag(None, "Where decisions are compared (default: the checkpoint's own).")
    num_samples: int = flag(100, "Validation samples of the comparison.")

    def __post_init__(self) -> None:
        require(bool(self.model_name_or_path), "Name a checkpoint with --model_name_or_path.")
        require(self.size >= 2, f"--size must be at least 2, got {self.size}.")
        require_positive("num_samples", self.num_samples)
