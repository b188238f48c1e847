"""FREE's options, every pair of them, against a slow reference that has no cache (tests/slow_free.py).

FREE_PAIRS=2000 pytest tests/test_free_pairs.py -k pairs      compares that many more, at random
"""

from __future__ import annotations

import itertools
import os
import random
from functools import partial

import pytest
import torch
from decoding_cases import decode
from pairs import slow_but
from slow_free import SlowFree
from tiny_models import FAMILIES, greedy, padded_inputs, tiny_model
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.generation import SynthIDTextWatermarkLogitsProcessor

from models import (
    AdaptiveThreshold,
    DecayingThreshold,
    DecodeStats,
    ExitConfig,
    FixedThreshold,
    Free,
    MetaClassifier,
    ShortlistGap,
    SoftmaxGap,
    UserError,
    view_for,
)
from models.exit_heads import attach_exit_heads

MORE = int(os.environ.get("FREE_PAIRS", 0))
SOURCES = 3 if MORE else 2  # a threshold learns from one to the next
MAX_LENGTH, ENDS = 10, list(range(1, 8))
SHORTLIST = torch.arange(20, 60)


class CountingPenalty(LogitsProcessor):
    """Depends on how often it was called, and on nothing else."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores + torch.arange(scores.shape[-1]) % (2 + self.calls) * 0.3


def synthid():
    return SynthIDTextWatermarkLogitsProcessor(
        ngram_len=3, keys=[7, 11, 13], sampling_table_size=64, sampling_table_seed=0,
        context_history_size=8, device="cpu")  # fmt: skip


OPTIONS = {
    "family": FAMILIES,
    "shallow_layer": (1, 2, 4),
    "confidence": ("softmax", "shortlist", "meta"),
    "threshold": ("low", "middle", "decaying", "adaptive", "released"),
    "copy_skipped": (False, True),
    "rollback_threshold": (None, 0.5, 3.0),
    "causal_catch_up": (True, False),
    "lossless": (False, True),
    "max_pending": (None, 1, 3),
    "batch": (1, 3),
    "processors": ("none", "penalty", "counting", "synthid"),
}
PROCESSORS = {  # beside one that keeps random models from repeating themselves
    "none": list,
    "penalty": lambda: [RepetitionPenaltyLogitsProcessor(1.4)],
    "counting": lambda: [CountingPenalty()],
    "synthid": lambda: [synthid()],
}


def new_processors(name):
    return LogitsProcessorList([NoRepeatNGramLogitsProcessor(1), *PROCESSORS[name]()])


def contradicts(case):
    """What Free refuses, from its documentation."""
    copies, rolls_back = case["copy_skipped"], case["rollback_threshold"] is not None
    if case["lossless"] and (copies or rolls_back or not case["causal_catch_up"]):
        return True
    if copies and (rolls_back or case["max_pending"] is not None or not case["causal_catch_up"]):
        return True
    return rolls_back and case["batch"] > 1


def covering_cases(seed=0):
    """Cases in which every pair of settings that do not contradict each other occurs (greedily)."""
    rng, names = random.Random(seed), list(OPTIONS)
    pairs = {(first, a, second, b) for first, second in itertools.combinations(names, 2)
             for a in OPTIONS[first] for b in OPTIONS[second]}  # fmt: skip

    def covered(case):
        return {(f, case[f], s, case[s]) for f, s in itertools.combinations(names, 2)} & pairs

    stale = 0
    while pairs and stale < 300:
        drawn = [random_case(rng) for _ in range(40)]
        best = max(
            (case for case in drawn if not contradicts(case)), key=lambda c: len(covered(c)), default=None
        )
        news = covered(best) if best else set()
        stale = 0 if news else stale + 1
        if news:
            pairs -= news
            yield best


def random_case(rng):
    return {name: rng.choice(values) for name, values in OPTIONS.items()}


def random_cases(count, seed=1):
    rng = random.Random(seed)
    return [random_case(rng) for _ in range(count)]


def build_model(case, seed):
    """A model whose layers disagree less than random ones do, so that exits are sometimes right."""
    model = tiny_model(case["family"], seed=seed).double()
    with torch.no_grad():
        for layer in view_for(model).layers[case["shallow_layer"] :]:
            for name, weight in layer.named_parameters():
                if name.endswith(("o.weight", "out_proj.weight", "fc2.weight")):
                    weight.mul_(0.15)
    attach_exit_heads(model, ExitConfig(train_meta_cm_head=True))
    torch.nn.init.normal_(model.cm_head.state_dict()[next(iter(model.cm_head.state_dict()))], std=0.3)
    return model.double()


def build_threshold(kind, quantiles):
    low, middle = quantiles
    if kind == "decaying":
        return DecayingThreshold(middle, 4.0, MAX_LENGTH)
    if kind in ("adaptive", "released"):
        low, high = min(low, 0.9), min(middle * 2, 0.99)
        return AdaptiveThreshold(middle, low=low, high=high, as_released=kind == "released")
    return FixedThreshold(low if kind == "low" else middle)


def build_measures(model, kind):
    """The engine's measure, and the reference's: from the definition of each."""
    if kind == "meta":
        head = model.cm_head
        return MetaClassifier(head), lambda state, logits: float(head(state).float().softmax(-1)[0, 1])

    def gap(logits):
        first, second = logits.float().softmax(-1).topk(2, dim=-1).values[0].tolist()
        return first - second

    if kind == "shortlist":
        return ShortlistGap(view_for(model), SHORTLIST), lambda state, logits: gap(logits[:, SHORTLIST])
    return SoftmaxGap(), lambda state, logits: gap(logits)


def quantiles_of(model, case, measure, inputs):
    """Confidences that one in four and one in two tokens stay below; no token is within 1e-4 of them."""
    stats = DecodeStats()
    never = Free(case["shallow_layer"], measure, FixedThreshold(2.0))
    decode(model, inputs, never, stats, max_length=MAX_LENGTH, no_repeat_ngram_size=1)
    values = sorted({round(row, 4) for step in stats.confidences for row in step[0]})
    return values[len(values) // 4] + 1e-3, values[len(values) // 2] + 1e-3


def run_case(case, seed):
    """Decode a few inputs with the engine and with the reference, thresholds learning as they go."""
    model = build_model(case, seed)
    measure, slow_measure = build_measures(model, case["confidence"])
    sources = [padded_inputs(case["batch"], seed=seed + number) for number in range(SOURCES)]
    quantiles = quantiles_of(model, case, measure, sources[0])
    ours, theirs = (build_threshold(case["threshold"], quantiles) for _ in range(2))
    names = ("copy_skipped", "rollback_threshold", "causal_catch_up", "lossless", "max_pending")
    policy = Free(case["shallow_layer"], measure, ours, **{name: case[name] for name in names})
    processors = partial(new_processors, case["processors"])
    for inputs in sources:
        stats, options = DecodeStats(), {"max_length": MAX_LENGTH, "eos_token_id": ENDS}
        output = decode(model, inputs, policy, stats, logits_processor=processors(), **options)
        if case["lossless"]:
            assert torch.equal(output, greedy(model, inputs, logits_processor=processors(), **options))
            continue
        if case["batch"] > 1 and case["threshold"] in ("adaptive", "released"):
            continue  # rows learn together: what is theirs alone is not defined
        for row in range(case["batch"]):
            alone = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
            reference = SlowFree(
                model, alone, case["shallow_layer"], slow_measure, theirs, copy_skipped=case["copy_skipped"],
                rollback_threshold=case["rollback_threshold"], causal=case["causal_catch_up"],
                max_pending=case["max_pending"], new_processors=processors)  # fmt: skip
            expected = reference.decode(MAX_LENGTH, ENDS)
            length = len(expected.tokens)
            assert output[row, :length].tolist() == expected.tokens
            assert (output[row, length:] == 0).all()
            if case["batch"] == 1:
                assert stats.exit_layers == [expected.exit_layers]
                assert [right for _, right in stats.calibration] == [right for _, right in expected.pairs]
        if isinstance(ours, AdaptiveThreshold) and case["batch"] == 1:
            assert ours.value == theirs.value


def batches_apart(case):
    """In a batch, rows share parallel passes: a cap and windows that see both ways reach across rows."""
    return case["batch"] > 1 and (case["max_pending"] is not None or not case["causal_catch_up"])


CASES = list(covering_cases())


@pytest.mark.parametrize(
    "case", slow_but(CASES[:4], CASES), ids=lambda case: "-".join(map(str, case.values()))
)
def test_all_pairs_of_options_decode_as_the_slow_reference(case):
    if batches_apart(case) and not case["lossless"]:
        case = case | {"batch": 1}
    run_case(case, seed=3)


@pytest.mark.slow
def test_random_pairs_decode_as_the_slow_reference_or_are_refused():
    refused = 0
    for number, case in enumerate(random_cases(18 + MORE)):
        if batches_apart(case) and not case["lossless"]:
            case = case | {"batch": 1}
        if not contradicts(case):
            if MORE or number % 3 == 0:
                run_case(case, seed=number)
            continue
        refused += 1
        with pytest.raises(UserError) as raised:
            run_case(case, seed=number)
        assert "\n" not in str(raised.value)
    assert refused > 0
