"""``llava-edge verify``: does an artifact do what its checkpoint does, and does this machine?

``--against CHECKPOINT`` runs torch; ``--on-device`` compares this machine with the golden prompts
that travel in the artifact and needs nothing but the runtime. Either is imported once the arguments
were checked.
"""

from __future__ import annotations

import argparse

from llava_edge.convert.checkpoint.source import resolve_source
from llava_edge.profiles.boards.device_name import parse_device
from llava_edge.profiles.command_line import CommandParser, one_of
from llava_edge.profiles.errors import CheckpointError, RequestError, UsageError
from llava_edge.runtime.artifact.open import open_artifact
from llava_edge.runtime.cli.arguments import (
    add_artifact_argument,
    add_cache_argument,
    add_device_arguments,
    add_engine_arguments,
    add_json_argument,
    require_artifact,
)
from llava_edge.runtime.cli.settled_imports import import_for

SUMMARY = "Compare an artifact with its checkpoint, or this machine with the artifact."

_AGAINST = "llava_edge.convert.cli.verify_checkpoint"
_ON_DEVICE = "llava_edge.runtime.cli.self_test"


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0 passed, 1 failed or inconclusive."""
    options = _parser().parse_args(argv)
    if options.on_device and options.mode is not None:
        raise RequestError(
            f"--verify {options.mode} and --on-device were both given; --verify says how much is "
            "compared with a checkpoint. Leave it out, or give --against CHECKPOINT."
        )
    require_artifact(options.artifact)
    if options.against is None and not options.on_device:
        raise UsageError(
            f"nothing says what {options.artifact!s:.300} is compared with. Give --against "
            "CHECKPOINT, or --on-device for its golden prompts on this machine."
        )
    if options.against is not None:
        _require_checkpoint(options)
    # Both ways hash every file anew: anyone who verifies does not want to hear what was true
    # before.
    artifact = open_artifact(
        options.artifact, hash_everything=True, read_certificate_too=options.on_device
    )
    code: int
    if options.on_device:
        code = import_for("verify", _ON_DEVICE, "cpu").check_and_print(options, artifact)
        return code
    options.mode = options.mode or "quick"
    otherwise = ", or compare this machine with the artifact's golden prompts: --on-device"
    command = import_for("verify --against", _AGAINST, "convert", otherwise)
    code = command.main_against(options, artifact)
    return code


def _require_checkpoint(options: argparse.Namespace) -> None:
    """Refuse what is no checkpoint before the artifact is hashed.

    Raises:
        CheckpointError: there is no such folder, or no configuration in it.
        RequestError: a GPU was named; the reference runs on the CPU.
    """
    if parse_device(options.device).kind == "cuda":
        raise RequestError(
            f"--device {options.device} and --against were both given; the reference and the "
            "artifact are compared on the CPU. Leave --device out, and check the GPU with "
            "--on-device."
        )
    folder = resolve_source(options.against).folder
    if folder is not None and not (folder / "config.json").exists():
        raise CheckpointError(
            f"{folder} has no config.json. Give the folder that holds it next to the weights."
        )


def _parser() -> CommandParser:
    parser = CommandParser("verify", SUMMARY, "ARTIFACT --against CHECKPOINT|--on-device [options]")
    add_artifact_argument(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--against", metavar="CHECKPOINT", help="folder or hub id; writes the certificate"
    )
    what.add_argument(
        "--on-device",
        action="store_true",
        help="this machine against the artifact's golden prompts; needs no torch",
    )
    parser.add_argument(
        "--verify",
        dest="mode",
        type=one_of(("quick", "full")),
        metavar="quick|full",
        help="how much is compared with the checkpoint (default: quick)",
    )
    add_json_argument(parser)
    machine = parser.add_argument_group("what runs it")
    add_device_arguments(machine)
    add_cache_argument(machine)
    add_engine_arguments(machine)
    return parser
