"""``llava-edge run``: asks an artifact about pictures or a video, once or in a chat.

Arguments are read and checked here; ``answering`` loads the artifact.
"""

from __future__ import annotations

import argparse
import os
from typing import get_args

from llava_edge.profiles.command_line import CommandParser, bar, one_of, real_number, whole_number
from llava_edge.profiles.errors import (
    ImageError,
    LlavaEdgeError,
    VideoError,
    plain_reason,
    printable,
)
from llava_edge.runtime.cli.arguments import (
    add_artifact_argument,
    add_cache_argument,
    add_device_arguments,
    add_engine_arguments,
    add_grid_argument,
    add_json_argument,
    require_artifact,
    require_grid,
)
from llava_edge.runtime.cli.generation_arguments import add_generation_arguments, asked_generation
from llava_edge.runtime.cli.limit_arguments import add_limit_arguments, asked_limits
from llava_edge.runtime.cli.output_file import PngFile
from llava_edge.runtime.cli.settled_imports import import_for
from llava_edge.runtime.util.choices import FrameChoice

SUMMARY = "Ask an artifact about pictures or a video, once or in a chat."


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = _parser()
    options = parser.parse_args(argv)
    _check_usage(parser, options)
    config = asked_generation(options)
    limits = asked_limits(options)
    require_grid(options.grid)
    drawing = None
    if options.show_tiles is not None:
        drawing = PngFile(options.show_tiles, force=options.force)
    require_artifact(options.artifact)
    _require_media(options)
    answering = import_for("run", "llava_edge.runtime.cli.answering", "cpu")
    code: int = answering.answer_with(options, config, limits, drawing)
    return code


def _require_media(options: argparse.Namespace) -> None:
    """What is not there is named before a large model is loaded.

    Raises:
        ImageError: a picture cannot be opened.
        VideoError: the video cannot be opened.
    """
    named: list[tuple[str, str, type[LlavaEdgeError]]]
    named = [(path, "image", ImageError) for path in options.image]
    if options.video is not None:
        named.append((options.video, "video", VideoError))
    for path, kind, error_type in named:
        try:
            os.stat(path)
        except (OSError, ValueError) as error:
            raise error_type(
                f"{kind} {printable(path)!r} cannot be read: {plain_reason(error)}. Give a "
                "file on this machine; nothing is fetched."
            ) from error


def _check_usage(parser: CommandParser, options: argparse.Namespace) -> None:
    if options.chat and options.raw:
        parser.error("--chat puts messages into the model's template; --raw takes none")
    if not options.chat and options.prompt is None:
        parser.error("the following arguments are required: --prompt (or --chat)")
    if options.system is not None and not options.chat:
        parser.error("--system belongs to --chat")
    if (
        options.video is None
        and not options.chat
        and (options.frames, options.frame_choice) != (None, None)
    ):
        parser.error("--frames and --frame-choice belong to --video, or to /video in --chat")
    if options.show_tiles is not None and not options.image:
        parser.error("--show-tiles draws the pictures of --image; give at least one")


def _parser() -> CommandParser:
    parser = CommandParser("run", SUMMARY, "ARTIFACT --prompt TEXT [--image FILE] [options]")
    add_artifact_argument(parser)
    ask = parser.add_argument_group("what is asked")
    ask.add_argument("--prompt", metavar="TEXT", help="question; <image> marks where images go")
    ask.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="picture; repeatable"
    )
    ask.add_argument(
        "--video", metavar="FILE", help="video; <video> in the prompt marks where it goes"
    )
    ask.add_argument(
        "--frames",
        type=whole_number(1),
        metavar="N",
        help="frames of the video (default: as many as the artifact was planned for)",
    )
    ask.add_argument(
        "--frame-choice",
        type=one_of(get_args(FrameChoice)),
        metavar=bar(get_args(FrameChoice)),
        help="which frames: transformers' rule or the original repository's (default: reference)",
    )
    ask.add_argument(
        "--chat", action="store_true", help="a conversation: messages are lines of stdin"
    )
    ask.add_argument("--system", metavar="TEXT", help="the system turn of --chat")
    ask.add_argument("--raw", action="store_true", help="the prompt is finished: no template")
    ask.add_argument(
        "--no-image-marks", action="store_true", help="take <image> in the prompt as plain text"
    )
    add_grid_argument(ask)
    ask.add_argument(
        "--max-image-tokens",
        type=whole_number(1),
        metavar="N",
        help="lower the grid until a question's images need no more",
    )
    ask.add_argument(
        "--deadline",
        type=real_number(0, above=True),
        metavar="SECONDS",
        help="time for an answer; lowers the grid where it is short, then ends the answer",
    )
    add_generation_arguments(parser.add_argument_group("how tokens are chosen"))
    machine = parser.add_argument_group("what runs it")
    add_device_arguments(machine)
    machine.add_argument(
        "--context",
        type=whole_number(1),
        metavar="TOKENS",
        help="positions of the cache (default: the plan's)",
    )
    add_cache_argument(machine)
    add_engine_arguments(machine)
    machine.add_argument(
        "--require-verified",
        action="store_true",
        help="refuse an artifact without a certificate that it passed",
    )
    add_limit_arguments(parser.add_argument_group("limits on pictures"))
    output = parser.add_argument_group("output")
    output.add_argument(
        "--show-tiles",
        metavar="PNG",
        help="draw the pictures of --image as they are cut, with padding and token counts",
    )
    output.add_argument("--force", action="store_true", help="replace the file of --show-tiles")
    add_json_argument(output)
    return parser
