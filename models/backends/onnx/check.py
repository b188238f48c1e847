"""Whether what was exported computes what the modules do: asked once, when it is exported.

Views come from outside, too, and layers may do what no export expects; a model that decodes nonsense must not
go unnoticed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import compress, pairwise
from typing import Any

import torch
from torch import Tensor

from models.backends.onnx.view import OnnxView
from models.choices import EXACT_PRECISIONS, MIXED
from models.errors import UserError

TOLERANCE = {
    "fp32": 1e-3,
    "w8": 0.3,
    "w4": 1.0,
    "int8": 0.6,
    MIXED: 0.6,
}  # of the norm of all logits: rounding, not faults
SOURCE, TOKENS = 8, 6


@torch.inference_mode()
def check_export(view: OnnxView) -> None:
    """Compare logits of a few tokens with those of the modules, and with their own in other windows: heads
    that share keys/values are kept apart where that alone gives a token the same bits in all of them.

    Raises:
        UserError: they are others.
    """
    ours, theirs = logits_of(view), logits_of(view.eager)
    for our_logits, their_logits, precisions in zip(ours, theirs, precisions_of(view), strict=True):
        error = ((our_logits - their_logits).norm() / their_logits.norm()).item()
        if error <= max(TOLERANCE[precision] for precision in precisions):
            continue
        family = view.model.config.model_type
        raise UserError(
            f"backend onnx: what was exported of this {family} model differs from its modules "
            f"(by {error:.0%} in {' and '.join(precisions)}); use backend torch, or another precision."
        )
    if not view.engine.exact or have_same_bits(view):
        return
    if view.engine.groups is not None:
        view.keep_heads_apart()
        if have_same_bits(view):
            return
    raise UserError(
        f"backend onnx: on this processor a token has other bits alone than in a window, in "
        f"{view.engine.precision}; use another precision."
    )


def precisions_of(view: OnnxView) -> list[set[str]]:
    """Those that take part in each of `logits_of`."""
    engine = view.engine
    full = {engine.precision}
    return [full] if view.exit_adapter is None else [full | {engine.exit_precision}, full]


def have_same_bits(view: OnnxView) -> bool:
    """Whether tokens have the same bits alone and in windows: which kernels compute a product depends on the
    processor, and lossless decoding is exact on this alone. Tokens are embedded one by one, as they are
    decoded."""
    state, tokens = begin(view, 1)
    embedded: list[Tensor] = []

    def embed_each() -> Iterator[Tensor]:
        for token in tokens.split(1, dim=1):
            embedded.append(view.embed(state, token))
            yield embedded[-1]

    alone = logits_of_windows(view, state, embed_each())
    together = logits_of_windows(view, begin(view, 1)[0], [torch.cat(embedded, dim=1)])
    exact = [precisions <= {*EXACT_PRECISIONS} for precisions in precisions_of(view)]
    return all(map(torch.equal, compress(alone, exact), compress(together, exact)))


def logits_of(view: Any) -> list[Tensor]:
    """Logits of two sequences of fixed tokens, one with a padded source or prompt, at full depth and of the
    exit that has an adapter: (2, TOKENS, V) each."""
    state, tokens = begin(view, 2)
    windows = tokens.split([1, TOKENS - 1], dim=1)
    return logits_of_windows(view, state, (view.embed(state, window) for window in windows))


def begin(view: Any, rows: int) -> tuple[Any, Tensor]:
    """A state that has read a source or prompt of each row, and the tokens (B, TOKENS) to come."""
    generator = torch.Generator().manual_seed(0)
    words = view.model.get_input_embeddings().weight.shape[0]
    source = torch.randint(words, (2, SOURCE), generator=generator)
    mask = torch.ones(2, SOURCE, dtype=torch.long)
    mask[1, : SOURCE // 2] = 0
    read = view.read(source[:rows], mask[:rows])
    state = view.begin(None, **read.arguments)
    if read.prompt is not None:
        for part in read.prompt.split([SOURCE - 1, 1], dim=1):  # as decoding reads all but the last token
            logits_of_windows(view, state, [view.embed(state, part)])
    targets = view.model.get_output_embeddings().weight.shape[0]
    return state, torch.randint(targets, (2, TOKENS), generator=generator)[:rows]


def logits_of_windows(view: Any, state: Any, windows: Iterable[Tensor]) -> list[Tensor]:
    """Of the exit that has an adapter, if one has, and of full depth: (B, N, V) each, of embedded windows
    with N tokens in all. None runs deep layers before all have run the shallow ones, as tokens that wait do:
    an exit may read what deep layers make of others."""
    adapter, logits = view.exit_adapter, []
    cuts = [0, view.num_layers] if adapter is None else [0, adapter.layer, view.num_layers]
    for start, stop in pairwise(cuts):
        made, said = [], []
        for hidden in windows:
            made.append(view.run_layers(state, hidden, start, stop))
            said.append(view.predict(view.read_exit(state, made[-1], stop), stop))
        windows = made
        logits.append(torch.cat(said, dim=1))
    return logits
