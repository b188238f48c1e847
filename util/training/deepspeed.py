"""Training under DeepSpeed: what its sharded weights do not go with, and how models are loaded for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import Seq2SeqTrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from models.errors import UserError
from util.arguments import Arguments


@contextmanager
def loading_whole_weights(training: Seq2SeqTrainingArguments) -> Iterator[None]:
    """Inside, models are loaded as a whole by every process; DeepSpeed shards them when training starts.

    Under ZeRO-3 transformers would load shards, which have no shapes: exit heads are made to fit before.
    """
    plugin = training.deepspeed_plugin
    if plugin is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        plugin.set_deepspeed_weakref()


def refuse_under_deepspeed(arguments: Arguments) -> None:
    """Raise UserError for what needs whole weights, where DeepSpeed shards them."""
    training = arguments.training
    if training.deepspeed_plugin is None or training.deepspeed_plugin.zero_stage < 3:
        return
    asked = {
        "--do_eval": training.do_eval,  # which any --eval_strategy switches on
        "--do_predict": training.do_predict,
        "--use_muon": arguments.loss.use_muon,
        "--use_lora": arguments.lora.use_lora,
    }
    unfit = " ".join(name for name, wanted in asked.items() if wanted)
    if unfit:
        raise UserError(
            f"{unfit}: needs whole weights, which ZeRO-3 shards. Leave it out, and --eval_strategy, and "
            "evaluate in a run of its own."
        )
