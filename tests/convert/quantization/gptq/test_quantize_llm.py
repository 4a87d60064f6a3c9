from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaNextForConditionalGeneration

from llava_edge.convert.checkpoint.open import Checkpoint, open_checkpoint
from llava_edge.convert.checkpoint.quantized.source import (
    LINEARS,
    QuantizedSource,
    RtnSource,
    linear_name,
)
from llava_edge.convert.checkpoint.quantized.store import QuantizedStore, read_journal
from llava_edge.convert.quantization import activation_file as activations
from llava_edge.convert.quantization.calibration.calibration_set import (
    CalibrationSample,
    CalibrationSet,
)
from llava_edge.convert.quantization.calibration.token_weights import KindShares, token_weights
from llava_edge.convert.quantization.gptq.language_model import (
    QuantizeSettings,
    needed_bytes,
    quantize_language_model,
)
from llava_edge.convert.quantization.gptq.solver import quantize_weight
from llava_edge.convert.quantization.gptq.torch_layer import DecoderLayer, Rope
from llava_edge.convert.testing.random_checkpoint import write_random_checkpoint
from llava_edge.convert.testing.random_spec import preset
from llava_edge.profiles.errors import CheckpointError, ExportError, RequestError
from llava_edge.runtime.util.progress import Progress

CheckpointMaker = Callable[..., Path]
_INT4 = QuantizeSettings(bits=4, group_size=32, threads=1)
_GROUPS = (LINEARS[:3], LINEARS[3:4], LINEARS[4:6], LINEARS[6:])


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def checkpoint(make_checkpoint: CheckpointMaker) -> Checkpoint:
    return open_checkpoint(make_checkpoint("odd"))


def calibration_set(
    width: int, lengths: tuple[int, ...] = (40, 90, 7), seed: int = 0, kinds: int = 4
) -> CalibrationSet:
    """Samples of random rows, all kinds of token among them."""
    generator = np.random.default_rng(seed)
    channels = np.exp(generator.normal(0, 0.7, width))
    samples: list[CalibrationSample] = []
    for place, length in enumerate(lengths):
        rows = (generator.standard_normal((length, width)) * channels).astype(np.float32) * 0.3
        of_rows = generator.integers(0, kinds, length).astype(np.uint8)
        samples.append(CalibrationSample(f"sample-{place}", of_rows, rows.copy))
    return CalibrationSet(tuple(samples), f"digest {seed} {lengths}", {"source": "drawn here"})


def changed(folder: Path, to: Path, **changes: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A copy of a checkpoint with tensors changed; keys are the ends of stored names."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    for end, change in changes.items():
        names = [name for name in tensors if name.endswith(end)]
        assert names
        for name in names:
            tensors[name] = change(tensors[name].clone()).contiguous()
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


def layer_digests(folder: Path) -> list[str]:
    journal = read_journal(folder)
    assert journal is not None
    return [record.sha256 for record in journal.layers]


@pytest.mark.parametrize(
    ("backbone", "changes"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 20, "heads": 3, "kv_heads": 3}),
        ("qwen2", {"kv_heads": 1}),
    ],
    ids=["llama", "mistral, window 20", "qwen2, one key head"],
)
def test_every_layer_equals_a_whole_model_quantised_in_plain_steps(
    make_checkpoint: CheckpointMaker, tmp_path: Path, backbone: str, changes: dict[str, int]
) -> None:
    folder = make_checkpoint("odd", backbone=backbone, layers=2, **changes)
    samples = calibration_set(96)
    store = quantize_language_model(open_checkpoint(folder), tmp_path / "q", _INT4, samples)
    same = {
        name: store.linear(name).qweight == codes
        for name, codes in _plain_gptq(folder, samples, _INT4).items()
    }
    # Inputs that differ in their last bits may round one weight in thousands elsewhere.
    assert min(equal.mean() for equal in same.values()) > 0.98
    assert np.concatenate([equal.ravel() for equal in same.values()]).mean() > 0.999


