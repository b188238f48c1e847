"""Tokenizers of other kinds than the model's own, and lengths that a model cannot take."""

from __future__ import annotations

import json

import pytest
from pairs import QUICK, slow_but
from real_rows import ROOT
from tiny_models import FAMILIES, SHAPES, tiny_model
from tiny_tokenizers import bert_tokenizer, byte_tokenizer, marian_tokenizer
from transformers import AutoTokenizer, BartConfig, T5Config

import run
from models.errors import UserError
from models.loading import load_tokenizer
from scripts import choose_exit, distill_targets, train_tokenizer
from util.data.examples import dataset_record, load_examples
from util.data.windows import split_text
from util.data_arguments import DataArguments

LIMITED = [family for family in FAMILIES if "T5" not in SHAPES[family][0]]  # the others know distances alone
CONTEXT = " ".join(f"Straße {number} führt nach Süden." for number in range(40))


def tokenizer_of(kind, folder):
    if kind == "byte":
        return byte_tokenizer()
    return bert_tokenizer(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["byte", "bert"])
@pytest.mark.parametrize("family", ["bart-tied", "t5-tied", "marian"])
def test_other_tokenizers_train_and_evaluate(kind, family, tmp_path):
    """A vocab.txt, or no file at all beside tokenizer_config.json; BERT's would add token_type_ids."""
    folder = tmp_path / "checkpoint"
    tokenizer = tokenizer_of(kind, folder)
    if kind == "byte":
        tokenizer.save_pretrained(folder)
        assert not (folder / "tokenizer.json").exists()
    sizes = {"vocab_size": len(tokenizer)}
    sizes |= {"decoder_vocab_size": len(tokenizer)} if family == "marian" else {}
    tiny_model(family, num_layers=3, **sizes).save_pretrained(folder)
    flags = {
        "model_name_or_path": folder,
        "task": "translation",
        "dataset_name": "debian_de_en",
        "max_train_samples": 4,
        "max_eval_samples": 3,
        "max_source_length": 48,
        "max_target_length": 8,
        "do_train": True,
        "do_eval": True,
        "backend": "torch",
        "max_steps": 1,
        "static_exit_layer": 1,
        "per_device_eval_batch_size": 2,
        "save_strategy": "no",
        "output_dir": tmp_path / "out",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    run.main([word for name, value in flags.items() for word in (f"--{name}", str(value))])
    assert json.loads((tmp_path / "out/eval_results.json").read_text())["samples"] == 3
    assert load_tokenizer(str(tmp_path / "out"), 400)("das")["input_ids"] == tokenizer("das")["input_ids"]


@pytest.mark.parametrize(
    ("files", "config"),
    [
        ({}, BartConfig()),
        ({}, T5Config()),
        ({"tokenizer_config.json": '{"tokenizer_class": "T5Tokenizer"}'}, T5Config()),
        ({"vocab.txt": "[PAD]\n[UNK]\ndas"}, BartConfig()),
        ({"tokenizer.json": "{}"}, T5Config()),
        ({"tokenizer.json": ""}, T5Config()),
    ],
)
def test_no_tokenizer_is_one_line_and_never_an_empty_one(files, config, tmp_path):
    config.save_pretrained(tmp_path)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=r"has no tokenizer|Cannot load a tokenizer from"):
        load_tokenizer(str(tmp_path), 10**6)


@pytest.mark.parametrize("kind", ["byte", "marian"])
def test_contexts_are_split_without_offsets(kind, tmp_path):
    tokenizer = byte_tokenizer() if kind == "byte" else marian_tokenizer(tmp_path)
    unspaced = "".join(chr(0x4E00 + number) for number in range(240))  # one <unk> to a vocabulary of words
    for text in (CONTEXT, unspaced) if kind == "byte" else (CONTEXT,):
        check_pieces(text, tokenizer, split_text(text, tokenizer, 100, 20))
    assert split_text("kurz", tokenizer, 100, 20) == ["kurz"]


def check_pieces(text, tokenizer, pieces):
    """Each piece is as long as it may be, they overlap by nearly the stride, and nothing is lost."""

    def count(piece):
        return len(tokenizer(piece, add_special_tokens=False).input_ids)

    assert len(pieces) > 1 and all(count(piece) <= 100 for piece in pieces)
    assert all(count(piece) > 90 for piece in pieces[:-1])
    start = end = 0
    for number, piece in enumerate(pieces):
        first = text.index(piece, start)
        assert number == 0 or 10 < count(text[first:end]) <= 20
        start, end = first + 1, first + len(piece)
    assert text.startswith(pieces[0]) and end == len(text)


