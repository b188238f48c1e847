"""What a model must know of the data, and can take of it, before the first sample: languages and lengths."""

from __future__ import annotations

from transformers import PreTrainedModel

from models.errors import UserError
from models.languages import set_languages
from models.loading import LoadedModel
from util.data.examples import dataset_record
from util.data.prompts import build_prompt
from util.data_arguments import DataArguments

LABEL_MULTIPLE = 8  # training pads to it


def prepare(
    loaded: LoadedModel,
    data: DataArguments,
    lengths: dict[str, int] | None = None,
    trains: bool = False,
) -> None:
    """Set the languages of the data in a multilingual tokenizer and in `generate`, or the prompt of a model
    without an encoder, and compare lengths with the model's positions. `lengths` are in tokens, by flag, that
    of sources first; by default those of an evaluation.

    Raises:
        UserError: a language that the tokenizer lacks, a length that the model cannot take, or a prompt that
            cannot be made.
    """
    source, target = dataset_record(data).languages or (None, None)
    set_languages(loaded.model, loaded.tokenizer, source, target, data.task == "translation")
    if lengths is None:
        lengths = {
            "--max_source_length": data.max_source_length,
            "--val_max_target_length": data.val_max_target_length,
        }
    loaded.prompt = build_prompt(loaded, data)
    if loaded.prompt is not None:
        stop_at_end_token(loaded)
        lengths = length_of_one_sequence(lengths)
    refuse_long(loaded.model, lengths, LABEL_MULTIPLE if trains else 1)


def stop_at_end_token(loaded: LoadedModel) -> None:
    """Let `generate` stop where answers are taught to: at the tokenizer's end token.

    Raises:
        UserError: it has none.
    """
    end, generation = loaded.tokenizer.eos_token_id, loaded.model.generation_config
    if end is None:
        raise UserError("The tokenizer has no end token, by which outputs would end.")
    known = generation.eos_token_id
    known = known if isinstance(known, list) else [known] * (known is not None)
    if end not in known:
        generation.eos_token_id = [*known, end] if known else end
    if generation.pad_token_id is None:
        generation.pad_token_id = loaded.tokenizer.pad_token_id


def length_of_one_sequence(lengths: dict[str, int]) -> dict[str, int]:
    """Prompt and longest answer together, under the names of their flags."""
    (source, longest_source), *others = lengths.items()
    answer, longest_answer = max(others, key=lambda item: item[1], default=(source, longest_source))
    return {f"{source} + {answer}": longest_source + longest_answer}


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
