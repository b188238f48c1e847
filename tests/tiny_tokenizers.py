"""Tiny tokenizers of many kinds, without downloads; all know the words of WORDS."""

from __future__ import annotations

import io
import json

import sentencepiece
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    MarianTokenizer,
    MBart50Tokenizer,
    MBartTokenizer,
    NllbTokenizer,
)
from transformers.models.mbart import tokenization_mbart
from transformers.models.mbart50 import tokenization_mbart50

GERMAN = ["ein", "das", "paket", "enthält", "die", "bibliothek"]
ENGLISH = ["the", "package", "library", "for", "program", "data"]
WORDS = GERMAN + ENGLISH
SPECIAL = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]


def mbart_tokenizer(kind=MBartTokenizer):
    module = tokenization_mbart if kind is MBartTokenizer else tokenization_mbart50
    codes = [(code, 0.0) for code in module.FAIRSEQ_LANGUAGE_CODES]
    words = [(f"▁{word}", -3.0) for word in WORDS]
    return kind(vocab=[*SPECIAL, *words, *codes, ("<mask>", 0.0)])


def nllb_tokenizer():
    letters = sorted({letter for word in WORDS for letter in word} | {"▁"})
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", *letters]
    return NllbTokenizer(vocab={piece: index for index, piece in enumerate(vocabulary)}, merges=[])


MULTILINGUAL = {
    "mbart": mbart_tokenizer,
    "mbart50": lambda: mbart_tokenizer(MBart50Tokenizer),
    "nllb": nllb_tokenizer,
}


def train_pieces(words, path):
    """Write a sentencepiece model whose pieces are these words, and the letters that they consist of."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join("".join(words))] * 20),
        model_writer=model,
        vocab_size=2 * len(words) + 30,
        hard_vocab_limit=False,
        user_defined_symbols=[f"▁{word}" for word in words],
        bos_id=-1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [processor.id_to_piece(index) for index in range(processor.get_piece_size())]
    return ["</s>", "<unk>", *[piece for piece in pieces if piece not in ("</s>", "<unk>")], "<pad>"]


def marian_tokenizer(folder):
    """Two vocabularies: sources know German words, targets English ones; the others fall into letters."""
    folder.mkdir(exist_ok=True)
    for side, words, file in (("source", GERMAN, "vocab"), ("target", ENGLISH, "target_vocab")):
        pieces = train_pieces(words, folder / f"{side}.spm")
        ids = {piece: index for index, piece in enumerate(pieces)}
        (folder / f"{file}.json").write_text(json.dumps(ids))
    files = ("source.spm", "target.spm", "vocab.json", "target_vocab.json")
    return MarianTokenizer(*(str(folder / file) for file in files), separate_vocabs=True)


def bert_tokenizer(folder):
    """As older checkpoints have it: a vocab.txt, whose class would return token_type_ids."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return AutoTokenizer.from_pretrained(folder)


def byte_tokenizer():
    return ByT5Tokenizer()
