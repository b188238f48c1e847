"""A checkpoint's tokenizer, checked against the model's vocabulary and set up for its kind of model."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from models.checkpoint_files import LOADING_ERRORS, find_file, first_line, split_gguf
from models.errors import UserError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")  # beside those that a tokenizer's class names


def load_tokenizer(
    name: str, vocab_size: int, target_vocab_size: int | None = None, *, prompts: bool = False, **hub: Any
) -> PreTrainedTokenizerBase:
    """Load a tokenizer, also from the lone `spiece.model` of original FREE checkpoints or a `.gguf` file.

    It returns ids and mask alone, whatever else its class would add (BERT's token_type_ids). `prompts` are
    what decoder-only models read: padded on the left, with the end token if there is none for padding.

    Raises:
        UserError: there is none, or it has more tokens than the model's vocabulary.
    """
    home, gguf = split_gguf(name)
    file = {} if gguf is None else {"gguf_file": gguf}
    try:
        tokenizer = AutoTokenizer.from_pretrained(home, trust_remote_code=False, **file, **hub)
    except LOADING_ERRORS as error:
        raise UserError(f"Cannot load a tokenizer from {name}: {first_line(error)}") from error
    if gguf is None and not has_vocabulary(tokenizer, name, **hub):
        raise UserError(f"{name} has no tokenizer. Name its base model's as tokenizer_name.")
    target_tokens = getattr(tokenizer, "target_encoder", ())  # where source and target have their own
    # Gemma 3's text models share a tokenizer with their siblings, whose tokens for images they lack.
    source_tokens = tokenizer.vocab_size if prompts else len(tokenizer)
    sizes = (source_tokens, vocab_size), (len(target_tokens), target_vocab_size or vocab_size)
    for tokens, size in sizes:
        if tokens > size:
            raise UserError(f"{name} has {tokens} tokens, but the model a vocab_size of {size}.")
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    if prompts:
        tokenizer.padding_side = "left"
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def has_vocabulary(tokenizer: PreTrainedTokenizerBase, name: str, **hub: Any) -> bool:
    """Whether there is a file that the tokenizer's class reads; without one, transformers makes an empty
    tokenizer of the model's usual class. Classes of byte-level tokenizers need no file, but to be named."""
    files = tokenizer.vocab_files_names.values() or ("tokenizer_config.json",)
    return any(find_file(name, file, **hub) is not None for file in {*files, *TOKENIZER_FILES})
