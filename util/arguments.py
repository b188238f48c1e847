"""The flags of run.py as dataclasses, but for those of data, in util/data_arguments.py, of decoding, in
util/exit_arguments.py, and of what a training minimises, in util/loss_arguments.py.

`parse_arguments(argv)` accepts flags, or one JSON/YAML file of them followed by flags that override it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import UserError
from util.backend_arguments import BackendArguments
from util.data_arguments import LEAVE_IT_OUT, DataArguments
from util.exit_arguments import ExitArguments
from util.flags import (
    Parser,
    expand_argument_file,
    flag,
    flags_in,
    refuse_unread_flags,
    require,
    require_positive,
)
from util.loss_arguments import LoraArguments, LossArguments
from util.presets import cpu_launch_flags, expand_paper_settings, expand_scratch_settings, launched_processes
from util.tasks import TASKS

if TYPE_CHECKING:
    from transformers import Seq2SeqTrainingArguments


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
class Arguments:
    """Everything one run was asked for."""

    model: ModelArguments
    data: DataArguments
    loss: LossArguments
    lora: LoraArguments
    exit: ExitArguments
    backend: BackendArguments
    training: Seq2SeqTrainingArguments
    best_by_loss: bool = field(default=False, init=False)  # as a flag says; the Trainer does where none does

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
            self.model.exit_adapter_path is None or bool(exits.methods),
            "--exit_adapter_path has no effect at full depth: add --use_shallow_deep True.",
        )
        require(
            not (training.do_train and self.backend.exit_precision),
            "--exit_precision is of a frozen model's exit adapter: leave --do_train out, or the precision.",
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
        decodes = training.do_eval or training.do_predict
        decodes = decodes or (training.do_train and training.predict_with_generate)
        learning = [name for name in ("use_adapt_threshold", "auto_exit") if getattr(self.exit, name)]
        require(
            not (learning and decodes and launched > 1),
            f"--{' '.join(learning)} learns from sample to sample, and would learn otherwise from a share: "
            "start run.py without torchrun.",
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
        if by_task and not self.best_by_loss and training.metric_for_best_model in (None, "loss"):
            training.metric_for_best_model = TASKS[data.task].main_score
            training.greater_is_better = True


def parse_arguments(argv: Sequence[str] | None = None, description: str = "") -> Arguments:
    """Parse and validate the flags of run.py.

    Raises:
        UserError: unknown, missing, malformed or contradictory flags.
    """
    arguments = parse_with_run((), description, argv)[0]
    if not arguments.training.do_train:
        refuse_flags_of_training(arguments)
    return arguments


def refuse_flags_of_training(arguments: Arguments) -> None:
    """Raise UserError for a flag that training alone reads; limits on its rows are left, as one file of flags
    serves all stages."""
    way = f"add --do_train, or {LEAVE_IT_OUT}"
    refuse_unread_flags(arguments.data, dict.fromkeys(("streaming", "preprocessing_num_workers"), way))
    losses = (spec.name for spec in flags_in(arguments.loss) if spec.name != "paper_settings")  # of both
    refuse_unread_flags(arguments.loss, dict.fromkeys(losses, way))


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
    argv = expand_argument_file(argv, parser)
    if "--help_all" in argv:
        print(argparse.ArgumentParser.format_help(parser))
        sys.exit(0)
    given, _ = parser.read(argv)
    if given.get("paper_settings"):
        argv = expand_paper_settings(argv, given.get("dataset_name"))
    argv = cpu_launch_flags() + expand_scratch_settings(argv, given)
    try:
        built = parser.parse(argv)
        arguments = Arguments(*built[len(groups) :])
        arguments.best_by_loss = given.get("metric_for_best_model") == "loss"
        return *built[: len(groups)], arguments
    except UserError:
        raise
    except (ValueError, ImportError) as error:  # from TrainingArguments' own checks
        raise UserError(" ".join(str(error).split())) from error


OUR_GROUPS = (ModelArguments, DataArguments, LossArguments, LoraArguments, ExitArguments, BackendArguments)
"""The flags of run.py but for the Trainer's."""
