"""Long prompts on ONNX Runtime: read in parts, padded on the left, with an exit adapter or without."""

from __future__ import annotations

import pytest
import torch
from adapted_models import SHALLOW, adapted
from tiny_causal import greedy_causal, prompts, tiny_causal

from models import FixedThreshold, Free, FullDepth, SoftmaxGap, StaticExit, early_exit_decode, prepare
from models.exit_heads import ExitConfig
from models.loading import LoadedModel

LENGTHS = (64, 65, 66, 70, 129, 150)  # windows have 64 rows, buffers room for powers of two


def decode(loaded, inputs, policy):
    engine = {"custom_generate": early_exit_decode, "decoder_view": loaded.view, "exit_policy": policy}
    return greedy_causal(loaded.model, inputs, **engine)


@pytest.mark.slow
@pytest.mark.parametrize("length", LENGTHS)
def test_prompts_longer_than_a_window(length):
    modules = LoadedModel(tiny_causal(), None, ExitConfig())
    graphs = prepare(modules)
    for batch in (1, 3):
        inputs = prompts(batch, length)
        expected = greedy_causal(modules.model, inputs)
        for policy in (FullDepth(), Free(1, SoftmaxGap(), FixedThreshold(0.05), lossless=True)):
            assert torch.equal(decode(graphs, inputs, policy), expected)
        static = decode(modules, inputs, StaticExit(2))
        assert torch.equal(decode(graphs, inputs, StaticExit(2)), static)


def test_an_exit_adapter_reads_all_parts_of_a_prompt():
    modules = adapted("llama-tied")
    graphs = prepare(modules)
    for batch in (1, 3):
        inputs = prompts(batch, 150)
        for policy in (StaticExit(SHALLOW), Free(SHALLOW, SoftmaxGap(), FixedThreshold(0.05))):
            assert torch.equal(decode(graphs, inputs, policy), decode(modules, inputs, policy))
