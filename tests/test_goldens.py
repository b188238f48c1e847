"""Parity with the original implementation: decoding, losses, adaptive threshold. See golden/README.md."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pairs import slow_but
from transformers import T5ForConditionalGeneration

from models.confidence import SoftmaxGap
from models.decode_stats import DecodeStats
from models.decoding import early_exit_decode
from models.exit_policy import Calm, FullDepth, StaticExit
from models.families import view_for
from models.free import Free
from models.loading import load_model
from models.losses import (
    INTERMEDIATE_LOSSES,
    align_closest,
    build_exit_loss,
    normalized_state,
    uniform_teachers,
)
from models.threshold import AdaptiveThreshold, BetaMixture, DecayingThreshold, FixedThreshold

GOLDEN = Path(__file__).parent / "golden"
RUNS = json.loads((GOLDEN / "t5_tiny_tied" / "runs.json").read_text())
DAILY = ("full", "static_3", "calm_lo", "free_adapt_lo", "free_lo_copy", "free_mid_rollback2.0")
LOSSES = json.loads((GOLDEN / "tiny24" / "losses.json").read_text())
MIXTURES = json.loads((GOLDEN / "beta_mixture.json").read_text())
TIES = {"free_lo", "free_lo_copy"}  # a confidence lies within 6e-6 of the threshold


def load_golden(name):
    return T5ForConditionalGeneration.from_pretrained(GOLDEN / name).eval()


@pytest.fixture(scope="module")
def decoder():
    return load_golden("t5_tiny_tied")


@pytest.fixture(scope="module")
def deep_model():
    return load_golden("tiny24")


def policy_of(flags, max_answer_length):
    if "static_exit_layer" in flags:
        return StaticExit(flags["static_exit_layer"])
    if flags.get("use_early_exit"):
        value, temperature = flags["exit_conf_threshold"], flags.get("exit_position_temp")
        threshold = FixedThreshold(value)
        if temperature is not None:
            threshold = DecayingThreshold(value, temperature, max_answer_length)
        return Calm(SoftmaxGap(), threshold, flags.get("exit_min_layer", 1))
    if flags.get("use_shallow_deep"):
        value = flags["shallow2deep_conf_threshold"]
        adaptive = flags.get("use_adapt_threshold", False)
        return Free(
            flags["shallow_exit_layer"],
            SoftmaxGap(),
            AdaptiveThreshold(value, as_released=True) if adaptive else FixedThreshold(value),
            flags.get("copy_skipped_hidden_states", False),
            flags.get("rollback_conf_threshold"),
            flags.get("parallel_causal_mask", True),
        )
    return FullDepth()


@pytest.fixture(scope="module")
def decoded(decoder):
    """A function of a run's name, decoded once: sequences, what each did, thresholds after each, policy."""
    return functools.cache(lambda name: decode_run(decoder, RUNS["runs"][name]))


def decode_run(decoder, run):
    policy = policy_of(run["additional_args"], run["max_answer_length"])
    sequences, did, thresholds = [], [], []
    for input_ids in RUNS["input_ids"]:
        did.append(DecodeStats())
        sequence = decoder.generate(
            input_ids=torch.tensor([input_ids]),
            max_length=run["max_length"],
            custom_generate=early_exit_decode,
            exit_policy=policy,
            decode_stats=did[-1],
        )
        sequences.append(sequence[0].tolist())
        thresholds.append(policy.threshold.value if hasattr(policy, "threshold") else None)
    return sequences, did, thresholds, policy


@pytest.mark.parametrize("name", slow_but(DAILY, RUNS["runs"]))
def test_decoding(decoded, name):
    run, (sequences, did, _, _) = RUNS["runs"][name], decoded(name)
    assert sequences == run["output_ids"]
    for index, stats in enumerate(did):
        if stats.rollbacks == 0 and name not in TIES and not name.startswith("free_adapt_mid_copy"):
            assert stats.exit_layers[0] == run["layers"][index]
            theirs = [value for step in run["confidences"][index] for value in step]
            ours = [test[0] for step in stats.confidences for test in step]
            np.testing.assert_allclose(ours, theirs, atol=2e-6)


@pytest.mark.parametrize("name", ["free_adapt_lo", "free_adapt_mid", "free_adapt_mid_rollback2.0"])
def test_adaptive_threshold_trajectory(decoded, name):
    run, (_, _, thresholds, policy) = RUNS["runs"][name], decoded(name)
    for value, expected in zip(thresholds, run["thresholds"], strict=True):
        assert expected is None or value == pytest.approx(expected, abs=1e-12)
    np.testing.assert_allclose(policy.threshold.pairs, run["calibration"], atol=2e-6)


