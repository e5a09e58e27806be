"""Memformer: sequence models with a fixed-size memory for arbitrarily long input (arXiv 2010.06891)."""

import importlib.metadata
import warnings

from memformer.errors import CheckpointError, InputError, InputTypeError, SaveError
from memformer.evaluation.likelihood import Evaluation, Likelihood, evaluate
from memformer.generation.session import Session
from memformer.models import (
    LSTM,
    AssociativeRecurrentMemoryTransformer,
    ClassificationStream,
    CompressiveTransformer,
    Memformer,
    MemformerForSequenceClassification,
    RecurrentMemoryTransformer,
    RecurrentModel,
    TransformerXL,
    build_model,
    load_model,
)
from memformer.models.baseline_configs import (
    AssociativeRecurrentMemoryTransformerConfig,
    CompressiveTransformerConfig,
    LSTMConfig,
    RecurrentMemoryTransformerConfig,
    TransformerXLConfig,
)
from memformer.models.classification_config import MemformerClassificationConfig
from memformer.models.config import MemformerConfig
from memformer.nn import AttentionRecord
from memformer.rollout import Rollout
from memformer.training.replay import RolloutHooks, RolloutResult, backpropagate
from memformer.training.run_folder import LoadedRun, load_run

__version__ = "0.2.0.dev0"

__all__ = [
    "LSTM",
    "AssociativeRecurrentMemoryTransformer",
    "AssociativeRecurrentMemoryTransformerConfig",
    "AttentionRecord",
    "CheckpointError",
    "ClassificationStream",
    "CompressiveTransformer",
    "CompressiveTransformerConfig",
    "Evaluation",
    "InputError",
    "InputTypeError",
    "LSTMConfig",
    "Likelihood",
    "LoadedRun",
    "Memformer",
    "MemformerClassificationConfig",
    "MemformerConfig",
    "MemformerForSequenceClassification",
    "RecurrentMemoryTransformer",
    "RecurrentMemoryTransformerConfig",
    "RecurrentModel",
    "Rollout",
    "RolloutHooks",
    "RolloutResult",
    "SaveError",
    "Session",
    "TransformerXL",
    "TransformerXLConfig",
    "backpropagate",
    "build_model",
    "evaluate",
    "load_model",
    "load_run",
]


def _warn_of_namesake() -> None:
    """Warn if the unrelated PyPI package `memformer` is installed: both packages install into the same folder."""
    try:
        version = importlib.metadata.version("memformer")
    except importlib.metadata.PackageNotFoundError:
        return
    warnings.warn(
        f"the distribution memformer {version} is installed together with memformer-lm {__version__} and has the same "
        "import name, so their files overwrite each other; run `pip uninstall memformer memformer-lm`, then install "
        "memformer-lm again",
        stacklevel=3,
    )


_warn_of_namesake()
