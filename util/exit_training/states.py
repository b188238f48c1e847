"""Step 2: what the frozen layers make of each text, once, on disk: the exit reads the one state and is taught
the other. One safetensors file a shard; an interrupted run goes on with the next.

T tokens of a text, N of them predicted (the last ones: outputs, and prompts where they are learnt from), S
tokens of its source, D width.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from models.decoder_view import DecoderView
from models.families.encoder_decoder import EncoderDecoderView
from util.exit_training.runs import draw_runs, typical_runs
from util.exit_training.texts import Text
from util.progress import Progress

SHARD_ROWS = 64
LARGEST = torch.finfo(torch.float16).max


@dataclass
class Start:
    """Where what is predicted begins: after a start token of models with an encoder, else after a prompt,
    whose own tokens may be learnt from as well."""

    token: int | None
    with_prompt: bool = False

    def learnt(self, text: Text) -> int:
        """Tokens of the prompt that are predicted: all but its first."""
        return len(text.input_ids) - 1 if self.token is None and self.with_prompt else 0


@dataclass
class Row:
    """What one text is taught by."""

    hidden: dict[int, Tensor]  # (T, D) after each layer that an exit reads
    final: Tensor  # (N, D) that the LM head reads after all layers
    log_sum: Tensor  # (N,) logarithm of the sum of its exponentiated logits
    tokens: Tensor  # (N,) the last layer's own
    outputs: int  # of the N, how many are outputs
    memory: Tensor | None = None  # (S, D) of an encoder


@dataclass
class StateFiles:
    """Rows by number, read from their shards as they are needed."""

    folder: Path
    layers: Sequence[int]
    outputs: list[int]  # tokens of each row's output
    sizes: list[int]  # predicted tokens of each row

    def row(self, number: int) -> Row:
        with safe_open(shard_path(self.folder, number // SHARD_ROWS), "pt") as shard:
            read = {name: shard.get_tensor(f"{number}.{name}") for name in ("final", "log_sum", "tokens")}
            hidden = {layer: shard.get_tensor(f"{number}.{layer}").float() for layer in self.layers}
            memory = f"{number}.memory"
            source = shard.get_tensor(memory).float() if memory in shard.keys() else None  # noqa: SIM118
        outputs = self.outputs[number]
        return Row(hidden, read["final"].float(), read["log_sum"], read["tokens"], outputs, source)


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.safetensors"


def compute_states(
    view: DecoderView, texts: Sequence[Text], layers: Sequence[int], folder: Path, start: Start
) -> StateFiles:
    """Write the shards that are missing."""
    folder = folder / "-".join([*map(str, layers), *["prompts"] * start.with_prompt])  # others lie apart
    folder.mkdir(parents=True, exist_ok=True)
    with Progress("Reading states", len(texts), "row") as progress:
        for first in range(0, len(texts), SHARD_ROWS):
            rows = texts[first : first + SHARD_ROWS]
            path = shard_path(folder, first // SHARD_ROWS)
            if not path.exists():
                write_shard(path, dict(shard_tensors(view, rows, layers, start, first)))
            progress.update(len(rows))
    outputs = [len(text.output_ids) for text in texts]
    prompts = [start.learnt(text) for text in texts]
    sizes = [output + prompt for output, prompt in zip(outputs, prompts, strict=True)]
    return StateFiles(folder, layers, outputs, sizes)


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """At once, so that no kill leaves half of it."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file(tensors, temporary)
    temporary.replace(path)


@torch.inference_mode()
def shard_tensors(
    view: DecoderView, texts: Sequence[Text], layers: Sequence[int], start: Start, first: int
) -> Iterator[tuple[str, Tensor]]:
    for number, text in enumerate(texts, first):
        row = read_text(view, text, layers, start)
        yield f"{number}.final", halve(row.final)
        yield f"{number}.log_sum", row.log_sum.clone()
        yield f"{number}.tokens", row.tokens.clone()
        for layer, hidden in row.hidden.items():
            yield f"{number}.{layer}", halve(hidden)
        if row.memory is not None:
            yield f"{number}.memory", halve(row.memory)


def halve(states: Tensor) -> Tensor:
    return states.clamp(-LARGEST, LARGEST).half().contiguous()


def read_text(view: DecoderView, text: Text, layers: Sequence[int], start: Start) -> Row:
    """One pass of the frozen layers over a text, all of its tokens known."""
    device = view.model.device
    ids = torch.tensor([text.input_ids], device=device)
    inputs = view.read(ids, torch.ones_like(ids))
    before = text.input_ids if start.token is None else [start.token]
    sequence = torch.tensor([[*before, *text.output_ids[:-1]]], device=device)  # (1, T)
    state = view.begin(None, **inputs.arguments)
    hidden, kept = view.embed(state, sequence), {}
    for first, stop in pairwise([0, *layers, view.num_layers]):
        hidden = view.run_layers(state, hidden, first, stop)
        kept[stop] = hidden[0]
    outputs, prompt = len(text.output_ids), start.learnt(text)
    final = view.normalize(kept.pop(view.num_layers)[-outputs - prompt :], view.num_layers)  # (N, D)
    logits = view.project(final).float()
    memory = inputs.arguments.get("encoder_outputs")
    source = None if memory is None else memory[0][0]
    return Row(kept, final, logits.logsumexp(-1), logits.argmax(-1), outputs, source)


@dataclass
class Batch:
    """B texts, padded on the right; N predicted tokens of them all."""

    hidden: dict[int, Tensor]  # (B, T, D)
    predicting: Tensor  # (B, T) bool, where the states of the N tokens are
    final: Tensor  # (N, D)
    log_sum: Tensor  # (N,)
    tokens: Tensor  # (N,)
    outputs: Tensor  # (N,) bool: whether a token is one of an output
    run_starts: Tensor  # (B, T) where the run begins in which a token waits
    arguments: dict[str, Any]  # of the view's `begin`


def make_batch(view: DecoderView, rows: Sequence[Row], generator: random.Random | None = None) -> Batch:
    """`generator`: of the runs' lengths; None: all are typical."""
    device = view.model.device
    lengths = [len(next(iter(row.hidden.values()))) for row in rows]
    predicting = torch.zeros(len(rows), max(lengths), dtype=torch.bool, device=device)
    for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        predicting[place, length - len(row.tokens) : length] = True
    hidden = {layer: pad([row.hidden[layer] for row in rows]).to(device) for layer in rows[0].hidden}
    final, log_sum, tokens = (
        torch.cat([getattr(row, name) for row in rows]).to(device) for name in ("final", "log_sum", "tokens")
    )
    outputs = torch.cat([torch.arange(len(row.tokens)) >= len(row.tokens) - row.outputs for row in rows])
    arguments: dict[str, Any] = {}
    if isinstance(view, EncoderDecoderView):
        memories = [row.memory for row in rows if row.memory is not None]
        mask = pad([torch.ones(len(memory), dtype=torch.long) for memory in memories])
        memory = BaseModelOutput(last_hidden_state=pad(memories).to(device))
        arguments = {"encoder_outputs": memory, "attention_mask": mask.to(device)}
    starts = typical_runs(lengths) if generator is None else draw_runs(lengths, generator)
    return Batch(hidden, predicting, final, log_sum, tokens, outputs.to(device), starts.to(device), arguments)


def pad(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
