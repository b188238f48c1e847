"""A small part behind one layer of a frozen model, taught to say there what the last layer will say.

    adapter = make_exit_adapter(view, kind="layer", layer=10)
    attach_exit_adapter(model, adapter)  # views made from now on predict exits after layer 10 through it

What the model itself computes stays as it is, so that lossless decoding returns exactly its outputs. After
Balcony (Jamialahmadi et al., 2025), Kangaroo (Liu et al., 2024) and EE-Tuning (Pan et al., 2024).
"""

from __future__ import annotations

import copy
import math
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.choices import EXIT_ADAPTERS, KEEPING_EXIT_ADAPTERS
from models.errors import UserError

NAME = "exit_adapter"  # of the module on its model, and of its files


class Nothing(nn.Module):
    """In the place of what adds to a residual stream."""

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.zeros_like(hidden)


class ExitAdapter(nn.Module):
    """Between the states after `layer` (1..L) and the LM head of an exit there. D width, E of what the LM
    head reads, V vocabulary.

    - layer: one more decoder layer, at first a copy of the one that follows, whose input it reads; a residual
      linear map, at first the identity; a norm, at first the model's final one;
    - attention: the same without the layer's feed-forward part;
    - projection: the linear map and the norm (a "tuned lens": Belrose et al., 2023);
    - norm: the norm alone.

    The map turns states of this depth into what norm and LM head expect, which they learn slowly without it.

    With a shortlist the exit predicts only its K tokens; all others share one further logit.

    With a `kv_layer` (layer + 1..L) the decoder layer, at first a copy of that one, attends to that layer's
    keys/values of the tokens that have run all layers, and to its own of those that wait: all in one buffer,
    as those tokens overwrite them once they run that layer. Deep keys/values tell an exit far more than those
    of its own depth; EAGLE (Li et al., 2024) drafts from deep states for the same reason. A residual linear
    map, at first the identity, turns states of the exit's depth into what so deep a layer expects.
    """

    shortlist: Tensor | None  # (K,) ids

    def __init__(
        self,
        kind: str,
        layer: int,
        block: nn.Module | None,
        norm: nn.Module,
        width: int,
        read_width: int,
        shortlist: Tensor | None = None,
        kv_layer: int | None = None,
    ) -> None:
        """`block`: the decoder layer, which the view runs as one more of its own and which keeps keys/values;
        None where there is none.
        `read_width`: of what the LM head reads, narrower than states in OPT-350m."""
        super().__init__()
        self.kind = kind
        self.layer = layer
        self.kv_layer = kv_layer
        self.block = block
        self.entry = None
        if kv_layer is not None:
            self.entry = nn.Linear(width, width)
            nn.init.zeros_(self.entry.weight)
            nn.init.zeros_(self.entry.bias)
        self.norm = norm
        self.register_buffer("shortlist", shortlist)
        if kind != "norm":
            self.projection = nn.Linear(width, width)
            nn.init.zeros_(self.projection.weight)
            nn.init.zeros_(self.projection.bias)
        if shortlist is not None:
            self.others = nn.Linear(read_width, 1)
            nn.init.zeros_(self.others.weight)
            nn.init.zeros_(self.others.bias)

    @property
    def origin(self) -> int:
        """The layer, counted from 0, that `block` was a copy of."""
        return self.layer if self.kv_layer is None else self.kv_layer - 1

    def layers_run(self, layer: int) -> int:
        """Layers that a token runs which exits after `layer`, this one's own included."""
        return layer + (self.block is not None and layer == self.layer)

    def enter(self, states: Tensor) -> Tensor:
        """What `block` reads, of states after the exit's layer: (..., D) -> (..., D)."""
        return states if self.entry is None else states + self.entry(states)

    def normalize(self, states: Tensor) -> Tensor:
        """What the LM head reads, of what the exit reads: (..., D) -> (..., E)."""
        if self.kind != "norm":
            states = states + self.projection(states)
        return self.norm(states)

    def complete(self, logits: Tensor, vocabulary: int) -> Tensor:
        """Logits of all tokens, (..., V), of those on the shortlist and the one that others share, (..., K +
        1): the probability that others have in common is shared out evenly."""
        if self.shortlist is None:
            return logits
        others = logits[..., -1:] - math.log(max(vocabulary - len(self.shortlist), 1))
        complete = others.expand(*logits.shape[:-1], vocabulary).clone()
        return complete.index_copy_(-1, self.shortlist, logits[..., :-1])


