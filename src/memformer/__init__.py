"""Memformer: sequence models that read arbitrarily long input with a memory of fixed size (arXiv 2010.06891)."""

from memformer.errors import CheckpointError, InputError, InputTypeError, SaveError
from memformer.evaluation.likelihood import Evaluation, Likelihood, evaluate
from memformer.generation.session import Session
from memformer.models import (
    LSTM,
    CompressiveTransformer,
    Memformer,
    RecurrentMemoryTransformer,
    RecurrentModel,
    TransformerXL,
    build_model,
    load_model,
)
from memformer.models.baseline_configs import (
    CompressiveTransformerConfig,
    LSTMConfig,
    RecurrentMemoryTransformerConfig,
    TransformerXLConfig,
)
from memformer.models.config import MemformerConfig
from memformer.nn import AttentionRecord
from memformer.rollout import Rollout
from memformer.training.replay import RolloutResult, backpropagate

__version__ = "0.1.0"

__all__ = [
    "LSTM",
    "AttentionRecord",
    "CheckpointError",
    "CompressiveTransformer",
    "CompressiveTransformerConfig",
    "Evaluation",
    "InputError",
    "InputTypeError",
    "LSTMConfig",
    "Likelihood",
    "Memformer",
    "MemformerConfig",
    "RecurrentMemoryTransformer",
    "RecurrentMemoryTransformerConfig",
    "RecurrentModel",
    "Rollout",
    "RolloutResult",
    "SaveError",
    "Session",
    "TransformerXL",
    "TransformerXLConfig",
    "backpropagate",
    "build_model",
    "evaluate",
    "load_model",
]
