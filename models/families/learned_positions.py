"""What families with a learned embedding of each position share: how many there are."""

from __future__ import annotations

from models.errors import UserError
from models.families.causal import CausalState


def check_positions(state: CausalState, total: int, positions: int | None) -> None:
    """Raise UserError if the first `total` tokens need more than the model's `positions`."""
    if positions is not None and state.highest_position(total) >= positions:
        raise UserError(f"The model has {positions} positions: cut prompts and outputs to that many tokens.")
