"""``python -m llava_edge.convert.testing.random_cli PRESET FOLDER``: write a random checkpoint.

For measurements: speed and memory do not depend on the values of weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from llava_edge.convert.testing.random_checkpoint import write_random_checkpoint
from llava_edge.convert.testing.random_outliers import plant_outliers
from llava_edge.convert.testing.random_spec import RandomSpec, preset
from llava_edge.profiles.errors import LlavaEdgeError, RequestError


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description="Write a LLaVA-NeXT checkpoint of random weights.")
    parser.add_argument("preset", help="tiny, odd or demo")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--outliers", action="store_true", help="channels 20 to 60 times as loud in the tower"
    )
    options = parser.parse_args(argv)
    try:
        changes = dict(_change(text) for text in options.set)
        write_random_checkpoint(options.folder, preset(options.preset, **changes), options.seed)
        if options.outliers:
            plant_outliers(options.folder, options.seed)
    except (LlavaEdgeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, LlavaEdgeError) else 2
    return 0


def _change(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    fields = {field.name: field for field in dataclasses.fields(RandomSpec)}
    if name not in fields or not value:
        raise RequestError(
            f"--set {text!r} is no FIELD=VALUE of a random checkpoint; fields are "
            f"{', '.join(fields)}"
        )
    try:
        return name, _tuples(json.loads(value))
    except ValueError:
        # A word, such as the name of a backbone, needs no quotes.
        return name, value


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


if __name__ == "__main__":
    sys.exit(main())
