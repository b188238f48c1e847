"""The options of `generate` with which programs decode, whatever a checkpoint's generation config says."""

from __future__ import annotations

from typing import Any

# What shapes the text (penalties, shortest length, forced tokens) stays the checkpoint's.
SETTLED = {
    "do_sample": False,
    "max_new_tokens": None,
    "max_time": None,
    "num_return_sequences": 1,
    "penalty_alpha": None,
    "dola_layers": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "cache_implementation": None,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict_in_generate": False,
}


def greedy_options(limit: dict[str, Any]) -> dict[str, Any]:
    """The options of `generate` for one greedy sequence up to a limit, such as `output_limit` gives."""
    return SETTLED | {"num_beams": 1} | limit
