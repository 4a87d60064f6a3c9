"""The packages that are built are those that users run, and the wheel holds them whole."""

from __future__ import annotations

import tomllib
import zipfile
from pathlib import Path
from typing import Any

from tests.support.wheel import FOLDERS, ROOT, build_wheel

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
    wheel = build_wheel(tmp_path)

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
