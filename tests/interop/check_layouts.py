"""Which names each release of transformers gives the tensors of what it saves.

    .venv/bin/python -m tests.interop.check_layouts [RELEASE…]

Installs the newest patch of every minor release from 4.39 on, one at a time, below
``build/layouts`` and beside the torch of this interpreter; runs ``save_layouts.py`` in it; and
writes what it found to ``tests/data/saved_layouts.json``. Releases that are given on the command
line are found anew, the others are kept. Exit 1 where a release cannot be installed, or loads
something else than it saved, unless the data say so already.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from tests.support import saved_layouts
from tests.support.saved_layouts import CANONICAL, DATA, NUMBERS

BUILD = Path("build/layouts")
FIRST = (4, 39)
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
_VOLATILE = {"transformers_version", "_name_or_path"}


def newest_patches() -> list[str]:
    """The newest patch of every minor release that the package index offers, oldest first."""
    command = [*PIP, "index", "versions", "transformers"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    newest: dict[tuple[int, int], int] = {}
    for found in re.finditer(r"\b(\d+)\.(\d+)\.(\d+)(?=,|\s|$)", listed.split("versions:")[1]):
        major, minor, patch = map(int, found.groups())
        newest[major, minor] = max(patch, newest.get((major, minor), 0))
    return [f"{a}.{b}.{patch}" for (a, b), patch in sorted(newest.items()) if (a, b) >= FIRST]


def save_with(release: str, source: Path, saved: Path) -> dict[str, str]:
    """Install a release, let it save everything, and return its report."""
    site = BUILD / "site"
    shutil.rmtree(site, ignore_errors=True)
    shutil.rmtree(saved, ignore_errors=True)
    saved.mkdir(parents=True)
    # pip warns that this interpreter's own packages want other versions; they are not touched.
    subprocess.run(
        [
            *PIP,
            "install",
            "--quiet",
            "--no-compile",
            "--target",
            str(site),
            f"transformers=={release}",
        ],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("save_layouts.py")), str(source), str(saved)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"},
    )
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["release"] == release, answer["release"]
    return dict(answer["report"])


def stored_names(folder: Path) -> list[str | None]:
    """Names in the order of ``CANONICAL``; a tensor is known by the number it is filled with.

    A release that does not see that the head is the embedding table draws a head of its own, which
    is known by its name alone.
    """
    names: dict[str, str] = {}
    canonical = {number: name for name, number in NUMBERS.items()}
    for file in sorted(folder.glob("*.safetensors")):
        for stored, array in load_file(file).items():
            numbers = set(array.reshape(-1).tolist())
            number = numbers.pop() if len(numbers) == 1 else None
            if number not in canonical and stored.endswith("lm_head.weight"):
                number = NUMBERS["lm_head.weight"]
            if number not in canonical:
                raise ValueError(f"{stored} in {file} is none of the tensors that were loaded")
            if canonical[number] in names:
                raise ValueError(f"{stored} and {names[canonical[number]]} are one tensor")
            names[canonical[number]] = stored
    index = folder / "model.safetensors.index.json"
    if index.exists():
        listed = json.loads(index.read_text())["weight_map"].keys()
        if listed != set(names.values()):
            raise ValueError(f"{index} names {sorted(listed ^ set(names.values()))} besides")
    return [names.get(name) for name in CANONICAL]


def without_volatile(document: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what says nothing of the model."""
    return {
        key: without_volatile(value) if isinstance(value, dict) else value
        for key, value in document.items()
        if key not in _VOLATILE
    }


def index_of(value: Any, values: list[Any]) -> int:
    """Where ``value`` stands; it is appended where it does not."""
    if value not in values:
        values.append(value)
    return values.index(value)


def main() -> int:
    """Find the names of all releases, or of those that were given."""
    data = json.loads(DATA.read_text()) if DATA.exists() else {}
    data = {"canonical": list(CANONICAL), "configs": [], "names": [], "releases": {}, **data}
    source, saved = BUILD / "source", BUILD / "saved"
    shutil.rmtree(source, ignore_errors=True)
    saved_layouts.write_all(source)
    failed = False
    for release in sys.argv[1:] or newest_patches():
        try:
            report = save_with(release, source, saved)
        except subprocess.CalledProcessError as error:
            print(f"{release}: {(error.stderr or str(error)).strip()[-500:]}", flush=True)
            failed = True
            continue
        known, found = data["releases"].get(release, {}), {}
        for form, outcome in report.items():
            folder = saved / form
            if not (folder / "config.json").exists():
                found[form] = [None, None, outcome]
                continue
            try:
                names = index_of(stored_names(folder), data["names"])
            except ValueError as error:
                names, outcome = None, str(error)
            document = without_volatile(json.loads((folder / "config.json").read_text()))
            found[form] = [index_of(document, data["configs"]), names, outcome]
        strange = {form: value for form, value in found.items() if value[2] != "loads"}
        failed |= any(known.get(form) != value for form, value in strange.items())
        print(f"{release}: {len(found)} forms, strange: {strange or 'none'}", flush=True)
        data["releases"][release] = found
        keep(data)
    shutil.rmtree(BUILD / "site", ignore_errors=True)
    return int(failed)


def keep(data: dict[str, Any]) -> None:
    """Write the data, releases in order."""
    order = sorted(data["releases"], key=lambda release: [int(part) for part in release.split(".")])
    data["releases"] = {release: data["releases"][release] for release in order}
    DATA.write_text(json.dumps(data, indent=None, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    sys.exit(main())
