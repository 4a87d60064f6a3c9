"""Videos to fuzz with: valid files of each container, damage to them, and lists of frames."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

import numpy as np

from tests.fuzz.image_inputs import corpus as images
from tests.fuzz.image_inputs import damaged_file as damaged_image
from tests.fuzz.image_inputs import odd_objects, picture
from tests.fuzz.mutate import INTERESTING, mutated
from tests.support.videos import encoded, moving


@cache
def corpus() -> dict[str, bytes]:
    """Valid files by name."""
    made = {
        "MP4 h264": ("mp4", "libx264"),
        "MOV mpeg4": ("mov", "mpeg4"),
        "MP4 hevc": ("mp4", "libx265"),
        "WEBM vp9": ("webm", "libvpx-vp9"),
        "MKV vp8": ("matroska", "libvpx"),
        "AVI mjpeg": ("avi", "mjpeg"),
        "AVI mpeg4": ("avi", "mpeg4"),
        "TS h264": ("mpegts", "libx264"),
    }
    return {name: encoded(moving(9), *how) for name, how in made.items()}


def damaged_video(random: Random) -> tuple[str, bytes]:
    """A valid file, damaged anywhere, in a box of MP4, or in one place of its header."""
    name, data = random.choice(sorted(corpus().items()))
    if name.startswith("M") and "MKV" not in name and random.random() < 0.4:
        return f"{name}, box", _inside_box(random, data)
    return name, mutated(random, data, list(corpus().values()))


def _inside_box(random: Random, data: bytes) -> bytes:
    """A number inside a named box of MP4."""
    names = (
        b"stsz",
        b"stsc",
        b"stco",
        b"stts",
        b"ctts",
        b"tkhd",
        b"mdhd",
        b"mvhd",
        b"avcC",
        b"hvcC",
    )
    names += (
        b"stsd",
        b"elst",
        b"hdlr",
        b"dref",
        b"esds",
        b"moov",
        b"trak",
        b"mdia",
        b"stbl",
        b"mdat",
    )
    found = [place for name in names if (place := data.find(name)) >= 4]
    place = random.choice(found)
    changed = bytearray(data)
    at = random.choice((place - 4, place, place + 4, place + 8, place + 12, place + 16, place + 20))
    at = min(max(at, 0), len(changed) - 4)
    struct.pack_into(">I", changed, at, random.choice(INTERESTING) % (1 << 32))
    return bytes(changed)


def frames(random: Random) -> tuple[str, Any]:
    """Something that is no file: frames in memory, sound or not."""
    sound = [picture(step=step) for step in range(3)]
    choices: list[tuple[str, Callable[[], Any]]] = [
        ("frames", lambda: sound),
        ("frames of two sizes", lambda: [*sound, picture(size=(64, 64))]),
        ("a damaged frame", lambda: [*sound, damaged_image(random)[1]]),
        ("a strange frame", lambda: [odd_objects(random)[1], *sound]),
        ("files as frames", lambda: random.sample(list(images().values()), 3)),
        ("no frame", lambda: []),
        ("array", lambda: np.zeros((3, 40, 30, 3), np.uint8)),
        ("float array", lambda: np.zeros((3, 40, 30, 3))),
        (
            "odd array",
            lambda: np.zeros(random.choice(((3, 40, 30), (0, 9, 9, 3), (2, 9, 9, 5))), np.uint8),
        ),
        (
            "huge array",
            lambda: np.broadcast_to(np.zeros((1, 1, 1, 3), np.uint8), (5, 1 << 14, 1 << 14, 3)),
        ),
        ("too many", lambda: [None] * 200_000),
        ("text", lambda: "clip.mp4"),
        ("play list", lambda: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"),
        ("concat list", lambda: b"ffconcat version 1.0\nfile /etc/passwd\n"),
        ("number", lambda: random.choice((1, 0.5, float("nan"), None, True, {}, set()))),
        ("generator", lambda: (frame for frame in sound)),
        ("picture", lambda: random.choice(list(images().values()))),
        ("empty", lambda: b""),
    ]
    name, make = random.choice(choices)
    return name, make()
