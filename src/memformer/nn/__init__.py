"""Layers: attention, positions, memory."""

from memformer.nn.attention import AttentionRecord
from memformer.nn.memory import MemoryNormalization, MemoryReader, MemoryWriter, WritePressure

__all__ = ["AttentionRecord", "MemoryNormalization", "MemoryReader", "MemoryWriter", "WritePressure"]
