"""convert_checkpoint: open → check → export → write, in one straight line.

Everything that can be wrong with the request or the checkpoint is found before the output folder is
touched; whatever fails later leaves finished parts for the next run and nothing at the output.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from llava_edge.convert.card import write_card
from llava_edge.convert.chat_template import compile_chat_template
from llava_edge.convert.checkpoint import Checkpoint, open_checkpoint
from llava_edge.convert.disk import check_free_space
from llava_edge.convert.image_settings import read_image_processing
from llava_edge.convert.parts import EMBEDDINGS_FILE, TOKENIZER_FILE, PartBuilders, Report
from llava_edge.convert.reference import REFERENCE
from llava_edge.convert.request import ConvertRequest, TileSettings, choose_tiles
from llava_edge.convert.write_artifact import ArtifactWriter, refuse_existing
from llava_edge.profiles.hardware import HardwareProfile, load_profile
from llava_edge.runtime.manifest import (
    SCHEMA_VERSION,
    GraphSpec,
    ImageProcessing,
    Manifest,
    Precision,
    PromptFormat,
    Source,
    TokenIds,
)
from llava_edge.runtime.records import from_json, to_json

_TOOLS = ("llava-edge", "onnx-ir", "onnxruntime", "tokenizers", "torch", "transformers")
_TEXTS_BYTES = 64 << 20
"""Room for tokenizer, graphs without weights, rotary tables."""


@dataclass(frozen=True)
class Conversion:
    """A finished conversion."""

    folder: Path
    manifest: Manifest
    artifact_bytes: int


@dataclass(frozen=True)
class _Job:
    """A request with everything that was read and decided before writing."""

    request: ConvertRequest
    profile: HardwareProfile
    checkpoint: Checkpoint
    tiles: TileSettings
    processing: ImageProcessing
    prompt: PromptFormat | None
    digest: str


def convert_checkpoint(request: ConvertRequest, report: Report) -> Conversion:
    """Convert one checkpoint for one board.

    Args:
        request: what was asked.
        report: told about progress, stage by stage, in bytes.

    Raises:
        RequestError: the request cannot be met or the checkpoint cannot be kept faithfully.
        HubError: a hub id was given and the hub could not be reached.
        ExportError: writing failed; the same command resumes.
    """
    profile = load_profile(request.profile)
    checkpoint = _open(request)
    out = request.out or default_output(checkpoint, request, profile)
    refuse_existing(out, force=request.force)
    job = _prepare(request, profile, checkpoint, report)
    key = {
        "checkpoint": job.digest,
        "profile": profile.name,
        "flavour": profile.flavour,
        "precision": request.precision,
        "tiles": to_json(job.tiles),
        "template": request.use_template,
        "tool": version("llava-edge"),
    }
    needed = _needed_bytes(checkpoint)
    with ArtifactWriter(out, key, force=request.force, needed_bytes=needed) as writer:
        check_free_space(writer.folder, max(0, needed - writer.finished_bytes))
        build = PartBuilders(checkpoint, profile.flavour, job.tiles.context_tokens, report)
        vision = from_json(GraphSpec, writer.part("vision", build.vision))
        decoder = from_json(GraphSpec, writer.part("decoder", build.decoder))
        writer.part("embeddings", build.embeddings)
        tokens = from_json(TokenIds, writer.part("tokenizer", build.tokenizer))
        manifest = _manifest(job, tokens, vision, decoder)
        size = sum(path.stat().st_size for path in writer.folder.rglob("*") if path.is_file())
        folder = writer.finish(manifest, write_card(manifest, size))
    return Conversion(folder, manifest, size)


def default_output(
    checkpoint: Checkpoint, request: ConvertRequest, profile: HardwareProfile
) -> Path:
    """``artifacts/<variant>-<precision>-<profile>``."""
    return Path("artifacts") / f"{variant_name(checkpoint)}-{request.precision}-{profile.name}"


def variant_name(checkpoint: Checkpoint) -> str:
    """The last part of the source's id, without a trailing ``-hf``, safe as a file name."""
    name = checkpoint.source_id.rstrip("/").split("/")[-1].removesuffix("-hf")
    return re.sub(r"[^A-Za-z0-9._-]", "-", name) or "checkpoint"


def _open(request: ConvertRequest) -> Checkpoint:
    folder = Path(request.checkpoint)
    if folder.exists():
        return open_checkpoint(folder)
    # Loaded only when a hub is meant: a folder works without the hub's client.
    from llava_edge.convert.hub import fetch_checkpoint

    return open_checkpoint(fetch_checkpoint(request.checkpoint, request.revision))


def _prepare(
    request: ConvertRequest, profile: HardwareProfile, checkpoint: Checkpoint, report: Report
) -> _Job:
    dims = checkpoint.dims
    tiles = choose_tiles(request, dims, checkpoint.layout)
    processing = read_image_processing(
        checkpoint.preprocessor_config(), dims, tiles.pinpoints, tiles.reference
    )
    prompt = None
    if request.use_template:
        prompt = compile_chat_template(
            checkpoint.folder, checkpoint.config, source_id=checkpoint.source_id
        )
    digest = checkpoint.digest(lambda done, total: report("digest", done, total))
    return _Job(request, profile, checkpoint, tiles, processing, prompt, digest)


def _needed_bytes(checkpoint: Checkpoint) -> int:
    """Upper bound of the artifact: every weight as fp16, and texts."""
    shapes: Mapping[str, Any] = checkpoint.tensors
    return _TEXTS_BYTES + sum(2 * int(np.prod(ref.shape)) for ref in shapes.values())


def _manifest(job: _Job, tokens: TokenIds, vision: GraphSpec, decoder: GraphSpec) -> Manifest:
    checkpoint, tiles, flavour = job.checkpoint, job.tiles, job.profile.flavour
    variant = variant_name(checkpoint)
    plan = {
        "profile": job.profile.name,
        "variant": variant,
        "precision": job.request.precision,
        "grid": tiles.grid,
        "max_tiles": tiles.max_tiles,
        "max_image_tokens": tiles.max_image_tokens,
        "context_tokens": tiles.context_tokens,
        "engine": "ort",
    }
    precision = Precision(
        language_model=job.request.precision,
        lm_head="fp16",
        vision_tower="fp16",
        embeddings="fp16",
        computes="float32" if flavour == "cpu" else "float16",
    )
    return Manifest(
        schema_version=SCHEMA_VERSION,
        variant=variant,
        flavour=flavour,
        precision=precision,
        plan=plan,
        model=checkpoint.dims,
        image_processing=job.processing,
        tokens=tokens,
        prompt=job.prompt,
        vision=vision,
        decoder=decoder,
        embeddings=EMBEDDINGS_FILE,
        tokenizer=TOKENIZER_FILE,
        context_tokens=tiles.context_tokens,
        source=Source(checkpoint.source_id, checkpoint.revision, job.digest, checkpoint.layout),
        reference=REFERENCE,
        tools={name: version(name) for name in _TOOLS},
        conversion={"is_trained_grid": tiles.is_trained},
        files={},
    )
