"""Memformer: sequence models that read arbitrarily long input with a memory of fixed size (arXiv 2010.06891)."""

from memformer.config import MemformerConfig
from memformer.errors import CheckpointError, InputError, InputTypeError, SaveError
from memformer.models import Memformer, RecurrentModel
from memformer.nn import AttentionRecord
from memformer.rollout import Rollout
from memformer.training.replay import RolloutResult, backpropagate

__version__ = "0.1.0"

__all__ = [
    "AttentionRecord",
    "CheckpointError",
    "InputError",
    "InputTypeError",
    "Memformer",
    "MemformerConfig",
    "RecurrentModel",
    "Rollout",
    "RolloutResult",
    "SaveError",
    "backpropagate",
]
