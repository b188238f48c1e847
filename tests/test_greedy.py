"""One sequence in numbers, against the loop for every call, which a processor asks for: tokens and counts."""

from __future__ import annotations

import math

import pytest
import torch
from adapted_models import SHALLOW, SHORTLIST, adapted, make_inputs, make_model
from decoding_cases import EveryThirdDeep
from onnx_models import loaded
from pairs import covering
from tiny_causal import CAUSAL_FAMILIES
from tiny_models import FAMILIES
from transformers import LogitsProcessor
from transformers.generation import BaseStreamer

from models import (
    AdaptiveThreshold,
    Calm,
    DecayingThreshold,
    DecodeStats,
    ExitConfig,
    FixedThreshold,
    Free,
    FullDepth,
    PromptLookup,
    SoftmaxGap,
    StaticExit,
    UserError,
    prepare,
    trace_layers,
)
from models.backends.onnx import cuts
from models.backends.onnx.state import BoundStep
from models.confidence import Measured
from models.exit_heads import attach_exit_heads
from models.greedy import GreedyDecoding

GAP = SoftmaxGap()
POLICIES = {
    "full": FullDepth,
    "static": lambda: StaticExit(SHALLOW),
    "free": lambda: Free(SHALLOW, GAP, EveryThirdDeep()),
    "free, few wait": lambda: Free(SHALLOW, GAP, -1, max_pending=3),
    "free, learning": lambda: Free(SHALLOW, GAP, AdaptiveThreshold(0.02, low=0.01)),
    "free, learning as released": lambda: Free(SHALLOW, GAP, AdaptiveThreshold(0.02, as_released=True)),
    "free, learnt": lambda: Free(SHALLOW, GAP, AdaptiveThreshold(0.02, max_sequences=0)),
    "calm": lambda: Calm(GAP, DecayingThreshold(0.02, 4, 40)),
    "free, a coin": lambda: Free(SHALLOW, Coin(), DecayingThreshold(0.02, 4, 40)),
    "free, a coin, learning": lambda: Free(SHALLOW, Coin(), AdaptiveThreshold(0.02, low=0.01)),
    "free, at a loss": lambda: Free(SHALLOW, AtALoss(), -1),
    "free, at a loss, learning": lambda: Free(SHALLOW, AtALoss(), AdaptiveThreshold(0.3, low=0.01)),
    "lossless, at a loss": lambda: Free(SHALLOW, AtALoss(), AdaptiveThreshold(0.3), lossless=True),
    "calm, at a loss": lambda: Calm(AtALoss(), -1),
    "calm, a coin": lambda: Calm(Coin(), EveryThirdDeep()),
    "lossless, a coin": lambda: Free(SHALLOW, Coin(), EveryThirdDeep(), lossless=True),
    "calm at layers": lambda: Calm(GAP, EveryThirdDeep(), exit_layers=[SHALLOW, 5]),
    "lossless, learning": lambda: Free(SHALLOW, GAP, AdaptiveThreshold(0.02, low=0.01), lossless=True),
    "lossless": lambda: Free(SHALLOW, GAP, DecayingThreshold(0.02, 4, 40), lossless=True),
    "lossless, all exit": lambda: Free(SHALLOW, GAP, -1, lossless=True),
    "lossless, few wait": lambda: Free(SHALLOW, GAP, -1, lossless=True, max_pending=2),
}
BACKENDS = ("torch", "onnx")


class Coin:
    """A measure that reads no logits, but knows them every other time."""

    def __init__(self):
        self.thrown = 0

    def __call__(self, view, hidden, layer):
        self.thrown += 1
        known = view.predict(hidden, layer) if self.thrown % 2 else None
        return Measured(torch.full((len(hidden),), self.thrown * 0.37 % 1), known)


class AtALoss:
    """A measure that returns a pair of its own, of which some are no confidences."""

    def __init__(self):
        self.asked = 0

    def __call__(self, view, hidden, layer):
        self.asked += 1
        values = [math.nan, 0.9, -math.inf, 0.4, math.inf]
        return torch.full((len(hidden),), values[self.asked % len(values)]), None


class Deeper(FullDepth):
    pass


