"""Make the prompts on which checkpoints/smollm2-135m-exit was taught: dialogues and parts of them to be
summed up, sentences to be translated, questions, passages to be explained, and instructions, some of them
written by the model itself.

    python scripts/make_exit_prompts.py --data_dir FOLDER --output_file save/exit_prompts.jsonl

The last rows, those that scripts/train_exit.py holds out, are dialogues of another split.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.exit_training.flags import ExitPromptArguments
from util.flag_help import answer_help

if __name__ == "__main__":
    answer_help((ExitPromptArguments,), __doc__)  # before datasets is imported

from util.console import command, prepare_console
from util.data.sources import columns_of, load_rows, peek
from util.data_arguments import DataArguments
from util.files import locked_output_file, write_json_lines
from util.flags import parse_groups, require
from util.tasks import DATASETS, TASKS

COLUMNS = {"samsum": ["dialogue"], "iwslt2017": ["translation"], "squad": ["question", "context"]}
LONGEST = {"dialogue": 1000, "part": 900, "sentence": 300, "passage": 500}  # characters
SHORTEST_PART, LONGEST_PART = 4, 14  # turns
FEWEST_TURNS = 6  # of a dialogue that is worth taking apart
REQUESTS = (
    "Name three ways to {}.",
    "Explain in two sentences how to {}.",
    "Write a short letter to a friend about how to {}.",
    "What are the advantages of learning to {}?",
    "Give me a step by step guide to {}.",
)
ACTIVITIES = [
    "cook pasta",
    "save energy",
    "learn a language",
    "repair a bicycle",
    "grow tomatoes",
    "write a poem",
    "sleep better",
    "train a dog",
    "plan a trip",
    "paint a wall",
    "start a business",
    "read faster",
    "play chess",
    "make new friends",
    "stay healthy",
    "write clean code",
    "bake bread",
    "save money",
    "speak in public",
    "prepare for an interview",
    "take good photographs",
    "teach children mathematics",
    "swim safely",
    "reduce waste",
    "build a bookshelf",
    "choose a laptop",
    "understand music",
    "run a marathon",
    "care for houseplants",
    "organize a party",
]


def main(argv: list[str] | None = None) -> None:
    with command():
        (flags,) = parse_groups((ExitPromptArguments,), __doc__, argv)
        with locked_output_file(Path(flags.output_file)) as path:
            prompts = draw_prompts(flags)
            write_json_lines(path, ({"source": prompt} for prompt in prompts))
        print(f"Wrote {len(prompts)} prompts, the last {flags.held_out} to be held out, to {path}")


def draw_prompts(flags: ExitPromptArguments) -> list[str]:
    """All prompts, those that are held out last."""
    drawn = random.Random(flags.seed)
    held = held_out(flags)
    found = [*summaries(flags, drawn), *others(flags, drawn), *instructions(flags)]
    taught = [prompt for prompt in dict.fromkeys(found) if prompt not in held]
    drawn.shuffle(taught)
    return taught + held


def read(flags: ExitPromptArguments, name: str, split: str) -> Iterator[dict[str, Any]]:
    """Rows of a data set that have all that is read of it.

    Raises:
        UserError: its file could be another data set's, too, or has other columns.
    """
    data = DataArguments(dataset_name=name, data_dir=flags.data_dir)
    rows, origin = load_rows(DATASETS[name], data, split)
    file = Path(origin).name
    require(
        flags.data_dir is None or file.startswith(f"{name}."),
        f"--data_dir {flags.data_dir}: {file} may be any data set's; name that of {name} {name}.{file}.",
    )
    found = columns_of(peek(rows))
    for column in COLUMNS[name]:
        require(column in found, f"{origin}: no column {column!r}; found {', '.join(found)}.")
    yield from (row for row in rows if all(row.get(column) for column in COLUMNS[name]))


def sum_up(dialogue: str) -> str:
    return TASKS["summarization"].message.format(source=dialogue)


def dialogues(flags: ExitPromptArguments, split: str) -> Iterator[str]:
    for row in read(flags, "samsum", split):
        yield row["dialogue"].replace("\r", "").strip()


def summaries(flags: ExitPromptArguments, drawn: random.Random) -> Iterator[str]:
    """Dialogues, and random runs of the turns of each."""
    for dialogue in dialogues(flags, "train"):
        if len(dialogue) < LONGEST["dialogue"]:
            yield sum_up(dialogue)
        turns = dialogue.split("\n")
        for _ in range(flags.parts if len(turns) > FEWEST_TURNS else 0):
            count = drawn.randint(SHORTEST_PART, min(len(turns) - 1, LONGEST_PART))
            start = drawn.randint(0, len(turns) - count)
            part = "\n".join(turns[start : start + count])
            if len(part) < LONGEST["part"]:
                yield sum_up(part)


def others(flags: ExitPromptArguments, drawn: random.Random) -> Iterator[str]:
    """What the exit shall not forget: translation, questions, explanations, instructions."""
    languages = {"source_lang": "German", "target_lang": "English"}
    german = [german_of(row["translation"]) for row in read(flags, "iwslt2017", "train")]
    drawn.shuffle(german)
    fitting = (text for text in german if 40 < len(text) < LONGEST["sentence"])
    for text in islice(fitting, flags.others // 2):
        yield TASKS["translation"].message.format(source=text, **languages)
    squad = list(read(flags, "squad", "train"))
    drawn.shuffle(squad)
    half = flags.others // 4
    yield from (row["question"] for row in squad[:half])
    passages = (row["context"][: LONGEST["passage"]] for row in squad[half : 2 * half])
    yield from (f"Explain this in simple words.\n\n{passage}" for passage in passages)
    yield from (request.format(activity) for activity in ACTIVITIES for request in REQUESTS)


def german_of(pair: Any) -> str:
    known = isinstance(pair, dict) and isinstance(pair.get("de"), str)
    require(known, "iwslt2017.train: a 'translation' must hold its German text under 'de'.")
    return str(pair["de"])


def instructions(flags: ExitPromptArguments) -> list[str]:
    """What the model itself asks in its users' place."""
    if flags.model_name_or_path is None:
        return []
    from models.loading import load_model  # takes torch, which nothing else here needs
    from util.device import move_model
    from util.exit_training.instructions import write_instructions

    prepare_console()  # anew: transformers has been imported
    loaded = load_model(flags.model_name_or_path)
    move_model(loaded.model)
    return write_instructions(loaded, flags.self_instructed, flags.generation_batch_size, flags.seed)


def held_out(flags: ExitPromptArguments) -> list[str]:
    """Of another split, its first rows left to evaluations."""
    found = dialogues(flags, "validation")
    chosen = islice(found, flags.held_out_from, flags.held_out_from + flags.held_out)
    prompts = [sum_up(dialogue) for dialogue in chosen]
    require(
        len(prompts) == flags.held_out,
        f"--held_out {flags.held_out}: the validation split has {len(prompts)} dialogues after those "
        f"of --held_out_from {flags.held_out_from}.",
    )
    return prompts


if __name__ == "__main__":
    main()
