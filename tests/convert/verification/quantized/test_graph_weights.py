"""What the graph holds, read back by unpackers of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from llava_edge.convert.checkpoint.formats.rounding import PER_CHANNEL, QuantizedWeight
from llava_edge.convert.checkpoint.open import Checkpoint, open_checkpoint
from llava_edge.convert.checkpoint.quantized.digested_source import DigestedSource, weight_digest
from llava_edge.convert.checkpoint.quantized.source import (
    LINEARS,
    RtnSource,
    linear_name,
    quantize_head,
)
from llava_edge.convert.onnx.decoder import build_decoder_graph
from llava_edge.convert.onnx.graph_file import GraphFile
from llava_edge.convert.onnx.linear import QuantizedLayers
from llava_edge.convert.verification.quantized.graph_weights import (
    TWO_TERMS,
    WHOLE_ROW,
    GraphWeights,
)
from llava_edge.profiles.errors import ArtifactError, CheckpointError
from llava_edge.profiles.memory.formats import Int8Route
from llava_edge.runtime.artifact.open import open_artifact
from tests.support.verification_fixtures import BACKBONES

CONTEXT = 32
SIZES = {"hidden_size": 128, "intermediate_size": 384, "heads": 4, "kv_heads": 2, "vocab_size": 401}


@dataclass(frozen=True)
class Form:
    bits: int
    group: int
    rounds: int | None
    compute: type[np.float32] | type[np.float16] = np.float32
    integer: bool = False
    portable: bool = False
    sizes: tuple[tuple[str, int], ...] = ()


UNEVEN = (("hidden_size", 80), ("heads", 5), ("kv_heads", 1), ("intermediate_size", 136))
FORMS = {
    "int4": Form(4, 128, 128),
    "int4 groups of 32": Form(4, 32, 32),
    "int4 per channel": Form(4, PER_CHANNEL, 128),
    "int4 per channel, last block filled up": Form(4, PER_CHANNEL, 16, sizes=UNEVEN),
    "int4 cuda": Form(4, 128, None, np.float16),
    "int8": Form(8, 128, 128),
    "int8 integer": Form(8, PER_CHANNEL, WHOLE_ROW, integer=True),
    "int8 two terms": Form(8, PER_CHANNEL, TWO_TERMS, integer=True),
    "int8 blocks of 32": Form(8, 128, 32),
    "int8 cuda": Form(8, 128, None, np.float16),
    "int4 portable": Form(4, 128, 128, portable=True),
    "int8 portable": Form(8, 128, 128, portable=True),
    "int4 per channel portable": Form(4, PER_CHANNEL, 32, portable=True),
}


@pytest.fixture(scope="module")
def open_sizes(make_checkpoint: Callable[..., Path]) -> Callable[..., Checkpoint]:
    @cache
    def opened(sizes: tuple[tuple[str, int], ...]) -> Checkpoint:
        return open_checkpoint(
            make_checkpoint("odd", backbone="mistral", **{**SIZES, **dict(sizes)})
        )

    return opened


def weights_of(checkpoint: Checkpoint, form: Form) -> QuantizedLayers:
    source = RtnSource(checkpoint, form.bits, form.group, scale="absmax")
    group = PER_CHANNEL if form.integer else None
    route: Int8Route = "two-term" if form.rounds == TWO_TERMS else "integer"
    route = route if form.integer else "nbits"
    return QuantizedLayers(
        source,
        lambda: quantize_head(checkpoint, group_size=group),
        head_group_size=group,
        int8_route=route,
        largest_block=32 if form.rounds == 32 else 128,
        portable=form.portable,
    )


def read_back(
    checkpoint: Checkpoint, form: Form, folder: Path, weights: QuantizedLayers | None
) -> GraphWeights:
    text = checkpoint.dims.text
    build_decoder_graph(text, checkpoint, form.compute, CONTEXT, weights=weights).save(folder)
    return GraphWeights(
        GraphFile(folder / "model.onnx", "decoder"), text.query_size, text.key_value_size
    )


def all_names(checkpoint: Checkpoint) -> list[str]:
    layers = range(checkpoint.dims.text.num_hidden_layers)
    return [*(linear_name(layer, part) for layer in layers for part in LINEARS), "lm_head"]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_layer_comes_back_as_it_was_quantised(
    open_sizes: Callable[..., Checkpoint], tmp_path: Path, form: Form
) -> None:
    checkpoint = open_sizes(form.sizes)
    layers = weights_of(checkpoint, form)

    read = read_back(checkpoint, form, tmp_path, layers)

    for name in all_names(checkpoint):
        weight = layers.head() if name == "lm_head" else layers.source.linear(name)
        codes = read.codes(name)
        assert codes is not None
        assert codes.has_default_zero
        np.testing.assert_array_equal(codes.codes, weight.qweight)
        np.testing.assert_array_equal(read.linear(name), weight.dequantize())


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_how_a_kernel_rounds_its_activations_is_read_from_its_node(
    open_sizes: Callable[..., Checkpoint], tmp_path: Path, form: Form
) -> None:
    checkpoint = open_sizes(form.sizes)

    read = read_back(checkpoint, form, tmp_path, weights_of(checkpoint, form))

    rounds = {read.rounding(linear_name(0, part)) for part in LINEARS[:-1]}
    assert rounds == {form.rounds}


@pytest.mark.parametrize("compute", [np.float32, np.float16])
def test_plain_weights_come_back_as_the_checkpoint_has_them(
    open_sizes: Callable[..., Checkpoint],
    tmp_path: Path,
    compute: type[np.float32] | type[np.float16],
) -> None:
    checkpoint = open_sizes(())

    read = read_back(checkpoint, Form(16, 0, None, compute), tmp_path, None)

    for name in all_names(checkpoint):
        assert read.codes(name) is None
        assert read.rounding(name) is None
        np.testing.assert_array_equal(read.linear(name), checkpoint.read(f"{name}.weight"))


def test_a_zero_point_that_a_node_brings_is_used(
    open_sizes: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    checkpoint, form, name = open_sizes(()), FORMS["int4"], linear_name(1, "mlp.up_proj")
    layers = weights_of(checkpoint, form)
    before = read_back(checkpoint, form, tmp_path, layers)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    (node,) = (node for node in model.graph.node if node.name == name)
    # 384 rows, one block, so half of each byte is unused.
    zeros = onnx.numpy_helper.from_array(np.full((384, 1), 7, np.uint8), "zeros")
    model.graph.initializer.append(zeros)
    node.input.append("zeros")
    onnx.save(model, tmp_path / "model.onnx")

    text = checkpoint.dims.text
    graph = GraphFile(tmp_path / "model.onnx", "decoder")
    after = GraphWeights(graph, text.query_size, text.key_value_size)

    codes = after.codes(name)
    assert codes is not None
    assert not codes.has_default_zero
    weight = layers.source.linear(name)
    np.testing.assert_array_equal(
        after.linear(name), (weight.qweight.astype(np.float32) - 7) * weight.scales
    )
    np.testing.assert_array_equal(before.linear(name), weight.dequantize())


def test_a_layer_that_is_not_there_is_named(
    open_sizes: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    read = read_back(open_sizes(()), Form(16, 0, None), tmp_path, None)

    with pytest.raises(ArtifactError, match=r"no weight of language_model\.layers\.9"):
        read.linear(linear_name(9, "mlp.up_proj"))


def test_the_graph_holds_what_passed_the_digested_source(
    open_sizes: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    checkpoint, form = open_sizes(()), FORMS["int4"]
    plain = weights_of(checkpoint, form)
    source = DigestedSource(plain.source)
    layers = QuantizedLayers(source, source.head(plain.head))

    read = read_back(checkpoint, form, tmp_path, layers)

    assert (source.bits, source.group_size) == (4, 128)
    assert list(source.digests) == sorted(all_names(checkpoint))
    for name, digest in source.digests.items():
        codes = read.codes(name)
        assert codes is not None
        assert weight_digest(codes.codes, codes.scales) == digest


def test_a_digest_tells_every_code_and_scale_apart() -> None:
    codes = np.arange(32, dtype=np.uint8).reshape(4, 8) % 16
    scales = np.linspace(0.1, 0.4, 8).astype(np.float16).reshape(4, 2)

    def changed(array: NDArray[np.generic]) -> NDArray[np.generic]:
        other = array.copy()
        other[2, 1] *= 2
        return other

    digests = {
        weight_digest(codes, scales),
        weight_digest(changed(codes), scales),
        weight_digest(codes, changed(scales)),
        weight_digest(codes[::-1], scales),
    }
    assert len(digests) == 4
    assert weight_digest(codes, scales.astype(np.float32)) == weight_digest(codes, scales)
    assert weight_digest(np.asfortranarray(codes), scales) == weight_digest(codes, scales)
    with pytest.raises(ValueError, match="float16"):
        weight_digest(codes, scales.astype(np.float32) * np.float32(1.0001))


def test_a_source_that_changes_its_mind_is_refused(open_sizes: Callable[..., Checkpoint]) -> None:
    plain = RtnSource(open_sizes(()), 4, 128)

    class Wavering:
        bits, group_size, calls = 4, 128, 0

        def linear(self, name: str) -> QuantizedWeight:
            self.calls += 1
            weight = plain.linear(name)
            weight.qweight[0, 0] = self.calls
            return weight

    source = DigestedSource(Wavering())
    name = linear_name(0, "mlp.up_proj")
    source.linear(name)

    with pytest.raises(CheckpointError, match="read twice"):
        source.linear(name)


@pytest.mark.parametrize("form", ["fp16", "int8 integer", "int8 nbits", "int4"])
def test_some_outputs_are_those_of_the_whole(
    make_checkpoint: Callable[..., Path], make_form: Callable[[Path, str], Path], form: str
) -> None:
    folder = make_checkpoint("odd", **{**SIZES, **BACKBONES["mistral-gqa"]})
    weights = GraphWeights.open(open_artifact(make_form(folder, form)))
    for name in ("language_model.layers.1.self_attn.k_proj", "lm_head"):
        whole = weights.linear(name)

        part = weights.linear(name, slice(5, 29))

        np.testing.assert_array_equal(part, whole[5:29])