class Nothing(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


class Recorder(BaseStreamer):
    """What it is told, drafts included, and how many tokens are counted by then."""

    def __init__(self, stats):
        self.stats = stats
        self.told = []

    def put(self, value):
        self.told.append(("put", value.tolist(), self.stats.tokens))

    def put_draft(self, value):
        self.told.append(("draft", value.tolist(), self.stats.tokens))

    def take_back(self, count):
        self.told.append(("take back", count, self.stats.tokens))

    def end(self):
        self.told.append(("end", self.stats.tokens))


@pytest.fixture
def ways(monkeypatch):
    """The states of what was decoded in numbers."""
    taken = []
    run = GreedyDecoding.run
    monkeypatch.setattr(GreedyDecoding, "run", lambda self: taken.append(self.state) or run(self))
    return taken


@pytest.fixture
def steps(monkeypatch):
    """Layers that ran with the head where buffers lie."""
    taken = []
    run = BoundStep.run
    monkeypatch.setattr(
        BoundStep, "run", lambda self, *given: taken.append(self.segment.layers) or run(self, *given)
    )
    return taken


def compare(subject, shape, make, ways, seeds=4, length=14):
    """Decode some sequences both ways, every other of them up to a token that full depth ends with."""
    policy, other = make(), make()  # a threshold learns from one sequence to the next
    for seed in range(seeds):
        inputs = make_inputs(shape, seed=seed)
        options = {"max_new_tokens": length, "do_sample": False, "eos_token_id": None}
        options["return_dict_in_generate"] = True
        if seed % 2:
            options["eos_token_id"] = int(subject.generate(**inputs, **options).sequences[0, -1])
            ways.clear()
        stats, theirs = DecodeStats(), DecodeStats()
        streams = [Recorder(stats), Recorder(theirs)] if seed < 2 else [None, None]
        ours = subject.generate(
            **inputs, exit_policy=policy, decode_stats=stats, streamer=streams[0], **options
        )
        assert ways.pop()
        options |= {"logits_processor": [Nothing()], "streamer": streams[1]}
        expected = subject.generate(**inputs, exit_policy=other, decode_stats=theirs, **options)
        assert seed > 1 or streams[0].told == streams[1].told
        assert not ways and torch.equal(ours.sequences, expected.sequences)
        for one, another in zip(layers_of(ours.cache), layers_of(expected.cache), strict=True):
            assert torch.equal(one.keys, another.keys) and torch.equal(one.values, another.values)
        confidences, others = vars(stats).pop("confidences"), vars(theirs).pop("confidences")
        assert repr(confidences) == repr(others)  # NaN equals nothing
        assert vars(stats) == vars(theirs)
    learnt = [getattr(one, "threshold", None) for one in (policy, other)]
    assert getattr(learnt[0], "value", None) == getattr(learnt[1], "value", None)


def layers_of(cache):
    return getattr(cache, "self_attention_cache", cache).layers


def prepared(subject, backend):
    return prepare(subject, backend="onnx", threads=1) if backend == "onnx" else subject


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "policy"), covering((*FAMILIES, *CAUSAL_FAMILIES), [*POLICIES]), ids=lambda value: str(value)
)
def test_each_family_decodes_alike_both_ways(ways, shape, policy):
    compare(loaded(make_model(shape)), shape, POLICIES[policy], ways)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", ["t5-tied", "bart-tied", "llama-tied"])
def test_each_policy_decodes_alike_both_ways(ways, shape, backend):
    subject = prepared(loaded(make_model(shape)), backend)
    for name, make in POLICIES.items():
        compare(subject, shape, make, ways, seeds=4 if "learn" in name else 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kept", "backend"),
    [(kept, way) for kept in ("shortlist", "keys/values", "heads") for way in BACKENDS]
    + [("heavy layers", "onnx")],
)
def test_whatever_an_exit_has_of_its_own(ways, steps, monkeypatch, kept, backend):
    shape = "gpt2-tied" if kept == "keys/values" else "llama-tied"
    subject = loaded(make_model(shape))
    if kept == "heads":
        attach_exit_heads(subject.model, ExitConfig(shallow_exit_layer=SHALLOW, per_exit_head="norm"))
        torch.nn.init.normal_(subject.model.per_exit_heads[str(SHALLOW)].weight)
    elif kept == "heavy layers":
        monkeypatch.setattr(cuts, "HEAVY", 0)
    else:
        listed, layer = (SHORTLIST, None) if kept == "shortlist" else (None, 4)
        subject = adapted(shape, shortlist=listed, kv_layer=layer)
    subject = prepared(subject, backend)
    for policy in ("full", "static", "free", "lossless, all exit"):
        compare(subject, shape, POLICIES[policy], ways, seeds=2)
    to_exit = {tuple(layers) for layers in steps if SHALLOW - 1 in layers and 5 not in layers}
    assert bool(to_exit) == (backend == "onnx" and kept not in ("heads", "heavy layers"))


