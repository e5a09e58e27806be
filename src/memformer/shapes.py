"""The one legend of axis letters, used in every annotation and shape comment of the package.

| letter | axis |
|---|---|
| B | batch rows (streams, lanes) |
| N | timesteps (segments) of a rollout |
| S | tokens of an encoder segment |
| R | hidden states that the readout sees: S, or more where the written slots or the last token follow them |
| T | tokens of a decoder segment (targets) |
| K | memory slots |
| D | model width |
| W | width of a memory slot, where it need not be D |
| H | attention heads; one head is D/H wide |
| F | feed-forward width |
| V | vocabulary |
| Q, J | query and key positions of one attention |

A mask's name says what True means: `padding_mask` is True at padding, `keep_mask` is True where attention may look.
"""

from jaxtyping import Bool, Float, Int64
from torch import Tensor

Segment = Int64[Tensor, "B S"]
Targets = Int64[Tensor, "B T"]
Starts = Int64[Tensor, " B"]
SegmentPadding = Bool[Tensor, "B S"]
TargetPadding = Bool[Tensor, "B T"]
Memory = Float[Tensor, "B K D"]
AnyMemory = Float[Tensor, "B K W"]
Hidden = Float[Tensor, "B R D"]
Logits = Float[Tensor, "B T V"]
