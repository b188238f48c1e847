"""Gradients accumulated over micro-batches, and over processes, equal those of one big batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pairs import QUICK, slow_but
from tiny_models import FAMILIES, padded_inputs, tiny_model
from transformers import Seq2SeqTrainingArguments

from models.exit_heads import ExitConfig, attach_exit_heads, freeze_backbone
from models.families import view_for
from models.losses import INTERMEDIATE_LOSSES, build_confidence_head_loss, build_exit_loss
from util.training.trainer import EarlyExitTrainer

TARGETS = ("labels", "decoder_input_ids")
LENGTHS = (7, 1, 4, 2, 6)  # target tokens of each row
HEAD = ("confidence head of FREE", "confidence head of CALM")
CASES = [(name, smoothing) for name in (None, *INTERMEDIATE_LOSSES) for smoothing in (0.0, 0.1)]
CASES += [(name, 0.0) for name in HEAD]
ONE_OF_EACH = [(None, 0.1), ("weighted_ce", 0.0), ("shallowdeep_kd_dyna", 0.1), (HEAD[0], 0.0)]


def big_batch(model):
    labels = torch.randint(2, 90, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(2))
    for row, length in enumerate(LENGTHS):
        labels[row, length:] = -100
    decoder_inputs = model.prepare_decoder_input_ids_from_labels(labels)
    return padded_inputs(len(LENGTHS)) | {"decoder_input_ids": decoder_inputs, "labels": labels}


def micro_batches(batch, sizes=(1, 3, 1)):
    """Pieces of a batch, each padded no more than its own rows need."""
    first = 0
    for size in sizes:
        rows = slice(first, first + size)
        width = max(LENGTHS[rows])
        first += size
        yield {
            name: tensor[rows, :width].contiguous() if name in TARGETS else tensor[rows]
            for name, tensor in batch.items()
        }


def build_loss(model, name, smoothing):
    if name is None:
        return None
    if name in HEAD:
        freeze_backbone(model)
        return build_confidence_head_loss(view_for(model), 2 if "FREE" in name else None)
    return build_exit_loss(view_for(model), name, 2, label_smoothing=smoothing)


def fresh_model(shape, **overrides):
    model = tiny_model(shape, num_layers=3, **overrides)
    attach_exit_heads(model, ExitConfig("ce", 2, train_meta_cm_head=True, do_layer_transformation=True))
    return model.requires_grad_(True)


def gradients(model):
    grown = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return grown


def gradients_at_once(model, loss, smoothing):
    """Without the trainer; without an exit loss, from the logits of Hugging Face's model."""
    batch = big_batch(model)
    labels = batch.pop("labels")
    outputs = model(**batch, output_hidden_states=True)
    if loss is None:
        total = F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), label_smoothing=smoothing)
    else:
        total = loss(view_for(model), outputs, labels).total
    total.backward()
    return total.item(), gradients(model)


def accumulate(model, loss, folder, **settings):
    """One optimizer step's worth of training steps, as the trainer's own loop makes them."""
    arguments = Seq2SeqTrainingArguments(folder, use_cpu=True, report_to="none", **settings)
    trainer = EarlyExitTrainer(model=model, args=arguments, exit_loss=loss)
    pieces = list(micro_batches(big_batch(model)))
    batches, items = trainer.get_batch_samples(iter(pieces), len(pieces), torch.device("cpu"))
    total = sum(trainer.training_step(model, dict(batch), items).item() for batch in batches)
    return total, gradients(model), trainer


@pytest.mark.slow
@pytest.mark.parametrize("shape", slow_but(QUICK, FAMILIES))
def test_every_loss_has_the_gradient_of_the_big_batch(shape, tmp_path):
    for name, smoothing in CASES if shape in ("t5-tied", "bart-tied") else ONE_OF_EACH:
        model = fresh_model(shape)
        loss = build_loss(model, name, smoothing)
        value, expected = gradients_at_once(model, loss, smoothing)
        total, found, _ = accumulate(model, loss, tmp_path, label_smoothing_factor=smoothing)
        case = f"{shape} {name} {smoothing}"
        assert total == pytest.approx(value, rel=1e-5), case
        assert found.keys() == expected.keys() and found, case
        scale = max(gradient.abs().max() for gradient in expected.values())
        for key, gradient in expected.items():
            torch.testing.assert_close(
                found[key], gradient, atol=1e-5 * scale, rtol=1e-5, msg=f"{case} {key}"
            )


def test_parts_in_the_log_are_those_of_the_big_batch(tmp_path):
    model = fresh_model("t5-tied")
    loss = build_loss(model, "shallowdeep_kd_dyna", 0.0)
    batch = big_batch(model)
    outputs = model(**{key: batch[key] for key in batch if key != "labels"}, output_hidden_states=True)
    expected = loss(view_for(model), outputs, batch["labels"]).parts
    trainer = accumulate(model, loss, tmp_path)[2]
    trainer.log({"loss": 0.0})
    logged = trainer.state.log_history[-1]
    for name, value in expected.items():
        assert logged[name] == pytest.approx(value.item(), rel=1e-5)


def test_the_survey_sees_the_dropout_of_training(tmp_path):
    """Else layers would be paired by states that are not those taught."""
    model = fresh_model("t5-tied", dropout_rate=0.3)
    loss = build_loss(model, "shallowdeep_kd_dyna", 0.0)
    seen = []
    original = EarlyExitTrainer._total

    def spy(trainer, name, own):
        if name == "distances":
            seen.append(own)
        return original(trainer, name, own)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EarlyExitTrainer, "_total", spy)
        trainer = accumulate(model, loss, tmp_path)[2]
    assert len(seen) == 3
    torch.testing.assert_close(torch.stack(seen).sum(0), trainer.totals["distances"])
