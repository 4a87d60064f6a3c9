from __future__ import annotations

from dataclasses import replace

import pytest

from llava_edge.convert.verification.stages.layers import LayerStage
from llava_edge.profiles.models.variants import find_variant
from llava_edge.runtime.verification.tolerances import Bounds, bound_rows

TEXT = find_variant("llava-v1.6-vicuna-7b").dims.text


def stage(width: int, form: str = "cpu-int4-nbits") -> LayerStage:
    heads = max(1, width // TEXT.head_dim)
    inner = width * TEXT.intermediate_size // TEXT.hidden_size
    text = replace(TEXT, hidden_size=width, num_attention_heads=heads, intermediate_size=inner)
    return LayerStage(Bounds(bound_rows(), form), text)


def test_rows_of_wide_layers_may_all_hold_some_steps() -> None:
    assert stage(1024).tenth_bound == 0.001
    assert stage(4096).tenth_bound == 0.02
    # Where nothing is rounded to codes there are no steps.
    assert stage(4096, "cpu-fp16").tenth_bound == 0.001
    assert stage(4096, "cuda-int4").tenth_bound == 0.005


@pytest.mark.parametrize(
    ("width", "bound"), [(64, 0.002), (128, 0.002), (512, 0.001), (4096, 5e-4), (8192, 5e-4)]
)
def test_a_wide_head_is_held_more_tightly(width: int, bound: float) -> None:
    assert stage(width).head_bound == pytest.approx(bound)
    assert stage(width, "cuda-int4").head_bound == 0.002
