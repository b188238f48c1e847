"""Heads that share keys/values as rows of one product: which blocks make a row, when, and where none may."""

from __future__ import annotations

import pytest
import torch
from tiny_causal import greedy_causal, prompts, tiny_causal
from tiny_models import padded_inputs, tiny_model

from models import FullDepth, UserError, prepare
from models.backends.onnx import check
from models.backends.onnx.grouping import MANY, Groups
from models.exit_heads import ExitConfig
from models.loading import LoadedModel


def test_blocks_of_two_tokens_make_the_rows_of_two_groups():
    """Of each token: queries of heads 0 to 3, keys of 0 and 1, values of 0 and 1, eight blocks."""
    groups = Groups(heads=4, kv_heads=2)
    assert groups.blocks(2).tolist() == [
        [0, 2, 4, 5, 6, 7],  # the first heads of both groups, first token
        [8, 10, 12, 13, 14, 15],
        [1, 3, 12, 13, 14, 15],  # their second heads, beside keys/values that no row sees
        [9, 11, 12, 13, 14, 15],
    ]
    assert groups.kept_blocks(2).tolist() == [[0, 4, 1, 5], [2, 6, 3, 7]]
    hides = [[False, True, True, True], [False, False, True, True]]
    assert groups.later(2).tolist() == hides * 2


@pytest.mark.parametrize(
    ("heads", "new", "past", "gains"),
    [(9, 1, 0, True), (9, 2, 5, False), (9, 5, MANY, True), (9, 6, MANY, False), (60, 3, MANY, True),
     (60, 4, MANY, False)],
)  # fmt: skip
def test_lone_tokens_and_small_windows_after_many_gain(heads, new, past, gains):
    assert Groups(heads, 3).gains(new, past, limit=64) == gains


@pytest.mark.slow
def test_heads_stay_apart_where_groups_have_other_bits(tmp_path, monkeypatch):
    loaded = LoadedModel(tiny_causal("llama-tied", 2), None, ExitConfig())
    asked = []

    def have_same_bits(view):
        asked.append(view.engine.groups)
        return view.engine.groups is None

    monkeypatch.setattr(check, "have_same_bits", have_same_bits)
    inputs = prompts(2)
    for _ in range(2):
        apart = prepare(loaded, cache_dir=tmp_path)
        assert apart.view.engine.groups is None
        output = apart.generate(**inputs, exit_policy=FullDepth(), max_new_tokens=8, do_sample=False)
        assert torch.equal(output, greedy_causal(loaded.model, inputs)[:, : output.shape[1]])
    assert asked == [Groups(4, 2), None]  # the second time it was known
    monkeypatch.setattr(check, "have_same_bits", lambda view: False)
    with pytest.raises(UserError, match="on this processor a token has other bits alone than in a window"):
        prepare(loaded, cache_dir=tmp_path / "anew")


@pytest.mark.slow
def test_an_encoders_heads_are_not_the_decoders():
    """BART counts both; its layers share no keys/values."""
    model = tiny_model("bart-tied", num_layers=2, encoder_attention_heads=8, decoder_attention_heads=4)
    fast, inputs = prepare(LoadedModel(model, None, ExitConfig())), padded_inputs(2)
    assert fast.view.engine.groups is None
    output = fast.generate(**inputs, exit_policy=FullDepth(), max_length=12, do_sample=False)
    assert torch.equal(output, model.generate(**inputs, max_length=12, do_sample=False))
