"""Graphs and manifest against the checkpoint's config.json: clean ones pass, faults show."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from llava_edge.convert.checkpoint.open import Checkpoint, open_checkpoint
from llava_edge.convert.verification.structure.stage import structure_stage
from llava_edge.runtime.artifact.certificate import StageResult
from llava_edge.runtime.artifact.open import Artifact, open_artifact
from llava_edge.runtime.backends.onnxruntime import Session, SessionOptions
from llava_edge.runtime.vision.encoder import VisionEncoder
from tests.faults.models.tamper import Tampered
from tests.support.checkpoint_layouts import as_original
from tests.support.tiers import slow_but
from tests.support.verification_fixtures import BACKBONES, FORMS, SIZES

Opened = Callable[[Path, Path], tuple[Artifact, Checkpoint]]
LAYER = "language_model.layers"
BLOCK = "vision_tower.encoder.layers"

RARE: dict[str, dict[str, object]] = {
    "tied head": {"backbone": "qwen2", "tie_word_embeddings": True},
    "windowed mistral": {"backbone": "mistral", "sliding_window": 20},
    "qwen2 with a window from layer 1 on": {
        "backbone": "qwen2",
        "sliding_window": 24,
        "max_window_layers": 1,
    },
    "linear rope scaling": {"rope_factor": 4.0, "rope_theta": 5e5, "rms_norm_eps": 1e-6},
    "head size of its own": {"backbone": "mistral", "head_dim": 48},
    "last block as the feature": {"vision_feature_layer": -1},
    "two feature layers": {"vision_feature_layer": (1, 3)},
    "projector without biases": {"projector_bias": False},
}


def row(opened: Opened, artifact: Path, checkpoint: Path) -> StageResult:
    result = structure_stage(*opened(artifact, checkpoint))
    print(result.detail)
    return result


@pytest.mark.parametrize(
    ("backbone", "form"),
    slow_but(
        [*(("mistral-gqa", form) for form in FORMS), *((name, "fp16") for name in BACKBONES)],
        product(BACKBONES, FORMS),
    ),
)
def test_every_form_of_every_backbone_passes(
    make_checkpoint: Callable[..., Path],
    make_form: Callable[[Path, str], Path],
    opened: Opened,
    backbone: str,
    form: str,
) -> None:
    checkpoint = make_checkpoint("odd", **SIZES, **BACKBONES[backbone])

    result = row(opened, make_form(checkpoint, form), checkpoint)

    assert (result.name, result.metric, result.question) == ("structure", "faults", "export")
    assert (result.verdict, result.value) == ("pass", 0.0)
    assert "decoder/model.onnx" in result.detail


@pytest.mark.parametrize("changes", RARE.values(), ids=RARE)
def test_rare_settings_pass(
    make_checkpoint: Callable[..., Path],
    make_form: Callable[[Path, str], Path],
    opened: Opened,
    changes: dict[str, object],
) -> None:
    checkpoint = make_checkpoint("odd", **changes)

    assert row(opened, make_form(checkpoint, "fp16"), checkpoint).verdict == "pass"


def test_a_checkpoint_in_the_original_layout_passes(
    make_checkpoint: Callable[..., Path],
    make_form: Callable[[Path, str], Path],
    opened: Opened,
    tmp_path: Path,
) -> None:
    folder = as_original(make_checkpoint("odd"), tmp_path / "original")
    assert open_checkpoint(folder).layout == "original"

    assert row(opened, make_form(folder, "fp16"), folder).verdict == "pass"


Fault = Callable[[Tampered], None]


def swap_nodes(part: str, first: str, second: str, places: tuple[int, ...] = (1, 2)) -> Fault:
    def fault(copy: Tampered) -> None:
        for place in places:
            copy.swap_inputs(part, (first, place), (second, place))  # type: ignore[arg-type]

    return fault


def attributes(part: str, name: str, **values: Any) -> Fault:
    return lambda copy: copy.set_attributes(part, name, **values)  # type: ignore[arg-type]


def tables(theta: float = 10000.0, factor: float = 1.0, shift: int = 0) -> Fault:
    """Rotary tables of another base, scaling or first position."""

    def fault(copy: Tampered) -> None:
        for name, function in (("cos_cache", np.cos), ("sin_cache", np.sin)):

            def change(old: np.ndarray[Any, Any], function: Any = function) -> Any:
                rows, half = old.shape
                inverse = theta ** (-np.arange(half) / half) / factor
                return function(np.outer(np.arange(rows) + shift, inverse))

            copy.change_tensor("decoder", name, change)

    return fault


def first_token(value: int) -> Fault:
    def fault(copy: Tampered) -> None:
        (node,) = copy.nodes("vision", "Slice")
        copy.set_constant("vision", node.name, 1, np.array([value]))

    return fault


def class_token_kept(copy: Tampered) -> None:
    (node,) = copy.nodes("vision", "Slice")
    copy.bypass("vision", node.name)


def feature_layer_off_by_one(copy: Tampered) -> None:
    """The projector reads the state in front of the last block."""
    (node,) = copy.nodes("vision", "Slice")
    norms = [n for n in copy.nodes("vision", "LayerNormalization") if "layer_norm1" in n.name]
    copy.rewire("vision", node.name, 0, norms[-1].input[0])


def gelu_in_the_tower(copy: Tampered) -> None:
    sigmoid = copy.nodes("vision", "Sigmoid")[0]
    scaled = next(n for n in copy.nodes("vision", "Mul") if n.output[0] == sigmoid.input[0])
    product = next(n for n in copy.nodes("vision", "Mul") if sigmoid.output[0] in n.input)
    product.op_type = "Gelu"
    del product.input[1:]
    assert product.input[0] == scaled.input[0]


def other_alpha(copy: Tampered) -> None:
    copy.change_tensor("vision", "quick_gelu_alpha", lambda old: np.full_like(old, 1.7))


def sigmoid_on_up(copy: Tampered) -> None:
    """SiLU goes over up_proj in place of gate_proj."""
    sigmoid = copy.nodes("decoder", "Sigmoid")[1]
    gate = sigmoid.input[0]
    inner = next(n for n in copy.nodes("decoder", "Mul") if sigmoid.output[0] in n.input)
    outer = next(n for n in copy.nodes("decoder", "Mul") if inner.output[0] in n.input)
    up = outer.input[1]
    sigmoid.input[0] = up
    inner.input[0] = up
    outer.input[1] = gate


def bias_dropped(part: str, name: str) -> Fault:
    def fault(copy: Tampered) -> None:
        graph = copy.model(part).graph  # type: ignore[arg-type]
        (add,) = (n for n in graph.node if n.op_type == "Add" and f"{name}.bias" in n.input)
        copy.bypass(part, add.name)  # type: ignore[arg-type]

    return fault


def layers_swapped(copy: Tampered) -> None:
    """Layer 0 reads all tensors of layer 1 and the other way round."""
    for node in copy.model("decoder").graph.node:
        for place, value in enumerate(node.input):
            for one, other in ((0, 1), (1, 0)):
                old = f"{LAYER}.{one}."
                if value.startswith(old) and value.endswith((".weight", ".scales")):
                    node.input[place] = f"{LAYER}.{other}.{value.removeprefix(old)}"


def last_layer_dropped(copy: Tampered) -> None:
    """The head reads what goes into the last layer; the layer's own nodes are left dangling."""
    norms = copy.nodes("decoder", "SkipSimplifiedLayerNormalization")
    last = next(node for node in norms if node.name == f"{LAYER}.2.input_layernorm")
    for place, cut in enumerate(copy.nodes("decoder", "Slice")):
        cut.input[0] = last.input[place]


