import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_edge.bench.common.results_store import Ledger
from llava_edge.bench.common.subprocess_runner import run_fresh
from llava_edge.bench.lab.conversion import run as convert_bench
from llava_edge.bench.lab.conversion.estimate import _peak_bytes, column_blocks, larger_models
from llava_edge.bench.lab.conversion.memory import MemoryStep, measure_conversion, write_checkpoint
from llava_edge.bench.lab.conversion.peer import OURS, THEIRS, holds, summary
from llava_edge.bench.lab.conversion.peer_judge import Judge, read_candidate
from llava_edge.bench.lab.conversion.peer_model import plant
from llava_edge.bench.lab.conversion.peer_prompts import (
    calibration_digest,
    draw_prompts,
    write_word_tokenizer,
)
from llava_edge.bench.lab.conversion.table import estimate_table, memory_table, peer_table
from llava_edge.convert.checkpoint.open import open_checkpoint
from llava_edge.convert.checkpoint.quantized.source import LINEARS, RtnSource, linear_name
from llava_edge.convert.cli.convert import main as convert_main
from llava_edge.convert.quantization import plan as quantization
from llava_edge.convert.quantization.export_hf import write_hf_gptq
from llava_edge.convert.quantization.gptq.hessian import plan_hessian
from llava_edge.convert.quantization.gptq.settings import QuantizeSettings
from llava_edge.profiles.errors import RequestError

MIB = 1 << 20
SMALL = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 600}


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_peak_and_time_are_those_of_the_process_that_was_run() -> None:
    looks: list[float] = []
    small = run_fresh(python("print('{}')"))
    code = "import time; kept = bytearray(300 << 20); time.sleep(1.2); print('{\"a\": 1}')"
    spent = run_fresh(python(code), look=looks.append)
    assert spent.result() == {"a": 1}
    assert 290 * MIB < spent.peak_bytes - small.peak_bytes < 310 * MIB
    assert spent.seconds > 1.2
    assert looks == sorted(looks)
    assert len(looks) >= 2


def test_what_is_added_to_the_environment_reaches_the_command() -> None:
    code = "import os; print(os.environ['OMP_NUM_THREADS'])"
    assert run_fresh(python(code), {"OMP_NUM_THREADS": "7"}).result() == 7


def test_a_command_that_fails_is_an_error() -> None:
    with pytest.raises(subprocess.CalledProcessError, match="status 3"):
        run_fresh(python("raise SystemExit(3)"))


@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
@pytest.mark.slow
def test_a_conversion_is_measured_and_leaves_nothing_behind(tmp_path: Path, quantizer: str) -> None:
    step = MemoryStep(quantizer, quantizer, 2, 1 << 30, ("--samples", "2"))
    found = measure_conversion(step, SMALL, tmp_path / "work", lambda _: None)
    assert not (tmp_path / "work").exists()
    assert 100 * MIB < found["peak_bytes"] <= 1 << 30
    assert found["holds"]
    assert 0 < found["seconds_per_layer"] < found["seconds"]
    assert (found["layers"], found["resumed"]) == (2, False)
    if quantizer == "gptq":
        assert found["samples"] == 2
        assert found["tokens_total"] == sum(found["tokens"].values()) > 0
        assert found["solver_peak_bytes"] <= found["peak_bytes"]
        pairs = zip(found["relative_error"], found["rtn_relative_error"], strict=True)
        assert all(ours < rounded for ours, rounded in pairs)
    assert f"| {found['peak_bytes'] / 2**30:.2f} |" in memory_table({quantizer: found})


@pytest.mark.slow
def test_a_bound_that_is_exceeded_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(convert_bench, "MISTRAL_7B", SMALL)
    steps = {"rtn": MemoryStep("rtn", "rtn", 2, 99 * MIB)}
    monkeypatch.setattr(convert_bench, "MEMORY_STEPS", steps)
    results = tmp_path / "results.json"
    arguments = ["--only", "rtn", "--work", str(tmp_path / "work"), "--results", str(results)]
    assert convert_bench.main([*arguments, "--json"]) == 1
    assert "| NO |" in capsys.readouterr().err
    # Measured once: the second call only reads the ledger, so it needs no work folder.
    monkeypatch.setattr(convert_bench, "measure_conversion", None)
    assert convert_bench.main([*arguments, "--json"]) == 1
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads(results.read_text("utf-8"))
    assert printed["rtn"]["machine"]["cores"] >= 1


