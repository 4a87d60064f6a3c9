"""``llava-edge plan``: which variant, precision, grid and context fit a board, and why not more."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TextIO, get_args

from llava_edge.profiles.boards.detect import detect_profile
from llava_edge.profiles.boards.device_name import DEVICE_METAVAR, device_argument, parse_device
from llava_edge.profiles.boards.hardware import HardwareProfile, load_profile, profile_names
from llava_edge.profiles.command_line import CommandParser, bar, one_of, whole_number, wrapped
from llava_edge.profiles.errors import RequestError
from llava_edge.profiles.memory.buffers import CACHE_FLAGS
from llava_edge.profiles.memory.formats import PRECISIONS, VISION_PRECISIONS
from llava_edge.profiles.memory.speed import ANSWER_TOKENS, QUESTION_TOKENS
from llava_edge.profiles.models.anyres import GRID_NAMES
from llava_edge.profiles.models.variants import find_variant, load_variants
from llava_edge.profiles.plan import DeploymentPlan, RejectedCandidate
from llava_edge.profiles.plan_request import (
    MAX_CONTEXT,
    MAX_FRAMES,
    MAX_IMAGES,
    Engine,
    PlanRequest,
    Prefer,
)
from llava_edge.profiles.planner import DEFAULT_FRAMES, PlanResult, nearest_advice, plan_deployment
from llava_edge.profiles.sizes import format_bytes, parse_bytes

SUMMARY = "Say which model, precision, grid and context fit a board, and why no larger."

MOST_MEMORY = 16 << 40
"""Of a ``--vram``: more is a slip of the unit."""


def main(argv: list[str] | None = None) -> int:
    """Plan and print; 0 where something fits, 2 where nothing does.

    Raises:
        RequestError: the request is malformed; the caller prints it.
    """
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.list:
        return _list(parser, arguments)
    profile = choose_profile(arguments)
    request = build_request(arguments)
    result = plan_deployment(profile, request, pareto=arguments.all)
    plan = result.plan
    write_report(result, profile, sys.stderr if arguments.json else sys.stdout)
    if not plan.fits:
        print(f"error: {misfit(profile, request, plan)}", file=sys.stderr)
    if arguments.json:
        document: dict[str, Any] = plan.to_json()
        if arguments.all:
            document["pareto"] = [other.to_json() for other in result.pareto]
        print(json.dumps(document))
    return 0 if plan.fits else 2


def build_parser() -> CommandParser:
    """The command's flags; ``convert`` adds the same ones with ``add_plan_arguments``."""
    parser = CommandParser("plan", SUMMARY, "[MODEL] [--profile NAME | --vram SIZE] [options]")
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="variant, hub id or checkpoint folder; default: every image variant",
    )
    parser.add_argument(
        "--list", action="store_true", help="list the profiles and the variants, plan nothing"
    )
    parser.add_argument(
        "--all", action="store_true", help="also the plans that no other beats (Pareto set)"
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object as the last line of stdout"
    )
    add_plan_arguments(parser)
    return parser


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that describe board and wishes, the same for every command that plans."""
    board = parser.add_argument_group("board")
    board.add_argument("--profile", metavar="NAME|FILE", help="a board (default: this machine)")
    board.add_argument("--vram", metavar="SIZE", help="memory that is free for us, such as 24GiB")
    board.add_argument("--detect", action="store_true", help="this machine as it is now")
    board.add_argument(
        "--device",
        type=device_argument,
        metavar=DEVICE_METAVAR,
        default="auto",
        help="what runs the language model",
    )
    board.add_argument(
        "--engine",
        type=one_of(get_args(Engine)),
        metavar=bar(get_args(Engine)),
        default="auto",
        help="what runs the vision tower; auto: TensorRT-RTX where it supports the GPU",
    )
    wish = parser.add_argument_group("wishes")
    wish.add_argument(
        "--prefer",
        type=one_of(get_args(Prefer)),
        metavar=bar(get_args(Prefer)),
        default="largest",
        help="what comes first: the variant, the grid, or a quick answer",
    )
    wish.add_argument(
        "--precision",
        type=one_of(PRECISIONS),
        metavar=bar(PRECISIONS),
        help="of the language model (default: the most exact that fits)",
    )
    wish.add_argument(
        "--vision-precision",
        type=one_of(VISION_PRECISIONS),
        metavar=bar(VISION_PRECISIONS),
        help="of tower and projector (default: int8 where language model and board allow it)",
    )
    wish.add_argument(
        "--grid",
        metavar="NAME",
        help=f"{', '.join(GRID_NAMES)} (default: the largest that fits)",
    )
    wish.add_argument("--pinpoints", metavar="HxW,...", help="candidates of one's own, in pixels")
    wish.add_argument(
        "--context",
        type=whole_number(1, MAX_CONTEXT),
        metavar="TOKENS",
        help="positions of the cache (default: as many as fit)",
    )
    wish.add_argument(
        "--images",
        type=whole_number(1, MAX_IMAGES),
        default=1,
        metavar="N",
        help="images in one prompt",
    )
    wish.add_argument(
        "--cache",
        type=one_of(CACHE_FLAGS),
        metavar=bar(CACHE_FLAGS),
        help="type of the key and value cache (default: the target's own)",
    )
    wish.add_argument(
        "--video",
        nargs="?",
        type=_num_frames,
        const=DEFAULT_FRAMES,
        default=0,
        metavar="FRAMES",
        help=f"plan for a video model and so many frames; {DEFAULT_FRAMES} where no number follows",
    )


def _num_frames(text: str) -> int:
    try:
        return whole_number(1, MAX_FRAMES)(text)
    except argparse.ArgumentTypeError as error:
        # A model that follows is read as the number.
        raise argparse.ArgumentTypeError(
            f"{error} frames. Write a number or nothing after --video, and a model before it"
        ) from error


def choose_profile(arguments: argparse.Namespace) -> HardwareProfile:
    """The board that the flags of ``add_plan_arguments`` describe.

    Raises:
        RequestError: flags contradict each other, or the board is unknown.
    """
    name, vram, device = arguments.profile, arguments.vram, arguments.device
    if name and arguments.detect:
        raise RequestError("--profile and --detect were both given. Give one of them.")
    detects = arguments.detect or (name is None and vram is None)
    if vram is None:
        profile = load_profile(name) if name else detect_profile(device=device)
    else:
        memory = _free_memory(vram)
        if name or arguments.detect:
            known = load_profile(name) if name else detect_profile(device=device)
            profile = _with_memory(known, memory)
        else:
            profile = _vram_profile(memory, vram)
    asked = parse_device(device)
    if asked.index is not None and not detects:
        raise RequestError(
            f"--device {device} names a GPU of this machine, and the plan is for "
            f"{profile.title}. Give --detect, or --device cuda."
        )
    if asked.kind not in ("auto", profile.target):
        raise RequestError(
            f"--device {device} was asked, but {profile.name} runs the {profile.target} target. "
            "Name another board, or leave --device out."
        )
    return profile


def build_request(arguments: argparse.Namespace) -> PlanRequest:
    """The wishes that the flags of ``add_plan_arguments`` describe.

    Raises:
        RequestError: the model is unknown.
    """
    return PlanRequest(
        variants=(find_variant(arguments.model),) if arguments.model else (),
        precision=arguments.precision,
        vision_precision=arguments.vision_precision,
        grid=arguments.grid,
        pinpoints=arguments.pinpoints,
        context_tokens=arguments.context,
        num_images=arguments.images,
        num_frames=arguments.video,
        cache=CACHE_FLAGS[arguments.cache] if arguments.cache else None,
        prefer=arguments.prefer,
        engine=arguments.engine,
    )


def _free_memory(text: str) -> int:
    memory = parse_bytes(text)
    if memory > MOST_MEMORY:
        raise RequestError(
            f"--vram {text[:40]} is more memory than any board has (at most "
            f"{format_bytes(MOST_MEMORY)}). Check the unit: 24GiB is an RTX 4090."
        )
    return memory


def _vram_profile(memory: int, text: str) -> HardwareProfile:
    """A GPU of which only the free memory is known: speeds stay unknown."""
    return HardwareProfile(
        name=f"vram-{text.replace(' ', '')}",
        title=f"a GPU with {format_bytes(memory)} free",
        kind="cuda",
        memory_bytes=memory,
        system_reserve_bytes=0,
        host_memory_bytes=None,
        host_reserve_bytes=0,
        bandwidth=None,
        peak_fp16=None,
        peak_int8=None,
        compute_capability=None,
        providers=("CUDAExecutionProvider", "CPUExecutionProvider"),
        int8_isa="none",
        num_devices=1,
        prefill_chunk=2048,
        wheels="",
        sources={"memory": "--vram"},
    )


def _with_memory(profile: HardwareProfile, memory: int) -> HardwareProfile:
    shared = profile.kind != "cuda"
    return replace(
        profile,
        memory_bytes=memory,
        system_reserve_bytes=0,
        host_memory_bytes=memory if shared else profile.host_memory_bytes,
        host_reserve_bytes=0 if shared else profile.host_reserve_bytes,
    )


def misfit(profile: HardwareProfile, request: PlanRequest, plan: DeploymentPlan) -> str:
    """Why nothing fits, and the nearest that does."""
    advice = nearest_advice(profile, request, plan)
    short = plan.memory.shortfall_bytes
    reason = (
        f"the least, {plan.variant} at {plan.precision} with grid {plan.grid}, is short of "
        f"{format_bytes(short)}"
        if short
        else plan.rejected[-1].reason
    )
    return f"nothing that was asked fits {profile.name}: {reason}. {advice}"


def write_report(result: PlanResult, profile: HardwareProfile, out: TextIO) -> None:
    """The answer, its terms and the larger candidates, for people."""
    plan = result.plan
    verdict = "fits" if plan.fits else "does NOT fit"
    lines = [
        f"{profile.title} ({profile.name})",
        f"{plan.variant} at {plan.precision}, grid {plan.grid}, context {plan.context_tokens} "
        f"tokens, engine {plan.engine}: {verdict}",
        f"an image: at most {plan.max_tiles} tiles, {plan.max_image_tokens} tokens",
        "",
        *_terms(plan.memory.terms),
        f"  {'total':22}{format_bytes(plan.memory.total_bytes):>12}",
        f"  {'budget':22}{format_bytes(plan.memory.budget_bytes):>12}",
    ]
    if plan.memory.host_terms:
        lines += ["", "host:", *_terms(plan.memory.host_terms)]
        lines.append(f"  {'total':22}{format_bytes(plan.memory.host_total_bytes):>12}")
    lines += ["", _speed(plan)]
    lines += [f"note: {note}" for note in result.notes]
    if plan.rejected:
        lines += ["", "larger, and why not:"]
        lines += [
            f"  {r.variant} {r.precision} {r.grid}: {r.reason}"
            for r in (plan.rejected if result.pareto else _nearest_of_each(plan))
        ]
    if result.pareto:
        lines += ["", "not beaten by any other:"]
        lines += [
            f"  {'variant':22} {'precision':9} {'grid':4} {'context':>7} {'memory':>10} "
            f"{'first token':>11} {'tokens/s':>8}",
            *(_pareto_row(p) for p in result.pareto),
        ]
    print("\n".join(map(wrapped, lines)), file=out)


def _pareto_row(plan: DeploymentPlan) -> str:
    first, rate = plan.predicted.ttft_seconds, plan.predicted.decode_tokens_per_second
    return (
        f"  {plan.variant:22} {plan.precision:9} {plan.grid:4} {plan.context_tokens:7} "
        f"{format_bytes(plan.memory.total_bytes):>10} "
        f"{'unknown' if first is None else f'{first:.2f} s':>11} "
        f"{'unknown' if rate is None else f'{rate:.1f}':>8}"
    )


def _list(parser: CommandParser, arguments: argparse.Namespace) -> int:
    if arguments.model or arguments.profile or arguments.vram or arguments.all:
        parser.error("--list plans nothing; give it alone, or with --json")
    boards = [load_profile(name) for name in profile_names()]
    lines = [f"{'profile':20}{'memory':>13}  board"]
    for board in boards:
        several = f"{board.num_devices} x " if board.num_devices > 1 else ""
        size = f"{several}{format_bytes(board.memory_bytes)}"
        # A title that is too long goes on below itself.
        lines.append(wrapped(f"{board.name:20}{size:>13}  {board.title}", hang=35))
    lines += ["", f"{'variant':24}{'at fp16':>10}  {'for':9}  hub id"]
    for each in load_variants():
        size = format_bytes(each.fp16_bytes)
        lines.append(f"{each.name:24}{size:>10}  {each.kind:9}  {each.hub_id or ''}".rstrip())
    print("\n".join(lines), file=sys.stderr if arguments.json else sys.stdout)
    if arguments.json:
        variants = [each.name for each in load_variants()]
        print(json.dumps({"profiles": [board.name for board in boards], "variants": variants}))
    return 0


def _nearest_of_each(plan: DeploymentPlan) -> list[RejectedCandidate]:
    """Of each variant the candidate that needs least; people need no list of sixty lines."""
    nearest: dict[str, RejectedCandidate] = {}
    for candidate in plan.rejected:
        best = nearest.get(candidate.variant)
        # The chosen variant's last entry is the next larger context: always worth a line.
        if best is None or candidate.total_bytes <= best.total_bytes:
            nearest[candidate.variant] = candidate
    last = plan.rejected[-1]
    return [*(c for c in nearest.values() if c is not last), last]


def _terms(terms: Mapping[str, int]) -> list[str]:
    return [f"  {name:22}{format_bytes(count):>12}" for name, count in terms.items() if count]


def _speed(plan: DeploymentPlan) -> str:
    if plan.predicted.ttft_seconds is None:
        return f"predicted, not measured: {_rate(plan)}"
    return (
        f"predicted, not measured: first token after {plan.predicted.ttft_seconds:.2f} s for a "
        f"full prompt and {QUESTION_TOKENS} tokens of question, then {_rate(plan)} "
        f"(in the middle of {ANSWER_TOKENS})"
    )


def _rate(plan: DeploymentPlan) -> str:
    rate = plan.predicted.decode_tokens_per_second
    return "speed unknown" if rate is None else f"{rate:.1f} tokens/s"
