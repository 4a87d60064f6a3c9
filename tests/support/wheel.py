"""The wheel, built from a copy of the tree, since a build leaves folders behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("profiles", "runtime", "convert", "bench")


def build_wheel(folder: Path) -> Path:
    """Build it into an empty folder, by the packages of this environment."""
    tree = folder / "tree"
    tree.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "llava-next-pages", "results")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--disable-pip-version-check"]
    env = {**os.environ, "PYTHONWARNINGS": "ignore"}
    subprocess.run([*command, "--wheel-dir", str(folder), str(tree)], check=True, env=env)
    (wheel,) = folder.glob("*.whl")
    return wheel
