"""The flags of run.py as dataclasses, but for those of decoding, in util/exit_arguments.py, and of what a
training minimises, in util/loss_arguments.py.

`parse_arguments(argv)` accepts flags, or one JSON/YAML file of them followed by flags that override it.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import UserError
from util.backend_arguments import BackendArguments
from util.exit_arguments import ExitArguments
from util.flags import (
    Parser,
    expand_argument_file,
    flag,
    refuse_unread_flags,
    require,
    require_file,
    require_not_negative,
    require_positive,
)
from util.loss_arguments import LoraArguments, LossArguments
from util.presets import cpu_launch_flags, expand_paper_settings, expand_scratch_settings, launched_processes
from util.tasks import DATASETS, TASKS

if TYPE_CHECKING:
    from transformers import Seq2SeqTrainingArguments


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


EXIT_ADAPTER_HELP = "Exit of a frozen model, as scripts/train_exit.py writes it: folder or hub id."


@dataclass
class ModelArguments:
    _argument_group_name = "Model"

    model_name_or_path: str | None = flag(None, "Checkpoint: hub id or folder. Omit to train from scratch.")
    config_name: str | None = flag(None, "Config (hub id, folder or .json) of a model to train from scratch.")
    exit_adapter_path: str | None = flag(None, EXIT_ADAPTER_HELP)
    tokenizer_name: str | None = flag(None, "Tokenizer, if it is not the checkpoint's own.")
    cache_dir: str | None = flag(None, "Where downloads are kept.", changes_outputs=False)
    model_revision: str = flag("main", "Branch, tag or commit of the checkpoint.")
    token: str | None = flag(
        None, "Access token for private checkpoints (default: the one of `hf auth`).", changes_outputs=False
    )

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
    prompt_template: str | None = flag(
        None,
        "How a model without an encoder is asked; {source} is the place of the source, \\n a line break "
        "(default: the task's).",
    )
    use_chat_template: bool = flag(
        False, "Ask it by a message of its tokenizer's chat template, which holds the prompt."
    )
    num_shots: int = flag(0, "Examples of the training split that a prompt shows first.")
    shot_seed: int = flag(0, "Seed by which they are drawn.")
    data_dir: str | None = flag(
        None, "Folder of local files, named <split> or <data set>.<split>, read instead of the hub."
    )
    streaming: bool = flag(False, "Read training rows as they are needed; needs --max_steps.")
    max_source_length: int = flag(None, "Sources are cut to this many tokens (default: the data set's).")
    max_target_length: int = flag(
        None, "Training targets are cut to this many tokens (default: the data set's)."
    )
    doc_stride: int = flag(
        128, "Question answering: tokens that neighbouring windows of a long context share."
    )
    val_max_target_length: int = flag(None, "Longest output of an evaluation (default: --max_target_length).")
    drop_long_samples: bool = flag(False, "Leave out rows over these lengths instead of cutting them.")
    max_train_samples: int | None = flag(None, "Use only the first rows for training.")
    max_eval_samples: int | None = flag(None, "Use only the first rows for --do_eval.")
    max_predict_samples: int | None = flag(None, "Use only the first rows for --do_predict.")
    num_beams: int = flag(1, "Beams of an evaluation at full depth; early exits are greedy.")
    preprocessing_num_workers: int | None = flag(None, "Processes that tokenize.", changes_outputs=False)
    resume_eval: bool = flag(
        False, "Continue an interrupted evaluation from its predictions.jsonl.", changes_outputs=False
    )
    baseline_predictions: str | None = flag(
        None,
        "Full depth's predictions.jsonl for the same rows: test whether quality differs (paired bootstrap).",
        changes_outputs=False,
    )
    sources_alone: bool = field(default=False, init=False)  # rows of prompts, which may lack targets
    report_dir: str | None = field(default=None, init=False)  # where skipped rows are listed
    hub: dict[str, Any] = field(default_factory=dict, init=False)  # --token and --cache_dir, for downloads

    def __post_init__(self) -> None:
        local = [self.train_file, self.validation_file, self.test_file]
        require(
            bool(self.dataset_name or self.data_dir or any(local)),
            "No data: give --dataset_name, --data_dir, or --train_file / --validation_file / --test_file.",
        )
        for name in ("train_file", "validation_file", "test_file", "baseline_predictions"):
            require_file(name, getattr(self, name))
        if self.dataset_name and not (self.data_dir or any(local)):
            refuse_misspelt_dataset(self.dataset_name)
        known = DATASETS.get(self.dataset_name or "")
        if self.max_source_length is None:
            self.max_source_length = known.max_source_length if known else 512
        if self.max_target_length is None:
            self.max_target_length = known.max_target_length if known else 128
        require(
            0 < self.doc_stride < self.max_source_length or self.task != "question_answering",
            f"--doc_stride must be below --max_source_length {self.max_source_length}.",
        )
        require(
            self.data_dir is None or Path(self.data_dir).exists(), f"--data_dir: there is no {self.data_dir}."
        )
        for name in ("max_source_length", "max_target_length", "val_max_target_length", "num_beams"):
            require_positive(name, getattr(self, name))
        require_not_negative("num_shots", self.num_shots)
        for name in ("max_target_length", "val_max_target_length"):
            length = getattr(self, name)
            require(length is None or length > 1, f"--{name} must leave room for a token: at least 2.")
        for name in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
            require_positive(name, getattr(self, name))
        if self.val_max_target_length is None:
            self.val_max_target_length = self.max_target_length


LIMITS = ("max_train_samples", "max_eval_samples", "max_predict_samples")
LEAVE_IT_OUT = "leave it out"
OF_RUN_ALONE = {  # of DataArguments what no script reads, and what to do instead
    **dict.fromkeys(("streaming", "preprocessing_num_workers"), "it is for run.py --do_train; leave it out"),
    "baseline_predictions": "it is for run.py; leave it out",
}
OF_RUN = {  # what most do not read, either
    **OF_RUN_ALONE,
    **dict.fromkeys(LIMITS, LEAVE_IT_OUT),
    "num_beams": "this decodes greedily; leave it out",
    "resume_eval": "this begins anew each time; leave it out",
}


def refuse_flags_of_run(
    data: DataArguments, *, reads: Iterable[str] = (), limits: str = LEAVE_IT_OUT, **instead: str
) -> None:
    """Raise UserError for flags of run.py that a script takes with its data and does not read: all but those
    that it `reads`. `limits` says what to do instead of limiting rows as run.py does, `instead` of others."""
    ways = OF_RUN | dict.fromkeys(LIMITS, limits) | instead
    refuse_unread_flags(data, {name: way for name, way in ways.items() if name not in set(reads)})


@dataclass
class Arguments:
    """Everything one run was asked for."""

    model: ModelArguments
    data: DataArguments
    loss: LossArguments
    lora: LoraArguments
    exit: ExitArguments
    backend: BackendArguments
    training: Seq2SeqTrainingArguments

    @property
    def max_length(self) -> int:
        """Tokens of the longest output, as `generate` counts them."""
        return self.training.generation_max_length or self.data.val_max_target_length

    def __post_init__(self) -> None:
        training, exits = self.training, self.exit
        self._check_training()
        stages = (training.do_train, training.do_eval, training.do_predict)
        require(any(stages), "Nothing to do: add --do_train, --do_eval or --do_predict.")
        require(
            training.do_train or self.model.model_name_or_path is not None,
            "--config_name starts from random weights: add --do_train or give --model_name_or_path.",
        )
        require(
            not (training.do_train and self.model.exit_adapter_path),
            "--exit_adapter_path is for a frozen model: leave --do_train out, or the exit.",
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
        resume = training.resume_from_checkpoint
        require(
            resume is None or Path(resume).is_dir(),
            f"--resume_from_checkpoint: there is no folder {resume}; by default the newest is used.",
        )
        require(
            exits.calibrated_threshold_file is None or not training.do_train,
            "--calibrated_threshold_file is for the weights it was calibrated with: leave --do_train out.",
        )
        self._check_generation()
        self._check_evaluation()

    def _check_generation(self) -> None:
        """The Trainer's flags of generation."""
        training = self.training
        length = training.generation_max_length
        require(
            length is None or length > 1, "--generation_max_length must leave room for a token: at least 2."
        )
        decodes = training.do_train and training.predict_with_generate
        require(
            training.generation_num_beams is None or decodes,
            "--generation_num_beams is for evaluations amid training, --predict_with_generate True: of "
            "--do_eval and --do_predict, --num_beams is.",
        )

    def _check_evaluation(self) -> None:
        training, exits = self.training, self.exit
        evaluates = training.do_eval or training.do_predict
        require(
            not (exits.deploy_scenario and evaluates and training.per_device_eval_batch_size > 1),
            "--deploy_scenario measures latency at batch 1: add --per_device_eval_batch_size 1.",
        )
        require(
            not (exits.auto_exit and evaluates and training.per_device_eval_batch_size > 1),
            "--auto_exit decodes one sequence at a time: add --per_device_eval_batch_size 1.",
        )
        require(
            exits.lookup_tokens is None or not evaluates or training.per_device_eval_batch_size == 1,
            "--lookup_tokens decodes one sequence at a time: add --per_device_eval_batch_size 1.",
        )
        greedy = [*exits.methods, *(["--lookup_tokens"] if exits.lookup_tokens else [])]
        require(
            self.data.num_beams == 1 or not greedy,
            f"{' '.join(greedy)} decodes greedily: leave --num_beams at 1.",
        )
        require(
            self.data.baseline_predictions is None or not (training.do_eval and training.do_predict),
            "--baseline_predictions is of one split: run --do_eval and --do_predict one after the other.",
        )
        self.backend.for_evaluation(exits, self.data.num_beams)

    @property
    def evaluation_backend(self) -> BackendArguments:
        """What runs evaluations."""
        return self.backend.for_evaluation(self.exit, self.data.num_beams)

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

    def connect(self) -> None:
        """Tell each group what it needs of the others; called where a run starts."""
        training, data = self.training, self.data
        data.report_dir = training.output_dir if training.process_index == 0 else None
        data.hub = {"token": self.model.token, "cache_dir": self.model.cache_dir}
        by_task = training.load_best_model_at_end and training.predict_with_generate
        if by_task and training.metric_for_best_model in (None, "loss"):
            training.metric_for_best_model = TASKS[data.task].main_score
            training.greater_is_better = True


