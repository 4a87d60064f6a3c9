"""FeatureCache: features of tiles and frames by digest, the least recently used evicted first."""

from __future__ import annotations

from collections import OrderedDict

from llava_edge.profiles.errors import OutOfMemoryError
from llava_edge.runtime.util.allocation import allocate
from llava_edge.runtime.util.arrays import Array

FeatureKey = tuple[bytes, int]
"""Digest of a tile or frame, and rows of its features: those of a frame are pooled."""


class FeatureCache:
    """Bounded by the bytes of the features that it holds.

    Args:
        capacity_bytes: most bytes of features; what does not fit at all is not kept.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.nbytes = 0
        self._features: OrderedDict[FeatureKey, Array] = OrderedDict()

    def __contains__(self, key: FeatureKey) -> bool:
        """Whether ``find`` would find it; does not count as use."""
        return key in self._features

    def find(self, key: FeatureKey) -> Array | None:
        """Features of a tile or frame, not to be written to; None where they are not held."""
        found = self._features.get(key)
        if found is not None:
            self._features.move_to_end(key)
        return found

    def clear(self) -> None:
        """Hold nothing any more."""
        self._features.clear()
        self.nbytes = 0

    def keep(self, key: FeatureKey, features: Array) -> None:
        """Hold a copy of features, and give up as many others as that takes."""
        if key in self._features or features.nbytes > self.capacity_bytes:
            return
        # Room first: never, not even for a moment, more than was allowed.
        while self.nbytes + features.nbytes > self.capacity_bytes:
            _, dropped = self._features.popitem(last=False)
            self.nbytes -= dropped.nbytes
            del dropped
        try:
            copied = allocate(features.shape, features.dtype, "features to be kept")
        except OutOfMemoryError:
            # What is not kept is computed again; the request goes on.
            return
        copied[...] = features
        copied.flags.writeable = False
        self._features[key] = copied
        self.nbytes += copied.nbytes