def make_exit_adapter(
    view: Any, kind: str, layer: int, shortlist: Tensor | None = None, kv_layer: int | None = None
) -> ExitAdapter:
    """An untaught exit adapter for the model of `view`, a `models.families.stack.StackView` or a backend's.

    Args:
        kind: of models.choices.EXIT_ADAPTERS.
        layer: after which tokens exit, 1..L - 1.
        shortlist: (K,) distinct token ids that the exit chooses from; None: all.
        kv_layer: whose keys/values of tokens that ran all layers it attends to, layer + 1..L; None: none but
            its own.

    Raises:
        UserError: no such kind or layer, a shortlist of what are no token ids or one twice, or a model that
            has no final norm to start from.
    """
    view = getattr(view, "eager", view)  # what a backend's sees the modules through
    if kind not in EXIT_ADAPTERS:
        raise UserError(f"exit_adapter: {kind!r} is none of {', '.join(EXIT_ADAPTERS)}.")
    if not isinstance(layer, Integral) or not 1 <= layer < view.num_layers:
        raise UserError(f"exit_adapter: layer must lie in 1..{view.num_layers - 1}, got {layer!r}.")
    if kv_layer is not None:
        check_kv_layer(view, kind, layer, kv_layer)
    if shortlist is not None:
        check_shortlist(shortlist, view.vocabulary)
    norm, block = copy.deepcopy(view.final_norm), None
    if kind in KEEPING_EXIT_ADAPTERS:
        block = copy_layer(view.layers[layer if kv_layer is None else kv_layer - 1], view.num_layers)
        if kind == "attention":
            view.drop_feed_forward(block)
    elif kind == "norm" and not any(True for _ in norm.parameters()):
        family = view.model.config.model_type
        raise UserError(f"exit_adapter norm: {family} has no final norm: choose another kind.")
    read_width = view.model.get_output_embeddings().weight.shape[1]
    adapter = ExitAdapter(kind, layer, block, norm, view.width, read_width, shortlist, kv_layer)
    return adapter.to(view.model.device, view.model.dtype).eval()


def check_shortlist(token_ids: Tensor, vocabulary: int, least: int = 1) -> None:
    """Raise UserError unless there are at least so many ids (K,), whole numbers in 0..V - 1, each once."""
    kind = token_ids.dtype
    if token_ids.dim() != 1 or kind.is_floating_point or kind.is_complex or kind == torch.bool:
        shape = tuple(token_ids.shape)
        raise UserError(f"A shortlist is a row of whole numbers, not {kind} of shape {shape}.")
    if len(token_ids) < least or int(token_ids.max()) >= vocabulary or int(token_ids.min()) < 0:
        raise UserError(f"A shortlist needs at least {least} token ids in 0..{vocabulary - 1}.")
    if len(token_ids.unique()) < len(token_ids):
        raise UserError("A shortlist has every token id once: leave repeated ones out.")


def check_kv_layer(view: Any, kind: str, layer: int, kv_layer: int, name: str = "kv_layer") -> None:
    """Raise UserError for a layer whose keys/values an exit after `layer` cannot read."""
    if kind not in KEEPING_EXIT_ADAPTERS:
        kinds = ", ".join(KEEPING_EXIT_ADAPTERS)
        raise UserError(f"{name}: an exit adapter of kind {kind} attends to nothing; these do: {kinds}.")
    if not isinstance(kv_layer, Integral) or not layer < kv_layer <= view.num_layers:
        raise UserError(
            f"{name} must lie in {layer + 1}..{view.num_layers}, behind the exit, got {kv_layer!r}."
        )
    if not view.takes_biases:
        family = view.model.config.model_type
        raise UserError(f"{name}: layers of {family} compute relative biases themselves; leave it out.")


def copy_layer(layer: Any, index: int) -> nn.Module:
    """A copy of a decoder layer as number `index`, by which its cache is found, with the same configuration,
    which says how to attend."""
    configs = [module.config for module in layer.modules() if hasattr(module, "config")]
    copied = copy.deepcopy(layer, {id(config): config for config in configs})
    for module in copied.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = index
    return copied


def attach_exit_adapter(model: PreTrainedModel, adapter: ExitAdapter) -> None:
    """Hang an exit adapter on its model, in the place of any other; `save_pretrained` leaves it out."""
    setattr(model, NAME, adapter)
    ignored = {name for name in model._keys_to_ignore_on_save or () if not name.startswith(NAME)}
    model._keys_to_ignore_on_save = ignored | {f"{NAME}.{name}" for name in adapter.state_dict()}


def exit_adapter_of(model: PreTrainedModel) -> ExitAdapter | None:
    return getattr(model, NAME, None)
