"""The flags of run.py as dataclasses, validated where they enter.

`parse_arguments(argv)` accepts flags, or one JSON/YAML file of them followed by flags that override it.
"""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml
from transformers import HfArgumentParser

from models.choices import INTERMEDIATE_LOSSES, PER_EXIT_HEADS
from models.errors import UserError
from models.json_files import LARGEST, decode_json, read_text
from util.files import locked
from util.flag_help import describe_flags
from util.tasks import DATASETS, TASKS

if TYPE_CHECKING:
    from transformers import Seq2SeqTrainingArguments

WITHOUT_EFFECT = (  # on predictions
    "resume_eval",
    "preprocessing_num_workers",
    "token",
    "cache_dir",
    "hub",
    "report_dir",
    "baseline_predictions",
    "output_dir",
)
CALM_FLAGS = (
    "exit_conf_type",
    "exit_conf_threshold",
    "exit_position_temp",
    "exit_decay_form",
    "exit_min_layer",
    "exit_layers",
)
FREE_FLAGS = (
    "shallow2deep_conf_type",
    "shallow2deep_conf_threshold",
    "parallel_gen_token",
    "copy_skipped_hidden_states",
    "parallel_causal_mask",
    "rollback_conf_threshold",
    "lossless",
    "max_pending_tokens",
    "use_adapt_threshold",
)
ADAPTIVE_FLAGS = ("adapt_threshold_file", "adapt_zeta")
CONFIDENCE_TYPES = ("softmax", "meta")


SCRATCH_SETTINGS = {"learning_rate": 1e-3, "warmup_steps": 0.1, "logging_steps": 10}  # with --config_name

logger = logging.getLogger(__name__)


