"""``llava-edge verify ARTIFACT``: does the artifact do what its checkpoint does?

``--against CHECKPOINT`` asks torch; ``--on-device`` compares this machine with the golden prompts
that travel in the artifact and needs nothing but the runtime. So torch is imported where it is
asked for, never at the top.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys

from llava_edge.profiles.boards.device_name import DEVICE_METAVAR, device_argument
from llava_edge.profiles.errors import DependencyError, RequestError
from llava_edge.runtime.artifact.open import Artifact, open_artifact
from llava_edge.runtime.cli.arguments import add_cache_argument, add_engine_arguments, asked_cache
from llava_edge.runtime.cli.settled_imports import settled_imports
from llava_edge.runtime.model import LlavaEdge
from llava_edge.runtime.util.json_codec import to_json
from llava_edge.runtime.util.progress import ProgressLine
from llava_edge.runtime.verification.host import describe_host
from llava_edge.runtime.verification.report import stage_table, verdict_line, verification_json
from llava_edge.runtime.verification.self_test import run_self_test
from llava_edge.runtime.verification.self_test_cache import keep_result
from llava_edge.runtime.verification.self_test_policy import result_key

_AGAINST = "llava_edge.convert.cli.verify_checkpoint"


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0 passed, 1 failed or inconclusive."""
    options = _parser().parse_args(argv)
    if options.on_device and options.mode is not None:
        raise RequestError(
            f"--verify {options.mode} and --on-device were both given; --verify says how much is "
            "compared with a checkpoint. Leave it out, or give --against CHECKPOINT."
        )
    # Both ways hash every file anew: anyone who verifies does not want to hear what was true
    # before.
    artifact = open_artifact(
        options.artifact, hash_everything=True, read_certificate_too=options.on_device
    )
    return _on_device(options, artifact) if options.on_device else _against(options, artifact)


def _on_device(options: argparse.Namespace, artifact: Artifact) -> int:
    progress = ProgressLine()
    with LlavaEdge.over(
        artifact,
        options.device,
        threads=options.threads,
        cache=asked_cache(options.cache),
        allow_slow=options.allow_slow,
        engine=options.engine,
        trust_engines=options.trust_engines,
        strict_device=options.strict_device,
        progress=progress,
    ) as model:
        stages = tuple(run_self_test(model, progress))
        host = describe_host(model.device, engine=model.engine)
        key = result_key(model)
    progress.clear()
    result, path = keep_result(key, host, stages)
    print(stage_table(stages), file=sys.stderr)
    print(
        f"{artifact.folder} on {host.machine} ({host.cpu}, {host.provider}, int8 {host.int8_isa}): "
        f"{verdict_line(stages)}; kept in {path}",
        file=sys.stderr,
    )
    if options.json:
        print(json.dumps({**verification_json(stages), "host": to_json(host)}, allow_nan=False))
    return 0 if result.verdict == "pass" else 1


def _against(options: argparse.Namespace, artifact: Artifact) -> int:
    options.mode = options.mode or "quick"
    try:
        with settled_imports():
            command = importlib.import_module(_AGAINST)
    except ImportError as error:
        raise DependencyError(
            f"llava-edge verify --against needs the package {error.name or error}, which is not "
            "installed. Install it with: pip install 'llava-edge[convert]', or compare this "
            "machine with the artifact's golden prompts: --on-device"
        ) from error
    code: int = command.main_against(options, artifact)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava-edge verify",
        description="Compare an artifact with its checkpoint, or a machine with the artifact.",
    )
    parser.add_argument("artifact", help="folder that llava-edge convert wrote")
    what = parser.add_mutually_exclusive_group(required=True)
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
        choices=("quick", "full"),
        help="how much is compared with the checkpoint; default: quick",
    )
    parser.add_argument("--device", type=device_argument, metavar=DEVICE_METAVAR, default="auto")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as are allowed")
    parser.add_argument("--allow-slow", action="store_true", help="run a cuda artifact on the CPU")
    add_cache_argument(parser)
    add_engine_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object as last stdout line")
    return parser
