"""The ``llava-edge`` command: finds subcommands by entry point and knows none of them.

    exit 0   done
    exit 1   it failed; says why
    exit 2   the request is malformed or cannot be met

With ``--json`` the last line of stdout is one JSON object, also for a failure.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points, version
from importlib.util import find_spec
from typing import Any

from llava_edge.profiles.command_line import wrapped
from llava_edge.profiles.errors import LlavaEdgeError, OutputError, did_you_mean, printable
from llava_edge.runtime.cli.settled_imports import import_for
from llava_edge.runtime.cli.standard_streams import ReaderGoneError, standard_streams

GROUP = "llava_edge.commands"
_EXTRAS = {
    "bench": "bench",
    "convert": "convert",
    "serve": "serve",
}
_INTERRUPTED = 130
_ORDER = ("doctor", "plan", "convert", "verify", "build-engine", "run", "bench")
"""In which a user meets them; others follow by name."""


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand and return the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    with standard_streams():
        code = 0
        try:
            code = _run(arguments)
            # What is still buffered would otherwise be lost without a word at exit.
            sys.stdout.flush()
        except ReaderGoneError:
            return code or 1
        except OutputError as error:
            return _report(type(error).__name__, str(error), code or error.exit_code, False)
        return code


def _run(arguments: list[str]) -> int:
    commands = {entry.name: entry for entry in entry_points(group=GROUP)}
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name == "help" and name not in commands:
        name, *rest = [*rest[:1], "--help"] if rest else ["--help"]
    if name in {"", "-h", "--help"}:
        print(_usage(commands), file=sys.stdout if name else sys.stderr)
        return 0 if name else 2
    if name == "--version":
        print(f"llava-edge {version('llava-edge')}")
        return 0
    if name not in commands:
        known = ["--help", "--version"] if name.startswith("-") else commands
        kind = "option" if name.startswith("-") else "command"
        message = f"there is no {kind} {printable(name)!r:.60}{did_you_mean(name, known)}."
        return _report("UsageError", f"{message}\n{_usage(commands)}", 2, "--json" in rest)
    wants_json = "--json" in rest
    try:
        return int(_load(commands[name])(rest))
    except LlavaEdgeError as error:
        return _report(type(error).__name__, str(error), error.exit_code, wants_json)
    except KeyboardInterrupt:
        return _report("Interrupted", "interrupted", _INTERRUPTED, wants_json)
    except ReaderGoneError:
        return 1
    except SystemExit as stop:
        # argparse has written its message; --help ends here as well.
        code = stop.code if isinstance(stop.code, int) else 2
        if code and wants_json:
            _print_json("UsageError", f"the arguments of {name} are malformed; see stderr")
        return code
    except Exception as error:  # the last resort: whatever it is, the contract of exit holds
        if os.environ.get("LLAVA_EDGE_TRACEBACK"):
            raise
        if isinstance(error, OSError) and error.strerror:
            where = f"{error.filename!r:.200}: " if error.filename is not None else ""
            message = (
                f"{where}{error.strerror}. The system refused it; LLAVA_EDGE_TRACEBACK=1 shows "
                "where."
            )
            return _report(type(error).__name__, message, 1, wants_json)
        message = (
            f"{type(error).__name__}: {error}. This is a fault of llava-edge, not of the request; "
            "LLAVA_EDGE_TRACEBACK=1 shows where."
        )
        return _report("InternalError", message, 1, wants_json)


def _load(entry: EntryPoint) -> Callable[[list[str]], Any]:
    module = import_for(entry.name, entry.module, _EXTRAS.get(entry.name, "cpu"))
    command: Callable[[list[str]], Any] = getattr(module, entry.attr)
    return command


def _report(kind: str, message: str, code: int, wants_json: bool) -> int:
    print(f"error: {message}", file=sys.stderr)
    if wants_json:
        _print_json(kind, message)
    return code


def _print_json(kind: str, message: str) -> None:
    # What went wrong stands on stderr already, and the exit code is that of it.
    with contextlib.suppress(OutputError, ReaderGoneError):
        print(json.dumps({"error": {"type": kind, "message": message}}), flush=True)


def _usage(commands: Mapping[str, EntryPoint]) -> str:
    names = sorted(commands, key=lambda name: (_ORDER.index(name) if name in _ORDER else 99, name))
    width = max(map(len, names), default=0) + 2
    lines = [f"  {name:{width}}{_summary(commands[name])}".rstrip() for name in names]
    return "\n".join(
        [
            "usage: llava-edge COMMAND [options]",
            "",
            "commands:",
            *(wrapped(line, hang=width) for line in lines),
            "",
            "llava-edge COMMAND --help lists its options; llava-edge --version, the version.",
        ]
    )


def _summary(entry: EntryPoint) -> str:
    """The sentence ``SUMMARY`` of a command's module, which is read and not imported."""
    try:
        spec = find_spec(entry.module)
        source = getattr(spec.loader, "get_source")(entry.module) if spec else None  # noqa: B009
        tree = ast.parse(source or "")
    except (ImportError, AttributeError, SyntaxError, ValueError):
        return ""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            names = [name.id for name in node.targets if isinstance(name, ast.Name)]
            if "SUMMARY" in names:
                return str(node.value.value)
    return ""


if __name__ == "__main__":
    sys.exit(main())