def test_a_head_that_is_attached_later_is_asked(ways):
    subject = prepared(loaded(make_model("llama-tied")), "onnx")
    compare(subject, "llama-tied", POLICIES["static"], ways, seeds=1)
    attach_exit_heads(subject.model, ExitConfig(shallow_exit_layer=SHALLOW, per_exit_head="norm"))
    torch.nn.init.normal_(subject.model.per_exit_heads[str(SHALLOW)].weight)
    compare(subject, "llama-tied", POLICIES["static"], ways, seeds=1)


@pytest.mark.slow
def test_buffers_grow_under_way(ways):
    """They begin with room for 64 tokens."""
    subject = prepared(loaded(make_model("t5-tied")), "onnx")
    for policy in ("full", "calm", "free", "lossless, few wait"):
        compare(subject, "t5-tied", POLICIES[policy], ways, seeds=1, length=150)


def test_whoever_else_has_a_say_gets_the_other_loop(ways):
    subject, inputs = loaded(make_model("t5-tied")), make_inputs("t5-tied")
    options = [{"do_sample": True}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 3}, {"max_time": 100.0}]
    options += [{"return_dict_in_generate": True, "output_scores": True}]
    for given in options:
        subject.generate(**inputs, exit_policy=FullDepth(), max_new_tokens=3, **given)
        assert not ways, given
    subject.generate(**make_inputs("t5-tied", batch=2), exit_policy=FullDepth(), max_new_tokens=3)
    free = {"copy_skipped": True}, {"rollback_threshold": 3.0}, {"causal_catch_up": False}
    policies = [Free(SHALLOW, GAP, FixedThreshold(0.1), **one) for one in free]
    for policy in (
        *policies,
        Deeper(),
        FullDepth(PromptLookup(3)),
    ):
        subject.generate(**inputs, exit_policy=policy, max_new_tokens=3)
        assert not ways, policy


def test_ids_of_fewer_bits_become_ids_of_64(ways):
    subject, inputs = loaded(make_model("llama-tied")), make_inputs("llama-tied")
    inputs["input_ids"] = inputs["input_ids"].int()
    assert subject.generate(**inputs, max_new_tokens=3).dtype == torch.long
    assert ways


MEASURED = {
    "columns": (lambda rows: Measured(torch.rand(rows, 1), None), "and shape (1, 1), None)"),
    "one number": (lambda rows: Measured(torch.tensor(0.5), None), "and shape (), None)"),
    "numbers": (lambda rows: ([0.5] * rows, None), "(a float), None)"),
    "alone": (lambda rows: torch.rand(rows), "got a tensor of float32 and shape (1,)."),
    "logits of one row": (lambda rows: (torch.rand(rows), torch.rand(97)), "and shape (97,))"),
    "nothing": (lambda rows: None, "got None."),
}


@pytest.mark.parametrize("name", MEASURED)
def test_what_no_measure_returns_is_refused_everywhere(ways, name):
    make, said = MEASURED[name]

    class Odd:
        def __call__(self, view, hidden, layer):
            return make(len(hidden))

    subject, inputs = loaded(make_model("t5-tied")), make_inputs("t5-tied")
    for policy in (Free(SHALLOW, Odd(), 0.4), Calm(Odd(), 0.4)):
        for options in ({}, {"logits_processor": [Nothing()]}):
            ways.clear()
            with pytest.raises(UserError, match="confidence: Odd must return") as raised:
                subject.generate(**inputs, exit_policy=policy, max_new_tokens=3, **options)
            assert said in str(raised.value) and bool(ways) == (not options)
    with pytest.raises(UserError, match="confidence: Odd must return"):
        trace_layers(subject.model, **inputs, sequences=torch.zeros(1, 3, dtype=torch.long), confidence=Odd())


def test_no_token_exits_whose_confidence_is_no_number(ways):
    """Nor teaches it a threshold, which lets all others exit."""
    subject, inputs = loaded(make_model("t5-tied")), make_inputs("t5-tied")

    def lost(view, hidden, layer):
        return Measured(torch.full((len(hidden),), math.nan), None)

    threshold = AdaptiveThreshold(-1)
    for policy in (Free(SHALLOW, lost, threshold), Calm(lost, -1)):
        for options in ({}, {"logits_processor": [Nothing()]}):
            stats = DecodeStats()
            subject.generate(**inputs, exit_policy=policy, decode_stats=stats, max_new_tokens=5, **options)
            assert set(stats.exit_layers[0]) == {6} and not stats.calibration
    assert not threshold.pairs and threshold.value == -1
