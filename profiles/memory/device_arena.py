"""DeviceArena: how ONNX Runtime's arena of a GPU grows, tensor by tensor.

Told to grow by what is asked (``CudaOptions.exact_arena``), it takes a region for whatever no free
piece of its regions holds, and gives none back. Regions never grow together, so what it has taken
in the end follows from the order in which tensors of which sizes come and go, and is more than the
largest sum of those that live at once.

Source: ``BFCArena`` of ONNX Runtime 1.31.1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from llava_edge.profiles.memory.device_pages import paged

_GRAIN = 256
_MOST_UNUSED = 128 << 20
"""Bytes that a piece may be larger than what is put there, if it is not twice as large."""


@dataclass
class Piece:
    """A part of a region: its bytes, and whether nothing lies there."""

    nbytes: int
    is_free: bool = False


@dataclass
class DeviceArena:
    """Regions of an arena, each a row of pieces.

    Attributes:
        regions: pieces of each, in order.
    """

    regions: list[list[Piece]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """What the driver has given, in its pages."""
        return sum(paged(sum(piece.nbytes for piece in region)) for region in self.regions)

    def take(self, nbytes: int) -> Piece:
        """The smallest free piece that is large enough, less what is left of it; or a new region.

        Args:
            nbytes: at least 1.
        """
        nbytes = -(-nbytes // _GRAIN) * _GRAIN
        found: tuple[list[Piece], int] | None = None
        smallest = 0
        for region in self.regions:
            for place, piece in enumerate(region):
                fits = piece.is_free and piece.nbytes >= nbytes
                if fits and (found is None or piece.nbytes < smallest):
                    found, smallest = (region, place), piece.nbytes
        if found is None:
            new = Piece(nbytes)
            self.regions.append([new])
            return new
        region, place = found
        piece = region[place]
        rest = piece.nbytes - nbytes
        if rest >= nbytes or rest >= _MOST_UNUSED:
            region.insert(place + 1, Piece(rest, is_free=True))
            piece.nbytes = nbytes
        piece.is_free = False
        return piece

    def give(self, piece: Piece) -> None:
        """A piece is free again and one with its free neighbours."""
        region = next(r for r in self.regions if any(other is piece for other in r))
        place = next(index for index, other in enumerate(region) if other is piece)
        piece.is_free = True
        if place + 1 < len(region) and region[place + 1].is_free:
            piece.nbytes += region.pop(place + 1).nbytes
        if place and region[place - 1].is_free:
            region[place - 1].nbytes += region.pop(place).nbytes

    def pass_through(self, *sizes: int) -> None:
        """Take pieces of these sizes together and give them back; sizes of 0 are left out."""
        for piece in [self.take(nbytes) for nbytes in sizes if nbytes]:
            self.give(piece)
