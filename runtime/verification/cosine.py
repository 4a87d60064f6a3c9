"""TileCosine: how near tile features are to the reference's, by the angle between rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llava_edge.runtime.util.arrays import Array


@dataclass(frozen=True)
class TileCosine:
    """One minus the cosine between rows of features: the mean over all tiles, and the worst tile.

    A tile counts as the mean of its rows.
    """

    mean_loss: float
    worst_loss: float

    @classmethod
    def of(cls, ours: Array, theirs: Array) -> TileCosine:
        """Compare features [tiles, patches, hidden]; both are read as float64.

        Two rows of zeros count as equal, one beside another as at a right angle; what is not finite
        gives NaN.
        """
        a, b = ours.astype(np.float64), theirs.astype(np.float64)
        products = (a * b).sum(-1)
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        both_zero = ~(a.any(-1) | b.any(-1))
        cosines = np.where(both_zero, 1.0, products / np.where(norms == 0, 1.0, norms))
        tiles = 1.0 - cosines.mean(-1)
        return cls(float(tiles.mean()), float(tiles.max()))
