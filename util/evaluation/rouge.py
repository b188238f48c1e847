"""ROUGE F1 (Lin, 2004) of texts in any script: `score_sample(prediction, references)`.

Apart from the other metrics, as nltk, which cuts sentences, takes a third of a second to import.
"""

from __future__ import annotations

import logging
import unicodedata
from functools import lru_cache
from importlib.metadata import version

import regex
from nltk.tokenize.punkt import _ORTHO_LC, PunktParameters, PunktSentenceTokenizer
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

from util.evaluation.writing import UNSPACED, is_latin

TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
SIGNATURE = f"tok:latin-stemmed,else-unicode|sent:punkt|package:rouge_score|version:{version('rouge_score')}"
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
WORDS = regex.compile(rf"[{UNSPACED}]\p{{M}}*|(?:(?![{UNSPACED}])[\p{{L}}\p{{M}}\p{{N}}])+")
logging.getLogger("absl").setLevel(logging.WARNING)  # rouge_score announces its tokenizer again and again


def score_sample(text: str, references: list[str]) -> tuple[float, ...]:
    """Scores of `TYPES`, 0 to 100; for ROUGE-Lsum one sentence is one line.

    Words are rouge_score's own, stemmed, which know the letters a to z alone; where a reference is not
    written in Latin letters, they are `UnicodeTokenizer`'s.
    """
    score = scorer(is_latin(references[0])).score(split_sentences(references[0]), split_sentences(text))
    return tuple(100 * score[kind].fmeasure for kind in TYPES)


@lru_cache
def scorer(latin: bool) -> RougeScorer:
    if latin:
        return RougeScorer(list(TYPES), use_stemmer=True)
    return RougeScorer(list(TYPES), tokenizer=UnicodeTokenizer())


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
