"""From flags to a trained model: `train(arguments, exit_flags, loaded)` trains it in place and saves it.

What was interrupted continues from the newest whole checkpoint in --output_dir.
"""

from __future__ import annotations

import copy
import errno
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from safetensors import SafetensorError
from transformers import (
    DataCollatorForSeq2Seq,
    EarlyStoppingCallback,
    PreTrainedModel,
    Seq2SeqTrainingArguments,
)
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import TrainOutput

from models.choices import ALL_LAYER_LOSSES
from models.decoder_view import DecoderView
from models.errors import UserError
from models.exit_adapter import exit_adapter_of
from models.exit_heads import ExitConfig, attach_exit_heads, freeze_backbone
from models.exit_policy import ExitPolicy
from models.layer_skip import ExitCurriculum, LayerDropout
from models.loading import LoadedModel, load_model
from models.lora import add_lora, is_adapted, merge_lora
from models.losses import ConfidenceHeadLoss, ExitLoss, build_confidence_head_loss, build_exit_loss
from util.arguments import Arguments, LossArguments
from util.data.examples import dataset_record, load_examples, target_language, tokenize
from util.data.preparation import LABEL_MULTIPLE
from util.data.streaming import stream_training_rows
from util.evaluation.decode import batch_indices, decode_batch, describe_batch
from util.evaluation.identity import fingerprint
from util.evaluation.records import EvaluationSettings, best_windows
from util.evaluation.shards import launched_shards
from util.evaluation.summary import measure_samples, score
from util.exit_arguments import ExitArguments
from util.files import write_json
from util.flags import differs, flags_in, require
from util.loss_arguments import LoraArguments
from util.policies import build_policy
from util.training.identity import (
    IDENTITY_FILE,
    identify_training,
    named_settings,
    refuse_other_exits,
    refuse_other_training,
)
from util.training.optimizer import build_muon
from util.training.progress import progress_callbacks
from util.training.tracking import SampleTables, taught_exits
from util.training.trainer import EarlyExitTrainer, find_damage, last_complete_checkpoint, whole_weights

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)

OF_ADAPTERS = {  # by flag: the field of PEFT's configuration
    "lora_rank": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
}
FP16_OVERFLOWS = ("t5", "mt5", "umt5", "longt5")


def train(arguments: Arguments, exit_flags: ExitArguments, loaded: LoadedModel) -> None:
    """Train, continuing from the newest complete checkpoint in --output_dir, and save the result there."""
    if exit_adapter_of(loaded.model) is not None:
        raise UserError("--do_train would change the weights that the exit adapter was taught for.")
    weights = {"starting weights": fingerprint(loaded)}  # before heads and LoRA are attached
    loss, exit_config = build_loss(arguments, loaded)
    if arguments.training.fp16 and loaded.model.config.model_type in FP16_OVERFLOWS:
        raise UserError(f"{loaded.model.config.model_type} overflows when trained in fp16: use --bf16.")
    if arguments.lora.use_lora:
        loaded.model = with_adapter(loaded.model, arguments.lora)
    trainer = build_trainer(arguments, exit_flags, loaded, exit_loss=loss, exit_config=exit_config)
    resume = arguments.training.resume_from_checkpoint
    newest = resume or last_complete_checkpoint(arguments.training.output_dir)
    identity = identify_training(arguments.data, trainer, loaded.prompt) | weights | named_settings(arguments)
    if newest is not None:
        refuse_other_exits(newest, exit_config)
        refuse_other_training(newest, identity)
        if resume is None and is_finished(trainer):
            load_finished(arguments, loaded)
            return
        logger.info("Continuing from %s.", newest)
    if trainer.is_world_process_zero():
        write_json(Path(arguments.training.output_dir, IDENTITY_FILE), identity)
    result = train_or_explain(trainer, newest)
    trainer.save_model(_internal_call=True)  # without a push: util.training.sharing has results to push, too
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    loaded.model = merge_lora(loaded.model)


def with_adapter(model: PreTrainedModel | PeftModel, flags: LoraArguments) -> PeftModel:
    """The model with an adapter to train: the one that it brought, or a new one.

    Raises:
        UserError: flags contradict the adapter that it brought.
    """
    if not is_adapted(model):
        settings = (flags.lora_rank, flags.lora_alpha, flags.lora_dropout, flags.lora_target_modules)
        return add_lora(model, *settings)
    for spec in flags_in(flags):
        if spec.name in OF_ADAPTERS and differs(flags, spec):
            given = getattr(flags, spec.name)
            own = getattr(model.active_peft_config, OF_ADAPTERS[spec.name], None)
            require(
                (set(given) if isinstance(own, set) else given) == own,
                f"--{spec.name} {given} contradicts the adapter of --model_name_or_path, which has {own}: "
                f"leave --{spec.name} out, or name the base model to train a new adapter.",
            )
    return model