def norm_skipped(copy: Tampered) -> None:
    """MLP of layer 1 reads the residual without its norm."""
    norm = copy.node("decoder", f"{LAYER}.1.post_attention_layernorm")
    for part in ("gate", "up"):
        copy.rewire("decoder", f"{LAYER}.1.mlp.{part}_proj", 0, norm.output[3])


def residual_from_before(copy: Tampered) -> None:
    """The second norm of layer 1 takes the embeddings as its residual."""
    copy.rewire("decoder", f"{LAYER}.1.post_attention_layernorm", 0, "inputs_embeds")


def caches_swapped(copy: Tampered) -> None:
    for place in (3, 4):
        copy.swap_inputs(
            "decoder",
            (f"{LAYER}.0.self_attn.attention", place),
            (f"{LAYER}.1.self_attn.attention", place),
        )


def logits_from_the_start(copy: Tampered) -> None:
    (negative,) = copy.nodes("decoder", "Neg")
    copy.bypass("decoder", negative.name)


def start_by_name_alone(copy: Tampered) -> None:
    """A value of the name that the other target's input has, made of the number as it is."""
    logits_from_the_start(copy)
    (count,) = [n for n in copy.nodes("decoder", "Unsqueeze") if "logits_to_keep" in n.input]
    for node in copy.nodes("decoder", "Slice"):
        node.input[1] = "logits_start"
    count.output[0] = "logits_start"


