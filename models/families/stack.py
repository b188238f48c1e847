"""What the views of all families share: driving a stack of layers, heads of exits, the projection."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from models.errors import UserError
from models.exit_adapter import ExitAdapter, Nothing, exit_adapter_of

Block = Any  # a decoder layer of Hugging Face's, whose parts no type declares


class StackView:
    """Layers of an unmodified model between embeddings and LM head; a kind of model adds state and inputs."""

    mixes_windows = False
    takes_biases = True  # whether layers are given the bias of every key, where there are any
    max_positions: int | None = None  # that are learned
    key_value_shape: tuple[int, int]  # heads of keys/values, their width
    heads_of_group = 1  # query heads that share one of these
    cache_argument = "cache"  # under which layers take it
    output_scale: float | None = None  # of the LM head's input
    output_cap: float | None = None  # that logits approach: cap * tanh(logits / cap)

    def __init__(
        self, model: PreTrainedModel, decoder: Any, layers: Iterable[Block], final_norm: nn.Module
    ) -> None:
        self.model = model
        self.decoder = decoder
        self.layers = list(layers)  # slicing a ModuleList would build a new module
        self.num_layers = len(self.layers)
        self.exit_adapter = exit_adapter_of(model)
        if self.exit_adapter is not None and self.exit_adapter.block is not None:
            self.layers.append(self.exit_adapter.block)  # with keys/values as layers have them
        self.lodgers = lodgers_of(self.exit_adapter, self.num_layers)
        self.final_norm = final_norm
        self.width = model.config.hidden_size
        self._listed: ListedProjection | None = None  # onto the exit adapter's shortlist

    @property
    def bias_heads(self) -> int:
        """Of `distance_bias`."""
        raise NotImplementedError

    @property
    def output_bias(self) -> Tensor | None:
        """(V,) or (1, V), added to the LM head's output, where there is one."""
        return None

    @property
    def rotary_width(self) -> int | None:
        """Of the cosines and sines by which layers rotate, if they do."""
        return None

    def step_inputs(self, state: Any, start: int, new: int, causal: bool) -> dict[str, Any]:
        """What layers are called with besides states and cache, for `new` tokens after those that layer
        `start` holds."""
        raise NotImplementedError

    def run_layers(self, state: Any, hidden: Tensor, start: int, stop: int, *, causal: bool = True) -> Tensor:
        inputs = self.step_inputs(state, start, hidden.shape[1], causal)
        return self.apply_layers(hidden, inputs, state.cache, start, stop)

    def read_exit(self, state: Any, hidden: Tensor, layer: int) -> Tensor:
        adapter = self.adapter_of(layer)
        if adapter is None or adapter.block is None:
            return hidden
        return self.run_layers(state, adapter.enter(hidden), self.num_layers, self.num_layers + 1)

    def apply_layers(
        self, hidden: Tensor, inputs: dict[str, Any], cache: Cache | None, start: int, stop: int
    ) -> Tensor:
        """Layers `start`..`stop - 1` of the unmodified model on (B, Q, D): a function of tensors alone, as
        keys/values come from and go to whatever `cache.update` does with them. Without a cache nothing came
        before."""
        for index in range(start, stop):
            given = {self.cache_argument: cache, **self.inputs_of(inputs, index)}
            hidden = states_of(self.layers[index](hidden, **given))
        return hidden

    def inputs_of(self, inputs: dict[str, Any], index: int) -> dict[str, Any]:
        """What layer `index` is called with, of the step's inputs."""
        return inputs

    def traced_inputs(self, hidden: Tensor, rotation: tuple[Tensor, Tensor] | None) -> dict[str, Any]:
        """`step_inputs` of an export, which masks by itself: what layers insist on being called with, and
        cosines and sines of the new tokens, (B or 1, Q, W) both."""
        raise NotImplementedError

    def traced_keys_values(
        self, index: int, hidden: Tensor, rotation: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """What layer `index` caches of (B, Q, D), exported likewise: keys, values (B, H, Q, W)."""
        raise NotImplementedError

    def bias_owner(self, index: int) -> int:
        """The layer whose biases and rotation layer `index` uses."""
        return 0

    def distance_bias(self, index: int, length: int) -> Tensor | None:
        """Bias of a key so many positions before its query in layer `index`: (bias_heads, length); None if
        there is none."""
        return None

    def project(self, normalized: Tensor) -> Tensor:
        """Logits of normalized states: (..., E) -> (..., V), E being D but in OPT-350m."""
        raise NotImplementedError

    def predict(self, hidden: Tensor, layer: int) -> Tensor:
        adapter = self.adapter_of(layer)
        if adapter is None:
            return self.project(self.normalize(hidden, layer))
        return adapter.complete(self.exit_logits(hidden), self.vocabulary)

    def exit_logits(self, states: Tensor) -> Tensor:
        """What the exit adapter's exit says: (..., D) -> (..., V), or (..., K + 1) of its shortlist and of
        all other tokens together."""
        adapter = self.exit_adapter
        assert adapter is not None
        normalized = adapter.normalize(states)
        if adapter.shortlist is None:
            return self.project(normalized)
        return torch.cat([self.project_listed(normalized), adapter.others(normalized)], dim=-1)

    @property
    def vocabulary(self) -> int:
        """V, as the LM head has it."""
        return self.model.get_output_embeddings().weight.shape[0]

    def project_listed(self, normalized: Tensor) -> Tensor:
        """`project` for the tokens on the exit adapter's shortlist."""
        assert self.exit_adapter is not None and self.exit_adapter.shortlist is not None
        shortlist = self.exit_adapter.shortlist
        if self._listed is None or self._listed.token_ids is not shortlist:  # which a move replaces
            self._listed = ListedProjection(self, shortlist)
        return self._listed(normalized)

    def normalize(self, hidden: Tensor, layer: int) -> Tensor:
        adapter = self.adapter_of(layer)
        if adapter is not None:
            return adapter.normalize(hidden)
        return self.final_norm(self.apply_exit_head(hidden, layer))

    def adapter_of(self, layer: int) -> ExitAdapter | None:
        """That of the exit after `layer`, if it has one."""
        adapter = self.exit_adapter
        return adapter if adapter is not None and adapter.layer == layer else None

    def apply_exit_head(self, hidden: Tensor, layer: int) -> Tensor:
        """States (..., D) after `layer` through its own head, if it has one."""
        return self.model.per_exit_heads[str(layer)](hidden) if self.has_exit_head(layer) else hidden

    def has_exit_head(self, layer: int) -> bool:
        heads = getattr(self.model, "per_exit_heads", None)  # may be attached later than the view is made
        return heads is not None and str(layer) in heads

    def projection_onto(self, token_ids: Tensor) -> Callable[[Tensor], Tensor]:
        return ListedProjection(self, token_ids)

    def projection_weights(self, token_ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weights (K, E) and biases (K,) by which normalized states become logits of the tokens (None: all),
        the family's scale included."""
        weight, bias = self.model.get_output_embeddings().weight.detach(), self.output_bias
        bias = None if bias is None else bias.detach().flatten()
        if token_ids is not None:
            weight, bias = weight[token_ids], None if bias is None else bias[token_ids]
        return weight if self.output_scale is None else weight * self.output_scale, bias

    def cap(self, logits: Tensor) -> Tensor:
        if self.output_cap is None:
            return logits
        return torch.tanh(logits / self.output_cap) * self.output_cap

    def drop_feed_forward(self, layer: Block) -> None:
        """Leave nothing of a copied decoder layer but its attention."""
        if hasattr(layer, "mlp"):
            layer.mlp = Nothing()
        else:  # two maps of the layer's own
            layer.fc1, layer.fc2 = nn.Identity(), Nothing()

    def check_cache(self, cache: Cache | None) -> None:
        """Raise UserError for a cache that holds tokens of which the exit adapter has kept nothing."""
        adapter = self.exit_adapter
        if (
            adapter is not None
            and adapter.block is not None
            and cache is not None
            and cache.get_seq_length() > 0
        ):
            raise UserError(
                "A given cache holds nothing of the exit adapter: give the whole prompt, or load the model "
                "without exit_adapter."
            )

    def keep_all_layers(self) -> bool:
        dropped = getattr(self.decoder, "layerdrop", 0) > 0
        if dropped:
            self.decoder.layerdrop = 0.0
        return dropped


class ListedProjection:
    """`view.project` for a few tokens only, ids (K,): (..., E) -> (..., K). Its weights are copies, made anew
    once the model's have changed: it may be moved, cast or loaded again in between."""

    def __init__(self, view: StackView, token_ids: Tensor) -> None:
        self.view = view
        self.token_ids = token_ids
        self.made_of: list[Any] = []
        self.weights: tuple[Tensor, Tensor | None]

    def __call__(self, normalized: Tensor) -> Tensor:
        head = self.view.model.get_output_embeddings().weight
        sources = [stamp(head), stamp(self.view.output_bias), stamp(self.token_ids)]
        if sources != self.made_of:
            with torch.inference_mode(False):  # they are kept: an exit that decoded may be taught
                self.weights = self.view.projection_weights(self.token_ids.to(head.device))
            self.made_of = sources
        return self.view.cap(F.linear(normalized, *self.weights))


def stamp(tensor: Tensor | None) -> Any:
    """What differs once a tensor was moved, cast, replaced or written to."""
    if tensor is None:
        return None
    version = 0 if tensor.is_inference() else tensor._version  # of which those made in inference keep none
    return tensor.data_ptr(), tensor.device, tensor.dtype, version


def lodgers_of(adapter: ExitAdapter | None, num_layers: int) -> dict[int, int]:
    """Layers whose keys/values lie in the buffers of others, and these: what a lodger appends lies beyond
    what its host holds, until the host overwrites it."""
    if adapter is None or adapter.kv_layer is None:
        return {}
    return {num_layers: adapter.kv_layer - 1}


def states_of(output: Any) -> Tensor:
    """Those that a layer returns, alone or first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def split_pair(keys: Tensor, values: Tensor, head_width: int) -> tuple[Tensor, Tensor]:
    """(B, Q, H * W) -> (B, H, Q, W), both."""
    return split_heads(keys, head_width), split_heads(values, head_width)


def split_heads(projected: Tensor, head_width: int) -> Tensor:
    """(B, Q, H * W) -> (B, H, Q, W)."""
    return projected.unflatten(-1, (-1, head_width)).transpose(1, 2)