def is_finished(trainer: EarlyExitTrainer) -> bool:
    """Whether --output_dir holds the result of a training as long as asked for, even if it stopped early."""
    folder = Path(trainer.args.output_dir)
    if find_damage(folder) is not None or not (folder / "train_results.json").is_file():
        return False
    state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
    *_, max_steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    return max_steps <= state.max_steps


def load_finished(arguments: Arguments, loaded: LoadedModel) -> None:
    """Take up a finished training's model for what follows; nothing is written."""
    folder = arguments.training.output_dir
    logger.info(
        "Training in %s is finished: nothing is left to do. To train on, raise --max_steps or "
        "--num_train_epochs; to start afresh, use another --output_dir.",
        folder,
    )
    loaded.model = load_model(folder).model.to(arguments.training.device)


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


def build_loss(
    arguments: Arguments, loaded: LoadedModel
) -> tuple[ExitLoss | ConfidenceHeadLoss | None, ExitConfig]:
    """The loss that the flags name and the exit configuration to save with the checkpoint."""
    flags = arguments.loss
    exit_config = read_exit_config(arguments, loaded.exit_config)
    shallow_layer = exit_config.shallow_exit_layer
    attach_exit_heads(loaded.model, exit_config)
    view = loaded.view
    keep_all_layers(view)
    if flags.layer_dropout > 0:
        drop_layers(view, flags.layer_dropout)
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
        e_scale=flags.e_scale,
        curriculum=build_curriculum(flags, view.num_layers),
    )
    return loss, exit_config


def drop_layers(view: DecoderView, highest: float) -> None:
    """Let samples skip layers in training; UserError for a view from outside that does not list them."""
    layers = getattr(view, "layers", None)
    if layers is None:
        raise UserError(f"--layer_dropout: {type(view).__name__} does not list its `layers`.")
    LayerDropout(layers, highest)


def read_exit_config(arguments: Arguments, before: ExitConfig) -> ExitConfig:
    """What the flags say of exits, and, where they say nothing, what the checkpoint knew before."""
    flags = arguments.loss
    trains_all_layers = flags.intermediate_loss_fn in ALL_LAYER_LOSSES
    inherited_layer = None if trains_all_layers else before.shallow_exit_layer
    shallow_layer = arguments.exit.shallow_exit_layer or inherited_layer
    if flags.intermediate_loss_fn and not trains_all_layers and shallow_layer is None:
        raise UserError(f"--intermediate_loss_fn {flags.intermediate_loss_fn} needs --shallow_exit_layer.")
    distils = (flags.intermediate_loss_fn or "").startswith("shallowdeep_kd")
    return ExitConfig(
        flags.intermediate_loss_fn or before.intermediate_loss_fn,
        shallow_layer,
        flags.distill_layer_alpha if distils else None,
        flags.do_layer_transformation or before.do_layer_transformation,
        flags.train_meta_cm_head or before.train_meta_cm_head,
        flags.per_exit_head or before.per_exit_head,
    )


def build_curriculum(flags: LossArguments, num_layers: int) -> ExitCurriculum | None:
    if flags.exit_curriculum is None:
        return None
    return ExitCurriculum(flags.exit_curriculum, num_layers, flags.rotation_interval)


def keep_all_layers(view: DecoderView) -> None:
    """Switch LayerDrop off: exit losses need every layer's state at its place."""
    if view.keep_all_layers():
        logger.warning("Training without decoder_layerdrop: exit losses need every layer.")


