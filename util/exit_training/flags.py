"""The flags of scripts/train_exit.py. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from models.choices import EXIT_ADAPTERS, PRECISIONS
from util.flags import (
    flag,
    list_flag,
    non_default_settings,
    require,
    require_positive,
    require_unit_interval,
    required_flag,
)

EXIT_LOSSES = ("kl", "acceptance", "both")
LR_SCHEDULES = ("plateau", "cosine")


@dataclass
class ExitTrainingArguments:
    _argument_group_name = "Exit"

    model_name_or_path: str = required_flag("The model, which stays as it is: hub id, folder or .gguf file.")
    exit_adapter_path: str | None = flag(
        None,
        "A taught exit to go on from, folder or hub id: its kind, layer and shortlist take the place of "
        "--exit_adapter, --exit_layers, --exit_kv_layer and --shortlist_size.",
    )
    exit_adapter: str = flag("layer", "What is put behind the exit, largest first.", EXIT_ADAPTERS)
    exit_layers: list[int] = list_flag(
        [], "Candidate layers, taught in one pass (default: a third of the depth)."
    )
    exit_kv_layer: int | None = flag(
        None,
        "The layer, behind the exit, whose keys/values of verified tokens the exit attends to; 0: its own "
        "keys/values alone (default: the first after two thirds of the depth, where kind and family can).",
    )
    self_generated: bool = flag(True, "Teach on the model's own outputs, else on the targets of the data.")
    generation_batch_size: int = flag(16, "Rows generated at once.")
    generation_precision: str | None = flag(
        None,
        "Of onnx's weights while generating (default: --precision, with which forecasts are made).",
        PRECISIONS,
    )
    bf16: bool = flag(
        False,
        "Generate (with torch), read and teach in bfloat16: two to three times as fast on CPUs and GPUs that "
        "multiply in it. The exit's weights stay float32.",
    )
    cache_states: bool | None = flag(
        None,
        "Keep what the frozen layers make of the texts on disk, some kilobytes a token, instead of computing "
        "it at each step anew (default: on CPUs).",
    )
    cost_file: str | None = flag(
        None,
        "The train_exit.json of an earlier teaching on the machine that will decode: forecasts are made with "
        "the costs in it, instead of costs measured here.",
    )
    shortlist_size: int | None = flag(
        8192, "Tokens that the exit may say: the most frequent of the texts; 0 for the whole vocabulary."
    )
    exit_loss: str = flag(
        "kl",
        "KL divergence to the last layer, -log of the probability that a draft is accepted, or one after the "
        "other.",
        EXIT_LOSSES,
    )
    prompt_weight: float = flag(
        0.1, "Weight of a prompt's tokens beside 1 of an output's, of models without an encoder."
    )
    learning_rate: float = flag(6e-4, "Of AdamW, after a warm-up.")
    lr_schedule: str = flag(
        "plateau",
        "The learning rate falls whenever the forecast stops improving, and then teaching ends; or it falls "
        "along a cosine over --max_steps, for runs whose length is planned.",
        LR_SCHEDULES,
    )
    batch_tokens: int = flag(1024, "Predicted tokens a step and process.")
    max_steps: int = flag(20_000, "Steps, with --lr_schedule plateau at most.")
    eval_steps: int = flag(100, "Steps between two forecasts.")
    held_out: int = flag(48, "Rows, the last ones, that forecasts are made on.")
    min_agreement: float = flag(0.99, "Least share of tokens that FREE's forecast leaves as they are.")
    split: str = flag("train", "Whose rows are the prompts.", ("train", "validation", "test"))
    seed: int = flag(0, "Of the order of rows.")
    half: bool = flag(True, "Save the weights in float16.")
    output_dir: str = flag("save/exit", "Gets the adapter, and what a killed run goes on from.")

    def __post_init__(self) -> None:
        for name in ("generation_batch_size", "batch_tokens", "max_steps", "eval_steps", "held_out"):
            require_positive(name, getattr(self, name))
        require(self.learning_rate > 0, f"--learning_rate must be positive, got {self.learning_rate}.")
        for name in ("min_agreement", "prompt_weight"):
            require_unit_interval(name, getattr(self, name))
        require(
            not self.bf16 or self.generation_precision is None,
            "--generation_precision is of onnx's weights, and --bf16 generates with torch: leave one out.",
        )
        if self.exit_adapter_path is not None:
            given = non_default_settings(self)
            for name in ("exit_adapter", "exit_layers", "exit_kv_layer", "shortlist_size"):
                require(name not in given, f"--{name}: --exit_adapter_path brings its own; leave one out.")
        size = self.shortlist_size
        require(
            size is None or size == 0 or size >= 2, f"--shortlist_size must be 0 or at least 2, got {size}."
        )


@dataclass
class ExitPromptArguments:
    _argument_group_name = "Prompts"

    data_dir: str | None = flag(None, "Folder of local files <data set>.<split>, read instead of the hub.")
    parts: int = flag(2, "Runs of turns drawn from each dialogue.")
    others: int = flag(600, "Prompts of other tasks, besides 150 instructions.")
    self_instructed: int = flag(
        0,
        "Prompts that the model of --model_name_or_path invents in its users' place: open instructions.",
    )
    model_name_or_path: str | None = flag(None, "A model with a chat template: hub id, folder or .gguf file.")
    generation_batch_size: int = flag(256, "Instructions written at once.")
    held_out: int = flag(96, "Dialogues of the validation split, put last.")
    held_out_from: int = flag(200, "The first of them; those before are left to evaluations.")
    seed: int = flag(3, "Of what is drawn, and of the order.")
    output_file: str = flag("save/exit_prompts.jsonl", "For train_exit.py --train_file.")

    def __post_init__(self) -> None:
        for name in ("parts", "others", "self_instructed", "held_out_from"):
            require(getattr(self, name) >= 0, f"--{name} must not be negative, got {getattr(self, name)}.")
        for name in ("held_out", "generation_batch_size"):
            require_positive(name, getattr(self, name))
        require(
            (self.self_instructed > 0) == (self.model_name_or_path is not None),
            "--self_instructed and --model_name_or_path need each other: name both or neither.",
        )
