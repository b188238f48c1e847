"""What goes to others of a run: the model card in --output_dir, and --push_to_hub.

Trainer would push while it trains, and without results; run.py pushes once, at the end of the run.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub import HfApi
from transformers import Seq2SeqTrainingArguments
from transformers.trainer_utils import HubStrategy

from models.checkpoint_files import first_line
from models.errors import UserError
from models.exit_adapter_files import CONFIG_NAME as EXIT_ADAPTER_CONFIG
from models.exit_heads import EXIT_CONFIG_NAME, ExitConfig
from models.loading import LoadedModel
from models.lora import ADAPTER_CONFIG_NAME
from util.arguments import Arguments
from util.data.examples import dataset_record
from util.model_card import (
    Card,
    describe_size,
    last_evaluated,
    loss_curve,
    read_results,
    results_table,
    usage,
    write_card,
)

LEFT_OUT = (  # locks, checkpoints, texts of the data, and arguments that may hold a token
    ".*",
    "_*",
    "checkpoint-*",
    "predictions*",
    "skipped*",
    "training_args.bin",
)
PIPELINES = {"summarization": "summarization", "translation": "translation"}
EXAMPLE = "An example."


def holds_the_model(arguments: Arguments) -> bool:
    """Whether --output_dir is the folder of what runs: a model that was trained there, or an exit adapter."""
    folder = Path(arguments.training.output_dir)
    named = (arguments.model.exit_adapter_path, arguments.model.model_name_or_path)
    loaded = next((Path(name) for name in named if name), None)
    return arguments.training.do_train or (loaded is not None and loaded.resolve() == folder.resolve())


def settle_push(arguments: Arguments) -> None:
    """Leave pushing to `share`, which knows what belongs on the hub.

    Raises:
        UserError: there would be nothing to push, or checkpoints should be pushed, too.
    """
    training = arguments.training
    if not training.push_to_hub:
        return
    if not holds_the_model(arguments):
        raise UserError(
            f"--push_to_hub: {training.output_dir} does not hold the model that runs: add --do_train, or "
            "give the model's own folder as --output_dir."
        )
    strategy = HubStrategy(training.hub_strategy)
    if strategy not in (HubStrategy.EVERY_SAVE, HubStrategy.END):
        raise UserError(f"--hub_strategy {strategy.value}: run.py pushes no checkpoints: leave it out.")
    training.hub_strategy = HubStrategy.END  # the default pushes training_args.bin, token and all, and locks


def share(arguments: Arguments, loaded: LoadedModel) -> None:
    """Write the model card of --output_dir, if it holds the model, and push the folder if asked to."""
    if not PartialState().is_main_process or not holds_the_model(arguments):
        return
    training = arguments.training
    folder = Path(training.output_dir)
    repository = create_repository(training) if training.push_to_hub else None
    write_card(folder, run_card(arguments, loaded, repository or str(folder)))
    if repository is not None:
        push(training, repository)
        print(f"Pushed {folder} to https://huggingface.co/{repository}")


def create_repository(training: Seq2SeqTrainingArguments) -> str:
    """The repository's whole name; it is made if there is none."""
    name = training.hub_model_id or Path(training.output_dir).absolute().name
    try:
        made = HfApi().create_repo(
            name, token=training.hub_token, private=training.hub_private_repo, exist_ok=True
        )
    except (OSError, ValueError) as error:
        raise UserError(f"--push_to_hub: cannot make {name}: {first_line(error)}") from error
    return made.repo_id


def push(training: Seq2SeqTrainingArguments, repository: str) -> None:
    """Upload the folder, but for what is nobody else's business."""
    try:
        HfApi().upload_folder(
            repo_id=repository,
            folder_path=training.output_dir,
            commit_message="Model, card and results",
            token=training.hub_token,
            revision=training.hub_revision,
            ignore_patterns=list(LEFT_OUT),
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"--push_to_hub: {first_line(error)} All is in {training.output_dir}; the same command tries "
            "again."
        ) from error


# The card of a run


def run_card(arguments: Arguments, loaded: LoadedModel, name: str) -> Card:
    """The card of --output_dir; `name` is what the model is loaded by."""
    folder = Path(arguments.training.output_dir)
    state = read_if_there(folder / "trainer_state.json")
    if (folder / EXIT_CONFIG_NAME).is_file():  # of a training, which has changed what was loaded
        loaded = replace(loaded, exit_config=ExitConfig.load(folder))
    text, chat = example_input(arguments, loaded)
    results = read_results(folder)
    return Card(
        title=name.rstrip("/").split("/")[-1],
        metadata=card_metadata(arguments, loaded, folder),
        sections=[
            f"{describe_size(loaded)}.",
            usage(name, loaded, text, last_evaluated(folder, results), chat),
            results_table(results),
            training_section(folder, state, loaded) if state else "",
            loss_curve([state]) if state else "",
        ],
    )


def card_metadata(arguments: Arguments, loaded: LoadedModel, folder: Path) -> dict[str, Any]:
    record, base = dataset_record(arguments.data), arguments.model.model_name_or_path
    task = PIPELINES.get(arguments.data.task, "text2text-generation")
    adapted = (folder / ADAPTER_CONFIG_NAME).is_file()
    return {
        "library_name": "peft" if adapted else "transformers",
        "pipeline_tag": task if loaded.model.config.is_encoder_decoder else "text-generation",
        "language": sorted(set(record.languages or ())),
        "base_model": base if base and not Path(base).exists() else None,
        "datasets": [record.hub_id] if record.hub_id else None,
        "tags": ["early-exit", *["exit-adapter"] * (folder / EXIT_ADAPTER_CONFIG).is_file()],
    }


def example_input(arguments: Arguments, loaded: LoadedModel) -> tuple[str, bool]:
    """A source as the model was prepared for it, and whether that is a chat's."""
    if loaded.prompt is None:
        return dataset_record(arguments.data).prefix + EXAMPLE, False
    prompt = replace(loaded.prompt, shots=())
    return prompt.ask(loaded.tokenizer, EXAMPLE), prompt.chat


def read_if_there(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf8")) if path.is_file() else {}


def training_section(folder: Path, state: dict[str, Any], loaded: LoadedModel) -> str:
    """Exit settings and the arguments that matter most, of a training that ended."""
    exits = loaded.exit_config
    lines = [
        f"- {state['global_step']} steps, {state['epoch']:.1f} epochs",
        f"- Loss: `{exits.intermediate_loss_fn or 'cross-entropy'}`, exit layer: "
        f"{exits.shallow_exit_layer or ('all' if exits.intermediate_loss_fn else 'none')}",
    ]
    heads = {"confidence head": exits.train_meta_cm_head, f"own {exits.per_exit_head}": exits.per_exit_head}
    if any(heads.values()):
        lines.append(f"- Exits have: {', '.join(name for name, given in heads.items() if given)}")
    path = folder / "training_args.bin"
    if path.is_file():
        lines.append(f"- {describe_arguments(torch.load(path, weights_only=False))}")
    return "\n".join(["## Training", "", *lines])


def describe_arguments(training: Seq2SeqTrainingArguments) -> str:
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    names = ("learning_rate", "lr_scheduler_type", "optim", "weight_decay", "label_smoothing_factor", "seed")
    values = {name: getattr(training, name) for name in names}
    words = [f"`{name} {getattr(value, 'value', value)}`" for name, value in values.items()]
    words += [f"`{name}`" for name in ("bf16", "fp16") if getattr(training, name)]
    return f"batches of {batch} a process, {', '.join(words)}"
