"""Tiles wait as bytes, read like float32 arrays, and are told apart by digests computed once."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.processing import tile_pixels
from llava_edge.runtime.processing.tile_pixels import TilePixels, digest_tiles, digests_of

BYTES = np.random.default_rng(5).integers(0, 256, (4, 6, 6, 3), np.uint8)


def normalize(pixels: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    out[...] = pixels.transpose(2, 0, 1) / np.float32(7)


TILES = TilePixels(BYTES, normalize)
FLOATS = BYTES.transpose(0, 3, 1, 2) / np.float32(7)


@pytest.mark.parametrize(
    "index",
    [0, -1, slice(1, 3), slice(None, None, -1), [2, 0], (1, 0), (slice(1, 2), 2, 3), np.int64(3)],
    ids=repr,
)
def test_tiles_read_like_the_array_they_stand_for(index: object) -> None:
    found = TILES[index]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, FLOATS[index])  # type: ignore[index]


def test_the_whole_is_an_array_where_one_is_needed() -> None:
    assert (TILES.shape, TILES.dtype, len(TILES)) == (FLOATS.shape, np.float32, 4)
    assert np.array_equal(TILES, FLOATS)
    assert np.concatenate([TILES, FLOATS]).shape == (8, 3, 6, 6)
    assert np.asarray(TILES, np.float16).dtype == np.float16
    assert TILES.nbytes == FLOATS.nbytes // 4


def test_the_first_tiles_are_kept_without_the_memory_of_the_others() -> None:
    kept = TILES.keep(1)
    np.testing.assert_array_equal(kept[:], FLOATS[:1])
    assert kept.digests == digest_tiles(BYTES[:1])
    assert kept._pixels.base is None


def test_digests_tell_tiles_apart_by_content_and_are_computed_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiles = TilePixels(BYTES.copy(), normalize)
    assert digests_of(tiles) == TILES.digests
    assert len(set(TILES.digests)) == 4
    monkeypatch.setattr(tile_pixels.hashlib, "sha256", None)
    assert digests_of(tiles) == TILES.digests


@pytest.fixture(scope="module")
def artifact(make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]) -> Path:
    return make_artifact(make_checkpoint("odd", backbone="mistral"))


def test_a_tile_is_hashed_once_although_two_caches_tell_tiles_by_it(
    artifact: Path, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[bytes] = []
    real = tile_pixels.hashlib.sha256

    def counted(data: memoryview) -> object:
        hashed.append(bytes(data))
        return real(data)

    with LlavaEdge.load(artifact, vision_cache_bytes=1 << 22) as model:
        monkeypatch.setattr(tile_pixels.hashlib, "sha256", counted)
        first = model.generate("Hi", [picture], max_new_tokens=2)
        num_tiles = len(hashed)
        # Another question before the picture: nothing of the KV cache, all of the vision cache.
        again = model.generate("Well <image>?", [picture], max_new_tokens=2)

    tiles = model.artifact.manifest.plan["max_tiles"]
    assert first.image_tokens == again.image_tokens > 0
    assert 1 < num_tiles <= tiles
    assert len(hashed) == 2 * num_tiles
    assert len(set(hashed)) == num_tiles


def test_requests_that_wait_hold_bytes_and_neither_floats_nor_whole_pictures(
    artifact: Path, tmp_path: Path
) -> None:
    path = tmp_path / "large.jpg"
    Image.effect_noise((3000, 2000), 90).convert("RGB").save(path, quality=50)
    with LlavaEdge.load(artifact) as model:
        side = model.artifact.manifest.image_processing.tile_size
        model.generate("Hi", [path], max_new_tokens=1)
        floats = model._requests.max_tiles * side * side * 3 * 4
        inside, leave = threading.Event(), threading.Event()

        def hold() -> None:
            with model._queue.turn():
                inside.set()
                leave.wait(60)

        holder = threading.Thread(target=hold)
        holder.start()
        assert inside.wait(60)
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        waiting = [model.stream(f"Question {n}", [path], max_new_tokens=2) for n in range(8)]
        threads = [threading.Thread(target=lambda s=stream: list(s)) for stream in waiting]
        for thread in threads:
            thread.start()
        held = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        leave.set()
        for thread in (holder, *threads):
            thread.join(60)
        assert all(stream.answer.image_tokens for stream in waiting)
    assert held < 8 * (floats / 4 + 24_576), f"{held / 8 / floats:.2f} of the float tiles each"
