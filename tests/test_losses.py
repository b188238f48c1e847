"""Training losses: weights, padding, any depth pair, bounded memory, the confidence head."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pairs import QUICK, slow_but
from tiny_models import SHAPES, padded_inputs, tiny_model

from models import losses
from models.errors import UserError
from models.exit_heads import ExitConfig, attach_exit_heads, freeze_backbone
from models.families import view_for
from models.losses import (
    INTERMEDIATE_LOSSES,
    align_closest,
    balanced_cross_entropy,
    build_confidence_head_loss,
    build_exit_loss,
    exit_layer_weights,
    normalized_state,
    uniform_teachers,
)


def labelled_batch(batch=3, length=7):
    inputs = padded_inputs(batch)
    labels = torch.randint(2, 90, (batch, length), generator=torch.Generator().manual_seed(2))
    labels[1, 4:] = labels[2, 2:] = -100
    return {**inputs, "labels": labels}


def loss_of(model, batch, name, shallow_layer=2, total=losses.own_total, **settings):
    view = view_for(model)
    features = {key: value for key, value in batch.items() if key != "labels"}
    features["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    with losses.without_logits(model):
        outputs = model(**features, output_hidden_states=True)
    return build_exit_loss(view, name, shallow_layer, **settings)(view, outputs, batch["labels"], total)


def test_layer_weights():
    assert exit_layer_weights("weighted_ce", 3, None) == {1: 1 / 6, 2: 2 / 6, 3: 3 / 6}
    assert exit_layer_weights("shallowdeep_kd_dyna", 12, 3) == {3: 3 / 15, 12: 12 / 15}
    assert sum(exit_layer_weights("ce", 7, None).values()) == pytest.approx(1)


def test_cross_entropies_equal_those_of_truncated_models():
    model, batch = tiny_model().double(), labelled_batch()
    parts = loss_of(model, batch, "weighted_ce").parts
    for layer in (6, 4, 1):
        model.decoder.block = model.decoder.block[:layer]
        assert parts[f"ce_layer_{layer}"].item() == pytest.approx(model(**batch).loss.item(), rel=1e-9)


@pytest.mark.parametrize(("num_layers", "shallow"), [(24, 6), (12, 3), (6, 4), (5, 3), (7, 1), (8, 7)])
def test_teachers_fit_any_depth_pair(num_layers, shallow):
    teachers = uniform_teachers(num_layers, shallow)
    assert len(set(teachers)) == shallow and teachers[-1] == num_layers and teachers[0] >= 1
    assert teachers == sorted(teachers)


@pytest.mark.parametrize("name", INTERMEDIATE_LOSSES)
@pytest.mark.parametrize("shallow", [1, 4])
def test_every_loss_trains_every_depth(name, shallow):
    model = tiny_model(num_layers=5)
    model.train()
    loss_of(model, labelled_batch(), name, shallow).total.backward()
    assert model.decoder.block[0].layer[-1].DenseReluDense.wo.weight.grad.norm() > 0


def test_alignment_is_monotonic_from_the_top():
    assert align_closest(torch.tensor([[0.1, 9, 9], [9, 0.1, 9], [9, 9, 0.1]])) == [0, 1, 2]
    assert align_closest(torch.tensor([[0.1, 0.2, 9], [0.1, 9, 9], [0.1, 0.2, 9]])) == [0, 0, 0]
    assert align_closest(torch.tensor([[5.0, 1, 1], [0.3, 0.2, 0.1], [9, 0.1, 0.2]])) == [0, 0, 1]


@pytest.mark.parametrize("name", INTERMEDIATE_LOSSES)
def test_padding_does_not_count(name):
    model, batch = tiny_model().double(), labelled_batch()
    longer = dict(batch, labels=F.pad(batch["labels"], (0, 5), value=-100))
    assert loss_of(model, batch, name).total.item() == pytest.approx(
        loss_of(model, longer, name).total.item()
    )


@pytest.mark.parametrize("name", ["shallowdeep_ce", "shallowdeep_kd_last", "shallowdeep_kd_dyna"])
def test_a_share_of_the_batch_without_a_label_adds_nothing(name):
    model, batch, whole, told = tiny_model().double(), labelled_batch(), {}, []
    batch["labels"][2] = -100

    def note(kind, own):
        return whole.setdefault(kind, own)

    def of_whole(kind, own):
        told.append(own)
        return whole[kind]

    loss_of(model, batch, name, total=note).total.backward()
    expected = {key: weight.grad.clone() for key, weight in model.named_parameters()}
    model.zero_grad()
    for rows in (slice(0, 2), slice(2, 3)):
        share = {key: value[rows] for key, value in batch.items()}
        loss = loss_of(model, share, name, total=of_whole)
        loss.total.backward()
        assert all(value.isfinite().all() for value in [*told, *loss.parts.values()])
    for key, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[key], msg=key)


def test_distillation_teaches_the_shallow_layers_only():
    model = tiny_model()
    view = view_for(model)
    batch = labelled_batch()
    loss = build_exit_loss(view, "shallowdeep_kd_last", 2)
    outputs = model(**batch, output_hidden_states=True)
    tokens = losses.TargetTokens.of(batch["labels"])
    loss.distillation(view, outputs, tokens).total.backward()
    assert model.decoder.block[1].layer[0].SelfAttention.q.weight.grad.norm() > 0
    assert model.decoder.block[4].layer[0].SelfAttention.q.weight.grad is None


def test_chunks_do_not_change_value_or_gradient(monkeypatch):
    gradients, values = [], []
    for size in (10_000, 3):
        monkeypatch.setattr(losses, "TOKENS_PER_CHUNK", size)
        model = tiny_model().double()
        total = loss_of(model, labelled_batch(), "weighted_ce", label_smoothing=0.1).total
        total.backward()
        values.append(total.item())
        gradients.append(model.shared.weight.grad.clone())
    assert values[0] == pytest.approx(values[1])
    torch.testing.assert_close(*gradients)


def test_logits_of_all_layers_are_never_alive_together(monkeypatch):
    """Counts live logits through weak references instead of measuring a noisy process size."""
    import weakref

    monkeypatch.setattr(losses, "TOKENS_PER_CHUNK", 8)
    model = tiny_model(num_layers=12)
    model.train()
    alive, peak, sizes = weakref.WeakSet(), [], []

    def watch(module, args, output):
        alive.add(output)
        peak.append(len(alive))
        sizes.append(output[..., 0].numel())

    model.lm_head.register_forward_hook(watch)
    loss_of(model, labelled_batch(), "weighted_ce").total.backward()
    assert len(peak) > 24 and max(peak) <= 3
    assert max(sizes) == 8  # tokens: those of the last layer as well


@pytest.mark.parametrize("shape", slow_but(QUICK, SHAPES))
@pytest.mark.parametrize("name", ["shallowdeep_kd_dyna", "confidence head"])
def test_losses_need_no_logits_of_the_forward_pass(shape, name):
    model, batch = tiny_model(shape).double(), labelled_batch()
    attach_exit_heads(model, ExitConfig(train_meta_cm_head=True))
    view = view_for(model)
    loss = (
        build_confidence_head_loss(view, 2) if name == "confidence head" else build_exit_loss(view, name, 2)
    )
    features = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    features["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    with losses.without_logits(model):
        outputs = model(**features, output_hidden_states=True)
    assert outputs.logits.numel() == 0
    whole = model(**features, output_hidden_states=True)  # the head sees everything again
    assert whole.logits.shape[:2] == batch["labels"].shape
    total = loss(view, outputs, batch["labels"]).total
    assert total.item() == pytest.approx(loss(view, whole, batch["labels"]).total.item(), rel=1e-9)


def test_label_smoothing_matches_torch():
    model, batch = tiny_model(), labelled_batch()
    parts = loss_of(model, batch, "shallowdeep_ce", label_smoothing=0.2).parts
    logits = model(**batch).logits
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), label_smoothing=0.2)
    assert parts["ce_layer_6"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["shallowdeep_ce", "shallowdeep_kd_last"])
def test_losses_of_an_exit_need_one(name):
    view = view_for(tiny_model("t5-tied"))
    with pytest.raises(UserError, match=rf"^{name} needs a shallow_layer\.$"):
        build_exit_loss(view, name)
    assert build_exit_loss(view, "weighted_ce").distillation is None


def test_layer_transformation_starts_as_identity():
    model, batch = tiny_model(), labelled_batch()
    plain = loss_of(model, batch, "shallowdeep_kd_unif").total.item()
    attach_exit_heads(model, ExitConfig(do_layer_transformation=True))
    assert loss_of(model, batch, "shallowdeep_kd_unif").total.item() == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("shallow", [None, 2])
def test_confidence_head_learns_with_the_backbone_frozen(shallow):
    model, batch = tiny_model(), labelled_batch()
    attach_exit_heads(model, ExitConfig(train_meta_cm_head=True))
    freeze_backbone(model)
    view = view_for(model)
    loss = build_confidence_head_loss(view, shallow)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = model.shared.weight.clone()
    values = []
    for _ in range(30):
        outputs = model(**batch, output_hidden_states=True)
        total = loss(view, outputs, batch["labels"]).total
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(total.item())
    assert values[-1] < 0.8 * values[0]
    assert torch.equal(before, model.shared.weight)


def test_classes_weigh_alike_and_one_class_is_finite():
    logits = torch.tensor([[2.0, 0.0]] * 9 + [[0.0, 1.0]])
    labels = torch.tensor([0] * 9 + [1])
    expected = (F.cross_entropy(logits[:1], labels[:1]) + F.cross_entropy(logits[9:], labels[9:])) / 2
    assert balanced_cross_entropy(logits, labels).item() == pytest.approx(expected.item())
    assert torch.isfinite(balanced_cross_entropy(logits[:9], labels[:9]))


@pytest.mark.parametrize("shape", SHAPES)
def test_training_states_are_the_layers_outputs(shape):
    """Layer by layer, the states that losses read equal those that decoding makes."""
    model, tokens = tiny_model(shape).double(), torch.tensor([[0, 5, 9, 23]])
    view, inputs = view_for(model), padded_inputs()
    with torch.no_grad():
        outputs = model(**inputs, decoder_input_ids=tokens, output_hidden_states=True)
        memory = {
            "encoder_outputs": model.get_encoder()(**inputs),
            "attention_mask": inputs["attention_mask"],
        }
        state = view.begin(None, **memory)
        hidden, states = view.embed(state, tokens), view.training_states(outputs)
        for layer in range(1, view.num_layers + 1):
            hidden = view.run_layers(state, hidden, layer - 1, layer)
            expected = view.normalize(hidden, layer)
            torch.testing.assert_close(normalized_state(view, states, layer), expected)
        torch.testing.assert_close(view.project(expected), outputs.logits)
