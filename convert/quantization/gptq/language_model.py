"""quantize_language_model: a decoder solved layer by layer, in the memory of one layer.

The hidden states of all calibration samples lie in a file before each layer and in another behind
it; in memory are only some rows of tokens, one group of weights and its Hessian. Within a layer the
groups are solved in order (q, k and v; o; gate and up; down), each from what the
quantised ones before it really hand on.

    FOLDER/journal.json                 see ``quantized_store``
    FOLDER/layer-00003.safetensors      finished layers
    FOLDER/hidden-0.rows, hidden-1.rows what the next layer reads, and what it writes
    FOLDER/inner.rows                   what o_proj or down_proj reads

A layer only counts once the journal lists it, and until then its input is never touched, so a run
that is killed at any moment goes on with that layer and ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llava_edge.convert.checkpoint.formats.rounding import PER_CHANNEL
from llava_edge.convert.checkpoint.open import Checkpoint
from llava_edge.convert.checkpoint.quantized.source import LINEARS, linear_name, round_tensor
from llava_edge.convert.checkpoint.quantized.store import (
    JOURNAL_VERSION,
    Journal,
    LayerRecord,
    LinearRecord,
    QuantizedStore,
    StoredWeight,
    damaged_layers,
    layer_error,
    read_journal,
    stored,
    write_journal,
    write_layer,
)
from llava_edge.convert.quantization.activation_file import ITEM_BYTES, ActivationFile
from llava_edge.convert.quantization.calibration.calibration_set import CalibrationSet
from llava_edge.convert.quantization.gptq.layer import LayerQuantizer, Tokens
from llava_edge.convert.quantization.gptq.settings import QuantizeSettings
from llava_edge.convert.util.files import check_free_space
from llava_edge.convert.util.torch_threads import torch_threads
from llava_edge.profiles.errors import CheckpointError, RequestError
from llava_edge.runtime.backends.process import configure_process
from llava_edge.runtime.util.host_memory import peak_host_bytes
from llava_edge.runtime.util.progress import Progress, no_progress

__all__ = [
    "QuantizeSettings",
    "needed_bytes",
    "quantize_language_model",
]

_LOG = logging.getLogger(__name__)

_SCALE_BYTES = 2
_STEPS = ("samples", "qkv", "o", "gate_up", "down", "layer")
"""What is reported of a layer; samples of the first one alone."""


def quantize_language_model(
    checkpoint: Checkpoint,
    folder: Path,
    settings: QuantizeSettings,
    samples: CalibrationSet | None,
    report: Progress = no_progress,
    *,
    source_digest: str | None = None,
) -> QuantizedStore:
    """Quantise all decoder layers into a working folder; resumes what an equal request began.

    Args:
        checkpoint: the model.
        folder: made if it is not there; holds nothing but what earlier runs left.
        settings: how.
        samples: what to calibrate with; None only for ``rtn``.
        report: told after every step, with the error of the layer and the time left.
        source_digest: ``checkpoint.digest()`` where the caller knows it already.

    Returns:
        The finished store; its ``report`` is what there is to say of it.

    Raises:
        RequestError: no samples; the disk is too small; the folder belongs to another request, or
            to a run with another number of threads than asked for.
        CheckpointError: a weight or an activation is not finite (named), or the group divides not.
        ExportError: writing failed; the same call resumes.
    """
    if settings.quantizer == "gptq" and (samples is None or not samples.samples):
        raise RequestError(
            "GPTQ was asked for without a calibration sample; give samples or take --quantizer rtn"
        )
    used = samples if settings.quantizer == "gptq" else None
    _check_groups(checkpoint, settings)
    digest = source_digest or checkpoint.digest()
    journal = _open_journal(checkpoint, folder, settings, used, digest)
    with torch_threads(journal.threads), torch.no_grad():
        configure_process()
        run = _Run(checkpoint, folder, settings, journal, report)
        if used is None:
            run.round_layers()
        else:
            run.solve_layers(used)
    for path in folder.glob("*.rows"):
        path.unlink()
    return QuantizedStore(folder)


def needed_bytes(
    checkpoint: Checkpoint, settings: QuantizeSettings, samples: CalibrationSet | None
) -> int:
    """Disk that a run takes at most: the codes, and for GPTQ the activations."""
    text = checkpoint.dims.text
    total = 0
    for layer in range(text.num_hidden_layers):
        for linear in LINEARS:
            rows, columns = checkpoint.tensors[f"{linear_name(layer, linear)}.weight"].shape
            groups = 1 if settings.group_size == PER_CHANNEL else columns // settings.group_size
            total += rows * (-(-columns * settings.bits // 8) + groups * _SCALE_BYTES)
    if settings.quantizer == "gptq" and samples is not None:
        width = 2 * text.hidden_size + max(text.query_size, text.intermediate_size)
        total += samples.num_tokens * width * ITEM_BYTES
    return total


class _Run:
    """The state of one run: the journal as far as it goes, and when this run began."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        folder: Path,
        settings: QuantizeSettings,
        journal: Journal,
        report: Progress,
    ) -> None:
        self._checkpoint = checkpoint
        self._folder = folder
        self._settings = settings
        self._journal = journal
        self._report = report
        self._began_at = len(journal.layers)
        self._seconds = 0.0

    def round_layers(self) -> None:
        """Round every layer that is not finished to nearest."""
        settings = self._settings
        for layer in range(len(self._journal.layers), self._journal.num_layers):
            started = time.perf_counter()
            weights: dict[str, StoredWeight] = {}
            records: dict[str, LinearRecord] = {}
            for linear in LINEARS:
                weight = round_tensor(
                    self._checkpoint,
                    f"{linear_name(layer, linear)}.weight",
                    bits=settings.bits,
                    group_size=settings.group_size,
                    reduce_range=settings.reduce_range,
                )
                weights[linear] = stored(weight)
                records[linear] = LinearRecord("rtn", weight.report)
            self._finish_layer(layer, weights, records, started)

    def solve_layers(self, samples: CalibrationSet) -> None:
        """Solve every layer that is not finished with GPTQ."""
        text = self._checkpoint.dims.text
        tokens = Tokens.of(samples, self._settings.shares)
        with contextlib.ExitStack() as files:

            def opened(name: str, width: int) -> ActivationFile:
                path = self._folder / f"{name}.rows"
                return files.enter_context(ActivationFile(path, tokens.count, width))

            hidden = [opened(f"hidden-{i}", text.hidden_size) for i in range(2)]
            inner = opened("inner", max(text.query_size, text.intermediate_size))
            if not self._journal.prepared:
                self._embed(samples, hidden[0])
            samples.embedded()
            solver = LayerQuantizer(self._checkpoint, self._settings, tokens, inner)
            for layer in range(len(self._journal.layers), self._journal.num_layers):
                started = time.perf_counter()
                source, target = hidden[layer % 2], hidden[(layer + 1) % 2]
                weights, records = solver.solve(
                    layer, source, target, lambda step: self._report_step(step, None)
                )
                target.sync()
                self._finish_layer(layer, weights, records, started)

    def _embed(self, samples: CalibrationSet, hidden: ActivationFile) -> None:
        start = 0
        for sample in samples.samples:
            rows = torch.from_numpy(np.ascontiguousarray(sample.embed(), np.float32))
            if not bool(torch.isfinite(rows.sum())):
                raise CheckpointError(
                    f"the embeddings of calibration sample {sample.name} are not finite; the "
                    "checkpoint's tower, projector or embedding table overflows or is damaged"
                )
            hidden.write(start, rows)
            start += len(rows)
        hidden.sync()
        self._write(replace(self._journal, prepared=True))
        self._report_step("samples", None)

    def _finish_layer(
        self,
        layer: int,
        weights: dict[str, StoredWeight],
        records: dict[str, LinearRecord],
        started: float,
    ) -> None:
        name, size, digest = write_layer(self._folder, layer, weights)
        seconds = time.perf_counter() - started
        record = LayerRecord(name, size, digest, records, seconds, peak_host_bytes())
        self._write(replace(self._journal, layers=(*self._journal.layers, record)))
        self._seconds += seconds
        self._report_step("layer", layer_error(record))

    def _write(self, journal: Journal) -> None:
        write_journal(self._folder, journal)
        self._journal = journal

    def _report_step(self, step: str, error: float | None) -> None:
        done, total = len(self._journal.layers), self._journal.num_layers
        here = done - self._began_at
        label = "quantise"
        if error is not None:
            label += f" error {error:.2e}"
        if here:
            label += f", {math.ceil((total - done) * self._seconds / here)} s left"
        within = _STEPS.index(step) if step != "layer" else 0
        self._report(label, len(_STEPS) * done + within, len(_STEPS) * total)


