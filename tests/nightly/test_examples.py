"""The examples of the documentation, against an installed wheel, outside the repository."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llava_edge.convert.cli.convert import main as convert
from tests.support.videos import encoded, moving
from tests.support.wheel import ROOT, build_wheel

EXAMPLES = ROOT / "docs" / "examples"
PAGES = ROOT / "bench" / "lab" / "pages" / "llava-next-pages"
VERSIONS = ("3.11", "3.12", "3.13")
pytestmark = pytest.mark.nightly


def interpreter(version: str) -> str | None:
    """A Python of this release, of the path or of pyenv."""
    if sys.version_info[:2] == tuple(map(int, version.split("."))):
        return sys.executable
    known = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    return str(known[-1]) if known else shutil.which(f"python{version}")


PYTHONS = [version for version in VERSIONS if interpreter(version)]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("example") / "artifact"
    code = convert(
        [str(PAGES), str(out), "--profile", "cpu-16gb", "--precision", "fp16", "--verify", "none"]
    )
    assert code == 0
    return out


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module", params=PYTHONS)
def python(
    request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A fresh environment with the wheel alone and what the examples name."""
    folder = tmp_path_factory.mktemp("env")
    own = interpreter(request.param)
    assert own is not None
    run([own, "-m", "venv", str(folder)], folder)
    found = folder / "bin" / "python"
    command = [str(found), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*command, f"{wheel}[cpu,video]", "fastapi", "uvicorn", "mypy"], folder)
    return found


def run(command: list[str], folder: Path, **env: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        command,
        cwd=folder,
        env={**clean, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **env},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder: the examples and some pictures."""
    for example in EXAMPLES.glob("*.py"):
        shutil.copy(example, tmp_path)
    (tmp_path / "pictures").mkdir()
    from PIL import Image

    Image.new("RGB", (90, 60), "red").save(tmp_path / "pictures" / "red.png")
    (tmp_path / "pictures" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return tmp_path


def test_quickstart_answers(python: Path, artifact: Path, folder: Path) -> None:
    said = run(
        [str(python), "quickstart.py", str(artifact), "pictures/red.png", "How many bars?"], folder
    )

    assert said.strip()


def test_a_folder_is_answered_and_a_torn_picture_is_named(
    python: Path, artifact: Path, folder: Path
) -> None:
    said = run([str(python), "batch_folder.py", str(artifact), "pictures", "What is it?"], folder)

    rows = [json.loads(line) for line in said.splitlines()]
    assert [row["image"] for row in rows] == ["red.png", "torn.png"]
    assert rows[0]["answer"]
    assert "error" not in rows[0]
    assert "torn.png" in rows[1]["error"]


def test_frames_are_answered_in_turn(python: Path, artifact: Path, folder: Path) -> None:
    (folder / "clip.mp4").write_bytes(encoded(moving(6)))

    said = run(
        [str(python), "camera_loop.py", str(artifact), "clip.mp4", "What is it?", "--every", "2"],
        folder,
    )

    assert said.splitlines()[0].startswith("frame 0: ")


def test_the_service_answers_and_refuses(python: Path, artifact: Path, folder: Path) -> None:
    with service(python, artifact, folder) as address:
        good = (folder / "pictures" / "red.png").read_bytes()
        asked = urllib.request.Request(f"{address}/ask?question=What%20is%20it", data=good)
        with urllib.request.urlopen(asked, timeout=60) as response:
            answer = response.read().decode()
        bad = urllib.request.Request(f"{address}/ask?question=What", data=b"no picture")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(bad, timeout=60)
        refused.value.close()

    assert answer.strip()
    assert refused.value.code == 422


@contextmanager
def service(python: Path, artifact: Path, folder: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "LLAVA_EDGE_ARTIFACT": str(artifact)}
    command = [str(python), "-m", "uvicorn", "fastapi_app:app", "--port", str(port)]
    with subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.DEVNULL) as process:
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(120):
                try:
                    urllib.request.urlopen(f"{address}/docs", timeout=5).close()
                    break
                except OSError:
                    assert process.poll() is None
                    time.sleep(0.5)
            yield address
        finally:
            process.terminate()


def test_types_check_for_users(python: Path, folder: Path) -> None:
    examples = ["quickstart.py", "batch_folder.py", "camera_loop.py", "fastapi_app.py"]

    said = run([str(python), "-m", "mypy", "--strict", *examples], folder)

    assert "Success" in said
