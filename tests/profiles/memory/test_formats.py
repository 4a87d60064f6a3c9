from dataclasses import replace

import pytest

from llava_edge.profiles.errors import RequestError
from llava_edge.profiles.memory.formats import (
    PER_CHANNEL,
    WeightFormat,
    group_size,
    head_group_size,
    part_precisions,
    weight_bytes,
)
from llava_edge.profiles.models.model_dims import TextDims
from llava_edge.profiles.models.parameters import Matrix
from llava_edge.profiles.models.variants import find_variant

ONE = Matrix(rows=256, columns=512, count=3)
WEIGHTS = 256 * 512 * 3


@pytest.fixture
def text() -> TextDims:
    return find_variant("llava-v1.6-mistral-7b").dims.text


@pytest.mark.parametrize(
    ("form", "file", "resident"),
    [
        (WeightFormat("fp16", 128, "cuda"), 2 * WEIGHTS, 2 * WEIGHTS),
        (WeightFormat("fp16", 128, "cpu"), 2 * WEIGHTS, 4 * WEIGHTS),
        (
            WeightFormat("int4", 128, "cuda"),
            WEIGHTS // 2 + WEIGHTS // 128 * 2,
            WEIGHTS // 2 + WEIGHTS // 128 * 2,
        ),
        (
            WeightFormat("int4", 128, "cpu"),
            WEIGHTS // 2 + WEIGHTS // 128 * 4,
            WEIGHTS // 2 + WEIGHTS // 128 * 12,
        ),
        (
            WeightFormat("int8", PER_CHANNEL, "cpu"),
            WEIGHTS + 256 * 3 * 4,
            WEIGHTS + 256 * 3 * 8,
        ),
    ],
    ids=["fp16 cuda", "fp16 cpu", "int4 cuda", "int4 cpu", "int8 cpu per channel"],
)
def test_weights_and_scales_are_counted_to_the_byte(
    form: WeightFormat, file: int, resident: int
) -> None:
    assert form.file_bytes(ONE) == file
    assert form.resident_bytes(ONE) == resident


def test_a_ragged_last_group_has_a_scale_of_its_own() -> None:
    ragged = Matrix(rows=2, columns=130, count=1)
    assert WeightFormat("int4", 128, "cuda").file_bytes(ragged) == 130 + 2 * 2 * 2


def test_int8_on_a_cpu_is_per_channel_unless_it_lacks_the_instructions(text: TextDims) -> None:
    assert group_size(text, "int8", "cpu", "vnni") == PER_CHANNEL
    assert group_size(text, "int8", "cpu", "none") == 128
    assert group_size(text, "int8", "cuda") == 128
    assert group_size(text, "int4", "cpu") == 128


def test_the_head_has_groups_no_larger_than_a_block_whatever_the_layers_have(
    text: TextDims,
) -> None:
    assert head_group_size(text, "int8", "cpu") == 32
    assert head_group_size(text, "int4", "cpu") == head_group_size(text, "int8", "cuda") == 128
    assert head_group_size(replace(text, hidden_size=80), "int8", "cpu") == PER_CHANNEL


def test_the_scales_of_the_head_are_counted() -> None:
    dims = find_variant("llava-v1.6-mistral-7b").dims
    weights = 32064 * 4096

    written = weight_bytes(dims, "int8", "cpu", "vnni", resident=False)
    resident = weight_bytes(dims, "int8", "cpu", "vnni", resident=True)

    assert written.lm_head == weights + weights // 32 * 4
    assert resident.lm_head == weights + weights // 32 * 12


@pytest.mark.parametrize(
    ("intermediate", "group"), [(14336, 128), (64 * 33, 64), (32 * 33, 32), (16 * 33, PER_CHANNEL)]
)
def test_the_group_divides_every_input_size(text: TextDims, intermediate: int, group: int) -> None:
    assert group_size(replace(text, intermediate_size=intermediate), "int4", "cuda") == group


def test_a_quantised_body_gets_an_int8_head() -> None:
    assert part_precisions("int4").lm_head == "int8"
    assert part_precisions("fp16").lm_head == "fp16"
    with pytest.raises(RequestError, match="int3"):
        part_precisions("int3")


def test_resident_embeddings_take_nothing_because_rows_are_read_from_the_file() -> None:
    dims = find_variant("llava-v1.6-mistral-7b").dims
    assert weight_bytes(dims, "int4", "cpu", resident=True).embeddings == 0
    assert weight_bytes(dims, "int4", "cpu", resident=False).embeddings == (32064 + 1) * 4096 * 2