def _check_groups(checkpoint: Checkpoint, settings: QuantizeSettings) -> None:
    if settings.group_size == PER_CHANNEL:
        return
    bad = [
        f"{linear} has {columns}"
        for linear in LINEARS
        if (columns := checkpoint.tensors[f"{linear_name(0, linear)}.weight"].shape[1])
        % settings.group_size
    ]
    if bad:
        raise CheckpointError(
            f"group_size {settings.group_size} does not divide the inputs of every linear layer "
            f"({', '.join(bad)}); take the largest of 128, 64, 32, -1 that does"
        )


def _open_journal(
    checkpoint: Checkpoint,
    folder: Path,
    settings: QuantizeSettings,
    samples: CalibrationSet | None,
    digest: str,
) -> Journal:
    """The journal to go on with: the one that is there, or a new one in an empty folder."""
    key = _request_key(settings, samples, digest)
    found = read_journal(folder)
    if found is not None:
        _check_request(folder, found, key, settings)
        damaged = _damage(folder, found, samples, checkpoint.dims.text.hidden_size)
        if damaged is None:
            return found
        _LOG.warning("%s is damaged (%s); quantisation starts anew", folder, damaged)
    text = checkpoint.dims.text
    if found is not None:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    check_free_space(folder, needed_bytes(checkpoint, settings, samples))
    journal = Journal(
        version=JOURNAL_VERSION,
        key=key,
        threads=settings.threads or torch.get_num_threads(),
        bits=settings.bits,
        group_size=settings.group_size,
        num_layers=text.num_hidden_layers,
        prepared=False,
        samples=samples.report if samples is not None else {"source": "none"},
    )
    write_journal(folder, journal)
    return journal


