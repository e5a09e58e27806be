"""Axis letters and tensor types used in every annotation and shape comment of the package.

| letter | axis |
|---|---|
| B | batch rows (streams, lanes) |
| N | timesteps (segments) of a rollout |
| L | segments in the encoder: one for each row, or several that are read with the same memory |
| S | tokens of an encoder segment |
| R | hidden states passed to the readout: S, and the last tokens, embedded, if the decoder reads them again |
| T | tokens of a decoder segment (targets) |
| K | memory slots |
| D | model width |
| W | width of a memory slot: D, unless the model has slots of another width |
| H | attention heads; one head is D/H wide |
| F | feed-forward width |
| V | vocabulary |
| Q, J | queries and keys of one attention |

A mask is named after its True entries: `padding_mask` is True at padding, `keep_mask` where attention is allowed.
"""

from jaxtyping import Bool, Float, Int64
from torch import Tensor

Segment = Int64[Tensor, "B S"]
Targets = Int64[Tensor, "B T"]
DecoderStartIds = Int64[Tensor, " B"]
SegmentPadding = Bool[Tensor, "B S"]
TargetPadding = Bool[Tensor, "B T"]
Memory = Float[Tensor, "B K W"]
SlotBias = Float[Tensor, "B 1 1 K"]
Hidden = Float[Tensor, "B R D"]
Logits = Float[Tensor, "B T V"]
