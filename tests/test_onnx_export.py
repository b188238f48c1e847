"""Exported layers against the modules they come from, and their bits alone and in windows."""

from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from pairs import slow_but
from tiny_causal import prompts, tiny_causal
from tiny_models import FAMILIES, padded_inputs, tiny_model

from models.backends.onnx.attention import Attended, attending, exported_attention, rotated_by_operator
from models.backends.onnx.engine import KINDS
from models.backends.onnx.pieces import DecoderLayer, EncoderLayer, Head, KeysValues, Memory
from models.backends.onnx.store import Store, default_cache_dir
from models.backends.onnx.tracing import Kinds
from models.errors import UserError
from models.families import view_for

CAPACITY, SOURCE, TOKENS = 32, 9, 12
START = torch.tensor([[0, 4, 9]]).repeat(2, 1)
DAILY = ("t5-tied",)
EXPORTED = [family for family in FAMILIES if family != "longt5-tglobal"]  # whose encoder is not exported


@pytest.fixture(scope="module")
def kinds():
    """Those that other tests of the backend decode with."""
    return Kinds(Store(default_cache_dir() / KINDS))


def session(model):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    serialized = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])


def bias_rows(view, index, start, new):
    """(1, H, new, CAPACITY) scores that the keys of each position get from how far away they are."""
    heads = view.key_value_shape[0]
    rows = np.zeros((1, heads, new, CAPACITY), np.float32)
    by_distance = view.distance_bias(index, CAPACITY)
    for row in range(new if by_distance is not None else 0):
        for key in range(start + row + 1):
            rows[0, :, row, key] = by_distance[:, start + row - key].detach().numpy()
    return rows


def run_exported(layer, view, index, hidden, memory, source_mask, windows):
    """Feed the tokens in windows; a lone token runs with a copy of itself, thrown away."""
    batch, past = (
        len(hidden),
        [np.zeros((len(hidden), view.key_value_shape[0], CAPACITY, view.key_value_shape[1]), np.float32)] * 2,
    )
    start, outputs = 0, []
    for new in windows:
        rows = max(new, 2)
        feeds = {
            "hidden": np.ascontiguousarray(hidden[:, start : start + new]),
            "bias": bias_rows(view, index, start, rows),
            "last": np.full(batch, start + rows - 1, np.int32),
            "capacity": np.array(CAPACITY, np.int32),
            "row_count": np.full(batch, rows, np.int32),
            "past_keys": past[0],
            "past_values": past[1],
            "source_mask": source_mask,
            "memory_keys": memory[0],
            "memory_values": memory[1],
            "queries": np.minimum(np.arange(rows), new - 1),
            "kept": np.arange(new),
        }
        output, *past = layer.run(None, feeds)
        outputs.append(output)
        start += new
    return np.concatenate(outputs, 1)


def perturbed(model):
    """With norms and biases that differ from each other."""
    for weight in model.parameters():
        weight.data += 0.02 * torch.randn_like(weight)
    return model.eval()


