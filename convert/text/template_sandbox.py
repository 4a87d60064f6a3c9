"""Rendering an untrusted chat template: sandboxed, in a child process with bounds on its resources.

A chat template is a program from elsewhere. Nothing in this project renders one in its own process.
The same file is both sides: imported, it starts the child; run as a script, it is the child, whose
requests and answers are JSON on standard input and output.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from llava_edge.profiles.errors import CheckpointError
from llava_edge.runtime.artifact.prompt_date import DATE_MARK

Environment = Literal["own", "transformers"]
"""Whose jinja2 environment renders: a copy with the same rules that starts in a tenth of a second,
or transformers' own function, which verification compares with."""


@dataclass(frozen=True)
class ProcessLimits:
    """What a child process may use.

    Attributes:
        seconds: processor time, so that a busy machine ends no sound work.
        memory_bytes: address space beyond what the process has before the work begins.
        output_bytes: length of its answer.
        wall_seconds: real time; bounds a process that waits and does not compute.
    """

    seconds: int = 10
    memory_bytes: int = 768 * 2**20
    output_bytes: int = 32 * 2**20
    wall_seconds: float = 300.0


@dataclass(frozen=True)
class TemplateLimits(ProcessLimits):
    """What a chat template may use: its process, and characters of the template and of a text."""

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

    Attributes:
        clock: seconds since 1970 (UTC) that the template takes for now; None writes a mark of the
            form (``DATE_MARK``) in place of each date.
    """

    messages: tuple[Mapping[str, Any], ...]
    add_generation_prompt: bool = True
    clock: float | None = 0.0


def render_all(
    template: str,
    variables: Mapping[str, str],
    requests: Sequence[ChatRequest],
    *,
    environment: Environment = "own",
    limits: TemplateLimits | None = None,
) -> tuple[Rendering, ...]:
    """Render conversations with one template.

    Args:
        template: jinja2 source.
        variables: names beside the conversation, such as ``bos_token``.
        requests: conversations.
        environment: whose rules apply.
        limits: bounds of the child process.

    Raises:
        CheckpointError: the template does not parse, or reached a limit, which the message names.
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
        "environment": environment,
        "limits": asdict(limits),
    }
    try:
        data = run_bounded(Path(__file__), json.dumps(request).encode(), limits)
        answer = json.loads(data)
    except LimitError as error:
        raise _refused(str(error)) from error
    except ValueError as error:
        raise _refused(
            f"ended its process early; its answer may have {limits.output_bytes >> 20} MiB"
        ) from error
    if "fatal" in answer:
        raise _refused(answer["fatal"])
    return tuple(Rendering(a.get("text"), a.get("error")) for a in answer["answers"])


def _refused(what: str) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint's chat template {what}. Templates are rendered sandboxed and bounded, "
        "and only plain ones can be compiled. Remove or mend the template; raw prompts work "
        "without one."
    )


class LimitError(Exception):
    """A bounded process reached a limit or died; the message names which."""


def run_bounded(script: Path, request: bytes, limits: ProcessLimits) -> bytes:
    """Run a Python script of this project as a child process that calls ``limit_process``.

    Args:
        script: reads the request from standard input, and answers on standard output.
        request: for the script.
        limits: the same that the script is given.

    Returns:
        The answer, at most ``output_bytes`` long.

    Raises:
        LimitError: a limit was reached, or the process died of something else.
        CheckpointError: the process could not be started.
    """
    kept = ("SYSTEMROOT", "LD_LIBRARY_PATH")
    environment = {k: v for k, v in os.environ.items() if k in kept} | {"HF_HUB_OFFLINE": "1"}
    # The answer goes to a file, whose size the system bounds; a pipe would fill this process.
    with tempfile.TemporaryFile() as output:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", _START, str(script), *_python_path()],
                input=request,
                stdout=output,
                stderr=subprocess.DEVNULL,
                timeout=limits.wall_seconds,
                env=environment,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise LimitError(f"did not end within {limits.wall_seconds:.0f} seconds") from error
        except OSError as error:
            raise CheckpointError(
                f"A process with bounds could not be started: {error}. "
                "Free memory or processes and try again."
            ) from error
        output.seek(0)
        data = output.read(limits.output_bytes + 1)
    if done.returncode == -getattr(signal, "SIGXCPU", 0) != 0:
        raise LimitError(f"did not end within {limits.seconds} seconds of processor time")
    if done.returncode == _NO_MEMORY:
        raise LimitError(f"needs more than {limits.memory_bytes >> 20} MiB of memory")
    if done.returncode == _NO_OUTPUT or len(data) > limits.output_bytes:
        raise LimitError(f"writes more than {limits.output_bytes >> 20} MiB")
    if done.returncode != 0:
        raise LimitError(
            f"ended its process with status {done.returncode}, within its limits of "
            f"{limits.seconds} seconds and {limits.memory_bytes >> 20} MiB"
        )
    return data


_NO_MEMORY, _NO_OUTPUT = 81, 82
"""Exit statuses of the child."""
_START = (
    "import runpy, sys; sys.path[:0] = sys.argv[2:]; "
    "runpy.run_path(sys.argv[1], run_name='__main__')"
)
"""Isolated, Python does not look into the current folder, but not at PYTHONPATH either."""


