"""The ``llava-edge`` command: finds subcommands by entry point and knows none of them.

    exit 0   done
    exit 1   it failed; says why
    exit 2   the request is malformed or cannot be met

With ``--json`` the last line of stdout is one JSON object, also for a failure.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from importlib.metadata import EntryPoint, entry_points, version

from llava_edge.profiles.errors import DependencyError, LlavaEdgeError, OutputError
from llava_edge.runtime.cli.settled_imports import settled_imports
from llava_edge.runtime.cli.standard_streams import ReaderGoneError, standard_streams

GROUP = "llava_edge.commands"
_EXTRAS = {
    "bench": "bench",
    "convert": "convert",
    "serve": "serve",
}
_INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand and return the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    with standard_streams():
        code = _run(arguments)
        try:
            # What is still buffered would otherwise be lost without a word at exit.
            sys.stdout.flush()
        except ReaderGoneError:
            return code or 1
        except OutputError as error:
            return _report(type(error).__name__, str(error), code or error.exit_code, False)
        return code


def _run(arguments: list[str]) -> int:
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


def _load(entry: EntryPoint):  # type: ignore[no-untyped-def]  # whatever the entry point names
    try:
        with settled_imports():
            return entry.load()
    except ImportError as error:
        extra = _EXTRAS.get(entry.name, "cpu")
        raise DependencyError(
            f"llava-edge {entry.name} needs the package {error.name or error}, which is not "
            f"installed. Install it with: pip install 'llava-edge[{extra}]'"
        ) from error


def _report(kind: str, message: str, code: int, wants_json: bool) -> int:
    print(f"error: {message}", file=sys.stderr)
    if wants_json:
        _print_json(kind, message)
    return code


def _print_json(kind: str, message: str) -> None:
    # What went wrong stands on stderr already, and the exit code is that of it.
    with contextlib.suppress(OutputError, ReaderGoneError):
        print(json.dumps({"error": {"type": kind, "message": message}}), flush=True)


def _usage(commands: dict[str, EntryPoint]) -> str:
    listed = "\n".join(f"  llava-edge {name} --help" for name in sorted(commands))
    return f"usage: llava-edge COMMAND …\n\ncommands:\n{listed}"


if __name__ == "__main__":
    sys.exit(main())