def flag(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    metadata = {"help": help} | ({"choices": list(choices)} if choices else {})
    return field(default=default, metadata=metadata)


def list_flag(default: Iterable[Any], help: str) -> Any:
    return field(default_factory=lambda: list(default), metadata={"help": help})


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def make_output_dir(folder: Path) -> Path:
    """Make --output_dir, or raise UserError if it cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be made: {error.strerror}.") from error
    require(os.access(folder, os.W_OK), f"--output_dir {folder} is not writable.")
    return folder


@contextmanager
def locked_output_dir(folder: Path) -> Iterator[Path]:
    """Make --output_dir and keep other runs out of it.

    Under torchrun each process holds a lock for its part: the first is refused where another run writes, the
    others wait, to be ended by torchrun together with it.

    Raises:
        UserError: it cannot be made or written to, or another run writes there.
    """
    make_output_dir(folder)
    complaint = f"--output_dir {folder}: another run is writing there; wait for it, or name another folder."
    rank = int(os.environ.get("RANK", 0))
    with locked(folder / (f".lock.{rank}" if rank else ".lock"), complaint, wait=rank > 0):
        yield folder


@contextmanager
def locked_output_file(path: Path) -> Iterator[Path]:
    """Make the folder of --output_file and keep other runs from writing the same file.

    Raises:
        UserError: the folder cannot be made, or another run writes the file.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_file {path}: its folder cannot be made: {error.strerror}.") from error
    complaint = f"--output_file {path}: another run is writing it; wait for it, or name another file."
    with locked(path.with_name(f".{path.name}.lock"), complaint):
        yield path


def refuse_misspelt_dataset(name: str) -> None:
    """Raise UserError for a name that is nearly a known one, before the hub is asked for it."""
    if name in DATASETS or "/" in name:
        return
    near = difflib.get_close_matches(name.lower().replace("-", "_"), DATASETS, n=1, cutoff=0.8)
    require(
        not near,
        f"--dataset_name {name}: did you mean {''.join(near)}? Others of the hub are named OWNER/NAME.",
    )


def require_split(data: DataArguments, split: str) -> None:
    """Raise UserError, naming the other split, if only that one's local file was given."""
    other = {"test": "validation", "validation": "test"}.get(split)
    if other is None or data.dataset_name or data.data_dir or getattr(data, f"{split}_file"):
        return
    require(
        getattr(data, f"{other}_file") is None,
        f"There is no --{split}_file: give one, or decode --{other}_file with --split {other}.",
    )


def require_unit_interval(name: str, value: float | None) -> None:
    require(value is None or 0 <= value <= 1, f"--{name} must lie in [0, 1], got {value}.")


def require_positive(name: str, value: float | None) -> None:
    require(value is None or value > 0, f"--{name} must be positive, got {value}.")


@dataclass
class ModelArguments:
    _argument_group_name = "Model"

    model_name_or_path: str | None = flag(None, "Checkpoint: hub id or folder. Omit to train from scratch.")
    config_name: str | None = flag(None, "Config (hub id, folder or .json) of a model to train from scratch.")
    tokenizer_name: str | None = flag(None, "Tokenizer, if it is not the checkpoint's own.")
    cache_dir: str | None = flag(None, "Where downloads are kept.")
    model_revision: str = flag("main", "Branch, tag or commit of the checkpoint.")
    token: str | None = flag(None, "Access token for private checkpoints (default: the one of `hf auth`).")

    def __post_init__(self) -> None:
        given = [bool(self.model_name_or_path), bool(self.config_name)]
        require(any(given), "Name a checkpoint with --model_name_or_path, or a --config_name to train.")
        require(not all(given), "--model_name_or_path and --config_name contradict: load or start afresh?")
        require(
            bool(self.model_name_or_path or self.tokenizer_name), "--config_name needs a --tokenizer_name."
        )


@dataclass
class DataArguments:
    _argument_group_name = "Data, lengths and evaluation"

    task: str = flag("translation", "What the model learns or is judged by.", tuple(TASKS))
    dataset_name: str | None = flag(None, f"One of {', '.join(DATASETS)}, or any hub id.")
    dataset_config_name: str | None = flag(None, "Configuration of the data set.")
    dataset_revision: str | None = flag(None, "Branch, tag or commit of the data set.")
    train_file: str | None = flag(
        None, "Local .json/.jsonl/.csv/.tsv/.parquet (also .gz) with training rows."
    )
    validation_file: str | None = flag(None, "The same, for --do_eval.")
    test_file: str | None = flag(None, "The same, for --do_predict.")
    source_column: str | None = flag(None, "Column with the input text (default: the data set's).")
    target_column: str | None = flag(None, "Column with the reference text (default: the data set's).")
    source_lang: str | None = flag(
        None, "Source language: key in a `translation` column, and what a multilingual tokenizer encodes as."
    )
    target_lang: str | None = flag(
        None, "Target language: the same for targets and outputs; it also chooses BLEU's tokenizer."
    )
    source_prefix: str | None = flag(None, "Text put before every source (default: the data set's).")
    data_dir: str | None = flag(
        None, "Folder of local files, named <split> or <data set>.<split>, read instead of the hub."
    )
    streaming: bool = flag(False, "Read training rows as they are needed; needs --max_steps.")
    max_source_length: int | None = flag(
        None, "Sources are cut to this many tokens (default: the data set's)."
    )
    max_target_length: int | None = flag(
        None, "Training targets are cut to this many tokens (default: the data set's)."
    )
    doc_stride: int = flag(
        128, "Question answering: tokens that neighbouring windows of a long context share."
    )
    val_max_target_length: int | None = flag(
        None, "Longest output of an evaluation (default: --max_target_length)."
    )
    drop_long_samples: bool = flag(False, "Leave out rows over these lengths instead of cutting them.")
    max_train_samples: int | None = flag(None, "Use only the first rows for training.")
    max_eval_samples: int | None = flag(None, "Use only the first rows for --do_eval.")
    max_predict_samples: int | None = flag(None, "Use only the first rows for --do_predict.")
    num_beams: int = flag(1, "Beams of an evaluation at full depth; early exits are greedy.")
    preprocessing_num_workers: int | None = flag(None, "Processes that tokenize.")
    resume_eval: bool = flag(False, "Continue an interrupted evaluation from its predictions.jsonl.")
    baseline_predictions: str | None = flag(
        None, "Full depth's predictions.jsonl: test whether quality differs (paired bootstrap)."
    )
    report_dir: str | None = field(default=None, init=False)  # where skipped rows are listed
    hub: dict[str, Any] = field(default_factory=dict, init=False)  # --token and --cache_dir, for downloads

    def __post_init__(self) -> None:
        local = [self.train_file, self.validation_file, self.test_file]
        require(
            bool(self.dataset_name or self.data_dir or any(local)),
            "No data: give --dataset_name, --data_dir, or --train_file / --validation_file / --test_file.",
        )
        for name in ("train_file", "validation_file", "test_file"):
            path = getattr(self, name)
            require(path is None or Path(path).is_file(), f"--{name}: there is no file {path}.")
        if not (self.data_dir or any(local)):
            refuse_misspelt_dataset(self.dataset_name)
        known = DATASETS.get(self.dataset_name)
        if self.max_source_length is None:
            self.max_source_length = known.max_source_length if known else 512
        if self.max_target_length is None:
            self.max_target_length = known.max_target_length if known else 128
        require(
            0 < self.doc_stride < self.max_source_length or self.task != "question_answering",
            f"--doc_stride must be below --max_source_length {self.max_source_length}.",
        )
        for name in ("train_file", "data_dir", "baseline_predictions"):
            path = getattr(self, name)
            require(path is None or Path(path).exists(), f"--{name}: there is no {path}.")
        for name in ("max_source_length", "max_target_length", "val_max_target_length", "num_beams"):
            require_positive(name, getattr(self, name))
        for name in ("max_target_length", "val_max_target_length"):
            length = getattr(self, name)
            require(length is None or length > 1, f"--{name} must leave room for a token: at least 2.")
        for name in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
            require_positive(name, getattr(self, name))
        if self.val_max_target_length is None:
            self.val_max_target_length = self.max_target_length


@dataclass
class LossArguments:
    _argument_group_name = "Losses at exits"

    output_hidden_states_decoder: bool = flag(
        False, "Train with losses at intermediate layers (implied by --intermediate_loss_fn)."
    )
    intermediate_loss_fn: str | None = flag(
        None, "Early-exit loss: which exits are trained, and how they are distilled.", INTERMEDIATE_LOSSES
    )
    shallow_loss_weight: float | None = flag(
        None, "Share of the shallow exit in the cross-entropy of shallowdeep_* (default: S / (S + L))."
    )
    distill_layer_alpha: float = flag(0.5, "Weight of the distillation loss of shallowdeep_kd_*.")
    do_layer_transformation: bool = flag(False, "Map shallow states linearly before they are distilled.")
    per_exit_head: str | None = flag(
        None, "Give each exit a norm, or a projection and a norm, of its own.", PER_EXIT_HEADS
    )
    early_stopping_patience: int | None = flag(
        None, "Stop after this many evaluations without a better --metric_for_best_model."
    )
    paper_settings: bool = flag(False, "Start from the FREE paper's hyper-parameters for --dataset_name.")
    use_muon: bool = flag(False, "Train hidden matrices with Muon instead of AdamW (from scratch).")
    train_meta_cm_head: bool = flag(False, "Freeze the model and train the confidence head alone.")

    def __post_init__(self) -> None:
        if self.output_hidden_states_decoder and not self.train_meta_cm_head:
            require(
                self.intermediate_loss_fn is not None,
                "--output_hidden_states_decoder needs an --intermediate_loss_fn.",
            )
        require(self.distill_layer_alpha >= 0, "--distill_layer_alpha must not be negative.")
        require_unit_interval("shallow_loss_weight", self.shallow_loss_weight)
        require(
            self.shallow_loss_weight is None or (self.intermediate_loss_fn or "").startswith("shallowdeep_"),
            "--shallow_loss_weight needs --intermediate_loss_fn shallowdeep_*.",
        )
        require(
            not (self.train_meta_cm_head and self.intermediate_loss_fn),
            "--train_meta_cm_head freezes the model: it contradicts --intermediate_loss_fn.",
        )
        require(
            not (self.train_meta_cm_head and self.use_muon),
            "--use_muon is for training from scratch: it contradicts --train_meta_cm_head.",
        )
        require(
            self.per_exit_head is None or self.intermediate_loss_fn is not None,
            "--per_exit_head needs an --intermediate_loss_fn that trains it.",
        )
        distils = (self.intermediate_loss_fn or "").startswith("shallowdeep_kd")
        require(
            distils or not self.do_layer_transformation,
            "--do_layer_transformation needs --intermediate_loss_fn shallowdeep_kd_{last,unif,dyna}.",
        )


@dataclass
class LoraArguments:
    _argument_group_name = "LoRA"

    use_lora: bool = flag(False, "Train low-rank adapters (PEFT) and exit heads instead of all weights.")
    lora_rank: int = flag(16, "Rank of the adapters.")
    lora_alpha: int = flag(32, "Their scale: the update is multiplied by alpha / rank.")
    lora_dropout: float = flag(0.05, "Dropout before the adapters.")
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the linear layers adapted (default: queries and values)."}
    )

    def __post_init__(self) -> None:
        require_positive("lora_rank", self.lora_rank)
        require_positive("lora_alpha", self.lora_alpha)
        require_unit_interval("lora_dropout", self.lora_dropout)
        for name, spec in self.__dataclass_fields__.items():
            changed = getattr(self, name) != spec.default
            require(self.use_lora or not changed, f"--{name} has no effect here: add --use_lora True.")


