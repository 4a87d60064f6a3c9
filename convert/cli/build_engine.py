"""``llava-edge build-engine``: builds the tower's TensorRT engine for this machine's GPU.

It lies in the user's cache folder, never in the artifact, and is found there on loading. Runs on
devices: torch is not needed. Arguments are read and checked here; ``building`` does the work.
"""

from __future__ import annotations

from llava_edge.profiles.boards.device_name import device_argument, parse_device
from llava_edge.profiles.boards.engines import LIBRARIES
from llava_edge.profiles.command_line import CommandParser, bar, one_of
from llava_edge.profiles.errors import RequestError
from llava_edge.runtime.artifact.open import open_artifact
from llava_edge.runtime.cli.arguments import (
    add_artifact_argument,
    add_json_argument,
    require_artifact,
)
from llava_edge.runtime.cli.settled_imports import import_for

SUMMARY = "Build the vision tower's TensorRT engine for a GPU of this machine."


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(argv)
    require_artifact(options.artifact)
    device = parse_device(options.device)
    if device.kind == "cpu":
        raise RequestError("--device cpu was given; an engine is built for a GPU. Name one.")
    artifact = open_artifact(options.artifact)
    building = import_for("build-engine", "llava_edge.convert.cli.building", "gpu")
    code: int = building.build_and_print(options, artifact, device.gpu)
    return code


def _parser() -> CommandParser:
    parser = CommandParser("build-engine", SUMMARY, "ARTIFACT [options]")
    add_artifact_argument(parser)
    parser.add_argument(
        "--engine",
        type=one_of(LIBRARIES),
        metavar=bar(LIBRARIES),
        help="the library that builds (default: the first that works)",
    )
    parser.add_argument(
        "--device",
        type=device_argument,
        metavar="cuda|cuda:N",
        default="cuda",
        help="the GPU to build for; cuda: the first",
    )
    parser.add_argument("--force", action="store_true", help="build also where there is one")
    add_json_argument(parser)
    return parser
