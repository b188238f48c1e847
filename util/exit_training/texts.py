"""Step 1: what the frozen model itself answers to the user's prompts, the text on which its exit is taught.

A log of token ids, one line a row, which an interrupted run continues.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor

from models.errors import UserError
from models.exit_policy import FullDepth
from models.json_files import fits
from models.loading import LoadedModel
from util.data.encoding import Encoder
from util.files import JsonLog
from util.generate_options import greedy_options
from util.progress import Progress


@dataclass
class Text:
    """Token ids of a prompt or source, and of what follows it, with its end."""

    input_ids: list[int]
    output_ids: list[int]

    @classmethod
    def from_row(cls, row: dict[str, Any], place: str) -> Text:
        values = [row.get("input_ids"), row.get("output_ids")]
        if not all(fits(value, list[int]) for value in values):
            raise UserError(f"{place} is no text of token ids; take the file away to begin anew.")
        return cls(row["input_ids"], row["output_ids"])


def answer_prompts(
    loaded: LoadedModel,
    encoder: Encoder,
    examples: Dataset,
    path: Path,
    groups: list[list[int]],
    max_length: int,
) -> list[Text]:
    """The model's own greedy outputs for all sources, in the order of `groups`, which are decoded together;
    from the log at `path` as far as it goes."""
    sources = list(examples["source"])
    with JsonLog(path) as log:
        done = keep_whole_groups(log, groups)
        with Progress("Generating", len(sources), "row", len(log.rows)) as progress:
            for group in groups[done:]:
                log.append(map(vars, answer(loaded, encoder, [sources[row] for row in group], max_length)))
                progress.update(len(group))
        return [Text.from_row(row, f"{path}, line {number}") for number, row in enumerate(log.rows, 1)]


def keep_whole_groups(log: JsonLog, groups: list[list[int]]) -> int:
    """How many groups an earlier run logged as a whole; what it logged of another leaves the log."""
    ends = list(accumulate(map(len, groups)))
    done = bisect_right(ends, len(log.rows))
    rows = ends[done - 1] if done else 0
    if rows < len(log.rows):
        log.keep(log.rows[:rows])
    return done


def group_alike(sources: list[str], size: int, held_out: int) -> list[list[int]]:
    """Rows in groups of sources alike in length, in no order; the last `held_out` rows stay last."""
    taught, groups = len(sources) - held_out, []
    for rows in (range(taught), range(taught, len(sources))):
        order = sorted(rows, key=lambda row: (len(sources[row]), row))
        own = [order[start : start + size] for start in range(0, len(order), size)]
        random.Random(0).shuffle(own)
        groups += own
    return groups


def answer(loaded: LoadedModel, encoder: Encoder, sources: list[str], max_length: int) -> Iterator[Text]:
    inputs = encoder.inputs(sources).to(loaded.model.device)
    limit = encoder.output_limit(max_length)
    outputs = loaded.generate(**inputs, **greedy_options(limit), exit_policy=FullDepth())
    start = encoder.output_start(inputs["input_ids"])
    ends = end_tokens(loaded)
    for ids, mask, sequence in zip(inputs["input_ids"], inputs["attention_mask"], outputs, strict=True):
        yield Text(ids[mask.bool()].tolist(), until_end(sequence[start:], ends))


def given_targets(encoder: Encoder, examples: Dataset) -> list[Text]:
    """The data's own targets in the place of outputs."""
    sources, targets = list(examples["source"]), list(examples["target"])
    outputs = encoder.targets({"source": sources, "target": targets})
    inputs = [row[0] for row in (encoder.inputs([source])["input_ids"].tolist() for source in sources)]
    return [Text(ids, output) for ids, output in zip(inputs, outputs, strict=True)]


def end_tokens(loaded: LoadedModel) -> set[int]:
    ends = loaded.model.generation_config.eos_token_id
    return set(ends) if isinstance(ends, list) else {ends}


def until_end(sequence: Tensor, ends: set[int]) -> list[int]:
    """The tokens up to the first that ends an output, with it."""
    tokens = sequence.tolist()
    length = next((place for place, token in enumerate(tokens, 1) if token in ends), len(tokens))
    return tokens[:length]
