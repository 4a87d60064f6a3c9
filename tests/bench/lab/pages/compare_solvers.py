"""``python -m tests.bench.lab.pages.compare_solvers``: GPTQ beside rounding on a small model.

At 4 bits in groups of 128 both answer as the original does, so groups and bits are lowered until a
difference shows. Layers are replaced by what their codes mean, in transformers; the solver sees the
inputs that the original model has on pages of the training stream.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch

from llava_edge.bench.lab.pages.commands import CALIBRATION_SEED, NUM_CALIBRATION
from llava_edge.bench.lab.pages.drawing.sample import training_sample
from llava_edge.bench.lab.pages.evaluate import Evaluator, held_out
from llava_edge.bench.lab.pages.training.checkpoint import SHIPPED
from llava_edge.convert.checkpoint.formats import rounding
from llava_edge.convert.quantization.gptq.solver import quantize_weight

SETTINGS = ((4, 128), (4, -1), (3, 128), (3, -1), (2, 32))
"""Bits and group size."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print exact match by setting, a line each."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.lab.pages.compare_solvers")
    parser.add_argument("--count", type=int, default=500)
    count = parser.parse_args(arguments).count
    evaluator = Evaluator(SHIPPED)
    model: Any = evaluator.model
    layers = {
        name: layer
        for name, layer in model.model.language_model.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
    moments = _moments(evaluator, layers)
    original = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    questions = held_out(count, 1)
    print(json.dumps({"original": evaluator.evaluate(questions).summary()["exact_match"]}))
    # The formats have 4 and 8 bits; the arithmetic has any number.
    with mock.patch.object(rounding, "check_settings"):
        for bits, group in SETTINGS:
            line: dict[str, Any] = {"bits": bits, "group_size": group}
            for solver in ("rtn", "gptq"):
                for name, layer in layers.items():
                    found = (
                        rounding.round_to_nearest(original[name], bits=bits, group_size=group)
                        if solver == "rtn"
                        else quantize_weight(
                            original[name], moments[name], bits=bits, group_size=group
                        )
                    )
                    layer.weight.data.copy_(torch.from_numpy(found.dequantize()))
                line[solver] = evaluator.evaluate(questions).summary()["exact_match"]
            print(json.dumps(line), flush=True)
    return 0


def _moments(evaluator: Evaluator, layers: dict[str, torch.nn.Linear]) -> dict[str, torch.Tensor]:
    sums = {
        name: torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64)
        for name, layer in layers.items()
    }

    def watch(name: str) -> Any:
        def add(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = inputs[0].detach().flatten(0, -2).double()
            sums[name] += rows.T @ rows

        return add

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    evaluator.answers(
        [
            training_sample(CALIBRATION_SEED * NUM_CALIBRATION + place, 1)
            for place in range(NUM_CALIBRATION)
        ]
    )
    for hook in hooks:
        hook.remove()
    return {name: total / float(total.diagonal().mean()) for name, total in sums.items()}


if __name__ == "__main__":
    sys.exit(main())
