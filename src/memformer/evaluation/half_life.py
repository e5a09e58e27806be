"""How long a memory slot keeps a value: computed from its forgetting vector, and measured on a text."""

import math

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from memformer.models.memformer import Memformer
from memformer.models.recurrence import RecurrentModel
from memformer.nn.attention import AttentionRecord, merge_heads, split_heads
from memformer.shapes import Memory, Segment, SegmentPadding

# A slot whose distance from its initial state is a smaller share of that state's length holds no value.
_LEAST_VALUE = 1e-3
# Below this speed the timesteps are not counted one by one; the formula's relative error is of the speed's square.
_SLOW = 1e-3
_TOKENS_AT_ONCE = 8192


def forgetting_norms(model: Memformer) -> NDArray[np.float64]:
    """Return ||v_i|| of each slot's forgetting vector, (K,); 0 for a model that does not forget."""
    normalization = model.memory_normalization
    if not normalization.forgetting:
        return np.zeros(normalization.num_slots)
    norms = normalization.forgetting_vectors().detach().double().norm(dim=-1).cpu().numpy()
    return np.broadcast_to(norms, normalization.num_slots).copy()


def computed_half_lives(model: Memformer) -> NDArray[np.float64]:
    """Return the half-life in timesteps of a value in each slot if nothing is written to it, (K,); see `half_life`.

    The value is orthogonal to the forgetting vector, as a new value in a wide slot nearly is. The half-life is infinite
    where the slot does not forget, and with `forgetting_when_written`, where only written slots forget.
    """
    normalization = model.memory_normalization
    if normalization.only_when_written:
        return np.full(normalization.num_slots, np.inf)
    speeds = forgetting_norms(model) / normalization.radius
    return np.array([half_life(float(speed)) for speed in speeds])


def half_life(speed: float, angle: float = math.pi / 2) -> float:
    """Return the number of timesteps until half of a slot's value is forgotten, if nothing is written to the slot.

    Let m be the slot, r its radius, u the direction of its forgetting vector v and s = ||v|| / r its speed. If the slot
    attends only to itself, memory normalization gives

        m <- r (m + v) / ||m + v||

    so m stays in the plane of m and u, and with the angle a between m and u:

        tan a' = sin a / (cos a + s)                                                                   (1)

    The slot's initial state r u stays where it is. The value is d_t = m_t - r u, the difference from a slot in its
    initial state. Its remaining share is the projection on the value at the start, with (2 - 2 cos a_0) r^2 = |d_0|^2:

        d_t . d_0 / |d_0|^2  =  1/2 + sin(a_t - a_0 / 2) / (2 sin(a_0 / 2))                            (2)

    It is 1/2 exactly when the angle has halved, a_t = a_0 / 2. The half-life is the number of steps (1) until then,
    with the share (2) interpolated linearly between two timesteps. Slow slots need many steps. For them, (1) is

        ln tan(a'/2) - ln tan(a/2)  =  -s + s^2 cos(a) / 2 + O(s^3)

    whose sum gives  t = ln(tan(a_0 / 2) / tan(a_0 / 4)) / s + ln(sin(a_0) / sin(a_0 / 2)) / 2.
    From a right angle, t is about 0.88 / s.

    Args:
        speed: ||v|| / r, at least 0.
        angle: Angle a_0 between the slot and its forgetting vector in radians, above 0 and below pi.
    """
    if speed == 0:
        return math.inf
    if speed < _SLOW:
        slow_part = math.log(math.tan(angle / 2) / math.tan(angle / 4)) / speed
        return slow_part + math.log(math.sin(angle) / math.sin(angle / 2)) / 2
    start, shares = angle, [1.0]
    while shares[-1] > 0.5:
        angle = math.atan2(math.sin(angle), math.cos(angle) + speed)
        shares.append(0.5 + math.sin(angle - start / 2) / (2 * math.sin(start / 2)))
    return time_of_half(np.array(shares))


