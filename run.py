"""Train and evaluate early-exiting language models: `python run.py --help`, or `python run.py args.yaml`.

Methods are switched on by flags: --static_exit_layer (Static-Exiting), --use_early_exit (CALM),
--use_shallow_deep (FREE); none of them decodes at full depth.
"""

from __future__ import annotations

import errno
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    DataCollatorForSeq2Seq,
    EarlyStoppingCallback,
    Seq2SeqTrainingArguments,
    set_seed,
)
from transformers.trainer_utils import TrainOutput

from models.decoder_view import DecoderView, view_for
from models.errors import UserError
from models.exit_heads import ExitConfig, attach_exit_heads, freeze_backbone
from models.loading import LoadedModel, cast_model, create_model, load_model
from models.lora import add_lora, is_adapted, merge_lora
from models.losses import ConfidenceHeadLoss, ExitLoss, build_confidence_head_loss, build_exit_loss
from models.threshold import AdaptiveThreshold
from util.arguments import Arguments, ExitArguments, non_default_settings, parse_arguments
from util.data import dataset_record, load_examples, tokenize
from util.evaluation import EvaluationSettings, evaluate
from util.metrics import token_metrics
from util.optimizer import build_muon
from util.policies import build_policy, resolve_exit_arguments, with_calibrated_threshold
from util.report import comparison_table, print_report, write_json
from util.streaming import stream_training_rows
from util.trainer import EarlyExitTrainer, last_complete_checkpoint

logger = logging.getLogger(__name__)

FP16_OVERFLOWS = ("t5", "mt5", "umt5", "longt5")