def _plain_gptq(
    folder: Path, samples: CalibrationSet, settings: QuantizeSettings
) -> dict[str, np.ndarray[Any, Any]]:
    """The whole model in memory, run anew from the embeddings for every group of linear layers."""
    whole = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model = whole.model.language_model
    weights = token_weights(np.concatenate([s.kinds for s in samples.samples]), settings.shares)
    codes: dict[str, np.ndarray[Any, Any]] = {}
    for layer, module in enumerate(model.layers):
        for group in _GROUPS:
            rows: list[torch.Tensor] = []

            def see(_: object, args: tuple[torch.Tensor], rows: Any = rows) -> None:
                rows.append(args[0][0].double())

            hook = module.get_submodule(group[0]).register_forward_pre_hook(see)
            with torch.no_grad():
                for sample in samples.samples:
                    model(inputs_embeds=torch.from_numpy(sample.embed())[None])
            hook.remove()
            inputs = torch.cat(rows)
            weighted = inputs * torch.from_numpy(weights)[:, None]
            hessian = inputs.T @ weighted / weights.sum()
            for linear in group:
                weight = module.get_submodule(linear).weight.data
                quantized = quantize_weight(
                    weight, hessian, bits=settings.bits, group_size=settings.group_size
                )
                weight.copy_(torch.from_numpy(quantized.dequantize()))
                codes[linear_name(layer, linear)] = quantized.qweight
    return codes


@pytest.mark.parametrize(
    ("bits", "group_size", "reduce_range"), [(4, 32, False), (8, 32, False), (8, -1, True)]
)
def test_no_layer_is_worse_than_rounding_to_nearest(
    checkpoint: Checkpoint, tmp_path: Path, bits: int, group_size: int, reduce_range: bool
) -> None:
    settings = QuantizeSettings(bits, group_size, reduce_range=reduce_range, threads=1)
    store = quantize_language_model(checkpoint, tmp_path / "q", settings, calibration_set(96))
    report = store.report
    assert len(report["layers"]) == 3
    for layer in report["layers"]:
        assert layer["relative_error"] < layer["rtn_relative_error"]
        for linear in layer["linears"].values():
            assert linear["quantizer"] == "gptq"
            found = linear["report"]
            assert found["relative_error"] <= found["rtn_relative_error"] * (1 + 1e-6)
            assert set(linear["error_by_kind"]) == {"text", "base", "tile", "newline"}
            # Kinds are parts of the same rows.
            assert max(linear["error_by_kind"].values()) > 0.5 * found["relative_error"]
    if reduce_range:
        codes = store.linear(linear_name(2, "mlp.down_proj")).qweight
        assert (int(codes.min()), int(codes.max())) >= (64, 0)
        assert int(codes.max()) <= 191
    json.dumps(report, allow_nan=False)


@pytest.mark.parametrize(
    ("preset_name", "changes"),
    [
        ("tiny", {"backbone": "llama"}),
        ("odd", {"backbone": "llama"}),
        ("odd", {"backbone": "mistral", "sliding_window": 20}),
        ("odd", {"backbone": "qwen2", "kv_heads": 1}),
        ("demo", {"layers": 2}),
    ],
    ids=["tiny", "odd llama", "odd mistral", "odd qwen2", "demo"],
)
def test_every_linear_layer_of_every_test_model_beats_rounding_and_on_average_plain_scales(
    make_checkpoint: CheckpointMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    preset_name: str,
    changes: dict[str, Any],
) -> None:
    checkpoint = open_checkpoint(make_checkpoint(preset_name, **changes))
    samples = calibration_set(checkpoint.dims.text.hidden_size)

    def reports(name: str) -> list[dict[str, Any]]:
        store = quantize_language_model(checkpoint, tmp_path / name, _INT4, samples)
        layers = store.report["layers"]
        assert len(layers) == checkpoint.dims.text.num_hidden_layers
        return [linear["report"] for layer in layers for linear in layer["linears"].values()]

    searched = reports("searched")
    plain_solver = partial(quantize_weight, scale_search=False)
    monkeypatch.setattr("llava_edge.convert.quantization.gptq.layer.quantize_weight", plain_solver)
    plain = reports("plain")
    assert len(searched) == 7 * checkpoint.dims.text.num_hidden_layers
    assert all(each["relative_error"] < each["rtn_relative_error"] for each in searched)
    means = [np.mean([each["relative_error"] for each in found]) for found in (searched, plain)]
    assert means[0] < means[1]