def parse_arguments(argv: Sequence[str] | None = None, description: str = "") -> Arguments:
    """Parse and validate the flags of run.py.

    Raises:
        UserError: unknown, missing, malformed or contradictory flags.
    """
    return parse_with_run((), description, argv)[0]


def parse_with_run(
    groups: Sequence[type], description: str, argv: Sequence[str] | None = None
) -> tuple[Any, ...]:
    """One dataclass a group of a script that takes run.py's flags as well, and then those: `Arguments`.

    Raises:
        UserError: unknown, missing, malformed or contradictory flags.
    """
    from transformers import (  # torch comes with it; --help needs none
        HfArgumentParser,
        Seq2SeqTrainingArguments,
    )

    trainer = HfArgumentParser((Seq2SeqTrainingArguments,), add_help=False)
    parser = Parser((*groups, *OUR_GROUPS), description, (Seq2SeqTrainingArguments, trainer))
    argv = expand_argument_file(argv)
    if "--help_all" in argv:
        print(argparse.ArgumentParser.format_help(parser))
        sys.exit(0)
    given, _ = parser.read(argv)
    if given.get("paper_settings"):
        argv = expand_paper_settings(argv, given.get("dataset_name"))
    argv = cpu_launch_flags() + expand_scratch_settings(argv)
    try:
        built = parser.parse(argv)
        return *built[: len(groups)], Arguments(*built[len(groups) :])
    except UserError:
        raise
    except (ValueError, ImportError) as error:  # from TrainingArguments' own checks
        raise UserError(" ".join(str(error).split())) from error


OUR_GROUPS = (ModelArguments, DataArguments, LossArguments, LoraArguments, ExitArguments, BackendArguments)
"""The flags of run.py but for the Trainer's."""
