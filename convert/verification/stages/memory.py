"""Stage ``memory``: a fresh process that loads the artifact and answers stays within the plan."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from llava_edge.convert.verification.reference.probes import Probe
from llava_edge.profiles.errors import ArtifactError
from llava_edge.runtime.artifact.certificate import StageResult, bounded
from llava_edge.runtime.artifact.open import Artifact

_TIMEOUT_SECONDS = 3600
_NUM_TOKENS = 8


def memory_stage(artifact: Artifact, probe: Probe) -> StageResult | None:
    """Peak host memory of ``llava-edge run`` with one image, over what the plan predicts.

    Returns:
        None where the artifact is not made for a CPU: its plan speaks of a device that is not here.

    Raises:
        ArtifactError: the artifact does not run.
    """
    manifest = artifact.manifest
    if manifest.target != "cpu":
        return None
    planned = int(manifest.plan["memory"]["total_bytes"])
    raw = manifest.prompt is None
    with tempfile.TemporaryDirectory() as folder:
        images: list[str] = []
        for index, image in enumerate(probe.images):
            path = Path(folder) / f"{index}.png"
            image.save(path)
            images += ["--image", str(path)]
        command = [
            *(sys.executable, "-m", "llava_edge.runtime.cli.main", "run", str(artifact.folder)),
            *("--prompt", probe.prompt(raw=raw), "--max-new-tokens", str(_NUM_TOKENS), "--json"),
            *(["--raw"] if raw else []),
            # The plan counted the smaller one, where the artifact has both.
            *(["--cache", "int8"] if "int8" in manifest.decoders else []),
            *images,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
    if done.returncode:
        raise ArtifactError(f"the artifact does not run: {done.stderr.strip()[-300:]}")
    peak = int(json.loads(done.stdout.splitlines()[-1])["peak_memory"]["host_bytes"])
    detail = f"{peak / 2**20:.0f} MiB measured on {probe.name}, {planned / 2**20:.0f} MiB planned"
    return bounded("memory", "peak_over_plan", peak / planned, 1.0, detail=detail)
