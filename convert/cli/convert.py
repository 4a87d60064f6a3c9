"""``llava-edge convert CHECKPOINT OUT``: a checkpoint becomes an artifact for one board."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from llava_edge.convert.pipeline import convert_checkpoint
from llava_edge.convert.planning.request import ConvertRequest
from llava_edge.convert.quality.request import QualityRequest
from llava_edge.convert.quantization.plan import NUM_SAMPLES, QuantizationRequest
from llava_edge.convert.util.progress import StageBars
from llava_edge.profiles.cli import add_plan_arguments, build_request, choose_profile
from llava_edge.profiles.errors import RequestError
from llava_edge.runtime.cli.limit_arguments import add_limit_arguments, asked_limits
from llava_edge.runtime.util.json_codec import to_json


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
    limits = asked_limits(options)
    request = ConvertRequest(
        checkpoint=options.checkpoint,
        out=options.named_out or options.out,
        profile=choose_profile(options),
        wishes=build_request(options),
        quantization=QuantizationRequest(
            quantizer=options.quantizer,
            calibration=options.calibration,
            num_samples=options.samples,
            limits=limits,
        ),
        emit_hf="hf" in options.emit,
        reference=options.reference,
        use_template=not options.no_template,
        force=options.force,
        verify=options.verify,
        quality=None
        if options.quality is None
        else QualityRequest(options.quality, options.max_loss, limits),
    )
    start = time.perf_counter()
    with StageBars() as bars:
        conversion = convert_checkpoint(request, bars, bars.say)
    seconds = time.perf_counter() - start
    manifest = conversion.manifest
    size = conversion.artifact_bytes / 2**20
    print(
        f"{conversion.folder}: {manifest.variant}, {manifest.target} target, "
        f"{manifest.plan['precision']}, grid {manifest.plan['grid']} "
        f"(at most {manifest.plan['max_image_tokens']} tokens an image), context "
        f"{manifest.context_tokens}, {size:.1f} MiB in {seconds:.1f} s",
        file=sys.stderr,
    )
    if options.json:
        result = {
            "artifact": str(conversion.folder),
            "artifact_bytes": conversion.artifact_bytes,
            "seconds": seconds,
            "plan": conversion.plan.to_json(),
            "verdict": conversion.certificate.verdict,
            "verified": conversion.certificate.passed,
            "quality": to_json(conversion.certificate.quality),
        }
        print(json.dumps(result))
    else:
        print(conversion.folder)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava-edge convert", description="Turn a LLaVA-NeXT checkpoint into an artifact."
    )
    parser.add_argument(
        "checkpoint",
        nargs="?",
        help="folder with safetensors files, or a hub id (owner/name@revision); "
        "default: the variant that the plan chooses",
    )
    parser.add_argument(
        "out", nargs="?", type=Path, help="default: artifacts/<variant>-<precision>-<profile>"
    )
    parser.add_argument(
        "--out", dest="named_out", type=Path, help="OUT, where no checkpoint is named"
    )
    parser.add_argument("--model", help="variant to plan for where no checkpoint is given")
    add_plan_arguments(parser)
    parser.add_argument(
        "--reference", choices=("hf", "original"), help="order of candidates on ties"
    )
    parser.add_argument("--quantizer", choices=("gptq", "rtn"), default="gptq")
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="DIR|FILE",
        help="questions, answers and images, for GPTQ and for the tower: JSON Lines or a JSON list",
    )
    parser.add_argument("--samples", type=int, default=NUM_SAMPLES, help="calibration samples")
    add_limit_arguments(parser)
    parser.add_argument(
        "--emit",
        type=_emitted,
        default=["onnx"],
        metavar="onnx,hf",
        help="hf: also a GPTQ checkpoint for transformers and vLLM, in OUT/gptq",
    )
    parser.add_argument(
        "--no-template", action="store_true", help="leave the chat template out: raw prompts only"
    )
    parser.add_argument(
        "--verify",
        choices=("quick", "full", "none"),
        default="quick",
        help="how much is compared with the checkpoint before the artifact takes its place",
    )
    parser.add_argument(
        "--quality",
        type=Path,
        metavar="FILE",
        help="questions with their answers, as bench --quality reads them: right answers at fp16 "
        "and of the artifact are counted and stand in certificate and card",
    )
    parser.add_argument(
        "--max-loss",
        type=float,
        metavar="SHARE",
        help="refuse an artifact that loses more of the right answers, on balance; 0.02 for 2 %%",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT, discard OUT.partial")
    parser.add_argument("--json", action="store_true", help="one JSON object as last stdout line")
    return parser


def _emitted(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if "onnx" not in names or not {*names} <= {"onnx", "hf"}:
        raise argparse.ArgumentTypeError(f"{text!r} is not onnx or onnx,hf")
    return names
