"""How queries and keys are rotated in exported layers: by the attention operator itself, which saves a dozen
nodes and leaves their products side by side, or by the layer where the operator cannot.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.backends.shared import Pair
from models.families.stack import StackView

OPERATOR_WIDTHS = 16  # GroupQueryAttention rotates heads, and parts of them, of a multiple of this
TABLES = ("cosines", "sines")


class Rotation(NamedTuple):
    """Tables (T, W' / 2) for the W' rotated of a head's W, and where in them each query row stands."""

    cosines: Tensor
    sines: Tensor
    places: Tensor  # (B, R)

    def rows(self, kept: Tensor | None) -> Pair:
        """What layers take, (B, Q, W') both: of the `kept` (Q,) rows, or of all."""
        places = self.places if kept is None else self.places.index_select(1, kept)
        cosines, sines = F.embedding(places, self.cosines), F.embedding(places, self.sines)
        return torch.cat([cosines, cosines], -1), torch.cat([sines, sines], -1)


def as_rotation(cosines: Tensor | None, sines: Tensor | None, places: Tensor | None) -> Rotation | None:
    return None if cosines is None or sines is None or places is None else Rotation(cosines, sines, places)


def operator_rotates(view: StackView) -> bool:
    """Whether the attention operator can do what the layers of `view` do."""
    width = view.rotary_width
    return width is not None and not any(size % OPERATOR_WIDTHS for size in (width, view.key_value_shape[1]))


def rotation_examples(view: StackView, batch: int, rows: int, axis: str) -> dict[str, tuple[Tensor, Any]]:
    """Of families that rotate: tensors to trace with, and their varying axes."""
    width = view.rotary_width
    if width is None:
        return {}
    tables = {name: (torch.zeros(rows + 1, width // 2), {0: "held"}) for name in TABLES}
    return {**tables, "places": (torch.zeros(batch, rows, dtype=torch.int64), {0: "batch", 1: axis})}
