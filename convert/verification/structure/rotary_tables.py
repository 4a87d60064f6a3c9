"""Rotary tables of a decoder graph against the reference's rotary embedding, at every position.

The reference's own module computes the tables, some positions at a time; the converter's function
is not asked. A stored number must be the reference's or one of its two neighbours in float32,
rounded once to the type of the table. So it may differ by one unit in the last place, and a table
that was rounded on the way, or cut off in place of rounded, does not pass.

The frequencies are powers, whose last digit machines do not agree on, and at position 30,000 that
digit moves an angle by a thousandth. A column may therefore follow the neighbouring frequency, if
it does so in both tables and at all positions.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from llava_edge.convert.onnx.graph_file import GraphFile
from llava_edge.convert.verification.reference.modules import ReferenceStructure
from llava_edge.runtime.util.arrays import Array

_ROWS = 2048
"""Positions in memory at once."""
_FREQUENCIES = "inv_freq"
_INFINITE = float("inf")


def rotary_faults(
    graph: GraphFile, names: tuple[str, str], num_positions: int, reference: ReferenceStructure
) -> list[str]:
    """Where the tables of cosines and sines differ from the reference's; a sentence a table.

    Args:
        graph: the decoder.
        names: initializers of cosine and sine, [positions, half a head].
        num_positions: positions of the context.
        reference: for the rotary embedding of config.json.
    """
    shape = (num_positions, reference.frequencies(0).numel())
    faults = []
    for name in names:
        if graph.shape(name) != shape or graph.dtype(name) not in ("float32", "float16"):
            faults.append(
                f"decoder, table {name}: its shape is {graph.shape(name)}, its type "
                f"{graph.dtype(name)}; must be {shape} (context_tokens of manifest.json, half a "
                "head of config.json) and float32 or float16"
            )
    if faults:
        return faults
    wrong = _Comparison(graph, names, num_positions, reference)
    columns = wrong.columns(0)
    for ulps in (1, -1):
        # Only for columns in doubt: a sound table is gone through once.
        if columns.any():
            columns &= wrong.columns(ulps)
    if not columns.any():
        return []
    return wrong.sentences(columns)


class _Comparison:
    def __init__(
        self,
        graph: GraphFile,
        names: tuple[str, str],
        num_positions: int,
        reference: ReferenceStructure,
    ) -> None:
        self._graph = graph
        self._names = names
        self._count = num_positions
        self._reference = reference

    def columns(self, ulps: int) -> NDArray[np.bool_]:
        """Columns that are wrong anywhere, with frequencies so many units away, bool [half]."""
        found = np.zeros(self._reference.frequencies(0).numel(), bool)
        for _, tables in self._blocks(ulps):
            for have, want in tables:
                found |= _differs(have, want).any(0)
        return found

    def sentences(self, columns: NDArray[np.bool_]) -> list[str]:
        """What is wrong in some columns, by table."""
        positions: tuple[list[int], list[int]] = ([], [])
        worst = [(-1.0, 0), (-1.0, 0)]
        for start, tables in self._blocks(0):
            for place, (have, want) in enumerate(tables):
                rows = np.flatnonzero((_differs(have, want) & columns).any(1))
                positions[place].extend((start + rows).tolist())
                gaps = np.abs(have.astype(np.float64) - want)[rows][:, columns]
                # NaN is worse than any number.
                largest = np.nan_to_num(gaps, nan=_INFINITE).max(1, initial=-1.0)
                if largest.size and largest.max() > worst[place][0]:
                    row = int(largest.argmax())
                    worst[place] = (float(largest[row]), start + int(rows[row]))
        return [
            f"decoder, table {name}: {len(at)} of {self._count} positions differ from the rotary "
            f"embedding of config.json ({self._reference.text.rope_parameters}) by more than a "
            f"unit in the last place, the first is {at[0]}, the worst {where} by {gap:.2g}"
            for name, at, (gap, where) in zip(self._names, positions, worst, strict=True)
            if at
        ]

    def _blocks(self, ulps: int) -> Iterator[tuple[int, list[tuple[Array, Array]]]]:
        """First position, and each table's rows as they are stored beside the reference's."""
        rotary = self._reference.rotary()
        setattr(rotary, _FREQUENCIES, self._reference.frequencies(ulps))
        for start in range(0, self._count, _ROWS):
            stop = min(start + _ROWS, self._count)
            with torch.no_grad():
                wanted = rotary(torch.zeros(1), torch.arange(start, stop)[None])
            # Both halves of the last axis are alike: rotation pairs column i with i + half.
            yield (
                start,
                [
                    (
                        self._graph.read(name, slice(start, stop)),
                        table[0, :, : table.shape[-1] // 2].numpy(),
                    )
                    for name, table in zip(self._names, wanted, strict=True)
                ],
            )


def _differs(have: Array, want: Array) -> NDArray[np.bool_]:
    """Whether a stored number is not that of the table, nor of a float32 beside it, rounded."""
    step = np.spacing(np.abs(want))
    low, high = ((want + sign * step).astype(have.dtype) for sign in (-1, 1))
    differs: NDArray[np.bool_] = ~((low <= have) & (have <= high))
    return differs
