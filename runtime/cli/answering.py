"""The half of ``llava-edge run`` that loads the artifact and answers."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any, TextIO

from llava_edge.runtime.cli.arguments import asked_cache
from llava_edge.runtime.cli.chat import ChatLoop, terminal_lines
from llava_edge.runtime.cli.output_file import PngFile
from llava_edge.runtime.generation.generation_config import GenerationConfig
from llava_edge.runtime.generation.output import Answer
from llava_edge.runtime.model import LlavaEdge
from llava_edge.runtime.util.json_codec import to_json
from llava_edge.runtime.util.limits import Limits
from llava_edge.runtime.util.progress import ProgressLine


def answer_with(
    options: argparse.Namespace,
    config: GenerationConfig,
    limits: Limits,
    drawing: PngFile | None,
) -> int:
    """Load, answer, print, and return the exit code.

    Raises:
        LlavaEdgeError: see ``LlavaEdge.load`` and ``LlavaEdge.stream``.
    """
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
        limits=limits,
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
