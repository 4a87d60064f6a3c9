"""``llava-edge convert``: turns a checkpoint into an artifact for one board.

Arguments are read and checked here; torch is imported by ``converting``.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import get_args

from llava_edge.convert.checkpoint.source import resolve_source
from llava_edge.convert.output.output_path import refuse_existing
from llava_edge.convert.quantization.request import NUM_SAMPLES, QuantizationRequest, Quantizer
from llava_edge.profiles.boards.hardware import HardwareProfile
from llava_edge.profiles.cli import add_plan_arguments, build_request, choose_profile, misfit
from llava_edge.profiles.command_line import CommandParser, bar, one_of, real_number, whole_number
from llava_edge.profiles.errors import (
    BudgetError,
    CheckpointError,
    RequestError,
)
from llava_edge.profiles.models.anyres import grid_pinpoints
from llava_edge.profiles.models.variants import load_variants, read_folder
from llava_edge.profiles.plan_request import PlanRequest
from llava_edge.profiles.planner import plan_deployment
from llava_edge.runtime.artifact.manifest import Reference
from llava_edge.runtime.cli.arguments import add_json_argument, require_questions
from llava_edge.runtime.cli.limit_arguments import add_limit_arguments, asked_limits
from llava_edge.runtime.cli.settled_imports import import_for

SUMMARY = "Turn a LLaVA-NeXT checkpoint into an artifact for one board."


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(argv)
    if options.checkpoint and options.model:
        raise RequestError(
            f"CHECKPOINT {options.checkpoint} and --model {options.model} were both given; --model "
            "says what to plan for where no checkpoint is named. Give one of them."
        )
    if options.max_loss is not None and options.quality is None:
        raise RequestError(
            f"--max-loss {options.max_loss} was given without --quality FILE, whose questions it "
            "is measured on. Give both, or leave it out."
        )
    profile = choose_profile(options)
    wishes = build_request(options)
    limits = asked_limits(options)
    quantization = QuantizationRequest(
        quantizer=options.quantizer,
        calibration=options.calibration,
        num_samples=options.samples,
        limits=limits,
    )
    out = options.named_out or options.out
    if out is not None:
        _require_output(out, force=options.force)
    _require_plan(options.checkpoint, profile, wishes)
    quality = None
    if options.quality is not None:
        require_questions(options.quality)
        asking = import_for("convert", "llava_edge.convert.quality.request", "convert")
        quality = asking.QualityRequest(options.quality, options.max_loss, limits)
    converting = import_for("convert", "llava_edge.convert.cli.converting", "convert")
    code: int = converting.convert_and_print(options, out, profile, wishes, quantization, quality)
    return code


def _require_plan(checkpoint: str | None, profile: HardwareProfile, wishes: PlanRequest) -> None:
    """Refuse a checkpoint that is not there, and wishes that no plan can keep to.

    The conversion plans again, with all files of the checkpoint at hand.

    Raises:
        RequestError: naming what.
    """
    if wishes.grid is not None:
        grid_pinpoints(wishes.grid, 1)
    folder = None if checkpoint is None else resolve_source(checkpoint).folder
    if folder is not None:
        if not (folder / "config.json").exists():
            raise CheckpointError(
                f"{folder} has no config.json. Give the folder that holds it next to the weights."
            )
        try:
            variant = read_folder(folder)
        except RequestError:
            # Opening it names every fault, and reads layouts that a plan does not.
            return
        wishes = replace(wishes, variants=(variant,))
    elif checkpoint is not None:
        wishes = replace(
            wishes, variants=tuple(v for v in load_variants() if checkpoint == v.hub_id)
        )
    if wishes.variants or checkpoint is None:
        result = plan_deployment(profile, wishes)
        if folder is None and not result.plan.fits:
            raise BudgetError(misfit(profile, wishes, result.plan))


def _require_output(out: Path, *, force: bool) -> None:
    """Refuse an output that would be refused after the checkpoint was read.

    Raises:
        OutputExistsError: it exists and is not to be replaced.
        RequestError: it cannot be written.
    """
    if not force:
        # What is to be replaced may hold the checkpoint, which the plan tells first.
        refuse_existing(out, force=False)
    path = Path(os.path.abspath(out))
    above = next((each for each in path.parents if os.path.lexists(each)), path.parent)
    if not above.is_dir():
        raise RequestError(f"{out} cannot be written: {above} is no folder. Name another output.")


def _parser() -> CommandParser:
    parser = CommandParser("convert", SUMMARY, "[CHECKPOINT [OUT]] [--profile NAME] [options]")
    parser.add_argument(
        "checkpoint",
        nargs="?",
        metavar="CHECKPOINT",
        help="folder with safetensors files, or a hub id (owner/name@revision); "
        "default: the variant that the plan chooses",
    )
    parser.add_argument(
        "out",
        nargs="?",
        type=Path,
        metavar="OUT",
        help="the artifact's folder; default: artifacts/<variant>-<precision>-<profile>",
    )
    parser.add_argument(
        "--out",
        dest="named_out",
        type=Path,
        metavar="OUT",
        help="the same, where no checkpoint is named",
    )
    parser.add_argument(
        "--model", metavar="VARIANT", help="variant to plan for where no checkpoint is named"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT, discard OUT.partial")
    add_json_argument(parser)
    add_plan_arguments(parser)
    numbers = parser.add_argument_group("precision")
    numbers.add_argument(
        "--quantizer",
        type=one_of(get_args(Quantizer)),
        metavar=bar(get_args(Quantizer)),
        default="gptq",
        help="how int8 and int4 codes are found: gptq calibrates, rtn rounds",
    )
    numbers.add_argument(
        "--calibration",
        type=Path,
        metavar="DIR|FILE",
        help="questions, answers and images, for GPTQ and for the tower: JSON Lines or a JSON "
        "list (default: pages drawn for it)",
    )
    numbers.add_argument(
        "--samples",
        type=whole_number(1),
        default=NUM_SAMPLES,
        metavar="N",
        help="calibration samples",
    )
    add_limit_arguments(parser.add_argument_group("limits on pictures"))
    made = parser.add_argument_group("what is made")
    made.add_argument(
        "--emit",
        type=_emitted,
        default=["onnx"],
        metavar="onnx,hf",
        help="hf: also a GPTQ checkpoint for transformers and vLLM, in OUT/gptq (default: onnx)",
    )
    made.add_argument(
        "--reference",
        type=one_of(get_args(Reference)),
        metavar=bar(get_args(Reference)),
        help="order of candidates on ties (default: as the checkpoint's layout has it)",
    )
    made.add_argument(
        "--no-template", action="store_true", help="leave the chat template out: raw prompts only"
    )
    proof = parser.add_argument_group("verification")
    proof.add_argument(
        "--verify",
        type=one_of(("quick", "full", "none")),
        metavar="quick|full|none",
        default="quick",
        help="how much is compared with the checkpoint before the artifact is released",
    )
    proof.add_argument(
        "--quality",
        type=Path,
        metavar="FILE",
        help="questions with their answers, as bench --quality reads them: right answers at fp16 "
        "and of the artifact are counted and stand in certificate and card",
    )
    proof.add_argument(
        "--max-loss",
        type=real_number(0, 1),
        metavar="SHARE",
        help="refuse an artifact that loses more of the right answers, on balance; 0.02 for 2 %%",
    )
    return parser


def _emitted(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if "onnx" not in names or not {*names} <= {"onnx", "hf"}:
        raise argparse.ArgumentTypeError(f"{text!r} is not onnx or onnx,hf")
    return names
