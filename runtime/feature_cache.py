"""FeatureCache: features of tiles by the tiles' digests, the least recently used given up first."""

from __future__ import annotations

from collections import OrderedDict

from llava_edge.runtime.session import Array


class FeatureCache:
    """Bounded by the bytes of the features that it holds.

    Args:
        capacity_bytes: most bytes of features; what does not fit at all is not kept.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.nbytes = 0
        self._features: OrderedDict[bytes, Array] = OrderedDict()

    def find(self, digest: bytes) -> Array | None:
        """Features of a tile, not to be written to; None where they are not held."""
        found = self._features.get(digest)
        if found is not None:
            self._features.move_to_end(digest)
        return found

    def keep(self, digest: bytes, features: Array) -> None:
        """Hold a copy of a tile's features, and give up as many others as that takes."""
        if digest in self._features or features.nbytes > self.capacity_bytes:
            return
        # Room first: never, not even for a moment, more than was allowed.
        while self.nbytes + features.nbytes > self.capacity_bytes:
            _, dropped = self._features.popitem(last=False)
            self.nbytes -= dropped.nbytes
            del dropped
        copied = features.copy()
        copied.flags.writeable = False
        self._features[digest] = copied
        self.nbytes += copied.nbytes
