"""The exit that lies in checkpoints/ beside its model."""

from __future__ import annotations

import pytest
import torch
from pairs import slow_but
from real_rows import ROOT, read_rows

from models import DecodeStats, FixedThreshold, Free, SoftmaxGap, load_model, prepare, trace_layers

EXIT = str(ROOT / "checkpoints" / "debian-bart-exit")
RUNS = slow_but([("torch", None)], [("torch", None), ("onnx", None), ("onnx", "w8")])


@pytest.fixture(scope="module")
def released():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # from where it names its model
        return load_model(EXIT)


@pytest.fixture(scope="module")
def translated(released):
    """Sentences, and what Hugging Face's `generate` makes of each."""
    rows = [row["translation"]["de"] for row in read_rows("debian_de_en", 40)]
    sentences = [released.tokenizer(text, return_tensors="pt") for text in rows]
    greedy = {"do_sample": False, "num_beams": 1, "max_new_tokens": 32}
    return [(inputs, released.model.generate(**inputs, **greedy)) for inputs in sentences]


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "exit_precision"), RUNS)
def test_its_lossless_output_is_its_models(released, translated, backend, exit_precision):
    options = {} if backend == "torch" else {"exit_precision": exit_precision}
    loaded = prepare(released, backend, **options)
    policy = Free(1, SoftmaxGap(), FixedThreshold(0.3), lossless=True, max_pending=8)
    shares = []
    for inputs, expected in translated[:12]:
        stats, options = DecodeStats(), {"max_new_tokens": 32, "do_sample": False}
        output = loaded.generate(**inputs, **options, exit_policy=policy, decode_stats=stats)
        assert torch.equal(output, expected)
        shares.append(stats.exit_share)
    assert sum(shares) > 0.3 * len(shares)


@pytest.mark.slow
def test_it_says_mostly_what_the_last_layer_says(released, translated):
    """Of sentences that it was not taught on: its card says 0.87."""
    agrees = []
    for inputs, sequences in translated:
        tokens = trace_layers(released.model, **inputs, sequences=sequences).tokens[0]  # (T, L)
        agrees += (tokens[:, 0] == tokens[:, -1]).tolist()
    assert sum(agrees) > 0.8 * len(agrees)
