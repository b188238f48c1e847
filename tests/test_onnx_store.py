"""What the ONNX Runtime backend keeps on disk, and what it refuses."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from decoding_cases import EveryThirdDeep
from onnx_models import decode, loaded, perturbed, policies
from tiny_causal import decode_causal, greedy_causal, prompts, tiny_causal
from tiny_models import padded_inputs, tiny_model
from transformers import DynamicCache, EncoderDecoderCache

from models import (
    Free,
    FullDepth,
    SoftmaxGap,
    UserError,
    load_model,
    prepare,
)
from models.backends.onnx import tracing
from models.backends.onnx.engine import KINDS
from models.backends.onnx.store import Store, default_cache_dir, foreign_code
from models.families import VIEWS, register_view, view_for
from models.families.t5 import T5View


@pytest.fixture
def cache_dir(tmp_path):
    """A cache that has graphs, but no model's weights."""
    for precision in ("fp32", "int8"):
        prepare(loaded(tiny_model()), precision=precision)
    (tmp_path / KINDS).symlink_to(default_cache_dir() / KINDS)
    return tmp_path


def refuse_to_trace(*args):
    raise AssertionError("It was exported again.")


@pytest.mark.slow
def test_graphs_are_exported_once_for_all_weights(cache_dir, monkeypatch):
    monkeypatch.setattr(tracing, "trace", refuse_to_trace)
    for seed in (1, 2, 1):
        other = loaded(perturbed("t5-tied", seed))
        expected = decode(other, padded_inputs(), FullDepth())
        fast = prepare(other, cache_dir=cache_dir)
        assert torch.equal(decode(fast, padded_inputs(), FullDepth()), expected)


def test_a_second_run_makes_nothing(cache_dir, monkeypatch):
    torch_model = loaded(tiny_model())
    expected = decode(prepare(torch_model, cache_dir=cache_dir), padded_inputs(), FullDepth())
    monkeypatch.setattr(Store, "_write", refuse_to_trace)
    again = decode(prepare(torch_model, cache_dir=cache_dir), padded_inputs(), FullDepth())
    assert torch.equal(again, expected)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "foreign", "missing", "no sums"])
def test_damaged_files_are_made_again(cache_dir, damage, caplog):
    torch_model = loaded(tiny_model())
    expected = decode(torch_model, padded_inputs(), FullDepth())
    decode(prepare(torch_model, cache_dir=cache_dir), padded_inputs(), FullDepth())
    parts = ("exact-layer-2", "encoder-0")
    stored = [path for path in cache_dir.rglob("graph.onnx") if path.parent.name in parts]
    assert len(stored) == 2
    for path in stored:
        if damage == "cut":
            path.write_bytes(path.read_bytes()[:100])
        elif damage == "foreign":
            path.write_text("mine")
        elif damage == "missing":
            path.unlink()
        else:
            (path.parent / "sums.json").unlink()
    again = decode(prepare(torch_model, cache_dir=cache_dir), padded_inputs(), FullDepth())
    assert torch.equal(again, expected)
    assert "made again" in caplog.text


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cache_dir .*file.* cannot be written"):
        decode(prepare(loaded(tiny_model()), cache_dir=tmp_path / "file"), padded_inputs(), FullDepth())