def test_slow_and_fast_tokenizers_split_alike():
    """By offsets and by measuring: the same windows, up to blanks at their edges."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "checkpoints/debian-t5-free")
    text = " ".join(f"paket{number}" for number in range(80))
    fast = split_text(text, tokenizer, 50, 10)

    class Slow:
        is_fast = False

        def __call__(self, text, **options):
            return tokenizer(text, **options)

    slow = split_text(text, Slow(), 50, 10)
    assert len(fast) == len(slow) > 3
    assert abs(len(fast[0].strip()) - len(slow[0].strip())) <= 2


def test_questions_are_read_in_windows_by_a_slow_tokenizer(tmp_path):
    question = {"id": "q", "question": "Wohin?", "context": CONTEXT, "answers": {"text": ["Süden"]}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(question))
    flags = DataArguments(
        task="question_answering",
        test_file=str(tmp_path / "rows.jsonl"),
        max_source_length=200,
        doc_stride=20,
    )
    tokenizer = byte_tokenizer()
    rows = load_examples(dataset_record(flags), flags, "test", tokenizer)
    assert len(rows) > 5 and max(len(tokenizer(text).input_ids) for text in rows["source"]) <= 200


def run_with(model_name, tmp_path, **flags):
    settings = {"model_name_or_path": model_name, "task": "translation", "dataset_name": "debian_de_en"}
    settings |= {"max_source_length": 32, "max_target_length": 8, "output_dir": tmp_path / "out"}
    settings |= {"use_cpu": True, "report_to": "none", "max_eval_samples": 1, "max_train_samples": 1} | flags
    run.main([word for name, value in settings.items() for word in (f"--{name}", str(value))])


@pytest.fixture(scope="module")
def tiny_checkpoints(tmp_path_factory):
    """Of each family, with 60 positions where positions are limited."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "checkpoints/debian-t5-free")
    folders = {}
    for family in FAMILIES:
        folders[family] = tmp_path_factory.mktemp(family)
        sizes = {"vocab_size": len(tokenizer)}
        sizes |= {"max_position_embeddings": 60} if family in LIMITED else {}
        sizes |= {"decoder_vocab_size": len(tokenizer)} if family == "marian" else {}
        tiny_model(family, num_layers=3, **sizes).save_pretrained(folders[family])
        tokenizer.save_pretrained(folders[family])
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("family", LIMITED)
@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (
            {"do_eval": True, "backend": "torch", "max_source_length": 61},
            "--max_source_length 61: {} has 60 positions. Set it",
        ),
        ({"do_eval": True, "backend": "torch", "val_max_target_length": 61}, "--val_max_target_length 61"),
        ({"do_eval": True, "backend": "torch", "generation_max_length": 61}, "--generation_max_length 61"),
        (
            {"do_train": True, "max_target_length": 57},
            "--max_target_length 57: {} has 60 positions; training",
        ),
        ({"do_train": True, "max_source_length": 57}, "--max_source_length 57"),
    ],
)
def test_lengths_beyond_the_positions_are_refused_at_the_start(
    tiny_checkpoints, family, flags, complaint, tmp_path, capsys
):
    with pytest.raises(SystemExit):
        run_with(tiny_checkpoints[family], tmp_path, **flags)
    kind = SHAPES[family][0].lower()
    assert f"error: {complaint.format(kind)}" in capsys.readouterr().err


@pytest.mark.parametrize("family", slow_but(QUICK, FAMILIES))
def test_lengths_up_to_the_positions_work(tiny_checkpoints, family, tmp_path):
    """The longest allowed source, target and output; beyond, for relative positions."""
    length = 56 if family in LIMITED else 96
    path = tmp_path / "rows.jsonl"
    text = " ".join(["paket"] * 200)
    path.write_text(json.dumps({"translation": {"de": text, "en": text}}))
    flags = {"train_file": path, "validation_file": path, "dataset_name": "rows"}
    flags |= {"source_lang": "de", "target_lang": "en", "max_steps": 1, "save_strategy": "no"}
    flags |= {"max_source_length": length, "max_target_length": length, "val_max_target_length": length}
    run_with(tiny_checkpoints[family], tmp_path, do_train=True, do_eval=True, backend="torch", **flags)
    assert json.loads((tmp_path / "out/eval_results.json").read_text())["samples"] == 1


def test_scripts_refuse_them_too(tiny_checkpoints, tmp_path, monkeypatch, capsys):
    folder = str(tiny_checkpoints["bart-tied"])
    with pytest.raises(SystemExit):
        choose_exit.main(["--model_name_or_path", folder, "--dataset_name", "debian_de_en"])
    assert "error: --max_source_length 512: bart has 60 positions" in capsys.readouterr().err
    words = ["--model_name_or_path", folder, "--dataset_name", "debian_de_en"]
    words += ["--output_file", str(tmp_path / "x.jsonl.gz"), "--max_length", "60"]
    monkeypatch.setattr("sys.argv", ["distill_targets.py", *words])
    with pytest.raises(SystemExit):
        distill_targets.main()
    assert "--max_length" in capsys.readouterr().err


def train_on(texts, folder, size):
    rows = folder.with_suffix(".jsonl")
    rows.write_text("\n".join(json.dumps({"text": text, "title": "abc abd"}) for text in texts))
    flags = ["--task", "summarization", "--source_column", "text", "--target_column", "title"]
    flags += ["--vocab_size", str(size), "--output_dir", str(folder)]
    train_tokenizer.main([*flags, "--train_file", str(rows)])
    return AutoTokenizer.from_pretrained(folder)


def test_a_tokenizer_is_made_of_the_rows_of_its_own_training(tmp_path):
    """Also in the folder of an earlier one."""
    folder = tmp_path / "tokenizer"
    assert len(train_on(["abc abd acd bcd"] * 20, folder, 9)) == 9
    (folder / "mine.txt").write_text("kept")
    tokenizer = train_on(["xyz xzy zyx yxz"] * 20, folder, 12)
    assert len(tokenizer) == 12 and "<unk>" not in tokenizer.tokenize("zyx")
    names = {path.name for path in folder.iterdir()}
    assert names == {"mine.txt", "spiece.model", "tokenizer.json", "tokenizer_config.json"}


def test_a_tokenizer_learns_from_every_line(tmp_path):
    """SentencePiece by itself leaves out lines over 4192 bytes and those with its mark of the unknown."""
    texts = ["xy " * 2000, "pq " * 1000 + "\n" + "pq " * 1000, *["\u2585 rs"] * 20]
    vocabulary = train_on(texts, tmp_path / "tokenizer", 15).get_vocab()
    assert set("xypqrs") <= set("".join(vocabulary))