def constant_start(copy: Tampered) -> None:
    """A constant of the name that the other target's input has."""
    graph = copy.model("decoder").graph
    graph.initializer.append(helper.make_tensor("logits_start", TensorProto.INT64, [1], [-1]))
    for node in copy.nodes("decoder", "Slice"):
        node.input[1] = "logits_start"


def key_as_value(copy: Tampered) -> None:
    squeezed = [n for n in copy.nodes("vision", "Squeeze") if n.input[0] == "Split_0.2"]
    squeezed[0].input[0] = "Split_0.1"


def query_and_key_swapped(copy: Tampered) -> None:
    split = copy.nodes("vision", "Split")[0]
    split.output[0], split.output[1] = split.output[1], split.output[0]


def scale_of_the_tower(copy: Tampered) -> None:
    copy.change_tensor("vision", "attention_scale", lambda old: old * 2)


def patches_by_columns(copy: Tampered) -> None:
    copy.set_attributes(
        "vision", copy.nodes("vision", "Transpose")[0].name, perm=[0, 4, 2, 1, 3, 5]
    )


def setting(*path: str, to: Any) -> Fault:
    def fault(copy: Tampered) -> None:
        owner = copy.manifest
        for key in path[:-1]:
            owner = owner[key]
        assert owner[path[-1]] != to
        owner[path[-1]] = to

    return fault


def _terms_of_the_head(copy: Tampered) -> Any:
    head = copy.node("decoder", "lm_head")
    (both,) = [n for n in copy.nodes("decoder", "Concat") if n.output[0] == head.input[0]]
    return both


def _rest_of_the_head(copy: Tampered) -> Any:
    rest = _terms_of_the_head(copy).input[1]
    return next(n for n in copy.nodes("decoder", "Sub") if n.output[0] == rest)


def first_term_of_the_head_alone(copy: Tampered) -> None:
    """The product of MatMulNBits as it rounds by itself."""
    head, hidden = copy.node("decoder", "lm_head"), _rest_of_the_head(copy).input[0]
    (both,) = [n for n in copy.nodes("decoder", "ReduceSum") if n.input[0] == head.output[0]]
    head.input[0] = hidden
    copy.bypass("decoder", both.name)


def first_term_of_the_head_twice(copy: Tampered) -> None:
    both = _terms_of_the_head(copy)
    both.input[1] = both.input[0]