def test_a_ledger_keeps_other_entries(tmp_path: Path) -> None:
    path = tmp_path / "results" / "a.json"
    Ledger(path).put("one", {"holds": True})
    Ledger(path).put("two", {"holds": False})
    again = Ledger(path)
    assert again.entries["one"]["holds"] is True
    assert again.entries["two"]["holds"] is False
    assert again.get("three") is None


@pytest.mark.parametrize("columns", [4096, 14336, 16384, 16512, 20480, 29568, 49152])
def test_the_arithmetic_cuts_hessians_as_a_conversion_does(columns: int) -> None:
    plan = plan_hessian(columns, QuantizeSettings(4, 128).hessian_bytes)
    blocks = column_blocks(columns)
    assert (blocks, _peak_bytes(columns, blocks)) == (len(plan.edges) - 1, plan.num_bytes)


def test_larger_models_grow_from_the_measured_one() -> None:
    measured = {"tokens_total": 7000, "peak_bytes": 4 << 30, "seconds_per_layer": 100.0}
    yi, qwen = larger_models(measured)
    assert (yi["layers"], yi["blocks"], qwen["layers"], qwen["blocks"]) == (60, 2, 80, 6)
    assert 100.0 < yi["seconds_per_layer"] < qwen["seconds_per_layer"]
    assert yi["hours"] == pytest.approx(yi["seconds_per_layer"] / 60)
    assert measured["peak_bytes"] < yi["peak_bytes"] < qwen["peak_bytes"]
    assert "| llava-v1.6-34b | 60 | 2 |" in estimate_table([yi, qwen])


