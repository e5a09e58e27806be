"""Models at equal quality: the cost at which a curve of quality against cost reaches a given quality."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Place = Literal["on the curve", "better than every point", "worse than every point", "the cheapest point is better"]


class Point(NamedTuple):
    """A model: a cost (lower is better) and a quality (bits, lower is better)."""

    cost: float
    quality: float


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """Where a quality lies on a curve.

    Attributes:
        place: Whether the curve reaches the quality, and if not, why.
        cost: The smallest cost at which the curve reaches the quality. None: it does not.
    """

    place: Place
    cost: float | None = None


def find_crossing(quality: float, curve: Sequence[Point]) -> Crossing:
    """Return the smallest cost at which a curve reaches a quality; nothing is extrapolated.

    Between two points, neighbours by cost, the quality is linear in the logarithm of the cost. A curve need not
    improve with the cost everywhere: the first crossing counts, which favours the curve.

    Args:
        quality: The quality to reach, lower is better.
        curve: At least one point, in any order, with positive costs.
    """
    points = sorted(curve)
    qualities = [point.quality for point in points]
    if quality < min(qualities):
        return Crossing(place="better than every point")
    if quality > max(qualities):
        return Crossing(place="worse than every point")
    if quality > qualities[0]:
        return Crossing(place="the cheapest point is better")
    if quality == qualities[0]:
        return Crossing(place="on the curve", cost=points[0].cost)
    end = next(index for index, reached in enumerate(qualities) if reached <= quality)
    worse, better = points[end - 1], points[end]
    share = (worse.quality - quality) / (worse.quality - better.quality)
    logarithm = (1 - share) * math.log(worse.cost) + share * math.log(better.cost)
    return Crossing(place="on the curve", cost=math.exp(logarithm))
