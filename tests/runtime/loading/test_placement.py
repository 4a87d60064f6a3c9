from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llava_edge.profiles.errors import OutOfMemoryError
from llava_edge.profiles.memory.buffers import kv_cache_bytes
from llava_edge.profiles.models.parameters import (
    decoder_matrices,
    decoder_vectors,
    head_parameters,
    projector_parameters,
    vision_parameters,
)
from llava_edge.runtime.artifact.open import Artifact, open_artifact
from llava_edge.runtime.generation.decoder.kv_cache import KVCache
from llava_edge.runtime.loading import placement
from llava_edge.runtime.loading.placement import certain_host_terms, check_host_memory


@pytest.fixture(scope="module")
def artifact(make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]) -> Artifact:
    return open_artifact(make_artifact(make_checkpoint("odd")))


def test_the_cache_takes_what_the_plan_counts(artifact: Artifact) -> None:
    text = artifact.manifest.model.text
    cache = KVCache(text, 77, np.float32, "cpu")
    assert cache.nbytes == kv_cache_bytes(text, 77, "float32")


def test_what_is_certain_are_weights_tables_and_cache(artifact: Artifact) -> None:
    dims = artifact.manifest.model
    text = dims.text
    terms = certain_host_terms(artifact.manifest, 1000)
    linear = sum(matrix.parameters for matrix in decoder_matrices(text))
    assert terms.decoder_weights == 4 * (linear + decoder_vectors(text))
    assert terms.lm_head == 4 * head_parameters(text)
    assert terms.vision_tower == 4 * vision_parameters(dims.vision, dims.vision.num_blocks_used)
    assert terms.projector == 4 * projector_parameters(dims)
    assert terms.kv_cache == kv_cache_bytes(text, 1000, "float32")
    taken = {name for name, size in terms.as_dict().items() if size}
    assert taken == {
        "decoder_weights",
        "lm_head",
        "vision_tower",
        "projector",
        "rope_tables",
        "kv_cache",
        "logits",
    }


def test_without_a_cache_to_speak_of_the_moment_of_loading_is_the_largest(
    artifact: Artifact,
) -> None:
    terms = certain_host_terms(artifact.manifest, 1)
    assert terms.kv_cache == 0
    assert terms.load_transient == 4 * head_parameters(artifact.manifest.model.text)


def test_loading_is_refused_one_byte_below_what_is_certain(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = certain_host_terms(artifact.manifest, 2000).total
    monkeypatch.setattr(placement, "available_host_bytes", lambda: needed)
    check_host_memory(artifact, 2000)
    monkeypatch.setattr(placement, "available_host_bytes", lambda: needed - 1)
    with pytest.raises(OutOfMemoryError, match=r"context of 2000 tokens .* kv cache"):
        check_host_memory(artifact, 2000)


def test_where_nothing_is_known_about_free_memory_nothing_is_refused(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "available_host_bytes", lambda: None)
    check_host_memory(artifact, 2000)
