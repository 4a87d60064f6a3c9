"""The check on a GPU, as far as it can be shown without one: the way, the sums and the tables."""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_edge.bench.common.results_store import Ledger
from llava_edge.bench.common.subprocess_runner import edge_command, run_fresh
from llava_edge.bench.lab.gpu import check as gpu_check
from llava_edge.bench.lab.gpu import requirements as gpu_needs
from llava_edge.bench.lab.gpu import steps as gpu_steps
from llava_edge.bench.lab.gpu.card import copy_rate
from llava_edge.bench.lab.gpu.check import Runner
from llava_edge.bench.lab.gpu.kernels import LAYOUTS, kernel_sizes, product_model, weight_bytes
from llava_edge.bench.lab.gpu.models import GPU_MODELS, PRECISIONS, GpuModel
from llava_edge.bench.lab.gpu.parity import compare
from llava_edge.bench.lab.gpu.round import largest_session
from llava_edge.bench.lab.gpu.steps import CARD, GpuStep
from llava_edge.bench.lab.gpu.steps import gpu_steps as all_steps
from llava_edge.bench.lab.gpu.table import gpu_tables
from llava_edge.bench.lab.gpu.workspace import GpuPlace, with_int8_cache
from llava_edge.bench.speed.run import SpeedSettings
from llava_edge.convert.testing.random_spec import preset
from llava_edge.profiles.boards.nvml import GpuReport
from llava_edge.profiles.errors import EngineError, RequestError
from llava_edge.profiles.models.model_dims import ModelDims
from llava_edge.profiles.models.parameters import total_parameters
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.backends.cuda_options import CudaOptions
from llava_edge.runtime.backends.cuda_runtime import CudaRuntime
from llava_edge.runtime.backends.onnxruntime import Session, SessionOptions
from tests.support.fake_cudart import MOVE, FakeCudart, install

TINY = GPU_MODELS["tiny"]


