"""Converting a 7B of random weights: peak memory, time in all and a layer.

``rtn`` converts the whole model. ``gptq`` converts the same model cut to its first layers, since
the peak repeats with every layer, and calibrates with the set that the project draws.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_edge.bench.common.random_models import CLIP_L, write_random
from llava_edge.bench.common.subprocess_runner import Spent, program, run_fresh
from llava_edge.bench.lab.memory.measure import fill_tokenizer
from llava_edge.runtime.artifact.conversion_record import read_conversion
from llava_edge.runtime.util.progress import Notify

GIB = 1 << 30
MISTRAL_7B: Mapping[str, int | float | str] = {
    "backbone": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "heads": 32,
    "kv_heads": 8,
    "vocab_size": 32064,
    "max_positions": 32768,
    "rope_theta": 1e6,
    **CLIP_L,
}
"""llava-v1.6-mistral-7b, but for the number of layers."""


@dataclass(frozen=True)
class MemoryStep:
    """One conversion to measure.

    Attributes:
        name: of the step.
        quantizer: ``--quantizer``.
        layers: of the decoder.
        bound_bytes: what its peak may be.
        options: further options of ``llava-edge convert``.
    """

    name: str
    quantizer: str
    layers: int
    bound_bytes: int
    options: tuple[str, ...] = ()


RTN = MemoryStep("rtn", "rtn", 32, 6 * GIB)
GPTQ = MemoryStep("gptq", "gptq", 4, 8 * GIB)


def measure_conversion(
    step: MemoryStep, sizes: Mapping[str, int | float | str], work: Path, report: Notify
) -> dict[str, Any]:
    """Write the checkpoint unless it is there, convert it in a fresh process, remove both.

    Args:
        step: what to measure.
        sizes: fields of the random checkpoint.
        work: folder of this step; an interrupted conversion in it goes on, and the result says so.
        report: told what is going on.

    Returns:
        Plain JSON for the ledger.

    Raises:
        subprocess.CalledProcessError: a command failed.
    """
    checkpoint, artifact = work / "checkpoint", work / "artifact"
    write_checkpoint(checkpoint, {**sizes, "layers": step.layers}, report)
    checkpoint_bytes = folder_bytes(checkpoint)
    partial = artifact.with_name("artifact.partial")
    resumed = partial.exists()
    report(f"{step.name}: converting {checkpoint_bytes / GIB:.1f} GiB, {step.layers} layers")
    stage_ends: dict[str, float] = {}

    def look(seconds: float) -> None:
        for part in read_journal(partial / "journal.json").get("parts", {}):
            stage_ends.setdefault(part, seconds)

    options = ["--precision", "int4", "--quantizer", step.quantizer, *step.options]
    spent = convert(checkpoint, artifact, options, look=look)
    conversion = json.loads((artifact / "manifest.json").read_text("utf-8"))["conversion"]
    measured = read_conversion(artifact).quantization
    result = {
        "layers": step.layers,
        "sizes": dict(sizes),
        "options": list(step.options),
        "bound_bytes": step.bound_bytes,
        "checkpoint_bytes": checkpoint_bytes,
        "artifact_bytes": spent.result()["artifact_bytes"],
        "peak_bytes": spent.peak_bytes,
        "holds": spent.peak_bytes <= step.bound_bytes,
        "seconds": spent.seconds,
        "cpu_seconds": spent.cpu_seconds,
        "stage_ends": stage_ends,
        "load": spent.load,
        "resumed": resumed,
        **_layers(step, spent.seconds - stage_ends.get("tokenizer", 0.0), conversion, measured),
    }
    shutil.rmtree(work)
    return result


def _layers(
    step: MemoryStep, last_part: float, conversion: dict[str, Any], measured: dict[str, Any]
) -> dict[str, Any]:
    """Seconds a layer, and what the manifest says of a calibration."""
    if not measured:
        # Rounded while the graph is written, which is the last part; the head is among it.
        return {"seconds_per_layer": last_part / step.layers}
    seconds = measured["seconds_by_layer"]
    return {
        "seconds_per_layer": sum(seconds) / len(seconds),
        "seconds_by_layer": seconds,
        "solver_peak_bytes": measured["peak_host_bytes"],
        "threads": conversion["settings"]["threads"],
        "samples": conversion["samples"]["num_samples"],
        "tokens": conversion["samples"]["tokens"],
        "tokens_total": sum(conversion["samples"]["tokens"].values()),
        "relative_error": [layer["relative_error"] for layer in conversion["layers"]],
        "rtn_relative_error": [layer["rtn_relative_error"] for layer in conversion["layers"]],
    }


def write_checkpoint(
    folder: Path, sizes: Mapping[str, int | float | str], report: Notify, seed: int = 0
) -> None:
    """Write a random checkpoint whose tokenizer fills the vocabulary, unless it is there."""
    if (folder / "config.json").exists():
        return
    report(f"writing {folder}")
    # The tokenizer is filled aside, so that a folder under its own name is complete.
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    write_random(unfinished, sizes, ["--seed", str(seed)])
    fill_tokenizer(unfinished / "tokenizer.json", int(sizes["vocab_size"]))
    unfinished.rename(folder)


def convert(
    checkpoint: Path,
    artifact: Path,
    options: Sequence[str],
    environment: Mapping[str, str] | None = None,
    look: Callable[[float], None] | None = None,
) -> Spent:
    """``llava-edge convert`` in a fresh process, for a CPU with enough memory."""
    command = [program("llava-edge"), "convert", str(checkpoint), str(artifact)]
    # Quantising is measured; verifying is measured by its own command.
    named = ["--profile", "cpu-32gb", "--verify", "none", "--json"]
    return run_fresh([*command, *named, *options], environment, look)


def read_journal(path: Path) -> dict[str, Any]:
    """A conversion's journal; empty where there is none (yet, or any more)."""
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
