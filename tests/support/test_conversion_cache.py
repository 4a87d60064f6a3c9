"""Artifacts are converted once for all processes, kept in bounds, and nobody changes them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from llava_edge.convert.planning.request import ConvertRequest
from llava_edge.convert.quantization.plan import QuantizationRequest
from tests.support.conversion_cache import ROOT, ConversionCache, describe, digest_sources


def write(entry: Path) -> None:
    (entry / "artifact").mkdir()
    (entry / "artifact" / "model").write_text("made")


def never(entry: Path) -> None:
    raise AssertionError(f"{entry} is built again")


def test_a_later_run_finds_what_was_built(tmp_path: Path) -> None:
    made = ConversionCache(tmp_path, "now").get("a", write)

    assert ConversionCache(tmp_path, "now").get("a", never) == made
    assert (made / "artifact" / "model").read_text() == "made"


@pytest.mark.parametrize(("sources", "description"), [("later", "a"), ("now", "b")])
def test_other_sources_and_other_requests_are_built_anew(
    tmp_path: Path, sources: str, description: str
) -> None:
    ConversionCache(tmp_path, "now").get("a", write)

    with pytest.raises(AssertionError, match="built again"):
        ConversionCache(tmp_path, sources).get(description, never)


def test_nothing_stays_of_what_could_not_be_built(tmp_path: Path) -> None:
    def torn(entry: Path) -> None:
        write(entry)
        raise RuntimeError("halfway")

    cache = ConversionCache(tmp_path, "now")
    with pytest.raises(RuntimeError, match="halfway"):
        cache.get("a", torn)

    assert cache.get("a", write).is_dir()


def test_what_a_killed_process_left_is_built_anew(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path\n"
        "from tests.support.conversion_cache import ConversionCache\n"
        "def build(entry): (entry / 'torn').touch(); os._exit(9)\n"
        "ConversionCache(Path(sys.argv[1]), 'now').get('a', build)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False)
    assert done.returncode == 9

    made = ConversionCache(tmp_path, "now").get("a", write)

    assert [path.name for path in made.iterdir()] == ["artifact"]


def test_processes_side_by_side_build_once(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path\n"
        "from tests.support.conversion_cache import ConversionCache\n"
        "def build(entry):\n"
        "    with open(sys.argv[2], 'a') as log: log.write('built\\n')\n"
        "    time.sleep(0.3); (entry / 'artifact').mkdir()\n"
        "print(ConversionCache(Path(sys.argv[1]), 'now').get('a', build))"
    )
    log = tmp_path / "log"
    run = [sys.executable, "-c", code, str(tmp_path / "cache"), str(log)]
    children = [subprocess.Popen(run, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(3)]
    made = {child.communicate(timeout=60)[0] for child in children}

    assert log.read_text() == "built\n"
    assert len(made) == 1


@pytest.mark.parametrize("change", ["content", "time", "new", "gone"])
def test_a_changed_artifact_is_named_once_and_built_anew_by_the_next_run(
    tmp_path: Path, change: str
) -> None:
    cache = ConversionCache(tmp_path, "now")
    made = cache.get("a", write)
    path = made / "artifact" / "model"
    assert cache.changed() == []

    if change == "content":
        path.write_text("more")
    elif change == "time":
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    elif change == "new":
        path = path.with_name("other")
        path.touch()
    else:
        path.unlink()

    assert cache.changed() == [str(path)]
    assert cache.changed() == []
    again = ConversionCache(tmp_path, "now").get("a", write)
    assert [path.name for path in (again / "artifact").iterdir()] == ["model"]
    assert (again / "artifact" / "model").read_text() == "made"


def test_a_change_that_no_run_saw_is_built_anew_as_well(tmp_path: Path) -> None:
    made = ConversionCache(tmp_path, "now").get("a", write)
    (made / "artifact" / "model").write_text("more")

    assert ConversionCache(tmp_path, "now").get("a", write) == made
    assert (made / "artifact" / "model").read_text() == "made"


def test_artifacts_of_former_sources_are_removed_but_for_those_in_use(tmp_path: Path) -> None:
    kept = [ConversionCache(tmp_path, "in use")]
    for name in ("old", "older", "last"):
        # Not kept: its lock goes with it.
        os.close(ConversionCache(tmp_path, name)._in_use)
        time.sleep(0.01)
    kept.append(ConversionCache(tmp_path, "now"))

    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {"in use", "last", "now"}


def test_a_conversion_is_described_by_all_that_its_bytes_depend_on(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("tiny")
    request = ConvertRequest(str(checkpoint), verify="none")

    assert describe(replace(request, out=tmp_path)) == describe(request)
    assert describe(replace(request, verify="quick")) != describe(request)
    assert describe(replace(request, checkpoint=str(make_checkpoint("odd")))) != describe(request)
    # A repr with an address in it would never be found again.
    assert " at 0x" not in describe(request)
    assert len(digest_sources()) == 16

    calibration = replace(request, quantization=QuantizationRequest(calibration=checkpoint))
    with pytest.raises(ValueError, match="no digest covers"):
        describe(calibration)


def test_a_cached_conversion_is_the_artifact_of_its_request(
    make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]
) -> None:
    artifact = make_artifact(make_checkpoint("tiny"))

    assert (artifact / "manifest.json").is_file()
    assert not (artifact.parent / "artifact.partial").exists()
    assert artifact.is_relative_to(ROOT / "build" / "test-cache")
