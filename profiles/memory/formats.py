"""How weights lie in files and in memory: precision, group size, bytes of each part.

    file       what is downloaded to the board and read at load
    resident   what the engine keeps; on cpu fp16 becomes float32, packed integers gain block sums

Sources: GPTQ groups and MatMulNBits' layout (scales in the activation type, no zero points when
symmetric); on the CPU its int8 kernels keep one float32 sum a block beside the scale, and
MatMulIntegerToFloat one int32 sum a column.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from llava_edge.profiles.boards.hardware import Int8Isa, Target
from llava_edge.profiles.errors import RequestError
from llava_edge.profiles.models.model_dims import ModelDims, TextDims
from llava_edge.profiles.models.parameters import (
    Matrix,
    decoder_matrices,
    decoder_vectors,
    projector_matrices,
    projector_parameters,
    vision_matrices,
    vision_parameters,
)

PrecisionName = Literal["fp16", "int8", "int4"]
PRECISIONS: tuple[PrecisionName, ...] = get_args(PrecisionName)
"""From the most to the least exact."""

PER_CHANNEL = -1
"""Group size that means one scale for a whole output channel, as in a GPTQ checkpoint."""

Int8Route = Literal["two-term", "integer", "nbits"]
"""How 8-bit weights are multiplied on a CPU.

``two-term`` and ``integer`` are MatMulIntegerToFloat with one scale a row of activations. The first
adds the 8-bit codes of what the codes of the row leave over, so that a few large channels do not
cost the others their digits; the second does not, and is what the tower and artifacts of earlier
versions have. ``nbits`` is MatMulNBits: one scale a block.
"""

_BITS = {"fp16": 16, "int8": 8, "int4": 4}
_GROUPS = (128, 64, 32)
_SMALLEST_BLOCK = 16
_INT8_BLOCK = 32
"""Most columns that share a scale of activations beside an 8-bit body on a CPU: blocks of 64
lose more on a trained model than rounding the weights does."""
_FP16_BYTES = 2


@dataclass(frozen=True)
class PartPrecisions:
    """Precision of each part of an artifact; the body's precision names the whole."""

    language_model: PrecisionName
    lm_head: PrecisionName
    vision_tower: PrecisionName
    projector: PrecisionName
    embeddings: PrecisionName


@dataclass(frozen=True)
class VisionFormat:
    """How the linear layers of tower and projector are stored.

    Attributes:
        precision: ``fp16`` or ``int8``.
        wide_weights: weights that calibration left wider than that: fp16 beside ``int8``, float32
            in memory beside the ``fp16`` for the cuda target.
    """

    precision: PrecisionName = "fp16"
    wide_weights: int = 0


VISION_PRECISIONS: tuple[PrecisionName, ...] = ("fp16", "int8")


def vision_obstacle(precision: str, target: Target, int8_isa: Int8Isa) -> str | None:
    """Why the tower cannot take 8 bits beside a language model; None where it can.

    Its kernel needs a CPU's int8 instructions, and bounds of verification are set for artifacts
    whose language model is quantised as well.
    """
    if target != "cpu":
        return "the cuda target computes the tower in fp16"
    if int8_isa == "none":
        return "the board has no int8 instructions"
    if precision == "fp16":
        return "the language model is fp16; an int8 tower goes with int8 or int4"
    return None


def int8_cache_obstacle(compute_capability: str | None) -> str | None:
    """Why a GPU cannot take an int8 KV cache; None where it can, or where it is not known.

    ONNX Runtime reads codes by XQA or, dequantised, by flash attention; both begin at 8.0. Its
    other kernels do not look at the cache's type, so what they would answer is no answer.

    Args:
        compute_capability: such as ``8.9``.
    """
    if compute_capability is None or int(compute_capability.split(".")[0]) >= 8:
        return None
    return (
        f"ONNX Runtime reads such a cache on GPUs of compute capability 8.0 or higher, and this "
        f"one has {compute_capability}"
    )


def default_vision(precision: str, target: Target, int8_isa: Int8Isa) -> VisionFormat:
    """The tower's format where nothing else was asked: 8 bits wherever it can take them."""
    possible = vision_obstacle(precision, target, int8_isa) is None
    return VisionFormat("int8" if possible else "fp16")


def part_precisions(precision: str, vision: str = "fp16") -> PartPrecisions:
    """What each part is stored in when the artifact is ``precision``.

    An int8 head goes with every quantised body: it costs half of fp16 and little accuracy.

    Raises:
        RequestError: the name is unknown.
    """
    if precision not in PRECISIONS:
        raise RequestError(
            f"precision {precision!r:.40} is unknown; precisions are {', '.join(PRECISIONS)}"
        )
    head: PrecisionName = "fp16" if precision == "fp16" else "int8"
    tower: PrecisionName = "int8" if vision == "int8" else "fp16"
    return PartPrecisions(precision, head, tower, tower, "fp16")


def activation_bytes(target: Target) -> int:
    """Bytes of one activation: float32 on cpu, float16 on cuda."""
    return 4 if target == "cpu" else 2