def time_of_half(shares: NDArray[np.float64]) -> float:
    """Return the first time at which a share, given at timesteps 0, 1, ..., is 1/2; infinity if it stays above."""
    below = np.flatnonzero(shares <= 0.5)
    if not below.size:
        return math.inf
    after = int(below[0])
    if after == 0:
        return 0.0
    before = float(shares[after - 1])
    return after - 1 + (before - 0.5) / (before - float(shares[after]))


class LifetimeProbe:
    """Measures how much of each slot's value is left while a model reads on.

    Beside each probed slot there is a second one, which begins in the initial state, as if it held nothing. The
    difference of the two is what is left of the value; the share that is left is its projection on the difference at
    the start, divided by the square of that.

    In a model with a memory writer, the second slot takes from the tokens exactly what the first one takes, with the
    same weights, and forgets as the first one does. So a slot to which nothing is written has the computed half-life.
    (If the second memory read the segments by itself, empty slots could take what intact slots do not.) In a
    `RecurrentMemoryTransformer`, whose slots attend to each other, it does read by itself: for every probed slot there
    is a memory in which this slot is in its initial state, and what was written because of the value counts as left.

    Args:
        model: The model.
        memory: The intact memory at the start, one row.
        slots: Indices of the probed slots.
    """

    def __init__(self, model: RecurrentModel, memory: Memory, slots: NDArray[np.int64]) -> None:
        self._model = model
        self._rows = torch.arange(len(slots), device=memory.device)
        self._slots = torch.from_numpy(slots).to(memory.device)
        initial = model.initial_memory(1)[0, self._slots]
        if isinstance(model, Memformer):
            self._erased = model.initial_memory(1)
        else:
            self._erased = memory.repeat(len(slots), 1, 1)
            self._erased[self._rows, self._slots] = initial
        self._value = (memory[0, self._slots] - initial).double()
        self._square = self._value.square().sum(dim=-1)
        empty = self._value.norm(dim=-1) <= _LEAST_VALUE * initial.double().norm(dim=-1)
        self._shares = [torch.where(empty, torch.nan, 1.0).double()]

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps read since the start."""
        return len(self._shares) - 1

    def read(
        self, segment: Segment, padding: SegmentPadding | None, *, next_memory: Memory, record: AttentionRecord
    ) -> None:
        """Read a segment, one row, after which the intact memory is `next_memory`; `record` is of reading it."""
        if isinstance(self._model, Memformer):
            if padding is None or not padding.all():
                self._erased = _written_alike(self._model, self._erased, record)
            erased = self._erased[0, self._slots]
        else:
            self._erased = self._encode(segment, padding)
            erased = self._erased[self._rows, self._slots]
        left = next_memory[0, self._slots] - erased
        share = (left.double() * self._value).sum(dim=-1) / self._square
        self._shares.append(torch.where(self._shares[0].isnan(), torch.nan, share))

    def _encode(self, segment: Segment, padding: SegmentPadding | None) -> Float[Tensor, "slots K W"]:
        rows = []
        for memory in self._erased.split(max(1, _TOKENS_AT_ONCE // segment.shape[1])):
            masks = None if padding is None else padding.expand(len(memory), -1)
            rows.append(self._model.encode(segment.expand(len(memory), -1), memory=memory, padding_mask=masks)[1])
        return torch.cat(rows)

    def shares(self) -> NDArray[np.float64]:
        """Return the share left after 0, 1, ... timesteps, (timesteps + 1, probed slots); NaN for an empty slot."""
        found: Tensor = torch.stack(self._shares)
        return found.cpu().numpy()


def _written_alike(model: Memformer, memory: Memory, record: AttentionRecord) -> Memory:
    """Return the next memory if slots keep as much of themselves, and take the same, as when `record` was made."""
    assert record.writer is not None
    assert record.taken is not None
    own_weight = record.writer[..., :1]
    kept = merge_heads(own_weight * split_heads(memory, own_weight.shape[1]))
    return model.memory_normalization(kept + record.taken, written=1 - own_weight)
