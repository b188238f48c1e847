"""Tiny random models of every family, built from configs, and padded inputs for them."""

from __future__ import annotations

import torch
import transformers
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

VOCABULARY = 97
T5_SETTINGS = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 6,
    "dropout_rate": 0.0,
    "initializer_factor": 1.0,
}
BART_SETTINGS = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 6,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "init_std": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "forced_eos_token_id": None,
    "forced_bos_token_id": None,
}
# Class prefix, and what differs from the family's settings above.
SHAPES = {
    "t5-tied": ("T5", {"feed_forward_proj": "relu", "tie_word_embeddings": True}),
    "t5-untied": ("T5", {"feed_forward_proj": "relu", "tie_word_embeddings": False}),
    "t5v1.1-untied": ("T5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": ("MT5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "umt5": ("UMT5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "longt5-local": ("LongT5", {"encoder_attention_type": "local", "local_radius": 4}),
    "longt5-tglobal": (
        "LongT5",
        {
            "encoder_attention_type": "transient-global",
            "local_radius": 4,
            "global_block_size": 4,
            "tie_word_embeddings": False,
        },
    ),
    "bart-tied": ("Bart", {"scale_embedding": False}),
    "bart-untied": ("Bart", {"scale_embedding": True, "tie_word_embeddings": False}),
    "mbart": ("MBart", {"scale_embedding": True}),
    "pegasus": ("Pegasus", {"scale_embedding": True, "tie_word_embeddings": False}),
    "marian": ("Marian", {"scale_embedding": True, "decoder_vocab_size": VOCABULARY}),
}
FAMILIES = ("t5-tied", "mt5", "umt5", "longt5-tglobal", "bart-tied", "mbart", "pegasus", "marian")  # one each


def tiny_model(shape: str = "t5-tied", num_layers: int = 6, seed: int = 0, **overrides) -> PreTrainedModel:
    """A random model with fewer encoder than decoder layers, which plain `generate` of T5 stumbles over."""
    prefix, differences = SHAPES[shape]
    is_t5 = "T5" in prefix
    settings = {"vocab_size": VOCABULARY, "decoder_start_token_id": 0}
    settings |= T5_SETTINGS if is_t5 else BART_SETTINGS
    settings |= {"num_decoder_layers" if is_t5 else "decoder_layers": num_layers}
    settings |= differences | overrides
    suffix = "MTModel" if prefix == "Marian" else "ForConditionalGeneration"
    torch.manual_seed(seed)
    config = getattr(transformers, f"{prefix}Config")(**settings)
    model = getattr(transformers, prefix + suffix)(config).eval()
    if is_t5 and differences.get("tie_word_embeddings") is False:  # the config ties them all the same
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    if not is_t5:  # zero after initialisation, but not in released checkpoints
        torch.nn.init.normal_(model.final_logits_bias)
    return model


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
    return model.generate(**inputs, cache=empty_cache(), do_sample=False, **options)
