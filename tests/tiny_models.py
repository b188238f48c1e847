"""Tiny random models, built from configs, and padded inputs for them."""

from __future__ import annotations

import torch
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 97
T5_SHAPES = {
    "t5-tied": {"feed_forward_proj": "relu", "tie_word_embeddings": True},
    "t5-untied": {"feed_forward_proj": "relu", "tie_word_embeddings": False},
    "t5v1.1-untied": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "mt5": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}


def tiny_t5(shape: str = "t5-tied", num_layers: int = 6, seed: int = 0, **overrides):
    """A random model with fewer encoder than decoder layers, which plain `generate` stumbles over."""
    settings = {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_heads": 4,
        "num_layers": 2,
        "num_decoder_layers": num_layers,
        "dropout_rate": 0.0,
        "initializer_factor": 1.0,
        "decoder_start_token_id": 0,
    }
    settings |= T5_SHAPES[shape] | overrides
    torch.manual_seed(seed)
    if shape == "mt5":
        return MT5ForConditionalGeneration(MT5Config(**settings)).eval()
    return T5ForConditionalGeneration(T5Config(**settings)).eval()


def padded_inputs(batch: int = 1, length: int = 11, seed: int = 1) -> dict[str, torch.Tensor]:
    """Random sources; every row but the first is padded on the right, and so is a lone one."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(2, VOCABULARY, (batch, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    for row in range(batch):
        padding = 3 if batch == 1 else min(row, length - 2)
        if padding:
            input_ids[row, -padding:] = 0
            attention_mask[row, -padding:] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def empty_cache() -> EncoderDecoderCache:
    """For plain `generate`, whose own cache is sized by the encoder's depth."""
    return EncoderDecoderCache(DynamicCache(), DynamicCache())


def greedy(model, inputs, **options) -> torch.Tensor:
    """What Hugging Face decodes."""
    return model.generate(**inputs, past_key_values=empty_cache(), do_sample=False, **options)
