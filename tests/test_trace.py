"""Reading every layer's prediction in one pass equals what decoding measures token by token."""

from __future__ import annotations

import pytest
import torch
from tiny_models import SHAPES, padded_inputs, tiny_model

from models.confidence import SoftmaxGap
from models.decode_stats import DecodeStats
from models.decoding import early_exit_decode
from models.free import Free
from models.threshold import FixedThreshold
from models.trace import trace_layers

LENGTH = 12


@pytest.mark.parametrize("shape", SHAPES)
def test_trace_holds_the_shallow_confidences_of_free_and_the_deep_predictions(shape):
    model, inputs, stats = tiny_model(shape).double(), padded_inputs(), DecodeStats()
    policy = Free(2, SoftmaxGap(), FixedThreshold(0.1))
    engine = {"custom_generate": early_exit_decode, "exit_policy": policy, "decode_stats": stats}
    sequences = model.generate(**inputs, **engine, max_length=LENGTH, min_length=LENGTH, do_sample=False)
    trace = trace_layers(model, **inputs, sequences=sequences)
    measured = torch.tensor([step[-1][0] for step in stats.confidences], dtype=trace.confidences.dtype)
    torch.testing.assert_close(trace.confidences[0, :, 1], measured, rtol=1e-4, atol=1e-6)
    deep = model(**inputs, decoder_input_ids=sequences[:, :-1]).logits.argmax(-1)
    assert torch.equal(trace.tokens[..., -1], deep)
    assert trace.agrees[..., -1].all() and not trace.agrees.all()


def test_trace_of_a_batch_equals_that_of_its_rows():
    model, inputs = tiny_model().double(), padded_inputs(batch=3)
    sequences = torch.randint(2, 90, (3, 7))
    trace = trace_layers(model, **inputs, sequences=sequences)
    for row in range(3):
        alone = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        single = trace_layers(model, **alone, sequences=sequences[row : row + 1])
        torch.testing.assert_close(trace.confidences[row], single.confidences[0])
        assert torch.equal(trace.tokens[row], single.tokens[0])
