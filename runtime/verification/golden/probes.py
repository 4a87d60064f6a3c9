"""GoldenProbe: what the reference said about a few prompts, kept in the artifact.

With it a board without torch compares its own numbers with the reference's. The file is in the
safetensors format: plain arrays behind a JSON header, so that reading it runs no code. The tensors
of probe 3 are named ``3.ids``, ``3.features`` …; its texts stand in ``__metadata__``, whose values
the format wants to be strings, so all of them are one JSON text there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llava_edge.profiles.errors import ArtifactError, ExportError, ImageError
from llava_edge.profiles.memory.buffers import video_tokens_per_frame
from llava_edge.runtime.artifact.manifest import Manifest
from llava_edge.runtime.processing.images.image_processor import ImageProcessor
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.util.checksummed_json import parse_strict
from llava_edge.runtime.util.opened_file import OpenedFile
from llava_edge.runtime.verification.golden.media import (
    MEDIA_LIMIT,
    GoldenMedia,
    media_of,
    media_tensors,
    media_text,
)

GOLDEN_FILE = "golden.safetensors"
GOLDEN_LIMIT = 4 << 20
"""Largest file in bytes that is written or read."""
MAX_PROBES = 32

_FORMAT = "llava-edge golden 2"
_READABLE = ("llava-edge golden 1", _FORMAT)
"""The first had probes alone, no files."""
LOOP_LIMIT = 64 << 10
"""Largest text in bytes of what is kept about the loop."""
_HEADER_LIMIT = 256 << 10
_MOST_RANGE = 64.0
"""Times the spread of the logits that are kept; a sample of the vocabulary holds less."""
_AGAIN = "Copy or convert the artifact again."
_DIGEST = re.compile(r"[0-9a-f]{64}")
_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "I64": np.dtype("<i8"),
    "U8": np.dtype("u1"),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_TENSORS = {
    "ids": ("I64", 1),
    "feature_rows": ("I64", 1),
    "features": ("F32", 2),
    "forced": ("I64", 1),
    "logit_ids": ("I64", 1),
    "logits": ("F32", 2),
    "top_ids": ("I64", 2),
    "top_logits": ("F32", 2),
    "ranges": ("F32", 1),
}
"""Type and number of axes of every tensor of a probe but its images."""


@dataclass(frozen=True, eq=False)
class GoldenProbe:
    """One prompt and what the reference makes of it.

    The reference is torch with the artifact's own quantised weights.

    Attributes:
        name: what reports call it.
        prompt: the question, for the artifact's own template, images first, then the video.
        images: uint8 (H, W, 3) each.
        ids: int64 (num_tokens,), the prompt with each image expanded to its ids.
        pixel_sha256: of the float32 little-endian bytes of all tiles, in order, then all frames.
        feature_rows: int64 (n,), rows of the features matrix: all tiles' patches, one tile behind
            the other, then the tokens of all frames.
        features: float32 (n, hidden), these rows.
        forced: int64 (steps,), tokens taken as the answer.
        logit_ids: int64 (k,), ids whose logits are kept.
        logits: float32 (1 + steps, k), behind the prompt and behind each forced token.
        top_ids: int64 (1 + steps, 2), the best two ids.
        top_logits: float32 (1 + steps, 2), their logits.
        ranges: float32 (1 + steps,), largest minus smallest logit.
        video: uint8 (frames, H, W, 3), all of which are looked at; None without a video.
    """

    name: str
    prompt: str
    images: tuple[Array, ...]
    ids: Array
    pixel_sha256: str
    feature_rows: Array
    features: Array
    forced: Array
    logit_ids: Array
    logits: Array
    top_ids: Array
    top_logits: Array
    ranges: Array
    video: Array | None = None


def golden_bytes(
    probes: Sequence[GoldenProbe],
    manifest: Manifest,
    loop: Any | None = None,
    media: GoldenMedia | None = None,
) -> bytes:
    """The file's contents.

    Args:
        probes: what the reference said.
        manifest: of the artifact that they are for; ``files`` is not looked at.
        loop: a JSON value about the loop, of at most ``LOOP_LIMIT`` bytes; None for none. The
            reader judges it.
        media: picture and video files; None for none.

    Raises:
        ExportError: a probe does not fit the model, is not finite, or all are too large.
    """
    texts = [
        {
            "name": probe.name,
            "prompt": probe.prompt,
            "pixel_sha256": probe.pixel_sha256,
            "images": len(probe.images),
            **({} if probe.video is None else {"videos": 1}),
        }
        for probe in probes
    ]
    metadata = {"format": _FORMAT, "probes": json.dumps(texts, ensure_ascii=True)}
    if loop is not None:
        metadata["loop"] = json.dumps(loop, ensure_ascii=True, sort_keys=True, allow_nan=False)
    arrays = _tensors(probes)
    if media is not None:
        metadata["media"] = json.dumps(media_text(media), ensure_ascii=True)
        arrays |= media_tensors(media)
    header: dict[str, Any] = {"__metadata__": metadata}
    parts: list[bytes] = []
    offset = 0
    for name, array in sorted(arrays.items(), key=_widest_first):
        data = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": _CODES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + len(data)],
        }
        parts.append(data)
        offset += len(data)
    text = json.dumps(header).encode("ascii")
    # Readers that map the file want the data on a border of eight bytes.
    text += b" " * (-len(text) % 8)
    data = len(text).to_bytes(8, "little") + text + b"".join(parts)
    try:
        parse_golden(data, manifest, GOLDEN_FILE)
    except ArtifactError as error:
        raise ExportError(f"the golden probes cannot be written: {error}") from error
    return data


def read_golden(opened: OpenedFile, manifest: Manifest) -> tuple[GoldenProbe, ...]:
    """Read and check the probes of an artifact.

    Raises:
        ArtifactError: the file is damaged, too large, or does not fit the model.
    """
    return parse_golden(opened.read(GOLDEN_LIMIT), manifest, str(opened.path))


def read_golden_loop(opened: OpenedFile) -> Any | None:
    """The JSON value about the loop that ``golden_bytes`` was given; None where there is none.

    Raises:
        ArtifactError: the file is damaged or too large. What the value means is not judged.
    """
    try:
        texts = _split(opened.read(GOLDEN_LIMIT))[1]
    except (_MalformedError, ArtifactError) as error:
        raise ArtifactError(f"{opened.path} holds no golden probes: {error}. {_AGAIN}") from error
    return texts.loop


def read_golden_media(opened: OpenedFile, manifest: Manifest) -> GoldenMedia:
    """Picture and video files of an artifact, checked; none in files of the first format.

    Raises:
        ArtifactError: as ``read_golden``.
    """
    return _parse(opened.read(GOLDEN_LIMIT), manifest, str(opened.path))[1]


def parse_golden(data: bytes, manifest: Manifest, where: str) -> tuple[GoldenProbe, ...]:
    """As ``read_golden``, from bytes; ``where`` names them in messages."""
    return _parse(data, manifest, where)[0]


def _parse(
    data: bytes, manifest: Manifest, where: str
) -> tuple[tuple[GoldenProbe, ...], GoldenMedia]:
    try:
        arrays, texts = _split(data)
        probes = tuple(_probe(index, text, arrays) for index, text in enumerate(texts.probes))
        media = GoldenMedia()
        if texts.media is not None:
            media = media_of(
                texts.media, lambda name, code, axes: _take(arrays, name, code, axes), manifest
            )
        if arrays:
            raise _MalformedError(
                f"it holds tensors of no probe: {', '.join(sorted(arrays)[:5])!r:.200}"
            )
        for probe in probes:
            for fault in _faults(probe, manifest):
                raise _MalformedError(f"probe {probe.name}: {fault}")
    except (_MalformedError, ArtifactError) as error:
        raise ArtifactError(f"{where} holds no golden probes: {error}. {_AGAIN}") from error
    return probes, media


@dataclass(frozen=True)
class _Texts:
    """JSON values beside the tensors."""

    probes: list[Any]
    loop: Any | None = None
    media: Any | None = None


class _MalformedError(Exception):
    """Something about the file."""


def _tensors(probes: Sequence[GoldenProbe]) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for index, probe in enumerate(probes):
        for name, (code, _) in _TENSORS.items():
            found[f"{index}.{name}"] = np.asarray(getattr(probe, name)).astype(_DTYPES[code])
        media = {f"images.{number}": image for number, image in enumerate(probe.images)}
        if probe.video is not None:
            media["video"] = probe.video
        for name, pixels in media.items():
            if pixels.dtype != np.uint8:
                raise ExportError(f"{name} of probe {probe.name} is {pixels.dtype}, not uint8")
            found[f"{index}.{name}"] = pixels
    return found


def _widest_first(item: tuple[str, Array]) -> tuple[int, str]:
    return -item[1].dtype.itemsize, item[0]


def _split(data: bytes) -> tuple[dict[str, Array], _Texts]:
    """Tensors by name, views into ``data``, and the texts."""
    length = int.from_bytes(data[:8], "little")
    if len(data) > GOLDEN_LIMIT:
        raise _MalformedError(f"it has {len(data)} bytes; at most {GOLDEN_LIMIT} are allowed")
    if len(data) < 8 or length > min(_HEADER_LIMIT, len(data) - 8):
        raise _MalformedError(f"it has no safetensors header of at most {_HEADER_LIMIT} bytes")
    header = parse_strict(data[8 : 8 + length], "its header")
    if not isinstance(header, dict):
        raise _MalformedError("its header is no object")
    texts = _texts(header.pop("__metadata__", None))
    arrays: dict[str, Array] = {}
    spans: list[tuple[int, int]] = []
    body = memoryview(data)[8 + length :]
    for name, entry in header.items():
        match entry:
            case {"dtype": str(code), "shape": [*shape], "data_offsets": [start, end]} if (
                code in _DTYPES and all(_is_size(size) for size in (*shape, start, end))
            ):
                # Python integers: a product of shapes must not wrap round.
                count = 1
                for size in shape:
                    count *= size
                if end - start != count * _DTYPES[code].itemsize or end > len(body):
                    raise _MalformedError(f"{name!r:.80} does not lie where its shape says")
                array = np.frombuffer(body[start:end], _DTYPES[code]).reshape(shape)
                arrays[name] = array
                spans.append((start, end))
            case _:
                raise _MalformedError(f"{name!r:.80} is {entry!r:.160}")
    # Tensors side by side, no byte twice and none between them: nothing can hide in the file.
    covered = 0
    for start, end in sorted(spans):
        if start != covered:
            raise _MalformedError(f"its tensors overlap or leave a gap at byte {covered}")
        covered = end
    if covered != len(body):
        raise _MalformedError(f"{len(body) - covered} bytes belong to no tensor")
    return arrays, texts


def _texts(metadata: Any) -> _Texts:
    match metadata:
        case {"format": str(form), "probes": str(text), **rest} if all(
            isinstance(value, str) for value in rest.values()
        ):
            if form not in _READABLE:
                raise _MalformedError(
                    f"its format is {form!r:.60}; {' and '.join(map(repr, _READABLE))} are read"
                )
            if rest.keys() <= ({"loop", "media"} if form == _FORMAT else set()):
                probes = parse_strict(text.encode(), "its list of probes")
                if not isinstance(probes, list) or not 1 <= len(probes) <= MAX_PROBES:
                    raise _MalformedError(f"it must list 1 to {MAX_PROBES} probes")
                return _Texts(
                    probes,
                    _bounded(rest.get("loop"), LOOP_LIMIT, "its part about the loop"),
                    _bounded(rest.get("media"), MEDIA_LIMIT, "its part about files"),
                )
    raise _MalformedError("its __metadata__ does not say what it is")


def _bounded(text: Any, limit: int, what: str) -> Any | None:
    if text is None:
        return None
    if len(text) > limit:
        raise _MalformedError(f"{what} has {len(text)} characters; at most {limit} are read")
    return parse_strict(text.encode(), what)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= GOLDEN_LIMIT


def _probe(index: int, text: Any, arrays: dict[str, Array]) -> GoldenProbe:
    """Take one probe's tensors out of ``arrays``."""
    match text:
        case {
            "name": str(name),
            "prompt": str(prompt),
            "pixel_sha256": str(digest),
            "images": int(count),
            **rest,
        } if _is_size(count) and rest in ({}, {"videos": 1}):
            pass
        case _:
            raise _MalformedError(f"the texts of probe {index} are {text!r:.160}")
    if not (name.isprintable() and 0 < len(name) <= 80) or not _DIGEST.fullmatch(digest):
        raise _MalformedError(f"probe {index} has an impossible name or digest")
    found = {
        field: _take(arrays, f"{index}.{field}", code, axes)
        for field, (code, axes) in _TENSORS.items()
    }
    images = tuple(_take(arrays, f"{index}.images.{number}", "U8", 3) for number in range(count))
    video = _take(arrays, f"{index}.video", "U8", 4) if rest else None
    return GoldenProbe(
        name=name, prompt=prompt, pixel_sha256=digest, images=images, video=video, **found
    )


