"""``llava-edge bench ARTIFACT…``: memory, speed and quality of artifacts, side by side.

    llava-edge bench fp16 int8 int4 --out now.json --html report.html
    llava-edge bench fp16 int4 --quality questions.jsonl
    llava-edge bench --compare before.json now.json

Artifacts take turns, each round of each in a process of its own. The table goes to stderr, the
schema of the JSON is in ``bench/README.md``. Exit code 1 from ``--compare`` says that something
became slower or larger. Arguments are read and checked here; ``measuring`` does the work.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_edge.bench.common.atomic_write import check_writable
from llava_edge.bench.report.schema import read_bench
from llava_edge.profiles.command_line import CommandParser, one_of, whole_number
from llava_edge.runtime.artifact.open import open_artifact
from llava_edge.runtime.cli.arguments import (
    add_artifact_argument,
    add_cache_argument,
    add_device_arguments,
    add_engine_arguments,
    add_grid_argument,
    add_json_argument,
    require_artifact,
    require_grid,
    require_questions,
)
from llava_edge.runtime.cli.settled_imports import import_for

SUMMARY = "Measure memory, speed and quality of artifacts, side by side."


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.compare:
        if options.artifact or options.out or options.html or options.quality or options.answers:
            parser.error("--compare measures nothing: it takes two files, and --json")
        old, new = (read_bench(path) for path in options.compare)
        code: int = _measuring().compare_and_print(options, old, new)
        return code
    if not options.artifact:
        parser.error("name an artifact, or two files with --compare")
    if options.only == "quality" and not options.quality:
        parser.error("--only quality needs --quality FILE")
    if options.only == "speed" and options.quality:
        parser.error("--only speed leaves --quality out; name one of them")
    if options.answers and not options.quality:
        parser.error("--answers keeps those to --quality FILE, which is not given")
    if options.out and options.html and options.out.absolute() == options.html.absolute():
        parser.error(f"--out and --html both name {options.out}")
    require_grid(options.grid)
    for artifact in options.artifact:
        require_artifact(artifact)
    check_writable(options.out, "--out", force=options.force)
    check_writable(options.html, "--html", force=options.force)
    check_writable(options.answers, "--answers", force=None)
    require_questions(options.quality)
    # What cannot be opened is said before an hour is spent on the others.
    opened = {name: open_artifact(name, verify_digests=False) for name in options.artifact}
    code = _measuring().measure(options, opened)
    return code


def _measuring() -> Any:
    return import_for("bench", "llava_edge.bench.measuring", "bench")


def _parser() -> CommandParser:
    parser = CommandParser("bench", SUMMARY, "ARTIFACT... [--quality FILE] [--out FILE] [options]")
    add_artifact_argument(parser, "*")
    _add_output_arguments(parser)
    speed = parser.add_argument_group("speed and memory")
    speed.add_argument(
        "--rounds",
        type=whole_number(1),
        metavar="N",
        help="exactly so many (default: as many as 2 minutes allow)",
    )
    speed.add_argument("--thorough", action="store_true", help="9 rounds, long prompts and answers")
    add_device_arguments(speed)
    add_cache_argument(speed)
    add_engine_arguments(speed)
    quality = parser.add_argument_group("quality")
    quality.add_argument(
        "--quality",
        type=Path,
        metavar="FILE",
        help="JSON lines of image, question, answers, and choices where there are any",
    )
    quality.add_argument(
        "--only",
        type=one_of(("speed", "quality")),
        metavar="speed|quality",
        help="leave the other out",
    )
    quality.add_argument(
        "--limit", type=whole_number(1), metavar="N", help="ask the first N questions"
    )
    add_grid_argument(quality)
    quality.add_argument(
        "--max-new-tokens",
        type=whole_number(1),
        default=64,
        metavar="N",
        help="tokens of an answer at most",
    )
    quality.add_argument(
        "--answers", type=Path, metavar="FILE", help="keep every answer in this new file"
    )
    return parser


def _add_output_arguments(parser: CommandParser) -> None:
    parser.add_argument("--out", type=Path, metavar="FILE", help="keep what was measured, as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a report with plots")
    parser.add_argument("--force", action="store_true", help="overwrite both")
    add_json_argument(parser)
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("OLD", "NEW"),
        help="two files of --out; measure nothing, exit code 1 where the new one is slower or "
        "larger",
    )
