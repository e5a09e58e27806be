"""Models behind the same shape: a recurrence over segments plus a readout."""

from memformer.models.memformer import Memformer
from memformer.models.recurrence import RecurrentModel

__all__ = ["Memformer", "RecurrentModel"]
