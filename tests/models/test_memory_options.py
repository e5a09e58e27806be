"""Every option of the memory writer and of forgetting reaches the memory: each changes what is written."""

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import SEGMENT_LENGTH, VOCAB_SIZE, tiny_model

SPARSE = {"write_competition": True, "write_normalizer": "entmax15"}


@pytest.mark.parametrize(
    ("base", "option"),
    [
        ({}, {"write_temperature": 1.0}),
        ({}, {"num_writer_heads": 1}),
        ({}, {"write_normalizer": "entmax15"}),
        ({"write_normalizer": "entmax15"}, {"write_normalizer": "sparsemax"}),
        ({}, {"write_competition": True}),
        (SPARSE, {"write_sharing": True}),
        (SPARSE, {"free_slot_bias": 2.0}),
        ({}, {"forgetting": False}),
        (SPARSE, {"forgetting_when_written": True}),
        ({"log_forgetting_speeds": False}, {"forgetting_speeds": (0.2, 0.2)}),
    ],
    ids=str,
)
def test_every_option_changes_the_memory(base, option):
    memory = 4 * F.normalize(torch.randn(4, 5, 16, dtype=torch.float64), dim=-1)
    segment = torch.randint(VOCAB_SIZE, (4, SEGMENT_LENGTH))
    written = []
    for options in (base, {**base, **option}):
        model = tiny_model(**options)
        if "forgetting_speeds" not in option:
            # Only the option differs: the weights are those of one model, as far as the other has them.
            model.load_state_dict(tiny_model(**base).state_dict(), strict=False)
        written.append(model.encode(segment, memory=memory)[1])
    assert not torch.allclose(*written)
