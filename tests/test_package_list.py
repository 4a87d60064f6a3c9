"""The packages that are built are those that users run, and the wheel holds them whole."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDERS = ("profiles", "runtime", "convert", "bench")
LAB = ROOT / "bench" / "lab"


def settings() -> Any:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]


def test_every_package_of_the_tree_is_listed_for_the_build() -> None:
    found = [
        ".".join(("llava_edge", *file.parent.relative_to(ROOT).parts))
        for folder in FOLDERS
        for file in (ROOT / folder).rglob("__init__.py")
        # The project's own measurements are run in a checkout.
        if LAB not in file.parents
    ]
    assert sorted(settings()["packages"]) == sorted(found)


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {file.parent for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")}
    assert [str(f) for f in sorted(folders) if not (f / "__init__.py").is_file()] == []


def test_the_wheel_holds_what_users_run_and_nothing_else(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in (*FOLDERS, "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "llava-next-pages", "results")
            shutil.copytree(source, tree / name, ignore=ignored)
        else:
            shutil.copy(source, tree)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--disable-pip-version-check"]
    env = {**os.environ, "PYTHONWARNINGS": "ignore"}
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(tree)], check=True, env=env)
    (wheel,) = tmp_path.glob("*.whl")

    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entries,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
        commands = archive.read(entries).decode()

    modules = {
        f"llava_edge/{file.relative_to(ROOT)}"
        for folder in FOLDERS
        for file in (ROOT / folder).rglob("*.py")
        if LAB not in file.parents
    }
    data = names - modules
    assert modules <= names
    assert {Path(name).suffix for name in data} == {".toml", ".json", ".css", ".typed"}
    assert not [name for name in names if not name.startswith("llava_edge/")]
    for command_name in ("bench", "convert", "doctor", "plan", "run", "verify"):
        assert f"{command_name} = " in commands
