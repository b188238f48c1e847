"""What a training depends on, beside its checkpoints: a run continues only where all of it is what it was."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path

from models.errors import UserError
from models.exit_heads import ExitConfig
from models.json_files import read_mapping
from models.prompts import Prompt
from util.arguments import Arguments
from util.data.examples import dataset_record
from util.data.sources import RowFile, load_rows
from util.data_arguments import DataArguments
from util.evaluation.identity import hash_rows, hash_tokenizer
from util.files import content_hash, file_hash
from util.training.trainer import EarlyExitTrainer

logger = logging.getLogger(__name__)

IDENTITY_FILE = "training_identity.json"
OPTIMIZING = (  # flags of Hugging Face's that say how weights follow the loss
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "weight_decay",
    "max_grad_norm",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "seed",
    "data_seed",
)


def refuse_other_exits(checkpoint: str, exit_config: ExitConfig) -> None:
    """Raise UserError if a training run to continue was begun with another exit loss or layer."""
    if ExitConfig.load(checkpoint) != exit_config:
        raise UserError(
            f"{checkpoint} was begun with other exit settings: use its flags, or another --output_dir."
        )


def identify_training(
    data: DataArguments, trainer: EarlyExitTrainer, prompt: Prompt | None
) -> dict[str, str]:
    """What is learnt from: the encoded rows; of a stream, not read to its end, what they come from."""
    identity = {"tokenizer": hash_tokenizer(trainer.processing_class)}
    if not data.streaming:
        return identity | {"training rows": hash_rows(trainer.train_dataset)}
    record = dataset_record(data)
    rows, origin = load_rows(record, data, "train", streaming=True)
    files = [file_hash(path) for path in rows.paths] if isinstance(rows, RowFile) else [origin]
    reading = [record.source, record.target, record.prefix, record.languages, record.config, record.revision]
    lengths = [data.max_source_length, data.max_target_length, data.max_train_samples]
    more = [] if prompt is None else [asdict(prompt)]
    more += [{"doc_stride": data.doc_stride}] if record.task == "question_answering" else []
    return identity | {"training rows": content_hash([files, reading, lengths, *more])}


def named_settings(arguments: Arguments) -> dict[str, str]:
    """By flag: what the loss is, which weights follow it, and how. How long and on how many processes may
    change."""
    settings = asdict(arguments.loss) | asdict(arguments.lora)
    settings |= {name: getattr(arguments.training, name) for name in OPTIMIZING}
    return {f"--{name}": str(value) for name, value in settings.items()}


def refuse_other_training(checkpoint: str, identity: dict[str, str]) -> None:
    """Raise UserError if a training run to continue was begun with other rows, weights or settings."""
    path = Path(checkpoint).parent / IDENTITY_FILE
    if not path.is_file():  # nobody knows
        logger.warning("%s is missing: whether the training rows are the same was not checked.", path)
        return
    before = read_mapping(path)
    unrecorded = [name for name in identity if name not in before]
    if unrecorded:
        names = ", ".join(unrecorded)
        logger.warning("%s does not record %s: whether they are the same was not checked.", path, names)
    changed = " and ".join(name for name in identity if identity[name] != before.get(name, identity[name]))
    if changed:
        raise UserError(
            f"{checkpoint} was begun with other {changed}: use those again, or another --output_dir."
        )
