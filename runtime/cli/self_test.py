"""The half of ``llava-edge verify --on-device`` that loads the artifact."""

from __future__ import annotations

import argparse
import json
import sys

from llava_edge.profiles.command_line import wrapped
from llava_edge.runtime.artifact.open import Artifact
from llava_edge.runtime.cli.arguments import asked_cache
from llava_edge.runtime.model import LlavaEdge
from llava_edge.runtime.util.json_codec import to_json
from llava_edge.runtime.util.progress import ProgressLine
from llava_edge.runtime.verification.host import describe_host
from llava_edge.runtime.verification.report import stage_table, verdict_line, verification_json
from llava_edge.runtime.verification.self_test import run_self_test
from llava_edge.runtime.verification.self_test_cache import keep_result
from llava_edge.runtime.verification.self_test_policy import result_key


def check_and_print(options: argparse.Namespace, artifact: Artifact) -> int:
    """Compare this machine with the golden prompts, print, and return the exit code.

    Raises:
        LlavaEdgeError: the artifact cannot be loaded.
    """
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
    where = f"{host.machine} ({host.cpu}, {host.provider}, int8 {host.int8_isa})"
    print(wrapped(f"{artifact.folder} on {where}: {verdict_line(stages)}"), file=sys.stderr)
    print(wrapped(f"kept in {path}"), file=sys.stderr)
    if options.json:
        print(json.dumps({**verification_json(stages), "host": to_json(host)}, allow_nan=False))
    return 0 if result.verdict == "pass" else 1
