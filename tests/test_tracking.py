"""What trackers are told of exits while a training evaluates."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import DATA, save_base, train
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, TrainerCallback
from transformers.integrations import TrackioCallback, WandbCallback

from util.data.examples import dataset_record, load_examples
from util.data_arguments import DataArguments
from util.training.tracking import SampleTables, send_table, shown_depths

STEPS = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no", "logging_steps": 1}
STEPS |= {"max_eval_samples": 5, "per_device_eval_batch_size": 2, "val_max_target_length": 12}


class Recorder(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, dict(logs)))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tracked(base, tmp_path_factory):
    """A training whose log went to TensorBoard and to a callback: its folder, those logs, the board."""
    folder, recorder = tmp_path_factory.mktemp("tracked"), Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("util.training.train.progress_callbacks", lambda training: [recorder])
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "board"))
        train(base, folder, **STEPS, report_to="tensorboard")
    board = EventAccumulator(str(folder / "board"))
    board.Reload()
    return folder, recorder.logs, board


def validation_rows(count):
    data = DataArguments(**DATA)
    return load_examples(dataset_record(data), data, "validation", max_samples=count)


def agreement_row_by_row(folder, layer, count):
    """Each row alone, by Hugging Face's modules: the share of tokens where layer and last layer agree."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scale = model.config.d_model**-0.5 if model.config.tie_word_embeddings else 1.0
    tokens = agreeing = 0
    for row in validation_rows(count):
        source = tokenizer(row["source"], truncation=True, max_length=24, return_tensors="pt")
        target = tokenizer(text_target=row["target"], truncation=True, max_length=12, return_tensors="pt")
        with torch.no_grad():
            outputs = model(**source, labels=target.input_ids, output_hidden_states=True)
            shallow = model.decoder.final_layer_norm(outputs.decoder_hidden_states[layer])
            predictions = model.lm_head(shallow * scale).argmax(-1)
        tokens += target.input_ids.numel()
        agreeing += (predictions == outputs.logits.argmax(-1)).sum().item()
    return agreeing / tokens


@pytest.mark.slow
def test_acceptance_is_the_share_of_tokens_on_which_exit_and_last_layer_agree(tracked):
    folder, logs, _ = tracked
    shares = {step: log["eval_acceptance_layer_2"] for step, log in logs if "eval_loss" in log}
    assert sorted(shares) == [1, 2] and 0 < shares[2] < 1
    assert shares[2] == pytest.approx(agreement_row_by_row(folder, 2, 5))


@pytest.mark.slow
def test_every_exit_of_a_loss_over_all_layers_has_its_acceptance(base, tmp_path, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr("util.training.train.progress_callbacks", lambda training: [recorder])
    flags = STEPS | {"intermediate_loss_fn": "weighted_ce", "shallow_exit_layer": None, "eval_steps": 2}
    train(base, tmp_path, **flags)
    (log,) = [log for _, log in recorder.logs if "eval_loss" in log]
    for layer in (1, 2, 3):
        share = agreement_row_by_row(tmp_path, layer, 5)
        assert log[f"eval_acceptance_layer_{layer}"] == pytest.approx(share)
    assert "eval_acceptance_layer_4" not in log


def test_trackers_get_the_loss_of_each_exit_and_acceptance(tracked):
    _, logs, board = tracked
    accepted = ("eval/acceptance_layer_2", "eval_acceptance_layer_2")
    for tag, name in (("train/ce_layer_2", "ce_layer_2"), accepted):
        shown = [(event.step, event.value) for event in board.Scalars(tag)]
        assert shown == [(step, pytest.approx(log[name])) for step, log in logs if name in log]
        assert [step for step, _ in shown] == [1, 2]


def generated(model, tokenizer, row):
    source = tokenizer(row["source"], truncation=True, max_length=24, return_tensors="pt")
    output = model.generate(**source, max_length=12, do_sample=False, num_beams=1, use_cache=False)
    return tokenizer.decode(output[0], skip_special_tokens=True)


def test_trackers_get_a_table_of_texts_by_depth(tracked):
    """Full depth's texts are those of Hugging Face's loop, the exit's those of a decoder cut off there."""
    folder, _, board = tracked
    events = board.Tensors("samples_by_depth/text_summary")
    assert [event.step for event in events] == [1, 2]
    lines = events[-1].tensor_proto.string_val[0].decode().splitlines()
    assert lines[0] == "| source | reference | layer 2 | full depth |" and len(lines) == 2 + 4
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = list(validation_rows(4))
    whole = [generated(model, tokenizer, row) for row in rows]
    shallow = AutoModelForSeq2SeqLM.from_pretrained(folder, num_decoder_layers=2)
    cut = [generated(shallow, tokenizer, row) for row in rows]
    texts = zip(rows, cut, whole, strict=True)
    cells = [" | ".join([row["source"], row["target"], *pair]) for row, *pair in texts]
    assert lines[2:] == [f"| {row} |" for row in cells] and whole != cut


@pytest.mark.parametrize(("kind", "name"), [(WandbCallback, "_wandb"), (TrackioCallback, "_trackio")])
def test_libraries_with_tables_of_their_own_get_one(kind, name):
    logged, tracker = [], object.__new__(kind)  # neither library is installed here
    library = SimpleNamespace(log=logged.append, Table=lambda columns, data: (columns, data))
    setattr(tracker, name, library)
    send_table(tracker, [{"source": "a", "full depth": "b"}, {"source": "c", "full depth": "d"}], 7)
    assert logged == [
        {"samples_by_depth": (["source", "full depth"], [["a", "b"], ["c", "d"]]), "train/global_step": 7}
    ]


def test_without_trackers_nothing_is_decoded():
    rows = validation_rows(3)
    tables = SampleTables(None, rows, None, [2], lambda: [Recorder()], None)
    tables.on_evaluate(None, None, None)


def test_few_of_many_depths_are_shown():
    assert shown_depths([2]) == [2] and shown_depths([1, 2, 3]) == [1, 2, 3]
    assert shown_depths(list(range(1, 12))) == [3, 7, 11]
