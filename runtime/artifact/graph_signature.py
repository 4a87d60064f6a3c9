"""Whether the graphs of a manifest are those of its dimensions.

The runtime makes its buffers from dimensions and binds them by name; a graph of other shapes would
fail at the first question, far from its cause.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet

from llava_edge.profiles.errors import ArtifactError
from llava_edge.profiles.memory.buffers import BEST_TOKENS, cache_scale_shape
from llava_edge.profiles.models.model_dims import ModelDims, TextDims
from llava_edge.runtime.artifact.graph_inputs import LOGITS_START, LOGITS_TO_KEEP, POOLING
from llava_edge.runtime.artifact.manifest import Manifest, TensorSpec
from llava_edge.runtime.artifact.onnx_proto import OnnxHeader, read_onnx_header
from llava_edge.runtime.artifact.onnx_schema import ELEMENT_TYPES
from llava_edge.runtime.artifact.open import Artifact

Expected = dict[str, tuple[str, tuple[int | None, ...]]]
"""Element type and sizes by tensor name; None for a size that varies."""

ROPE_TABLES = ("cos_cache", "sin_cache")
MAX_LAYERS = 1024
_BEST = ("best_logits", "best_ids")


def check_interfaces(artifact: Artifact) -> None:
    """Refuse graphs that the runtime could not feed.

    Raises:
        ArtifactError: a graph is not the one that the manifest's dimensions and context call for.
    """
    manifest = artifact.manifest
    faults = list(interface_faults(manifest))
    for cache, spec in manifest.decoders.items():
        header = read_onnx_header(artifact.files[spec.file])
        faults += table_faults(header, manifest.context_tokens)
        if cache == "int8":
            faults += scale_faults(header, manifest.model.text)
    if faults:
        listed = "\n  - ".join(faults)
        raise ArtifactError(
            f"{artifact.folder} does not go together:\n  - {listed}\nConvert again."
        )


def table_faults(header: OnnxHeader, context_tokens: int) -> list[str]:
    """Where a decoder's rotary tables do not cover the context that the manifest promises."""
    rows = {t.name: t.dims[0] for t in header.tensors if t.name in ROPE_TABLES and t.dims}
    return [
        f"{name} covers {rows.get(name, 0)} positions; the manifest promises {context_tokens}"
        for name in ROPE_TABLES
        if rows.get(name, 0) < context_tokens
    ]


def scale_faults(header: OnnxHeader, text: TextDims) -> list[str]:
    """Where a decoder with an int8 cache lacks the scales of a layer."""
    found = {t.name: (ELEMENT_TYPES.get(t.data_type), t.dims) for t in header.tensors}
    wanted = ("float32", cache_scale_shape(text))
    return [
        f"{name} is {found.get(name)}; an int8 cache calls for {wanted}"
        for layer in range(text.num_hidden_layers)
        for name in scale_names(layer)
        if found.get(name) != wanted
    ]


def scale_names(layer: int) -> tuple[str, str]:
    """Names of the scales of a layer's keys and values in a decoder with an int8 cache."""
    prefix = f"language_model.layers.{layer}.self_attn"
    return f"{prefix}.k_scale", f"{prefix}.v_scale"


def interface_faults(manifest: Manifest) -> Iterator[str]:
    """Inputs and outputs that are missing, left over, or of another type or size."""
    dims, compute = manifest.model, manifest.precision.computes
    if dims.text.num_hidden_layers > MAX_LAYERS:
        yield f"model.text.num_hidden_layers is {dims.text.num_hidden_layers}"
        return
    side, patches, hidden = dims.vision.image_size, dims.vision.num_patches, dims.text.hidden_size
    pixels: Expected = {"pixel_values": (compute, (None, 3, side, side))}
    features: Expected = {"image_features": (compute, (None, patches, hidden))}
    if dims.takes_video:
        pixels[POOLING] = ("int64", (None, None))
        features["image_features"] = (compute, (None, None, hidden))
    yield from _faults("vision inputs", manifest.vision.inputs, pixels)
    yield from _faults("vision outputs", manifest.vision.outputs, features)
    logits: Expected = {"logits": ("float32", (1, None, dims.text.vocab_size))}
    for cache, spec in manifest.decoders.items():
        what = "decoder" if cache == compute else f"decoder with {cache} cache:"
        asked = {tensor.name for tensor in spec.inputs}
        inputs = _decoder_inputs(dims, compute, asked) | _caches(dims, cache, "past_key_values")
        yield from _faults(f"{what} inputs", spec.inputs, inputs)
        outputs = logits | _caches(dims, cache, "present")
        # Not every artifact has them: the runtime then takes all logits.
        if any(tensor.name in _BEST for tensor in spec.outputs):
            shape = (1, None, min(BEST_TOKENS, dims.text.vocab_size))
            outputs |= dict(zip(_BEST, (("float32", shape), ("int64", shape)), strict=True))
        yield from _faults(f"{what} outputs", spec.outputs, outputs)


def _decoder_inputs(dims: ModelDims, compute: str, asked: AbstractSet[str]) -> Expected:
    # The cuda target has the second form; its artifacts of before have the first.
    start = LOGITS_START in asked and compute == "float16"
    kept: Expected = {LOGITS_START: ("int64", (1,))} if start else {LOGITS_TO_KEEP: ("int64", ())}
    return {
        "inputs_embeds": (compute, (1, None, dims.text.hidden_size)),
        "seqlens_k": ("int32", (1,)),
        "total_sequence_length": ("int32", ()),
        **kept,
    }


def _caches(dims: ModelDims, dtype: str, name: str) -> Expected:
    shape = (1, dims.text.num_key_value_heads, None, dims.text.head_dim)
    return {
        f"{name}.{layer}.{part}": (dtype, shape)
        for layer in range(dims.text.num_hidden_layers)
        for part in ("key", "value")
    }


def _faults(what: str, stated: Sequence[TensorSpec], expected: Expected) -> Iterator[str]:
    found = {tensor.name: tensor for tensor in stated}
    missing = sorted(set(expected) - set(found))
    extra = sorted(set(found) - set(expected))
    if missing or extra or len(found) != len(stated):
        yield (
            f"{what} are not those of the model: {len(missing)} missing "
            f"{missing[:2]}, {len(extra)} unknown {[name[:60] for name in extra[:2]]}"
        )
        return
    for name, (dtype, shape) in expected.items():
        tensor = found[name]
        fits = len(tensor.shape) == len(shape) and all(
            want is None or have == want for have, want in zip(tensor.shape, shape, strict=True)
        )
        if tensor.dtype != dtype or not fits:
            yield (
                f"{what}: {name} is {tensor.dtype}{list(tensor.shape)}; the model's dimensions "
                f"call for {dtype}{list(shape)}"
            )
