"""PrefixCache: what the positions of the KV cache stand for, so that a prompt can go on there.

A prompt that begins like the last one, with the same pictures and videos in the same places, needs
only its new tokens computed. Text is compared by its ids, pictures by geometry and digests of their
tiles, videos by digests of their frames.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llava_edge.runtime.processing.request import Medium, Request
from llava_edge.runtime.util.arrays import Array

_ALWAYS_COMPUTED = 2


class PrefixCache:
    """Ids and media of the prompt and the answer that went into the cache last.

    What is written here is what goes in, in order; how far it got, the cache alone knows, and
    ``match`` asks it. So a run that fails, is cancelled or raises needs no repair here. The one
    rule for anyone who fills the cache: a position that holds anything else than what is written
    for it is rewound before the next token is written.

    Args:
        place_ids: ids that stand for an image's or a video's features and not for a word.
    """

    def __init__(self, place_ids: Sequence[int]) -> None:
        self._place_ids = np.array(place_ids, np.int64)
        self.clear()

    def clear(self) -> None:
        """The cache holds nothing that may be reused."""
        self._ids: Array = np.empty(0, np.int64)
        self._answer: list[int] = []
        self._media: tuple[Medium, ...] = ()

    def commit(self, request: Request) -> None:
        """A prompt goes in, over what the cache held before; say so once that is rewound."""
        self._ids, self._answer = request.ids, []
        self._media = request.without_pixels().media

    def append(self, token: int) -> None:
        """A token of the answer goes in behind the rest."""
        self._answer.append(token)

    def match(self, request: Request, num_valid: int) -> int:
        """How many positions of the cache are the beginning of this request.

        Never a part of a picture or video, whose features would be made for the rest of it all the
        same, and never the last two positions: the logits behind the last one are wanted, and a run
        of one position takes kernels that round otherwise than those of a whole prompt.

        Args:
            request: with pixels.
            num_valid: positions that the cache holds.
        """
        held = np.concatenate((self._ids, np.array(self._answer, np.int64)))
        most = max(0, min(num_valid, held.size, request.num_tokens - _ALWAYS_COMPUTED))
        differs = np.flatnonzero(request.ids[:most] != held[:most])
        shared = int(differs[0]) if differs.size else most
        # Places count as different until a medium is found that fills them as it did before.
        different = np.isin(request.ids[:shared], self._place_ids)
        for wanted, known in zip(request.media, self._media, strict=False):
            if not wanted.digests or wanted != known or wanted.stop > shared:
                break
            different[wanted.start : wanted.stop] = False
        first = np.flatnonzero(different)
        return int(first[0]) if first.size else shared
