"""LayerSkip's recipe against the paper's formulas (arXiv 2404.16710, section 4.1), worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_causal import CAUSAL_FAMILIES, tiny_causal
from tiny_models import FAMILIES, padded_inputs, tiny_model

from models.families import view_for
from models.layer_skip import ExitCurriculum, LayerDropout, dropout_rates
from models.losses import build_exit_loss, exit_layer_weights
from util.arguments import parse_arguments


def test_dropout_rates_grow_exponentially_with_depth():
    # D(l) = exp(l ln 2 / (L - 1)) - 1 = 2 ** (l / (L - 1)) - 1, L = 5
    expected = [0.0, 0.2 * 0.189207115, 0.2 * 0.414213562, 0.2 * 0.681792831, 0.2]
    assert dropout_rates(5, 0.2) == pytest.approx(expected)
    assert dropout_rates(1, 0.3) == [0.0]


def test_weights_are_quadratic_in_depth():
    # L = 4, e_scale = 0.5: 0, 0.5 * 1, 0.5 * (1 + 2), 3 + 0.5 * (1 + 2); the sum is 6.5
    expected = {2: 0.5 / 6.5, 3: 1.5 / 6.5, 4: 4.5 / 6.5}
    assert exit_layer_weights("sum_l", 4, None, e_scale=0.5) == pytest.approx(expected)
    assert exit_layer_weights("sum_l", 4, None, e_scale=0.0) == {4: 1.0}


def test_rotation_enables_every_layer_once_in_an_interval():
    curriculum = ExitCurriculum("rotational", 6, interval=3)
    steps = [sorted(curriculum.enabled(step, 100)) for step in range(4)]
    assert steps == [[1, 4, 6], [2, 5, 6], [3, 6], [1, 4, 6]]


def test_gradual_curriculum_reaches_the_first_layer_at_half_time():
    curriculum = ExitCurriculum("gradual", 5)  # T = 100: one more layer every 10 steps
    lowest = {step: min(curriculum.enabled(step, 100)) for step in (0, 9, 10, 19, 20, 39, 40, 99)}
    assert lowest == {0: 5, 9: 5, 10: 4, 19: 4, 20: 3, 39: 2, 40: 1, 99: 1}
    assert curriculum.enabled(20, 100) == {3, 4, 5}


def test_a_curriculum_weighs_the_enabled_exits_alone():
    model = tiny_causal("llama-tied", num_layers=4)
    view, labels = view_for(model), torch.tensor([[5, 6, 7, 8]])
    curriculum = ExitCurriculum("rotational", 4, interval=2)
    loss = build_exit_loss(view, "weighted_ce", curriculum=curriculum)
    outputs = model(input_ids=labels, output_hidden_states=True)
    loss.start_step(1, 10)  # layers 2 and 4, by 2 / 6 and 4 / 6
    terms = loss(view, outputs, labels)
    assert set(terms.parts) == {"ce_layer_2", "ce_layer_4"}
    expected = (2 * terms.parts["ce_layer_2"] + 4 * terms.parts["ce_layer_4"]) / 6
    torch.testing.assert_close(terms.total.detach(), expected)


@pytest.mark.parametrize("family", [*CAUSAL_FAMILIES, *FAMILIES])
def test_a_skipped_layer_hands_on_what_it_was_given(family):
    """With a rate of 1 at the last layer, its recorded states are those of the layer before."""
    causal = family in CAUSAL_FAMILIES
    model = (tiny_causal if causal else tiny_model)(family, num_layers=3)
    view = view_for(model)
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    inputs = inputs if causal else padded_inputs() | {"decoder_input_ids": inputs["input_ids"]}
    before = model(**inputs, output_hidden_states=True)
    LayerDropout(view.layers, 1.0)
    evaluated = model(**inputs, output_hidden_states=True)
    torch.testing.assert_close(evaluated.logits, before.logits)
    view.layers[1].training = False  # else skipped at 0.41
    for module in (view.layers[0], view.layers[2]):
        module.training = True
    skipped = model(**inputs, output_hidden_states=True)
    states = view.training_states(skipped)
    torch.testing.assert_close(states[1], view.training_states(before)[1])
    torch.testing.assert_close(view.project(states[3]), view.predict(states[2], 3))
    torch.testing.assert_close(skipped.logits, view.project(states[3]))


def test_samples_are_skipped_each_at_its_layers_rate():
    layer = torch.nn.Identity()
    deeper = torch.nn.Linear(1, 1)
    LayerDropout([layer, deeper], 0.3)
    torch.manual_seed(0)
    hidden = torch.ones(20_000, 1, 1)
    skipped = (deeper(hidden) == 1).flatten()
    share = skipped.float().mean().item()
    assert math.isclose(share, 0.3, abs_tol=0.02)  # 6 standard deviations


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--e_scale 0.5 --intermediate_loss_fn ce", "--e_scale needs --intermediate_loss_fn sum_l"),
        ("--exit_curriculum gradual", "--exit_curriculum needs"),
        ("--exit_curriculum gradual --intermediate_loss_fn shallowdeep_ce", "--exit_curriculum needs"),
        ("--rotation_interval 2 --exit_curriculum gradual --intermediate_loss_fn ce", "--rotation_interval"),
        ("--layer_dropout 1.5", "--layer_dropout"),
        ("--layer_dropout 0.1 --train_meta_cm_head True", "contradicts --layer_dropout"),
    ],
)
def test_contradictory_flags_get_one_line(flags, message):
    base = "--model_name_or_path x --dataset_name debian_de_en --do_train --output_dir /tmp/x --use_cpu"
    with pytest.raises(Exception, match=message):
        parse_arguments([*base.split(), *flags.split()])
