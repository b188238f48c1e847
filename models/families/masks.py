"""Additive attention masks: 0 where a key is seen, the smallest number where it is not.

`prompt_padding` and `source_mask` are made once a generation, `step_mask` for each step from the lengths
held.
"""

from __future__ import annotations

import torch
from torch import Tensor


def smallest(dtype: torch.dtype) -> float:
    """What hides a key: finite in float32 too, as eager attention computes softmax in it."""
    return max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)


def padding_mask(like: Tensor, attention_mask: Tensor) -> Tensor:
    """Additive mask of a (B, N) mask that is 0 at padding: (B, 1, 1, N), typed as `like`."""
    mask = like.new_zeros(attention_mask.shape)
    return mask.masked_fill(attention_mask == 0, smallest(mask.dtype))[:, None, None, :]


def prompt_padding(like: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """Additive mask of a prompt's (B, P): (B, 1, 1, P); None where nothing is padded."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return padding_mask(like, attention_mask)


def source_mask(encoder_hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Additive mask of padded source tokens: (B or 1, 1, 1, S).

    Always a tensor, lest every layer allocate zeros at every step.
    """
    if attention_mask is None:
        return encoder_hidden.new_zeros(1, 1, 1, encoder_hidden.shape[1])
    return padding_mask(encoder_hidden, attention_mask)


def step_mask(
    like: Tensor, new: int, past: int, causal: bool, padding: Tensor | None, window: int | None = None
) -> Tensor | None:
    """Additive mask of `new` = Q tokens after `past` cached ones: (B or 1, 1, Q, past + Q).

    A single query sees all keys that are not padding, or the newest `window` of them, its own included: None
    if these are all. For more, the mask must be explicit: without one, attention kernels would assume that
    the first query stands at position 0.
    `padding` (B, 1, 1, P) masks prompts that are padded on the left; later tokens are never padding.
    """
    passes_window = window is not None and past + new > window
    if new == 1 and padding is None and not passes_window:
        return None
    mask = like.new_zeros(1, 1, new, past + new)
    if causal and new > 1:
        blocked = torch.ones(new, past + new, dtype=torch.bool, device=like.device).triu(past + 1)
        mask = mask.masked_fill(blocked, smallest(mask.dtype))
    if passes_window:
        assert window is not None
        blocked = torch.ones(new, past + new, dtype=torch.bool, device=like.device).tril(past - window)
        mask = mask.masked_fill(blocked, smallest(mask.dtype))
    if padding is None:
        return mask
    prompt = min(padding.shape[-1], past + new)
    mask = mask.repeat(len(padding), 1, 1, 1)
    mask[..., :prompt] = torch.minimum(mask[..., :prompt], padding[..., :prompt])
    return mask
