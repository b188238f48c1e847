"""What an exit with a `kv_layer` says to all tokens of a known text, in one pass instead of step by step.

Tokens that wait for the deep layers together, a run, see each other by the exit's own keys/values, and all
tokens before the run by those of `kv_layer`. B rows, T tokens, D width, H heads, W their width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from models.families.masks import smallest
from models.families.stack import StackView, states_of


class BesideExact(DynamicCache):
    """Lets a layer attend to exact keys/values (B, H, T, W) of all tokens, and to its own of the same."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.exact = keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.exact
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


def read_drafts(view: StackView, state: Any, hidden: Tensor, run_starts: Tensor) -> Tensor:
    """What `predict` reads of the exit: (B, T, D).

    Args:
        state: in which `kv_layer` holds the T tokens, and the exit none.
        hidden: (B, T, D) after the exit's layer.
        run_starts: (B or 1, T) where the run of waiting tokens begins that a token belongs to.
    """
    adapter, last = view.exit_adapter, view.num_layers
    assert adapter is not None
    tokens = hidden.shape[1]
    inputs = view.inputs_of(view.step_inputs(state, last, tokens, True), last)
    own = getattr(state.cache, "self_attention_cache", state.cache).layers[adapter.origin]
    cache: Any = BesideExact(own.keys[:, :, :tokens], own.values[:, :, :tokens])
    if hasattr(state.cache, "cross_attention_cache"):
        cache = EncoderDecoderCache(cache, state.cache.cross_attention_cache)
    given = {view.cache_argument: cache, **over_both(inputs, hidden, run_starts)}
    return states_of(view.layers[last](adapter.enter(hidden), **given))


def over_both(inputs: dict[str, Any], hidden: Tensor, run_starts: Tensor) -> dict[str, Any]:
    """A layer's inputs for T queries and T keys, for twice the keys: exact ones, then its own."""
    tokens = hidden.shape[1]
    mask = inputs["attention_mask"]
    if mask is None:
        mask = hidden.new_zeros(1, 1, tokens, tokens)
    within = torch.arange(tokens, device=hidden.device) >= run_starts[:, None, :, None]  # (B, 1, T, T)
    hide = smallest(mask.dtype)
    masks = torch.cat([mask.masked_fill(within, hide), mask.masked_fill(~within, hide)], dim=-1)
    bias = inputs.get("position_bias")
    biases = {} if bias is None else {"position_bias": torch.cat([bias, bias], dim=-1)}
    return inputs | {"attention_mask": masks} | biases