@pytest.mark.nightly
def test_the_way_goes_through_with_the_cpu_provider(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llava_edge.bench.lab.gpu.check", "--device", "cpu"]
    command += ["--models", "tiny", "--precisions", "fp16", "int4", "--work", str(tmp_path)]
    found = run_fresh(command).result()

    assert found["failed"] == found["missing"] == []
    entries = found["entries"]
    assert entries["tiny fp16 parity"]["same"] == 4
    assert entries["tiny fp16 parity"]["logits_gap"] <= entries["tiny fp16 parity"]["logits_bound"]
    for precision in ("fp16", "int4"):
        coded = entries[f"tiny {precision} cache = int8, parity"]
        assert (coded["cache"], coded["prompts"]) == ("int8", 4)
        assert coded["logits_gap"] != entries[f"tiny {precision} parity"]["logits_gap"]
        timed = entries[f"tiny {precision} cache = int8"]
        assert (timed["cache"], timed["cases"][0]["name"]) == ("int8", "text")
    # Of random weights at int4 quantising loses more than the bound, which does not speak of it.
    coded = entries["tiny fp16 cache = int8, parity"]
    assert coded["logits_gap"] <= coded["logits_bound"]
    cases = {case["name"]: case for case in entries["tiny fp16 round 0"]["cases"]}
    reference = {c["name"]: c for c in entries["tiny transformers round 0"]["cases"]}
    assert {"text", "1 image", "3 images", "text 1,024"} <= set(cases)
    for name, case in cases.items():
        assert reference[name]["prompt_tokens"] == case["prompt_tokens"]
    left = {folder.name for folder in (tmp_path / "cpu/tiny").iterdir() if folder.is_dir()}
    assert not left, "artifacts are removed behind the last step"

    started = time.perf_counter()
    again = run_fresh(command).result()
    assert again["entries"] == entries, "what is measured is not measured again"
    assert time.perf_counter() - started < 60


def test_a_command_is_found_by_the_interpreter() -> None:
    assert run_fresh(edge_command("--version")).stdout.startswith("llava-edge ")


def test_what_takes_too_long_is_ended_with_what_it_started(tmp_path: Path) -> None:
    noted = tmp_path / "pid"
    child = f"import os, time; open({str(noted)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    started = time.perf_counter()

    with pytest.raises(subprocess.TimeoutExpired):
        run_fresh([sys.executable, "-c", parent], timeout_seconds=3.0)

    assert time.perf_counter() - started < 30
    pid = int(noted.read_text())
    # Nobody of this test waits for it: anyone who adopts it may take a moment.
    deadline = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(pid)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_command_in_time_is_not_ended() -> None:
    assert run_fresh([sys.executable, "-c", "print(3)"], timeout_seconds=60.0).result() == 3


@pytest.fixture
def runner(tmp_path: Path) -> Callable[..., tuple[Runner, Ledger]]:
    def make(seconds: float = 1000.0, **changes: Any) -> tuple[Runner, Ledger]:
        ledger = Ledger(tmp_path / "gpu.json")
        place = GpuPlace(tmp_path, "cpu", "a100", time.monotonic() + seconds)
        return Runner(place, ledger, **{"again": False, "keep": False, **changes}), ledger

    return make


def step(name: str, ran: list[str], error: Exception | None = None, **more: Any) -> GpuStep:
    def act(place: GpuPlace, entries: Any) -> dict[str, Any]:
        ran.append(name)
        if error is not None:
            raise error
        return {"value": len(ran)}

    return GpuStep(name, act, **more)


def test_a_step_that_fails_is_noted_and_the_next_one_runs(
    runner: Callable[..., tuple[Runner, Ledger]],
) -> None:
    ran: list[str] = []
    errors = [EngineError("no such kernel"), KeyError("device"), subprocess.TimeoutExpired("x", 1)]
    steps = [step(str(n), ran, error) for n, error in enumerate(errors)] + [step("last", ran)]
    first, ledger = runner()
    first.run(steps)

    assert ran == ["0", "1", "2", "last"]
    assert ledger.entries["0"]["error"] == "no such kernel"
    assert "needs the step 'device'" in ledger.entries["1"]["error"]
    assert "took longer than" in ledger.entries["2"]["error"]
    assert ledger.entries["last"]["value"] == 4


def test_what_is_done_is_skipped_and_what_failed_comes_last(
    runner: Callable[..., tuple[Runner, Ledger]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    steps = [step("bad", ran, EngineError("x")), step("good", ran)]
    runner()[0].run(steps)
    ran.clear()
    runner()[0].run([*steps, step("new", ran)])
    assert ran == ["new", "bad"]

    ran.clear()
    changed = step("good", ran, settings={"cuda": {"graph": True}})
    runner()[0].run([changed])
    assert ran == ["good"], "it is another measurement"
    ran.clear()
    monkeypatch.setattr(gpu_check, "_device_name", lambda _: "NVIDIA H200")
    runner()[0].run([changed])
    assert ran == ["good"], "it is another device"
    ran.clear()
    runner(again=True)[0].run([changed])
    assert ran == ["good"]


def test_nothing_is_made_for_a_device_that_does_not_work(
    runner: Callable[..., tuple[Runner, Ledger]],
) -> None:
    ran: list[str] = []
    steps = [step(CARD, ran, EngineError("no libcublasLt.so.13")), step("large", ran)]
    runner()[0].run(steps)
    runner()[0].run(steps)
    assert ran == [CARD, CARD], "and it is tried again before anything else"

    ran.clear()
    runner()[0].run([step(CARD, ran), step("large", ran)])
    assert ran == [CARD, "large"]


def test_what_a_machine_lacks_is_said_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_needs, "find_spec", lambda name: None if "onnx" in name else object())
    monkeypatch.setattr(gpu_needs, "available_devices", lambda: ("cpu",))
    monkeypatch.setattr(gpu_needs, "read_gpus", GpuReport)

    assert gpu_check.main(["--work", str(tmp_path), "--results", str(tmp_path / "r")]) == 2

    said = json.loads(capsys.readouterr().out)["error"]["message"]
    for part in ("package onnx, ", "package onnx_ir, ", "CUDA provider", "NVIDIA GPU"):
        assert part in said
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_needs.missing("cpu") == []
    asked = ['torch>=2.6; extra == "convert"', "numpy>=1.26", 'av>=14; extra == "video"']
    there = {"torch": "2.11.0+cu130", "numpy": "1.9"}
    monkeypatch.setattr(gpu_needs, "requires", lambda _: asked)
    monkeypatch.setattr(gpu_needs, "version", there.__getitem__)
    assert gpu_needs.missing("cpu") == ["numpy 1.26 or newer (1.9 is there)"]
    there |= {"torch": "2.5.9", "numpy": "1.26.0"}
    assert gpu_needs.missing("cpu") == ["torch 2.6 or newer (2.5.9 is there)"]


def test_every_package_that_is_imported_is_asked_for() -> None:
    folders = Path(gpu_check.__file__).parents[3]
    own = {"llava_edge", *sys.stdlib_module_names}
    # Of other commands: files of configuration before Python 3.11, a peer, videos.
    own |= {"tomli", "gptqmodel", "onnxruntime"}
    found = set()
    for half in ("profiles", "runtime", "convert", "bench"):
        for source in (folders / half).rglob("*.py"):
            for node in ast.walk(ast.parse(source.read_text("utf-8"))):
                if isinstance(node, ast.Import):
                    found |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    found.add(node.module.partition(".")[0])
    assert found - own == {*gpu_needs.PACKAGES}


def test_no_step_is_begun_or_noted_when_the_time_is_over(
    runner: Callable[..., tuple[Runner, Ledger]],
) -> None:
    ran: list[str] = []
    late, ledger = runner(seconds=1.0)
    late.run([step("late", ran)])
    assert (ran, dict(ledger.entries)) == ([], {})

    just, ledger = runner(seconds=gpu_check._LEAST_SECONDS + 0.3)

    def act(place: GpuPlace, entries: Any) -> dict[str, Any]:
        time.sleep(0.5)
        raise subprocess.TimeoutExpired("x", 1)

    just.run([GpuStep("cut short", act)])
    assert dict(ledger.entries) == {}, "it gets the next visit's time"


def test_models_are_removed_when_no_step_needs_them(
    runner: Callable[..., tuple[Runner, Ledger]], tmp_path: Path
) -> None:
    for part in ("checkpoint", "fp16"):
        (tmp_path / "tiny" / part).mkdir(parents=True)
    ran: list[str] = []
    there: list[list[str]] = []

    def act(place: GpuPlace, entries: Any) -> dict[str, Any]:
        there.append(sorted(folder.name for folder in (tmp_path / "tiny").iterdir()))
        return {}

    both = step("first", ran, model=TINY, parts=("checkpoint", "fp16"))
    runner()[0].run([both, GpuStep("second", act, TINY, ("fp16",)), GpuStep("third", act)])

    assert there == [["fp16"], []]


def test_steps_ask_for_what_there_is() -> None:
    steps = all_steps(list(GPU_MODELS.values()), PRECISIONS)
    names = [each.name for each in steps]

    assert len({*names}) == len(names)
    assert names[0] == CARD
    # A wrong answer is known before anything large is made.
    assert names[1] == "pages fp16 parity"
    for each in steps:
        settings = dict(each.settings)
        CudaOptions(**settings.get("cuda", {}))
        SpeedSettings(**settings)
        assert {*each.parts} <= {"checkpoint", *PRECISIONS, *map(with_int8_cache, PRECISIONS)}


def test_an_int8_cache_is_measured_beside_the_float16_one_of_every_precision() -> None:
    models = [GPU_MODELS[name] for name in ("pages", "7b", "13b")]
    steps = {each.name: each for each in all_steps(models, PRECISIONS)}

    coded = {name: step for name, step in steps.items() if "cache = int8" in name}
    assert {*coded} == {
        f"{model} {precision} cache = int8{what}"
        for model in ("pages", "7b")
        for precision in PRECISIONS
        for what in ("", ", parity")
    }
    for name, each in coded.items():
        assert each.settings["cache"] == "int8"
        assert with_int8_cache(name.split()[1]) in each.parts
    # Nothing waits for it, and no precision's own artifact does so on the disk.
    names = [*steps]
    first = names.index("7b fp16 cache = int8, parity")
    assert all("7b" not in name or "cache = int8" in name for name in names[first:])


def test_an_artifact_with_an_int8_cache_lies_apart_and_calibrates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = GpuPlace(tmp_path, "cpu", "a100", time.monotonic() + 100)
    for part in ("checkpoint", "calibration"):
        for model in ("tiny", "pages"):
            (tmp_path / model / part).mkdir(parents=True)
    asked: list[Sequence[str]] = []

    class Made:
        seconds, peak_bytes = 1.0, 1

    monkeypatch.setattr(place, "run", lambda command, _: asked.append(command) or Made())
    part = with_int8_cache("fp16")
    folder = place.artifact(TINY, part, 10.0)
    plain = place.artifact(TINY, "fp16", 10.0)
    place.artifact(GPU_MODELS["pages"], part, 10.0)

    assert folder != plain
    assert {"tiny fp16", f"tiny {part}", f"pages {part}"} == {*place.made}
    first, second, third = (" ".join(command) for command in asked)
    assert f"{folder} --profile a100 --precision fp16 --cache int8" in first
    assert first.endswith("--verify none --samples 1 --json")
    assert "--cache" not in second
    assert "--samples" not in second
    assert "--cache int8" in third
    assert f"--calibration {tmp_path / 'pages' / 'calibration'}" in third
    assert "--verify" not in third


def test_a_round_is_asked_as_its_step_says() -> None:
    settings = SpeedSettings(
        strict_device=True, contexts=(64,), prefill_chunk=32, cuda={"graph": True}
    )
    arguments = settings.arguments()
    assert arguments[arguments.index("--contexts") + 1] == "64"
    assert arguments[arguments.index("--prefill-chunk") + 1] == "32"
    assert json.loads(arguments[arguments.index("--cuda") + 1]) == {"graph": True}
    assert "--strict-device" in arguments


@pytest.mark.parametrize("name", ["7b", "13b", "34b"])
def test_sizes_on_disk_are_told_before_anything_is_written(name: str, tmp_path: Path) -> None:
    model = GPU_MODELS[name]
    dims = ModelDims.from_config(preset("tiny", **model.sizes).config(5))
    assert model.parameters == pytest.approx(total_parameters(dims), rel=0.03)

    huge = GpuModel("huge", {**model.sizes, "layers": 100_000})
    place = GpuPlace(tmp_path, "cpu", "a100", time.monotonic() + 10)
    with pytest.raises(RequestError, match=r"checkpoint of huge takes about .* GiB; .* free"):
        place.checkpoint(huge, 10.0)


def test_a_command_that_fails_says_why(tmp_path: Path) -> None:
    place = GpuPlace(tmp_path, "cpu", "a100", time.monotonic() + 100)
    with pytest.raises(EngineError, match="there is no artifact at"):
        place.edge("verify", tmp_path / "nothing", "--on-device", bound=60.0)


def test_the_limit_leaves_out_what_lies_outside_and_a_refusal_is_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = GpuPlace(tmp_path, "cpu", "a100", time.monotonic() + 100)
    (tmp_path / "tiny/fp16").mkdir(parents=True)
    (tmp_path / "tiny/fp16/manifest.json").touch()
    terms = {"kv_cache_bytes": 300, "driver_context_bytes": 200, "decoder_weights_bytes": 500}
    terms |= {"vision_tower_bytes": 90, "vision_activations_bytes": 10, "pixel_values_bytes": 7}
    planned = {"device_bytes": 1107, "terms": terms}
    entries = {
        "device": {"bandwidth_bytes_per_second": 1e12},
        "tiny fp16 round 0": {"predicted_memory": planned},
    }
    asked: list[Any] = []

    def measured(*given: Any) -> dict[str, Any]:
        asked.append(given[-1]["cuda"])
        if len(asked) > 1:
            raise EngineError("memory ran out while opening model.onnx")
        return {"cases": []}

    monkeypatch.setattr(gpu_steps, "measured_round", measured)
    limited = {s.name: s for s in all_steps([TINY], ["fp16"]) if "limit" in s.name}
    runs = limited["tiny fp16 limit = plan"].act(place, entries)
    refused = limited["tiny fp16 limit = 0.9 plan"].act(place, entries)

    assert asked == [{"memory_limit_bytes": 500}, {"memory_limit_bytes": 450}]
    assert (runs["answered"], refused["answered"]) == (True, False)
    assert "memory ran out" in refused["said"]
    # A tower that takes more than the decoder is what the limit has to hold.
    assert largest_session({**planned, "terms": {**terms, "vision_tower_bytes": 550}}) == 560


@pytest.fixture(scope="module")
def tiny(
    make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]
) -> tuple[Path, Path]:
    checkpoint = make_checkpoint("tiny", **TINY.sizes)
    wishes = {"context_tokens": TINY.context, "cache": "int8"}
    return checkpoint, make_artifact(checkpoint, profile="a100", **wishes)


def test_answers_are_compared_with_those_of_transformers(tiny: tuple[Path, Path]) -> None:
    from llava_edge.bench.lab.gpu.reference import Reference

    checkpoint, artifact = tiny
    reference = Reference(checkpoint, "cpu")
    kept: dict[str, Any] = {}
    for number, (image, question) in enumerate(TINY.questions()):
        ids, rows = reference.answer(image, question, TINY.answer_tokens)
        assert rows.shape == (len(ids), 512)
        np.testing.assert_array_equal(rows.argmax(axis=1), ids)
        kept |= {f"ids {number}": np.array(ids), f"logits {number}": rows}
    with LlavaEdge.load(artifact, "cpu", allow_slow=True) as model:
        found = compare(model, TINY, kept)
        spoilt = {**kept, "ids 1": kept["ids 1"].copy(), "logits 2": kept["logits 2"] + 0}
        spoilt["ids 1"][2] += 1
        spoilt["logits 2"][3, 5] += 4.0
        worse = compare(model, TINY, spoilt)
    with LlavaEdge.load(artifact, "cpu", allow_slow=True, cache="int8") as model:
        coded = compare(model, TINY, kept)

    assert (found["prompts"], found["same"]) == (4, 4)
    assert found["logits_gap"] <= found["logits_bound"]
    assert found["same_largest_logit"] == 1.0
    # Codes lose more than float16 does, and are allowed what they may lose.
    assert (found["cache"], coded["cache"]) == ("float16", "int8")
    assert found["logits_gap"] < coded["logits_gap"] <= coded["logits_bound"]
    assert coded["logits_bound"] > found["logits_bound"]
    assert worse["same"] == 3
    assert worse["differing"][0]["prompt"] == 1
    assert worse["differing"][0]["position"] == 2
    assert worse["logits_gap"] > worse["logits_bound"]


def test_the_reference_is_asked_prompts_of_the_same_length(tiny: tuple[Path, Path]) -> None:
    from llava_edge.bench.lab.gpu.reference import Reference

    reference = Reference(tiny[0], "cpu")
    case = {"name": "x", "height": 224, "width": 224, "answer_tokens": 3}
    for count, tokens in ((0, 70), (2, 300)):
        found = reference.measure({**case, "num_images": count, "prompt_tokens": tokens}, 0)
        assert found["prompt_tokens"] == tokens
        assert found["ttft_seconds"] > 0
        assert found["decode_tokens_per_second"] > 0


def test_memory_of_the_reference_counts_what_the_driver_took_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava_edge.bench.lab.gpu import reference as gpu_reference

    class Nothing:
        measure = staticmethod(lambda case, number: {"name": case["name"]})

    cases = tmp_path / "cases.json"
    cases.write_text('[{"name": "text"}]')
    monkeypatch.setattr(gpu_reference.torch.cuda, "mem_get_info", lambda: (60, 100))
    listed: list[int | None] = [None, 30]
    monkeypatch.setattr(gpu_reference, "process_bytes", lambda _: listed.pop(0))
    options = argparse.Namespace(cases=cases, round=0, device="cuda")
    made: Any = Nothing()
    found = [gpu_reference._time(made, options)["peak_memory"]["device_bytes"] for _ in range(2)]
    assert found == [40, 30]


def test_bandwidth_counts_what_is_read_and_what_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cudart = FakeCudart()
    install(monkeypatch, cudart, None)
    ticks = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))

    # One second a pass by that clock: ten copies of 1,000 bytes, read and written.
    assert copy_rate(CudaRuntime(cudart), 1000) == 20_000
    assert cudart.copied(MOVE) == 5 * 10 * 1000