ATTENTION = f"{LAYER}.1.self_attn.attention"
FAULTS: dict[str, tuple[Fault, str]] = {
    "epsilon of a norm": (
        attributes("decoder", f"{LAYER}.1.input_layernorm", epsilon=1e-6),
        "decoder, node language_model.layers.1.input_layernorm: epsilon is 1e-06; config.json says "
        "1e-05",
    ),
    "epsilon of the first norm": (
        attributes("decoder", f"{LAYER}.0.input_layernorm", epsilon=1e-3),
        "layers.0.input_layernorm: epsilon",
    ),
    "epsilon of the last norm": (
        attributes("decoder", "language_model.norm", epsilon=1e-3),
        "language_model.norm: epsilon",
    ),
    "epsilon in the tower": (
        attributes("vision", f"{BLOCK}.1.layer_norm2", epsilon=1e-3),
        "layers.1.layer_norm2: epsilon",
    ),
    "epsilon of pre_layrnorm": (
        attributes("vision", "vision_tower.pre_layrnorm", epsilon=1e-3),
        "pre_layrnorm: epsilon",
    ),
    "rope base": (tables(theta=1e6), "table cos_cache: 639 of 640 positions differ"),
    "rope base, a little": (tables(theta=10100.0), "differ from the rotary embedding"),
    "rope scaled": (tables(factor=2.0), "differ from the rotary embedding"),
    "positions shifted by one": (tables(shift=1), "the first is 0"),
    "query heads": (attributes("decoder", ATTENTION, num_heads=8), "num_heads is 8"),
    "key heads": (
        attributes("decoder", ATTENTION, kv_num_heads=4),
        "layers.1.self_attn.attention: kv_num_heads is 4; config.json says 2",
    ),
    "attention scale": (attributes("decoder", ATTENTION, scale=0.125), "scale is 0.125"),
    "window on": (
        attributes("decoder", ATTENTION, local_window_size=16),
        "local_window_size is 16; config.json says -1",
    ),
    "no rotation": (attributes("decoder", ATTENTION, do_rotary=0), "do_rotary is 0"),
    "interleaved rotation": (
        attributes("decoder", ATTENTION, rotary_interleaved=1),
        "rotary_interleaved is 1",
    ),
    "softcap": (attributes("decoder", ATTENTION, softcap=30.0), "softcap is 30"),
    "sine and cosine swapped": (
        lambda copy: copy.swap_inputs("decoder", (ATTENTION, 7), (ATTENTION, 8)),
        "table sin_cache: ",
    ),
    "layer count": (last_layer_dropped, "it has 2 layers; config.json says 3"),
    "layers swapped": (
        layers_swapped,
        "node language_model.layers.0.input_layernorm: it reads "
        "language_model.layers.1.input_layernorm.weight where "
        "language_model.layers.0.input_layernorm.weight belongs",
    ),
    "gate and up swapped": (
        sigmoid_on_up,
        "it reads language_model.layers.1.mlp.up_proj.weight where "
        "language_model.layers.1.mlp.gate_proj.weight belongs",
    ),
    "a norm skipped": (norm_skipped, "the output that is read as the norm"),
    "residual of another place": (
        residual_from_before,
        "behind node language_model.layers.1.input_layernorm: the residual is inputs_embeds",
    ),
    "caches of two layers swapped": (caches_swapped, "cache is ('past_key_values.1.key'"),
    "logits from the start": (logits_from_the_start, "Neg must be there"),
    "a constant start": (constant_start, "logits_start"),
    "a start by name alone": (start_by_name_alone, "Neg must be there"),
    "bias dropped in the decoder": (
        bias_dropped("decoder", f"{LAYER}.1.self_attn.q_proj"),
        "node language_model.layers.1.self_attn.q_proj: it reads nothing where "
        "language_model.layers.1.self_attn.q_proj.bias belongs",
    ),
    "bias dropped in the tower": (
        bias_dropped("vision", f"{BLOCK}.1.mlp.fc2"),
        "layers.1.mlp.fc2: it reads nothing",
    ),
    "bias dropped in the projector": (
        bias_dropped("vision", "multi_modal_projector.linear_2"),
        "multi_modal_projector.linear_2: it reads nothing",
    ),
    "feature layer off by one": (
        feature_layer_off_by_one,
        "the features are taken behind 2 blocks; config.json says 3",
    ),
    "class token kept": (class_token_kept, "begins at token 0, must begin at 1"),
    "class token kept by the cut": (first_token(0), "begins at token 0, must begin at 1"),
    "gelu for quick_gelu": (gelu_in_the_tower, "activation is gelu; config.json says quick_gelu"),
    "factor of quick_gelu": (other_alpha, "factor inside the sigmoid is 1.7"),
    "tanh gelu in the projector": (
        lambda copy: copy.set_attributes(
            "vision", copy.nodes("vision", "Gelu")[-1].name, approximate="tanh"
        ),
        "activation is gelu_tanh; config.json says gelu",
    ),
    "pre-norm missing": (
        lambda copy: copy.bypass("vision", "vision_tower.pre_layrnorm"),
        "there is no pre_layrnorm",
    ),
    "key taken as value": (key_as_value, "its part 1 is used as value"),
    "query and key swapped in the tower": (query_and_key_swapped, "its part 1 is used as query"),
    "attention scale of the tower": (scale_of_the_tower, "attention scale is 0.5"),
    "patches by columns": (patches_by_columns, "perm is [0, 4, 2, 1, 3, 5]"),
    "mean": (
        setting("image_processing", "image_mean", to=[0.5, 0.5, 0.5]),
        "image_processing.image_mean: it is (0.5, 0.5, 0.5)",
    ),
    "deviation": (setting("image_processing", "image_std", to=[0.5] * 3), "image_std"),
    "rescaling": (setting("image_processing", "rescale_factor", to=1 / 256), "rescale_factor"),
    "candidates": (
        setting("image_processing", "image_grid_pinpoints", to=[[210, 210]]),
        "image_grid_pinpoints: they are ((210, 210),)",
    ),
    "image id": (setting("tokens", "image", to=5), "tokens.image: it is 5"),
    "stop id": (setting("tokens", "stop", to=[17]), "which generation_config.json names"),
    "a word as stop id": (
        lambda copy: copy.manifest["tokens"]["stop"].append(300),
        "tokens.stop: 300",
    ),
    "epsilon in the manifest": (
        setting("model", "text", "rms_norm_eps", to=1e-6),
        "model.text.rms_norm_eps: it is 1e-06; config.json says 1e-05",
    ),
    "theta in the manifest": (setting("model", "text", "rope_theta", to=1e6), "rope_theta"),
}


