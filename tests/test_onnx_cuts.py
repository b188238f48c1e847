"""Heavy layers in ONNX Runtime: held once, however many exits cut them, and decoding what torch does."""

from __future__ import annotations

import itertools

import pytest
import torch
from adapted_models import SHALLOW, adapted, make_inputs
from onnx_models import decode, loaded, perturbed, policies
from tiny_causal import greedy_causal, prompts, tiny_causal
from tiny_models import padded_inputs

from models import DecodeStats, Free, FullDepth, SoftmaxGap, StaticExit, prepare
from models.backends.onnx import cuts
from models.backends.onnx.cuts import Cuts


@pytest.fixture(autouse=True)
def heavy(monkeypatch):
    monkeypatch.setattr(cuts, "HEAVY", 0)


def layers_held(fast):
    """How often each layer is in a session that decodes."""
    engine = fast.view.engine
    ranges = [range(*key[1:]) for key in engine.sessions if key[0] == engine.layer_kind]
    return sorted(itertools.chain.from_iterable(ranges))


def test_stretches_by_hand():
    shared = Cuts(heavy=True)
    assert shared.stretches(0, 6) == [(0, 6)]
    assert shared.stretches(2, 6) == [(2, 6)] and shared.stretches(0, 6) == [(0, 2), (2, 6)]
    assert shared.stretches(0, 4) == [(0, 2), (2, 4)] and shared.stretches(4, 6) == [(4, 6)]
    assert not shared.keeps(0, 6) and shared.keeps(2, 4)
    own = Cuts(heavy=False)
    assert own.stretches(2, 6) == [(2, 6)] and own.stretches(0, 6) == [(0, 6)] and own.keeps(0, 6)


def test_layers_are_heavy_by_their_bytes(monkeypatch):
    view = loaded(tiny_causal()).view
    size = sum(weight.numel() for layer in view.layers for weight in layer.parameters())
    monkeypatch.setattr(cuts, "HEAVY", 4 * size)
    assert Cuts.of(view, "fp32").heavy and not Cuts.of(view, "w8").heavy


def test_threads_that_cut_at_one_place_cut_once():
    shared, place = Cuts(heavy=True), Interrupted(3)
    shared.stretches(0, 6)
    place.meanwhile = lambda: shared.stretches(3, 6)
    assert shared.stretches(place, 6) == [(3, 6)]
    assert shared.stretches(0, 6) == [(0, 3), (3, 6)]


class Interrupted(int):
    """A place, which another thread cuts at while this one compares it."""

    meanwhile = None

    def __lt__(self, other):
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        return int(self) < int(other)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5-tied", "bart-tied"])
def test_every_policy_decodes_torchs_tokens_and_no_layer_is_held_twice(family):
    torch_model = loaded(perturbed(family))
    fast = prepare(torch_model)
    for name, policy in policies().items():
        inputs, ours, theirs = padded_inputs(3), DecodeStats(), DecodeStats()
        expected = decode(torch_model, inputs, policies()[name], theirs)
        assert torch.equal(decode(fast, inputs, policy, ours), expected), name
        assert ours.exit_layers == theirs.exit_layers, name
        assert layers_held(fast) == [*range(max(layers_held(fast)) + 1)], name
    held = [key for _, buffers in fast.view.shelf.free for key in buffers.segments]
    assert held and all(fast.view.engine.cuts.keeps(start, stop) for start, stop, _ in held)


@pytest.mark.parametrize("precision", ["fp32", "w8", "w8+int8"])
def test_lossless_is_full_depth_after_any_cut(precision):
    fast, inputs = prepare(loaded(tiny_causal()), precision=precision), prompts(2)
    options = {"do_sample": False, "max_new_tokens": 12}
    expected = fast.generate(**inputs, **options, exit_policy=FullDepth())
    for layer in (4, 1, 3):
        policy = Free(layer, SoftmaxGap(), 0.2, lossless=True)
        assert torch.equal(fast.generate(**inputs, **options, exit_policy=policy), expected)
        assert torch.equal(fast.generate(**inputs, **options, exit_policy=FullDepth()), expected)
    if precision == "fp32":
        assert torch.equal(expected, greedy_causal(tiny_causal(), inputs))
    assert layers_held(fast) == [*range(6)]


@pytest.mark.slow
@pytest.mark.parametrize("kv_layer", [None, 4])
@pytest.mark.parametrize("family", ["llama-tied", "t5-tied"])
def test_an_exit_adapter_runs_where_it_is_asked_for_alone(family, kv_layer):
    torch_model = adapted(family, kv_layer=kv_layer)
    fast, inputs = prepare(torch_model), make_inputs(family)
    for policy in (Free(SHALLOW, SoftmaxGap(), 0.2), FullDepth(), StaticExit(SHALLOW)):
        options = {"max_new_tokens": 8, "do_sample": False, "exit_policy": policy}
        assert torch.equal(fast.generate(**inputs, **options), torch_model.generate(**inputs, **options))
    depth = fast.view.num_layers
    assert layers_held(fast) == [*range(depth + 1)], "the adapter has a graph of its own"
