"""Checks of what a caller gives to a policy or a threshold: one line that names it, or the value itself.

self.shallow_layer = as_count("Free: shallow_layer", shallow_layer)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from models.errors import UserError


def as_number(name: str, value: Any, low: float = 0.0, high: float = math.inf) -> float:
    """`value` as a float; UserError if it is no number in [low, high]."""
    if not isinstance(value, Real) or isinstance(value, bool) or not low <= value <= high:  # type: ignore[operator]  # of Real
        raise UserError(f"{name} must be a number{between(low, high)}, got {value!r}.")
    return float(value)


def between(low: float, high: float) -> str:
    """The bounds in words; nothing where there are none."""
    if math.isfinite(high):
        return f" in [{low:g}, {high:g}]"
    return f" from {low:g} on" if math.isfinite(low) else ""


def as_share(name: str, value: Any) -> float:
    """`value` as a float; UserError if it is no number in [0, 1]."""
    return as_number(name, value, 0.0, 1.0)


def as_count(name: str, value: Any, low: int = 1) -> int:
    """`value` as an int; UserError if it is no whole number from `low` on."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < low:
        raise UserError(f"{name} must be a whole number from {low} on, got {value!r}.")
    return int(value)


def as_layers(name: str, values: Any) -> list[int]:
    """Layer numbers as a list; UserError if they are no collection of whole numbers from 1 on."""
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise UserError(f"{name} must be a list of layers, got {values!r}.")
    return [as_count(name, value) for value in values]


def as_object(name: str, value: Any, example: str) -> Any:
    """`value`; UserError if it cannot be called, or is a class where an object of it is meant."""
    if isinstance(value, type) or not callable(value):
        raise UserError(f"{name} must be an object such as {example}, got {value!r}.")
    return value


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