@pytest.mark.parametrize("layout", LAYOUTS)
def test_products_are_those_of_their_layout(layout: str) -> None:
    import onnx

    columns, outputs = 256, 64
    model = onnx.load_from_string(product_model(layout, columns, outputs, 3))
    held = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    bits, block, _ = LAYOUTS[layout]
    if block:
        codes = held["w1"].reshape(outputs, -1)
        if bits == 4:
            codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(outputs, -1)
        scales = np.repeat(held["s1"].astype(np.float32), block, axis=1)
        weight = (codes.astype(np.float32) - 2 ** (bits - 1)) * scales
    else:
        weight = held["w1"].astype(np.float32).T
    x = np.random.default_rng(0).normal(0, 1, (2, columns)).astype(np.float16)
    session = Session.from_bytes(model.SerializeToString(), Path(), SessionOptions())

    (found,) = session.run({"x": x}, ["y1"])

    wanted = x.astype(np.float32) @ weight.T
    assert np.abs(found - wanted).max() <= 0.02 * np.abs(wanted).max()
    assert weight_bytes(layout, columns, outputs) == sum(
        held[name].nbytes for name in held if name.endswith("1")
    )


def test_layers_have_the_sizes_of_the_model() -> None:
    sizes = kernel_sizes(GPU_MODELS["7b"].sizes)
    assert sizes["qkv"] == (4096, 4096 + 2 * 1024)
    assert sizes["down"] == (14336, 4096)


