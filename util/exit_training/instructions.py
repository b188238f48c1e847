"""Instructions that a chat model writes itself: asked to go on where a user begins to speak, it invents what
users ask (Magpie: Xu et al., 2025), which no list of ours would cover.

    prompts = write_instructions(loaded, 1000, batch_size=256, seed=0)
"""

from __future__ import annotations

from typing import Any

import torch

from models.errors import UserError
from models.exit_policy import FullDepth
from models.loading import LoadedModel
from models.prompts import message, require_chat_template
from util.exit_training.texts import end_tokens, until_end
from util.generate_options import greedy_options
from util.progress import Progress

PLACE = "\N{OBJECT REPLACEMENT CHARACTER}"
LONGEST = 96  # tokens
FEWEST_CHARACTERS = 12
SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 0}


def write_instructions(loaded: LoadedModel, count: int, batch_size: int, seed: int) -> list[str]:
    """At most `count` of them, each once: what repeats or comes to no end is left out.

    Raises:
        UserError: the tokenizer has no chat template, or one that does not show what a user says.
    """
    require_chat_template(loaded.tokenizer, "--self_instructed")
    torch.manual_seed(seed)
    begun = loaded.tokenizer(before_user(loaded), add_special_tokens=False, return_tensors="pt")
    begun = begun.to(loaded.model.device)
    ends, found = end_tokens(loaded), dict[str, None]()
    with Progress("Writing instructions", count, "row") as progress:
        for first in range(0, count, batch_size):
            rows = min(batch_size, count - first)
            inputs = {name: ids.repeat(rows, 1) for name, ids in begun.items()}
            options = greedy_options({"max_new_tokens": LONGEST}) | SAMPLING
            outputs = loaded.generate(**inputs, **options, exit_policy=FullDepth())
            written = [until_end(row, ends) for row in outputs[:, begun["input_ids"].shape[1] :]]
            ended = [tokens[:-1] for tokens in written if tokens[-1] in ends]
            texts = map(str.strip, loaded.tokenizer.batch_decode(ended, skip_special_tokens=True))
            found |= dict.fromkeys(text for text in texts if len(text) >= FEWEST_CHARACTERS)
            progress.update(rows)
    return list(found)


def before_user(loaded: LoadedModel) -> str:
    """The chat template up to where a user's first message begins."""
    whole = loaded.tokenizer.apply_chat_template([message("user", PLACE)], tokenize=False)
    if PLACE not in whole:
        raise UserError("--self_instructed: the tokenizer's chat template leaves out what a user says.")
    return whole.partition(PLACE)[0]