def test_rollbacks_are_as_many(decoded):
    _, did, _, _ = decoded(name := "free_mid_rollback2.0")
    assert sum(stats.retracted_tokens for stats in did) == RUNS["runs"][name]["rollbacks"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize("shallow_layer", ["6", "12"])
@pytest.mark.parametrize("name", [name for name in INTERMEDIATE_LOSSES if "shallow" in name])
def test_losses(deep_model, name, shallow_layer, dtype):
    model = deep_model.to(torch.float64 if dtype == "fp64" else torch.float32)
    view = view_for(model)
    loss = build_exit_loss(view, name, int(shallow_layer), alpha=0.5, mask_padding=False)
    expected = LOSSES["losses"][shallow_layer][name][f"loss_{dtype}"]
    for batch, value in zip(LOSSES["batches"], expected, strict=True):
        tensors = {key: torch.tensor(rows) for key, rows in batch.items()}
        outputs = model(**tensors, output_hidden_states=True)
        assert loss(view, outputs, tensors["labels"]).total.item() == pytest.approx(value, rel=1e-5)


def test_layer_transformation_loss(deep_model):
    model, width = deep_model.float(), deep_model.config.d_model
    model.layer_transformation = torch.nn.Linear(width, width)
    generator = torch.Generator().manual_seed(3)
    model.layer_transformation.weight.data = torch.randn(width, width, generator=generator) * width**-0.5
    model.layer_transformation.bias.data.zero_()
    view = view_for(model)
    loss = build_exit_loss(view, "shallowdeep_kd_last", 6, alpha=0.5, mask_padding=False)
    batch = {key: torch.tensor(rows) for key, rows in LOSSES["batches"][0].items()}
    total = loss(view, model(**batch, output_hidden_states=True), batch["labels"]).total.item()
    del model.layer_transformation
    expected = LOSSES["losses"]["6"]["shallowdeep_kd_last+layer_transformation"]["loss_fp32"][0]
    assert total == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("index", range(4))
def test_dynamic_alignment(deep_model, index):
    model, view = deep_model.double(), view_for(deep_model)
    batch = {key: torch.tensor(rows) for key, rows in LOSSES["batches"][index].items()}
    with torch.no_grad():
        states = view.training_states(model(**batch, output_hidden_states=True))
        teachers = [normalized_state(view, states, layer) for layer in uniform_teachers(24, 6)]
        students = [normalized_state(view, states, layer) for layer in range(1, 7)]
        distances = torch.tensor([[(t - s).square().mean() for s in students] for t in teachers])
    assert align_closest(distances) == LOSSES["losses"]["6"]["alignment"][index]


@pytest.mark.parametrize("name", MIXTURES["cases"])
def test_beta_mixture(name):
    case = MIXTURES["cases"][name]
    mixture = BetaMixture(as_released=True)
    mixture.fit(np.array(case["x"]), np.array(case["y"]))
    ours = [*mixture.alphas, *mixture.betas]
    theirs = [float(value) for value in [*case["alphas"], *case["betas"]]]
    if all(abs(value) < 1e12 for value in theirs):  # beyond, the fit divides by a variance of zero
        np.testing.assert_allclose(ours, theirs, rtol=1e-8)
    for bounds, expected in case["predict_proba"].items():
        low, high = map(float, bounds.split(","))
        threshold = AdaptiveThreshold(0.9, low=low, high=high, as_released=True)
        threshold.mixture = mixture
        assert threshold.best_threshold() == pytest.approx(expected, abs=1e-8)


def test_beta_mixture_refits():
    x, y = np.array(MIXTURES["growing"]["x"]), np.array(MIXTURES["growing"]["y"])
    for step in MIXTURES["growing"]["trajectory"]:
        threshold = AdaptiveThreshold(0.9, as_released=True)
        threshold.observe([*zip(x, y, strict=True)][: step["n"]])
        threshold.start_sequence()
        assert threshold.value == pytest.approx(step["thr"], abs=1e-8)


def test_checkpoints_in_the_old_layout_load():
    with pytest.raises(ValueError, match="as tokenizer_name"):
        load_model(str(GOLDEN / "tiny24"))
