"""What decoding takes of the host is within what the runtime asks for and what a plan reserves."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_edge.bench.lab.memory.images import asked_bytes, image_cases, measure
from llava_edge.profiles.memory.buffers import image_decoding_bytes

CASES = {case.name: case for case in image_cases()}
COSTLY = (
    "JPEG CMYK EXIF",
    "JPEG RGB 4:4:4 progressive EXIF",
    "PNG RGB tRNS EXIF",
    "PNG P tRNS bytes EXIF",
    "GIF P transparent",
    "WEBP RGBA EXIF",
    "AVIF RGB 4:4:4",
    "memory RGBA",
    "memory F",
    "array uint8 3",
    "array float64 4",
)


@pytest.mark.parametrize("name", COSTLY)
def test_the_peak_of_a_fresh_process_is_within_what_is_asked(name: str, tmp_path: Path) -> None:
    case, height, width = CASES[name], 1600, 2400
    found = measure(case, height, width, tmp_path)

    assert found <= asked_bytes(case, height * width)
    assert found <= image_decoding_bytes(height * width)