@dataclass
class ExitArguments:
    """Which tokens stop early. Layers count from 1; thresholds lie in [0, 1]."""

    _argument_group_name = "Early exits"

    deploy_scenario: bool = flag(False, "Measure latency: batch 1, one sample after the other.")
    use_synchronize: bool = flag(True, "Wait for the accelerator at both ends of what is timed.")
    static_exit_layer: int | None = flag(None, "Static-Exiting: every token stops after this layer.")
    use_early_exit: bool = flag(False, "CALM: a token stops at the first layer that is confident enough.")
    exit_conf_type: str = flag("softmax", "CALM's confidence measure.", CONFIDENCE_TYPES)
    exit_conf_threshold: float = flag(0.9, "CALM's threshold.")
    exit_position_temp: float | None = flag(None, "CALM: the threshold decays with position, at this rate.")
    exit_decay_form: str = flag(
        "released", "CALM: the original code's decay, or the one of the CALM paper.", ("released", "paper")
    )
    exit_min_layer: int | None = flag(None, "CALM: no exit before this layer.")
    exit_layers: list[int] | None = field(
        default=None, metadata={"help": "CALM: the only layers after which a token may stop (default: all)."}
    )
    conf_shortlist: str | None = flag(
        None, "Measure softmax confidence over the tokens of this file alone: see scripts/learn_shortlist.py."
    )
    use_shallow_deep: bool = flag(False, "FREE: a token stops at --shallow_exit_layer or runs all layers.")
    shallow_exit_layer: int | None = flag(
        None, "FREE's only exit (default at evaluation: the checkpoint's own)."
    )
    shallow2deep_conf_type: str = flag("softmax", "FREE's confidence measure.", CONFIDENCE_TYPES)
    shallow2deep_conf_threshold: float = flag(0.9, "FREE's threshold, or the adaptive one's first value.")
    parallel_gen_token: bool = flag(True, "FREE: synchronized parallel decoding of the skipped tokens.")
    copy_skipped_hidden_states: bool = flag(False, "FREE: copy states as CALM does, instead of catching up.")
    parallel_causal_mask: bool = flag(True, "FREE: tokens of one parallel pass see only earlier ones.")
    rollback_conf_threshold: float | None = flag(
        None, "FREE: undo a shallow token whose cross-entropy under the deep model exceeds this."
    )
    lossless: bool = flag(
        False, "FREE: verify shallow tokens in the parallel pass, so that output equals full depth's."
    )
    max_pending_tokens: int | None = flag(None, "FREE: run the deep layers once this many tokens wait.")
    use_adapt_threshold: bool = flag(False, "FREE: fit the threshold to the parallel passes (beta mixture).")

    adapt_threshold_file: str | None = flag(
        None, "FREE: continue from the adaptive_threshold.json of an earlier evaluation."
    )
    adapt_zeta: float = flag(0.4, "FREE: how probably right an exit must be under the adaptive threshold.")
    calibrated_threshold_file: str | None = flag(
        None, "Use the threshold that scripts/calibrate.py certified for this model and these settings."
    )

    def __post_init__(self) -> None:
        self._refuse_two_methods()
        for name in ("exit_conf_threshold", "shallow2deep_conf_threshold", "adapt_zeta"):
            require_unit_interval(name, getattr(self, name))
        for name in ("static_exit_layer", "shallow_exit_layer", "exit_min_layer", "exit_position_temp"):
            require_positive(name, getattr(self, name))
        require(
            self.rollback_conf_threshold is None or self.rollback_conf_threshold >= 0,
            f"--rollback_conf_threshold is a cross-entropy, got {self.rollback_conf_threshold}.",
        )
        self._refuse_idle_flags()
        self._check_calibration()
        require_positive("max_pending_tokens", self.max_pending_tokens)
        self._check_measure()
        contradictions = {
            "--copy_skipped_hidden_states": self.copy_skipped_hidden_states,
            "--rollback_conf_threshold": self.rollback_conf_threshold is not None,
            "--parallel_causal_mask False": not self.parallel_causal_mask,
        }
        found = [name for name, given in contradictions.items() if given]
        require(not (self.lossless and found), f"--lossless contradicts {' and '.join(found)}.")
        file = self.adapt_threshold_file
        require(file is None or Path(file).is_file(), f"--adapt_threshold_file: there is no file {file}.")
        require(
            self.parallel_gen_token or self.copy_skipped_hidden_states or not self.use_shallow_deep,
            "--parallel_gen_token False needs --copy_skipped_hidden_states True: skipped tokens would have "
            "no deep keys/values.",
        )
        require(
            not (self.copy_skipped_hidden_states and self.rollback_conf_threshold is not None),
            "--rollback_conf_threshold needs the parallel pass that --copy_skipped_hidden_states removes.",
        )

    @property
    def methods(self) -> list[str]:
        """The flags, of those that name a method, that are set."""
        chosen = {
            "--static_exit_layer": self.static_exit_layer is not None,
            "--use_early_exit": self.use_early_exit,
            "--use_shallow_deep": self.use_shallow_deep,
        }
        return [name for name, on in chosen.items() if on]

    def _check_measure(self) -> None:
        require(
            self.exit_layers is None or self.exit_min_layer is None,
            "--exit_layers and --exit_min_layer contradict: choose one.",
        )
        path = self.conf_shortlist
        require(path is None or Path(path).is_file(), f"--conf_shortlist: there is no file {path}.")
        tests = self.use_early_exit or self.use_shallow_deep
        require(path is None or tests, "--conf_shortlist has no effect here: add a method that tests.")
        kind = self.exit_conf_type if self.use_early_exit else self.shallow2deep_conf_type
        require(path is None or kind == "softmax", "--conf_shortlist needs the confidence type softmax.")

    def _check_calibration(self) -> None:
        file, name = self.calibrated_threshold_file, "--calibrated_threshold_file"
        require(file is None or Path(file).is_file(), f"{name}: there is no file {file}.")
        tests = self.use_early_exit or self.use_shallow_deep
        require(file is None or tests, f"{name} has no effect here: add the method that was calibrated.")
        found = [other for other in ("use_adapt_threshold", "lossless") if getattr(self, other)]
        require(file is None or not found, f"{name} contradicts --{' and --'.join(found)}.")

    def _refuse_two_methods(self) -> None:
        require(len(self.methods) <= 1, f"{' and '.join(self.methods)} contradict: choose one method.")

    def _refuse_idle_flags(self) -> None:
        """Refuse flags of a method, or of the adaptive threshold, that is not switched on."""
        groups = {
            "use_early_exit": (self.use_early_exit, CALM_FLAGS),
            "use_shallow_deep": (self.use_shallow_deep, FREE_FLAGS),
            "use_adapt_threshold": (self.use_adapt_threshold, ADAPTIVE_FLAGS),
        }
        for switch, (on, names) in groups.items():
            for name in names:
                changed = getattr(self, name) != self.__dataclass_fields__[name].default
                require(on or not changed, f"--{name} has no effect here: add --{switch} True.")


