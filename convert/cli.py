"""``llava-edge convert CHECKPOINT OUT``: a checkpoint becomes an artifact for one board."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava_edge.convert.pipeline import convert_checkpoint
from llava_edge.convert.request import ConvertRequest


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(argv)
    request = ConvertRequest(
        checkpoint=options.checkpoint,
        out=options.out,
        profile=options.profile,
        precision=options.precision,
        grid=options.grid,
        pinpoints=options.pinpoints,
        context=options.context,
        reference=options.reference,
        revision=options.revision,
        use_template=not options.no_template,
        force=options.force,
    )
    start = time.perf_counter()
    with StageBars() as bars:
        conversion = convert_checkpoint(request, bars)
    seconds = time.perf_counter() - start
    manifest = conversion.manifest
    size = conversion.artifact_bytes / 2**20
    print(
        f"{conversion.folder}: {manifest.variant}, {manifest.flavour} flavour, "
        f"{request.precision}, grid {manifest.plan['grid']} "
        f"(at most {manifest.plan['max_image_tokens']} tokens an image), context "
        f"{manifest.context_tokens}, {size:.1f} MiB in {seconds:.1f} s",
        file=sys.stderr,
    )
    if not manifest.conversion["is_trained_grid"]:
        print(
            f"note: the weights were not trained on every candidate of grid "
            f"{manifest.plan['grid']}; answers about large images may be worse",
            file=sys.stderr,
        )
    if options.json:
        result = {
            "artifact": str(conversion.folder),
            "artifact_bytes": conversion.artifact_bytes,
            "seconds": seconds,
            "plan": manifest.plan,
        }
        print(json.dumps(result))
    else:
        print(conversion.folder)
    return 0


class StageBars:
    """One progress bar a stage, on stderr."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._stage = ""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Advance a stage; a new name closes the bar before it."""
        if stage != self._stage:
            self.close()
            self._stage = stage
            self._bar = tqdm(
                total=total, desc=f"{stage:<10}", unit="B", unit_scale=True, leave=False
            )
        assert self._bar is not None
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> StageBars:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava-edge convert", description="Turn a LLaVA-NeXT checkpoint into an artifact."
    )
    parser.add_argument("checkpoint", help="folder with safetensors files, or a hub id")
    parser.add_argument(
        "out", nargs="?", type=Path, help="default: artifacts/<variant>-<precision>-<profile>"
    )
    parser.add_argument("--profile", default="cpu-16gb", help="board: a name or a TOML file")
    parser.add_argument("--precision", choices=("fp16",), default="fp16")
    parser.add_argument("--grid", help="AnyRes candidates by name: base, 1x2, 2x2, …")
    parser.add_argument("--pinpoints", help="AnyRes candidates in pixels: HxW,HxW,…")
    parser.add_argument("--context", type=int, help="positions of the cache")
    parser.add_argument(
        "--reference", choices=("hf", "original"), help="order of candidates on ties"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--no-template", action="store_true", help="leave the chat template out: raw prompts only"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT, discard OUT.partial")
    parser.add_argument("--json", action="store_true", help="one JSON object as last stdout line")
    return parser