@pytest.fixture(scope="module")
def qwen(make_checkpoint: Callable[..., Path], make_form: Callable[..., Path]) -> tuple[Path, Path]:
    """A checkpoint with every kind of bias, and its float32 artifact."""
    checkpoint = make_checkpoint("odd", **SIZES, **BACKBONES["qwen2-bias"])
    return make_form(checkpoint, "fp16"), checkpoint


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_named(
    qwen: tuple[Path, Path], opened: Opened, tmp_path: Path, name: str
) -> None:
    fault, sentence = FAULTS[name]
    copy = Tampered(qwen[0], tmp_path / "copy")
    fault(copy)

    result = row(opened, copy.seal(), qwen[1])

    assert result.verdict == "fail"
    assert sentence in result.detail


def test_a_copy_without_a_change_passes_and_every_digest_is_right(
    qwen: tuple[Path, Path], tmp_path: Path
) -> None:
    copy = Tampered(qwen[0], tmp_path / "copy")
    copy.model("decoder")

    artifact = open_artifact(copy.seal(), hash_everything=True)

    assert structure_stage(artifact, open_checkpoint(qwen[1])).verdict == "pass"


def code_scale(copy: Tampered) -> None:
    copy.change_tensor("decoder", "activation_scale", lambda old: np.full_like(old, 1 / 128))


def code_zero(copy: Tampered) -> None:
    copy.change_tensor("decoder", "activation_zero", lambda old: np.full_like(old, 127))


def zero_points(copy: Tampered) -> None:
    name = f"{LAYER}.1.mlp.up_proj"
    zeros = numpy_helper.from_array(np.full((384, 1), 7, np.uint8), "zeros")
    copy.model("decoder").graph.initializer.append(zeros)
    copy.rewire("decoder", name, 3, "zeros")


def other_row_size(copy: Tampered) -> None:
    """The product is multiplied by the size of another row."""
    sizes = [n for n in copy.nodes("decoder", "Mul") if n.input[0].startswith("Max_")]
    sizes[3].input[0] = sizes[0].input[0]


