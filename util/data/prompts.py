"""From flags to the prompt by which a decoder-only model is asked: `build_prompt(loaded, data)`."""

from __future__ import annotations

import copy
import logging
import random
import re

from models.errors import UserError
from models.loading import LoadedModel
from models.prompts import SOURCE, Prompt, join, require_chat_template
from util.data.encoding import PromptEncoder
from util.data.examples import dataset_record, load_examples
from util.data_arguments import DataArguments
from util.flags import require
from util.tasks import TASKS

SHOT_POOL = 1000  # first rows of the training split that shots are drawn from
logger = logging.getLogger(__name__)
LANGUAGES = ("source_lang", "target_lang")  # that a template may name


def build_prompt(loaded: LoadedModel, data: DataArguments) -> Prompt | None:
    """How the flags want the model asked; None for a model with an encoder, which reads sources as they are.

    Raises:
        UserError: flags of prompts for a model that takes none; no chat template; a template without a place
            for the source, or with an unknown language; fewer rows for shots than asked for.
    """
    if loaded.model.config.is_encoder_decoder:
        refuse_prompt_flags(data, loaded.model.config.model_type)
        return None
    if data.use_chat_template:
        require_chat_template(loaded.tokenizer, "--use_chat_template True")
    prompt = Prompt(read_template(data), data.use_chat_template)
    if not data.num_shots:
        return prompt
    prompt = Prompt(prompt.template, prompt.chat, draw_shots(loaded, data, prompt))
    if not prompt.chat and not PromptEncoder(loaded.tokenizer, prompt).stops():
        logger.warning(
            "--num_shots: outputs end at the end token alone, not at the empty line between examples, as %s.",
            "the tokenizer drops line breaks" if prompt.stop else "an example's answer holds one itself",
        )
    return prompt


def refuse_prompt_flags(data: DataArguments, family: str) -> None:
    given = {
        "--prompt_template": data.prompt_template is not None,
        "--use_chat_template": data.use_chat_template,
        "--num_shots": data.num_shots > 0,
    }
    found = [flag for flag, holds in given.items() if holds]
    require(
        not found,
        f"{' and '.join(found)}: prompts are for models without an encoder, which {family} has; "
        "--source_prefix goes before its sources.",
    )


def read_template(data: DataArguments) -> str:
    """The flag's template or the task's, with the names of languages in their places."""
    task = TASKS[data.task]
    template = data.prompt_template or (task.message if data.use_chat_template else task.prompt)
    languages = dict(zip(LANGUAGES, dataset_record(data).languages or (None, None), strict=True))

    def fill(place: re.Match[str]) -> str:
        name = place[1]
        language = languages[name]
        if language is None:
            raise UserError(f"The prompt names {{{name}}}: add --{name}, or another --prompt_template.")
        return language

    template = template.replace("\\n", "\n")  # as it can be typed in a shell
    require(SOURCE in template, f"--prompt_template needs a place for the source: {SOURCE}.")
    return re.sub(rf"{{({'|'.join(LANGUAGES)})}}", fill, template)


def draw_shots(loaded: LoadedModel, data: DataArguments, prompt: Prompt) -> tuple[tuple[str, str], ...]:
    """Sources and targets of the training split, drawn by --shot_seed; of those short enough that all shots
    leave as much room for a source as they take each."""
    quiet = copy.copy(data)
    quiet.report_dir, quiet.drop_long_samples = None, False
    rows = load_examples(dataset_record(data), quiet, "train", None, SHOT_POOL, prompt)
    limit = data.max_source_length // (data.num_shots + 1)
    pool = list(zip(rows["source"], rows["target"], strict=True))
    random.Random(data.shot_seed).shuffle(pool)
    shots: list[tuple[str, str]] = []
    for source, target in pool:
        if len(shots) == data.num_shots:
            break
        text = join(prompt.ask(loaded.tokenizer, source), target)
        if len(prompt.encode(loaded.tokenizer, [text])[0]) <= limit:
            shots.append((source, target))
    require(
        len(shots) == data.num_shots,
        f"--num_shots {data.num_shots}: only {len(shots)} training rows of at most {limit} tokens were "
        "found: lower it, or raise --max_source_length.",
    )
    return tuple(shots)
