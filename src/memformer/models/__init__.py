"""Models behind the same shape: a recurrence over segments plus a readout."""

from memformer.models.language_model import LanguageModel
from memformer.models.loading import build_model, load_model
from memformer.models.lstm import LSTM
from memformer.models.memformer import Memformer
from memformer.models.next_token import NextTokenModel
from memformer.models.recurrence import RecurrentModel
from memformer.models.transformer_xl import TransformerXL

__all__ = [
    "LSTM",
    "LanguageModel",
    "Memformer",
    "NextTokenModel",
    "RecurrentModel",
    "TransformerXL",
    "build_model",
    "load_model",
]