@dataclass
class Arguments:
    """Everything one run was asked for."""

    model: ModelArguments
    data: DataArguments
    loss: LossArguments
    lora: LoraArguments
    exit: ExitArguments
    training: Seq2SeqTrainingArguments

    @property
    def max_length(self) -> int:
        """Tokens of the longest output, as `generate` counts them."""
        return self.training.generation_max_length or self.data.val_max_target_length

    def __post_init__(self) -> None:
        training, exits = self.training, self.exit
        self.data.report_dir = training.output_dir if training.process_index == 0 else None
        self._check_training()
        self.data.hub = {"token": self.model.token, "cache_dir": self.model.cache_dir}
        stages = (training.do_train, training.do_eval, training.do_predict)
        require(any(stages), "Nothing to do: add --do_train, --do_eval or --do_predict.")
        require(
            training.do_train or self.model.model_name_or_path is not None,
            "--config_name starts from random weights: add --do_train or give --model_name_or_path.",
        )
        require(
            training.do_train or not self.lora.use_lora,
            "--use_lora is for training: a saved adapter is recognised where it is loaded.",
        )
        other = [name for name in ("use_muon", "train_meta_cm_head") if getattr(self.loss, name)]
        require(
            not (self.lora.use_lora and other),
            f"--use_lora and --{' --'.join(other)} contradict: choose one.",
        )
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
            require_positive(name, getattr(training, name))
        self._make_output_dir()
        require(
            exits.calibrated_threshold_file is None or not training.do_train,
            "--calibrated_threshold_file is for the weights it was calibrated with: leave --do_train out.",
        )
        evaluates = training.do_eval or training.do_predict
        require(
            not (exits.deploy_scenario and evaluates and training.per_device_eval_batch_size > 1),
            "--deploy_scenario measures latency at batch 1: add --per_device_eval_batch_size 1.",
        )
        require(
            self.data.num_beams == 1 or not exits.methods,
            f"{' '.join(exits.methods)} decodes greedily: leave --num_beams at 1.",
        )

    def _check_training(self) -> None:
        training, data = self.training, self.data
        for name in ("seed", "data_seed"):
            seed = getattr(training, name)
            require(seed is None or 0 <= seed < 2**32, f"--{name} must lie in 0..{2**32 - 1}, got {seed}.")
        require(
            not data.streaming or training.max_steps > 0 or not training.do_train,
            "--streaming does not know how long an epoch is: add --max_steps.",
        )
        patience = self.loss.early_stopping_patience
        require_positive("early_stopping_patience", patience)
        require(
            patience is None or training.load_best_model_at_end,
            "--early_stopping_patience needs --load_best_model_at_end True, --eval_strategy and "
            "--save_strategy.",
        )
        by_task = training.load_best_model_at_end and training.predict_with_generate
        if by_task and training.metric_for_best_model in (None, "loss"):
            training.metric_for_best_model = TASKS[data.task].main_score
            training.greater_is_better = True
        launched = launched_processes()
        require(
            not (self.exit.deploy_scenario and launched > 1),
            "--deploy_scenario measures latency in one process: start run.py without torchrun.",
        )
        require(
            training.world_size == launched,
            f"{launched} processes were started, but do not work together on {training.device}: leave "
            "--use_cpu and --ddp_backend out, or start run.py without torchrun.",
        )

    def _make_output_dir(self) -> None:
        """Find out now, not after hours, whether results can be written."""
        make_output_dir(Path(self.training.output_dir))
        resume = self.training.resume_from_checkpoint
        require(
            resume is None or Path(resume).is_dir(),
            f"--resume_from_checkpoint: there is no folder {resume}; by default the newest is used.",
        )