def build_trainer(
    arguments: Arguments,
    exit_flags: ExitArguments,
    loaded: LoadedModel,
    exit_loss: ExitLoss | ConfidenceHeadLoss | None,
    exit_config: ExitConfig,
) -> EarlyExitTrainer:
    data, training = arguments.data, arguments.training
    tokenizer, prompt = loaded.tokenizer, loaded.prompt
    use_one_gpu(training)
    record = dataset_record(data)
    if data.streaming:
        train_rows = stream_training_rows(record, data, tokenizer, training.seed, prompt)
    else:
        train_rows = load_examples(record, data, "train", tokenizer, data.max_train_samples, prompt)
        train_rows = tokenize(train_rows, tokenizer, data, data.max_target_length, prompt)
    eval_rows, scorer, exits = None, None, []
    if training.eval_strategy != "no":
        examples = load_examples(record, data, "validation", tokenizer, data.max_eval_samples, prompt)
        eval_rows = tokenize(examples, tokenizer, data, data.val_max_target_length, prompt)
        shallow_layer = exit_config.shallow_exit_layer
        exits = taught_exits(loaded.view, shallow_layer, exit_loss is not None)
        if training.predict_with_generate:
            scorer = generation_score(arguments, exit_flags, loaded, examples)
    training.dataloader_pin_memory &= torch.accelerator.is_available()  # else torch warns
    patience = arguments.loss.early_stopping_patience
    trainer = EarlyExitTrainer(
        model=loaded.model,
        args=training,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        data_collator=build_collator(loaded),
        score=scorer,
        optimizers=(build_muon(loaded.model, training) if arguments.loss.use_muon else None, None),
        callbacks=progress_callbacks(training) + ([EarlyStoppingCallback(patience)] if patience else []),
        exit_loss=exit_loss,
        exit_config=exit_config,
        exits=exits,
    )
    if exits:
        show_samples(trainer, loaded, examples, greedy_settings(arguments))
    return trainer


def show_samples(
    trainer: EarlyExitTrainer, loaded: LoadedModel, examples: Dataset, settings: EvaluationSettings
) -> None:
    """Let trackers have a table of texts by depth at each evaluation."""
    tables = SampleTables(
        loaded,
        examples,
        settings,
        trainer.exits,
        trackers=lambda: trainer.callback_handler.callbacks,
        whole=lambda: whole_weights(trainer.model),
    )
    trainer.add_callback(tables)


def build_collator(loaded: LoadedModel) -> DataCollatorForSeq2Seq:
    """Pads on the right, where nothing shifts the positions of tokens: without a mask for each step, prompts
    padded on the left, as for decoding, would be other ones to models that learned their positions."""
    tokenizer = copy.copy(loaded.tokenizer)
    tokenizer.padding_side = "right"
    return DataCollatorForSeq2Seq(tokenizer, loaded.model, pad_to_multiple_of=LABEL_MULTIPLE)


def use_one_gpu(training: Seq2SeqTrainingArguments) -> None:
    """Keep each process to one GPU: torch's DataParallel would make copies of the model that no view sees."""
    if training.n_gpu > 1:
        logger.warning("Training on one of %d GPUs; for all: torchrun --nproc_per_node gpu.", training.n_gpu)
        training._n_gpu = 1


def greedy_settings(arguments: Arguments) -> EvaluationSettings:
    """How evaluations between training steps decode."""
    data, training = arguments.data, arguments.training
    return EvaluationSettings(
        task=data.task,
        max_source_length=data.max_source_length,
        max_length=arguments.max_length,
        batch_size=training.per_device_eval_batch_size,
        predictions_file=Path(training.output_dir, "predictions.jsonl"),  # stays as it is
        language=target_language(data),
    )


def generation_score(
    arguments: Arguments, exit_flags: ExitArguments, loaded: LoadedModel, examples: Dataset
) -> Callable[[], dict[str, float]]:
    """A function that decodes the examples and gives their scores, as `--do_eval` would.

    Raises:
        UserError: the flags ask for beams and an early exit, or for a policy that the model cannot have.
    """
    beams = arguments.training.generation_num_beams or 1
    settings = replace(greedy_settings(arguments), num_beams=beams)
    if settings.num_beams > 1 and exit_flags.methods:
        raise UserError(
            f"{' '.join(exit_flags.methods)} decodes greedily: leave --generation_num_beams at 1."
        )
    share = examples.select(launched_shards().own_rows(len(examples), settings.batch_size))

    def new_policy() -> ExitPolicy | None:
        return build_policy(exit_flags, loaded, settings.max_length) if settings.num_beams == 1 else None

    def compute() -> dict[str, float]:
        records, policy = [], new_policy()  # an earlier one may have learnt, of other weights
        for indices in batch_indices(0, len(share), settings.batch_size):
            batch = share.select(indices)
            records += describe_batch(loaded, batch, decode_batch(loaded, policy, batch, settings))
        samples = best_windows(gather_object(records))
        return score(samples, measure_samples(samples, settings.task, settings.language))

    new_policy()  # now, not after the first hours
    return compute
