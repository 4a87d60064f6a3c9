"""transformers in float16 with SDPA on the device: what a user has today, and what is compared.

    python -m llava_edge.bench.lab.gpu.reference answers MODEL CHECKPOINT OUT.npz --device cuda
    python -m llava_edge.bench.lab.gpu.reference time CHECKPOINT CASES.json --device cuda

``answers`` keeps greedy ids and the logits they were chosen from; ``time`` takes the cases that an
artifact was asked, with pictures of the same sizes and prompts of the same lengths. A process of
its own, so that its memory is its own; the last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from llava_edge.bench.lab.chat_prompt import chat_prompts
from llava_edge.bench.lab.gpu.models import GPU_MODELS
from llava_edge.bench.lab.reference_loader import load_model, load_processor
from llava_edge.bench.speed.cases import draw_picture
from llava_edge.profiles.boards.nvml import process_bytes
from llava_edge.runtime.util.atomic_write import atomic_file
from llava_edge.runtime.util.host_memory import peak_host_bytes

_REPEATS = 3
_ENOUGH_SECONDS = 10.0
"""Of first tokens; float16 on a CPU takes minutes otherwise."""
_WORDS = "Describe what is shown here, please. "


class Reference:
    """A checkpoint in transformers; attributes are transformers' own objects.

    Args:
        checkpoint: folder.
        device: ``cuda`` or ``cpu``.
    """

    def __init__(self, checkpoint: Path, device: str) -> None:
        self.device = device
        self.processor: Any = load_processor(checkpoint)
        model = load_model(
            checkpoint, torch.float16, attn_implementation="sdpa", low_cpu_mem_usage=True
        )
        self.model: Any = model.to(device)

    def prompt(self, question: str) -> str:
        """A question about one picture in the model's own template."""
        return chat_prompts(self.processor, [question])[0]

    def answer(self, image: Image.Image, question: str, most: int) -> tuple[list[int], Any]:
        """Greedy ids, and float32 (ids, vocab) logits that each was chosen from."""
        inputs = self.processor(images=[image], text=self.prompt(question), return_tensors="pt")
        inputs = self._placed(inputs)
        with torch.no_grad():
            found = self.model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=most,
                output_logits=True,
                return_dict_in_generate=True,
            )
        ids = found.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        rows = torch.cat(found.logits).float().cpu().numpy()
        return ids, rows

    def measure(self, case: Mapping[str, Any], number: int) -> dict[str, Any]:
        """One case: time to the first token and the rate behind it, medians of repeats."""
        seconds: list[float] = []
        rates: list[float] = []
        for repeat in range(_REPEATS + 1):
            if repeat > 1 and sum(seconds) > _ENOUGH_SECONDS:
                break
            clock = _TokenClock(self.device)
            start = time.perf_counter()
            inputs = self._inputs(case, (number, repeat))
            with torch.no_grad():
                self.model.generate(
                    **inputs,
                    do_sample=False,
                    max_new_tokens=case["answer_tokens"],
                    min_new_tokens=case["answer_tokens"],
                    logits_processor=transformers.LogitsProcessorList([clock]),
                )
            if repeat:
                # The first one warms up.
                seconds.append(clock.at[0] - start)
                rates.append((len(clock.at) - 1) / max(clock.at[-1] - clock.at[0], 1e-9))
        tokens = int(inputs["input_ids"].shape[1])
        return {
            "name": case["name"],
            "prompt_tokens": tokens,
            "ttft_seconds": float(np.median(seconds)),
            "decode_tokens_per_second": float(np.median(rates)),
        }

    def _inputs(self, case: Mapping[str, Any], seed: tuple[int, int]) -> Any:
        """Pictures as a case has them, and words until the prompt is as long as it was."""
        tokenizer = self.processor.tokenizer
        count = case["num_images"]
        if count:
            pictures = [
                Image.open(io.BytesIO(draw_picture((*seed, n), case["height"], case["width"])))
                for n in range(count)
            ]
            text = self.processor.image_token * count
            inputs = dict(self.processor(images=pictures, text=text, return_tensors="pt"))
        else:
            inputs = dict(tokenizer("", return_tensors="pt"))
        held = inputs["input_ids"].shape[1]
        words = tokenizer(_WORDS, add_special_tokens=False)["input_ids"]
        missing = max(1, case["prompt_tokens"] - held)
        more = torch.tensor([(words * (missing // len(words) + 1))[:missing]], dtype=torch.long)
        inputs["input_ids"] = torch.cat([inputs["input_ids"].long(), more], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        return self._placed(inputs)

    def _placed(self, inputs: Any) -> dict[str, Any]:
        """Tensors on the device, pixels in the model's type."""
        placed = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        if "pixel_values" in placed:
            placed["pixel_values"] = placed["pixel_values"].to(torch.float16)
        return placed


class _TokenClock(transformers.LogitsProcessor):  # type: ignore[misc, name-defined, unused-ignore]
    """Notes when the logits of each token are there; changes nothing."""

    def __init__(self, device: str) -> None:
        self.at: list[float] = []
        self._device = device

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if self._device == "cuda":
            torch.cuda.synchronize()
        self.at.append(time.perf_counter())
        return scores


def main(argv: list[str] | None = None) -> int:
    """Answer or measure."""
    options = _parser().parse_args(argv)
    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    started = time.perf_counter()
    reference = Reference(options.checkpoint, options.device)
    loaded = time.perf_counter() - started
    found = (_answers if options.act == "answers" else _time)(reference, options)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    print(json.dumps({**versions, "load_seconds": loaded, **found}))
    return 0


def _answers(reference: Reference, options: argparse.Namespace) -> dict[str, Any]:
    model = GPU_MODELS[options.model]
    kept: dict[str, Any] = {}
    for number, (image, question) in enumerate(model.questions()):
        ids, rows = reference.answer(image, question, model.answer_tokens)
        kept |= {f"ids {number}": np.array(ids), f"logits {number}": rows}
    with atomic_file(options.out) as partial, open(partial, "wb") as file:
        np.savez(file, **kept)
    return {"prompts": len(kept) // 2}


def _time(reference: Reference, options: argparse.Namespace) -> dict[str, Any]:
    cases = json.loads(options.cases.read_text("utf-8"))
    rows = [reference.measure(case, options.round) for case in cases]
    return {
        "device": options.device,
        "cases": rows,
        "peak_memory": {
            "host_bytes": peak_host_bytes(),
            "device_bytes": process_bytes(os.getpid()) or _in_use(options.device),
        },
    }


def _in_use(device: str) -> int | None:
    """Where the driver does not list this process, as in some containers: all that is in use.

    As for artifacts, whose fallback is the same but for what was in use before. torch gives nothing
    back to the driver, so it is the most that was held; the driver's context counts.
    """
    if device == "cpu":
        return None
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="transformers in float16 on the device.")
    acts = parser.add_subparsers(dest="act", required=True)
    answers = acts.add_parser("answers", help="greedy ids and logits")
    answers.add_argument("model", choices=GPU_MODELS)
    answers.add_argument("checkpoint", type=Path)
    answers.add_argument("out", type=Path)
    timing = acts.add_parser("time", help="time to the first token and rates")
    timing.add_argument("checkpoint", type=Path)
    timing.add_argument("cases", type=Path, help="JSON: as rows of the bench have them")
    timing.add_argument("--round", type=int, default=0)
    for act in (answers, timing):
        act.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    return parser


if __name__ == "__main__":
    sys.exit(main())
