"""Checks of what a caller gives to a policy or a threshold: one line that names it, or the value itself.

self.shallow_layer = as_count("Free: shallow_layer", shallow_layer)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

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
