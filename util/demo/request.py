"""What a visitor asks for, checked where it enters."""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers import BatchEncoding

from models.confidence import SoftmaxGap
from models.errors import UserError
from models.exit_policy import Calm, ExitPolicy, FullDepth, StaticExit
from models.free import Free
from util.data.preparation import position_limit
from util.demo.session import OpenModel
from util.methods import BASELINE, CALM, FREE, FREE_LOSSLESS, STATIC

METHODS = (BASELINE, STATIC, CALM, FREE, FREE_LOSSLESS)
LONGEST_SOURCE = 1024  # tokens, whatever the model could take


@dataclass(frozen=True)
class Limits:
    max_characters: int = 2000
    max_new_tokens: int = 256


@dataclass(frozen=True)
class Request:
    text: str
    method: str
    threshold: float
    shallow_layer: int
    max_pending: int  # 0: no cap
    max_new_tokens: int

    def check(self, limits: Limits, num_layers: int) -> None:
        """Raise UserError, naming the field of the page, for what is out of bounds."""
        if not self.text.strip():
            raise UserError("Text: type one, or pick an example.")
        if len(self.text) > limits.max_characters:
            raise UserError(f"Text: {len(self.text)} characters; at most {limits.max_characters} are taken.")
        if self.method not in METHODS:
            raise UserError(f"Method: {self.method!r} is none of {', '.join(METHODS)}.")
        if not (math.isfinite(self.threshold) and 0 <= self.threshold <= 1):
            raise UserError(f"Threshold: must lie in [0, 1], got {self.threshold}.")
        check_whole("Shallow layer", self.shallow_layer, 1, num_layers - 1)
        check_whole("Most tokens that wait", self.max_pending, 0, limits.max_new_tokens)
        check_whole("New tokens", self.max_new_tokens, 2, limits.max_new_tokens)

    def policy(self) -> ExitPolicy:
        """One of this request alone."""
        layer, gap = self.shallow_layer, SoftmaxGap()
        if self.method == STATIC:
            return StaticExit(layer)
        if self.method == CALM:
            return Calm(gap, self.threshold, min_layer=layer)
        if self.method in (FREE, FREE_LOSSLESS):
            lossless = self.method == FREE_LOSSLESS
            return Free(layer, gap, self.threshold, lossless=lossless, max_pending=self.max_pending or None)
        return FullDepth()


def check_whole(name: str, value: float, least: int, most: int) -> None:
    if not (isinstance(value, int) and least <= value <= most):
        raise UserError(f"{name}: must be a whole number in {least}..{most}, got {value}.")


def encode(opened: OpenModel, request: Request) -> BatchEncoding:
    """(1, S) ids and mask of the text, in its prompt if the model has no encoder.

    Raises:
        UserError: it has more tokens than the model, or this page, takes.
    """
    inputs = opened.encoder.inputs([request.text])
    length = inputs["input_ids"].shape[1]
    positions = position_limit(opened.plain.model) or math.inf
    if opened.plain.prompt is not None:
        positions -= request.max_new_tokens
    limit = min(LONGEST_SOURCE, positions)
    if length > limit:
        raise UserError(f"Text: {length} tokens; at most {limit} are taken with these settings.")
    return inputs.to(opened.plain.model.device)
