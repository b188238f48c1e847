"""Low-rank adapters through PEFT: add them for training, load them, merge them for evaluation.

The exit heads are trained in full beside the adapters and saved in a file of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file
from transformers import PreTrainedModel

from models.errors import UserError
from models.exit_heads import HEAD_NAMES, exit_head_weights

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER_CONFIG_NAME = "adapter_config.json"
EXIT_HEADS_NAME = "exit_heads.safetensors"
QUERIES_AND_VALUES = r".*\.(q|v|q_proj|v_proj)$"  # of the T5 and BART families


def add_lora(
    model: PreTrainedModel, rank: int, alpha: int, dropout: float, target_modules: list[str] | None = None
) -> PeftModel:
    """Wrap `model` so that only adapters and exit heads train.

    Raises:
        UserError: no layer has one of the names in `target_modules`.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules or QUERIES_AND_VALUES,
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"--lora_target_modules {target_modules}: {error}") from error
    train_exit_heads(adapted)
    return adapted


def load_lora(model: PreTrainedModel, folder: Path, merge: bool) -> PreTrainedModel | PeftModel:
    """Put the adapter of `folder` on its base model; merged into its weights, or trainable."""
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=not merge)
    if merge:
        return adapted.merge_and_unload()
    train_exit_heads(adapted)
    return adapted


def train_exit_heads(adapted: PeftModel) -> None:
    for name in HEAD_NAMES:
        head = getattr(adapted.get_base_model(), name, None)
        if head is not None:
            head.requires_grad_(True)


def save_exit_heads(adapted: PeftModel, folder: str | Path) -> None:
    """Write the exit heads, if there are any, beside the adapter."""
    heads = exit_head_weights(adapted.get_base_model().state_dict())
    if heads:
        save_file(
            {name: weight.contiguous() for name, weight in heads.items()}, Path(folder, EXIT_HEADS_NAME)
        )


def merge_lora(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The plain model with the adapter, if there is one, merged into its weights."""
    return model.merge_and_unload() if is_adapted(model) else model


def is_adapted(model: PreTrainedModel | PeftModel) -> bool:
    return hasattr(model, "get_base_model")
