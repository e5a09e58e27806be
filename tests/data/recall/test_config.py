"""Contradictory recall configs, and fields that the task does not read, are refused."""

import re

import pytest

from memformer import InputError
from memformer.data import RecallConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_facts": (2, 1), "task": "copy"}, "num_facts"),
        ({"num_facts": (1, 2)}, "one fact"),
        (
            {"num_facts": (1, 40), "task": "associative"},
            "must not exceed data.recall.num_keys \\(32\\): every fact needs a different key",
        ),
        ({"max_distance": 0}, "max_distance \\(0\\)"),
        ({"question_probability": 1.5}, "question_probability"),
        ({"decoy_probability": -0.1, "task": "babi", "path": "x", "validation_path": "x"}, "recall.decoy_probability"),
        ({"max_fact_gap": -1}, "max_fact_gap"),
    ],
)
def test_impossible_tasks_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        RecallConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "babi", "validation_path": "x"}, "recall.path (None) must be given for the task 'babi'"),
        ({"task": "babi", "path": "x"}, "recall.validation_path (None) must be given for the task 'babi'"),
        ({"path": "x"}, "recall.path ('x') is not read by the task 'fact', only by babi"),
        ({"task": "passkey", "validation_path": "x"}, "validation_path ('x') is not read by the task 'passkey'"),
        ({"task": "passkey", "num_values": 5}, "num_values (5) is not read by the task 'passkey', only by fact, "),
        (
            {"task": "fact", "decoy_probability": 0.5},
            "decoy_probability (0.5) is not read by the task 'fact', only by ",
        ),
        ({"task": "copy", "num_keys": 5}, "num_keys (5) is not read by the task 'copy', only by associative, rewrite"),
        (
            {"task": "passkey", "num_facts": (1, 2)},
            "recall.num_facts (1, 2) must be (1, 1) for the task 'passkey', which has one fact",
        ),
    ],
)
def test_fields_that_do_not_fit_the_task_are_refused(fields, message):
    with pytest.raises(InputError, match=re.escape(message)):
        RecallConfig(**fields)
