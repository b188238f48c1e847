"""The judge's answers: parsed as text, scored as by hand, kept in a log."""

from __future__ import annotations

import json
import os
from collections import Counter

import pytest
from judge_runs import RATINGS

from gpt_eval.agreement import cohen_kappa
from gpt_eval.answer_log import AnswerLog, read_answers
from gpt_eval.parsing import DIMENSIONS, parse_answer
from gpt_eval.scoring import score
from models.errors import UserError


def rate(*ratings):
    return json.dumps(dict(zip(DIMENSIONS, ratings, strict=True)))


@pytest.mark.parametrize(
    ("judgement", "text", "verdict", "state"),
    [
        ("likert", RATINGS, [4, 3, 5, 2], "strict"),
        ("likert", f"Here you are:\n```json\n{RATINGS}\n```", [4, 3, 5, 2], "lenient"),
        ("likert", "Relevance: 4\n**Informativeness**: 3/5\nFluency-5\ncoherence=2", [4, 3, 5, 2], "lenient"),
        ("likert", RATINGS.replace("4", "6"), None, "unparsable"),
        ("likert", RATINGS.replace("4", "4.5"), None, "unparsable"),
        ("likert", RATINGS.replace("4", "true"), None, "unparsable"),
        ("likert", RATINGS[:-10], None, "unparsable"),
        ("likert", f"{RATINGS} or {RATINGS.replace('4', '1')}", None, "unparsable"),
        ("likert", "Relevance: 4\nInformativeness: 3\nFluency: 5", None, "unparsable"),
        ("likert", RATINGS.strip("{}").replace(",", "\n"), [4, 3, 5, 2], "lenient"),
        ("likert", "Relevance: 4 / 10\nInformativeness: 3\nFluency: 5\nCoherence: 2", None, "unparsable"),
        ("likert", RATINGS.strip("{}") + "\nFluency: 1", None, "unparsable"),
        ("likert", "Relevance: 45\nInformativeness: 3\nFluency: 5\nCoherence: 2", None, "unparsable"),
        ("likert", "__import__('os').system('touch pwned')", None, "unparsable"),
        ("likert", "[" * 100_000, None, "unparsable"),
        ("likert", f"<think>Fluency: 1? {rate(1, 1, 1, 1)}</think>{RATINGS}", [4, 3, 5, 2], "lenient"),
        ("likert", f"<think>{RATINGS}", None, "unparsable"),
        ("likert", "", None, "unparsable"),
        ("pairwise", '{"better": "Summary 1"}', "Summary 1", "strict"),
        ("pairwise", '{"better": "tie"}', "tie", "strict"),
        ("pairwise", "Summary 1", "Summary 1", "lenient"),
        ("pairwise", "Summary 0\nor not?</think>\n\nSummary 1", "Summary 1", "lenient"),
        ("pairwise", "**Summary 0** is better.", "Summary 0", "lenient"),
        ("pairwise", "The better summary is: Summary0\n\nSummary 1 lacks the date.", "Summary 0", "lenient"),
        ("pairwise", "Tie", "tie", "lenient"),
        ("pairwise", "Summary 1 is worse", None, "unparsable"),
        ("pairwise", "Summary 0\nSummary 1", None, "unparsable"),
        ("pairwise", '{"better": "Summary 2"}', None, "unparsable"),
        ("pairwise", '{"better": ["tie"]}', None, "unparsable"),
    ],
)  # fmt: skip
def test_parsing(judgement, text, verdict, state):
    expected = dict(zip(DIMENSIONS, verdict, strict=True)) if isinstance(verdict, list) else verdict
    assert parse_answer(judgement, text) == (expected, state)


def build(judgement, name, systems, answer, repeat=0):
    key = f"{judgement} {name} {systems} {repeat}"
    request = {"key": key, "judgement": judgement, "id": name, "systems": systems, "repeat": repeat}
    return request, {"key": key, "answer": answer, "usage": {"prompt_tokens": 10, "completion_tokens": 1}}