def _take(arrays: dict[str, Array], name: str, code: str, axes: int) -> Array:
    array = arrays.pop(name, None)
    if array is None:
        raise _MalformedError(f"{name} is missing")
    if array.dtype != _DTYPES[code] or array.ndim != axes:
        raise _MalformedError(
            f"{name} is {array.dtype} {list(array.shape)}, not {code} of {axes} axes"
        )
    if code == "F32" and not np.isfinite(array).all():
        raise _MalformedError(f"{name} holds a value that is not finite")
    return array


def _faults(probe: GoldenProbe, manifest: Manifest) -> list[str]:
    """What of a probe cannot be of this model."""
    text, vision = manifest.model.text, manifest.model.vision
    vocab, steps = text.vocab_size, len(probe.forced)
    rows = 0
    processor = ImageProcessor(manifest.image_processing)
    for image in probe.images:
        height, width, channels = image.shape
        if channels != 3 or not height or not width:
            return [f"an image is {list(image.shape)}, not (height, width, 3)"]
        try:
            rows += processor.anyres.layout(height, width).num_tiles * vision.num_patches
        except ImageError as error:
            return [f"an image of {height}x{width} is refused: {error}"]
    if probe.video is not None:
        frames, height, width, channels = probe.video.shape
        most = 0 if manifest.video_processing is None else manifest.video_processing.max_frames
        if channels != 3 or not height or not width or not 0 < frames <= most:
            return [
                f"its video is {list(probe.video.shape)}, not 1 to {most} frames (height, width, 3)"
            ]
        rows += frames * video_tokens_per_frame(vision)
    marks = {manifest.tokens.image, manifest.tokens.video} - {None}
    known = [id for id in probe.ids.tolist() if id not in marks]
    shapes = {
        "features": (len(probe.feature_rows), text.hidden_size),
        "logits": (1 + steps, len(probe.logit_ids)),
        "top_ids": (1 + steps, 2),
        "top_logits": (1 + steps, 2),
        "ranges": (1 + steps,),
    }
    faults = [
        f"{name} is {list(getattr(probe, name).shape)}, not {list(shape)}"
        for name, shape in shapes.items()
        if getattr(probe, name).shape != shape
    ]
    if not 0 < len(probe.ids) <= manifest.context_tokens - max(1, steps):
        faults.append(
            f"{len(probe.ids)} tokens and {steps} forced ones do not fit the context of "
            f"{manifest.context_tokens}"
        )
    if not _within(np.array(known, np.int64), vocab):
        faults.append("ids holds a token that has no embedding")
    for name in ("forced", "logit_ids", "top_ids"):
        if not _within(getattr(probe, name), vocab):
            faults.append(f"{name} holds an id outside 0 to {vocab - 1}")
    if not _within(probe.feature_rows, rows):
        faults.append(f"feature_rows holds a row outside the {rows} of its images")
    if bool(rows) != bool(len(probe.feature_rows)):
        faults.append(f"{len(probe.feature_rows)} features are kept of {len(probe.images)} images")
    if not len(probe.logit_ids):
        faults.append("no logits are kept")
    if (probe.ranges <= 0).any():
        faults.append("a range of logits is not above zero")
    if not faults and (probe.top_logits[:, 0] < probe.top_logits[:, 1]).any():
        faults.append("top_logits does not hold the best first")
    if not faults:
        # Gaps are shares of the range: a made-up one would let any logits pass.
        spread = np.ptp(np.concatenate([probe.logits, probe.top_logits], axis=1), axis=1)
        if (probe.ranges < 0.999 * spread).any() or (probe.ranges > _MOST_RANGE * spread).any():
            faults.append("a range of logits does not go with the logits that are kept")
    return faults


def _within(values: Array, stop: int) -> bool:
    return not values.size or (int(values.min()) >= 0 and int(values.max()) < stop)
