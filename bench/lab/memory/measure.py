"""Measuring memory cases: checkpoint, artifact, one question in a fresh process; results are kept.

A case's checkpoint goes once it is converted and its artifact once it is measured, so that the disk
holds one model at a time. What was measured lies in one JSON file; a later call measures only what
that file lacks.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from llava_edge.bench.common.atomic_write import atomic_write
from llava_edge.bench.common.subprocess_runner import edge_command
from llava_edge.bench.lab.memory.cases import MemoryCase
from llava_edge.profiles.memory.buffers import CACHE_FLAGS
from llava_edge.profiles.models.model_dims import ModelDims
from llava_edge.runtime.util.arrays import DeviceKind
from llava_edge.runtime.util.progress import Notify

BOARDS: dict[DeviceKind, str] = {"cpu": "cpu-16gb", "cuda": "a100"}
"""Profiles that artifacts are converted for."""

CACHE_NAMES = {cache: flag for flag, cache in CACHE_FLAGS.items()}


@dataclass(frozen=True)
class Measurement:
    """A case and what it took.

    Attributes:
        case: what was asked.
        config: ``config.json`` of its checkpoint.
        host_bytes: VmHWM of the process that answered.
        prompt_tokens: tokens of the prompt as it was.
        steps: (step, bytes held, most so far), in order; of the device where that was measured.
        device_bytes: what the process held on the GPU; None on the CPU.
        chunk_tokens: positions computed at once in prefill.
        compute_capability: of the GPU.
    """

    case: MemoryCase
    config: dict[str, Any]
    host_bytes: int
    prompt_tokens: int
    steps: tuple[tuple[str, int, int], ...] = ()
    device_bytes: int | None = None
    chunk_tokens: int = 512
    compute_capability: str | None = None

    @property
    def measured_bytes(self) -> int:
        """Of the memory that the case was measured for."""
        return self.host_bytes if self.device_bytes is None else self.device_bytes

    @property
    def dims(self) -> ModelDims:
        """Dimensions of the model."""
        return ModelDims.from_config(self.config)


@dataclass(frozen=True)
class MeasureSettings:
    """How cases are measured.

    Attributes:
        device: where artifacts run and what is measured: the host's memory, or the GPU's.
        threads: of the process that answers; 0 for as many as are allowed.
        prefill_chunk: positions computed at once in prefill; 0 for the artifact's own.
    """

    device: DeviceKind = "cpu"
    threads: int = 0
    prefill_chunk: int = 0


def measure_cases(
    cases: Sequence[MemoryCase],
    work: Path,
    results: Path,
    report: Notify,
    settings: MeasureSettings = MeasureSettings(),
) -> list[Measurement]:
    """Measure every case that ``results`` does not hold yet, smallest first as they come.

    Args:
        cases: what to measure.
        work: folder for one model at a time.
        results: JSON file that keeps what was measured.
        report: told what is going on.
        settings: how.

    Raises:
        subprocess.CalledProcessError: a command failed.
    """
    kept = json.loads(results.read_text("utf-8")) if results.exists() else {}
    asked = asdict(settings)
    measurements = []
    for case in cases:
        entry = kept.get(case.name)
        if entry is None or entry["case"] != case.as_dict() or entry.get("settings") != asked:
            report(f"{case.name}: measuring")
            entry = {"settings": asked, **measure_case(case, work / case.name, settings)}
            kept[case.name] = entry
            atomic_write(results, json.dumps(kept, indent=1) + "\n")
        measurement = Measurement(
            case,
            entry["config"],
            entry["host_bytes"],
            entry["prompt_tokens"],
            tuple(tuple(step) for step in entry["steps"]),
            entry.get("device_bytes"),
            entry["chunk_tokens"],
            entry.get("compute_capability"),
        )
        measurements.append(measurement)
        report(f"{case.name}: {measurement.measured_bytes / 2**20:.1f} MiB")
    return measurements


def measure_case(case: MemoryCase, folder: Path, settings: MeasureSettings) -> dict[str, Any]:
    """Write, convert and run one case; the folder is gone afterwards."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        checkpoint, artifact = folder / "checkpoint", folder / "artifact"
        changes = [f"--set={name}={value}" for name, value in case.sizes.items()]
        writer = [
            sys.executable,
            "-m",
            "llava_edge.convert.testing.random_cli",
            "tiny",
            str(checkpoint),
        ]
        _call([*writer, *changes, "--seed", str(case.seed)])
        config = json.loads((checkpoint / "config.json").read_text("utf-8"))
        fill_tokenizer(checkpoint / "tokenizer.json", int(case.sizes["vocab_size"]))
        convert = edge_command("convert", str(checkpoint), str(artifact))
        convert += ["--precision", case.precision]
        if case.precision != "fp16":
            # Solving takes long, and so does calibrating a tower; sizes are the same without.
            convert += ["--quantizer", "rtn", "--vision-precision", "fp16"]
        board = ["--profile", BOARDS[settings.device], "--verify", "none"]
        cache = [] if case.cache is None else ["--cache", CACHE_NAMES[case.cache]]
        # The scales of a GPU's int8 cache are calibrated; their size is the same with one sample.
        samples = ["--samples", "1"] if case.cache == "int8" and settings.device == "cuda" else []
        size = ["--grid", case.grid, "--context", str(case.context)]
        _call([*convert, *board, *size, *cache, *samples])
        shutil.rmtree(checkpoint)
        images = _write_images(case, folder)
        probe = [sys.executable, "-m", "llava_edge.bench.lab.memory.probe", str(artifact), *images]
        probe += ["--device", settings.device]
        probe += ["--prompt-tokens", str(case.prompt_tokens), "--threads", str(settings.threads)]
        found = _call([*probe, *cache, "--prefill-chunk", str(settings.prefill_chunk)])
        return {"case": case.as_dict(), "config": config, **json.loads(found.splitlines()[-1])}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fill_tokenizer(path: Path, num_tokens: int) -> None:
    """Give a BPE tokenizer as many tokens as the model has rows, each with its merge.

    A random checkpoint's tokenizer knows a few hundred; released ones fill the vocabulary, and
    their tables are a good part of what a small process takes.
    """
    document = json.loads(path.read_text("utf-8"))
    vocab, merges = document["model"]["vocab"], document["model"]["merges"]
    taken = {*vocab.values(), *(token["id"] for token in document["added_tokens"])}
    free = deque(number for number in range(num_tokens) if number not in taken)
    special = {token["content"]: token["id"] for token in document["added_tokens"]}
    parts = [text for text in vocab if text not in special]
    # An added token that the model does not know would be numbered behind all others.
    vocab.update(special)
    draw = random.Random(num_tokens)
    while free:
        left, right = draw.choice(parts), draw.choice(parts)
        if len(left + right) > 12 or left + right in vocab:
            continue
        vocab[left + right] = free.popleft()
        parts.append(left + right)
        merges.append([left, right])
    path.write_text(json.dumps(document, ensure_ascii=False), "utf-8")


def _write_images(case: MemoryCase, folder: Path) -> list[str]:
    paths = []
    for number in range(case.num_images):
        # A gradient: content does not matter, but a decoder must have something to decode.
        gradient = Image.linear_gradient("L").rotate(90 * number)
        image = gradient.resize((case.image_width, case.image_height)).convert("RGB")
        path = folder / f"{number}.jpg"
        image.save(path, quality=90)
        paths.append(str(path))
    return paths


def _call(command: list[str]) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise subprocess.CalledProcessError(done.returncode, command)
    return done.stdout
