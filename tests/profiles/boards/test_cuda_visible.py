"""Rules by which CUDA hides GPUs, as far as they are described."""

from __future__ import annotations

import pytest

from llava_edge.profiles.boards.cuda_visible import visible_places

UUIDS = (
    ("GPU-11aa0000-0000-0000-0000-000000000000",),
    ("GPU-11bb0000-0000-0000-0000-000000000000", "MIG-aaaa1111", "MIG-aaaa2222"),
    ("GPU-22cc0000-0000-0000-0000-000000000000",),
)


@pytest.mark.parametrize(
    ("value", "places"),
    [
        (None, (0, 1, 2)),
        ("0,1,2", (0, 1, 2)),
        ("2,0", (2, 0)),
        (" 1 , 2 ", (1, 2)),
        ("1", (1,)),
        # Nothing is seen.
        ("", ()),
        (" ", ()),
        ("-1", ()),
        ("NoDevFiles", ()),
        ("none", ()),
        ("7", ()),
        # What stands in front of an invalid name counts.
        ("1,-1,0", (1,)),
        ("0,7,1", (0,)),
        ("2,,1", (2,)),
        ("2,x", (2,)),
        # Named twice.
        ("1,1", ()),
        ("0,1,0", ()),
        ("GPU-22,GPU-22cc", ()),
        # Numbers end at the first other character.
        ("1gpu2,2", (1, 2)),
        ("+1", (1,)),
        ("0x1", (0,)),
        ("99999999999999999999", ()),
        # By name, or as much of it as one GPU alone has.
        ("GPU-22cc0000-0000-0000-0000-000000000000", (2,)),
        ("GPU-22,GPU-11b", (2, 1)),
        ("gpu-22", ()),
        ("GPU-11", ()),
        ("GPU-33", ()),
        ("GPU-22,1", (2,)),
        ("1,GPU-22", (1,)),
        ("GPU-22CC", (2,)),
        # Of a divided GPU a process sees one instance.
        ("MIG-aaaa2222", (1,)),
        ("MIG-aaaa1111,MIG-aaaa2222", (1,)),
        ("MIG-aaaa", ()),
    ],
)
def test_the_variable_names_what_is_seen_and_in_which_order(
    value: str | None, places: tuple[int, ...]
) -> None:
    assert visible_places(value, UUIDS) == places
