"""The embedded checkpoints: they load, say how they exit, and decode as plain `generate` does."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.confidence import SoftmaxGap
from models.decode_stats import DecodeStats
from models.decoding import early_exit_decode
from models.exit_policy import FullDepth
from models.free import Free
from models.loading import load_model
from models.threshold import FixedThreshold

FOLDER = Path(__file__).resolve().parent.parent / "checkpoints"
SENTENCES = ["Entwicklungsdateien für die Bibliothek", "Dieses Paket enthält die Dokumentation."]


@pytest.mark.parametrize("name", ["debian-t5-free", "debian-t5-calm", "debian-bart-free"])
def test_full_depth_equals_generate(name):
    loaded = load_model(str(FOLDER / name))
    inputs = loaded.tokenizer(SENTENCES, padding=True, return_tensors="pt")
    ours = loaded.model.generate(
        **inputs, max_length=30, custom_generate=early_exit_decode, exit_policy=FullDepth()
    )
    assert ours.tolist() == loaded.model.generate(**inputs, max_length=30).tolist()
    text = loaded.tokenizer.decode(ours[0], skip_special_tokens=True).lower()
    assert "development" in text or "library" in text
    assert (FOLDER / name / "model.safetensors").stat().st_size < 40e6


def test_checkpoints_know_their_training():
    free = load_model(str(FOLDER / "debian-t5-free")).exit_config
    calm = load_model(str(FOLDER / "debian-t5-calm")).exit_config
    assert (free.intermediate_loss_fn, free.shallow_exit_layer) == ("shallowdeep_kd_dyna", 2)
    bart = load_model(str(FOLDER / "debian-bart-free")).exit_config
    assert (bart.intermediate_loss_fn, bart.shallow_exit_layer) == ("shallowdeep_kd_dyna", 2)
    assert (calm.intermediate_loss_fn, calm.shallow_exit_layer) == ("weighted_ce", None)


def test_free_exits_on_easy_tokens_only():
    loaded, stats = load_model(str(FOLDER / "debian-t5-free")), DecodeStats()
    inputs = loaded.tokenizer(SENTENCES, padding=True, return_tensors="pt")
    policy = Free(2, SoftmaxGap(), FixedThreshold(0.4))
    options = {"custom_generate": early_exit_decode, "exit_policy": policy, "decode_stats": stats}
    loaded.model.generate(**inputs, max_length=30, **options)
    assert 0 < stats.exit_share < 1 and stats.deep_passes > 0


def test_a_decoder_only_checkpoint_is_prompted():
    """Full depth equals generate, batched and alone; FREE exits on some tokens, lossless changes none."""
    loaded = load_model(str(FOLDER / "debian-llama-free"))
    assert loaded.exit_config.shallow_exit_layer == 2
    prompts = [f"{sentence}\n\nTranslation:" for sentence in SENTENCES]
    inputs = loaded.tokenizer(prompts, padding=True, return_tensors="pt")
    start, options = inputs["input_ids"].shape[1], {"max_new_tokens": 30, "do_sample": False}
    expected = loaded.model.generate(**inputs, **options)[:, start:].tolist()
    assert loaded.generate(**inputs, exit_policy=FullDepth(), **options)[:, start:].tolist() == expected
    stats, policy = DecodeStats(), Free(2, SoftmaxGap(), FixedThreshold(0.4))
    loaded.generate(**inputs, exit_policy=policy, decode_stats=stats, **options)
    assert 0 < stats.exit_share < 1
    exact = Free(2, SoftmaxGap(), FixedThreshold(0.4), lossless=True)
    assert loaded.generate(**inputs, exit_policy=exact, **options)[:, start:].tolist() == expected
    text = loaded.tokenizer.decode(expected[0], skip_special_tokens=True).lower()
    assert "development" in text or "library" in text
    assert (FOLDER / "debian-llama-free" / "model.safetensors").stat().st_size < 30e6
