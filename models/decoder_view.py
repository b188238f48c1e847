"""A stateless, layer-by-layer look at a Hugging Face decoder.

`view_for(model)` returns the view of the model's family; the decoding loop, the exit policies and the
losses see models only through it. What belongs to one generation lives in the state that `begin` returns.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel, T5ForConditionalGeneration

from models.errors import UserError

DecoderState = Any
"""Per-generation state of a view: cache, encoder memory, masks. Policies hand it through, unopened."""

CACHE_KEYWORD = (  # transformers renamed this argument of all models and of `generate` in 5.24
    "cache"
    if "cache" in inspect.signature(T5ForConditionalGeneration.forward).parameters
    else "past_key_values"
)

REGISTERED_VIEWS: dict[str, Callable[[PreTrainedModel], DecoderView]] = {}
"""Families that `register_view` added to those that come with the package."""


class DecoderView(Protocol):
    """One decoder, one layer at a time. Shapes: B batch, Q new tokens, D model width, V vocabulary."""

    model: PreTrainedModel
    num_layers: int

    def begin(self, cache: Cache | None, **model_kwargs: Any) -> DecoderState:
        """Collect what every layer of this generation needs: encoder memory, masks, positions."""

    def embed(self, state: DecoderState, token_ids: Tensor) -> Tensor:
        """Embed token ids: (B, Q) -> (B, Q, D)."""

    def run_layers(
        self, state: DecoderState, hidden: Tensor, start: int, stop: int, *, causal: bool = True
    ) -> Tensor:
        """Run layers `start`..`stop - 1` on (B, Q, D) un-normalized states and cache their keys/values.

        The Q tokens follow those that layer `start` has already cached. `causal=False` lets them see each
        other in both directions, which only the original's `--parallel_causal_mask False` asks for.
        """

    def write_kv(self, state: DecoderState, hidden: Tensor, start: int, stop: int) -> None:
        """Cache what layers `start`..`stop - 1` make of (B, Q, D) as keys/values, without running them."""

    def cached_length(self, state: DecoderState, layer: int) -> int:
        """Number of tokens whose keys/values `layer` holds."""

    def truncate(self, state: DecoderState, length: int) -> None:
        """Forget the self-attention keys/values of every layer beyond the first `length` tokens."""

    def normalize(self, hidden: Tensor, layer: int) -> Tensor:
        """The state that the LM head reads after `layer` (1..L): (..., D) -> (..., D).

        The final norm, or the identity for families without one, after the layer's own head if it has one.
        """

    def project(self, normalized: Tensor) -> Tensor:
        """LM head with the family's output scaling: (..., D) -> (..., V)."""

    def projection_onto(self, token_ids: Tensor) -> Callable[[Tensor], Tensor]:
        """`project` for a few tokens only: ids (K,) -> a function from (..., D) to (..., K)."""

    def training_states(self, outputs: Any) -> tuple[Tensor, ...]:
        """Decoder states of a forward pass with `output_hidden_states`: layer i's output at index i (0:
        embeddings), un-normalized but for the last, which the decoder has already normalized."""


def view_for(model: nn.Module) -> DecoderView:
    """Return the view that serves `model`.

    Raises:
        UserError: the model's family has no view; the message lists those that have one.
    """
    families = view_families() | REGISTERED_VIEWS
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's wrapper
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if family not in families:
        raise UserError(
            f"No decoder view for model family {family!r} (supported: {', '.join(sorted(families))}). "
            "To add one, implement models.decoder_view.DecoderView and pass it to register_view: "
            "docs/add_a_model_family.md shows how."
        )
    return families[family](model)


def register_view(family: str, view: Callable[[PreTrainedModel], DecoderView]) -> None:
    """Let `view_for` serve models whose `config.model_type` is `family` by `view`."""
    REGISTERED_VIEWS[family] = view


def view_families() -> dict[str, Callable[[PreTrainedModel], DecoderView]]:
    """The view of each `config.model_type`; imported late, as views import this module."""
    from models.bart import BartView
    from models.t5 import T5View
    from models.umt5 import UMT5View

    return {
        "bart": BartView,
        "longt5": T5View,
        "marian": BartView,
        "mbart": BartView,
        "mt5": T5View,
        "pegasus": BartView,
        "t5": T5View,
        "umt5": UMT5View,
    }


def causal_mask_(mask: Tensor, past: int) -> Tensor:
    """Block, in an additive (Q, past + Q) mask, the keys that come after each query; in place."""
    blocked = torch.ones_like(mask, dtype=torch.bool).triu(past + 1)
    return mask.masked_fill_(blocked, torch.finfo(mask.dtype).min)
