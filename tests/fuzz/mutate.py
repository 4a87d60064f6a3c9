"""Damage to bytes: what storage, networks and people who mean harm do to files."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from random import Random

Mutation = Callable[[Random, bytes, Sequence[bytes]], bytes]

INTERESTING = (
    *(0, 1, 2, 3, 7, 8, 15, 16, 127, 128, 255, 256, 257, 511, 512, 4095, 4096, 32767, 32768),
    *(65534, 65535, 65536, 65537, 100_000, 1 << 20, 1 << 24, (1 << 31) - 1, 1 << 31),
    *((1 << 32) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1),
)
"""Numbers at which readers of files go wrong."""


def mutated(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """One to four kinds of damage, one after the other.

    Args:
        random: decides.
        data: a valid file.
        others: further files, to splice parts of.
    """
    for _ in range(random.choice((1, 1, 1, 2, 2, 3, 4))):
        data = random.choice(MUTATIONS)(random, data, others)
    return data


def flip_bits(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Some bits, of which half lie where headers are."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4, 16, 64)) if data else 0):
        changed[_place(random, len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def set_bytes(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """A run of bytes with one value, or with any."""
    if not data:
        return data
    start = _place(random, len(data))
    run = data[start : start + random.choice((1, 2, 4, 8, 32))]
    value = random.choice((0, 255, random.randrange(256)))
    new = random.randbytes(len(run)) if random.random() < 0.3 else bytes([value]) * len(run)
    return data[:start] + new + data[start + len(run) :]


def cut_off(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """The end, or the beginning."""
    place = random.randrange(len(data) + 1)
    return data[:place] if random.random() < 0.85 else data[place:]


def take_out(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """A part."""
    start = _place(random, len(data)) if data else 0
    return data[:start] + data[start + random.choice((1, 2, 4, 12, 100, 1000)) :]


def double(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """A part, once or many times."""
    start = _place(random, len(data)) if data else 0
    part = data[start : start + random.choice((1, 4, 12, 64, 500, 5000))]
    return data[:start] + part * random.choice((2, 2, 3, 50)) + data[start + len(part) :]


def splice(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """The beginning of this file and the end of another, or a piece of that inside this."""
    other = random.choice(others)
    here, there = random.randrange(len(data) + 1), random.randrange(len(other) + 1)
    if random.random() < 0.5:
        return data[:here] + other[there:]
    return data[:here] + other[there : there + random.choice((4, 30, 300, 3000))] + data[here:]


def lie(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """A number of 1 to 8 bytes, in either order of bytes, as sizes and offsets are written."""
    width = random.choice((1, 2, 2, 4, 4, 4, 8))
    if len(data) < width:
        return data
    start = min(_place(random, len(data)), len(data) - width)
    order = random.choice(("little", "big"))
    old = int.from_bytes(data[start : start + width], order)  # type: ignore[arg-type]
    new = random.choice((random.choice(INTERESTING), old + 1, old - 1, old * 2, old // 2, -old))
    raw = (new % (1 << 8 * width)).to_bytes(width, order)  # type: ignore[arg-type]
    return data[:start] + raw + data[start + width :]


def swap_order(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Words of 2 or 4 bytes, turned round, in a part of the file."""
    width = random.choice((2, 4))
    start = _place(random, len(data)) if data else 0
    stop = start + width * random.choice((1, 2, 8, 64))
    part = data[start:stop]
    turned = b"".join(part[i : i + width][::-1] for i in range(0, len(part), width))
    return data[:start] + turned + data[stop:]


MUTATIONS: tuple[Mutation, ...] = (
    flip_bits,
    flip_bits,
    set_bytes,
    cut_off,
    take_out,
    double,
    splice,
    lie,
    lie,
    swap_order,
)


def _place(random: Random, length: int) -> int:
    return random.randrange(min(length, 64) if random.random() < 0.5 else length)


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """Kind and body of each chunk of a sound PNG."""
    chunks, place = [], 8
    while place + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        chunks.append((kind, data[place + 8 : place + 8 + length]))
        place += 12 + length
    return chunks
