"""``llava-edge run ARTIFACT``: ask about pictures and stream the answers, once or in a chat."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any, TextIO, get_args

from llava_edge.profiles.boards.device_name import DEVICE_METAVAR, device_argument
from llava_edge.runtime.cli.arguments import add_cache_argument, add_engine_arguments, asked_cache
from llava_edge.runtime.cli.chat import ChatLoop, terminal_lines
from llava_edge.runtime.cli.generation_arguments import add_generation_arguments, asked_generation
from llava_edge.runtime.cli.limit_arguments import add_limit_arguments, asked_limits
from llava_edge.runtime.cli.output_file import PngFile
from llava_edge.runtime.generation.output import Answer
from llava_edge.runtime.model import LlavaEdge
from llava_edge.runtime.processing.video.frame_sampling import FrameChoice
from llava_edge.runtime.util.json_codec import to_json
from llava_edge.runtime.util.progress import ProgressLine


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = _parser()
    options = parser.parse_args(argv)
    _check_usage(parser, options)
    config = asked_generation(options)
    drawing = None
    if options.show_tiles is not None:
        drawing = PngFile(options.show_tiles, force=options.force)
    progress = ProgressLine()
    model = LlavaEdge.load(
        options.artifact,
        device=options.device,
        threads=options.threads,
        context_tokens=options.context,
        cache=asked_cache(options.cache),
        require_verified=options.require_verified,
        allow_slow=options.allow_slow,
        engine=options.engine,
        trust_engines=options.trust_engines,
        limits=asked_limits(options),
        strict_device=options.strict_device,
        progress=progress,
    )
    if drawing is not None:
        drawing.write(model.draw_tiles(options.image, options.grid))
    # With --json the answer stands in the object; the live text then goes where progress goes.
    live = sys.stderr if options.json else sys.stdout
    sampling = {
        "generation_config": config,
        "max_image_tokens": options.max_image_tokens,
        "deadline_seconds": options.deadline,
    }
    frames: dict[str, Any] = {
        "num_frames": options.frames,
        "frame_choice": options.frame_choice or "reference",
    }
    if options.chat:
        return _chat(model, options, live, sampling, progress, frames)
    stream = model.stream(
        options.prompt,
        images=options.image,
        video=options.video,
        **frames,
        raw=options.raw,
        image_marks=not options.no_image_marks,
        grid=options.grid,
        progress=progress,
        **sampling,
    )
    for piece in stream:
        progress.clear()
        print(piece, end="", flush=True, file=live)
    progress.clear()
    print(file=live)
    answer = stream.answer
    print(_described(answer), file=sys.stderr)
    if options.json:
        print(json.dumps(to_json(answer)))
    return 0


def _chat(
    model: LlavaEdge,
    options: argparse.Namespace,
    live: TextIO,
    sampling: dict[str, Any],
    progress: ProgressLine,
    frames: dict[str, Any],
) -> int:
    chat = model.chat(options.system, image_marks=not options.no_image_marks, grid=options.grid)
    loop = ChatLoop(chat, live, _described, sampling, progress, frames)
    for path in options.image:
        loop.show(path)
    if options.video is not None:
        loop.show_video(options.video)
    if options.prompt is not None:
        loop.say(options.prompt)
    loop.run(terminal_lines())
    if options.json:
        turns = [{"prompt": turn.prompt, "answer": to_json(turn.answer)} for turn in loop.turns]
        messages = [
            {
                "role": said.role,
                "text": said.text,
                "images": len(said.images),
                "videos": int(said.video is not None),
            }
            for said in chat.messages
        ]
        print(json.dumps({"turns": turns, "messages": messages}))
    # People saw the error and went on; what feeds a pipe looks at the exit code.
    return 0 if loop.failure is None or sys.stdin.isatty() else loop.failure.exit_code


def _described(answer: Answer) -> str:
    timings = answer.timings
    rate = timings.decode_tokens_per_second
    video = f", {answer.video_tokens} of video" if answer.video_tokens else ""
    reused = f", {answer.reused_tokens} reused" if answer.reused_tokens else ""
    return (
        f"{answer.prompt_tokens} prompt tokens ({answer.image_tokens} of images{video}{reused}), "
        f"{len(answer.token_ids)} new ({answer.finish_reason}); first token after "
        f"{timings.ttft_seconds:.2f} s"
        + (f", then {rate:.1f} tokens/s" if rate is not None else "")
        + (f", {answer.accepted_tokens} looked up" if answer.draft_tokens else "")
        + f"; peak memory {answer.peak_memory.host_bytes / 2**20:.0f} MiB; {answer.engine} on "
        f"{answer.device}"
        + (
            f"; on the CPU all the same: {', '.join(answer.off_device[:4])}"
            + (f" and {more} more" if (more := len(answer.off_device) - 4) > 0 else "")
            if answer.off_device
            else ""
        )
        + "".join(f"\n{line}" for line in (*answer.degraded, *answer.notes))
    )


def _check_usage(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava-edge run", description="Ask an artifact about pictures."
    )
    parser.add_argument("artifact", help="folder that llava-edge convert wrote")
    parser.add_argument("--prompt", help="question; <image> marks where images go")
    parser.add_argument("--image", action="append", default=[], help="picture file; repeatable")
    parser.add_argument("--video", help="video file; <video> in the prompt marks where it goes")
    parser.add_argument("--frames", type=int, metavar="N", help="frames of it; default: the plan's")
    parser.add_argument("--frame-choice", choices=get_args(FrameChoice))
    parser.add_argument(
        "--chat", action="store_true", help="a conversation: messages are lines of stdin"
    )
    parser.add_argument("--system", metavar="TEXT", help="the system turn of --chat")
    parser.add_argument(
        "--show-tiles",
        metavar="PNG",
        help="draw the pictures of --image as they are cut, with padding and token counts",
    )
    parser.add_argument("--force", action="store_true", help="replace the file of --show-tiles")
    parser.add_argument("--raw", action="store_true", help="the prompt is finished: no template")
    parser.add_argument(
        "--no-image-marks", action="store_true", help="take <image> in the prompt as plain text"
    )
    parser.add_argument("--grid", help="lower the AnyRes grid, for instance base or 1x2")
    parser.add_argument(
        "--max-image-tokens",
        type=int,
        metavar="N",
        help="lower the grid until a question's images take no more",
    )
    parser.add_argument(
        "--deadline",
        type=float,
        metavar="SECONDS",
        help="time for an answer; lowers the grid where it will not do, then ends the answer",
    )
    add_generation_arguments(parser)
    parser.add_argument("--device", type=device_argument, metavar=DEVICE_METAVAR, default="auto")
    parser.add_argument("--context", type=int, help="positions of the cache; default: the plan's")
    add_cache_argument(parser)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as are allowed")
    parser.add_argument("--require-verified", action="store_true")
    parser.add_argument("--allow-slow", action="store_true", help="run a cuda artifact on the CPU")
    add_engine_arguments(parser)
    add_limit_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object as last stdout line")
    return parser