def test_the_report_says_what_was_asked_and_measured(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    store = quantize_language_model(checkpoint, tmp_path / "q", _INT4, calibration_set(96))
    report = store.report
    assert report["settings"]["bits"] == 4
    assert report["settings"]["threads"] == 1
    assert report["settings"]["shares"]["text"] == 0.5
    assert report["samples"] == {"source": "drawn here"}
    assert report["notes"] == []
    assert len(report["measured"]["seconds_by_layer"]) == 3
    assert report["measured"]["peak_host_bytes"] > 1 << 20
    name = linear_name(1, "self_attn.o_proj")
    weight = store.linear(name)
    assert weight.report.relative_error is not None
    assert weight.dequantize().shape == (96, 96)
    assert not list((tmp_path / "q").glob("*.rows"))


_STEPS = 6
"""Samples, four steps of a layer, the layer."""


class Seen:
    """What a run reported."""

    def __init__(self) -> None:
        self.labels: list[str] = []
        self.steps: list[int] = []
        self.totals: set[int] = set()

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.labels.append(stage)
        self.steps.append(done)
        self.totals.add(total)

    def layers(self) -> list[int]:
        """Layers that were finished."""
        return [done // _STEPS for done in self.steps if done and done % _STEPS == 0]


def test_progress_tells_steps_layers_errors_and_time(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    seen = Seen()
    quantize_language_model(checkpoint, tmp_path / "q", _INT4, calibration_set(96), seen)
    assert seen.steps[:6] == [0, 1, 2, 3, 4, _STEPS]
    assert seen.totals == {3 * _STEPS}
    assert seen.layers() == [1, 2, 3]
    labels = [seen.labels[seen.steps.index(layer * _STEPS)] for layer in seen.layers()]
    errors = [float(re.findall(r"^quantise error ([\d.e-]+)", label)[0]) for label in labels]
    assert all(0 < error < 0.1 for error in errors)
    assert seen.labels[0] == "quantise"
    assert re.search(r", \d+ s left$", labels[1])
    assert labels[2].endswith(", 0 s left")


def test_rounding_to_nearest_needs_no_samples_and_equals_the_source(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    settings = QuantizeSettings(8, -1, "rtn", reduce_range=True)
    store = quantize_language_model(checkpoint, tmp_path / "q", settings, None)
    source = RtnSource(checkpoint, 8, -1, reduce_range=True)
    for linear in LINEARS:
        name = linear_name(2, linear)
        np.testing.assert_array_equal(store.linear(name).qweight, source.linear(name).qweight)
        np.testing.assert_array_equal(store.linear(name).scales, source.linear(name).scales)
    assert store.report["layers"][0]["relative_error"] is None


def test_a_hessian_too_large_leaves_rounding_and_says_so(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    # 96 columns take 147,456 bytes while solving, 160 take 409,600.
    settings = replace(_INT4, hessian_bytes=200_000)
    store = quantize_language_model(checkpoint, tmp_path / "q", settings, calibration_set(96))
    linears = store.report["layers"][0]["linears"]
    routes = {name: linear["quantizer"] for name, linear in linears.items()}
    assert routes == {name: "rtn" if name == "mlp.down_proj" else "gptq" for name in LINEARS}
    assert "mlp.down_proj: the Hessian of 160 columns takes 409600" in store.report["notes"][0]
    name = linear_name(0, "mlp.down_proj")
    expected = RtnSource(checkpoint, 4, 32).linear(name)
    np.testing.assert_array_equal(store.linear(name).qweight, expected.qweight)


def test_a_column_that_is_always_zero_is_counted(
    make_checkpoint: CheckpointMaker, tmp_path: Path
) -> None:
    def silence(gain: torch.Tensor) -> torch.Tensor:
        gain[5] = 0.0
        return gain

    folder = changed(
        make_checkpoint("odd"), tmp_path / "c", **{"layers.0.input_layernorm.weight": silence}
    )
    store = quantize_language_model(
        open_checkpoint(folder), tmp_path / "q", _INT4, calibration_set(96)
    )
    dead = {
        name: linear["report"]["dead_columns"]
        for name, linear in store.report["layers"][0]["linears"].items()
    }
    assert [name for name, count in dead.items() if count] == list(LINEARS[:3])
    assert not store.linear(linear_name(0, "self_attn.q_proj")).dequantize()[:, 5].any()


def _broken(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[17] = torch.nan
    return tensor


@pytest.mark.parametrize(
    "name",
    [
        "layers.1.mlp.up_proj.weight",
        "layers.1.self_attn.v_proj.weight",
        "layers.0.post_attention_layernorm.weight",
    ],
)
def test_a_value_that_is_not_finite_names_its_tensor(
    make_checkpoint: CheckpointMaker, tmp_path: Path, name: str
) -> None:
    folder = changed(make_checkpoint("odd"), tmp_path / "c", **{name: _broken})
    pattern = rf"tensor language_model\.{name.replace('.', '[.]')} holds"
    with pytest.raises(CheckpointError, match=pattern):
        quantize_language_model(open_checkpoint(folder), tmp_path / "q", _INT4, calibration_set(96))


def test_a_sample_that_is_not_finite_is_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    samples = calibration_set(96)
    rows = samples.samples[1].embed()
    rows[3, 4] = np.inf
    bad = replace(samples.samples[1], embed=rows.copy)
    broken = replace(samples, samples=(samples.samples[0], bad))
    with pytest.raises(CheckpointError, match="calibration sample sample-1 are not finite"):
        quantize_language_model(checkpoint, tmp_path / "q", _INT4, broken)


def test_activations_that_overflow_name_the_layer(
    make_checkpoint: CheckpointMaker, tmp_path: Path
) -> None:
    folder = changed(
        make_checkpoint("odd"),
        tmp_path / "c",
        **{"layers.1.input_layernorm.weight": lambda gain: gain.float().fill_(3e38)},
    )
    with pytest.raises(CheckpointError, match=r"inputs of language_model\.layers\.1\.self_attn"):
        quantize_language_model(open_checkpoint(folder), tmp_path / "q", _INT4, calibration_set(96))


def test_settings_are_refused_together() -> None:
    with pytest.raises(RequestError, match=r"quantizer is 'awq'.*damp_percent is 2.*threads is 0"):
        QuantizeSettings(4, 32, "awq", damp_percent=2.0, threads=0)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="reduce_range is for 8 bits"):
        QuantizeSettings(4, 32, reduce_range=True)


def test_what_cannot_be_quantised_is_refused_before_a_folder_is_made(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    out = tmp_path / "q"
    with pytest.raises(RequestError, match="without a calibration sample"):
        quantize_language_model(checkpoint, out, _INT4, None)
    with pytest.raises(CheckpointError, match=r"self_attn\.q_proj has 96.*mlp\.down_proj has 160"):
        quantize_language_model(checkpoint, out, replace(_INT4, group_size=64), calibration_set(96))
    assert not out.exists()


def test_a_disk_too_small_is_said_before_the_work(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = calibration_set(96)
    # 137 tokens of twice 96 and once 160 floats; weights of 3 layers in 4 bits and their scales.
    linears = 2 * 96 * 96 + 2 * 32 * 96 + 3 * 96 * 160
    assert needed_bytes(checkpoint, _INT4, samples) == 137 * 352 * 4 + 3 * linears * 9 // 16
    monkeypatch.setattr("llava_edge.convert.util.files.free_bytes", lambda folder: 1000)
    with pytest.raises(RequestError, match="1000 B are free"):
        quantize_language_model(checkpoint, tmp_path / "q", _INT4, samples)


def test_a_disk_that_fills_up_is_an_export_error_and_resumes(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = calibration_set(96)
    write = os.pwrite
    written, most = 0, 1 << 60

    def counted(descriptor: int, data: Any, offset: int) -> int:
        nonlocal written
        written += 1
        if written > most:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(activations.os, "pwrite", counted)
        straight = quantize_language_model(checkpoint, tmp_path / "straight", _INT4, samples)
        # Three quarters of the way, behind the first layers.
        written, most = 0, written * 3 // 4
        with pytest.raises(ExportError, match="the disk is full"):
            quantize_language_model(checkpoint, tmp_path / "q", _INT4, samples)
    seen = Seen()
    quantize_language_model(checkpoint, tmp_path / "q", _INT4, samples, seen)
    assert seen.steps[0] >= _STEPS
    assert layer_digests(tmp_path / "q") == layer_digests(straight.folder)


def _stop_after(layers: int) -> Progress:
    def report(stage: str, done: int, total: int) -> None:
        if done == layers * _STEPS + 2:
            raise KeyboardInterrupt

    return report


def test_an_interrupted_run_goes_on_with_the_next_layer(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    samples = calibration_set(96)
    straight = quantize_language_model(checkpoint, tmp_path / "straight", _INT4, samples)
    with pytest.raises(KeyboardInterrupt):
        quantize_language_model(checkpoint, tmp_path / "q", _INT4, samples, _stop_after(1))
    with pytest.raises(RequestError, match="holds 1 of 3 quantised layers"):
        QuantizedStore(tmp_path / "q")
    seen = Seen()
    quantize_language_model(checkpoint, tmp_path / "q", _INT4, samples, seen)
    assert seen.layers() == [2, 3]
    assert layer_digests(tmp_path / "q") == layer_digests(straight.folder)
    again = Seen()
    quantize_language_model(checkpoint, tmp_path / "q", _INT4, samples, again)
    assert again.steps == []


def test_another_request_does_not_go_on_with_a_folder(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    samples, out = calibration_set(96), tmp_path / "q"
    with pytest.raises(KeyboardInterrupt):
        quantize_language_model(checkpoint, out, _INT4, samples, _stop_after(1))
    for settings, given, digest, reason in (
        (replace(_INT4, damp_percent=0.02), samples, None, "settings was"),
        (_INT4, calibration_set(96, seed=1), None, "samples was"),
        (_INT4, samples, "another", "checkpoint was"),
        (replace(_INT4, threads=2), samples, None, "threads were 1 and are now 2"),
    ):
        with pytest.raises(RequestError, match=reason):
            quantize_language_model(checkpoint, out, settings, given, source_digest=digest)
    # Left open, the number of threads is that of the run before; torch's own comes back afterwards.
    torch.set_num_threads(2)
    seen: list[int] = []
    store = quantize_language_model(
        checkpoint,
        out,
        replace(_INT4, threads=None),
        samples,
        lambda *_: seen.append(torch.get_num_threads()),
    )
    assert set(seen) == {1}
    assert store.report["settings"]["threads"] == 1
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("damage", ["layer", "hidden"])
def test_a_damaged_folder_starts_anew(
    checkpoint: Checkpoint, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    samples, out = calibration_set(96), tmp_path / "q"
    with pytest.raises(KeyboardInterrupt):
        quantize_language_model(checkpoint, out, _INT4, samples, _stop_after(1))
    if damage == "layer":
        path = out / "layer-00000.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(bytes(data))
    else:
        os.truncate(out / "hidden-1.rows", 100)
    seen = Seen()
    with caplog.at_level(logging.WARNING):
        quantize_language_model(checkpoint, out, _INT4, samples, seen)
    assert "starts anew" in caplog.text
    assert seen.steps[0] == 0
    straight = quantize_language_model(checkpoint, tmp_path / "straight", _INT4, samples)
    assert layer_digests(out) == layer_digests(straight.folder)


def test_a_store_refuses_what_it_does_not_hold(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="holds no journal"):
        QuantizedStore(tmp_path)
    settings = replace(_INT4, quantizer="rtn")
    store = quantize_language_model(checkpoint, tmp_path / "q", settings, None)
    with pytest.raises(CheckpointError, match=r"no quantised layer 'language_model\.layers\.3"):
        store.linear(linear_name(3, "mlp.up_proj"))
    os.truncate(tmp_path / "q" / "layer-00001.safetensors", 50)
    with pytest.raises(RequestError, match="has 50 bytes; the journal lists"):
        QuantizedStore(tmp_path / "q")
    (tmp_path / "q" / "journal.json").write_text('{"version": 99}')
    with pytest.raises(RequestError, match="it is of version 99"):
        QuantizedStore(tmp_path / "q")


_CHILD = """
import json, os, signal, sys, time
import numpy as np, torch
from pathlib import Path
from llava_edge.convert.quantization.calibration.calibration_set import CalibrationSample
from llava_edge.convert.quantization.calibration.calibration_set import CalibrationSet
from llava_edge.convert.checkpoint.open import open_checkpoint
from llava_edge.convert.quantization.gptq.language_model import QuantizeSettings
from llava_edge.convert.quantization.gptq.language_model import quantize_language_model

def work(folder):
    generator = np.random.default_rng(7)
    samples = []
    for place in range(4):
        rows = generator.standard_normal((60, 96)).astype(np.float32)
        kinds = generator.integers(0, 4, 60).astype(np.uint8)
        samples.append(CalibrationSample(str(place), kinds, rows.copy))
    settings = QuantizeSettings(bits=4, group_size=32, threads=1)
    given = CalibrationSet(tuple(samples), "seven", {})
    checkpoint = open_checkpoint(Path(sys.argv[1]))
    quantize_language_model(checkpoint, Path(folder), settings, given, source_digest="x")

print("ready", flush=True)
for line in sys.stdin:
    folder, killed_after = json.loads(line)
    # One import for all children; nothing of torch ran yet, so forking is safe.
    child = os.fork()
    if child == 0:
        work(folder)
        os._exit(0)
    if killed_after is not None:
        time.sleep(killed_after)
        # Not waited for yet, so the number is still the child's, ended or not.
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    print(status, flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_moment_the_same_call_ends_with_the_same_bytes(
    make_checkpoint: CheckpointMaker, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", _CHILD, str(make_checkpoint("odd"))]
    draw = random.Random(4)
    kills = runs = 0
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        answers = server.stdout
        assert answers.readline() == "ready\n"

        def run(folder: Path, killed_after: float | None) -> bool:
            """Whether the child ended by itself."""
            assert server.stdin is not None
            print(json.dumps([str(folder), killed_after]), file=server.stdin, flush=True)
            status = int(answers.readline())
            assert status in (0, signal.SIGKILL)
            return status == 0

        started = time.perf_counter()
        assert run(tmp_path / "straight", None)
        seconds = time.perf_counter() - started
        expected = layer_digests(tmp_path / "straight")
        while kills < 10:
            folder = tmp_path / f"killed-{runs}"
            runs += 1
            while kills < 10 and not run(folder, draw.uniform(0, 0.6 * seconds)):
                kills += 1
            assert run(folder, None)
            assert layer_digests(folder) == expected
            files = sorted(folder.glob("layer-*.safetensors"))
            assert [hashlib.sha256(file.read_bytes()).hexdigest() for file in files] == expected
        server.stdin.close()


@pytest.mark.slow
def test_image_calibration_beats_text_calibration_and_rounding_on_image_prompts(
    tmp_path: Path,
) -> None:
    """Outlier channels in norms and weights; image rows are loud where text rows are quiet."""
    gains: list[tuple[float, float, float]] = []
    for seed in range(10):
        folder = tmp_path / f"{seed}"
        spec = preset("tiny", image_size=70, layers=2, intermediate_size=96)
        write_random_checkpoint(folder, spec, seed)
        loud = torch.from_numpy(np.random.default_rng(seed).permutation(64)[:6])

        def plant(tensor: torch.Tensor, loud: torch.Tensor = loud) -> torch.Tensor:
            tensor[loud] *= 6.0
            return tensor

        planted = changed(
            folder,
            tmp_path / f"planted-{seed}",
            **{"input_layernorm.weight": plant, "down_proj.weight": plant},
        )
        checkpoint = open_checkpoint(planted)
        image = _prompts(seed, loud.numpy(), text_only=False)
        text = _prompts(seed, loud.numpy(), text_only=True)
        held_out = _prompts(1000 + seed, loud.numpy(), text_only=False)
        sources: list[QuantizedSource] = [
            quantize_language_model(checkpoint, tmp_path / f"i{seed}", _INT4, image),
            quantize_language_model(checkpoint, tmp_path / f"t{seed}", _INT4, text),
            RtnSource(checkpoint, 4, 32),
        ]
        exact = _outputs(checkpoint, None, held_out)
        errors = [_outputs(checkpoint, source, held_out).sub_(exact) for source in sources]
        by_image, by_text, rounded = (
            float(e.square().sum() / exact.square().sum()) for e in errors
        )
        gains.append((by_image, by_text, rounded))
        assert by_image < by_text
        assert by_image < rounded
    means = np.mean(gains, axis=0)
    assert means[0] < 0.85 * min(means[1], means[2]), means


def _prompts(seed: int, loud: np.ndarray[Any, Any], *, text_only: bool) -> CalibrationSet:
    """Six prompts: text of one subspace, and image rows of another with outlier channels."""
    fixed = np.random.default_rng(99)
    bases = {kind: fixed.standard_normal((24, 64)) / 5 for kind in ("text", "image")}
    draw = np.random.default_rng(seed)
    samples: list[CalibrationSample] = []
    for place in range(6):
        lengths = (96, 0) if text_only else (16, 80)
        text = draw.standard_normal((lengths[0], 24)) @ bases["text"]
        picture = draw.standard_normal((lengths[1], 24)) @ bases["image"]
        picture[:, loud] *= 4.0
        rows = np.concatenate([text, picture]).astype(np.float32) * 0.4
        kinds = np.repeat(np.array([0, 2], np.uint8), lengths)
        samples.append(CalibrationSample(f"{place}", kinds, rows.copy))
    return CalibrationSet(tuple(samples), f"{seed} {text_only}", {})


def _outputs(
    checkpoint: Checkpoint, source: QuantizedSource | None, prompts: CalibrationSet
) -> torch.Tensor:
    """Hidden states behind the last layer, all prompts together."""
    text = checkpoint.dims.text
    rope = Rope.of(text, 128)
    hidden = [torch.from_numpy(sample.embed()) for sample in prompts.samples]
    for layer in range(text.num_hidden_layers):

        def tensor(name: str, layer: int = layer) -> torch.Tensor | None:
            full = f"language_model.layers.{layer}.{name}"
            if source is not None and name.removesuffix(".weight") in LINEARS:
                return torch.from_numpy(source.linear(full.removesuffix(".weight")).dequantize())
            if full not in checkpoint.tensors:
                return None
            return torch.from_numpy(checkpoint.read(full)).float()

        block = DecoderLayer(text, 0, tensor)
        hidden = [block.forward(rows, rope) for rows in hidden]
    return torch.cat(hidden)


def test_shares_of_kinds_are_part_of_the_request(checkpoint: Checkpoint, tmp_path: Path) -> None:
    samples = calibration_set(96)
    even = quantize_language_model(checkpoint, tmp_path / "a", _INT4, samples)
    only_text = replace(_INT4, shares=KindShares(1.0, 0.0, 0.0, 0.0))
    text = quantize_language_model(checkpoint, tmp_path / "b", only_text, samples)
    errors = [store.report["layers"][0]["error_by_kind"] for store in (even, text)]
    assert errors[1]["text"] < errors[0]["text"]
    assert errors[1]["tile"] > errors[0]["tile"]


def test_rows_solved_by_several_threads_are_those_of_one(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava_edge.convert.util.parallel._ELEMENTS_AT_A_TIME", 1)
    monkeypatch.setattr("llava_edge.convert.util.parallel._FEWEST_ROWS", 24)
    samples = calibration_set(96)
    several = quantize_language_model(
        checkpoint, tmp_path / "a", replace(_INT4, threads=2), samples
    )
    one = quantize_language_model(checkpoint, tmp_path / "b", _INT4, samples)
    for name in (linear_name(layer, linear) for layer in range(3) for linear in LINEARS):
        # The factorisation itself may differ in its last bits.
        same = several.linear(name).qweight == one.linear(name).qweight
        assert same.mean() > 0.98
