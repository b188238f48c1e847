"""What exits of frozen models are taught by: states on disk, the teacher, steps and their pace."""

from __future__ import annotations

import itertools

import pytest
import torch
from adapted_models import SHALLOW, SHORTLIST, adapted, as_plain_model, texts_of
from datasets import Dataset
from real_rows import ROOT

from models.errors import UserError
from models.loading import load_model
from scripts.train_exit import identify_teaching
from util.data.encoding import encoder_for
from util.exit_training import teaching, texts
from util.exit_training.flags import ExitTrainingArguments
from util.exit_training.forecast import ExitCosts
from util.exit_training.objectives import exit_logits, teacher_of
from util.exit_training.states import FreshStates, Start, compute_states, make_batch, read_texts
from util.exit_training.texts import Text, answer, answer_prompts, group_alike, until_end
from util.files import read_json_lines


@pytest.fixture(
    params=itertools.product(["llama-tied", "gpt2-tied", "t5-tied", "bart-tied"], ["disk", "anew"])
)
def taught(request, tmp_path):
    """A model with an exit, texts, and a batch of their states, read from disk or computed together."""
    family, kept = request.param
    loaded = adapted(family, shortlist=SHORTLIST)
    texts, causal = texts_of(family), not loaded.model.config.is_encoder_decoder
    start = Start(None if causal else 0, with_prompt=causal)
    files = compute_states(loaded.view, texts, [SHALLOW], tmp_path, start)
    states = files if kept == "disk" else FreshStates(loaded.view, texts, [SHALLOW], start)
    assert states.sizes == files.sizes
    return loaded, texts, start, make_batch(loaded.view, states.rows(range(len(texts))))


def logits_by_hugging_face(model, text, start):
    """Of the tokens that are predicted: (N, V)."""
    ids = torch.tensor([text.input_ids])
    with torch.no_grad():
        if start.token is None:
            whole = torch.tensor([[*text.input_ids, *text.output_ids[:-1]]])
            return model(input_ids=whole).logits[0]
        before = torch.tensor([[start.token, *text.output_ids[:-1]]])
        return model(input_ids=ids, decoder_input_ids=before).logits[0]


def test_the_teacher_is_the_last_layer(taught):
    loaded, texts, start, batch = taught
    expected = torch.cat([logits_by_hugging_face(loaded.model, text, start) for text in texts])
    shares = expected.softmax(-1)
    teacher = teacher_of(loaded.view, batch)
    torch.testing.assert_close(teacher.listed, shares[:, SHORTLIST], atol=3e-3, rtol=3e-2)  # stored as halves
    torch.testing.assert_close(teacher.others[:, 0], 1 - teacher.listed.sum(-1), atol=1e-5, rtol=1e-4)
    assert torch.equal(batch.tokens, expected.argmax(-1))
    outputs = [len(text.output_ids) for text in texts]
    assert int(batch.outputs.sum()) == sum(outputs)


def test_the_exit_in_a_padded_batch_says_what_it_says_alone(taught):
    loaded, texts, start, batch = taught
    model = as_plain_model(loaded)
    expected = torch.cat([logits_by_hugging_face(model, text, start) for text in texts])[:, SHORTLIST]
    with torch.no_grad():
        logits = exit_logits(loaded.view, batch)[:, :-1]
    shift = (logits - expected).abs().max() / expected.abs().max()
    assert shift < 0.01  # states are stored as halves


def test_states_are_read_in_the_same_order_that_they_are_written(tmp_path):
    loaded, texts = adapted("llama-tied"), texts_of("llama-tied", rows=70)  # two shards
    files = compute_states(loaded.view, texts, [1, SHALLOW], tmp_path, Start(None))
    for number in (0, 63, 64, 69):
        (row,) = read_texts(loaded.view, [texts[number]], [1, SHALLOW], Start(None))
        stored = files.row(number)
        assert torch.equal(stored.tokens, row.tokens) and len(row.tokens) == files.outputs[number]
        for layer in (1, SHALLOW):
            torch.testing.assert_close(stored.hidden[layer].float(), row.hidden[layer], atol=1e-2, rtol=1e-2)


def test_texts_end_with_their_end_and_lie_beside_others_as_long():
    assert until_end(torch.tensor([5, 6, 1, 0, 0]), {1}) == [5, 6, 1]
    assert until_end(torch.tensor([5, 6, 7]), {1}) == [5, 6, 7]
    sources = ["x" * length for length in (9, 1, 8, 2, 7, 3)]
    groups = group_alike(sources, 2, held_out=0)
    assert sorted(map(sorted, groups)) == [[0, 2], [1, 3], [4, 5]]
    *taught, last, second_last = group_alike(sources, 2, held_out=3)
    assert sorted(map(sorted, taught)) == [[0], [1, 2]]
    assert sorted(map(sorted, (last, second_last))) == [[3, 5], [4]]


