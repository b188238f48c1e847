"""How texts are written, for metrics that count words: `bleu_tokenizer("zh")` names sacreBLEU's tokenizer."""

from __future__ import annotations

import logging
from functools import lru_cache

import regex
from sacrebleu.metrics import BLEU

from models.languages import primary_subtag, two_letters

logger = logging.getLogger(__name__)

UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
CHINESE = ("zh", "cmn", "yue", "wuu")
MECAB = {"ja": "ja-mecab", "ko": "ko-mecab"}
UNSPACED_LANGUAGES = ("th", "lo", "km", "my", "bo", "dz")


@lru_cache
def bleu_tokenizer(language: str | None) -> str:
    """sacreBLEU's tokenizer for a language (`zh`, zh_CN, zho_Hans): characters where words have no spaces and
    no better one is there, 13a for all others."""
    name = two_letters(primary_subtag(language or ""))
    if name in CHINESE:
        return "zh"
    if name in UNSPACED_LANGUAGES:
        return "char"
    if name not in MECAB:
        return "13a"
    try:
        BLEU(tokenize=MECAB[name])
    except (RuntimeError, ImportError):
        logger.warning(
            "BLEU counts characters: for words, install its tokenizer with pip install 'sacrebleu[%s]'.", name
        )
        return "char"
    return MECAB[name]


def warn_of_script(texts: list[str | list[str]]) -> None:
    """Warn, once, of texts that BLEU's usual tokenizer takes for one long word each."""
    sample = "".join(map(str, texts[:100]))
    if 2 * len(regex.findall(rf"[{UNSPACED}]", sample)) > len(regex.findall(r"\p{L}", sample)):
        warn_of_unspaced_text()


@lru_cache
def warn_of_unspaced_text() -> None:
    logger.warning(
        "BLEU splits texts at spaces, which these do without: name their language (--target_lang)."
    )


def is_latin(text: str) -> bool:
    """Whether at least half of a text's letters are Latin, or it has none."""
    return 2 * len(regex.findall(r"\p{Latin}", text)) >= len(regex.findall(r"\p{L}", text))
