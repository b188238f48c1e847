"""What tests of backend compile share: a compiler that captures graphs, and backend torch's runs."""

from __future__ import annotations

import logging

import torch
from tiny_causal import prompts
from tiny_models import padded_inputs

from models import (
    Calm,
    DecodeStats,
    FixedThreshold,
    Free,
    FullDepth,
    SoftmaxGap,
    StaticExit,
    early_exit_decode,
)
from models.backends.compiled.causal import CompiledCausalView
from models.backends.compiled.encoder_decoder import CompiledEncoderDecoderView
from models.families import view_for

logging.getLogger("torch.__trace").propagate = False  # thousands of lines, which pytest would keep

ROUNDING = 1e-4


def compiled(model, compiler="eager"):
    """The view of a model's compiled layers."""
    kind = CompiledEncoderDecoderView if model.config.is_encoder_decoder else CompiledCausalView
    return kind(view_for(model), compiler)


class Compiler:
    """Counts the graphs it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, examples):
        self.graphs += 1
        return graph.forward


def decode(model, policy, inputs, view=None, **options):
    """Output of `generate` and what it did."""
    stats = DecodeStats()
    options = {"do_sample": False, "max_new_tokens": 24, "custom_generate": early_exit_decode} | options
    given = inputs | {"exit_policy": policy, "decode_stats": stats, "decoder_view": view}
    return model.generate(**given, **options), stats


def policies(threshold):
    return {
        "full depth": FullDepth(),
        "static": StaticExit(1),
        "calm": Calm(SoftmaxGap(), FixedThreshold(threshold)),
        "free": Free(1, SoftmaxGap(), FixedThreshold(threshold)),
        "lossless": Free(1, SoftmaxGap(), FixedThreshold(threshold), lossless=True),
    }


def torchs_runs(model, inputs):
    """Every method by backend torch, some tokens exiting: its threshold is no confidence but for rounding."""
    _, stats = decode(model, Free(1, SoftmaxGap(), 1.0), inputs)
    confidences = torch.tensor(stats.confidences).flatten().sort().values
    for gap in confidences.diff().argsort(descending=True):
        threshold = confidences[gap : gap + 2].mean().item()
        runs = {
            name: (policy, *decode(model, policy, inputs)) for name, policy in policies(threshold).items()
        }
        tests = [test for *_, stats in runs.values() for step in stats.confidences for test in step]
        distance = (torch.tensor(tests) - threshold).abs().min()
        if distance > ROUNDING and 0.1 < runs["free"][2].exit_share < 0.9:
            return runs
    raise AssertionError("No threshold is far from all confidences.")


def assert_every_policy_agrees(model, view, inputs):
    for name, (policy, expected, torchs) in torchs_runs(model, inputs).items():
        tokens, stats = decode(model, policy, inputs, view)
        assert torch.equal(tokens, expected), name
        assert stats.exit_layers == torchs.exit_layers, name


class SideBySide:
    """The same calls of a family's view and of the compiled one."""

    def __init__(self, model, rows=2, compiler="eager"):
        inputs = padded_inputs(rows) if model.config.is_encoder_decoder else prompts(rows)
        self.views = view_for(model), compiled(model, compiler)
        with torch.inference_mode():
            # What padding itself makes is nobody's affair: tokens of padded prompts are compared elsewhere.
            inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
            read = self.views[0].read(**inputs)
            self.states = [view.begin(None, **read.arguments) for view in self.views]

    @torch.inference_mode()
    def run(self, hidden, start, stop):
        outputs = [
            view.run_layers(state, hidden, start, stop)
            for view, state in zip(self.views, self.states, strict=True)
        ]
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
        assert self.states[0].lengths == self.states[1].lengths
        return outputs[0]

    @torch.inference_mode()
    def write(self, hidden, start, stop):
        for view, state in zip(self.views, self.states, strict=True):
            view.write_kv(state, hidden, start, stop)

    def truncate(self, length):
        for state in self.states:
            state.truncate(length)
