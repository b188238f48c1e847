"""Additive attention masks: 0 where a key is seen, the smallest number of the type where it is not.

`padding_mask` and `source_mask` are made once a generation, `step_mask` for each step from the lengths held.
"""

from __future__ import annotations

import torch
from torch import Tensor


def padding_mask(like: Tensor, attention_mask: Tensor) -> Tensor:
    """Additive mask of a (B, N) mask that is 0 at padding: (B, 1, 1, N), typed as `like`."""
    mask = like.new_zeros(attention_mask.shape)
    return mask.masked_fill(attention_mask == 0, torch.finfo(mask.dtype).min)[:, None, None, :]


def source_mask(encoder_hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Additive mask of padded source tokens: (B or 1, 1, 1, S).

    Always a tensor, lest every layer allocate zeros at every step.
    """
    if attention_mask is None:
        return encoder_hidden.new_zeros(1, 1, 1, encoder_hidden.shape[1])
    return padding_mask(encoder_hidden, attention_mask)


def step_mask(like: Tensor, new: int, past: int, causal: bool, padding: Tensor | None) -> Tensor | None:
    """Additive mask of `new` = Q tokens after `past` cached ones: (B or 1, 1, Q, past + Q).

    A single query sees all keys that are not padding: None if there is none. For more, the mask must be
    explicit: without one, attention kernels would assume that the first query stands at position 0.
    `padding` (B, 1, 1, P) masks prompts that are padded on the left; later tokens are never padding.
    """
    if new == 1 and padding is None:
        return None
    mask = like.new_zeros(1, 1, new, past + new)
    if causal and new > 1:
        blocked = torch.ones(new, past + new, dtype=torch.bool, device=like.device).triu(past + 1)
        mask = mask.masked_fill(blocked, torch.finfo(mask.dtype).min)
    if padding is None:
        return mask
    prompt = min(padding.shape[-1], past + new)
    mask = mask.repeat(len(padding), 1, 1, 1)
    mask[..., :prompt] = torch.minimum(mask[..., :prompt], padding[..., :prompt])
    return mask
