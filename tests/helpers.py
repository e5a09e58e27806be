"""Small models, rollouts and comparisons shared by many tests."""

import torch

from memformer import Memformer, MemformerConfig, Rollout
from memformer.models.presets import PAPER_DECODER, preset_fields
from memformer.utils.cuda_graphs import GraphPool

# Every option of the model config that changes the output, one at a time on top of the defaults.
VARIANTS = {
    "default": {},
    "paper": preset_fields("paper"),
    "relative positions": {"positions": "relative"},
    "joint attention, starting from [BOS]": {"decoder_start_tokens": 0},
    "separate attention": PAPER_DECODER,
    "joint attention, starting from the last token": {"decoder_start_tokens": 1},
    "joint attention, starting from more tokens than a segment has": {"decoder_start_tokens": 8},
    "separate attention, starting from the last token": {"decoder_attention": "separate", "decoder_start_tokens": 1},
    "convolution": {"convolution_kernel": 3},
    "without memory": {"num_slots": 0},
    "temperature 1": {"write_temperature": 1.0},
    "without forgetting": {"forgetting": False},
    "single-head writer": {"num_writer_heads": 1},
    "one forgetting speed": {"forgetting_speeds": (0.1, 0.1)},
    "entmax writer": {"write_normalizer": "entmax15"},
    "sparsemax writer": {"write_normalizer": "sparsemax"},
    "competing slots": {"write_competition": True},
    "competing slots, sparse": {"write_competition": True, "write_normalizer": "entmax15"},
    "competing slots, shared": {"write_competition": True, "write_sharing": True, "write_normalizer": "entmax15"},
    "exchangeable slots": {
        "write_competition": True,
        "exchangeable_slots": True,
        "forgetting_speeds": (0.1, 0.1),
        "log_forgetting_speeds": False,
        "free_slot_bias": 2.0,
    },
    "forgetting when written": {"forgetting_when_written": True},
    "content addressing": {"content_addressing": True, "convolution_kernel": 3},
    "position embedding": {"position_embedding": True},
    "one slot": {"num_slots": 1},
    "narrow slots": {"slot_width": 6},
    "narrow slots, content addressing": {"slot_width": 4, "content_addressing": True, "write_normalizer": "entmax15"},
    "adaptive softmax": {"adaptive_cutoffs": (4, 8)},
    "all options": {
        "positions": "relative",
        "decoder_attention": "separate",
        "decoder_start_tokens": 1,
        "convolution_kernel": 3,
    },
}
VOCAB_SIZE = 11
SEGMENT_LENGTH = 6


def tiny_config(**changes):
    fields = {
        "vocab_size": VOCAB_SIZE,
        "d_model": 16,
        "num_heads": 2,
        "d_ff": 32,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "segment_length": SEGMENT_LENGTH,
        "num_slots": 5,
    }
    return MemformerConfig(**{**fields, **changes})


def tiny_model(seed=0, **changes):
    """Return a small float64 model, in evaluation mode unless it has dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Memformer(tiny_config(**changes)).double()
    return model.train(model.config.dropout > 0)


def random_rollout(num_timesteps, batch_size, *, segment_length=SEGMENT_LENGTH, resets=False, padding=False, seed=1):
    """Return a rollout of random tokens.

    With padding, the input of one row is shortened, one timestep of a row is empty, and targets end early.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (num_timesteps, batch_size, segment_length)
    reset = torch.rand(shape[:2], generator=generator) < 0.4 if resets else None
    input_padding = target_padding = None
    if padding:
        input_padding = torch.zeros(shape, dtype=torch.bool)
        input_padding[0, 0, 1:] = True
        input_padding[-1, 1] = True
        target_padding = torch.zeros(shape, dtype=torch.bool)
        target_padding[-1, 0, 2:] = True
        target_padding[-1, 1] = True
    return Rollout(
        inputs=torch.randint(0, VOCAB_SIZE + 1, shape, generator=generator),
        targets=torch.randint(0, VOCAB_SIZE, shape, generator=generator),
        reset=reset,
        input_padding=input_padding,
        target_padding=target_padding,
    )


def assert_close(actual, expected, *, relative=1e-10):
    """Assert that the norm of the difference is small relative to the norm of the expected tensor."""
    # Gradients of order 1 have rounding errors of order 1e-17, so such a difference from a zero gradient is accepted.
    scale = max(expected.norm().item(), 1e-4)
    difference = (actual - expected).norm().item()
    assert difference <= relative * scale, f"difference {difference:.3g} against {relative:.0e} of {scale:.3g}"


def skip_report(patch):
    """Skip the HTML summary, which takes longer than tiny runs and has its own tests."""
    patch.setattr("memformer.training.report.write_report", lambda folder, **_: folder / "summary.html")


class StandInPool(GraphPool):
    """Stands in for a `GraphPool`: records nothing, and raises an error at a recording that the test names."""

    def __init__(self, error=None, *, at=None):
        self.error, self.at, self.num_records = error, at, 0

    def record(self, work, *, before):
        # Like recording, this runs the work several times, with static tensors that it must not rely on.
        before()
        work()
        self.num_records += 1
        if self.num_records == self.at:
            raise self.error("reasons")
        return work
