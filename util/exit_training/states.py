"""Step 2: what the frozen layers make of each text: the exit reads the one state and is taught the other.

`StateFiles` hold them on disk, computed once; one safetensors file a shard, and an interrupted run goes on
with the next. `FreshStates` computes them for every batch anew, which a GPU does faster than a disk reads.

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
from typing import Any, Protocol

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
LOGIT_ROWS = 1024  # tokens whose logits over the whole vocabulary are held at once


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


class States(Protocol):
    """Of texts by number."""

    sizes: list[int]  # predicted tokens of each text

    def rows(self, numbers: Sequence[int]) -> list[Row]: ...


@dataclass
class FreshStates:
    """What `view` makes of the texts whenever they are asked for."""

    view: DecoderView
    texts: Sequence[Text]
    layers: Sequence[int]
    start: Start

    @property
    def sizes(self) -> list[int]:
        return [len(text.output_ids) + self.start.learnt(text) for text in self.texts]

    @torch.no_grad()
    def rows(self, numbers: Sequence[int]) -> list[Row]:
        return read_texts(self.view, [self.texts[number] for number in numbers], self.layers, self.start)


@dataclass
class StateFiles:
    """Rows as they are read from their shards."""

    folder: Path
    layers: Sequence[int]
    outputs: list[int]  # tokens of each row's output
    sizes: list[int]

    def rows(self, numbers: Sequence[int]) -> list[Row]:
        return [self.row(number) for number in numbers]

    def row(self, number: int) -> Row:
        with safe_open(shard_path(self.folder, number // SHARD_ROWS), "pt") as shard:
            read = {name: shard.get_tensor(f"{number}.{name}") for name in ("final", "log_sum", "tokens")}
            hidden = {layer: shard.get_tensor(f"{number}.{layer}") for layer in self.layers}
            memory = f"{number}.memory"
            source = shard.get_tensor(memory) if memory in shard.keys() else None  # noqa: SIM118
        return Row(hidden, **read, outputs=self.outputs[number], memory=source)


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
        (row,) = read_texts(view, [text], layers, start)
        yield f"{number}.final", halve(row.final)
        yield f"{number}.log_sum", row.log_sum.clone()
        yield f"{number}.tokens", row.tokens.clone()
        for layer, hidden in row.hidden.items():
            yield f"{number}.{layer}", halve(hidden)
        if row.memory is not None:
            yield f"{number}.memory", halve(row.memory)


def halve(states: Tensor) -> Tensor:
    return states.clamp(-LARGEST, LARGEST).half().contiguous()


def read_texts(view: DecoderView, texts: Sequence[Text], layers: Sequence[int], start: Start) -> list[Row]:
    """One pass of the frozen layers over B texts, padded on the right, where it changes nothing."""
    state, memory = begin_reading(view, texts, start)
    before = [text.input_ids if start.token is None else [start.token] for text in texts]
    sequences = [[*ids, *text.output_ids[:-1]] for ids, text in zip(before, texts, strict=True)]
    hidden, kept = view.embed(state, pad_ids(sequences).to(view.model.device)), {}  # (B, T, D)
    for first, stop in pairwise([0, *layers, view.num_layers]):
        hidden = view.run_layers(state, hidden, first, stop)
        kept[stop] = hidden
    last, rows = kept.pop(view.num_layers), []
    for number, (text, sequence) in enumerate(zip(texts, sequences, strict=True)):
        predicted = len(text.output_ids) + start.learnt(text)
        final = view.normalize(last[number, len(sequence) - predicted : len(sequence)], view.num_layers)
        own = {layer: states[number, : len(sequence)] for layer, states in kept.items()}
        source = None if memory is None else memory[number, : len(text.input_ids)]
        log_sum, tokens = read_logits(view, final)
        rows.append(Row(own, final, log_sum, tokens, len(text.output_ids), source))
    return rows


def begin_reading(view: DecoderView, texts: Sequence[Text], start: Start) -> tuple[Any, Tensor | None]:
    """A state before the first token, and what an encoder makes of the sources, (B, S, D)."""
    device = view.model.device
    ids = pad_ids([text.input_ids for text in texts]).to(device)
    # What pads a prompt on the right is seen by no token before it; a source's is.
    real = [[1] * (ids.shape[1] if start.token is None else len(text.input_ids)) for text in texts]
    inputs = view.read(ids, pad_ids(real).to(device))
    memory = inputs.arguments.get("encoder_outputs")
    return view.begin(None, **inputs.arguments), None if memory is None else memory[0]


def read_logits(view: DecoderView, final: Tensor) -> tuple[Tensor, Tensor]:
    """Of states (N, D) that the LM head reads: logarithms of their logits' sums, and the best tokens."""
    parts = [view.project(part).float() for part in final.split(LOGIT_ROWS)]
    return torch.cat([part.logsumexp(-1) for part in parts]), torch.cat([part.argmax(-1) for part in parts])


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
    hidden = {layer: pad([row.hidden[layer] for row in rows]).to(device).float() for layer in rows[0].hidden}
    final, log_sum, tokens = (
        torch.cat([getattr(row, name) for row in rows]).to(device) for name in ("final", "log_sum", "tokens")
    )
    outputs = torch.cat([torch.arange(len(row.tokens)) >= len(row.tokens) - row.outputs for row in rows])
    arguments: dict[str, Any] = {}
    if isinstance(view, EncoderDecoderView):
        memories = [row.memory for row in rows if row.memory is not None]
        mask = pad([torch.ones(len(memory), dtype=torch.long) for memory in memories])
        memory = BaseModelOutput(last_hidden_state=pad(memories).to(device).float())
        arguments = {"encoder_outputs": memory, "attention_mask": mask.to(device)}
    starts = typical_runs(lengths) if generator is None else draw_runs(lengths, generator)
    return Batch(
        hidden, predicting, final.float(), log_sum, tokens, outputs.to(device), starts.to(device), arguments
    )


def pad(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def pad_ids(rows: list[list[int]]) -> Tensor:
    return pad([torch.tensor(row) for row in rows])
