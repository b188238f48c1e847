"""Adapters through PEFT: add low-rank ones for training, load any that merge, merge them for evaluation.

The exit heads are trained in full beside the adapters and saved in a file of their own.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from models.errors import UserError
from models.exit_heads import HEAD_NAMES, exit_head_weights

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
EXIT_HEADS_NAME = "exit_heads.safetensors"
EMBEDDINGS = ("shared.weight", "embed_tokens.weight", "wte.weight", "embed_in.weight")
QUERIES_AND_VALUES = (  # of the T5 and BART families, Llama and OPT; GPT-2's and GPT-NeoX's with the keys
    r".*\.(q|v|q_proj|v_proj|c_attn|query_key_value)$"
)


def add_lora(
    model: PreTrainedModel, rank: int, alpha: int, dropout: float, target_modules: list[str] | None = None
) -> PeftModel:
    """Wrap `model` so that only adapters and exit heads train.

    Raises:
        UserError: no layer has one of the names in `target_modules`.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules or QUERIES_AND_VALUES,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2's layout
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"target_modules of LoRA {target_modules}: {error}") from error
    refuse_tied_targets(adapted, f"target_modules of LoRA {target_modules}")
    train_exit_heads(adapted)
    return adapted


def read_base_model(name: str, folder: Path) -> str:
    """The base model that the adapter `name`, found in `folder`, was trained on.

    Raises:
        UserError: the adapter is damaged, names no base model, or cannot become a part of its weights.
    """
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{Path(name, ADAPTER_CONFIG_NAME)} is no adapter's configuration: {error}"
        ) from error
    if config.is_prompt_learning or config.is_adaption_prompt:
        kind = str(config.peft_type.value).replace("_", " ").lower()
        raise UserError(
            f"{name} is a {kind} adapter, whose virtual tokens cannot be merged into weights: use LoRA or "
            "another adapter that can."
        )
    if not config.base_model_name_or_path:
        raise UserError(
            f"{name} does not say in {ADAPTER_CONFIG_NAME} which base_model_name_or_path it adapts."
        )
    return config.base_model_name_or_path


def adapted_vocabulary(folder: Path) -> int | None:
    """Number of tokens of the embeddings that were saved with an adapter, as they are once resized."""
    path = folder / ADAPTER_WEIGHTS_NAME
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as weights:
            names = [name for name in weights.keys() if name.endswith(EMBEDDINGS)]  # noqa: SIM118
            return weights.get_slice(names[0]).get_shape()[0] if names else None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def load_lora(model: PreTrainedModel, folder: Path, merge: bool) -> PreTrainedModel | PeftModel:
    """Put the adapter of `folder` on its base model; merged into its weights, or trainable.

    Raises:
        UserError: it does not fit the base model.
    """
    from peft import PeftModel

    try:
        adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=not merge)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"The adapter {folder} does not fit {model.name_or_path}: {reason}") from error
    refuse_tied_targets(adapted, f"The adapter {folder}")
    if not merge:
        train_exit_heads(adapted)
        return adapted
    try:
        return merge_lora(adapted)
    except (AttributeError, NotImplementedError, ValueError) as error:
        raise UserError(f"The adapter {folder} cannot be merged into weights: {error}") from error


def refuse_tied_targets(adapted: PeftModel, name: str) -> None:
    """Raise UserError if a layer is adapted whose weights have other users, such as tied embeddings: once
    merged, the adapter would change those as well. (Trained tokens know all users of theirs.)"""
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = adapted.get_base_model()
    users = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    for path, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer) or isinstance(layer, TrainableTokensLayer):
            continue
        if users[id(getattr(layer.get_base_layer(), "weight", None))] > 1:
            raise UserError(f"{name}: other modules share their weights with {path}: leave it unadapted.")


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
