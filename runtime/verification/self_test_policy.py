"""What loading does where an artifact was verified elsewhere: on another provider or processor.

Kernels differ from provider to provider, and int8 products from instruction set to instruction set:
a sum that saturates is wrong without a word. So another int8 instruction set runs the golden
prompts once, and what they came to is remembered for this machine (``self_test_cache.py``).
"""

from __future__ import annotations

import logging

from llava_edge.profiles.errors import EngineError
from llava_edge.runtime.artifact.certificate import Host, StageResult
from llava_edge.runtime.artifact.manifest import Manifest
from llava_edge.runtime.verification.host import describe_host
from llava_edge.runtime.verification.loaded_model import LoadedModel
from llava_edge.runtime.verification.self_test import has_golden, run_self_test
from llava_edge.runtime.verification.self_test_cache import keep_result, read_result

_LOG = logging.getLogger(__name__)


def self_test_if_needed(model: LoadedModel) -> None:
    """Say where provider or int8 instructions differ from those of the certificate; check these.

    Says nothing where the artifact is not verified (opening it has said so), or where its golden
    prompts have passed on this machine before.

    Raises:
        EngineError: they were run now, and a stage fails.
    """
    artifact = model.artifact
    certificate = artifact.certificate
    if certificate is None or not artifact.verified:
        return
    here, there = describe_host(model.device, engine=model.engine), certificate.host
    differences = []
    if there.provider != here.provider:
        differences.append(f"on {there.provider:.80} and runs on {here.provider}")
    other_int8 = _uses_int8(artifact.manifest, here) and there.int8_isa != here.int8_isa
    if other_int8:
        differences.append(
            f"with the int8 instructions {there.int8_isa:.40} and runs with {here.int8_isa}"
        )
    if not differences:
        return
    known = read_result(result_key(model), here)
    # A failure is looked at again: that costs seconds, and a wrong no would stay for ever.
    if known is not None and known.verdict != "fail":
        return
    message = f"{artifact.folder} was verified {', '.join(differences)}"
    if not has_golden(artifact):
        _LOG.warning(
            "%s. It holds no golden prompts to check this machine with; verify it here "
            "(llava-edge verify --against)",
            message,
        )
    elif not other_int8:
        _LOG.warning(
            "%s. Check this machine once: llava-edge verify %s --on-device",
            message,
            artifact.folder,
        )
    else:
        _LOG.warning("%s. %s", message, _run_once(model, here, message))


def result_key(model: LoadedModel) -> str:
    """What a result speaks of: answers with an int8 cache are held to wider bounds."""
    digest = model.artifact.manifest_sha256
    return f"{digest} with int8 cache" if model.cache == "int8" else digest


def _uses_int8(manifest: Manifest, here: Host) -> bool:
    """Whether a layer's activations are rounded to int8 here, and multiplied as such."""
    on_cpu = here.provider == "CPUExecutionProvider"
    return on_cpu and manifest.target == "cpu" and manifest.precision.int8_route is not None


def _run_once(model: LoadedModel, here: Host, message: str) -> str:
    """Run the golden prompts; what is to be said of them."""
    # Nobody asked for this check, so it opens what the caller lets be opened and nothing else.
    stages = tuple(run_self_test(model, formats=model._requests.limits.image_formats))
    failed = [stage for stage in stages if stage.verdict == "fail"]
    complete = all(stage.verdict == "pass" for stage in stages if stage.name == "prompt")
    # A context too small for a prompt says nothing of the machine: not to be remembered.
    if complete:
        keep_result(result_key(model), here, stages)
    if failed:
        raise EngineError(
            f"{message}, and its golden prompts fail here: {_told(failed)}. Convert on this "
            "machine (llava-edge convert without --profile) or for a board with these "
            "instructions."
        )
    open_questions = [stage for stage in stages if stage.verdict == "inconclusive"]
    if not open_questions:
        return "Its golden prompts were run here and pass."
    return f"Its golden prompts were run here; none fails, open is {_told(open_questions)}."


def _told(stages: list[StageResult]) -> str:
    return "; ".join(
        f"stage {stage.name}"
        + (f", {stage.metric} {stage.value:.3g}" if stage.value is not None else "")
        + (f" (bound {stage.bound:.3g})" if stage.bound is not None else "")
        + (f", {stage.detail:.300}" if stage.detail else "")
        for stage in stages
    )
