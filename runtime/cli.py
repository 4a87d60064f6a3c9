"""The ``llava-edge`` command: finds subcommands by entry point and knows none of them.

    exit 0   done
    exit 1   it failed; says why
    exit 2   the request is malformed or cannot be met

With ``--json`` the last line of stdout is one JSON object, also for a failure.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import EntryPoint, entry_points, version

from llava_edge.profiles.errors import DependencyError, LlavaEdgeError

GROUP = "llava_edge.commands"
_EXTRAS = {
    "bench": "bench",
    "convert": "convert",
    "serve": "serve",
    "verify": "convert",
}
_INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand and return the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    commands = {entry.name: entry for entry in entry_points(group=GROUP)}
    if not arguments or arguments[0] in {"-h", "--help"}:
        print(_usage(commands), file=sys.stderr if not arguments else sys.stdout)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"llava-edge {version('llava-edge')}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in commands:
        print(f"llava-edge: there is no command {name!r}\n{_usage(commands)}", file=sys.stderr)
        return 2
    try:
        return int(_load(commands[name])(rest))
    except LlavaEdgeError as error:
        return _report(error, wants_json="--json" in rest)
    except KeyboardInterrupt:
        print("llava-edge: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone; the interpreter must not complain about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _load(entry: EntryPoint):  # type: ignore[no-untyped-def]  # whatever the entry point names
    try:
        return entry.load()
    except ImportError as error:
        extra = _EXTRAS.get(entry.name, "cpu")
        raise DependencyError(
            f"llava-edge {entry.name} needs the package {error.name or error}, which is not "
            f"installed. Install it with: pip install 'llava-edge[{extra}]'"
        ) from error


def _report(error: LlavaEdgeError, wants_json: bool) -> int:
    print(f"error: {error}", file=sys.stderr)
    if wants_json:
        print(json.dumps({"error": {"type": type(error).__name__, "message": str(error)}}))
    return error.exit_code


def _usage(commands: dict[str, EntryPoint]) -> str:
    listed = "\n".join(f"  llava-edge {name} --help" for name in sorted(commands))
    return f"usage: llava-edge COMMAND …\n\ncommands:\n{listed}"


if __name__ == "__main__":
    sys.exit(main())
