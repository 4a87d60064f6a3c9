"""The child process that renders a chat template. Run as a script, never imported.

A chat template is a program from elsewhere. It runs here under the sandbox of jinja2, with the
names that transformers 5.23 gives to chat templates, in a process that may take only so much
memory, processor time and output; the parent kills it when its time is up. Standard input holds
the request, standard output the answer, both JSON.
"""

import json
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from typing import Any


def limit_process(memory_bytes: int, seconds: int, output_bytes: int) -> None:
    """Take away what a template has no use for; what the system does not know is skipped."""
    try:
        import resource
    except ImportError:  # Windows: the parent's clock and the output limit remain.
        return
    for name, value in (
        ("RLIMIT_AS", memory_bytes),
        ("RLIMIT_CPU", seconds),
        ("RLIMIT_FSIZE", output_bytes),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_NPROC", 0),
    ):
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (AttributeError, OSError, ValueError):
            continue


def make_environment(clock: Callable[[], float]) -> Any:
    """The environment that transformers 5.23 renders chat templates in (``chat_template_utils``).

    Args:
        clock: gives the seconds since 1970 that ``strftime_now`` takes for now.
    """
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
                _refuse_private(name)
            Namespace.__init__(args[0], values)

        def __setitem__(self, name: str, value: Any) -> None:
            _refuse_private(name)
            Namespace.__setitem__(self, name, value)

    def _refuse_private(name: object) -> None:
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
    environment.globals["strftime_now"] = lambda form: datetime.fromtimestamp(
        clock(), timezone.utc
    ).strftime(form)
    environment.globals["dict"] = MakeDict()
    environment.globals["namespace"] = CheckedNamespace
    return environment


def _bounded(blocks: Iterator[str], limit: int) -> str:
    taken: list[str] = []
    length = 0
    for block in blocks:
        length += len(block)
        if length > limit:
            raise OverflowError(f"the text is longer than {limit} characters")
        taken.append(block)
    return "".join(taken)


def _attempt(blocks: Iterator[str], limit: int) -> dict[str, str]:
    try:
        return {"text": _bounded(blocks, limit)}
    except Exception as error:  # Whatever a template raises is its answer.
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def main() -> None:
    """Render each conversation of the request; the answer has one entry for each."""
    request = json.load(sys.stdin)
    limits = request["limits"]
    limit_process(limits["memory_bytes"], limits["seconds"], limits["output_bytes"])
    answers: list[dict[str, str]] = []
    now = 0.0
    try:
        template = make_environment(lambda: now).from_string(request["template"])
    except Exception as error:  # A template that does not even parse.
        fatal = f"{type(error).__name__}: {str(error)[:300]}"
        json.dump({"fatal": fatal}, sys.stdout)
        return
    for conversation in request["conversations"]:
        now = conversation.pop("clock")
        names = {**request["variables"], **conversation, "tools": None, "documents": None}
        blocks = template.generate(**names)
        answers.append(_attempt(blocks, request["limits"]["characters"]))
    json.dump({"answers": answers}, sys.stdout)


if __name__ == "__main__":
    main()
