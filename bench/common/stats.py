"""Student's t: how far a mean of few values may lie from another by chance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_STEPS = 120


@dataclass(frozen=True)
class Difference:
    """Of two means, and what may be chance in it.

    Attributes:
        mean: of the second sample less that of the first.
        margin: chance stays below it, with the confidence that was asked for; infinite where a
            sample has one value.
    """

    mean: float
    margin: float


def compare_means(
    first: Sequence[float], second: Sequence[float], chance: float, drift: float = 0.0
) -> Difference:
    """Welch's comparison of two samples, which need not spread alike.

    Args:
        first: at least one value.
        second: at least one value.
        chance: that the margin is exceeded, on either side, where there is no difference.
        drift: by how much the mean of a sample moves that all its values have in common, as a share
            of their standard deviation. No number of values takes it away.
    """
    mean = statistics.fmean(second) - statistics.fmean(first)
    if min(len(first), len(second)) < 2:
        return Difference(mean, math.inf)
    a, b = (
        statistics.variance(values) * (1 / len(values) + drift**2) for values in (first, second)
    )
    if a + b == 0:
        return Difference(mean, 0.0)
    # Welch and Satterthwaite's degrees of freedom.
    freedom = (a + b) ** 2 / (a**2 / (len(first) - 1) + b**2 / (len(second) - 1))
    return Difference(mean, t_quantile(1 - chance / 2, freedom) * math.sqrt(a + b))


def t_quantile(probability: float, freedom: float) -> float:
    """The value that t stays below with a probability of more than one half."""
    low, high = 0.0, 1.0
    while t_tail(high, freedom) > 1 - probability:
        high *= 2
    for _ in range(45):
        middle = (low + high) / 2
        if t_tail(middle, freedom) > 1 - probability:
            low = middle
        else:
            high = middle
    return high


def t_tail(value: float, freedom: float) -> float:
    """Probability that t exceeds a value of at least 0.

    With t = sqrt(freedom) tan(angle) the density becomes a power of the cosine, which Simpson's
    rule adds up.
    """
    start = math.atan(value / math.sqrt(freedom))
    width = (math.pi / 2 - start) / _STEPS
    total = 0.0
    for step in range(_STEPS + 1):
        weight = 1 if step in (0, _STEPS) else 4 if step % 2 else 2
        # Written from the far end, where the cosine is small and must not be rounded away.
        total += weight * math.sin(width * (_STEPS - step)) ** (freedom - 1)
    scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    return math.exp(scale) / math.sqrt(math.pi) * total * width / 3
