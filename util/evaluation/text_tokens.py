"""Words and sentences of texts in any script, for metrics that count them.

`bleu_tokenizer("zh")` names sacreBLEU's tokenizer for a language; `UnicodeTokenizer` is one for rouge_score.
"""

from __future__ import annotations

import logging
import unicodedata
from functools import lru_cache

import regex
from nltk.tokenize.punkt import _ORTHO_LC, PunktParameters, PunktSentenceTokenizer
from rouge_score.tokenizers import Tokenizer
from sacrebleu.metrics import BLEU

from models.languages import primary_subtag, two_letters

logger = logging.getLogger(__name__)

# Of what nltk's English Punkt model knows (a download), the part that news and dialogues need.
ABBREVIATIONS = (
    "a.m adm al apr aug ave blvd bros calif capt cf cmdr co col conn corp d.c dec dept dr e.g est etc feb "
    "fla fr ft gen gov hon i.e inc jan jr l.a lt ltd maj messrs mr mrs ms mt n.y nov oct p.m pp prof rep "
    "reps rev sen sens sept sgt sr st u.k u.n u.s u.s.a vol vs"
)
USUALLY_LOWER_CASE = (  # in capitals they begin a sentence, even after an abbreviation, initial or ellipsis
    "a after all although and as at but for he her his how however i if in is it its my now on our she so "
    "some that the then there these they this those we what when where while who why you"
)
OTHER_STOPS = regex.compile(r"([。！？｡।॥؟۔။។]+)\s*")
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
WORDS = regex.compile(rf"[{UNSPACED}]\p{{M}}*|(?:(?![{UNSPACED}])[\p{{L}}\p{{M}}\p{{N}}])+")
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


class UnicodeTokenizer(Tokenizer):
    """Words of letters, digits and marks of any script, in lower case; characters where a script does without
    spaces."""

    def tokenize(self, text: str) -> list[str]:
        return WORDS.findall(unicodedata.normalize("NFKC", text).lower())


def split_sentences(text: str) -> str:
    """One sentence a line: at line breaks, and where Punkt (Kiss and Strunk, 2006) sees an end; where letters
    are not Latin, also after the full stops of other scripts."""
    if not is_latin(text):
        text = OTHER_STOPS.sub(r"\1\n", text)
    return "\n".join(sentence_splitter().tokenize(text.strip()))


@lru_cache(maxsize=1)
def sentence_splitter() -> PunktSentenceTokenizer:
    parameters = PunktParameters()
    parameters.abbrev_types.update(ABBREVIATIONS.split())
    for word in USUALLY_LOWER_CASE.split():
        parameters.add_ortho_context(word, _ORTHO_LC)
    return PunktSentenceTokenizer(parameters)
