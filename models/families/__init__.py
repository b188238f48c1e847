"""The registry of model families: `view_for(model)` finds the view of any supported model.

Each family has a file of its own; `register_view` adds one from outside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from models.decoder_view import DecoderView
from models.errors import UserError
from models.families.bart import BartView
from models.families.gpt2 import GPT2View
from models.families.gpt_neox import GPTNeoXView
from models.families.llama import Gemma3View, LlamaView
from models.families.opt import OPTView
from models.families.t5 import T5View
from models.families.umt5 import UMT5View

if TYPE_CHECKING:
    from peft import PeftModel

VIEWS: dict[str, Callable[[PreTrainedModel], DecoderView]] = {
    "bart": BartView,
    "gemma": LlamaView,
    "gemma2": LlamaView,
    "gemma3_text": Gemma3View,
    "gpt2": GPT2View,
    "gpt_neox": GPTNeoXView,
    "llama": LlamaView,
    "longt5": T5View,
    "marian": BartView,
    "mbart": BartView,
    "mistral": LlamaView,
    "mt5": T5View,
    "opt": OPTView,
    "pegasus": BartView,
    "qwen2": LlamaView,
    "qwen3": LlamaView,
    "smollm3": LlamaView,
    "t5": T5View,
    "umt5": UMT5View,
}
"""The view of each `config.model_type`."""


def view_for(model: PreTrainedModel | PeftModel) -> DecoderView:
    """Return a view that serves `model`.

    Raises:
        UserError: the model's family has no view; the message lists those that have one.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's wrapper
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    check_family(family)
    return VIEWS[family](model)


def check_family(family: str) -> None:
    """Raise UserError if `family`, a `config.model_type`, has no view."""
    if family not in VIEWS:
        raise UserError(
            f"No decoder view for model family {family!r} (supported: {', '.join(sorted(VIEWS))}). "
            "To add one, implement models.decoder_view.DecoderView and pass it to register_view: "
            "docs/add_a_model_family.md shows how."
        )


def register_view(family: str, view: Callable[[PreTrainedModel], DecoderView]) -> None:
    """Let `view_for` serve models whose `config.model_type` is `family` by `view`."""
    VIEWS[family] = view
