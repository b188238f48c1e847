"""What a model must know of the data, and can take of it, before the first sample: languages and lengths."""

from __future__ import annotations

from transformers import PreTrainedModel

from models.errors import UserError
from models.languages import set_languages
from models.loading import LoadedModel
from util.arguments import DataArguments
from util.data.examples import dataset_record

LABEL_MULTIPLE = 8  # training pads to it


def prepare(
    loaded: LoadedModel,
    data: DataArguments,
    lengths: dict[str, int] | None = None,
    trains: bool = False,
) -> None:
    """Set the languages of the data in a multilingual tokenizer and in `generate`, and compare lengths with
    the model's positions. `lengths` are in tokens, by flag; by default those of an evaluation.

    Raises:
        UserError: a language that the tokenizer lacks, a length that the model cannot take, or a model
            without an encoder, for which tasks have no prompts yet.
    """
    config = loaded.model.config
    if not config.is_encoder_decoder:
        raise UserError(
            f"{config.model_type} has no encoder, and tasks have no prompts for such models yet: decode it "
            "from Python, load_model(...).generate(...), as docs/decoder_only.md shows."
        )
    source, target = dataset_record(data).languages or (None, None)
    set_languages(loaded.model, loaded.tokenizer, source, target, data.task == "translation")
    if lengths is None:
        lengths = {
            "--max_source_length": data.max_source_length,
            "--val_max_target_length": data.val_max_target_length,
        }
    refuse_long(loaded.model, lengths, LABEL_MULTIPLE if trains else 1)


def refuse_long(model: PreTrainedModel, lengths: dict[str, int], multiple: int) -> None:
    """Raise UserError, naming the flag, if a length, padded to a multiple, exceeds the model's positions."""
    limit = position_limit(model)
    if limit is None:
        return
    usable = limit // multiple * multiple
    padding = f"; training pads to multiples of {multiple}" if usable < limit else ""
    for flag, length in lengths.items():
        if length > usable:
            kind = model.config.model_type
            raise UserError(
                f"{flag} {length}: {kind} has {limit} positions{padding}. Set it to {usable} or less."
            )


def position_limit(model: PreTrainedModel) -> int | None:
    """How long a sequence may be, in tokens; None where positions are relative (T5 and its kin)."""
    return getattr(model.config, "max_position_embeddings", None)