QUANTIZED: dict[str, tuple[str, Fault, str]] = {
    "scale of activation codes": ("int8 integer", code_scale, "scale of the activations is"),
    "zero of activation codes": ("int8 integer", code_zero, "zero point of the activations is"),
    "size of another row": ("int8 integer", other_row_size, "what the product is multiplied by"),
    "zero points of its own": ("int4", zero_points, "zero points is zeros, must be absent"),
    "number of inputs": (
        "int4",
        attributes("decoder", f"{LAYER}.1.mlp.up_proj", K=64),
        "number of inputs is 64; config.json says 128",
    ),
    "block size": (
        "int4",
        attributes("decoder", f"{LAYER}.1.mlp.down_proj", block_size=64),
        "block_size is 64; manifest.json says 128",
    ),
    "bits": (
        "int4",
        attributes("decoder", f"{LAYER}.1.mlp.down_proj", bits=8),
        "bits is 8; manifest.json says 4",
    ),
    "precision": ("int4", setting("precision", "language_model", to="int8"), "bits is 4"),
    "query reads the output projection": (
        "int4",
        swap_nodes("decoder", f"{LAYER}.0.self_attn.o_proj", f"{LAYER}.1.self_attn.o_proj"),
        "it reads language_model.layers.1.self_attn.o_proj.weight where",
    ),
    "epsilon in fp16": (
        "fp16 cuda",
        attributes("decoder", "language_model.norm", epsilon=1e-3),
        "language_model.norm: epsilon",
    ),
    "smallest logits for the best": (
        "fp16 cuda",
        attributes("decoder", "TopK_0", largest=0),
        "node TopK_0: largest is 0, must be 1",
    ),
    "best logits by id": (
        "int4 cuda",
        attributes("decoder", "TopK_0", sorted=0),
        "node TopK_0: sorted is 0, must be 1",
    ),
    "best of other numbers": (
        "fp16 cuda",
        lambda copy: copy.rewire("decoder", "TopK_0", 0, "lm_head"),
        "node TopK_0: what it orders is lm_head, must be logits",
    ),
    "second term of the head left out": (
        "int8 integer",
        first_term_of_the_head_alone,
        "node lm_head: number of codes of an activation is 1; manifest.json says 2",
    ),
    "first term of the head twice": (
        "int8 integer",
        first_term_of_the_head_twice,
        "must be there",
    ),
    "rest of another row": (
        "int8 integer",
        lambda copy: _rest_of_the_head(copy).input.__setitem__(0, "inputs_embeds"),
        "the rows that it rounds is ",
    ),
    "head of one scale a row": (
        "int8 integer",
        setting("conversion", "head_group_size", to=-1),
        "node lm_head: operator is MatMulNBits; manifest.json says MatMulIntegerToFloat",
    ),
    "rope base in fp16": ("fp16 cuda", tables(theta=1e6), "differ from the rotary embedding"),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_fault_in_another_form_is_found_and_named(
    make_checkpoint: Callable[..., Path],
    make_form: Callable[[Path, str], Path],
    opened: Opened,
    tmp_path: Path,
    name: str,
) -> None:
    form, fault, sentence = QUANTIZED[name]
    checkpoint = make_checkpoint("odd", **SIZES, **BACKBONES["mistral-gqa"])
    copy = Tampered(make_form(checkpoint, form), tmp_path / "copy")
    fault(copy)

    result = row(opened, copy.seal(), checkpoint)

    assert result.verdict == "fail"
    assert sentence in result.detail


def as_before(copy: Tampered) -> None:
    """The mean of patches as artifacts were given it before: a ReduceMean."""
    graph = copy.model("vision").graph
    (divide,) = (node for node in graph.node if node.op_type == "Div")
    (product,) = (node for node in graph.node if divide.output[0] in node.input)
    graph.initializer.append(numpy_helper.from_array(np.array([2]), "pooled_axis"))
    mean = ["ReduceMean", [product.input[1], "pooled_axis"], list(product.output), "ReduceMean_0"]
    place = list(graph.node).index(product)
    graph.node.remove(product)
    graph.node.insert(place, helper.make_node(*mean, keepdims=0))
    # What made the shares: nothing of it was there.
    pending = [divide]
    while pending:
        node = pending.pop()
        graph.node.remove(node)
        read = {name for each in graph.node for name in each.input}
        pending += [n for n in graph.node if set(n.output) & set(node.input) - read]


def other_axis(copy: Tampered) -> None:
    as_before(copy)
    copy.set_constant("vision", "ReduceMean_0", 1, np.array([1]))


POOLED_SUM = "MatMul_7"
"""Behind two products of attention a block and the patch embedding's."""

POOLED: dict[str, tuple[Fault, str]] = {
    "as now": (lambda copy: None, ""),
    "as before": (as_before, ""),
    "as before, mean of tokens": (other_axis, "axes is [1], must be [2]"),
    "ones that are twos": (
        lambda copy: copy.set_constant("vision", "Expand_1", 0, np.array([2], np.float32)),
        "node Expand_1: what it repeats is [2.0], must be [1]",
    ),
    "over another sum": (
        lambda copy: copy.rewire("vision", POOLED_SUM, 0, "one"),
        f"node {POOLED_SUM}: what it adds up is ['one', 'Expand_1'], must be",
    ),
    "shares by tokens": (
        attributes("vision", "Shape_1", start=0, end=1),
        "node Shape_1: start and end is (0, 1), must be (1, 2)",
    ),
    "shares by tiles": (
        lambda copy: copy.rewire("vision", "Shape_1", 0, "pixel_values"),
        "node Shape_1: whose shape it takes is pixel_values, must be pooling",
    ),
}


@pytest.mark.parametrize("name", POOLED)
def test_patches_of_a_frame_are_averaged(
    make_checkpoint: Callable[..., Path],
    make_form: Callable[[Path, str], Path],
    opened: Opened,
    tmp_path: Path,
    name: str,
) -> None:
    fault, sentence = POOLED[name]
    checkpoint = make_checkpoint("odd", model_type="llava_next_video", image_size=56)
    copy = Tampered(make_form(checkpoint, "fp16"), tmp_path / "copy")
    fault(copy)

    result = row(opened, copy.seal(), checkpoint)

    assert (result.verdict == "fail") == bool(sentence)
    assert sentence in result.detail


def test_the_mean_has_the_bits_that_it_had_before(
    make_checkpoint: Callable[..., Path], make_form: Callable[[Path, str], Path], tmp_path: Path
) -> None:
    made = make_form(make_checkpoint("odd", model_type="llava_next_video", image_size=56), "fp16")
    copy = Tampered(made, tmp_path / "copy")
    as_before(copy)
    frames = np.random.default_rng(0).standard_normal((3, 3, 56, 56), np.float32)
    found = []
    for folder in (made, copy.seal()):
        artifact = open_artifact(folder)
        dims = artifact.manifest.model
        session = Session(artifact.path(artifact.manifest.vision.file), SessionOptions())
        # Frames, four patches a token, and tiles, one patch a token.
        for rows in (4, 16):
            out = np.empty((3, rows, dims.text.hidden_size), np.float32)
            VisionEncoder(session, dims, 1, np.float32).encode(frames, out)
            found.append(out)

    np.testing.assert_array_equal(found[0], found[2])
    np.testing.assert_array_equal(found[1], found[3])


def test_scaling_that_was_dropped_is_found(
    make_checkpoint: Callable[..., Path],
    make_form: Callable[[Path, str], Path],
    opened: Opened,
    tmp_path: Path,
) -> None:
    checkpoint = make_checkpoint("odd", **RARE["linear rope scaling"])
    copy = Tampered(make_form(checkpoint, "fp16"), tmp_path / "copy")
    tables(theta=5e5)(copy)

    result = row(opened, copy.seal(), checkpoint)

    assert "differ from the rotary embedding" in result.detail
    assert "'factor': 4.0" in result.detail


def test_a_window_that_was_lost_is_found(
    make_checkpoint: Callable[..., Path],
    make_form: Callable[[Path, str], Path],
    opened: Opened,
    tmp_path: Path,
) -> None:
    checkpoint = make_checkpoint("odd", **RARE["qwen2 with a window from layer 1 on"])
    copy = Tampered(make_form(checkpoint, "fp16"), tmp_path / "copy")
    copy.set_attributes("decoder", ATTENTION, local_window_size=None)

    result = row(opened, copy.seal(), checkpoint)

    assert "local_window_size is -1; config.json says 24" in result.detail
