"""FaultModels: small checkpoints and their artifacts, written once and shared by all faults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from llava_edge.convert.checkpoint.open import Checkpoint, open_checkpoint
from llava_edge.convert.pipeline import convert_checkpoint
from llava_edge.convert.planning.request import ConvertRequest
from llava_edge.convert.quantization.plan import QuantizationRequest
from llava_edge.convert.testing.random_checkpoint import write_random_checkpoint
from llava_edge.convert.testing.random_spec import preset
from llava_edge.convert.verification.reference.answer import Reference
from llava_edge.convert.verification.reference.probes import draw_probes
from llava_edge.convert.verification.verifier import VerifyOptions, open_reference, verify_artifact
from llava_edge.profiles.boards.hardware import load_profile
from llava_edge.profiles.plan_request import PlanRequest
from llava_edge.runtime.artifact.certificate import Certificate, Mode
from llava_edge.runtime.artifact.open import open_artifact
from llava_edge.runtime.processing.images.image_processor import ImageProcessor
from llava_edge.runtime.util.progress import no_progress
from tests.faults.fault import Fault
from tests.faults.models.checkpoint_changes import CHANGES
from tests.faults.models.tamper import Tampered
from tests.faults.models.tokenizer_checkpoints import ROWS, TOKENIZERS
from tests.support.conversion_cache import ConversionCache


@dataclass(frozen=True)
class Model:
    """What a checkpoint is made of, and the form of its artifact."""

    backbone: str = "qwen2"
    preset: str = "odd"
    precision: str = "fp16"
    board: str = "cpu-16gb"
    int8_isa: str | None = None
    context_tokens: int = 1024
    grid: str | None = None
    seed: int = 1
    changes: Mapping[str, Any] = field(default_factory=dict)
    vision: Literal["fp16", "int8"] | None = None
    """Precision of the tower; None for what the plan takes."""
    cache: Literal["int8"] | None = None
    """``int8`` for a second decoder graph with such a cache."""
    quantizer: Literal["gptq", "rtn"] = "rtn"
    samples: int = 4
    """For the solver, and for an int8 tower."""
    alters: str = ""
    """Key of ``checkpoint_changes.CHANGES``: what is done to the checkpoint afterwards."""


_VIDEO: Mapping[str, Any] = {"model_type": "llava_next_video", "image_size": 56}

MODELS: Mapping[str, Model] = {
    "qwen2": Model(),
    "llama": Model("llama"),
    "mistral": Model("mistral"),
    "long": Model("llama", changes={"rope_factor": 4.0, "max_positions": 4096}),
    "int8": Model("mistral", precision="int8", changes={"layers": 2}),
    "int8 saturating": Model(
        "mistral", precision="int4", vision="int8", changes={"layers": 2}, alters="loud"
    ),
    "int8, float tower": Model("mistral", precision="int8", vision="fp16", changes={"layers": 2}),
    "int4": Model("mistral", precision="int4", changes={"layers": 2}),
    "int4 cuda": Model("mistral", precision="int4", board="a100", changes={"layers": 2}),
    "int4 gptq": Model(
        "mistral", precision="int4", vision="fp16", changes={"layers": 2}, quantizer="gptq"
    ),
    "int8 gptq": Model(
        "mistral", precision="int8", vision="fp16", changes={"layers": 2}, quantizer="gptq"
    ),
    "gptq": Model("mistral", precision="int4", changes={"layers": 2}, alters="act-order"),
    "system": Model("llama", alters="system turn"),
    "two stops": Model("mistral", precision="int8", changes={"layers": 2}, alters="two stops"),
    "int8 cache": Model("llama", cache="int8", alters="quiet values"),
    "int8 cache cuda": Model("llama", cache="int8", alters="quiet values", board="a100"),
    "video": Model("llama", changes=_VIDEO),
    **{
        f"video {precision}": Model("llama", precision=precision, changes={**_VIDEO, "layers": 2})
        for precision in ("int8", "int4")
    },
    **{
        name: Model("llama", changes={"layers": 1, "vocab_size": ROWS}, alters=f"tokenizer {name}")
        for name in TOKENIZERS
    },
}
"""What faults are planted in: every bias, gain, class and position embedding is random."""


class FaultModels:
    """Writes what is asked for, below a folder, and keeps it.

    Args:
        folder: an empty one.
        models: by name.
        cache: of sound conversions; None to convert here.
    """

    def __init__(
        self,
        folder: Path,
        models: Mapping[str, Model] = MODELS,
        cache: ConversionCache | None = None,
    ) -> None:
        self.folder = folder
        self.models = models
        self.cache = cache
        self._made: dict[str, Made] = {}
        self._count = 0

    def __getitem__(self, name: str) -> Made:
        if name not in self._made:
            self._made[name] = Made(self.folder / name, self.models[name], self.cache)
        return self._made[name]

    def examine(self, fault: Fault) -> Certificate:
        """Plant a fault and verify what comes of it."""
        made = self[fault.model]
        self._count += 1
        fresh = self.folder / f"{self._count}-{fault.id}"
        # Made before anything is patched: what others use as well is nobody's fault.
        _ = made.checkpoint if fault.where == "conversion" else made.artifact
        reference = made.reference(fault.mode) if made.model.precision == "fp16" else None
        with pytest.MonkeyPatch.context() as patch:
            artifact = fresh
            if fault.where == "conversion":
                fault.plant(patch)
                made.convert(fresh)
                patch.undo()
            elif fault.where == "artifact":
                copy = Tampered(made.artifact, fresh)
                fault.plant(copy)
                copy.seal()
            else:
                artifact = made.artifact
                fault.plant(patch)
            return made.verify(artifact, fault.mode, reference)


class Made:
    """One checkpoint, and its artifact once it is asked for."""

    def __init__(self, folder: Path, model: Model, cache: ConversionCache | None = None) -> None:
        self.folder = folder
        self.model = model
        self.cache = cache
        self._references: dict[Mode, Reference] = {}

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """Written and opened."""
        folder = self.folder / "checkpoint"
        spec = preset(self.model.preset, backbone=self.model.backbone, **self.model.changes)
        write_random_checkpoint(folder, spec, self.model.seed)
        if self.model.alters:
            folder = CHANGES[self.model.alters](folder)
        return open_checkpoint(folder)

    @cached_property
    def artifact(self) -> Path:
        """A sound conversion."""
        if self.cache is None:
            return self.convert(self.folder / "artifact")
        return self.cache.convert(self._request())

    def convert(self, out: Path) -> Path:
        """Convert without verifying: that is done apart."""
        request = replace(self._request(), out=out)
        return convert_checkpoint(request, no_progress, lambda _: None).folder

    def _request(self) -> ConvertRequest:
        model = self.model
        profile = load_profile(model.board)
        if model.int8_isa is not None:
            profile = replace(profile, int8_isa=model.int8_isa)
        return ConvertRequest(
            checkpoint=str(self.checkpoint.folder),
            profile=profile,
            wishes=PlanRequest(
                precision=model.precision,
                vision_precision=model.vision,
                context_tokens=model.context_tokens,
                grid=model.grid,
                cache=model.cache,
            ),
            quantization=QuantizationRequest(model.quantizer, num_samples=model.samples),
            verify="none",
        )

    def reference(self, mode: Mode) -> Reference:
        """The reference, its answers to a mode's probes remembered."""
        if mode not in self._references:
            artifact = open_artifact(self.artifact, verify_digests=False)
            reference = open_reference(artifact, self.checkpoint)
            anyres = ImageProcessor(artifact.manifest.image_processing).anyres
            video = artifact.manifest.video_processing
            frames = 0 if video is None else video.max_frames
            for probe in draw_probes(anyres, mode, 4096, frames):
                reference.answer(probe, remember=True)
            assert reference.media.golden.files
            self._references[mode] = reference
        return self._references[mode]

    def verify(
        self, artifact: Path, mode: Mode = "quick", reference: Reference | None = None
    ) -> Certificate:
        """Verify an artifact of this checkpoint, all layers of the decoder at once."""
        opened = open_artifact(artifact, verify_digests=False)
        options = VerifyOptions(mode, threads=1)
        threads = torch.get_num_threads()
        # Tests run side by side: threads of one would wait for those of the other.
        torch.set_num_threads(1)
        try:
            return verify_artifact(opened, self.checkpoint, options, no_progress, reference)
        finally:
            torch.set_num_threads(threads)
