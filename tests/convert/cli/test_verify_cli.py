"""``llava-edge verify`` as a user types it."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_edge.convert.cli import verify as verify_cli
from llava_edge.runtime.artifact import hashing as digests
from llava_edge.runtime.artifact import open as artifact_module
from llava_edge.runtime.artifact.open import Artifact, open_artifact
from llava_edge.runtime.cli import main as cli
from llava_edge.runtime.util.opened_file import OpenedFile
from llava_edge.runtime.verification.golden.probes import GoldenProbe

HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "safetensors", "jinja2", "huggingface_hub")

PROGRAM = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {heavy}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name.split(".")[0])

sys.meta_path.insert(0, Absent())
from llava_edge.runtime.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "llava-edge" / "on-device"


@pytest.fixture(scope="module")
def plain(make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]) -> Path:
    return make_artifact(make_checkpoint("odd", backbone="mistral"))


@pytest.fixture(scope="module")
def probes(
    plain: Path,
    make_checkpoint: Callable[..., Path],
    reference_probes: Callable[..., tuple[GoldenProbe, ...]],
) -> tuple[GoldenProbe, ...]:
    return reference_probes(
        make_checkpoint("odd", backbone="mistral"), open_artifact(plain).manifest
    )


@pytest.fixture
def make_golden(
    plain: Path, probes: tuple[GoldenProbe, ...], with_golden: Callable[..., Path], tmp_path: Path
) -> Callable[..., Path]:
    def make(*, of: tuple[GoldenProbe, ...] = probes) -> Path:
        return with_golden(plain, tmp_path / "artifact", of, open_artifact(plain).manifest)

    return make


def test_a_sound_artifact_passes_on_this_machine(
    make_golden: Callable[..., Path], own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = make_golden()
    names = {path for path in artifact.rglob("*")}

    assert cli.main(["verify", str(artifact), "--on-device", "--json"]) == 0

    output = capsys.readouterr()
    (line,) = output.out.splitlines()
    found = json.loads(line)
    assert (found["passed"], found["verdict"]) == (True, "pass")
    assert found["host"]["provider"] == "CPUExecutionProvider"
    assert found["stages"][0]["name"] == "prompt"
    assert "max_gap_of_range" in output.err
    assert "passed" in output.err
    assert "kept in" in output.err
    # Kept for this user, and nothing of it in the artifact.
    assert len(list(own_cache.iterdir())) == 1
    assert {path for path in artifact.rglob("*")} == names


def test_without_json_stdout_stays_empty(
    make_golden: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", str(make_golden()), "--on-device"]) == 0
    assert capsys.readouterr().out == ""


def test_it_runs_without_torch_transformers_and_onnx(
    make_golden: Callable[..., Path], tmp_path: Path
) -> None:
    program = PROGRAM.format(heavy=set(HEAVY))
    command = ["verify", str(make_golden()), "--on-device", "--json"]

    done = subprocess.run(
        [sys.executable, "-c", program, *command],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["passed"] is True


def test_against_a_checkpoint_without_torch_ends_in_the_install_command(
    plain: Path, tmp_path: Path
) -> None:
    program = PROGRAM.format(heavy=set(HEAVY))

    done = subprocess.run(
        [sys.executable, "-c", program, "verify", str(plain), "--against", "owner/name"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )

    assert done.returncode == 1
    assert "pip install 'llava-edge[convert]'" in done.stderr
    assert "--on-device" in done.stderr


@pytest.mark.parametrize(("fault", "verdict"), [(True, "fail"), (False, "inconclusive")])
def test_what_did_not_pass_ends_with_1_and_says_which(
    make_golden: Callable[..., Path],
    probes: tuple[GoldenProbe, ...],
    capsys: pytest.CaptureFixture[str],
    fault: bool,
    verdict: str,
) -> None:
    wrong = dataclasses.replace(probes[0], logits=probes[0].logits + 1)
    # One prompt alone has too few positions for its tokens to prove anything.
    artifact = make_golden(of=(wrong, probes[1]) if fault else probes[:1])

    assert cli.main(["verify", str(artifact), "--on-device", "--json"]) == 1

    output = capsys.readouterr()
    found = json.loads(output.out.splitlines()[-1])
    assert (found["passed"], found["verdict"]) == (False, verdict)
    said = "failed: prefill_logits, decode_logits" if fault else "inconclusive: greedy"
    assert said in " ".join(output.err.split())


def test_a_malformed_golden_file_is_named(
    make_golden: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = make_golden()
    data = bytearray((artifact / "golden.safetensors").read_bytes())
    data[20] ^= 1
    (artifact / "golden.safetensors").write_bytes(data)

    assert cli.main(["verify", str(artifact), "--on-device"]) == 1

    assert "golden.safetensors is damaged" in capsys.readouterr().err


def test_without_golden_prompts_it_says_what_to_do(
    plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", str(plain), "--on-device", "--json"]) == 1
    assert "--against" in json.loads(capsys.readouterr().out)["error"]["message"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--against"),
        (["--on-device", "--against", "x"], "not allowed with"),
        (["--against", "x", "--verify", "none"], "is none of quick, full"),
        (["--on-device", "--verify", "full"], "Leave it out"),
        (["--on-device", "--threads", "-1"], "no whole number of at least 0"),
    ],
)
def test_a_malformed_request_ends_with_2(
    plain: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(["verify", str(plain), *arguments, "--json"]) == 2

    output = capsys.readouterr()
    assert message in output.err
    assert "error" in json.loads(output.out.splitlines()[-1])


@pytest.mark.parametrize(("given", "mode"), [([], "quick"), (["--verify", "full"], "full")])
def test_against_hands_over_what_was_asked_and_the_artifact_opened(
    plain: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], mode: str
) -> None:
    asked: list[tuple[argparse.Namespace, Artifact]] = []
    command = types.ModuleType(verify_cli._AGAINST)

    def main_against(options: argparse.Namespace, artifact: Artifact) -> int:
        asked.append((options, artifact))
        return 1

    command.main_against = main_against  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, verify_cli._AGAINST, command)

    code = cli.main(["verify", str(plain), "--against", "owner/name", *given, "--json"])

    ((options, artifact),) = asked
    assert code == 1
    assert (options.against, options.mode, options.json) == ("owner/name", mode, True)
    assert artifact.folder == plain.resolve()


@pytest.mark.parametrize("way", [["--on-device"], ["--against", "EMPTY"]])
def test_both_ways_hash_every_file_anew(
    make_golden: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    way: list[str],
) -> None:
    artifact = make_golden()
    hashed: list[Path] = []
    real = digests._hash

    def spy(opened: OpenedFile, *rest: Any) -> str:
        hashed.append(opened.path)
        return real(opened, *rest)

    # Files that were written a moment ago are remembered as well.
    eager = functools.partial(digests.DigestCache, settle_seconds=0)
    monkeypatch.setattr(artifact_module, "DigestCache", eager)
    open_artifact(artifact)  # fills the cache of digests
    monkeypatch.setattr(digests, "_hash", spy)
    open_artifact(artifact)
    assert hashed == []

    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    cli.main(["verify", str(artifact), *(str(empty) if word == "EMPTY" else word for word in way)])

    files = json.loads((artifact / "manifest.json").read_text())["files"]
    # Graphs are hashed as the bytes that are kept of them.
    listed = {name for name in files if not name.endswith(".onnx")} | {"manifest.json"}
    assert {path.relative_to(artifact).as_posix() for path in hashed} == listed