@pytest.mark.parametrize("family", slow_but(DAILY, FAMILIES))
def test_exported_layers_equal_the_modules_and_have_the_same_bits_in_every_window(family, kinds):
    torch.manual_seed(0)
    model = perturbed(tiny_model(family))
    view = view_for(model)
    layers = [session(kinds.model(DecoderLayer(view, index, exact=True))) for index in (0, 1)]
    memories = [session(kinds.model(Memory(view, index))) for index in (0, 1)]
    keys_values = session(kinds.model(KeysValues(view, 1)))
    head = session(kinds.model(Head(view)))
    source, hidden = torch.randn(2, SOURCE, view.width), torch.randn(2, TOKENS, view.width)
    mask = torch.ones(2, SOURCE, dtype=torch.int64)
    mask[0, 6:] = 0
    state = view.begin(None, encoder_outputs=(source,), attention_mask=mask)
    with torch.no_grad():
        expected = [view.run_layers(state, hidden, index, index + 1).numpy() for index in (0, 1)]
        memory = [run.run(None, {"hidden": source.numpy()}) for run in memories]
        made = keys_values.run(None, {"hidden": hidden.numpy()})
        logits = head.run(None, {"hidden": hidden.numpy()})[0]
        for ours, theirs in zip(made, view.project_kv(view.layers[1], hidden), strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(logits, view.predict(hidden, 1).numpy(), rtol=1e-4, atol=1e-5)
    for index in (0, 1):
        alone, *others = [
            run_exported(
                layers[index], view, index, hidden.numpy(), memory[index], mask.int().numpy(), windows
            )
            for windows in ([1] * 12, [2] * 6, [3] * 4, [4, 8], [12], [5, 1, 6])
        ]
        np.testing.assert_allclose(alone, expected[index], rtol=1e-4, atol=1e-4)
        assert all((other == alone).all() for other in others)


@pytest.mark.parametrize("family", slow_but(DAILY, EXPORTED))
def test_exported_encoder_layers_equal_the_modules(family, kinds):
    torch.manual_seed(0)
    model = perturbed(tiny_model(family))
    view, hidden = view_for(model), torch.randn(2, SOURCE, model.config.d_model)
    mask = torch.ones(2, SOURCE, dtype=torch.int64)
    mask[1, 5:] = 0
    encoder = model.get_encoder()
    calls = [record_call(layer) for layer in view.encoder_layers]
    with torch.no_grad():
        encoder(inputs_embeds=hidden, attention_mask=mask)
    for index in (0, 1):
        layer = session(kinds.model(EncoderLayer(view, index)))
        given, expected = calls[index]
        bias = view.source_bias(index, SOURCE)
        bias = torch.zeros(1, view.encoder_heads, SOURCE, SOURCE) if bias is None else bias.detach()
        feeds = {"hidden": given.numpy(), "source_mask": mask.int().numpy(), "bias": bias.numpy()}
        feeds = {name: feeds[name] for name in [node.name for node in layer.get_inputs()]}
        np.testing.assert_allclose(layer.run(None, feeds)[0], expected.numpy(), rtol=1e-4, atol=1e-4)


def record_call(layer):
    """Will hold input and output of the layer's next call, as the stock encoder makes it."""
    call = []

    def hook(module, inputs, output):
        call.extend((inputs[0], output[0] if isinstance(output, tuple) else output))
        handle.remove()

    handle = layer.register_forward_hook(hook)
    return call


def test_a_sparse_encoder_is_refused():
    model = tiny_model("longt5-tglobal").eval()
    with pytest.raises(UserError, match="LongT5"):
        view_for(model).apply_encoder_layer(model.get_encoder().block[0], torch.randn(1, SOURCE, 32))


def test_the_model_is_as_before_once_it_is_exported():
    model = tiny_model("t5-tied").train()
    before = model.config._attn_implementation
    with pytest.raises(KeyError), exported_attention(model):
        raise KeyError
    assert model.config._attn_implementation == model.decoder.config._attn_implementation == before
    assert model.training


def shallow(family):
    """A tiny model of two layers, and inputs with padding for its forward pass."""
    if family in FAMILIES:
        return tiny_model(family, num_layers=2).eval(), padded_inputs(2) | {"decoder_input_ids": START}
    return tiny_causal(family, num_layers=2), prompts(2)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["t5-tied", "bart-tied", "llama-tied"])
def test_other_threads_attend_and_rotate_as_ever_during_an_export(family, implementation):
    model, inputs = shallow(family)
    model.set_attn_implementation(implementation)

    def logits():
        with torch.no_grad():
            return model(**inputs).logits

    expected, layer = logits(), view_for(model).layers[0]
    rotates = rotated_by_operator(layer) if family == "llama-tied" else nullcontext()
    with ThreadPoolExecutor(1) as other, exported_attention(model), attending(Attended()), rotates:
        meanwhile = other.submit(logits).result()
    assert torch.equal(meanwhile, expected)


def test_models_are_exported_one_at_a_time():
    model, order = tiny_causal(num_layers=1), []
    before = model.config._attn_implementation

    def export(name):
        with exported_attention(model):
            order.append(name)

    with ThreadPoolExecutor(1) as other:
        with exported_attention(model):
            waiting = other.submit(export, "second")
            wait([waiting], timeout=0.2)
            order.append("first")
        waiting.result()
    assert order == ["first", "second"] and model.config._attn_implementation == before
