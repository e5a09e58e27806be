"""Neural network layers: attention, positions and memory."""

from memformer.nn.attention import AttentionRecord
from memformer.nn.auxiliary import AuxiliaryLoss
from memformer.nn.memory import MemoryNormalization, MemoryReader, MemoryWriter

__all__ = ["AttentionRecord", "AuxiliaryLoss", "MemoryNormalization", "MemoryReader", "MemoryWriter"]