def _request_key(
    settings: QuantizeSettings, samples: CalibrationSet | None, digest: str
) -> dict[str, Any]:
    asked = asdict(settings)
    del asked["threads"]
    return {
        "checkpoint": digest,
        "samples": samples.digest if samples is not None else "",
        "settings": asked,
        "llava-edge": version("llava-edge"),
        "torch": version("torch"),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def _check_request(
    folder: Path, found: Journal, key: dict[str, Any], settings: QuantizeSettings
) -> None:
    differing = [
        f"{name} was {found.key.get(name)!r:.200} and is now {key.get(name)!r:.200}"
        for name in sorted({*found.key, *key})
        if found.key.get(name) != key.get(name)
    ]
    if settings.threads is not None and settings.threads != found.threads:
        differing.append(
            f"threads were {found.threads} and are now {settings.threads} (the last bits of a "
            "factorisation depend on them)"
        )
    if differing:
        raise RequestError(
            f"{folder} holds the quantisation of another request: {'; '.join(differing)}. "
            "Ask for the same, or remove the folder to start again."
        )


def _damage(
    folder: Path, journal: Journal, samples: CalibrationSet | None, hidden_size: int
) -> str | None:
    """Why a folder cannot be resumed; None where it can."""
    damaged = damaged_layers(folder, journal)
    if damaged:
        return f"{', '.join(damaged)} differ from the journal"
    if samples is None or journal.is_complete or not journal.prepared:
        return None
    path = folder / f"hidden-{len(journal.layers) % 2}.rows"
    wanted = samples.num_tokens * hidden_size * ITEM_BYTES
    found = path.stat().st_size if path.is_file() else 0
    return None if found == wanted else f"{path.name} has {found} of {wanted} bytes"
