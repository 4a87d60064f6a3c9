"""DigestedSource: remembers a digest of every quantised weight on its way into a graph.

The digests go into the manifest. Anyone who reads the graph back can then tell that it holds the
very codes and scales that the source gave, whatever layout they lie in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from llava_edge.convert.checkpoint.formats.rounding import QuantizedWeight
from llava_edge.convert.checkpoint.quantized.source import HEAD, QuantizedSource
from llava_edge.profiles.errors import CheckpointError
from llava_edge.runtime.util.arrays import Array

_BLOCK_BYTES = 1 << 24


def weight_digest(codes: NDArray[np.uint8], scales: Array) -> str:
    """SHA-256 of a quantised weight in its one canonical form.

    The form: unsigned codes row by row, one byte each, the value 0 at 2^(bits-1); then the scales
    row by row as little-endian float16.

    Args:
        codes: uint8 [N, K].
        scales: [N, groups], float16 or values that float16 holds.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: a scale is no float16.
    """
    half = scales.astype("<f2", copy=False)
    if half.dtype != scales.dtype and not np.array_equal(half.astype(scales.dtype), scales):
        raise ValueError("a scale is no float16 number")
    digest = hashlib.sha256()
    # In blocks: a transposed view is then never copied whole.
    step = max(1, _BLOCK_BYTES // max(1, codes.shape[1]))
    for first in range(0, len(codes), step):
        digest.update(np.ascontiguousarray(codes[first : first + step]).data)
    digest.update(np.ascontiguousarray(half).data)
    return digest.hexdigest()


class DigestedSource:
    """A QuantizedSource that passes another one's weights on and keeps their digests.

    Args:
        source: where the weights come from.
    """

    def __init__(self, source: QuantizedSource) -> None:
        self._source = source
        self._digests: dict[str, str] = {}

    @property
    def bits(self) -> int:
        """See ``QuantizedSource.bits``."""
        return self._source.bits

    @property
    def group_size(self) -> int:
        """See ``QuantizedSource.group_size``."""
        return self._source.group_size

    @property
    def digests(self) -> dict[str, str]:
        """``weight_digest`` of every weight that has passed, by canonical name, sorted."""
        return dict(sorted(self._digests.items()))

    def linear(self, name: str) -> QuantizedWeight:
        """Load one weight and note its digest; see ``QuantizedSource.linear``.

        Raises:
            CheckpointError: there is no such layer, or the source gave another weight before.
        """
        return self._noted(name, self._source.linear(name))

    def head(self, load: Callable[[], QuantizedWeight]) -> Callable[[], QuantizedWeight]:
        """The loader of a head, such that its weight is noted as well, as ``lm_head``."""
        return lambda: self._noted(HEAD, load())

    def _noted(self, name: str, weight: QuantizedWeight) -> QuantizedWeight:
        digest = weight_digest(weight.qweight, weight.scales)
        if self._digests.setdefault(name, digest) != digest:
            raise CheckpointError(
                f"{name} was read twice and came out differently; the files changed meanwhile. "
                "Convert again."
            )
        return weight
