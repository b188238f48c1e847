"""Shortlists as scripts/learn_shortlist.py learns and judges them."""

from __future__ import annotations

import json

import pytest
import torch

from scripts import learn_shortlist


def test_shortlist_decisions_are_compared_token_by_token():
    full, short = torch.tensor([0.9, 0.6, 0.2, 0.1]), torch.tensor([0.9, 0.4, 0.7, 0.2])
    decisions = learn_shortlist.compare_decisions(full, short, torch.tensor([True, True, False, True]), 0.5)
    assert decisions == {
        "threshold": 0.5,
        "full_exits": 0.5,
        "shortlist_exits": 0.5,
        "decisions_changed": 0.5,
        "full_wrong_exits": 0.0,
        "shortlist_wrong_exits": 0.25,
    }


@pytest.mark.slow
def test_learnt_shortlist_says_what_it_changes(tmp_path):
    path = tmp_path / "shortlist.json"
    flags = ["--model_name_or_path", "checkpoints/debian-t5-free", "--dataset_name", "debian_de_en"]
    flags += ["--split", "validation", "--size", "100", "--num_samples", "2", "--output_file", str(path)]
    learn_shortlist.main(flags)
    shortlist = json.loads(path.read_text())
    assert len(set(shortlist["token_ids"])) == 100 and 0 < shortlist["coverage"] < 1
    exits = [row["shortlist_exits"] for row in shortlist["decisions"]]
    assert exits == sorted(exits, reverse=True) and 0 < exits[-1] < exits[0]