@dataclass
class PaperSettings:
    """The two flags that are read before all others."""

    paper_settings: bool = False
    dataset_name: str | None = None


def whole_number(text: str) -> int:
    """The type of a whole-number flag of a plain argparse parser."""
    value = int(text)
    if abs(value) > LARGEST:
        raise argparse.ArgumentTypeError(f"{text} is too large: whole numbers have 64 bits")
    return value


OUR_GROUPS = (ModelArguments, DataArguments, LossArguments, LoraArguments, ExitArguments)
"""The flags of run.py but for the Trainer's."""


class Parser(HfArgumentParser):
    """An HfArgumentParser whose complaints are one line, and whose help is ours."""

    def format_help(self) -> str:
        groups = [group for group in self.dataclass_types if hasattr(group, "_argument_group_name")]
        return describe_flags(
            groups, self.description or "", training=len(groups) < len(self.dataclass_types)
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(message[0].upper() + message[1:])


def parse_groups(
    groups: tuple[type, ...], description: str, argv: list[str] | None = None
) -> tuple[Any, ...]:
    """One dataclass a group, from the flags of a script.

    Raises:
        UserError: unknown, missing, malformed or contradictory flags.
    """
    return parse_exactly(Parser(groups, description=description), argv)


def parse_exactly(parser: Parser, argv: list[str] | None) -> tuple[Any, ...]:
    """The parser's dataclasses; UserError if a word is left over."""
    *groups, rest = parser.parse_args_into_dataclasses(
        argv, look_for_args_file=False, return_remaining_strings=True
    )
    if rest:
        near = difflib.get_close_matches(rest[0].split("=")[0], parser._option_string_actions, n=1)
        raise UserError(f"Unknown flag {rest[0]}" + (f": did you mean {near[0]}?" if near else "."))
    refuse_huge_numbers(groups)
    return tuple(groups)


def refuse_huge_numbers(groups: Iterable[Any]) -> None:
    """Raise UserError for a whole number that no size, count or seed can be: they have 64 bits."""
    for name, value in ((name, value) for group in groups for name, value in vars(group).items()):
        for number in value if isinstance(value, list) else [value]:
            fine = not isinstance(number, int) or abs(number) <= LARGEST
            require(fine, f"--{name} {number} is too large: whole numbers have 64 bits.")


def parse_arguments(argv: list[str] | None = None, description: str = "") -> Arguments:
    """Parse and validate the flags of run.py.

    Raises:
        UserError: unknown, missing, malformed or contradictory flags.
    """
    from transformers import Seq2SeqTrainingArguments  # torch comes with it, and --help needs none

    parser = Parser((*OUR_GROUPS, Seq2SeqTrainingArguments), description=description)
    argv = expand_argument_file(list(sys.argv[1:] if argv is None else argv))
    if "--help_all" in argv:
        print(HfArgumentParser.format_help(parser))
        sys.exit(0)
    argv = cpu_launch_flags() + expand_scratch_settings(expand_paper_settings(argv))
    try:
        return Arguments(*parse_exactly(parser, argv))
    except UserError:
        raise
    except (ValueError, ImportError) as error:  # from TrainingArguments' own checks
        raise UserError(" ".join(str(error).split())) from error


def launched_processes() -> int:
    """How many processes torchrun started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def cpu_launch_flags() -> list[str]:
    """What processes of torchrun need without GPUs in order to work together; given flags override it."""
    from util.device import best_device  # torch comes with it, and --help needs none

    has_gpus = best_device().type not in ("cpu", "mps")  # Apple's has no collectives
    if has_gpus or launched_processes() == 1 or "LOCAL_RANK" not in os.environ:
        return []
    return ["--use_cpu", "True", "--ddp_backend", "gloo"]


def expand_argument_file(argv: list[str]) -> list[str]:
    """Replace a leading .json/.yaml file of arguments by the flags it stands for; later flags override."""
    if not argv or Path(argv[0]).suffix not in (".json", ".yaml", ".yml"):
        return argv
    path = Path(argv[0])
    require(path.is_file(), f"There is no argument file {path}.")
    text = read_text(path)
    settings = decode_json(text, str(path)) if path.suffix == ".json" else decode_yaml(text, str(path))
    require(isinstance(settings, dict), f"{path} must hold one mapping of argument names to values.")
    return [text for name, value in settings.items() for text in as_flags(name, value)] + argv[1:]


def decode_yaml(text: str, place: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{place}: not YAML ({' '.join(str(error).split())}).") from error


def expand_paper_settings(argv: list[str]) -> list[str]:
    """Put the paper's hyper-parameters before the other flags, which override them, if they are wanted."""
    parser = Parser((PaperSettings,), add_help=False, allow_abbrev=False)  # --help is for the whole
    wanted = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )[0]
    if not wanted.paper_settings:
        return argv
    record = DATASETS.get(wanted.dataset_name)
    require(
        record is not None and bool(record.training),
        f"--paper_settings: the paper has no data set {wanted.dataset_name!r}.",
    )
    return [text for name, value in record.training.items() for text in as_flags(name, value)] + argv


