"""Image features: from features of tiles to the tokens the language model reads, in one row gather.

Source of the order: transformers 5.23.0 ``LlavaNextModel.pack_image_features``. Its chain of views,
permutations and concatenations moves whole rows only, so it is one list of row numbers, made from
integers before any feature exists.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llava_edge.profiles.models.anyres import TileLayout


def packing_index(layout: TileLayout, patches_per_side: int) -> NDArray[np.int64]:
    """Row numbers of the packed sequence.

    Args:
        layout: of the image.
        patches_per_side: patches along one side of a tile.

    Returns:
        int64, (num_image_tokens,): rows of the features of all tiles, one after another, as a
        matrix of ``num_tiles * patches_per_side**2`` rows; the number behind the last row stands
        for the newline. First the thumbnail, then the kept rows of the stitched tiles from left to
        right, each ended by a newline. A thumbnail alone is ended by one newline, if by any.
    """
    side = patches_per_side
    thumbnail = np.arange(side * side, dtype=np.int64)
    newline = layout.num_tiles * side * side
    if not layout.rows:
        has_newline = layout.num_image_tokens > len(thumbnail)
        return np.append(thumbnail, newline) if has_newline else thumbnail
    rows = np.arange(layout.first_row, layout.first_row + layout.kept_rows, dtype=np.int64)
    columns = np.arange(
        layout.first_column, layout.first_column + layout.kept_columns, dtype=np.int64
    )
    # Patch (r, c) of the stitched map is patch (r % side, c % side) of tile (r // side, c // side).
    row_start = (rows // side * layout.columns + 1) * side * side + rows % side * side
    column_start = columns // side * side * side + columns % side
    packed = np.full((layout.kept_rows, layout.kept_columns + 1), newline, np.int64)
    packed[:, :-1] = row_start[:, None] + column_start
    return np.concatenate((thumbnail, packed.ravel()))
