"""A model from outside: an encoder-decoder of our own, with a view that is `DecoderView` and nothing else.

Nothing here is named as in Hugging Face's models, and no cache of theirs is used.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from models.decoder_view import DecoderState, DecoderView, ModelInputs

FAMILY = "pebble"
PROTOCOL = {*DecoderView.__annotations__, *(name for name in vars(DecoderView) if not name.startswith("_"))}


class PebbleConfig(PreTrainedConfig):
    model_type = FAMILY

    def __init__(self, vocab_size=97, hidden_size=16, depth=4, **kwargs):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers = self.num_attention_heads = depth  # `generate` reads them
        kwargs = {"is_encoder_decoder": True, "tie_word_embeddings": False} | kwargs
        super().__init__(**{"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0} | kwargs)


class Stone(nn.Module):
    """One head of attention to earlier targets, one to the source, and a residual map."""

    def __init__(self, width):
        super().__init__()
        self.query, self.key, self.value, self.look, self.mix = (nn.Linear(width, width) for _ in range(5))

    def forward(self, hidden, keys, values, unseen, source, source_mask):
        """(B, Q, D) hidden, (B, N, D) keys and values of which (Q, N) are `unseen`, (B, S, D) source."""
        hidden = hidden + attend(self.query(hidden), keys, values, unseen)
        hidden = hidden + attend(self.look(hidden), source, source, source_mask[:, None] == 0)
        return hidden + torch.tanh(self.mix(hidden))


def attend(queries, keys, values, hide):
    scores = queries @ keys.transpose(1, 2) / math.sqrt(keys.shape[-1])
    return scores.masked_fill(hide, -1e9).softmax(-1) @ values


class PebbleEncoder(PreTrainedModel):
    config_class, main_input_name = PebbleConfig, "input_ids"

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **output_options):  # how outputs are returned
        return BaseModelOutput(torch.tanh(self.words(input_ids)))


class PebbleForConditionalGeneration(PreTrainedModel, GenerationMixin):
    config_class, main_input_name = PebbleConfig, "input_ids"

    def __init__(self, config):
        super().__init__(config)
        width = config.hidden_size
        self.reader, self.words = PebbleEncoder(config), nn.Embedding(config.vocab_size, width)
        self.pile = nn.ModuleList(Stone(width) for _ in range(config.num_hidden_layers))
        self.polish, self.out = nn.LayerNorm(width), nn.Linear(width, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.5)

    def get_encoder(self, *_, **__):
        return self.reader

    def get_output_embeddings(self):
        return self.out

    def prepare_decoder_input_ids_from_labels(self, labels):
        return F.pad(labels, (1, -1), value=0).masked_fill(F.pad(labels, (1, -1), value=0) == -100, 0)

    def forward(
        self, input_ids=None, attention_mask=None, decoder_input_ids=None, encoder_outputs=None, labels=None,
        output_hidden_states=False, use_cache=False, **output_options,
    ):  # fmt: skip
        if decoder_input_ids is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        source = self.reader(input_ids)[0] if encoder_outputs is None else encoder_outputs[0]
        mask = source.new_ones(source.shape[:2]) if attention_mask is None else attention_mask
        length = decoder_input_ids.shape[1]
        unseen = torch.ones(length, length, dtype=torch.bool).triu(1)
        states = [self.words(decoder_input_ids)]
        for stone in self.pile:
            hidden = states[-1]
            states.append(stone(hidden, stone.key(hidden), stone.value(hidden), unseen, source, mask))
        states[-1] = self.polish(states[-1])
        logits = self.out(states[-1])
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return Seq2SeqLMOutput(
            loss=loss, logits=logits, decoder_hidden_states=tuple(states) if output_hidden_states else None
        )


class PebbleState(DecoderState):
    def __init__(self, num_layers, source, source_mask):
        super().__init__(num_layers)
        self.source, self.source_mask = source, source_mask
        self.rows = [None] * num_layers  # keys and values of each layer, (B, N, D) both

    def hold(self, layer, keys, values):
        """Append (B, Q, D) keys/values to the first `lengths[layer]`; return all."""
        past = self.lengths[layer]
        if past:
            keys, values = (torch.cat([old[:, :past], new], 1)
                            for old, new in zip(self.rows[layer], (keys, values), strict=True))  # fmt: skip
        self.rows[layer], self.lengths[layer] = (keys, values), keys.shape[1]
        return keys, values


class PebbleView:
    """The protocol's members by name; everything else is private."""

    def __init__(self, model):
        self.model, self.num_layers, self.mixes_windows = model, len(model.pile), False
        self.max_positions = None
        self.exit_adapter = None

    def read(self, input_ids, attention_mask):
        encoder_outputs = self.model.reader(input_ids, attention_mask)
        return ModelInputs({"encoder_outputs": encoder_outputs, "attention_mask": attention_mask}, None)

    def begin(self, cache, *, encoder_outputs, attention_mask=None):
        source = encoder_outputs[0]
        mask = source.new_ones(source.shape[:2]) if attention_mask is None else attention_mask
        return PebbleState(self.num_layers, source, mask)

    def embed(self, state, token_ids):
        return self.model.words(token_ids)

    def run_layers(self, state, hidden, start, stop, *, causal=True):
        for layer in range(start, stop):
            stone, new = self.model.pile[layer], hidden.shape[1]
            keys, values = state.hold(layer, stone.key(hidden), stone.value(hidden))
            unseen = torch.ones(new, keys.shape[1], dtype=torch.bool).triu(keys.shape[1] - new + 1)
            hide = unseen if causal else torch.zeros_like(unseen)
            hidden = stone(hidden, keys, values, hide, state.source, state.source_mask)
        return hidden

    def read_exit(self, state, hidden, layer):
        return hidden

    def write_kv(self, state, hidden, start, stop):
        for layer in range(start, stop):
            state.hold(layer, self.model.pile[layer].key(hidden), self.model.pile[layer].value(hidden))

    def deliver_cache(self, state, cache):
        raise NotImplementedError("Nobody asked for one.")

    def predict(self, hidden, layer):
        return self.model.out(self.model.polish(hidden))

    def normalize(self, hidden, layer):
        return self.model.polish(hidden)

    def project(self, normalized):
        return self.model.out(normalized)

    def projection_onto(self, token_ids):
        weight = self.model.out.weight.detach()[token_ids]
        return lambda normalized: F.linear(normalized, weight)

    def training_states(self, outputs):
        return outputs.decoder_hidden_states

    def training_labels(self, labels):
        return labels

    def keep_all_layers(self):
        return False


class OnlyTheProtocol:
    """A view that has the protocol's members and no other attribute, whoever asks."""

    def __init__(self, model):
        self._view = PebbleView(model)
        for name in PROTOCOL:
            setattr(self, name, getattr(self._view, name))


def register_with_transformers():
    AutoConfig.register(FAMILY, PebbleConfig, exist_ok=True)
    AutoModelForSeq2SeqLM.register(PebbleConfig, PebbleForConditionalGeneration, exist_ok=True)
