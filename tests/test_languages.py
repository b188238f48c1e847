"""Languages of multilingual tokenizers, from the flags to labels and outputs; two vocabularies."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import tiny_model
from tiny_tokenizers import ENGLISH, GERMAN, MULTILINGUAL, marian_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

import run
from models.decoding import early_exit_decode
from models.errors import UserError
from models.exit_heads import ExitConfig
from models.exit_policy import FullDepth
from models.languages import find_code, mark_target, set_languages, target_token_ids
from models.loading import LoadedModel, load_model, load_tokenizer
from scripts import learn_shortlist, sweep
from util.data.examples import dataset_record, load_examples, tokenize
from util.data.streaming import stream_training_rows
from util.data_arguments import DataArguments

CODES = {"mbart": ("de_DE", "en_XX"), "mbart50": ("de_DE", "en_XX"), "nllb": ("deu_Latn", "eng_Latn")}
SHORT_RUN = {
    "do_train": True,
    "do_eval": True,
    "backend": "torch",
    "max_steps": 1,
    "save_strategy": "no",
    "use_shallow_deep": True,
}
ROWS = [{"translation": {"de": "das paket", "en": "the package"}} for _ in range(6)]


@pytest.fixture(scope="module", params=MULTILINGUAL)
def multilingual(request, tmp_path_factory):
    """The tokenizer's kind, and a saved tiny mBART with it that has never heard of a target language."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = MULTILINGUAL[request.param]()
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    tiny_model("mbart", num_layers=4, vocab_size=len(tokenizer), **ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ExitConfig("shallowdeep_ce", 2).save(folder)
    return request.param, folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def expected_ids(tokenizer, kind, words, code):
    """Written by hand after the documentation of each tokenizer: `X </s> code` or `code X </s>`."""
    tokens = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(words))
    code, end = tokenizer.convert_tokens_to_ids([code, "</s>"])
    return [*tokens, end, code] if kind == "mbart" else [code, *tokens, end]


def test_sources_labels_and_outputs_carry_their_codes(multilingual, rows):
    kind, folder = multilingual
    loaded = load_model(str(folder))
    source, target = CODES[kind]
    set_languages(loaded.model, loaded.tokenizer, "de", "en", translates=True)
    flags = DataArguments(task="translation", train_file=str(rows), source_lang="de", target_lang="en")
    record = dataset_record(flags)
    encoded = tokenize(load_examples(record, flags, "train"), loaded.tokenizer, flags, 16)
    streamed = next(iter(stream_training_rows(record, flags, loaded.tokenizer, seed=0)))
    for row in (encoded[0], streamed):
        assert row["input_ids"] == expected_ids(loaded.tokenizer, kind, "das paket", source)
        assert row["labels"] == expected_ids(loaded.tokenizer, kind, "the package", target)
    plain = load_model(str(folder)).model  # Hugging Face's loop, told by its own arguments
    code = loaded.tokenizer.convert_tokens_to_ids(target)
    told = {"decoder_start_token_id": code} if kind == "mbart" else {"forced_bos_token_id": code}
    inputs = {"input_ids": torch.tensor([encoded[0]["input_ids"]])}
    ours = loaded.model.generate(
        **inputs, max_length=9, custom_generate=early_exit_decode, exit_policy=FullDepth()
    )
    assert ours.tolist() == plain.generate(**inputs, max_length=9, do_sample=False, **told).tolist()
    assert ours[0, : 1 if kind == "mbart" else 2].tolist()[-1] == code