def group_size(text: TextDims, precision: str, target: Target, int8_isa: Int8Isa = "vnni") -> int:
    """Weights that share a scale, one size for the whole body.

    int8 on a CPU with int8 instructions is per channel, because its fast kernel holds no group
    scales. Otherwise the largest of 128, 64, 32 that divides every input size, else per channel.
    """
    if precision == "int8" and target == "cpu" and int8_isa != "none":
        return PER_CHANNEL
    columns = {matrix.columns for matrix in decoder_matrices(text)}
    for size in _GROUPS:
        if all(count % size == 0 for count in columns):
            return size
    return PER_CHANNEL


def head_group_size(text: TextDims, precision: str, target: Target) -> int:
    """Weights of the int8 head that share a scale: the largest group that divides its inputs.

    Not more than a block of MatMulNBits has, whose scales are there anyway. One scale a row of the
    head costs a trained model a quarter to a third of what rounding all weights costs.
    """
    most = largest_block(precision, target)
    sizes = (size for size in _GROUPS if size <= most and text.hidden_size % size == 0)
    return next(sizes, PER_CHANNEL)


def int8_route(bits: int, group: int, target: Target, int8_isa: Int8Isa) -> Int8Route:
    """The fast operator of CPUs with int8 instructions, for the weights that it can hold."""
    if bits == 8 and group == PER_CHANNEL and target == "cpu" and int8_isa != "none":
        return "two-term"
    return "nbits"


def rounded_activations(precision: str, route: Int8Route | None, target: Target) -> str | None:
    """What is rounded to 8 bits beside the weights of the language model, for people.

    None where activations stay as they are: at fp16, and on a GPU.
    """
    if precision == "fp16" or target != "cpu":
        return None
    return {
        "two-term": "activations of the layers in two 8-bit codes each, one scale a row (close to "
        "float)",
        "integer": "activations in one 8-bit code each, one scale a row (coarse where a row has "
        "outliers)",
    }.get(route or "nbits", "activations in one 8-bit code each, one scale a block of columns")


def largest_block(precision: str, target: Target) -> int:
    """Most columns of a block of MatMulNBits, head included, when the body is ``precision``."""
    return _INT8_BLOCK if precision == "int8" and target == "cpu" else max(_GROUPS)


def body_route(
    text: TextDims, precision: str, target: Target, int8_isa: Int8Isa
) -> Int8Route | None:
    """Operator of the body's linear layers at a precision; None at fp16."""
    if precision == "fp16":
        return None
    group = group_size(text, precision, target, int8_isa)
    return int8_route(_BITS[precision], group, target, int8_isa)


def matmul_block(columns: int, group: int, largest: int = max(_GROUPS)) -> int:
    """Columns in a block of MatMulNBits: the group, where there is one.

    One scale a row is repeated for blocks of the largest of 128, 64, 32, 16 that divides the row;
    where none does, for blocks of 16, the last one filled up. A block is no larger than
    ``largest``; the scale of a larger group is repeated.
    """
    if group != PER_CHANNEL:
        return min(group, largest)
    sizes = (size for size in _GROUPS if columns % size == 0)
    return min(next(sizes, _SMALLEST_BLOCK), largest)


