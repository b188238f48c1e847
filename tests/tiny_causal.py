"""Tiny random decoder-only models of every family, and prompts for them, padded on the left."""

from __future__ import annotations

import torch
import transformers
from tiny_models import VOCABULARY
from transformers import PreTrainedModel

from models.decoding import early_exit_decode

LAYERS = 6
SETTINGS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # which ONNX Runtime's attention rotates by itself, as it does those of real models
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
GPT2 = {"n_embd": 32, "n_head": 4, "n_inner": 48, "n_positions": 64}
NEOX = {"num_attention_heads": 4, "head_dim": 8, "attention_dropout": 0.0, "hidden_dropout": 0.0}
HALF_ROTATED = {"hidden_size": 64, "num_attention_heads": 2, "head_dim": 32, "rotary_pct": 0.5}
OPT = {"ffn_dim": 48, "num_attention_heads": 4, "dropout": 0.0, "init_std": 0.3, "word_embed_proj_dim": 32}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
NARROW = {"sliding_window": 5}  # shorter than the prompts
GEMMA = {"query_pre_attn_scalar": 8, **NARROW}
# Class prefix, and what differs from the settings above.
CAUSAL_SHAPES = {
    "llama-tied": ("Llama", TIED),
    "llama-untied": ("Llama", UNTIED | {"num_key_value_heads": 4, "attention_bias": True, "head_dim": 8}),
    "mistral": ("Mistral", UNTIED | {"sliding_window": None}),
    "mistral-window": ("Mistral", TIED | NARROW),
    "qwen2": ("Qwen2", TIED),
    "qwen2-window": ("Qwen2", UNTIED | NARROW | {"use_sliding_window": True, "max_window_layers": 3}),
    "qwen3": ("Qwen3", TIED),
    "smollm3": ("SmolLM3", TIED | {"no_rope_layer_interval": 3}),
    "gemma": ("Gemma", TIED),
    "gemma2": ("Gemma2", TIED | GEMMA | {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3", TIED | GEMMA | {"sliding_window_pattern": 3}),
    "gpt2-tied": ("GPT2", TIED | GPT2 | {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2-untied": ("GPT2", UNTIED | GPT2),
    "pythia": ("GPTNeoX", UNTIED | NEOX),
    "neox-serial": ("GPTNeoX", TIED | NEOX | {"use_parallel_residual": False} | HALF_ROTATED),
    "opt-tied": ("OPT", TIED | OPT),
    "opt-350m": ("OPT", UNTIED | OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
}
CONFIGS, MODELS = {"Gemma3": "Gemma3Text"}, {"GPT2": "GPT2LMHeadModel"}  # of other names than their kind
CAUSAL_FAMILIES = (  # one each
    "llama-tied", "mistral-window", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3",
    "gpt2-tied", "pythia", "opt-350m",
)  # fmt: skip


def tiny_causal(
    shape: str = "llama-tied", num_layers: int = LAYERS, seed: int = 0, **overrides
) -> PreTrainedModel:
    prefix, differences = CAUSAL_SHAPES[shape]
    settings = (
        SETTINGS | differences | {"vocab_size": VOCABULARY, "num_hidden_layers": num_layers} | overrides
    )
    torch.manual_seed(seed)
    config = getattr(transformers, f"{CONFIGS.get(prefix, prefix)}Config")(**settings)
    model = getattr(transformers, MODELS.get(prefix, f"{prefix}ForCausalLM"))(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:  # norms and biases, alike after initialisation
                weight.add_(torch.randn_like(weight) * 0.1)
    return model.eval()


def prompts(batch: int = 1, length: int = 9, seed: int = 1) -> dict[str, torch.Tensor]:
    """Random ids (B, P); every row but the first is padded on the left, and so is a lone one."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(2, VOCABULARY, (batch, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    for row in range(batch):
        padding = 3 if batch == 1 else min(row, length - 2)
        input_ids[row, :padding] = attention_mask[row, :padding] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def greedy_causal(model, inputs, **options) -> torch.Tensor:
    """What Hugging Face decodes."""
    return model.generate(**inputs, **{"do_sample": False, "max_new_tokens": 12} | options)


def decode_causal(model, inputs, policy=None, stats=None, **options):
    """What the engine decodes."""
    engine = {"custom_generate": early_exit_decode, "exit_policy": policy, "decode_stats": stats}
    return greedy_causal(model, inputs, **engine, **options)