def test_a_folder_that_can_no_longer_be_written_is_named(cache_dir, tmp_path_factory, monkeypatch):
    store = Store(tmp_path_factory.mktemp("graphs") / "of a model")
    store.folder.rmdir()
    store.folder.write_text("")
    with pytest.raises(UserError, match=r"cache_dir .*of a model of .* cannot be written .*Not a directory"):
        store.piece("layer-0", lambda: ir.Model(ir.Graph([], [], nodes=[]), ir_version=10))

    def refuse(path, *args, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(UserError, match=r"cache_dir .* cannot be written .*Permission denied: '.*checked-"):
        prepare(loaded(tiny_model()), cache_dir=cache_dir)


def test_weights_lie_outside_of_graphs_where_they_are_mapped():
    fast = prepare(load_model("checkpoints/debian-t5-free"))
    model = fast.view.engine._piece("exact-layer", 0)
    large = [
        value.const_value for value in model.graph.initializers.values() if value.const_value.nbytes > 1024
    ]
    assert large and all(isinstance(tensor, ir.ExternalTensor) for tensor in large)


def test_what_onnx_cannot_run_is_refused_by_name():
    torch_model = loaded(tiny_model())
    with pytest.raises(UserError, match="bfloat16"):
        prepare(loaded(tiny_model().bfloat16()))
    with pytest.raises(UserError, match="backend: 'onx'"):
        prepare(torch_model, "onx")
    with pytest.raises(UserError, match="precision: 'w7'"):
        prepare(torch_model, precision="w7")
    with pytest.raises(UserError, match="precision w8 needs backend onnx"):
        prepare(torch_model, "torch", "w8")
    fast = prepare(torch_model)
    bidirectional = Free(2, SoftmaxGap(), EveryThirdDeep(), causal_catch_up=False)
    with pytest.raises(UserError, match="causal_catch_up"):
        decode(fast, padded_inputs(), bidirectional)
    with pytest.raises(UserError, match="another precision: fp32, w8, int8"):
        decode(prepare(torch_model, precision="w4"), padded_inputs(), policies()["lossless"])


def test_an_export_that_computes_something_else_is_refused(monkeypatch, tmp_path):
    def embed_twice(self, token_ids):
        return embed_source(self, token_ids) * 2

    embed_source = T5View.embed_source
    prepare(loaded(tiny_model()))
    (tmp_path / KINDS).symlink_to(default_cache_dir() / KINDS)  # it is in no graph, but in what one reads
    monkeypatch.setattr(T5View, "embed_source", embed_twice)
    for _ in range(2):  # what was refused is not taken the next time because it is stored
        with pytest.raises(UserError, match="differs from its modules"):
            prepare(loaded(tiny_model()), cache_dir=tmp_path)
    monkeypatch.undo()
    assert prepare(loaded(tiny_model()), cache_dir=tmp_path).backend == "onnx"


OWN_VIEW = "from models.families.gpt2 import GPT2View\nclass Own(GPT2View):\n    pass\n"
MISTAKE = "    def project(self, normalized):\n        return -super().project(normalized)\n"


@pytest.fixture
def write_view(monkeypatch, tmp_path):
    """A view of GPT-2 that its author keeps in a file, and changes."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("models.families.VIEWS", dict(VIEWS))

    def write(text):
        (tmp_path / "own_view.py").write_text(text)
        sys.modules.pop("own_view", None)
        importlib.invalidate_caches()
        register_view("gpt2", importlib.import_module("own_view").Own)

    return write


def test_code_from_outside_is_told_apart(write_view):
    model = tiny_causal("gpt2-tied", num_layers=1)
    assert foreign_code(view_for(model)) == ""
    codes = []
    for text in (OWN_VIEW, OWN_VIEW + MISTAKE, OWN_VIEW):
        write_view(text)
        codes.append(foreign_code(view_for(model)))
    assert codes[0] == codes[2] != codes[1] and all(codes)


@pytest.mark.slow
def test_a_view_from_outside_is_exported_again_once_it_was_mended(write_view, tmp_path):
    model, inputs, outputs = tiny_causal("gpt2-tied", num_layers=1), prompts(1), []
    for text in (OWN_VIEW + MISTAKE, OWN_VIEW):
        write_view(text)
        fast = prepare(loaded(model), cache_dir=tmp_path)
        outputs.append(decode_causal(model, inputs, FullDepth(), decoder_view=fast.view))
    assert torch.equal(outputs[1], greedy_causal(model, inputs)) and not torch.equal(*outputs)


def test_a_model_that_was_replaced_is_not_run_by_its_old_graphs():
    fast = prepare(loaded(tiny_model()))
    fast.model = tiny_model(seed=1)
    with pytest.raises(UserError, match="prepare"):
        decode(fast, padded_inputs(), FullDepth())


def test_a_cache_of_several_calls_is_refused():
    fast, cache = prepare(loaded(tiny_model())), EncoderDecoderCache(DynamicCache(), DynamicCache())
    decode(fast, padded_inputs(), FullDepth(), cache=cache, max_length=6)
    layer = cache.self_attention_cache.layers[2]
    layer.keys, layer.values = layer.keys[:, :, :2], layer.values[:, :, :2]
    with pytest.raises(UserError, match="not of one call"):
        decode(fast, padded_inputs(), FullDepth(), cache=cache, decoder_input_ids=torch.zeros(1, 6).long())
