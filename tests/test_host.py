"""Decisions of the host against torch's own operators."""

from __future__ import annotations

import math

import pytest
import torch

from models.confidence import softmax_gap
from models.host import argmax


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5,), (1, 40_000), (3, 4, 300), (0, 7)])
def test_argmax_is_torchs(shape, dtype):
    torch.manual_seed(0)
    scores = torch.randn(shape).to(dtype)
    assert torch.equal(argmax(scores), scores.argmax(-1))
    assert torch.equal(argmax(scores.requires_grad_()), scores.argmax(-1))


def test_argmax_takes_the_first_of_equals():
    assert argmax(torch.tensor([[0.0, 2.0, 2.0], [-1.0, -1.0, -2.0]])).tolist() == [1, 0]


def test_gap_is_of_the_two_largest_probabilities():
    shares = torch.tensor([[0.1, 0.7, 0.2], [0.4, 0.2, 0.4], [1.0, 0.0, 0.0]])
    assert torch.allclose(softmax_gap(shares.log()), torch.tensor([0.5, 0.0, 1.0]), atol=1e-6)
    assert softmax_gap(shares[0].log()).shape == ()
    logits = torch.randn(2, 3, 500) * 3
    top = logits.double().softmax(-1).topk(2).values
    assert torch.allclose(softmax_gap(logits).double(), top[..., 0] - top[..., 1], rtol=1e-5, atol=0)


def test_gap_is_exact_whatever_new_tensors_are():
    logits = torch.tensor([[0.3, 0.2, -1.0]])
    torch.set_default_dtype(torch.bfloat16)
    try:
        gap = softmax_gap(logits)
    finally:
        torch.set_default_dtype(torch.float32)
    assert gap.dtype == torch.float32
    assert gap.item() == pytest.approx((math.exp(0.3) - math.exp(0.2)) / sum(map(math.exp, [0.3, 0.2, -1.0])))
