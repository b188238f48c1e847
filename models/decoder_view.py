"""A decoder seen layer by layer: the only way in which loop, policies, losses and analysis see a model.

`models.families.view_for(model)` gives the view of a model's family. A view is stateless and lives as long
as its model; what belongs to one generation lies in the `DecoderState` that `begin` returns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor
from transformers import Cache, PreTrainedModel

from models.exit_adapter import ExitAdapter

PADDING_LABEL = -100  # of positions that no loss counts


class DecoderState:
    """What one generation needs; views add caches, masks and encoder memory of their own.

    An exit adapter that keeps keys/values counts as one more layer after the last.

    `lengths[i]` counts the tokens whose keys/values layer i (from 0) holds. It is the truth: whatever a
    buffer holds beyond it does not exist.
    """

    def __init__(self, num_layers: int, prompt_mask: Tensor | None = None) -> None:
        self.lengths = [0] * num_layers
        self.waiting: list[Any] = []  # tokens that the exit policy keeps between steps
        self.plan: Any = None  # what the policy has settled on for this generation
        self.prompt_mask = prompt_mask  # (B, P) as the caller gave it: 0 at padding
        self.prompt_embeds: Tensor | None = None  # (B, P, D) given, which `embed` returns at their places

    def truncate(self, length: int) -> None:
        """Forget the keys/values of every layer beyond the first `length` tokens."""
        for layer, held in enumerate(self.lengths):
            self.lengths[layer] = min(held, length)


class ModelInputs(NamedTuple):
    """What a model makes of the ids and mask that a tokenizer returns."""

    arguments: dict[str, Any]  # keywords of `begin`
    prompt: Tensor | None  # (B, P) ids that outputs start with; None: options of the generation name them


class DecoderView(Protocol):
    """One decoder, one layer at a time. Shapes: B batch, Q new tokens, D model width, E width of what the LM
    head reads (D but in OPT-350m), V vocabulary.

    `state` is what `begin` returned: each view has a kind of its own, which its methods may name. One that
    has a faster way than `advance_in_parts` also has a method `advance`, which does the same.
    """

    model: PreTrainedModel
    num_layers: int
    max_positions: int | None  # tokens that it can number; None: any
    exit_adapter: ExitAdapter | None  # behind one layer, see `models.exit_adapter`
    mixes_windows: bool  # tokens of a window change each other by more than rounding: no lossless decoding

    def read(self, input_ids: Tensor, attention_mask: Tensor) -> ModelInputs:
        """(B, S) ids and a mask that is 0 at padding: the source of an encoder, or the prompt itself."""

    def begin(self, cache: Cache | None, *args: Any, **model_kwargs: Any) -> DecoderState:
        """Collect what every layer of this generation needs: encoder memory, masks, positions.

        The state tells the loop of a mask or embeddings given for the prompt (`DecoderState`). A cache that
        holds tokens is continued. A view names the keywords that it reads, as others are refused.
        """

    def embed(self, state: Any, token_ids: Tensor) -> Tensor:
        """Embed the token ids that follow those of layer 0: (B, Q) -> (B, Q, D)."""

    def run_layers(self, state: Any, hidden: Tensor, start: int, stop: int, *, causal: bool = True) -> Tensor:
        """Run layers `start`..`stop - 1` on (B, Q, D) un-normalized states and cache their keys/values.

        The Q tokens follow those that layer `start` has already cached. `causal=False` lets them see each
        other in both directions, which only the original's `--parallel_causal_mask False` asks for.
        """

    def read_exit(self, state: Any, hidden: Tensor, layer: int) -> Tensor:
        """What `predict` reads of an exit after `layer`, (B, Q, D), of the states that layers 1..`layer` have
        just made of the newest Q tokens: the same, unless an exit adapter is there."""

    def write_kv(self, state: Any, hidden: Tensor, start: int, stop: int) -> None:
        """Cache what layers `start`..`stop - 1` make of (B, Q, D) as keys/values, without running them."""

    def deliver_cache(self, state: Any, cache: Cache | None) -> Cache:
        """Put the keys/values of the tokens that every layer holds into `cache`, or into a new one."""

    def predict(self, hidden: Tensor, layer: int) -> Tensor:
        """Logits of the exit after `layer`, of what `read_exit` gives: un-normalized (..., D) -> (..., V)."""

    def normalize(self, hidden: Tensor, layer: int) -> Tensor:
        """The state that the LM head reads after `layer` (1..L): (..., D) -> (..., E).

        The final norm, or the identity for families without one, after the layer's own head if it has one.
        """

    def project(self, normalized: Tensor) -> Tensor:
        """LM head with the family's output scaling: (..., E) -> (..., V)."""

    def projection_onto(self, token_ids: Tensor) -> Callable[[Tensor], Tensor]:
        """`project` for a few tokens only: ids (K,) -> a function from (..., E) to (..., K)."""

    def training_states(self, outputs: Any) -> tuple[Tensor, ...]:
        """States of a forward pass with `output_hidden_states`: layer i's output at index i (0:
        embeddings), un-normalized but for the last, which the decoder has already normalized."""

    def training_labels(self, labels: Tensor) -> Tensor:
        """What `training_states` are to predict at each position, of (B, T) labels as the model's own forward
        pass takes them: those of a decoder-only model lie at the tokens themselves, one further."""

    def keep_all_layers(self) -> bool:
        """Switch off whatever skips layers at random in training; whether anything did."""


def advance_in_parts(
    view: DecoderView, state: DecoderState, hidden: Tensor, start: int, stop: int
) -> tuple[Tensor, np.ndarray]:
    """Run layers `start`..`stop - 1` on the newest token of a single sequence, (1, 1, D): its states, and
    logits (V,) of an exit there. The next call may overwrite both."""
    hidden = view.run_layers(state, hidden, start, stop)
    return hidden, read_logits(view.predict(view.read_exit(state, hidden, stop), stop))[0]


def read_logits(logits: Tensor) -> np.ndarray:
    """Those of a single sequence on the CPU: (1, Q, V) -> (Q, V)."""
    return logits[0].float().numpy()