def entry(rate: float, peak: int, planned: int, cases: Sequence[str]) -> dict[str, Any]:
    each = {
        "ttft_seconds": 0.25,
        "decode_tokens_per_second": rate,
        "roofline_fraction": 0.8,
        "degraded": [],
    }
    return {
        "peak_memory": {"host_bytes": 1, "device_bytes": peak},
        "predicted_memory": {"device_bytes": planned, "terms": {}},
        "cases": [{"name": name, **each} for name in cases],
    }


def test_the_table_sets_figures_beside_transformers_and_the_plan() -> None:
    gib = 1 << 30
    cases = ("text", "1 image", "3 images, base", "text 1,024")
    entries = {
        "7b transformers round 0": entry(20.0, 16 * gib, 0, cases),
        "7b fp16 round 0": entry(50.0, 15 * gib, 15 * gib + 5, cases),
        "7b fp16 round 1": entry(60.0, 15 * gib, 15 * gib + 5, cases),
        "7b int4 round 0": entry(110.0, 6 * gib, 5 * gib, cases),
        "7b int8 round 0": {"error": "it took longer than 300 s"},
        "7b fp16 cache = int8": entry(40.0, 14 * gib, 14 * gib + 5, cases),
        "7b fp16 cache = int8, parity": {
            **{"same": 3, "prompts": 4, "logits_gap": 0.02, "logits_bound": 0.2}
        },
        "7b fp16 graph": entry(99.0, 15 * gib, 15 * gib, cases),
        "7b int4 limit = 0.9 plan": {"limit_bytes": gib, "answered": False, "said": "memory"},
    }

    table = gpu_tables([GPU_MODELS["7b"]], PRECISIONS, entries)

    rows = {line.split("|")[1].strip(): line for line in table.splitlines() if line[:1] == "|"}
    cells = [cell.strip() for cell in table.splitlines()[5].split("|")]
    assert cells[1:7] == ["fp16", "", "", "15.00", "15.00", "yes"]
    assert cells[7:16] == ["0.250", "0.250", "0.250", "55.0", "", "80%", "2.75", "1.00", ""]
    assert "| 6.00 | 5.00 | NO |" in table
    said = "| fp16, cache = int8 | 3 of 4 | 2.0e-02 / 2.0e-01 | 14.00 | 14.00 | yes |"
    assert f"{said} 0.250 | 0.250 | 0.250 | 40.0 |  | 80% | 2.00 | 0.73 |" in table
    assert "| fp16 | cache = int8 | 0.250 | 0.250 | 40.0 |  | 14.00 |" in table
    assert "| 110.0 |  | 80% | 5.50 | 2.00 |" in table
    assert "int8" not in rows
    assert "| fp16 | graph | 0.250 | 0.250 | 99.0 |  | 15.00 |" in table
    assert "| int4 | limit = 0.9 plan | 1.00 | refused: memory |" in table
