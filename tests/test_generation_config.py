"""A checkpoint's generation config shapes texts, but not how an evaluation decodes and counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from real_rows import ROOT
from transformers import GenerationConfig

from models import FixedThreshold, Free, SoftmaxGap, load_model
from util.data.examples import load_examples
from util.evaluation.decode import decode_batch, describe_batch
from util.evaluation.records import EvaluationSettings
from util.tasks import DATASETS

CHECKPOINT = ROOT / "checkpoints/debian-t5-free"


@pytest.fixture(scope="module")
def loaded():
    return load_model(str(CHECKPOINT))


@pytest.fixture(scope="module")
def examples(loaded):
    from util.data_arguments import DataArguments

    flags = DataArguments(dataset_name="debian_de_en")
    return load_examples(DATASETS["debian_de_en"], flags, "test", loaded.tokenizer, 8)


def settings(**changes):
    return EvaluationSettings(
        "translation", 28, **({"max_length": 24, "predictions_file": Path("unused")} | changes)
    )


def decode(loaded, examples, policy, batch_size, **changes):
    records = []
    for start in range(0, len(examples), batch_size):
        batch = examples.select(range(start, min(start + batch_size, len(examples))))
        decoded = decode_batch(loaded, policy, batch, settings(**changes))
        records += describe_batch(loaded, batch, decoded)
    return records


@pytest.fixture
def generation_config(loaded):
    """The model's, to be changed at will."""
    before = loaded.model.generation_config
    loaded.model.generation_config = GenerationConfig.from_dict(json.loads(before.to_json_string()))
    yield loaded.model.generation_config
    loaded.model.generation_config = before


@pytest.mark.slow
@pytest.mark.parametrize("early", [False, True])
def test_padding_after_any_end_token_is_no_token(loaded, examples, generation_config, early):
    policy = Free(2, SoftmaxGap(), FixedThreshold(0.4)) if early else None
    plain = decode(loaded, examples, policy, 1)
    frequent = max((piece for record in plain for piece in record.pieces[1:-1]), key=len)
    generation_config.eos_token_id = [1, loaded.tokenizer.convert_tokens_to_ids(frequent)]
    alone, together = (decode(loaded, examples, policy, size) for size in (1, 4))
    assert sum(record.tokens for record in alone) < sum(record.tokens for record in plain)
    assert [record.tokens for record in together] == [record.tokens for record in alone]
    assert [record.prediction for record in together] == [record.prediction for record in alone]
    if early:
        assert [len(record.exit_layers) for record in together] == [record.tokens for record in together]


def test_lengths_and_beams_are_the_evaluations(loaded, examples, generation_config):
    expected = decode(loaded, examples, None, 4, max_length=6)
    generation_config.update(max_new_tokens=22, num_beams=4, num_return_sequences=2, do_sample=True)
    generation_config.update(prompt_lookup_num_tokens=3, penalty_alpha=0.6, top_k=4)
    for policy in (None, Free(2, SoftmaxGap(), FixedThreshold(1.0))):
        records = decode(loaded, examples, policy, 4, max_length=6)
        assert max(record.tokens for record in records) <= 5
        assert [record.prediction for record in records] == [record.prediction for record in expected]
