"""Auxiliary losses: training terms in addition to the negative log-likelihood of the tokens."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class AuxiliaryLoss:
    """Auxiliary loss of one timestep, filled when it is passed to `encode`.

    A `Memformer` with a sparse writer fills in the write penalty (see `MemoryWriter`), a `CompressiveTransformer` the
    reconstruction loss of its compression. Other models have no auxiliary loss.

    Attributes:
        is_filler: (B,) bool, True at rows whose segment is known to contain nothing to remember. None: known of none.
        total: Scalar with gradient, summed over the segment's tokens; None until `encode` fills it.
        shortfall: Scalar with gradient, summed over rows: how far the writer is from writing anything in a segment.
            None, if the model has no such writer.
    """

    is_filler: Tensor | None = None
    total: Tensor | None = None
    shortfall: Tensor | None = None
