"""Checkpoints and artifacts that tests share: made once, never changed."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from llava_edge.runtime.artifact.certificate import Certificate, Host, StageResult
from llava_edge.runtime.util.checksummed_json import seal
from llava_edge.runtime.verification.golden.probes import GOLDEN_FILE, GoldenProbe, golden_bytes
from tests.support.conversion_cache import ROOT, ConversionCache

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has a core: threads of one would spin while they wait for those of the other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Libraries and thousands of tests stay until the end; looking through them for garbage again and
# again takes a fifth of the time of what builds models (see ``pytest_collection_finish``).
gc.disable()

ArtifactMaker = Callable[..., Path]
CheckpointMaker = Callable[..., Path]


def pytest_collection_finish() -> None:
    """From here on garbage is collected, among what tests make."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> CheckpointMaker:
    """``make_checkpoint(preset, **changes)``: a random checkpoint folder, written once."""
    from llava_edge.convert.testing.random_checkpoint import write_random_checkpoint
    from llava_edge.convert.testing.random_spec import preset

    made: dict[str, Path] = {}

    def make(name: str = "tiny", **changes: object) -> Path:
        key = repr((name, sorted(changes.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("checkpoint") / name
            write_random_checkpoint(folder, preset(name, **changes), seed=1)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def conversion_cache() -> ConversionCache:
    """Artifacts of the sources as they are, shared with other processes and later runs."""
    return ConversionCache(ROOT / "build" / "test-cache")


@pytest.fixture(scope="module", autouse=True)
def shared_artifacts_are_not_changed(conversion_cache: ConversionCache) -> Iterator[None]:
    """A test that changes an artifact copies it first: others use it as well."""
    yield
    assert conversion_cache.changed() == []


@pytest.fixture(scope="session")
def make_artifact(conversion_cache: ConversionCache) -> ArtifactMaker:
    """``make_artifact(checkpoint, profile=…, **wishes)``: an artifact of it, converted once.

    Never change it: copy it first.
    """
    from llava_edge.convert.planning.request import ConvertRequest
    from llava_edge.profiles.boards.hardware import load_profile
    from llava_edge.profiles.plan_request import PlanRequest

    made: dict[str, Path] = {}

    def make(checkpoint: Path, **changes: object) -> Path:
        key = repr((checkpoint, sorted(changes.items())))
        if key not in made:
            profile = load_profile(str(changes.get("profile", "cpu-16gb")))
            own = ("profile", "verify")
            wishes = {name: value for name, value in changes.items() if name not in own}
            request = ConvertRequest(
                checkpoint=str(checkpoint),
                profile=profile,
                wishes=PlanRequest(**{"precision": "fp16", **wishes}),  # type: ignore[arg-type]
                verify=changes.get("verify", "none"),  # type: ignore[arg-type]
            )
            made[key] = conversion_cache.convert(request)
        return made[key]

    return make


@pytest.fixture
def picture() -> Image.Image:
    """A 3:2 picture with edges and colours, so that every tile differs."""
    image = Image.new("RGB", (600, 400), "white")
    pen = ImageDraw.Draw(image)
    pen.rectangle((40, 60, 220, 240), fill="royalblue")
    pen.ellipse((260, 120, 460, 320), fill="tomato")
    pen.polygon([(480, 340), (580, 340), (530, 220)], fill="seagreen")
    return image


@pytest.fixture(scope="session")
def make_certificate() -> Callable[..., Certificate]:
    """``make_certificate(**changes)``: a certificate of this machine that says passed."""
    from llava_edge.runtime.verification.host import describe_host

    def make(host: dict[str, str] | None = None, **changes: Any) -> Certificate:
        here = describe_host("cpu")
        values: dict[str, Any] = {
            "schema_version": 1,
            "passed": True,
            "verdict": "pass",
            "mode": "quick",
            "issued": "2026-11-24T10:00:00+00:00",
            "target": "cpu",
            "host": Host(**{**here.__dict__, **(host or {})}),
            "reference": "transformers 5.23.0",
            "tools": {"llava-edge": "0.1.0"},
            "stages": (StageResult("prompt", "differing", 0.0, 0.0, "pass"),),
        }
        return Certificate(**{**values, **changes})

    return make


@pytest.fixture(scope="session")
def reference_probes() -> Callable[..., tuple[GoldenProbe, ...]]:
    """``reference_probes(checkpoint, manifest)``: two prompts, by transformers in float32."""

    def make(checkpoint: Path, manifest: Any, steps: int = 40) -> tuple[GoldenProbe, ...]:
        import torch

        from llava_edge.convert.verification.reference.model import ReferenceModel

        reference = ReferenceModel(checkpoint)
        side = manifest.image_processing.tile_size
        random = np.random.default_rng(7)
        probes = []
        for index, size in enumerate([(side, 2 * side), (side + 9, side)]):
            image = random.integers(0, 256, (*size, 3), np.uint8)
            prompt = f"What is number {index}?"
            inputs = reference.prepare(reference.render(prompt, 1), [Image.fromarray(image)])
            forced = random.integers(3, 300, steps)
            logits = reference.logits(inputs, forced.tolist())[-1 - steps :]
            inner = reference.model.model
            pixels = inputs["pixel_values"].flatten(0, 1)
            layer = reference.model.config.vision_feature_layer
            with torch.no_grad():
                states = inner.vision_tower(pixels, output_hidden_states=True).hidden_states
                features = inner.multi_modal_projector(states[layer][:, 1:]).flatten(0, 1)
            rows = np.sort(random.choice(len(features), 6, replace=False))
            kept = np.sort(random.choice(manifest.model.text.vocab_size, 32, replace=False))
            best = logits.topk(2)
            probes.append(
                GoldenProbe(
                    name=f"picture {index}",
                    prompt=prompt,
                    images=(image,),
                    ids=inputs["input_ids"][0].numpy(),
                    pixel_sha256=hashlib.sha256(pixels.numpy().tobytes()).hexdigest(),
                    feature_rows=rows,
                    features=features[rows].numpy(),
                    forced=forced,
                    logit_ids=kept,
                    logits=logits[:, kept].numpy(),
                    top_ids=best.indices.numpy(),
                    top_logits=best.values.numpy(),
                    ranges=(logits.amax(1) - logits.amin(1)).numpy(),
                )
            )
        return tuple(probes)

    return make


@pytest.fixture(scope="session")
def with_golden() -> Callable[..., Path]:
    """``with_golden(artifact, out, probes, manifest)``: a copy that carries golden probes."""

    def copy(artifact: Path, out: Path, probes: tuple[GoldenProbe, ...], manifest: Any) -> Path:
        shutil.copytree(artifact, out)
        (out / "certificate.json").unlink(missing_ok=True)
        data = golden_bytes(probes, manifest)
        (out / GOLDEN_FILE).write_bytes(data)
        document = json.loads((out / "manifest.json").read_text())
        entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        document["files"][GOLDEN_FILE] = entry
        (out / "manifest.json").write_bytes(seal(document))
        return out

    return copy
