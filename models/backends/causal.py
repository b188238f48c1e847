"""What the backends' views of decoder-only models share: the modules' own view reads and embeds prompts."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache

from models.decoder_view import ModelInputs
from models.families.causal import CausalState


class CausalBackend:
    """Beside a backend's view: a kind of it adds `hold`. B rows, P prompt tokens, Q new ones, D width."""

    eager: Any  # the CausalView of the modules

    def hold(self, begun: CausalState) -> Any:
        """The backend's state over what the modules' own view has begun, which it keeps as `begun`."""
        raise NotImplementedError

    def read(self, input_ids: Tensor, attention_mask: Tensor) -> ModelInputs:
        return self.eager.read(input_ids, attention_mask)

    def begin(
        self,
        cache: Cache | None,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Any:
        given = {"attention_mask": attention_mask, "position_ids": position_ids}
        return self.hold(self.eager.begin(cache, **given, inputs_embeds=inputs_embeds))

    def embed(self, state: Any, token_ids: Tensor) -> Tensor:
        return self.eager.embed(state.begun, token_ids)


def take_over(state: Any, begun: CausalState) -> None:
    """Put the keys/values of a given cache into a backend's state, whose lengths both count from then on."""
    state.continue_from(begun.cache)
    del begun.cache  # whose keys/values are in the buffers now
    begun.lengths = state.lengths
