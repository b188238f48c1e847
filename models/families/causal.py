"""What the views of all decoder-only families share: prompts, positions, masks, keys/values.

A family states how it embeds, what its layers make keys/values of, and what they are called with beside a
mask. Keys/values of all tokens are kept, also where layers attend to a window of the newest alone: the mask
cuts it out, so that tokens can be taken back.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel

from models.decoder_view import PADDING_LABEL, DecoderState, ModelInputs
from models.errors import UserError
from models.families.buffers import as_dynamic_cache, hand_over, make_buffers, refuse_uneven
from models.families.masks import prompt_padding, step_mask
from models.families.stack import Block, StackView

FULL, SLIDING = "full_attention", "sliding_attention"  # kinds of layers, as `config.layer_types` has them
INITIAL_POSITIONS = 64


class CausalState(DecoderState):
    """P prompt tokens, those of a given cache included."""

    def __init__(
        self,
        num_layers: int,
        like: Tensor,
        cache: Cache | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        lodgers: dict[int, int],
    ) -> None:
        super().__init__(num_layers, attention_mask)
        refuse_all_but_dynamic(cache)
        self.cache = make_buffers(self.lengths, cache, lodgers)
        refuse_uneven(self.lengths)
        self.like = like  # of the type and device of masks
        self.prompt_embeds = inputs_embeds
        self.padding = prompt_padding(like, attention_mask)
        self.positions = prompt_positions(like, attention_mask, position_ids)  # (B or 1, N), N growing
        self.numbered = self.positions.shape[1]  # tokens of the prompt
        self.highest = int(self.positions.max())  # of their positions
        self.tables: dict[str, Any] = {}  # what families make of the positions, by kind of layer

    def grow_positions(self, total: int) -> bool:
        """Number at least `total` tokens, as those after the prompt follow it; whether any are new."""
        held = self.positions.shape[1]
        if total <= held and self.tables:
            return False
        new = max(INITIAL_POSITIONS, 2 * total) - held
        steps = torch.arange(1, max(new, 0) + 1, device=self.positions.device)
        self.positions = torch.cat([self.positions, self.positions[:, -1:] + steps], dim=1)
        return True

    def highest_position(self, total: int) -> int:
        """The largest number of the first `total` tokens, known without a wait for the device."""
        return self.highest + max(total - self.numbered, 0)


class CausalView(StackView):
    """Base of the views: a family adds `project_kv`, `place` where embeddings need more than themselves, and
    `make_tables` and `layer_inputs` where layers are called with more than a mask."""

    bias_heads = 1  # all see the same window

    def __init__(
        self, model: PreTrainedModel, decoder: Any, layers: Iterable[Block], final_norm: nn.Module
    ) -> None:
        super().__init__(model, decoder, layers, final_norm)
        config = model.config
        refuse_other_attention(config)
        self.kinds = layer_kinds(config, self.num_layers)
        if len(self.layers) > self.num_layers:
            assert self.exit_adapter is not None
            self.kinds.append(self.kinds[self.exit_adapter.origin])  # of which it was a copy
        window = getattr(config, "sliding_window", None)
        self.windows = {kind: window if kind == SLIDING else None for kind in sorted(set(self.kinds))}

    @property
    def output_bias(self) -> Tensor | None:
        return getattr(self.model.get_output_embeddings(), "bias", None)

    def read(self, input_ids: Tensor, attention_mask: Tensor) -> ModelInputs:
        return ModelInputs({"attention_mask": attention_mask}, input_ids)

    def begin(
        self,
        cache: Cache | None,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> CausalState:
        like = self.model.get_input_embeddings().weight
        self.check_cache(cache)
        given = attention_mask, position_ids, inputs_embeds
        return CausalState(len(self.layers), like, cache, *given, self.lodgers)

    def embed(self, state: CausalState, token_ids: Tensor) -> Tensor:
        """Embed the token ids that follow those of layer 0, or what was given in their place: (B, Q) ->
        (B, Q, D)."""
        past, given = state.lengths[0], state.prompt_embeds
        total = past + token_ids.shape[1]
        if given is not None and total <= given.shape[1]:
            embedded = given[:, past:total]
        else:
            embedded = self.model.get_input_embeddings()(token_ids)
        self.number_tokens(state, total)
        return self.place(state, embedded, past, total)

    def place(self, state: CausalState, embedded: Tensor, past: int, total: int) -> Tensor:
        """What the first layer reads, of embeddings (B, Q, D) of tokens `past`..`total - 1`."""
        return embedded

    def number_tokens(self, state: CausalState, total: int) -> None:
        """Let the state have positions, and what the family makes of them, of the first `total` tokens."""
        if state.grow_positions(total):
            state.tables = {kind: self.make_tables(state, kind) for kind in self.windows}

    def make_tables(self, state: CausalState, kind: str) -> Any:
        """What layers of a kind read of all positions (B or 1, N) of the state."""
        return None

    def step_inputs(self, state: CausalState, start: int, new: int, causal: bool) -> dict[str, Any]:
        """By kind of layer, what it is called with besides states and cache for `new` tokens after those
        that layer `start` holds."""
        past = state.lengths[start]
        total = past + new
        self.number_tokens(state, total)
        return {
            kind: self.layer_inputs(
                state.tables[kind],
                step_mask(state.like, new, past, causal, state.padding, window),
                past,
                total,
            )
            for kind, window in self.windows.items()
        }

    def layer_inputs(self, table: Any, mask: Tensor | None, past: int, total: int) -> dict[str, Any]:
        """A layer's arguments for tokens `past`..`total - 1`."""
        return {"attention_mask": mask}

    def inputs_of(self, inputs: dict[str, Any], index: int) -> dict[str, Any]:
        return inputs[self.kinds[index]]

    def traced_inputs(self, hidden: Tensor, rotation: tuple[Tensor, Tensor] | None) -> dict[str, Any]:
        return {kind: {"attention_mask": None} for kind in self.windows}

    def traced_keys_values(
        self, index: int, hidden: Tensor, rotation: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        inputs = self.inputs_of(self.traced_inputs(hidden, rotation), index)
        return self.project_kv(self.layers[index], hidden, inputs)

    def bias_owner(self, index: int) -> int:
        """The first layer of the same kind."""
        return self.kinds.index(self.kinds[index])

    def distance_bias(self, index: int, length: int) -> Tensor | None:
        """Keys out of the window."""
        window = self.windows[self.kinds[index]]
        if window is None:
            return None
        return torch.zeros(1, length).masked_fill(
            torch.arange(length) >= window, torch.finfo(torch.float32).min
        )

    def project_kv(self, layer: Block, hidden: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """What `layer`, called with `inputs`, caches of its input: (B, Q, D) -> keys, values (B, H, Q, W)."""
        raise NotImplementedError

    def write_kv(self, state: CausalState, hidden: Tensor, start: int, stop: int) -> None:
        if start == stop:
            return
        inputs = self.step_inputs(state, start, hidden.shape[1], True)
        for index in range(start, stop):
            keys, values = self.project_kv(self.layers[index], hidden, self.inputs_of(inputs, index))
            state.cache.update(keys, values, index)

    def deliver_cache(self, state: CausalState, cache: Cache | None) -> DynamicCache:
        layers = state.cache.layers[: self.num_layers]
        return hand_over(as_dynamic_cache(layers, min(state.lengths[: self.num_layers])), cache)

    def project(self, normalized: Tensor) -> Tensor:
        return self.cap(self.model.get_output_embeddings()(normalized))

    def training_states(self, outputs: Any) -> tuple[Tensor, ...]:
        return outputs.hidden_states

    def training_labels(self, labels: Tensor) -> Tensor:
        return F.pad(labels[:, 1:], (0, 1), value=PADDING_LABEL)


def prompt_positions(like: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
    """Positions of the prompt's tokens (B or 1, P): those given, or as `generate` counts them, without those
    of padding."""
    if position_ids is None and attention_mask is None:
        return torch.zeros(1, 1, dtype=torch.long, device=like.device)
    if position_ids is None:
        assert attention_mask is not None
        position_ids = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 0)
    elif attention_mask is not None and attention_mask.shape[-1] != position_ids.shape[-1]:
        raise UserError(
            f"position_ids has {position_ids.shape[-1]} tokens, attention_mask {attention_mask.shape[-1]}: "
            "give both for the whole prompt, what a cache holds included."
        )
    alike = bool((position_ids == position_ids[:1]).all())
    return position_ids[:1] if alike else position_ids


def layer_kinds(config: PreTrainedConfig, num_layers: int) -> list[str]:
    """Which attention each layer has.

    Raises:
        UserError: one that keeps no keys/values of each token, which cannot be taken back.
    """
    windowed = getattr(config, "sliding_window", None) is not None
    kinds = getattr(config, "layer_types", None) or [SLIDING if windowed else FULL] * num_layers
    others = sorted({*kinds} - {FULL, SLIDING})
    if others:
        raise UserError(
            f"This {config.model_type} has layers of {', '.join(others)}, whose tokens cannot be taken back: "
            "decode it with plain generate."
        )
    return list(kinds[:num_layers])


def refuse_other_attention(config: PreTrainedConfig) -> None:
    """Raise UserError for attention that is not causal, or that takes other masks than the view's."""
    if getattr(config, "use_bidirectional_attention", False):
        raise UserError(f"This {config.model_type} attends in both directions: it does not generate.")
    if config._attn_implementation not in ("eager", "sdpa"):
        raise UserError(
            f"Early exits need attention with a mask for each step: load the model with attn_implementation="
            f"'sdpa' or 'eager', not {config._attn_implementation!r}."
        )


def refuse_all_but_dynamic(cache: Cache | None) -> None:
    """Raise UserError for a cache whose tensors are no plain keys/values of all tokens."""
    if cache is None:
        return
    if not isinstance(cache, DynamicCache) or cache.offloading:
        raise UserError("Only a DynamicCache() can be continued or filled.")
    for layer in cache.layers:
        held = layer.get_seq_length()
        if held > 0 and layer.keys.shape[-2] < held:
            raise UserError(
                f"The given cache has dropped all but {layer.keys.shape[-2]} of {held} tokens, as its layers "
                "have windows: fill a DynamicCache() without a config instead, or give the whole prompt."
            )