@pytest.mark.parametrize(("cut", "asked"), [(0, []), (1, [[2, 3]]), (2, [[2, 3]]), (3, [[0, 1], [2, 3]])])
def test_a_group_of_which_a_part_is_logged_is_written_anew(tmp_path, monkeypatch, cut, asked):
    whole = [f'{{"input_ids": [], "output_ids": [{row}]}}\n' for row in range(4)]
    path, groups = tmp_path / "texts.jsonl", []
    path.write_text("".join(whole)[: -len(whole[0]) * cut + 5 if cut else None])

    def write(loaded, encoder, sources, max_length):
        groups.append([int(source) for source in sources])
        return [Text([], [row]) for row in groups[-1]]

    monkeypatch.setattr(texts, "answer", write)
    examples = Dataset.from_dict({"source": ["0", "1", "2", "3"]})
    found = answer_prompts(None, None, examples, path, [[0, 1], [2, 3]], 8)
    assert [text.output_ids for text in found] == [[0], [1], [2], [3]] and groups == asked
    assert [row["output_ids"] for _, row in read_json_lines(path)] == [[0], [1], [2], [3]]


def test_texts_are_greedy_whatever_the_checkpoints_beams(monkeypatch):
    loaded = load_model(str(ROOT / "checkpoints/debian-t5-free"))
    inputs = loaded.tokenizer(["Eine Bibliothek"], return_tensors="pt")
    expected = loaded.model.generate(**inputs, do_sample=False, num_beams=1, max_length=9)[0, 1:]
    loaded.model.generation_config.update(num_beams=4, do_sample=True)
    (text,) = answer(loaded, encoder_for(loaded), ["Eine Bibliothek"], 9)
    assert text.output_ids == expected.tolist()


@pytest.mark.parametrize("loss", ["kl", "acceptance"])
def test_steps_bring_the_exit_nearer_to_the_last_layer(loss, tmp_path):
    """On the texts that it is taught on: a tiny random model has nothing in common to learn."""
    loaded, texts = adapted("llama-tied"), texts_of("llama-tied", rows=6)
    files = compute_states(loaded.view, texts, [SHALLOW], tmp_path, Start(None))
    flags = ExitTrainingArguments("", exit_loss=loss, learning_rate=1e-2, output_dir=str(tmp_path))
    costs = {SHALLOW: ExitCosts(1.0, 10.0, 4.0, (7.0,) * 5, (6.0,) * 5)}
    one = teaching.Teaching({SHALLOW: loaded.view}, files, range(6), range(6), costs, flags, {})
    for weight in one.parameters:
        weight.requires_grad_(True)
    before = one.forecasts()[1][SHALLOW]
    batch = make_batch(loaded.view, files.rows(range(6)))
    losses = [one.learn(batch) for _ in range(80)]
    after = one.forecasts()[1][SHALLOW]
    assert losses[-1] < 0.5 * losses[0]
    assert after["acceptance"] > before["acceptance"] + 0.1


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["kl", "both"])
def test_along_a_cosine_the_learning_rate_falls_to_nothing_whatever_is_gained(loss, tmp_path, monkeypatch):
    loaded, texts = adapted("llama-tied"), texts_of("llama-tied", rows=6)
    files = compute_states(loaded.view, texts, [SHALLOW], tmp_path, Start(None))
    flags = ExitTrainingArguments(
        "", exit_loss=loss, lr_schedule="cosine", max_steps=100, eval_steps=2, output_dir=str(tmp_path)
    )
    costs = {SHALLOW: ExitCosts(1.0, 10.0, 4.0, (7.0,) * 5, (6.0,) * 5)}
    one = teaching.Teaching({SHALLOW: loaded.view}, files, range(6), range(6), costs, flags, {})
    monkeypatch.setattr(one, "score", lambda forecasts: 1.0)  # it never improves
    rates, objectives = [], []

    def learn(batch):
        objective, share = one.pace()
        objectives.append(objective)
        rates.append(share)
        one.standing.step += 1
        return 0.0

    monkeypatch.setattr(one, "learn", learn)
    one.run()
    assert len(rates) == 100 and rates == sorted(rates, reverse=True)
    assert rates[0] == 1 and rates[50] == pytest.approx(0.5) and rates[25] == pytest.approx(0.5 + 0.5**1.5)
    assert rates[99] < 0.001
    assert objectives == ["kl"] * 100 if loss == "kl" else ["kl"] * 50 + ["acceptance"] * 50


OTHERS = {"learning_rate": 1e-3, "batch_tokens": 64, "seed": 3, "prompt_weight": 0.5}


@pytest.mark.parametrize("name", OTHERS)
def test_teaching_continues_with_the_same_settings_alone(name, tmp_path):
    views = {SHALLOW: adapted("llama-tied").view}
    begun = identify_teaching(ExitTrainingArguments(""), views, None)
    longer = identify_teaching(ExitTrainingArguments("", max_steps=30_000, eval_steps=5), views, None)
    teaching.refuse_other_teaching(tmp_path, begun, longer)
    other = identify_teaching(ExitTrainingArguments("", **{name: OTHERS[name]}), views, None)
    with pytest.raises(UserError, match=f"was begun with other --{name}: name those"):
        teaching.refuse_other_teaching(tmp_path, begun, other)


def test_teaching_continues_from_the_same_weights_alone(tmp_path):
    """Whatever folder they lie in."""
    view = adapted("llama-tied").view
    flags = [ExitTrainingArguments("", exit_adapter_path=name) for name in ("a", "b")]
    begun, moved = (identify_teaching(given, {SHALLOW: view}, None) for given in flags)
    teaching.refuse_other_teaching(tmp_path, begun, moved)
    with torch.no_grad():
        next(view.exit_adapter.parameters()).add_(0.1)
    with pytest.raises(UserError, match="was begun with other weights of --exit_adapter_path"):
        teaching.refuse_other_teaching(tmp_path, begun, identify_teaching(flags[0], {SHALLOW: view}, None))
