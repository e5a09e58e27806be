"""Model configs: invalid values are refused, and a round trip through a dictionary changes nothing."""

import subprocess
import sys

import pytest

from memformer import InputError, InputTypeError
from tests.helpers import tiny_config


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"d_model": 15}, InputError, r"d_model \(15\) must be a multiple of num_heads \(2\)"),
        ({"d_model": 6}, InputError, "rotary positions need an even head width"),
        ({"num_writer_heads": 3}, InputError, r"d_model \(16\) must be a multiple of num_writer_heads \(3\)"),
        ({"slot_width": 7}, InputError, r"slot_width \(7\) must be a multiple of num_heads \(2\)"),
        ({"slot_width": 4, "num_writer_heads": 3}, InputError, r"slot_width \(4\) must be a multiple of num_writer_he"),
        ({"slot_width": 0}, InputError, r"slot_width \(0\) must be at least 1"),
        ({"slot_width": 4, "num_slots": 0}, InputError, "there is no slot"),
        ({"num_slots": -1}, InputError, r"num_slots \(-1\) must be at least 0"),
        ({"vocab_size": 1}, InputError, r"vocab_size \(1\) must be at least 2"),
        ({"convolution_kernel": 2}, InputError, r"convolution_kernel \(2\) must be odd"),
        ({"exchangeable_slots": True, "forgetting_speeds": (0.1, 0.1)}, InputError, "all slots would stay the same"),
        ({"exchangeable_slots": True, "write_competition": True}, InputError, "share one vector share its speed"),
        ({"free_slot_bias": -1.0}, InputError, r"free_slot_bias \(-1.0\) must be at least 0"),
        ({"write_temperature": 0.0}, InputError, r"write_temperature \(0.0\) must be above 0"),
        ({"forgetting": False, "forgetting_when_written": True}, InputError, "there is nothing to scale"),
        ({"forgetting_speeds": (0.0, 1.0)}, InputError, "forgetting_speeds .* must be above 0"),
        ({"dropout": 1.0}, InputError, r"dropout \(1.0\) must be at least 0 and below 1"),
        ({"content_addressing": True, "num_slots": 0}, InputError, "there is no slot to find"),
        ({"write_sharing": True}, InputError, "without competition every slot attends to every token"),
        ({"attention_dropout": -0.1}, InputError, r"attention_dropout \(-0.1\)"),
    ],
)
def test_wrong_configs_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        tiny_config(**changes)


def test_config_survives_a_round_trip_through_a_dictionary_and_names_wrong_keys():
    config = tiny_config(forgetting_speeds=(0.2, 0.1), dropout=0.1, adaptive_cutoffs=(3, 7))
    assert type(config).from_dict(config.to_dict()) == config
    with pytest.raises(InputError, match="unknown key 'd_modle' in model config; did you mean 'd_model'"):
        type(config).from_dict({"d_modle": 3})
    with pytest.raises(InputTypeError, match="forgetting_speeds .* must be a list of numbers"):
        type(config).from_dict({"forgetting_speeds": 3})


def test_errors_name_wrong_types_in_a_config():
    # In a separate process, because in this one the tests' type checker would raise first.
    code = """
from memformer import InputError, MemformerConfig
for fields in ({"d_model": "16"}, {"num_slots": True}, {"dropout": "high"}, {"positions": "absolute"}):
    try:
        MemformerConfig.from_dict(fields)
    except InputError as error:
        print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "InputTypeError d_model ('16') must be an integer",
        "InputTypeError num_slots (True) must be an integer",
        "InputTypeError dropout ('high') must be a number",
        "InputError positions ('absolute') must be one of rotary, relative",
    ]