def _python_path() -> list[str]:
    """Folders of PYTHONPATH, by which this process may have found its own packages."""
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [os.path.abspath(folder) for folder in named if folder]


def limit_process(limits: Mapping[str, float]) -> None:
    """Bound this process; call it after imports and before the work.

    Args:
        limits: fields of ``ProcessLimits`` by name. What the system does not know is skipped.
    """
    try:
        import resource
    except ImportError:  # Windows: the parent's clock and the length of the answer remain.
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(limits["seconds"] + used.ru_utime + used.ru_stime) + 1
    memory = int(limits["memory_bytes"]) + _mapped_bytes()
    output = int(limits["output_bytes"]) + 1
    bounds: tuple[tuple[str, int, int], ...] = (
        ("RLIMIT_AS", memory, memory),
        # The soft limit ends the process by a signal of its own, which tells it from others.
        ("RLIMIT_CPU", seconds, seconds + 2),
        ("RLIMIT_FSIZE", output, output),
        ("RLIMIT_CORE", 0, 0),
        ("RLIMIT_NPROC", 0, 0),
    )
    for name, soft, hard in bounds:
        try:
            resource.setrlimit(getattr(resource, name), (soft, hard))
        except (AttributeError, OSError, ValueError):
            continue


def _mapped_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


Render = Callable[[Mapping[str, Any]], Iterator[str]]
"""Text of one conversation, in runs."""


def _own_renderer(template: str, clock: Callable[[], float | None]) -> Render:
    """The rules that transformers 5.23 renders chat templates by (``chat_template_utils``)."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """``{% generation %}`` marks the assistant's text; for rendering it changes nothing."""

        tags = {"generation"}  # noqa: RUF012 (the name and kind jinja2 reads)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    class CheckedNamespace(Namespace):
        """Refuses names that begin with an underscore."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            values = dict(*args[1:], **kwargs)
            for name in values:
                refuse_private(name)
            Namespace.__init__(args[0], values)

        def __setitem__(self, name: str, value: Any) -> None:
            refuse_private(name)
            Namespace.__setitem__(self, name, value)

    def refuse_private(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace takes no private name, found {name!r}")

    class MakeDict:
        """``dict(…)`` without the attributes of the class."""

        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(form: str) -> str:
        now = clock()
        if now is None:
            return DATE_MARK.format(form)
        return datetime.fromtimestamp(now, UTC).strftime(form)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    environment.globals["dict"] = MakeDict()
    environment.globals["namespace"] = CheckedNamespace
    compiled = environment.from_string(template)

    def render(names: Mapping[str, Any]) -> Iterator[str]:
        return compiled.generate({**names, "tools": None, "documents": None})

    return render


def _library_renderer(template: str, clock: Callable[[], float | None]) -> Render:
    """Transformers' own function, at a clock of ours."""
    import transformers.utils.chat_template_utils as library

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Clock:
            return cls.fromtimestamp(clock() or 0.0, tz or UTC)

    library.datetime = Clock  # type: ignore[attr-defined]

    def render(names: Mapping[str, Any]) -> Iterator[str]:
        names = dict(names)
        made: Any = library.render_jinja_template(
            conversations=[names.pop("messages")], chat_template=template, **names
        )
        yield str(made[0][0])

    return render


def _bounded(blocks: Iterator[str], limit: int) -> str:
    taken: list[str] = []
    length = 0
    for block in blocks:
        length += len(block)
        if length > limit:
            raise _LengthError(f"writes a text that is longer than {limit} characters")
        taken.append(block)
    return "".join(taken)


class _LengthError(Exception):
    pass


def _answers(request: Mapping[str, Any]) -> dict[str, Any]:
    now: float | None = 0.0
    make = _own_renderer
    if request["environment"] == "own":
        import jinja2.sandbox  # noqa: F401 (what is imported does not count)
    else:
        import transformers.utils.chat_template_utils  # noqa: F401

        make = _library_renderer
    limits = {**asdict(TemplateLimits()), **request.get("limits", {})}
    limit_process(limits)
    try:
        render = make(request["template"], lambda: now)
    except Exception as error:  # A template that does not even parse.
        if isinstance(error, MemoryError):
            raise
        return {"fatal": f"cannot be used: {type(error).__name__}: {str(error)[:300]}"}
    answers: list[dict[str, str]] = []
    for conversation in request["conversations"]:
        now = conversation.pop("clock", time.time())
        try:
            text = _bounded(render({**request["variables"], **conversation}), limits["characters"])
            answers.append({"text": text})
        except MemoryError:
            raise
        except _LengthError as error:
            return {"fatal": str(error)}
        except Exception as error:  # Whatever a template raises is its answer.
            answers.append({"error": f"{type(error).__name__}: {str(error)[:300]}"})
    return {"answers": answers}


def main() -> None:
    """Render each conversation of the request; the answer has one entry for each."""
    try:
        json.dump(_answers(json.load(sys.stdin)), sys.stdout)
        sys.stdout.flush()
    except MemoryError:
        os._exit(_NO_MEMORY)
    except OSError:
        os._exit(_NO_OUTPUT)


if __name__ == "__main__":
    main()
