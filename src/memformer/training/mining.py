"""Finding text that a model takes for facts, which a recall stream then shows it again."""

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from memformer.errors import InputError
from memformer.models.memory_encoder import MemoryEncoder
from memformer.models.recurrence import RecurrentModel, reading
from memformer.shapes import Memory
from memformer.training.config import RunConfig


def check_mining(config: RunConfig, model: RecurrentModel) -> None:
    """Check that decoys can be mined, if the config wants it.

    Raises:
        InputError: The model's memory changes in every timestep.
    """
    recall = config.data.recall
    if recall is None or not recall.mine_decoys:
        return
    if not (isinstance(model, MemoryEncoder) and model.keeps_unwritten_segments):
        raise InputError(
            "data.recall.mine_decoys (true) needs a Memformer whose memory changes only when something is written, as "
            "with model.preset recall"
        )


def is_written(
    model: RecurrentModel, memory: Memory, segments: Int64[Tensor, "segments S"]
) -> Bool[Tensor, " segments"]:
    """Return of which segments the model would write something.

    Args:
        model: A model that `check_mining` accepts.
        memory: Memories of some streams; each segment meets one of them.
        segments: Segments that do not follow each other.
    """
    assert isinstance(model, MemoryEncoder)
    with reading(model):
        rows = torch.arange(len(segments), device=memory.device) % len(memory)
        return model.count_unwritten(segments[:, None].to(memory.device), memory=memory[rows]) == 0
