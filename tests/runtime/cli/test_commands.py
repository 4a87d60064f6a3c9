"""The commands as a user types them: exit codes, messages, what is left on disk."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from llava_edge.runtime.cli import main as cli

PROGRAM = Path(sys.executable).with_name("llava-edge")


@pytest.fixture
def checkpoint(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint of one's own, to be damaged."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(make_checkpoint("odd", backbone="mistral"), folder)
    return folder


@pytest.fixture(scope="module")
def artifact(make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]) -> Path:
    return make_artifact(make_checkpoint("odd", backbone="mistral"))


def assert_nothing_written(folder: Path, out: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert out.name not in names
    assert not any(name.startswith(out.name) for name in names)


def test_convert_and_run_give_one_json_object_as_last_line(
    checkpoint: Path, picture: Image.Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, image = tmp_path / "artifact", tmp_path / "picture.png"
    picture.save(image)

    command = ["convert", str(checkpoint), str(out), "--profile", "cpu-16gb", "--json"]
    assert cli.main(command) == 0
    converted = json.loads(capsys.readouterr().out.splitlines()[-1])
    question = ["--prompt", "What?", "--image", str(image), "--max-new-tokens", "3"]
    code = cli.main(["run", str(out), *question, "--json"])
    output = capsys.readouterr()
    answered = json.loads(output.out)

    assert code == 0
    assert converted["artifact"] == str(out)
    assert converted["plan"]["max_image_tokens"] == converted["plan"]["max_tiles"] * 25 + 10
    assert set(answered) == {
        "text",
        "token_ids",
        "prompt_tokens",
        "image_tokens",
        "video_tokens",
        "finish_reason",
        "timings",
        "peak_memory",
        "device",
        "engine",
        "degraded",
        "notes",
        "off_device",
        "other_engines",
        "reused_tokens",
        "draft_tokens",
        "accepted_tokens",
    }
    assert len(answered["token_ids"]) == 3
    assert answered["text"] in output.err
    assert (out / "README.md").read_text("utf-8").startswith("# checkpoint, fp16, for cpu-16gb")


def test_run_streams_the_answer_to_stdout(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main(["run", str(artifact), "--prompt", "Hello", "--max-new-tokens", "5"])

    output = capsys.readouterr()
    assert code == 0
    assert output.out.endswith("\n")
    assert "first token after" in output.err


def test_flags_of_run_decide_what_pictures_are_read(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ramp = Image.fromarray(np.tile(np.linspace(0, 65535, 300).astype(np.uint16), (200, 1)))
    path = tmp_path / "scan.tif"
    ramp.save(path)
    ask = ["run", str(artifact), "--prompt", "Hi", "--image", str(path), "--max-new-tokens", "1"]
    formats = ["--image-formats", "png,tiff"]

    assert cli.main(ask) == 2
    assert "--image-formats" in capsys.readouterr().err
    assert cli.main([*ask, *formats, "--max-image-pixels", "59999"]) == 2
    assert "60000 pixels are more than 59999 (max_image_pixels" in capsys.readouterr().err
    assert cli.main([*ask, *formats, "--json"]) == 0
    output = capsys.readouterr()
    (note,) = json.loads(output.out)["notes"]
    assert "scan.tif" in note
    assert "16-bit values were scaled" in note
    assert note in output.err
    assert cli.main([*ask, *formats, "--high-bit-depth", "clip", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == []
    assert cli.main([*ask, "--image-formats", "heic"]) == 2
    assert "image_formats holds HEIC; readable are JPEG" in capsys.readouterr().err


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def missing_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["language_model.model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path)


def not_finite(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["language_model.model.layers.0.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, path)


def unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["model_type"] = "mamba"
    (folder / "config.json").write_text(json.dumps(config))


def other_filter(folder: Path) -> None:
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if path.exists():
            path.write_text(path.read_text().replace('"resample": 3', '"resample": 2'))


@pytest.mark.parametrize(
    ("damage", "code", "message"),
    [
        pytest.param(pickle_only, 2, "never read", id="pickle"),
        pytest.param(truncated, 2, "model.safetensors", id="truncated shard"),
        pytest.param(missing_tensor, 2, "layers.1.mlp.up_proj.weight", id="missing tensor"),
        pytest.param(not_finite, 2, "layers.0.mlp.up_proj.weight", id="nan weight"),
        pytest.param(unknown_architecture, 2, "'mamba'", id="unknown architecture"),
        pytest.param(other_filter, 2, "only bicubic", id="another filter"),
    ],
)
def test_a_checkpoint_that_cannot_be_kept_is_refused_and_nothing_is_written(
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    code: int,
    message: str,
) -> None:
    damage(checkpoint)
    out = tmp_path / "artifact"

    assert cli.main(["convert", str(checkpoint), str(out), "--json"]) == code

    output = capsys.readouterr()
    assert message in output.err
    assert "Traceback" not in output.err
    assert message in json.loads(output.out.splitlines()[-1])["error"]["message"]
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--profile", "toaster"], "toaster", id="unknown profile"),
        pytest.param(["--grid", "7x7"], "7x7", id="unknown grid"),
        pytest.param(["--pinpoints", "71x70"], "71x70", id="pinpoints off the tile"),
        pytest.param(["--grid", "2x2", "--pinpoints", "70x70"], "pinpoints were both", id="both"),
        pytest.param(["--context", "9999999"], "positions", id="context beyond the model"),
        pytest.param(["--engine", "tensorrt-rtx"], "engine tensorrt-rtx", id="engine without GPU"),
        pytest.param(["--model", "llava-v1.6-34b"], "both given", id="checkpoint and model"),
        pytest.param(["--out", "IN"], "lies inside the checkpoint", id="out inside"),
        pytest.param(["--vram", "1MiB"], "Nearest|smaller", id="too little memory"),
        pytest.param(["--context", "20"], "20", id="context below one image"),
    ],
)
def test_a_wrong_option_is_refused_and_nothing_is_written(
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    out = tmp_path / "artifact"
    inside = str(checkpoint / "artifact")
    named = [inside if argument == "IN" else argument for argument in arguments]

    assert cli.main(["convert", str(checkpoint), str(out), *named]) == 2

    assert re.search(message, capsys.readouterr().err)
    assert_nothing_written(tmp_path, out)


def test_without_a_checkpoint_the_plan_names_one_and_an_unreachable_hub_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing listens on port 9 of this machine.
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    out = tmp_path / "artifact"

    def timed(*arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
        started = time.monotonic()
        command = [str(PROGRAM), "convert", "--profile", "a100", *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path
        )
        return done, time.monotonic() - started

    # A busy machine takes long to begin; that is no part of looking for the hub.
    refused, beginning = timed(str(tmp_path / "nothing"))
    assert refused.returncode == 2, refused.stderr
    done, seconds = timed("--model", "llava-v1.6-mistral-7b")

    assert done.returncode == 1, done.stderr
    assert seconds - beginning < 20
    assert "a100 takes llava-v1.6-mistral-7b at fp16" in done.stderr
    assert "CHECKPOINT=" in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()
    assert not (tmp_path / "artifacts").exists()


def test_an_existing_output_is_kept_unless_forced(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "artifact"
    command = ["convert", str(checkpoint), str(out), "--verify", "none"]
    assert cli.main(command) == 0
    before = (out / "manifest.json").read_bytes()

    assert cli.main([*command, "--context", "1024"]) == 2
    assert "--force" in capsys.readouterr().err
    assert (out / "manifest.json").read_bytes() == before

    assert cli.main([*command, "--context", "1024", "--force"]) == 0
    assert json.loads((out / "manifest.json").read_bytes())["context_tokens"] == 1024


@pytest.mark.slow
def test_a_full_disk_leaves_no_artifact_and_the_same_command_resumes(
    checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "artifact"
    command = [str(PROGRAM), "convert", str(checkpoint), str(out)]

    def limit() -> None:
        # The vision part is below this, the decoder's weights are above it.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))

    failed = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, check=False)
    left = out.exists()
    resumed = subprocess.run(command, capture_output=True, text=True, check=False)

    assert failed.returncode == 1, failed.stderr
    assert "Traceback" not in failed.stderr
    assert "error: " in failed.stderr
    assert "Make room" in failed.stderr
    assert not left
    assert resumed.returncode == 0, resumed.stderr
    assert (out / "manifest.json").is_file()
    assert not (tmp_path / "artifact.partial").exists()


@pytest.mark.parametrize("name", ["decoder/weights.bin", "vision/model.onnx", "tokenizer.json"])
def test_an_artifact_with_one_byte_changed_is_refused(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)

    assert cli.main(["run", str(copy), "--prompt", "Hello"]) == 1

    assert name in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--prompt", ""], "empty", id="empty prompt"),
        pytest.param(["--prompt", "word " * 4000], "context holds", id="too long"),
        pytest.param(["--prompt", "<image> <image>", "--image", "P"], "marks", id="marks"),
        pytest.param(["--prompt", "Hi", "--image", "T"], "notes.txt", id="text file as image"),
        pytest.param(["--prompt", "Hi", "--image", "missing.png"], "missing.png", id="no file"),
        pytest.param(["--prompt", "Hi", "--temperature", "-1"], "temperature", id="sampling"),
    ],
)
def test_a_wrong_question_ends_in_one_clear_message(
    artifact: Path,
    picture: Image.Image,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    files = {"P": tmp_path / "picture.png", "T": tmp_path / "notes.txt"}
    picture.save(files["P"])
    files["T"].write_text("no picture")
    named = [str(files.get(argument, argument)) for argument in arguments]

    assert cli.main(["run", str(artifact), *named, "--max-new-tokens", "2"]) == 2

    output = capsys.readouterr()
    errors = [line for line in output.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_an_unknown_command_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cook"]) == 2

    assert "  convert " in capsys.readouterr().err


def test_malformed_arguments_still_give_one_json_object(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", str(artifact), "--json"]) == 2

    output = capsys.readouterr()
    assert json.loads(output.out)["error"]["type"] == "UsageError"
    assert "--prompt" in output.err


def test_a_fault_of_ours_keeps_to_the_contract_of_exit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = EntryPoint("run", "math:sqrt", cli.GROUP)
    monkeypatch.setattr(cli, "entry_points", lambda group: [entry])

    assert cli.main(["run", "--json"]) == 1

    output = capsys.readouterr()
    assert json.loads(output.out)["error"]["type"] == "InternalError"
    assert "LLAVA_EDGE_TRACEBACK" in output.err
    monkeypatch.setenv("LLAVA_EDGE_TRACEBACK", "1")
    with pytest.raises(TypeError):
        cli.main(["run"])


def test_a_terminal_that_is_not_utf8_shows_a_stand_in(artifact: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [str(PROGRAM), "run", str(artifact), "--prompt", "hello", "--max-new-tokens", "30"]

    done = subprocess.run(command, capture_output=True, env=environment, check=False)

    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()


def test_help_and_version_are_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    assert "  run " in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("llava-edge ")


def test_a_missing_extra_ends_in_the_install_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = EntryPoint("convert", "a_package_that_is_not_there:main", cli.GROUP)
    monkeypatch.setattr(cli, "entry_points", lambda group: [entry])

    assert cli.main(["convert"]) == 1

    assert "pip install 'llava-edge[convert]'" in capsys.readouterr().err


def test_an_artifact_that_is_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", str(tmp_path / "nothing"), "--prompt", "Hi"]) == 1

    assert "nothing" in capsys.readouterr().err