@pytest.fixture
def words(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    write_checkpoint(folder, {**SMALL, "layers": 2}, lambda _: None)
    write_word_tokenizer(folder / "tokenizer.json", SMALL["vocab_size"])
    return folder


def test_prompts_have_exactly_so_many_ids_and_follow_from_their_seed(words: Path) -> None:
    first, second, other = (
        draw_prompts(words / "tokenizer.json", 3, 50, seed) for seed in (0, 0, 1)
    )
    assert [len(prompt.ids) for prompt in first] == [50, 50, 50]
    assert first == second
    assert first != other
    assert len({prompt.ids[0] for prompt in first}) == 1


def test_a_conversion_calibrates_with_the_very_ids_that_the_peer_gets(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava_edge.bench.lab.conversion.peer_prompts import write_conversations

    seen: list[str] = []

    def stop(*arguments: Any, **_: Any) -> None:
        seen.append(arguments[3].digest)
        raise RequestError("seen")

    monkeypatch.setattr(quantization, "quantize_language_model", stop)
    prompts = draw_prompts(words / "tokenizer.json", 16, 40, 0)
    write_conversations(tmp_path / "questions", prompts)
    options = ["--profile", "cpu-16gb", "--precision", "int4", "--no-template"]
    questions = ["--calibration", str(tmp_path / "questions")]
    with pytest.raises(RequestError, match="seen"):
        convert_main([str(words), str(tmp_path / "out"), *options, *questions])
    assert seen == [calibration_digest(prompts)]
    assert seen != [calibration_digest(prompts[::-1])]


def test_planted_models_are_loud_in_some_channels_and_as_large_as_before() -> None:
    draw = torch.Generator().manual_seed(0)
    tensors = {
        "language_model.model.embed_tokens.weight": torch.randn(500, 200, generator=draw).half(),
        "language_model.model.layers.0.mlp.up_proj.weight": torch.randn(
            300, 200, generator=draw
        ).half(),
    }
    planted = plant(tensors, 0)
    table, weight = planted.values()
    columns = table.float().norm(dim=0)
    assert int((columns > 5 * columns.median()).sum()) == 2
    assert weight.dtype == torch.float16
    before = tensors["language_model.model.layers.0.mlp.up_proj.weight"].float()
    assert weight.float().norm() == pytest.approx(float(before.norm()), rel=1e-3)
    assert (weight.float().norm(dim=1) > 4 * weight.float().norm(dim=1).median()).sum() == 3


@pytest.fixture
def llama(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """The language model of a small checkpoint alone, and its codes as ``gptq`` inside."""
    from safetensors.torch import load_file, save_file

    source = make_checkpoint("tiny", backbone="llama", hidden_size=128, intermediate_size=256)
    folder = tmp_path / "llama"
    (folder / "gptq").mkdir(parents=True)
    tensors = load_file(source / "model.safetensors")
    prefix = "language_model."
    alone = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    save_file(alone, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())["text_config"]
    config["architectures"] = ["LlamaForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(source)
    write_hf_gptq(folder / "gptq", checkpoint, RtnSource(checkpoint, 4, 32))
    return folder


def test_the_judge_reads_codes_and_measures_from_the_definition(
    llama: Path, make_checkpoint: Callable[..., Path]
) -> None:
    source = make_checkpoint("tiny", backbone="llama", hidden_size=128, intermediate_size=256)
    checkpoint = open_checkpoint(source)
    rounded = RtnSource(checkpoint, 4, 32)
    candidate = read_candidate(llama / "gptq")
    assert set(candidate) == {f"layers.{n}.{name}" for n in range(2) for name in LINEARS}
    for name, weight in candidate.items():
        expected = rounded.linear(f"language_model.{name}").dequantize()
        assert weight.numpy().tobytes() == expected.tobytes()
    judge = Judge(llama)
    judge.check(candidate)
    prompts = [[1, 7, 30, 44, 8], [1, 9, 9, 120]]
    exact = {
        name: torch.from_numpy(checkpoint.read(f"language_model.{name}.weight")).float()
        for name in candidate
    }
    with torch.no_grad():
        nothing = judge.linears(prompts, {"same": exact})["same"]
        found = judge.linears(prompts, {"rounded": candidate})["rounded"]
        both = judge.whole(prompts, {"rounded": candidate, "same": exact})
    whole, same = both["rounded"], both["same"]
    assert set(nothing.values()) == {0.0}
    assert (same["layers"], same["logits"]) == ([0.0, 0.0], 0.0)
    # The first layer reads normed embeddings, so its error can be written down.
    table = torch.from_numpy(checkpoint.read("language_model.embed_tokens.weight")).float()
    gain = torch.from_numpy(checkpoint.read("language_model.layers.0.input_layernorm.weight"))
    rows = table[torch.tensor([token for prompt in prompts for token in prompt])]
    rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + 1e-5) * gain.float()
    name = linear_name(0, "self_attn.q_proj").removeprefix("language_model.")
    lost = (rows @ (exact[name] - candidate[name]).T).square().sum()
    assert found[name] == pytest.approx(float(lost / (rows @ exact[name].T).square().sum()), 1e-4)
    assert 0 < whole["layers"][0] < whole["changes"][0]
    assert len(whole["layers"]) == 2
    assert whole["logits"] > 0


def test_a_candidate_of_another_model_is_refused(llama: Path) -> None:
    candidate = read_candidate(llama / "gptq")
    del candidate["layers.1.mlp.up_proj"]
    with pytest.raises(SystemExit, match="not those of the model"):
        Judge(llama).check(candidate)


def _judged(ours: float, theirs: float, seconds: float, peak: int) -> dict[str, Any]:
    def found(error: float) -> dict[str, Any]:
        linears = {"layers.0.a.b": error, "layers.1.a.b": 3 * error}
        return {"linears": linears, "layers": [error], "changes": [error], "logits": error}

    both = {OURS: found(ours), THEIRS: found(theirs)}
    runs = [{"seconds": 10.0, "peak_bytes": 100}] * 2
    return {
        "judged": summary({"calibration": both, "held out": both}),
        "runs": {OURS: [{"seconds": seconds, "peak_bytes": peak}] * 2, THEIRS: runs},
    }


@pytest.mark.parametrize(
    ("ours", "seconds", "peak", "verdict"),
    [
        pytest.param(0.01, 9.0, 99, True, id="as good, faster, smaller"),
        pytest.param(0.0101, 9.0, 99, False, id="a larger error"),
        pytest.param(0.01, 10.0, 99, False, id="as slow"),
        pytest.param(0.01, 9.0, 100, False, id="as large"),
    ],
)
def test_the_verdict_wants_error_time_and_memory(
    ours: float, seconds: float, peak: int, verdict: bool
) -> None:
    entry = _judged(ours, 0.01, seconds, peak)
    assert holds(entry) is verdict
    assert entry["judged"]["calibration"][OURS]["linears"] == pytest.approx(2 * ours)
    assert entry["judged"]["calibration"][OURS]["by_linear"] == {"b": pytest.approx(2 * ours)}
    assert f"| {OURS} | {2 * ours:.5f} |" in peer_table(entry)
