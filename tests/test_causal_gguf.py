"""`.gguf` files, written as llama.cpp's converter does: loaded, decoded, saved as plain; or refused."""

from __future__ import annotations

import gguf
import pytest
import torch
from tiny_causal import greedy_causal, prompts, tiny_causal

from models import Free, SoftmaxGap, UserError, load_model

GGUF_NAMES = {  # llama.cpp's, of what Hugging Face calls otherwise
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
    "lm_head": "output",
}


def write_gguf(model, path):
    """What llama.cpp's converter writes of a Llama: queries and keys reordered for its rotary kernel."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [f"▁{index}" for index in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, weight in model.state_dict().items():
        for theirs, short in GGUF_NAMES.items():
            name = name.replace(theirs, short)
        kind = name.split(".")[-2]
        if kind in heads:
            weight = weight.unflatten(0, (heads[kind], 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(name, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_files_load_decode_and_are_saved_as_plain_models(tmp_path):
    model = tiny_causal("llama-untied", vocab_size=300, attention_bias=False, eos_token_id=2, bos_token_id=1)
    write_gguf(model, tmp_path / "tiny.gguf")
    loaded, inputs = load_model(str(tmp_path / "tiny.gguf")), prompts(2)
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], weight), name
    assert loaded.tokenizer.padding_side == "left" and len(loaded.tokenizer) == 300
    policy = Free(2, SoftmaxGap(), -1.0, lossless=True)
    output = loaded.generate(**inputs, exit_policy=policy, do_sample=False, max_new_tokens=12)
    assert torch.equal(output, greedy_causal(model, inputs, pad_token_id=2))
    loaded.model.save_pretrained(tmp_path / "plain")
    loaded.tokenizer.save_pretrained(tmp_path / "plain")
    again = load_model(str(tmp_path / "plain"))
    assert torch.equal(again.generate(**inputs, do_sample=False, max_new_tokens=12), output)


def test_a_gguf_file_that_is_none_is_refused_by_name(tmp_path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF but not really")
    for name in (path, tmp_path / "missing.gguf"):
        with pytest.raises(UserError, match=f"Cannot load a model from {name}"):
            load_model(str(name))


def test_gguf_files_need_their_package(tmp_path, monkeypatch):
    write_gguf(tiny_causal("llama-untied", vocab_size=300, attention_bias=False), tmp_path / "tiny.gguf")
    monkeypatch.setattr("transformers.modeling_gguf_pytorch_utils.is_gguf_available", lambda *_, **__: False)
    with pytest.raises(UserError, match="needs the package gguf: pip install gguf"):
        load_model(str(tmp_path / "tiny.gguf"))
