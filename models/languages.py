"""The languages of multilingual tokenizers: mBART, mBART-50, NLLB and their like; multilingual Marian.

`set_languages(model, tokenizer, "de", "en", translates=True)` puts the source code into encoded sources, the
target code into labels, and makes `generate` begin as those labels do.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from models.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SOURCE, TARGET = "source_lang", "target_lang"  # as callers, and flags, name them
LANGUAGE_CODE = re.compile(r"[a-z]{2,3}_[A-Za-z]{2,4}")
NAMED_CODES = 60  # in a message; of more, first those that begin like what was asked for


def set_languages(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source_lang: str | None,
    target_lang: str | None,
    translates: bool,
) -> None:
    """Tell a multilingual tokenizer and `generate` the languages; nothing to do for other tokenizers.

    Languages are codes of the tokenizer, or what they begin with: `de` for de_DE or deu_Latn. What is not
    given is what the tokenizer was saved with. Without `translates` the target defaults to the source.

    Raises:
        UserError: a language is unknown, ambiguous, or needed and not given.
    """
    codes = language_codes(tokenizer)
    if not codes:
        return
    saved = tokenizer.init_kwargs if tokenizer.init_kwargs.get("tgt_lang") else {}  # else a mere default
    source = find_code(SOURCE, source_lang, codes) if source_lang else saved.get("src_lang")
    target = find_code(TARGET, target_lang, codes) if target_lang else saved.get("tgt_lang")
    if translates and not (source and target):
        missing = TARGET if source else SOURCE
        raise UserError(f"The tokenizer knows many languages: add {missing}, one of {listing(codes)}.")
    if source is None and target is None:
        logger.warning("Texts are encoded as %s; name their language by %s.", tokenizer.src_lang, SOURCE)
        return
    tokenizer.src_lang = source or target
    tokenizer.tgt_lang = target or source
    start_like_labels(model, tokenizer)


def language_codes(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Codes of the languages that a tokenizer marks by tokens of their own; empty if it marks none."""
    if not hasattr(tokenizer, "src_lang"):
        return []
    known = getattr(tokenizer, "lang_code_to_id", None)
    return list(known or filter(LANGUAGE_CODE.fullmatch, tokenizer.all_special_tokens))


def find_code(name: str, language: str, codes: list[str]) -> str:
    """The code that a language's name means: itself, however it is spelt, or the only one of the language.

    Raises:
        UserError: there is none, or several.
    """
    spelling = {code.lower().replace("-", "_"): code for code in codes}
    exact = spelling.get(language.lower().replace("-", "_"))
    if exact is not None:
        return exact
    found = [code for code in codes if two_letters(language) == two_letters(primary_subtag(code))]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{name} {language} may be {' or '.join(found)}: choose one.")
    near = [code for code in codes if code[:2] == language[:2].lower() and len(codes) > NAMED_CODES]
    known = listing(near or codes)
    raise UserError(f"{name} {language}: the tokenizer has no such language; it has {known}.")


def listing(codes: list[str]) -> str:
    named, others = ", ".join(codes[:NAMED_CODES]), len(codes) - NAMED_CODES
    return f"{named} and {others} others" if others > 0 else named


def primary_subtag(code: str) -> str:
    """The language itself, without script and country: `zh` of zh_CN."""
    return re.split("[-_]", code)[0].lower()


def two_letters(language: str) -> str:
    """ISO 639-1's name of a language where it has one (`de` for `deu`), else as it came, in lower case."""
    from nltk.langnames import iso639short  # which imports all of nltk: half a second

    return iso639short.get(language.lower(), language.lower())


def start_like_labels(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let `generate` begin with the target code where labels do.

    Labels are `code ... </s>` (mBART-50, NLLB) or `... </s> code` (mBART). mBART's model starts its decoder
    from the last token of the labels, others from a token of their own.
    """
    labels = tokenizer(text_target="").input_ids
    known = getattr(tokenizer, "lang_code_to_id", {})
    code = known.get(tokenizer.tgt_lang) or tokenizer.convert_tokens_to_ids(tokenizer.tgt_lang)
    generation = model.generation_config
    generation.forced_bos_token_id = code if labels[0] == code else None
    if model.config.model_type == "mbart":
        generation.decoder_start_token_id = model.config.decoder_start_token_id = labels[-1]


def mark_target(tokenizer: PreTrainedTokenizerBase | None, target_lang: str | None, prefix: str) -> str:
    """The prefix of sources, before it the token by which a multilingual Marian is told the target.

    Raises:
        UserError: the language is unknown or ambiguous.
    """
    codes = [code.strip("><") for code in getattr(tokenizer, "supported_language_codes", ())]
    if not codes or target_lang is None or prefix.startswith(">>"):
        return prefix
    return f">>{find_code(TARGET, target_lang, codes)}<< {prefix}"


def target_token_ids(tokenizer: PreTrainedTokenizerBase, pieces: Iterable[str | None]) -> list[int]:
    """Ids of a target's pieces, None being unknown: a tokenizer with two vocabularies looks sources up by
    default."""
    known = [tokenizer.unk_token if piece is None else piece for piece in pieces]
    vocabulary = getattr(tokenizer, "target_encoder", None)
    if vocabulary is None:
        return tokenizer.convert_tokens_to_ids(known)
    return [vocabulary.get(piece, vocabulary[tokenizer.unk_token]) for piece in known]
