"""The memory model: a named term for everything that takes memory, phase by phase.

Four phases follow one another: weights are loaded, tiles are encoded, the prompt is computed,
tokens are decoded. Most terms live through several; what is needed is the largest phase, not the
sum of all. Device and host are apart on a board with its own GPU memory; a CPU has the host alone;
on a unified board both come out of one memory.

The prediction is an upper bound: each term is taken at the largest input the plan allows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from llava_edge.profiles.boards.hardware import Int8Isa, Target
from llava_edge.profiles.memory.buffers import (
    MAX_DRAFT_TOKENS,
    default_cache_type,
    image_decoding_bytes,
    image_feature_bytes,
    kv_cache_bytes,
    logits_bytes,
    pixel_value_bytes,
    prefill_chunk_tokens,
    prompt_embedding_bytes,
    rope_table_bytes,
    tiles_per_batch,
    video_decoding_bytes,
    video_feature_bytes,
)
from llava_edge.profiles.memory.constants import Constants, memory_constants
from llava_edge.profiles.memory.device_pages import unused_cache_bytes, unused_weight_bytes
from llava_edge.profiles.memory.device_runs import DecoderRuns, cublas_bytes, tower_bytes
from llava_edge.profiles.memory.formats import (
    PER_CHANNEL,
    VisionFormat,
    WeightBytes,
    activation_bytes,
    body_route,
    default_vision,
    head_group_size,
    head_matrix,
    weight_bytes,
)
from llava_edge.profiles.memory.terms import (
    PHASES,
    PLANNED_VIDEO_PIXELS,
    Machine,
    MemoryEstimate,
    MemoryTerms,
    Phases,
    Workload,
)
from llava_edge.profiles.models.model_dims import ModelDims, TextDims, VisionDims
from llava_edge.profiles.models.parameters import decoder_matrices

_STEP_TOKENS = 1 + MAX_DRAFT_TOKENS
"""Positions of the largest decode step: a token and its draft."""


def estimate_memory(
    dims: ModelDims,
    precision: str,
    workload: Workload,
    machine: Machine,
    constants: Mapping[str, Constants] | None = None,
    vision: VisionFormat | None = None,
) -> MemoryEstimate:
    """Every term of every phase.

    Args:
        dims: the model.
        precision: ``fp16``, ``int8`` or ``int4``; see ``formats.part_precisions``.
        workload: context, images, batches.
        machine: target and what else sizes depend on.
        constants: groups as ``memory_constants`` gives them; None for the shipped ones.
        vision: format of the tower; None for ``formats.default_vision``.
    """
    groups = memory_constants() if constants is None else constants
    vision = vision or default_vision(precision, machine.target, machine.int8_isa)
    if machine.target == "cpu":
        host = _cpu_phases(dims, precision, vision, workload, machine, groups["cpu"])
        return MemoryEstimate(device={}, host=host)
    device = _device_phases(dims, precision, vision, workload, machine, groups["cuda"])
    host = _cuda_host_phases(dims, workload, groups["cuda"])
    return MemoryEstimate(device=device, host=host, unified=machine.unified)


def _weights(weights: WeightBytes) -> MemoryTerms:
    return MemoryTerms(
        decoder_weights=weights.decoder,
        lm_head=weights.lm_head,
        vision_tower=weights.vision_tower,
        projector=weights.projector,
    )


def _cpu_phases(
    dims: ModelDims,
    precision: str,
    vision: VisionFormat,
    work: Workload,
    machine: Machine,
    c: Constants,
) -> Phases:
    text = dims.text
    isa = machine.int8_isa
    resident = weight_bytes(dims, precision, "cpu", isa, resident=True, vision=vision)
    loaded = _weights(resident) + MemoryTerms(
        rope_tables=rope_table_bytes(text, work.context_tokens, "cpu"),
        process=c.bytes("process") + text.vocab_size * c.bytes("tokenizer_per_token"),
        engine_workspace=2 * c.bytes("session"),
    )
    terms = _activation_terms(text, precision, isa)
    ready = loaded + MemoryTerms(kv_cache=_cache(text, work, "cpu"), logits=logits_bytes(text))
    chunk = prefill_chunk_tokens(work.chunk_tokens, work.context_tokens)
    batch = work.batch_tiles or tiles_per_batch("cpu", work.tiles_per_image)
    # A request keeps its tiles until it is answered.
    pixels = MemoryTerms(pixel_values=pixel_value_bytes(dims.vision, work.num_tiles))
    media = pixels + MemoryTerms(image_features=_features(dims, work, "cpu"))
    factor = c["activation_factor"]
    activations = _vision_activations(dims, batch, factor, vision.precision)
    # Images are decoded and cut before the first tile is encoded.
    encode = max(
        ready + pixels + MemoryTerms(image_decoding=_image_decoding(dims.vision, work)),
        ready + media + MemoryTerms(vision_activations=activations),
        key=lambda terms: terms.total,
    )
    transient = _load_transient(dims, precision, vision, machine, c)
    factor = c["prefill_factor"]
    phases = {
        "load": max(
            loaded + MemoryTerms(load_transient=transient),
            _tokenizer_load(text, c),
            key=lambda terms: terms.total,
        ),
        "encode": encode,
        "prefill": ready + media + _decoder_run(text, chunk, 1, terms, factor, c),
        "decode": ready
        + pixels
        + MemoryTerms(logits=logits_bytes(text, _STEP_TOKENS))
        + _decoder_run(text, _STEP_TOKENS, _STEP_TOKENS, terms, factor, c),
    }
    return {n: p.with_slack(c.bytes("slack"), c["slack_share"]) for n, p in phases.items()}


def _load_transient(
    dims: ModelDims, precision: str, vision: VisionFormat, machine: Machine, c: Constants
) -> int:
    """What loading takes beside the finished weights of both graphs.

    ONNX Runtime brings every weight into its final type first and then packs one after another for
    its matrix product, so at the worst moment the largest matrix is there twice: at 4 bytes where
    it computes in float32, at one where weights are int8, as the head always is beside an int4
    body. The tower is finished before the decoder is opened, and its worst moment does not see the
    decoder.
    """
    text, v = dims.text, dims.vision
    isa = machine.int8_isa
    # Queries, keys and values are one matrix in the graph.
    packed = (text.query_size + 2 * text.key_value_size) * text.hidden_size
    single = (matrix.rows * matrix.columns for matrix in decoder_matrices(text))
    largest = max(packed, head_matrix(text).parameters, *single)
    tower = v.hidden_size * max(3 * v.hidden_size, v.intermediate_size)
    tower = 4 * max(tower, text.hidden_size * max(text.hidden_size, v.feature_size))
    resident = weight_bytes(dims, precision, "cpu", isa, resident=True, vision=vision)
    stored = weight_bytes(dims, precision, "cpu", isa, resident=False, vision=vision)
    if vision.precision == "int8":
        tower += int((stored.vision_tower + stored.projector) * c["pack_transient"])
    decoder = resident.decoder + resident.lm_head
    twice = 4 * largest if precision == "fp16" else largest
    return max(twice, tower - decoder)


def _decoder_run(
    text: TextDims, tokens: int, kept: int, terms: int, factor: float, c: Constants
) -> MemoryTerms:
    return MemoryTerms(
        prompt_embeddings=prompt_embedding_bytes(text, tokens, "cpu"),
        prefill_activations=_decoder_activations(text, tokens, kept, terms, factor),
        attention_workspace=c.bytes("attention_block"),
    )


def _device_phases(
    dims: ModelDims,
    precision: str,
    vision: VisionFormat,
    work: Workload,
    machine: Machine,
    c: Constants,
) -> Phases:
    text, context = dims.text, work.context_tokens
    weights = weight_bytes(dims, precision, "cuda", machine.int8_isa, resident=True, vision=vision)
    capability = machine.capability
    loaded = _weights(weights) + MemoryTerms(
        rope_tables=rope_table_bytes(text, context, "cuda"),
        driver_context=c.bytes("driver_context"),
        engine_workspace=cublas_bytes(capability),
        allocator_slack=unused_weight_bytes(dims, precision, vision),
    )
    cache = work.cache or default_cache_type("cuda")
    ready = loaded + MemoryTerms(
        kv_cache=_cache(text, work, "cuda"),
        logits=logits_bytes(text),
        allocator_slack=unused_cache_bytes(text, context, cache),
    )
    batch = work.batch_tiles or tiles_per_batch("cuda", work.tiles_per_image)
    # Each session's arena keeps what it once took, so the tower's part stays through prefill.
    encode = ready + MemoryTerms(
        pixel_values=pixel_value_bytes(dims.vision, batch) // 2,
        image_features=batch * dims.vision.num_patches * text.hidden_size * 2,
        vision_activations=int(tower_bytes(dims, batch) * c["activation_factor"]),
    )
    chunk = prefill_chunk_tokens(work.chunk_tokens, context)
    runs = DecoderRuns(
        text,
        chunk,
        step_tokens=0,
        context_tokens=context,
        has_int8_cache=cache == "int8",
        dequantises=precision != "fp16",
        most_dequantised=c.bytes("dequant_scratch_limit"),
        compute_capability=capability,
    )
    prefill = encode + _device_run(runs, c["activation_factor"])
    decode = (
        encode
        + _device_run(replace(runs, step_tokens=_STEP_TOKENS), c["activation_factor"])
        + MemoryTerms(logits=logits_bytes(text, _STEP_TOKENS))
    )
    phases = dict(zip(PHASES, (loaded, encode, prefill, decode), strict=True))
    return {n: p.with_slack(c.bytes("slack"), c["slack_share"]) for n, p in phases.items()}


def _device_run(runs: DecoderRuns, factor: float) -> MemoryTerms:
    activations, dequantised, attention = (int(part * factor) for part in runs.by_cause())
    return MemoryTerms(
        # One chunk at a time, as it is read.
        prompt_embeddings=runs.chunk_tokens * runs.text.hidden_size * activation_bytes("cuda"),
        prefill_activations=activations,
        attention_workspace=attention,
        engine_workspace=dequantised,
    )


def _cuda_host_phases(dims: ModelDims, work: Workload, c: Constants) -> Phases:
    text = dims.text
    base = MemoryTerms(
        process=c.bytes("process") + text.vocab_size * c.bytes("tokenizer_per_token")
    )
    chunk = prefill_chunk_tokens(work.chunk_tokens, work.context_tokens)
    media = MemoryTerms(image_features=_features(dims, work, "cuda"))
    run = MemoryTerms(
        prompt_embeddings=prompt_embedding_bytes(text, chunk, "cuda"), logits=logits_bytes(text)
    )
    return {
        "load": max(
            base + MemoryTerms(load_transient=c.bytes("staging")),
            _tokenizer_load(text, c),
            key=lambda terms: terms.total,
        ),
        "encode": base + media + _encode_host(dims, work),
        "prefill": base + media + run,
        "decode": base + media + MemoryTerms(logits=logits_bytes(text)),
    }


def _tokenizer_load(text: TextDims, c: Constants) -> MemoryTerms:
    """While ``tokenizer.json`` is opened, which comes before everything else that is loaded."""
    return MemoryTerms(
        process=c.bytes("process"),
        load_transient=text.vocab_size * c.bytes("tokenizer_load_per_token"),
    )


def _cache(text: TextDims, work: Workload, target: Target) -> int:
    return kv_cache_bytes(text, work.context_tokens, work.cache or default_cache_type(target))


def _features(dims: ModelDims, work: Workload, target: Target) -> int:
    images = image_feature_bytes(dims, work.num_images * work.tiles_per_image, target)
    frames = video_feature_bytes(dims, work.num_frames, target) if work.num_frames else 0
    return images + frames


def _encode_host(dims: ModelDims, work: Workload) -> MemoryTerms:
    return MemoryTerms(
        pixel_values=pixel_value_bytes(dims.vision, work.num_tiles),
        image_decoding=_image_decoding(dims.vision, work),
    )


def _image_decoding(vision: VisionDims, work: Workload) -> int:
    """The largest image as it is decoded and cut into tiles.

    Decoding is ``image_decoding_bytes``, of the costliest format where none is named. Cutting needs
    the image laid out on its tiles (4 bytes a pixel, 3 as an array and as the bytes it comes from,
    3 on the canvas) and, between both passes of resizing, rows already at their width.
    """
    canvas = max(1, work.tiles_per_image - 1) * vision.image_size**2
    between = 4 * math.isqrt(canvas * work.image_pixels)
    image = max(
        image_decoding_bytes(work.image_pixels, work.image_format),
        4 * work.image_pixels + between + 13 * canvas,
    )
    return max(image, video_decoding_bytes(PLANNED_VIDEO_PIXELS) if work.num_frames else 0)


def _vision_activations(dims: ModelDims, tiles: int, factor: float, precision: str) -> int:
    """One batch inside a tower block or the projector on the CPU, whichever is larger.

    Attention holds residual, normed, packed and reordered queries, keys and values, and the scores
    before and after softmax; the MLP its input, residual and two inner tensors. At 8 bits a layer's
    input is there as codes and, divided by the size of its rows, in float as well.
    """
    v: VisionDims = dims.vision
    tokens, hidden = v.num_patches + 1, v.hidden_size
    attention = tokens * hidden * 11 + 2 * v.num_attention_heads * tokens * tokens
    mlp = tokens * (2 * hidden + 2 * v.intermediate_size)
    projector = v.num_patches * (v.feature_size + hidden + 3 * dims.text.hidden_size)
    if precision == "int8":
        # A quarter of a float for a code.
        attention += tokens * hidden * 5 // 4
        mlp += tokens * v.intermediate_size * 5 // 4
        projector += v.num_patches * max(v.feature_size, dims.text.hidden_size) * 5 // 4
    elements = max(attention, mlp, projector) + tokens * hidden * (len(v.feature_layers) - 1)
    return int(tiles * elements * activation_bytes("cpu") * factor)


def _activation_terms(text: TextDims, precision: str, int8_isa: Int8Isa) -> int:
    """Integer codes that stand for one activation on the CPU; 0 where it stays a float."""
    if precision == "fp16":
        return 0
    return 2 if body_route(text, precision, "cpu", int8_isa) == "two-term" else 1


def _product_parts(terms: int, group: int = PER_CHANNEL) -> int:
    """Floats for each output of a linear layer while it is computed.

    With two terms: both products, both once more times the size of their row, and the sum. Blocks
    of a head in groups have their sizes within the product.
    """
    if terms != 2:
        return 1
    return 5 if group == PER_CHANNEL else 3


def _decoder_activations(text: TextDims, tokens: int, kept: int, terms: int, factor: float) -> int:
    """One chunk inside a decoder layer on the CPU: attention or MLP, whichever is larger.

    Attention holds residual, normed, packed and rotated queries, keys and values and its output;
    the MLP residual, normed, gate, its sigmoid, their product and up. A quantised layer adds its
    input as integers and, scaled row by row, as float32. With two terms most is held while up is
    computed beside the gate; their codes, alone and side by side, are four bytes an input. The
    head comes after all layers: what its ``kept`` rows hold beside the logits themselves.
    """
    size = activation_bytes("cpu")
    packed = text.query_size + 2 * text.key_value_size
    attention = 3 * text.hidden_size + 2 * packed + text.query_size
    mlp = 2 * text.hidden_size + 4 * text.intermediate_size
    widest = max(text.intermediate_size, text.query_size, text.hidden_size)
    extra = widest * (size + 1) if terms else 0
    if terms == 2:
        attention = max(attention, 3 * text.hidden_size + _product_parts(terms) * packed)
        mlp = 2 * text.hidden_size + (1 + _product_parts(terms)) * text.intermediate_size
        extra = text.hidden_size * size
    layer = tokens * (max(attention, mlp) * size + extra)
    head_parts = _product_parts(terms, head_group_size(text, "int8", "cpu"))
    head = kept * (head_parts - 1) * text.vocab_size * size
    return int(max(layer, head) * factor)