def expand_scratch_settings(argv: list[str]) -> list[str]:
    """Put what trains random weights before the flags of a run with --config_name, and say so.

    The Trainer's own defaults are for fine-tuning: its learning rate hardly moves random weights, and small
    runs end before the first line with a loss. The paper's settings stay as they are.
    """
    given = {word.split("=")[0].lstrip("-").replace("-", "_") for word in argv if word.startswith("--")}
    if "config_name" not in given or "paper_settings" in given:
        return argv
    chosen = {name: value for name, value in SCRATCH_SETTINGS.items() if name not in given}
    flags = [text for name, value in chosen.items() for text in as_flags(name, value)]
    if flags and given & {"do_train"}:
        logger.info("Random weights: training with %s, as no flags say otherwise.", " ".join(flags))
    return flags + argv


def as_flags(name: str, value: Any) -> list[str]:
    """One setting as command-line words; None keeps the default."""
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", json.dumps(value, default=str) if isinstance(value, dict) else str(value)]


def non_default_settings(*groups: Any) -> dict[str, Any]:
    """The settings of argument dataclasses that differ from their defaults and can change a result."""
    settings = {}
    for group in groups:
        for name, spec in group.__dataclass_fields__.items():
            if name in WITHOUT_EFFECT:
                continue
            default = spec.default_factory() if spec.default_factory is not MISSING else spec.default
            value = getattr(group, name)
            if value != default and isinstance(value, (str, int, float, bool, list, dict)):
                settings[name] = value
    return settings
