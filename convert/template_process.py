"""Rendering a chat template from elsewhere: in a child process that cannot outlive its limits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llava_edge.profiles.errors import CheckpointError


@dataclass(frozen=True)
class TemplateLimits:
    """What a chat template may use: wall clock, memory of its process, length of its text."""

    seconds: int = 10
    memory_bytes: int = 768 * 2**20
    output_bytes: int = 32 * 2**20
    characters: int = 200_000
    template_characters: int = 200_000


@dataclass(frozen=True)
class Rendering:
    """What a template made of one conversation: a text, or the error it raised."""

    text: str | None
    error: str | None = None


@dataclass(frozen=True)
class ChatRequest:
    """One conversation in the form that chat templates read.

    ``clock``: seconds since 1970 that the template takes for now.
    """

    messages: tuple[Mapping[str, Any], ...]
    add_generation_prompt: bool = True
    clock: float = 0.0


def render_all(
    template: str,
    variables: Mapping[str, str],
    requests: Sequence[ChatRequest],
    *,
    limits: TemplateLimits | None = None,
) -> tuple[Rendering, ...]:
    """Render conversations with one template.

    Args:
        template: jinja2 source.
        variables: names beside the conversation, such as ``bos_token``.
        requests: conversations.
        limits: bounds of the child process.

    Raises:
        CheckpointError: the template does not parse, or its process ran past a limit or died.
    """
    limits = limits or TemplateLimits()
    if len(template) > limits.template_characters:
        raise _refused(
            f"has {len(template)} characters; at most {limits.template_characters} are rendered"
        )
    request = {
        "template": template,
        "variables": dict(variables),
        "conversations": [asdict(r) for r in requests],
        "limits": asdict(limits),
    }
    answer = _run_child(json.dumps(request).encode(), limits)
    if "fatal" in answer:
        raise _refused(f"cannot be used: {answer['fatal']}")
    return tuple(Rendering(a.get("text"), a.get("error")) for a in answer["answers"])


def _run_child(request: bytes, limits: TemplateLimits) -> dict[str, Any]:
    script = Path(__file__).with_name("template_child.py")
    environment = {k: v for k, v in os.environ.items() if k in ("SYSTEMROOT", "LD_LIBRARY_PATH")}
    # The answer goes to a file, whose size the system bounds; a pipe would fill this process.
    with tempfile.TemporaryFile() as output:
        try:
            done = subprocess.run(
                [sys.executable, "-I", str(script)],
                input=request,
                stdout=output,
                stderr=subprocess.DEVNULL,
                timeout=limits.seconds,
                env=environment,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise _refused(f"did not end within {limits.seconds} seconds") from error
        except OSError as error:
            raise CheckpointError(
                f"The process that renders the chat template could not be started: {error}. "
                "Free memory or processes and try again."
            ) from error
        output.seek(0)
        data = output.read(limits.output_bytes + 1)
    try:
        answer = json.loads(data)
    except ValueError as error:
        raise _refused(
            f"ended its process with status {done.returncode}; it may use "
            f"{limits.memory_bytes >> 20} MiB and write {limits.output_bytes >> 20} MiB"
        ) from error
    assert isinstance(answer, dict)
    return answer


def _refused(what: str) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint's chat template {what}. Templates are rendered sandboxed and bounded, "
        "and only plain ones can be compiled. Remove or mend the template; raw prompts work "
        "without one."
    )
