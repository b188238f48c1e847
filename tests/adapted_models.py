"""Exit adapters with random weights, and the plain Hugging Face models that say what their exits say."""

from __future__ import annotations

import copy

import torch
from tiny_causal import CAUSAL_SHAPES, prompts, tiny_causal
from tiny_models import VOCABULARY, greedy, padded_inputs, tiny_model
from torch import nn

from models.exit_adapter import attach_exit_adapter, make_exit_adapter
from models.exit_heads import ExitConfig
from models.families import view_for
from models.loading import LoadedModel
from util.exit_training.texts import Text

SHALLOW = 2
SHORTLIST = torch.tensor([1, 3, 4, 7, 8, 11, 12, 20, 21, 30, 33, 40, 41, 42, 50, 60, 61, 77, 80, 96])
STACKS, NORMS = ("block", "h", "layers"), ("final_layer_norm", "norm", "ln_f", "layer_norm", "project_out")


def make_model(shape):
    return tiny_causal(shape) if shape in CAUSAL_SHAPES else tiny_model(shape)


def make_inputs(shape, batch=1, seed=1):
    return prompts(batch, seed=seed) if shape in CAUSAL_SHAPES else padded_inputs(batch, seed=seed)


def decode_by_hugging_face(model, inputs, **options):
    if model.config.is_encoder_decoder:
        return greedy(model, inputs, **options)
    return model.generate(**inputs, do_sample=False, **options)


def adapted(shape, kind="layer", shortlist=None, kv_layer=None):
    """A model with an exit adapter whose weights are nobody else's."""
    model = make_model(shape)
    adapter = make_exit_adapter(view_for(model), kind, SHALLOW, shortlist, kv_layer)
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in adapter.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    attach_exit_adapter(model, adapter)
    return LoadedModel(model, None, ExitConfig(shallow_exit_layer=SHALLOW))


def texts_of(shape, rows=3):
    """Texts of different lengths, with tokens that are anything."""
    generator = torch.Generator().manual_seed(7)

    def draw(count):
        return torch.randint(2, 97, (count,), generator=generator).tolist()

    return [Text(draw(5 + row), draw(3 + 2 * row)) for row in range(rows)]


def first_of(module, names):
    return next(name for name in names if getattr(module, name, None) is not None)


def as_plain_model(loaded):
    """The exit as a Hugging Face model of its own: the shallow layers, the adapter as the last, its norm."""
    model, adapter = copy.deepcopy(loaded.model), copy.deepcopy(loaded.model.exit_adapter)
    del model.exit_adapter
    decoder = view_for(model).decoder
    stack = first_of(decoder, STACKS)
    norm = next((name for name in NORMS if getattr(decoder, name, None) is not None), None)
    layers = list(getattr(decoder, stack))[:SHALLOW]
    kinds = getattr(model.config, "layer_types", None)
    if adapter.block is not None:
        for module in adapter.block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = SHALLOW
        layers.append(adapter.block)
        kinds = kinds and kinds[: SHALLOW + 1]
    setattr(decoder, stack, nn.ModuleList(layers))
    for config in (model.config, decoder.config):
        if kinds:
            config.layer_types = kinds
        for name in ("num_hidden_layers", "num_decoder_layers", "decoder_layers", "n_layer", "num_layers"):
            if hasattr(config, name) and name not in config.attribute_map:
                setattr(config, name, len(layers))
    parts = []
    if adapter.kind != "norm":
        with torch.no_grad():
            adapter.projection.weight += torch.eye(len(adapter.projection.weight))
        parts.append(adapter.projection)
    if norm is None:  # BART's: what the LM head reads is mapped
        model.lm_head = nn.Sequential(*parts, model.lm_head)
        return model
    own = adapter.norm[0] if isinstance(adapter.norm, nn.Sequential) else adapter.norm
    setattr(decoder, norm, nn.Sequential(*parts, own))
    return model


class Only(torch.nn.Module):
    """A logits processor of Hugging Face's kind that allows a few tokens."""

    def __init__(self, token_ids):
        super().__init__()
        self.hidden = torch.ones(VOCABULARY, dtype=torch.bool)
        self.hidden[token_ids] = False

    def forward(self, input_ids, scores):
        return scores.masked_fill(self.hidden, -torch.inf)