def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        run(parse_arguments(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def run(arguments: Arguments) -> None:
    set_seed(arguments.training.seed)
    loaded = build_model(arguments)
    exit_flags = resolve_exit_arguments(arguments.exit, loaded.exit_config, view_for(loaded.model).num_layers)
    if arguments.training.do_train:
        train(arguments, exit_flags, loaded)
    stages = {"eval": arguments.training.do_eval, "predict": arguments.training.do_predict}
    for stage, wanted in stages.items():
        if wanted:
            evaluate_stage(stage, arguments, exit_flags, loaded)


def evaluate_stage(stage: str, arguments: Arguments, exit_flags: ExitArguments, loaded: LoadedModel) -> None:
    """Decode the validation or test split and write `<stage>_results.json` and the predictions."""
    data, training = arguments.data, arguments.training
    split, limit, predictions = {
        "eval": ("validation", data.max_eval_samples, "predictions.jsonl"),
        "predict": ("test", data.max_predict_samples, "predictions_test.jsonl"),
    }[stage]
    examples = load_examples(dataset_record(data), data, split, loaded.tokenizer, limit)
    place(loaded, training)
    lengths = (longest_output(arguments), training.per_device_eval_batch_size)
    exit_flags = with_calibrated_threshold(exit_flags, data, loaded, examples, *lengths)
    settings = evaluation_settings(arguments, exit_flags, predictions)
    policy = build_policy(exit_flags, loaded, settings.max_length) if data.num_beams == 1 else None
    results = evaluate(loaded, policy, examples, settings)
    if results is None:  # another process gathers and reports
        return
    write_json(Path(training.output_dir, f"{stage}_results.json"), results)
    if isinstance(getattr(policy, "threshold", None), AdaptiveThreshold):
        policy.threshold.save(Path(training.output_dir, "adaptive_threshold.json"))
    shown = {name: value for name, value in results.items() if isinstance(value, (int, float))}
    print_report(comparison_table(f"{stage}: {split}", {"name": "", "value": ""}, as_rows(shown)))


def evaluation_settings(
    arguments: Arguments, exit_flags: ExitArguments, predictions: str
) -> EvaluationSettings:
    """How the flags want a split decoded, into the file `predictions` of --output_dir."""
    data, training = arguments.data, arguments.training
    max_length = longest_output(arguments)
    return EvaluationSettings(
        task=data.task,
        max_source_length=data.max_source_length,
        max_length=max_length,
        batch_size=training.per_device_eval_batch_size,
        num_beams=data.num_beams,
        synchronize=exit_flags.use_synchronize,
        predictions_file=Path(training.output_dir, predictions),
        arguments=non_default_settings(arguments.model, data, exit_flags)
        | {"batch_size": training.per_device_eval_batch_size, "max_length": max_length},
        resume=data.resume_eval,
        baseline_predictions=Path(data.baseline_predictions) if data.baseline_predictions else None,
    )


def longest_output(arguments: Arguments) -> int:
    return arguments.training.generation_max_length or arguments.data.val_max_target_length


def as_rows(figures: dict[str, float]) -> list[dict[str, float | str]]:
    return [{"name": name, "value": value} for name, value in figures.items()]


def place(loaded: LoadedModel, training: Seq2SeqTrainingArguments) -> None:
    """Put the model on the run's device, in the precision asked for, ready to decode."""
    halves = {torch.bfloat16: training.bf16_full_eval, torch.float16: training.fp16_full_eval}
    dtype = next((dtype for dtype, wanted in halves.items() if wanted), torch.float32)
    cast_model(loaded.model.to(training.device), dtype).eval()


def build_model(arguments: Arguments) -> LoadedModel:
    """Load the checkpoint, or create a model from a config, as the flags say."""
    flags = arguments.model
    hub = {"cache_dir": flags.cache_dir, "revision": flags.model_revision, "token": flags.token}
    if flags.model_name_or_path:
        return load_model(
            flags.model_name_or_path, flags.tokenizer_name, merge_adapter=not arguments.lora.use_lora, **hub
        )
    return create_model(flags.config_name, flags.tokenizer_name, **hub)


def train(arguments: Arguments, exit_flags: ExitArguments, loaded: LoadedModel) -> None:
    """Train, continuing from the newest complete checkpoint in --output_dir, and save the result there."""
    loss, exit_config = build_loss(arguments, loaded)
    if arguments.training.fp16 and loaded.model.config.model_type in FP16_OVERFLOWS:
        raise UserError(f"{loaded.model.config.model_type} overflows when trained in fp16: use --bf16.")
    if arguments.lora.use_lora and not is_adapted(loaded.model):
        flags = arguments.lora
        settings = (flags.lora_rank, flags.lora_alpha, flags.lora_dropout, flags.lora_target_modules)
        loaded.model = add_lora(loaded.model, *settings)
    trainer = build_trainer(arguments, loaded, exit_loss=loss, exit_config=exit_config)
    if exit_flags.methods:
        trainer.exit_policy = build_policy(exit_flags, loaded, trainer.args.generation_max_length)
    resume = arguments.training.resume_from_checkpoint
    resume = resume or last_complete_checkpoint(arguments.training.output_dir)
    if resume is not None:
        refuse_other_exits(resume, exit_config)
        logger.info("Continuing from %s.", resume)
    result = train_or_explain(trainer, resume)
    trainer.save_model()
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    loaded.model = merge_lora(loaded.model)


def train_or_explain(trainer: EarlyExitTrainer, resume: str | None) -> TrainOutput:
    """Train; a full disk is answered by one line, as nothing is lost."""
    try:
        return trainer.train(resume_from_checkpoint=resume)
    except (OSError, RuntimeError, SafetensorError) as error:
        folder = trainer.args.output_dir
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error) or is_full(folder):
            raise UserError(
                f"--output_dir {folder}: no space left on the disk. Free some and run the same command: it "
                "continues from the newest whole checkpoint."
            ) from error
        raise


def is_full(folder: str) -> bool:
    return shutil.disk_usage(folder).free < 1 << 20


def refuse_other_exits(checkpoint: str, exit_config: ExitConfig) -> None:
    """Raise UserError if a training run to continue was begun with another exit loss or layer."""
    if ExitConfig.load(checkpoint) != exit_config:
        raise UserError(
            f"{checkpoint} was begun with other exit settings: use its flags, or another --output_dir."
        )


def build_loss(
    arguments: Arguments, loaded: LoadedModel
) -> tuple[ExitLoss | ConfidenceHeadLoss | None, ExitConfig]:
    """The loss that the flags name and the exit configuration to save with the checkpoint."""
    flags = arguments.loss
    trains_all_layers = flags.intermediate_loss_fn in ("ce", "weighted_ce")
    inherited_layer = None if trains_all_layers else loaded.exit_config.shallow_exit_layer
    shallow_layer = arguments.exit.shallow_exit_layer or inherited_layer
    if flags.intermediate_loss_fn and not trains_all_layers and shallow_layer is None:
        raise UserError(f"--intermediate_loss_fn {flags.intermediate_loss_fn} needs --shallow_exit_layer.")
    before = loaded.exit_config
    distils = (flags.intermediate_loss_fn or "").startswith("shallowdeep_kd")
    exit_config = ExitConfig(
        flags.intermediate_loss_fn or before.intermediate_loss_fn,
        shallow_layer,
        flags.distill_layer_alpha if distils else None,
        flags.do_layer_transformation or before.do_layer_transformation,
        flags.train_meta_cm_head or before.train_meta_cm_head,
        flags.per_exit_head or before.per_exit_head,
    )
    attach_exit_heads(loaded.model, exit_config)
    view = view_for(loaded.model)
    keep_all_layers(view)
    if flags.train_meta_cm_head:
        freeze_backbone(loaded.model)
        return build_confidence_head_loss(view, shallow_layer), exit_config
    if flags.intermediate_loss_fn is None:
        return None, exit_config
    smoothing = arguments.training.label_smoothing_factor
    loss = build_exit_loss(
        view,
        flags.intermediate_loss_fn,
        shallow_layer,
        flags.distill_layer_alpha,
        smoothing,
        shallow_weight=flags.shallow_loss_weight,
    )
    return loss, exit_config


def keep_all_layers(view: DecoderView) -> None:
    """Switch LayerDrop off: exit losses need every layer's state at its place."""
    if getattr(view.decoder, "layerdrop", 0) > 0:
        logger.warning("Training without decoder_layerdrop: exit losses need every layer.")
        view.decoder.layerdrop = 0.0


def build_trainer(arguments: Arguments, loaded: LoadedModel, **exit_options: Any) -> EarlyExitTrainer:
    data, training, tokenizer = arguments.data, arguments.training, loaded.tokenizer
    record = dataset_record(data)
    if data.streaming:
        train_rows = stream_training_rows(record, data, tokenizer, training.seed)
    else:
        train_rows = load_examples(record, data, "train", tokenizer, data.max_train_samples)
        train_rows = tokenize(train_rows, tokenizer, data, data.max_target_length)
    eval_rows = None
    if training.eval_strategy != "no":
        eval_rows = load_examples(record, data, "validation", tokenizer, data.max_eval_samples)
        eval_rows = tokenize(eval_rows, tokenizer, data, data.val_max_target_length)
    if training.generation_max_length is None:
        training.generation_max_length = data.val_max_target_length
    patience = arguments.loss.early_stopping_patience
    return EarlyExitTrainer(
        model=loaded.model,
        args=training,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, loaded.model, pad_to_multiple_of=8),
        compute_metrics=token_metrics(data.task, tokenizer) if training.predict_with_generate else None,
        optimizers=(build_muon(loaded.model, training) if arguments.loss.use_muon else None, None),
        callbacks=[EarlyStoppingCallback(patience)] if patience else None,
        **exit_options,
    )


if __name__ == "__main__":
    main()
