"""Models with one common interface: a recurrence over segments plus a readout."""

from memformer.models.associative_recurrent_memory_transformer import AssociativeRecurrentMemoryTransformer
from memformer.models.classification import ClassificationStream, MemformerForSequenceClassification
from memformer.models.compressive_transformer import CompressiveTransformer
from memformer.models.language_model import LanguageModel
from memformer.models.loading import build_model, load_model
from memformer.models.lstm import LSTM
from memformer.models.memformer import Memformer
from memformer.models.next_token import NextTokenModel
from memformer.models.recurrence import RecurrentModel
from memformer.models.recurrent_memory_transformer import RecurrentMemoryTransformer
from memformer.models.transformer_xl import TransformerXL

__all__ = [
    "LSTM",
    "AssociativeRecurrentMemoryTransformer",
    "ClassificationStream",
    "CompressiveTransformer",
    "LanguageModel",
    "Memformer",
    "MemformerForSequenceClassification",
    "NextTokenModel",
    "RecurrentMemoryTransformer",
    "RecurrentModel",
    "TransformerXL",
    "build_model",
    "load_model",
]