def score_all(*built, **others):
    requests = [request for request, _ in built]
    answers = {answer["key"]: answer for _, answer in built if answer["answer"] is not None}
    return score(requests, {"m": answers, **others})


def test_likert_means_leave_unparsable_answers_out():
    scores = score_all(
        build("likert", "1", ["a"], rate(4, 3, 5, 2)),
        build("likert", "1", ["a"], rate(2, 3, 5, 2), repeat=1),  # sample 1: relevance (4 + 2) / 2 = 3
        build("likert", "2", ["a"], rate(5, 4, 5, 2)),
        build("likert", "2", ["a"], "Relevance: 1", repeat=1),
        build("likert", "3", ["a"], None),
        build("likert", "1", ["b"], rate(1, 1, 1, 1)),
        build("likert", "2", ["b"], rate(5, 5, 5, 5)),
    )
    judge = scores["judges"]["m"]
    system = judge["likert"]["systems"]["a"]
    assert system["answers"] == {"strict": 3, "lenient": 0, "unparsable": 1, "refused": 0, "missing": 1}
    assert system["samples"] == 2
    means = {name: system[name]["mean"] for name in (*DIMENSIONS, "average")}
    assert means == {
        "relevance": 4.0,
        "informativeness": 3.5,
        "fluency": 5.0,
        "coherence": 2.0,
        "average": 3.625,
    }
    assert system["relevance"]["interval"] == [3.0, 5.0] and system["fluency"]["interval"] == [5.0, 5.0]
    assert judge["likert"]["difference"]["relevance"]["mean"] == 1.0  # (3 - 1 + 5 - 5) / 2
    assert judge["usage"] == {"prompt_tokens": 60, "completion_tokens": 6}


def pair(name, first, second, repeat=0):
    """Answers to the order a, b and to b, a."""
    choices = [answer and json.dumps({"better": answer}) for answer in (first, second)]
    return [
        build("pairwise", name, systems, choice, repeat)
        for systems, choice in zip((["a", "b"], ["b", "a"]), choices, strict=True)
    ]


def test_pairwise_counts_wins_in_both_orders_only():
    zero, one = "Summary 0", "Summary 1"
    scores = score_all(
        *(row for name in "1234" for row in pair(name, zero, one)),  # a wins
        *pair("5", one, zero),  # b wins
        *pair("6", zero, zero),  # the first place wins: a tie
        *pair("7", "tie", "tie"),
        *pair("8", zero, "tie"),
        *pair("9", zero, None),  # incomplete
        *pair("10", "both", one),  # unparsable
    )
    pairwise = scores["judges"]["m"]["pairwise"]
    assert [pairwise[name] for name in ("samples", "wins", "losses", "ties")] == [8, 4, 1, 3]
    assert pairwise["incomplete_pairs"] == 2
    assert pairwise["answers"] == {"strict": 18, "lenient": 0, "unparsable": 1, "refused": 0, "missing": 1}
    assert pairwise["win_rate"] == 0.8
    assert pairwise["p_value"] == pytest.approx(2 * (5 + 1) / 2**5)  # 4 or more of 5, both tails
    position = pairwise["position"]
    assert position["first_share"] == pytest.approx(8 / 13)  # 13 answers decide: 5 pairs, 6 twice, 8 once
    assert (position["always_first"], position["always_second"]) == (1, 0)
    assert position["consistency"] == 6 / 8


def test_a_pair_of_which_one_order_was_asked_is_incomplete():
    (first, _), other = pair("1", "Summary 0", "Summary 1"), pair("2", "Summary 0", "Summary 1")
    pairwise = score_all(first, *other)["judges"]["m"]["pairwise"]
    assert (pairwise["samples"], pairwise["incomplete_pairs"], pairwise["wins"]) == (1, 1, 1)


def test_equal_texts_say_nothing_of_places():
    """They are one request, whose answer names the same place in both orders."""
    rows = []
    for name in "12345678":
        both = pair(name, "Summary 0", "Summary 0")
        for request, answer in both:
            request["key"] = answer["key"] = name
        rows += both
    pairwise = score_all(*rows, *pair("9", "Summary 1", "Summary 1"))["judges"]["m"]["pairwise"]
    assert (pairwise["samples"], pairwise["ties"]) == (9, 9)
    position = pairwise["position"]
    assert (position["first_share"], position["always_first"], position["always_second"]) == (0, 0, 1)