@dataclass(frozen=True)
class WeightFormat:
    """Precision, group, target, instructions, block: everything a weight's size depends on."""

    precision: str
    group: int
    target: Target
    int8_isa: Int8Isa = "vnni"
    largest_block: int = max(_GROUPS)

    def file_bytes(self, matrix: Matrix) -> int:
        """Bytes of the matrices in the artifact: packed weights and scales."""
        return self._packed(matrix) + self._groups(matrix) * activation_bytes(self.target)

    def resident_bytes(self, matrix: Matrix) -> int:
        """Bytes the engine keeps once loaded.

        On the CPU the sum of each block is packed as well, four bytes, and by MatMulNBits its scale
        once more beside those of the file, which stay. Measured on blocks of 16 columns, where
        they are a third of the whole (``memory_fit --precision int4``).
        """
        if self.precision == "fp16":
            return matrix.parameters * activation_bytes(self.target)
        if self.target != "cpu":
            return self.file_bytes(matrix)
        route = int8_route(_BITS[self.precision], self.group, self.target, self.int8_isa)
        return self.file_bytes(matrix) + (8 if route == "nbits" else 4) * self._groups(matrix)

    def tensor_bytes(self, matrix: Matrix) -> tuple[int, int]:
        """Bytes of the weights, and of the scales, of one of the matrices in the artifact."""
        one = replace(matrix, count=1)
        return self._packed(one), self._groups(one) * activation_bytes(self.target)

    def _packed(self, matrix: Matrix) -> int:
        columns = matrix.columns
        if self._repeats_scales and self.group == PER_CHANNEL:
            block = self._block(columns)
            columns = -(-columns // block) * block
        return -(-matrix.rows * columns * matrix.count * _BITS[self.precision] // 8)

    def _groups(self, matrix: Matrix) -> int:
        if self.precision == "fp16":
            return 0
        group = matrix.columns if self.group == PER_CHANNEL else self.group
        if self._repeats_scales:
            group = self._block(matrix.columns)
        return matrix.rows * matrix.count * -(-matrix.columns // group)

    def _block(self, columns: int) -> int:
        return matmul_block(columns, self.group, self.largest_block)

    @property
    def _repeats_scales(self) -> bool:
        """Fewer scales than the blocks of the operator."""
        if self.precision == "fp16":
            return False
        bits = _BITS[self.precision]
        return int8_route(bits, self.group, self.target, self.int8_isa) == "nbits"


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of each part, either in files or resident."""

    decoder: int
    lm_head: int
    vision_tower: int
    projector: int
    embeddings: int

    @property
    def total(self) -> int:
        """All parts."""
        return self.decoder + self.lm_head + self.vision_tower + self.projector + self.embeddings


def weight_bytes(
    dims: ModelDims,
    precision: str,
    target: Target,
    int8_isa: Int8Isa = "vnni",
    *,
    resident: bool,
    vision: VisionFormat | None = None,
) -> WeightBytes:
    """Bytes of every part at a precision; ``vision`` is ``default_vision`` where left out.

    Resident embeddings are 0: rows are read from the file by position. Files hold the embedding
    table and, for all but LLaVA-1.5, the newline row.
    """
    vision = vision or default_vision(precision, target, int8_isa)
    parts = part_precisions(precision, vision.precision)
    text, tower = dims.text, dims.vision
    group = group_size(text, precision, target, int8_isa)
    block = largest_block(precision, target)
    body = WeightFormat(parts.language_model, group, target, int8_isa, block)
    # The head follows the body: the integer operator is for bodies that take it.
    head_isa = int8_isa if precision == "int8" else "none"
    head_group = head_group_size(text, precision, target)
    head = WeightFormat(parts.lm_head, head_group, target, head_isa, block)
    size = WeightFormat.resident_bytes if resident else WeightFormat.file_bytes
    float_bytes = activation_bytes(target) if resident else _FP16_BYTES
    # An int8 tower knows one operator, whatever lies beside it.
    codes = WeightFormat(vision.precision, PER_CHANNEL, target, "vnni")

    def saved(matrices: tuple[Matrix, ...]) -> int:
        """What codes take less than the floats that they stand for."""
        if vision.precision == "fp16":
            return 0
        return sum(m.parameters * float_bytes - size(codes, m) for m in matrices)

    # An int8 layer left in float is whole again; an island's weights are cast while it is loaded.
    widened = 4 - float_bytes if resident else 0
    if vision.precision == "int8":
        widened = float_bytes - 1
    newline = text.hidden_size if dims.takes_tiles else 0
    return WeightBytes(
        decoder=sum(size(body, matrix) for matrix in decoder_matrices(text))
        + decoder_vectors(text) * activation_bytes(target),
        lm_head=size(head, head_matrix(text)),
        vision_tower=vision_parameters(tower, tower.num_blocks_used) * float_bytes
        - saved(vision_matrices(dims))
        # Which part the layers left in float belong to does not matter to the sum.
        + vision.wide_weights * widened,
        projector=projector_parameters(dims) * float_bytes - saved(projector_matrices(dims)),
        embeddings=0 if resident else (text.vocab_size * text.hidden_size + newline) * _FP16_BYTES,
    )


def weight_tensors(dims: ModelDims, precision: str, vision: VisionFormat) -> list[tuple[int, int]]:
    """Bytes and number of equal tensors that weights for the cuda target lie in; no vectors.

    Queries, keys and values are one matrix there.
    """
    text, v = dims.text, dims.vision
    parts = part_precisions(precision, vision.precision)
    body = WeightFormat(parts.language_model, group_size(text, precision, "cuda"), "cuda")
    head = WeightFormat(parts.lm_head, head_group_size(text, precision, "cuda"), "cuda", "none")
    floats = WeightFormat("fp16", PER_CHANNEL, "cuda")
    layers, hidden, inner = text.num_hidden_layers, text.hidden_size, text.intermediate_size
    formats = [
        (body, Matrix(text.query_size + 2 * text.key_value_size, hidden, layers)),
        (body, Matrix(hidden, text.query_size, layers)),
        (body, Matrix(inner, hidden, 2 * layers)),
        (body, Matrix(hidden, inner, layers)),
        (head, head_matrix(text)),
        (floats, Matrix(3 * v.patch_size**2, v.hidden_size, 1)),
        (floats, Matrix(v.num_patches + 1, v.hidden_size, 1)),
    ]
    formats += [(floats, matrix) for matrix in (*vision_matrices(dims), *projector_matrices(dims))]
    return [
        (nbytes, matrix.count)
        for form, matrix in formats
        for nbytes in form.tensor_bytes(matrix)
        if nbytes
    ]


def head_matrix(text: TextDims) -> Matrix:
    """The head as a matrix."""
    return Matrix(text.vocab_size, text.hidden_size, 1)
