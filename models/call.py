"""One `generate` call whose prompt is read: what the decoding loops are given."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from models.decode_stats import DecodeStats
from models.decoder_view import DecoderState, DecoderView
from models.exit_policy import ExitPolicy
from models.token_choice import TokenChooser, TokenStream


class Call(NamedTuple):
    """Of B rows."""

    view: DecoderView
    state: DecoderState
    policy: ExitPolicy
    chooser: TokenChooser
    stream: TokenStream
    stats: DecodeStats
    input_ids: Tensor  # (B, P)
    lookup_ids: Tensor | None  # (1, S) further text for a policy's lookup
