"""Load, save and load again small checkpoints with the release of transformers on the path.

Runs beside one release at a time, without this project's packages; ``check_layouts.py`` calls it::

    python save_layouts.py CHECKPOINTS SAVED

``CHECKPOINTS`` holds checkpoint folders whose tensors are each filled with a number of their own.
Every one of them that the release has a class for is saved under ``SAVED`` in each form that the
release offers. Prints one JSON object: the release, and per form whether it loaded again with the
same numbers.
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

SAFE = {"trust_remote_code": False, "local_files_only": True}

SHARD = "40KB"
"""Less than the weights of the small checkpoints have, more than their largest tensor."""


def forms(model: Any) -> dict[str, dict[str, Any]]:
    """Arguments of ``save_pretrained`` by the name of the form."""
    found: dict[str, dict[str, Any]] = {"whole": {}, "sharded": {"max_shard_size": SHARD}}
    if "save_original_format" in inspect.signature(model.save_pretrained).parameters:
        found["in-memory"] = {"save_original_format": False}
    return found


def loads(kind: Any, folder: Path, model: Any) -> bool:
    """Whether the folder opens to the values of ``model``."""
    again = kind.from_pretrained(folder, **SAFE).state_dict()
    expected = model.state_dict()
    return expected.keys() == again.keys() and all(
        torch.equal(value, again[name]) for name, value in expected.items()
    )


def attempt(report: dict[str, str], name: str, check: Any) -> None:
    """Note how a check ended; whatever a release raises is a finding, not a fault of this run."""
    try:
        report[name] = "loads" if check() else "loads with other values"
    except Exception as error:
        report[name] = f"{type(error).__name__}: {error}"[:300]


def main() -> None:
    """Save every checkpoint in every form."""
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    report: dict[str, str] = {}
    for folder in sorted(source.iterdir()):
        config = json.loads((folder / "config.json").read_text())
        kind = getattr(transformers, config["architectures"][0], None)
        if kind is None:
            continue
        try:
            model = kind.from_pretrained(folder, **SAFE)
        except Exception as error:
            report[folder.name] = f"{type(error).__name__}: {error}"[:300]
            continue
        for form, arguments in forms(model).items():
            name = f"{folder.name}-{form}"

            def saved_and_loaded(
                model: Any = model, kind: Any = kind, name: str = name, how: Any = arguments
            ) -> bool:
                model.save_pretrained(target / name, **how)
                return loads(kind, target / name, model)

            attempt(report, name, saved_and_loaded)
    print(json.dumps({"release": transformers.__version__, "report": report}))


if __name__ == "__main__":
    main()
