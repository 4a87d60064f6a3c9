"""Artifact facts: what a row of the bench says of an artifact before anything is run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_edge.profiles.models.parameters import total_parameters
from llava_edge.runtime.artifact.certificate import Certificate
from llava_edge.runtime.artifact.manifest import Manifest
from llava_edge.runtime.artifact.open import Artifact


def short_names(folders: Sequence[str]) -> dict[str, str]:
    """Of each path its last parts, as many as tell it from the others; all of it where none do."""
    parts = {folder: Path(os.path.abspath(folder)).parts for folder in folders}
    names = {}
    for folder, own in parts.items():
        others = [each for other, each in parts.items() if other != folder]
        names[folder] = next(
            (
                str(Path(*own[-count:]))
                for count in range(1, len(own) + 1)
                if not any(each[-count:] == own[-count:] for each in others)
            ),
            folder,
        )
    return names


def artifact_facts(folder: str, artifact: Artifact) -> dict[str, Any]:
    """What a row says of an artifact before anything is run."""
    manifest = artifact.manifest
    return {
        "artifact": folder,
        "variant": manifest.variant,
        "precision": precision_label(manifest),
        "vision_precision": manifest.precision.vision_tower,
        "weights": weights_label(manifest),
        "parameters": total_parameters(manifest.model),
        "artifact_bytes": sum(entry.bytes for entry in manifest.files.values()),
        "verified": artifact.verified,
    }


def precision_label(manifest: Manifest) -> str:
    """Of the language model; says so where fp16 weights are computed in float32."""
    stored = manifest.precision.language_model
    wider = stored == "fp16" and manifest.precision.computes == "float32"
    return "fp16 (computes fp32)" if wider else stored


def weights_label(manifest: Manifest) -> str:
    """``random``, ``from CHECKPOINT``, or ``not said`` for artifacts of before it was noted."""
    random = manifest.conversion.get("random_weights")
    if random is None:
        return "not said"
    return "random" if random else f"from {manifest.source.id}"


def certified_quality(certificate: Certificate | None) -> dict[str, Any] | None:
    """What the certificate says was lost against the checkpoint; None where it says nothing."""
    if certificate is None:
        return None
    rows = [row for row in certificate.stages if row.name == "quantization_loss"]
    if not rows:
        return None
    found = {row.metric: row.value for row in rows}
    return {"verdict": certificate.verdict, "mode": certificate.mode, **found}
