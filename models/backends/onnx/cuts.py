"""Which stretches of decoder layers are graphs of their own."""

from __future__ import annotations

from itertools import pairwise

from models.choices import MIXED
from models.families.stack import StackView

WEIGHT_BYTES = {"fp32": 4.0, "w8": 1.06, "w4": 0.63, "int8": 1.0, MIXED: 2.06}
HEAVY = 1 << 28  # bytes; a pass over as many takes so long that another call of a session is nothing


class Cuts:
    """Light layers: a graph for every stretch that is asked for, which is fastest, though a session packs
    weights for itself. Heavy ones: a graph from each place where a stretch ever began or ended to the next,
    so that no layer's weights are held twice."""

    def __init__(self, heavy: bool) -> None:
        self.heavy = heavy
        self.places: set[int] = set()  # which another thread may add to at any time

    @classmethod
    def of(cls, view: StackView, precision: str) -> Cuts:
        layers = view.layers[: view.num_layers]
        weights = sum(weight.numel() for layer in layers for weight in layer.parameters())
        return cls(weights * WEIGHT_BYTES[precision] >= HEAVY)

    def stretches(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Those that layers `start`..`stop - 1` are run in; heavy ones are cut there from now on."""
        if not self.heavy:
            return [(start, stop)]
        self.places.update((start, stop))
        return [*pairwise(place for place in sorted(self.places) if start <= place <= stop)]

    def keeps(self, start: int, stop: int) -> bool:
        """Whether that stretch is still run in one."""
        return not (self.heavy and any(start < place < stop for place in sorted(self.places)))
