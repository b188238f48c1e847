"""The answer to --help, from the dataclasses that hold the flags: our groups, one line a flag.

Commands call `answer_help` before they import torch, so that help comes at once.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

TRAINING = "Training and output (of transformers' Seq2SeqTrainingArguments; --help_all lists all its flags)"
TRAINING_FLAGS = {
    "output_dir": "Where results and checkpoints go.",
    "do_train": "Train, then save the model.",
    "do_eval": "Decode and judge the validation split.",
    "do_predict": "Decode and judge the test split.",
    "per_device_train_batch_size": "Samples of a training step, a device.",
    "per_device_eval_batch_size": "Samples decoded together; 1 to measure latency.",
    "gradient_accumulation_steps": "Batches of one training step.",
    "learning_rate": "Highest learning rate (from scratch: see docs/your_own_data.md).",
    "num_train_epochs": "Passes over the training rows.",
    "max_steps": "Training steps, instead of epochs.",
    "warmup_steps": "Steps, or share of all steps below 1, in which the learning rate rises.",
    "logging_steps": "Steps between two lines with the loss.",
    "save_steps": "Steps between two checkpoints.",
    "eval_strategy": "When to evaluate while training: no, steps, epoch.",
    "predict_with_generate": "Judge these evaluations by the task's score.",
    "load_best_model_at_end": "Keep the best checkpoint rather than the last.",
    "generation_max_length": "Longest output of an evaluation, in tokens.",
    "bf16": "Train in mixed precision.",
    "bf16_full_eval": "Evaluate in bfloat16.",
    "use_cpu": "Leave accelerators alone.",
    "seed": "Of weights, sampling and order.",
    "report_to": "Where the log goes as well: none, tensorboard, wandb, ...",
}
COLUMN = 34  # where help texts begin


def answer_help(
    groups: Sequence[type[Any]], description: str, training: bool = False, argv: list[str] | None = None
) -> None:
    """Print the help and exit if the command line (or `argv`) asks for it."""
    if {"-h", "--help"} & set(sys.argv[1:] if argv is None else argv):
        print(describe_flags(groups, description, training), end="")
        sys.exit(0)


def describe_flags(groups: Sequence[type[Any]], description: str, training: bool = False) -> str:
    """All flags of the dataclasses, group by group; `training` adds the usual flags of the Trainer."""
    sections = [description.strip()]
    for group in groups:
        fields = [field for field in dataclasses.fields(group) if field.init]
        lines = [describe_flag(spell(field), type_word(field), help_text(field)) for field in fields]
        sections.append("\n".join([f"{group._argument_group_name}:", *lines]))
    if training:
        lines = [describe_flag(f"--{name}", "", text) for name, text in TRAINING_FLAGS.items()]
        sections.append("\n".join([f"{TRAINING}:", *lines]))
    return "\n\n".join(sections) + "\n"


def describe_flag(name: str, kind: str, text: str) -> str:
    """`  NAME KIND   text`, the text wrapped in a column of its own."""
    head = f"  {name} {kind}".rstrip()
    width = max(40, min(shutil.get_terminal_size((110, 24)).columns, 110) - COLUMN)
    first, *rest = textwrap.wrap(text, width) or [""]
    if len(head) >= COLUMN - 1:
        rest, first = [first, *rest], ""
    return "\n".join([f"{head:<{COLUMN}}{first}".rstrip(), *(" " * COLUMN + line for line in rest)])


def spell(field: dataclasses.Field[Any]) -> str:
    """A flag as it is written on the command line."""
    return field.name.upper() if field.metadata["positional"] else f"--{field.name}"


def type_word(field: dataclasses.Field[Any]) -> str:
    """What kind of value a flag takes."""
    if field.metadata["positional"]:
        return "..."
    if "choices" in field.metadata:
        return "{" + ",".join(field.metadata["choices"]) + "}"
    kind = str(field.type)
    words = {"bool": "True|False", "int": "N", "float": "X", "str": "TEXT"}
    word = next((word for name, word in words.items() if name in kind), "TEXT")
    return f"{word} ..." if "list" in kind else word


def help_text(field: dataclasses.Field[Any]) -> str:
    """A field's help, with its default where that says something."""
    text, default = field.metadata["help"], default_of(field)
    if is_required(field):
        return f"{text} (required)"
    if default in (None, False, []) or "default" in text:
        return text
    shown = " ".join(map(str, default)) if isinstance(default, list) else default
    return f"{text} (default: {shown})"


def is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def default_of(field: dataclasses.Field[Any]) -> Any:
    """A flag's default; None if it must be given."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if is_required(field) else field.default