def run_flags(folder, rows, output_dir, **flags):
    files = {f"{split}_file": rows for split in ("train", "validation", "test")}
    settings = {
        "model_name_or_path": folder,
        "task": "translation",
        "source_lang": "de",
        "target_lang": "en",
        "max_source_length": 16,
        "max_target_length": 8,
        "output_dir": output_dir,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return [word for name, value in (settings | files | flags).items() for word in (f"--{name}", str(value))]


def test_a_trained_checkpoint_remembers_its_languages(multilingual, rows, tmp_path):
    kind, folder = multilingual
    short = {
        "do_train": True,
        "do_eval": True,
        "backend": "torch",
        "max_steps": 1,
        "save_strategy": "no",
        "use_shallow_deep": True,
    }
    short |= {"eval_strategy": "steps", "eval_steps": 1, "predict_with_generate": True}
    run.main(run_flags(folder, rows, tmp_path / "out", **short))
    target = CODES[kind][1]
    lines = (tmp_path / "out/predictions.jsonl").read_text().splitlines()
    if kind != "mbart":
        assert {json.loads(line)["pieces"][0] for line in lines} == {target}
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (saved.src_lang, saved.tgt_lang) == CODES[kind]
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    code = saved.convert_tokens_to_ids(target)
    starts = (generation.decoder_start_token_id, generation.forced_bos_token_id)
    assert starts == ((code, None) if kind == "mbart" else (2, code))


@pytest.mark.slow
def test_a_sweep_sets_the_languages(rows, tmp_path, multilingual):
    kind, folder = multilingual
    if kind != "mbart50":
        pytest.skip("one is enough")
    flags = ["--free", str(folder), "--methods", "Static", "--static_layers", "2", "--trace_samples", "1"]
    flags += ["--test_file", str(rows), "--task", "translation", "--source_lang", "de", "--target_lang", "en"]
    flags += ["--max_source_length", "16", "--max_target_length", "8", "--num_samples", "2"]
    flags += ["--backend", "torch"]
    sweep.main([*flags, "--output_dir", str(tmp_path)])
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert len(records) == 4 and {record["pieces"][0] for record in records} == {"en_XX"}


@pytest.mark.parametrize(
    ("language", "codes", "expected"),
    [
        ("de", ["en_XX", "de_DE"], "de_DE"),
        ("de-de", ["en_XX", "de_DE"], "de_DE"),
        ("deu", ["en_XX", "de_DE"], "de_DE"),
        ("de", ["eng_Latn", "deu_Latn"], "deu_Latn"),
        ("zho_hans", ["zho_Hans", "zho_Hant"], "zho_Hans"),
        ("fr", ["fra", "fr", "fr_BE"], "fr"),
    ],
)
def test_languages_are_found_by_their_usual_names(language, codes, expected):
    assert find_code("source_lang", language, codes) == expected


@pytest.mark.parametrize(
    ("language", "complaint"),
    [
        ("zh", "target_lang zh may be zho_Hans or zho_Hant: choose one"),
        ("pt_BR", "target_lang pt_BR: the tokenizer has no such language; it has zho_Hans, zho_Hant, por_"),
        ("x", "target_lang x: the tokenizer has no such language; it has zho_Hans"),
    ],
)
def test_languages_that_are_not_clear_get_one_line(language, complaint):
    with pytest.raises(UserError, match=complaint):
        find_code("target_lang", language, ["zho_Hans", "zho_Hant", "por_Latn"])


def test_of_many_languages_the_nearest_are_named():
    with pytest.raises(UserError) as caught:
        find_code("target_lang", "arabic", MULTILINGUAL["nllb"]().extra_special_tokens)
    assert "arb_Arab" in str(caught.value) and "deu_Latn" not in str(caught.value)


def test_translation_without_languages_is_refused(multilingual):
    _, folder = multilingual
    loaded = load_model(str(folder))
    with pytest.raises(UserError, match=r"add source_lang, one of \w+_"):
        set_languages(loaded.model, loaded.tokenizer, None, None, translates=True)
    with pytest.raises(UserError, match="add target_lang"):
        set_languages(loaded.model, loaded.tokenizer, "de", None, translates=True)


def test_summaries_are_in_the_language_of_their_documents(multilingual, caplog):
    kind, folder = multilingual
    loaded = load_model(str(folder))
    set_languages(loaded.model, loaded.tokenizer, None, None, translates=False)
    assert "name their language by source_lang" in caplog.text
    set_languages(loaded.model, loaded.tokenizer, "de", None, translates=False)
    labels = loaded.tokenizer(text_target="das").input_ids
    assert labels == expected_ids(loaded.tokenizer, kind, "das", CODES[kind][0])


def test_multilingual_marian_is_told_the_target_by_the_prefix():
    class Marian:
        supported_language_codes = (">>fra<<", ">>ron<<", ">>por<<", ">>pt_BR<<")

    assert mark_target(Marian(), "fr", "") == ">>fra<< "
    assert mark_target(Marian(), "pt-br", "x: ") == ">>pt_BR<< x: "
    assert mark_target(Marian(), "fr", ">>ron<< ") == ">>ron<< "
    assert mark_target(None, "fr", "x: ") == "x: "
    with pytest.raises(UserError, match="it has fra, ron, por, pt_BR"):
        mark_target(Marian(), "de", "")


@pytest.fixture(scope="module")
def marian(tmp_path_factory):
    """A saved tiny Marian whose targets have a vocabulary of their own."""
    folder = tmp_path_factory.mktemp("marian")
    tokenizer = marian_tokenizer(folder)
    sizes = {"vocab_size": len(tokenizer.encoder), "decoder_vocab_size": len(tokenizer.target_encoder)}
    pad = tokenizer.encoder["<pad>"]
    ids = {
        "pad_token_id": pad,
        "decoder_start_token_id": tokenizer.target_encoder["<pad>"],
        "eos_token_id": 0,
    }
    shared = {"share_encoder_decoder_embeddings": False, "tie_word_embeddings": False}
    tiny_model("marian", num_layers=4, **sizes, **ids, **shared).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ExitConfig("shallowdeep_ce", 2).save(folder)
    return folder


def test_targets_are_measured_by_their_own_vocabulary(marian, tmp_path):
    """Source and target of two known words are three tokens each; by the other's pieces they are many."""
    path = tmp_path / "rows.jsonl"
    texts = [(GERMAN[:2], ENGLISH[:2]), (GERMAN[:2], ENGLISH[:5]), (GERMAN[:5], ENGLISH[:2])]
    lines = [{"translation": {"de": " ".join(de), "en": " ".join(en)}} for de, en in texts]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = load_model(str(marian)).tokenizer
    assert len(tokenizer("the package").input_ids) > 4 >= len(tokenizer(text_target="the package").input_ids)
    flags = DataArguments(
        task="translation",
        train_file=str(path),
        source_lang="de",
        target_lang="en",
        max_source_length=4,
        max_target_length=4,
        drop_long_samples=True,
    )
    kept = load_examples(dataset_record(flags), flags, "train", tokenizer)
    assert list(kept["target"]) == ["the package"]
    expected = [*(tokenizer.target_encoder[f"▁{word}"] for word in ENGLISH[:2]), 0]
    assert tokenize(kept, tokenizer, flags, 4)[0]["labels"] == expected
    assert target_token_ids(tokenizer, ["▁the", "▁package", "</s>"]) == expected


def test_a_token_without_a_piece_is_unknown(marian):
    """Models may have more ids than the vocabulary has pieces."""
    words = Tokenizer(WordLevel({"<unk>": 0, "the": 1}, unk_token="<unk>"))
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    assert fast.convert_ids_to_tokens([1, 7]) == ["the", None]
    assert target_token_ids(fast, ["the", None]) == [1, 0]
    of_two = load_model(str(marian)).tokenizer
    expected = [of_two.target_encoder[piece] for piece in ("▁the", "<unk>")]
    assert target_token_ids(of_two, ["▁the", None]) == expected


def test_a_shortlist_counts_target_pieces(marian):
    loaded = load_model(str(marian))
    examples = {"source": ["ein", "das"], "target": ["the package", "the library"]}
    shortlist = learn_shortlist.learn_shortlist(loaded, examples, 2)
    assert shortlist["token_ids"][0] in (0, loaded.tokenizer.target_encoder["▁the"])
    assert set(shortlist["token_ids"]) == {0, loaded.tokenizer.target_encoder["▁the"]}


def test_two_vocabularies_train_and_evaluate(marian, rows, tmp_path):
    flags = {
        "do_train": True,
        "do_eval": True,
        "backend": "torch",
        "max_steps": 1,
        "save_strategy": "no",
        "use_shallow_deep": True,
    }
    run.main(run_flags(marian, rows, tmp_path, **flags))
    record = json.loads((tmp_path / "predictions.jsonl").read_text().splitlines()[0])
    vocabulary = json.loads((marian / "target_vocab.json").read_text())
    assert all(piece in vocabulary for piece in record["pieces"])


def test_a_target_vocabulary_that_is_too_large_is_refused(marian):
    size = len(json.loads((marian / "target_vocab.json").read_text()))
    with pytest.raises(UserError, match=f"has {size} tokens, but the model a vocab_size of {size - 1}"):
        load_tokenizer(str(marian), 10_000, size - 1)
    assert isinstance(load_model(str(marian)), LoadedModel)
