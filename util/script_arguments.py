"""The flags of the scripts, as dataclasses validated where they enter. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from models.choices import BACKENDS, INTERMEDIATE_LOSSES, PRECISIONS
from util.flags import (
    differs,
    drop_repeats,
    flag,
    flags_in,
    list_flag,
    refuse_flags_without,
    require,
    require_file,
    require_known,
    require_not_negative,
    require_positive,
    require_unit_interval,
    required_flag,
)
from util.methods import (
    BASELINE,
    CALM,
    FREE,
    FREE_LOSSLESS,
    HF_GENERATE,
    STATIC,
)
from util.tasks import DATASETS

CERTIFIERS = ("ltt", "crc", "ucb")  # the methods of util.calibration.risk_control
TESTERS = ("ltt", "ucb")  # those that test, and may err; crc's promise is an expectation
P_VALUES = ("hoeffding_bentkus", "betting")
CONSISTENCIES = ("textual", "risk")
THRESHOLDS = tuple(step / 20 for step in range(20, -1, -1))
BENCHMARK_SHAPES = {path.stem: path for path in Path(__file__).parents[1].glob("scripts/benchmarking/*.json")}
BENCHMARK_BACKENDS = (
    *(name for name in BACKENDS if name != "onnx"),
    *(f"onnx {name}" for name in PRECISIONS),
)
CTRANSLATE2 = {f"CTranslate2 {name}": name for name in ("float32", "int8")}
RIVALS = (HF_GENERATE, *CTRANSLATE2)
BENCHMARKED = (FREE, FREE_LOSSLESS, CALM, STATIC)
# Benchmark flags that are of use with some models alone.
OF_EMBEDDED = ("free_threshold", "lossless_threshold", "calm_threshold")
OF_RANDOM_WEIGHTS = ("exit_share", "source_length", "target_length")


def split_label(label: str) -> tuple[str, str]:
    """Backend and precision of one of `BENCHMARK_BACKENDS`."""
    backend, _, precision = label.partition(" ")
    return backend, precision or "fp32"


@dataclass
class ChooserArguments:
    _argument_group_name = "Choice"

    model_name_or_path: str = required_flag("Checkpoint: hub id or folder.")
    split: str = flag("validation", "Which split is decoded.", ("validation", "test"))
    num_samples: int | None = flag(200, "Only the first samples.")
    shallow_layers: list[int] = list_flag([], "Candidate exits (default: all but the last layer).")
    thresholds: list[float] = list_flag([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], "Candidates.")
    min_agreement: float = flag(0.98, "Least share of tokens that must equal full depth's.")
    measured: int = flag(5, "How many candidates, the recommended one first, are decoded to compare.")
    output_dir: str = flag("save/choose_exit", "Gets choice.json.", changes_outputs=False)

    def __post_init__(self) -> None:
        drop_repeats(self)
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
    epsilon: float = flag(
        0.05, "Tolerated probability that the loss exceeds --delta all the same.", method=TESTERS
    )
    method: str = flag(
        "ltt",
        "Learn then test, conformal risk control (in expectation), or upper confidence bounds.",
        CERTIFIERS,
    )
    p_value: str = flag("hoeffding_bentkus", "The test of ltt and ucb.", P_VALUES, method=TESTERS)
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
        refuse_flags_without(self, [self.method], {name: f"--method {name}" for name in CERTIFIERS})
        self.thresholds = sorted(set(self.thresholds), reverse=True)


@dataclass
class TokenizerArguments:
    _argument_group_name = "Tokenizer"

    output_dir: str = flag(
        "save/tokenizer", "Gets the tokenizer, for run.py --tokenizer_name.", changes_outputs=False
    )
    vocab_size: int = flag(4096, "Pieces, special ones included: the vocab_size of the model's config.")

    def __post_init__(self) -> None:
        require(self.vocab_size > 3, f"--vocab_size must leave room for pieces, got {self.vocab_size}.")


@dataclass
class ShortlistArguments:
    _argument_group_name = "Shortlist"

    model_name_or_path: str = required_flag("Checkpoint whose tokenizer counts and which decodes.")
    output_file: str = flag(
        "save/shortlist.json", "For --conf_shortlist of run.py and scripts/sweep.py.", changes_outputs=False
    )
    split: str = flag("train", "Whose targets are counted.", ("train", "validation", "test"))
    size: int = flag(500, "Tokens on the shortlist, at least 2.")
    shallow_layer: int | None = flag(None, "Where decisions are compared (default: the checkpoint's own).")
    num_samples: int = flag(100, "Validation samples of the comparison.")

    def __post_init__(self) -> None:
        require(self.size >= 2, f"--size must be at least 2, got {self.size}.")
        require_positive("shallow_layer", self.shallow_layer)
        require_positive("num_samples", self.num_samples)


@dataclass
class SimulationArguments:
    _argument_group_name = "Simulation"

    losses_file: str = required_flag("The losses.npz of scripts/calibrate.py.")
    output_dir: str = required_flag("Where results are written.", changes_outputs=False)
    deltas: list[float] = list_flag(
        (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2), "Tolerated losses, in (0, 1)."
    )
    epsilon: float = flag(0.05, "Tolerated probability of a violation.", method=TESTERS)
    methods: list[str] = list_flag(CERTIFIERS, f"Of {', '.join(CERTIFIERS)}.")
    p_values: list[str] = list_flag(P_VALUES, f"Of {', '.join(P_VALUES)}.", method=TESTERS)
    consistency: str = flag("textual", "Which loss.", CONSISTENCIES)
    size: int | None = flag(None, "Samples in a calibration set (default: as many as were decoded).")
    resamples: int = flag(200, "Calibration sets.")
    seed: int = flag(0, "Draws of them.")

    def __post_init__(self) -> None:
        for name, values in {"deltas": self.deltas, "epsilon": [self.epsilon]}.items():
            require(all(0 < value < 1 for value in values), f"--{name} must lie between 0 and 1.")
        require_known("methods", self.methods, CERTIFIERS)
        require_known("p_values", self.p_values, P_VALUES)
        refuse_flags_without(self, self.methods, {name: f"{name} to --methods" for name in CERTIFIERS})
        require_positive("size", self.size)
        require_positive("resamples", self.resamples)
        require_not_negative("seed", self.seed)


@dataclass
class ReportArguments:
    _argument_group_name = "Report"

    folders: list[str] = required_flag(
        "Folders with results of run.py, scripts/sweep.py or gpt_eval.", positional=True
    )
    output_dir: Path = flag(Path("save/report"), "Gets the page and its table.", changes_outputs=False)


@dataclass
class ExportArguments:
    _argument_group_name = "Export"

    run: Path = required_flag("--output_dir of a finished training run.")
    output_dir: Path = required_flag("Gets weights, tokenizer, settings and card.", changes_outputs=False)
    title: str = required_flag("Heading of the card.")
    train_script: str = required_flag("What trains the model again.")
    origin: str = flag("random weights", "What the training started from.")
    earlier_runs: list[Path] = list_flag([], "What led to the run.")
    sweep: Path | None = flag(None, "--output_dir of scripts/sweep.py, for the scores.")
    model: str | None = flag(None, "The sweep's name of this checkpoint.", ("free", "calm"))

    def __post_init__(self) -> None:
        require_file("sweep", None if self.sweep is None else self.sweep / "sweep.json")
        require((self.sweep is None) == (self.model is None), "Give both --sweep and --model, or none.")


@dataclass
class CustomGenerateArguments:
    _argument_group_name = "Export"

    output_dir: Path = required_flag("Gets the repository.", changes_outputs=False)
    repo_id: str = flag("your-name/free-decoding", "What its card calls it.")
    example_model: str = flag("google-t5/t5-small", "The model of the card's example.")
    auto_class: str = flag(
        "AutoModelForSeq2SeqLM",
        "What loads that model.",
        ("AutoModelForSeq2SeqLM", "AutoModelForCausalLM"),
    )


@dataclass
class StaticArguments:
    _argument_group_name = "Export"

    model_name_or_path: str = required_flag("Checkpoint: hub id or folder.")
    output_dir: Path = required_flag("Gets the shallower model.", changes_outputs=False)
    layer: int | None = flag(None, "The last decoder layer that stays (default: the checkpoint's own exit).")
    exit_adapter_path: str | None = flag(None, "Exit adapter of the kind norm, which becomes the final norm.")
    dtype: str = flag("float32", "Precision of the weights.", ("float32", "bfloat16", "float16"))

    def __post_init__(self) -> None:
        require_positive("layer", self.layer)


@dataclass
class DistillationArguments:
    _argument_group_name = "Distillation"

    model_name_or_path: str = required_flag("The teacher.")
    dataset_name: str = required_flag("Whose training split is distilled.", DATASETS)
    output_file: Path = required_flag("A .jsonl.gz: id, source, target.", changes_outputs=False)
    max_length: int = flag(128, "Longer rows are left out (tokens).")
    num_beams: int = flag(4, "Hypotheses of a source.")
    batch_size: int = flag(64, "Sources decoded together.")

    def __post_init__(self) -> None:
        for name in ("max_length", "num_beams", "batch_size"):
            require_positive(name, getattr(self, name))
        require(
            self.output_file.name.endswith(".jsonl.gz"),
            f"--output_file {self.output_file}: what is written is gzipped; name a .jsonl.gz.",
        )


@dataclass
class TrainingBenchmarkArguments:
    _argument_group_name = "Training benchmark"

    train_file: str | None = flag(None, "Local rows (default: the embedded synopses).")
    source_column: str = flag("document", "Column with the input text.")
    target_column: str = flag("summary", "Column with the reference text.")
    tokenizer: str = flag("checkpoints/debian-t5-free", "Hub id or folder.")
    steps: int = flag(20, "Training steps of each loss.")
    batch_size: int = flag(4, "Samples of a step.")
    only: str | None = flag(None, "One loss, in this process: NAME:LAYERS.")

    def __post_init__(self) -> None:
        require_file("train_file", self.train_file)
        require_positive("steps", self.steps)
        require_positive("batch_size", self.batch_size)
        name, _, layers = (self.only or "none:6").partition(":")
        known = name in ("none", *INTERMEDIATE_LOSSES) and layers.isdecimal()
        require(known, f"--only {self.only}: give NAME:LAYERS, such as weighted_ce:6.")


@dataclass
class BenchmarkArguments:
    _argument_group_name = "Benchmark"

    models: list[str] = list_flag(
        ["embedded"], f"Of embedded, {', '.join(sorted(BENCHMARK_SHAPES))}; or a config.json."
    )
    rivals: list[str] = list_flag(RIVALS, f"Of {', '.join(RIVALS)}.")
    backends: list[str] = list_flag(
        ["torch", "onnx fp32", "onnx w8", "onnx int8"], f"Ours: of {', '.join(BENCHMARK_BACKENDS)}."
    )
    methods: list[str] = list_flag(BENCHMARKED, f"Of {', '.join(BENCHMARKED)}; {BASELINE} always runs.")
    samples: int = flag(20, "Samples of each model.")
    batch_size: int = flag(1, "Samples decoded together.")
    threads: int = flag(1, "CPU threads of every contestant.")
    device: str = flag(
        "cpu", "Where models run; cuda is for the backends torch and compile.", ("cpu", "cuda")
    )
    dtype: str = flag("float32", "Of weights, on cuda.", ("float32", "bfloat16", "float16"))
    shallow_exit_layer: int | None = flag(
        None,
        "Exit of FREE and Static (default: the checkpoint's own; a quarter of random layers).",
        method=(FREE, FREE_LOSSLESS, STATIC),
    )
    free_threshold: float = flag(0.4, "FREE's, on trained weights.", method=FREE)
    lossless_threshold: float = flag(0.4, "That of FREE, lossless, on trained weights.", method=FREE_LOSSLESS)
    calm_threshold: float = flag(0.9, "CALM's, on trained weights.", method=CALM)
    exit_share: float = flag(0.7, "Share of tokens that exit early, on random weights.", method=(FREE, CALM))
    source_length: int = flag(128, "Tokens of a source, for random weights.")
    target_length: int = flag(64, "Tokens of an output, for random weights.")
    figure_file: Path | None = flag(None, "Gets a picture of the figures: .svg or .png.")

    def __post_init__(self) -> None:
        kind = None if self.figure_file is None else self.figure_file.suffix
        require(kind in (None, ".svg", ".png"), f"--figure_file {self.figure_file}: name an .svg or a .png.")
        drop_repeats(self)
        for name in self.models:
            known = name == "embedded" or name in BENCHMARK_SHAPES or Path(name).is_file()
            choices = ", ".join(["embedded", *sorted(BENCHMARK_SHAPES)])
            require(known, f"--models: there is no {name}; choose of {choices}, or name a config.json.")
        require_known("rivals", self.rivals, RIVALS)
        require_known("backends", self.backends, BENCHMARK_BACKENDS)
        require_known("methods", self.methods, BENCHMARKED)
        refuse_flags_without(self, self.methods, {name: f"{name} to --methods" for name in BENCHMARKED})
        self.refuse_flags_of_other_models()
        self.refuse_contestants_of_other_devices()
        for name in ("samples", "batch_size", "threads", "source_length", "target_length"):
            require_positive(name, getattr(self, name))
        require_positive("shallow_exit_layer", self.shallow_exit_layer)
        for name in (*OF_EMBEDDED, "exit_share"):
            require_unit_interval(name, getattr(self, name))

    def refuse_contestants_of_other_devices(self) -> None:
        """Raise UserError for what runs on CPUs alone where another device is named."""
        if self.device == "cpu":
            require(self.dtype == "float32", f"--dtype {self.dtype} needs --device cuda.")
            return
        bound = [name for name in (*self.rivals, *self.backends) if name in CTRANSLATE2 or "onnx" in name]
        require(not bound, f"--device {self.device}: {', '.join(bound)} run on the CPU; name others.")

    def refuse_flags_of_other_models(self) -> None:
        """Raise UserError for flags and methods that none of the models reads."""
        idle: tuple[str, ...] = () if "embedded" in self.models else OF_EMBEDDED
        idle += OF_RANDOM_WEIGHTS if self.models == ["embedded"] else ()
        for spec in flags_in(self):
            way = "embedded" if spec.name in OF_EMBEDDED else "a model with random weights"
            fine = spec.name not in idle or not differs(self, spec)
            require(fine, f"--{spec.name} has no effect here: add {way} to --models.")
        fine = "embedded" in self.models or self.methods != [FREE_LOSSLESS]
        require(fine, f"--methods: random weights are not decoded by {FREE_LOSSLESS}: name others.")


@dataclass
class DebianArguments:
    _argument_group_name = "Data"

    output_dir: Path = flag(Path("data/debian"), "Where the data sets are written.", changes_outputs=False)
    work_dir: Path | None = flag(None, "Keep apt's index files here (default: a temporary directory).")
    mirror: str | None = flag(None, "URI of a Debian mirror (default: that of the apt sources here).")
    suite: str = flag("bookworm", "Code name of the Debian release.")
    keyring: Path = flag(
        Path("/usr/share/keyrings/debian-archive-keyring.gpg"),
        "Keys that must have signed the archive (from the package debian-archive-keyring).",
    )
    seed: int = flag(0, "Seed of the row order and of the samples.")
    max_words: int = flag(120, "Longest side of a translation pair, in words.")
    max_ratio: float = flag(2.5, "Largest factor between the word counts of a pair.")
    max_document: int = flag(400, "Longest document of a summary, in words.")
    max_per_source: int = flag(20, "Most synopsis rows of one source package.")
    train_rows: int = flag(20000, "Rows of the synopsis train split.")

    def __post_init__(self) -> None:
        for name in ("max_words", "max_ratio", "max_document", "max_per_source", "train_rows"):
            require_positive(name, getattr(self, name))