def test_repeats_vote_and_count_once():
    zero, one = "Summary 0", "Summary 1"
    votes = [pair("1", zero, one, 0), pair("1", zero, one, 1), pair("1", one, zero, 2)]
    pairwise = score_all(*(row for rows in votes for row in rows))["judges"]["m"]["pairwise"]
    assert (pairwise["samples"], pairwise["wins"], pairwise["p_value"]) == (1, 1, 1.0)


def test_kappa():
    first, second = [*"yyyyynnnnn"], [*"yyyynnnnny"]
    assert cohen_kappa(first, second) == pytest.approx((0.8 - 0.5) / (1 - 0.5))
    assert cohen_kappa(["y"], ["y"]) is None
    ratings, others = [1, 2, 3, 3], [1, 2, 3, 2]  # squared distance: 1/4; by chance (6 + 2 + 6 + 6) / 16
    assert cohen_kappa(ratings, others, range(1, 6)) == pytest.approx(1 - (1 / 4) / (20 / 16))


def test_agreement_of_repeats_and_judges():
    ours = [build("likert", name, ["a"], rate(4, 3, 5, 2), repeat) for name in "12" for repeat in (0, 1)]
    other = {
        key: row | {"answer": rate(4, 3, 5, 1)} for row in (row for _, row in ours) if (key := row["key"])
    }
    rows = score_all(*ours, n=other)["agreement"]
    assert Counter(row["between"] for row in rows) == {"repeats": 2 * 4, "judges": 2 * 4}
    by_item = {row["item"]: row for row in rows if row["raters"] == ["m #0", "n #0"]}
    assert by_item["coherence"]["agreement"] == 0 and by_item["relevance"]["agreement"] == 1
    assert by_item["coherence"]["count"] == 2 and by_item["coherence"]["kappa"] == 0


def test_log_drops_a_torn_line_and_keeps_others_out(tmp_path):
    path = tmp_path / "answers.jsonl"
    with AnswerLog(path, "m") as log:
        log.append("a", {"answer": "1"})
        with pytest.raises(ValueError):
            log.append("a", {"answer": "2"})
        with pytest.raises(UserError, match="another run is writing"):
            AnswerLog(path, "m")
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": "b", "ans')
    assert set(read_answers(path)) == {"a"}
    with pytest.raises(UserError, match="holds answers of m"):
        AnswerLog(path, "other")
    with AnswerLog(path, "m") as log:
        log.append("b", {"answer": "2"})
    assert path.read_bytes().startswith(whole) and set(read_answers(path)) == {"a", "b"}
    path.write_bytes(whole + whole)
    with pytest.raises(UserError, match="line 2: a second answer"):
        AnswerLog(path, "m")
    path.write_bytes(whole + whole.replace(b'"a"', b'"b"').replace(b'"m"', b'"n"'))
    with pytest.raises(UserError, match="holds answers of m and n: one file a judge"):
        read_answers(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"key": "a", "answer": "1"}, "line 1: not an answer of `run`"),
        ({"key": "a", "model": "m", "answer": 5}, "line 1: answer must be"),
        ({"key": "a", "model": None, "answer": "1"}, "line 1: model must be"),
    ],
)
def test_answers_of_another_shape_are_refused(tmp_path, line, message):
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match=message):
        read_answers(path)


def test_failed_write_leaves_whole_lines(tmp_path, monkeypatch):
    path = tmp_path / "answers.jsonl"
    with AnswerLog(path, "m") as log:
        log.append("a", {"answer": "1"})
        write = os.write
        monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:5]))
        with pytest.raises(OSError, match="disk is full"):
            log.append("b", {"answer": "2"})
        monkeypatch.undo()
        log.append("b", {"answer": "2"})
    assert set(read_answers(path)) == {"a", "b"}
