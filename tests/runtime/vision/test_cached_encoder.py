"""The vision cache: what is encoded, what is kept, and that features are the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llava_edge.profiles.errors import EngineError, OutOfMemoryError, RequestError
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.artifact.open import open_artifact
from llava_edge.runtime.loading import placement
from llava_edge.runtime.loading.placement import certain_host_terms, check_host_memory
from llava_edge.runtime.processing.tile_pixels import digest_tiles
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.vision.cached_encoder import CachedEncoder, cached_encoder
from llava_edge.runtime.vision.feature_cache import FeatureCache, FeatureKey

TILE_BYTES = 4 * 3 * 4


class Encoder:
    """Features of a tile are its first values; remembers what it was given."""

    def __init__(self) -> None:
        self.batches: list[list[float]] = []

    def encode(self, pixel_values: Array, out: Array) -> None:
        self.batches.append(pixel_values[:, 0, 0, 0].tolist())
        out[...] = pixel_values[:, 0, 0, :3, None].repeat(4, -1)


def tiles(*values: int) -> Array:
    pixels = np.zeros((len(values), 3, 5, 5), np.float32)
    pixels[:, 0, 0, 0] = values
    return pixels


def encoded(encoder: CachedEncoder, *values: int) -> list[float]:
    out = np.full((len(values), 3, 4), np.nan, np.float32)
    encoder.encode(tiles(*values), out)
    assert not np.isnan(out).any()
    return out[:, 0, 0].tolist()


def test_only_tiles_that_are_not_known_are_encoded_and_twins_once() -> None:
    inner = Encoder()
    encoder = CachedEncoder(inner, FeatureCache(10 * TILE_BYTES))

    assert encoded(encoder, 1, 2, 3) == [1, 2, 3]
    assert encoded(encoder, 1, 4, 3, 4, 5) == [1, 4, 3, 4, 5]
    assert encoded(encoder, 5, 1) == [5, 1]

    assert inner.batches == [[1, 2, 3], [4, 5]]


def test_what_is_still_to_be_encoded_is_counted_and_that_is_no_use() -> None:
    cache = FeatureCache(2 * TILE_BYTES)
    encoder = CachedEncoder(Encoder(), cache)
    encoded(encoder, 1, 2)
    first, second, third = digest_tiles(tiles(1, 2, 3))

    assert encoder.num_missing({first, second, third}, rows=3) == 1
    # Pooled rows of a frame are other features.
    assert encoder.num_missing({first}, rows=1) == 1
    encoder.num_missing({first}, rows=3)
    encoded(encoder, 3)
    assert cache.find((first, 3)) is None


def test_a_frame_and_a_tile_of_the_same_pixels_have_their_own_features() -> None:
    encoder = CachedEncoder(Encoder(), FeatureCache(10 * TILE_BYTES))
    encoded(encoder, 1)
    pooled = np.full((1, 2, 4), np.nan, np.float32)

    class Pooling:
        def encode(self, pixel_values: Array, out: Array) -> None:
            out[...] = 7

    encoder._encoder = Pooling()
    encoder.encode(tiles(1), pooled)

    assert (pooled == 7).all()
    assert encoded(encoder, 1) == [1]


def test_the_least_recently_used_is_given_up() -> None:
    inner = Encoder()
    encoder = CachedEncoder(inner, FeatureCache(2 * TILE_BYTES))
    for value in (1, 2, 1, 3, 1, 2):
        encoded(encoder, value)

    assert inner.batches == [[1], [2], [3], [2]]


@given(
    capacity=st.integers(0, 6 * TILE_BYTES),
    batches=st.lists(st.lists(st.integers(1, 8), min_size=1, max_size=5), max_size=12),
)
def test_never_more_bytes_than_allowed_and_always_the_right_features(
    capacity: int, batches: list[list[int]]
) -> None:
    cache = FeatureCache(capacity)
    encoder = CachedEncoder(Encoder(), cache)
    for batch in batches:
        assert encoded(encoder, *batch) == batch
        held = [features for v in range(9) if (features := cache.find(_key(v))) is not None]
        assert cache.nbytes == sum(features.nbytes for features in held) <= capacity


def _key(value: int) -> FeatureKey:
    return digest_tiles(tiles(value))[0], 3


def test_what_is_kept_is_a_copy() -> None:
    cache = FeatureCache(1000)
    features = np.ones((3, 4), np.float32)
    cache.keep((b"x", 3), features)
    features[:] = 7

    found = cache.find((b"x", 3))
    assert found is not None
    assert found.max() == 1
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 2


@pytest.fixture(scope="module")
def artifact(make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]) -> Path:
    return make_artifact(make_checkpoint("odd", backbone="mistral"))


def frame(side: int, corner: tuple[int, int, int], seed: int = 3) -> Image.Image:
    """A camera's picture that fills 2x2 tiles; the corner lies in the two left ones."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (2 * side, 2 * side, 3), np.uint8)
    pixels[side - 2 : side + 2, : side // 2] = corner
    return Image.fromarray(pixels)


def test_a_frame_in_which_two_tiles_changed_encodes_them_and_the_thumbnail(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        LlavaEdge.load(artifact, threads=1, vision_cache_bytes=1 << 26) as cached,
        LlavaEdge.load(artifact, threads=1) as plain,
    ):
        side = plain.artifact.manifest.image_processing.tile_size
        given: list[int] = []
        inner = cached._tower.encoder
        real = inner.encode  # type: ignore[union-attr]

        def encode(pixel_values: Array, out: Array) -> None:
            given.append(len(pixel_values))
            real(pixel_values, out)

        monkeypatch.setattr(inner, "encode", encode)
        first, second = frame(side, (0, 0, 0)), frame(side, (255, 255, 255))
        whole = cached.replay("What?", [first], (), lambda *_: None)
        assert (whole.request.layouts[0].num_tiles, sum(given)) == (5, 5)
        given.clear()

        ours = cached.replay("What?", [second], (), lambda *_: None)

        assert sum(given) == 3
        theirs = plain.replay("What?", [second], (), lambda *_: None)
        np.testing.assert_array_equal(ours.features, theirs.features)
        given.clear()
        # Something else in between takes the KV cache, but not the features.
        assert cached.generate("Hi", max_new_tokens=1).reused_tokens < 3
        again = cached.generate("What?", [second], max_new_tokens=4)
        assert again.token_ids == plain.generate("What?", [second], max_new_tokens=4).token_ids
        assert given == []


def test_a_cache_that_holds_no_tile_or_is_no_number_is_refused(artifact: Path) -> None:
    with pytest.raises(RequestError, match="features of one tile of this model take"):
        LlavaEdge.load(artifact, vision_cache_bytes=10)
    with pytest.raises(RequestError, match="vision_cache_bytes is -1"):
        LlavaEdge.load(artifact, vision_cache_bytes=-1)


def test_features_that_stay_on_the_device_are_not_cached(artifact: Path) -> None:
    class OnDevice:
        def new_rows(self, shape: tuple[int, int]) -> None: ...

        def encode_rows(self, pixel_values: Array, rows: object, first_row: int) -> None: ...

    dims = open_artifact(artifact).manifest.model
    encoder = OnDevice()
    assert cached_encoder(encoder, dims, np.float16, 0) is encoder  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="stay on the device"):
        cached_encoder(encoder, dims, np.float16, 1 << 30)  # type: ignore[arg-type]


def test_the_cache_counts_before_anything_is_loaded(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_artifact(artifact)
    # Of a context so large that loading is not what takes most.
    needed = certain_host_terms(opened.manifest, 100_000).total
    monkeypatch.setattr(placement, "available_host_bytes", lambda: needed + (1 << 30))
    check_host_memory(opened, 100_000, 1 << 30)
    with pytest.raises(OutOfMemoryError, match=r"1\.00 GiB vision cache.* or vision_cache_bytes"):
        check_host_memory(opened, 100_000, (1 << 30) + 1)
