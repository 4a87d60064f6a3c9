"""Judge of two quantisers: the same checks on the same tokens, by neither's code.

    python peer_judge.py MODEL TOKENS CANDIDATE…

MODEL is a text-only transformers checkpoint, TOKENS a JSON object of lists of lists of ids by name,
a CANDIDATE ``name=FOLDER`` with a GPTQ checkpoint of that model (v1 layout, symmetric; prefixes of
its tensors do not matter). Everything is computed in float32 and summed in float64. Prints a JSON
object: for each set of tokens and candidate

- ``linears``: ||X (W - Ŵ)^T||² / ||X W^T||² of each linear layer, X being what it reads in the
  model of full precision;
- ``layers``: ||h - ĥ||² / ||h||² of the hidden states behind each decoder layer of the whole
  quantised model, ``changes`` the same of what the layers added to the embeddings;
- ``logits``: the same of the logits.

Runs in the environment of the peer, without this project's packages.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

_LINEAR = re.compile(r"(?:^|\.)(layers\.\d+\.\w+\.\w+)\.qweight$")
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
SAFE: Mapping[str, Any] = {"trust_remote_code": False, "local_files_only": True}
_Weights = Mapping[str, torch.Tensor]
_Found = tuple[list[torch.Tensor], torch.Tensor]
"""Residual stream before the first layer and behind each, and logits."""


def read_candidate(folder: Path) -> dict[str, torch.Tensor]:
    """Values float32 [outputs, inputs] of every quantised linear layer, by ``layers.N.…``."""
    settings = json.loads((folder / "quantize_config.json").read_text("utf-8"))
    bits, layout = int(settings["bits"]), settings.get("checkpoint_format", "gptq")
    if layout != "gptq" or settings["desc_act"] or not settings["sym"]:
        raise SystemExit(f"{folder}: not a symmetric GPTQ checkpoint of layout v1")
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    found: dict[str, torch.Tensor] = {}
    for name in tensors:
        match = _LINEAR.search(name)
        if match:
            prefix = name.removesuffix(".qweight")
            qweight, qzeros, scales, g_idx = (tensors[f"{prefix}.{part}"] for part in _PARTS)
            found[match.group(1)] = dequantize(qweight, qzeros, scales, g_idx, bits)
    return found


def dequantize(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor,
    bits: int,
) -> torch.Tensor:
    """(code - zero) * scale, [outputs, inputs]; layout v1 stores zeros less one."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    mask = (1 << bits) - 1
    codes = (qweight[:, None, :] >> shifts[None, :, None]) & mask
    zeros = (((qzeros[:, :, None] >> shifts) & mask) + 1).reshape(len(qzeros), -1)
    groups = g_idx.long()
    values = codes.reshape(-1, qweight.shape[1]) - zeros[groups]
    return (values.float() * scales.float()[groups]).T.contiguous()


class Judge:
    """The model of full precision, and sums over tokens."""

    def __init__(self, folder: Path) -> None:
        # From a checkpoint a model comes in evaluation mode.
        self._model: Any = LlamaForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, **SAFE
        )
        decoder = self._model.model
        self._linears: dict[str, torch.nn.Linear] = {
            f"layers.{number}.{name}": module
            for number, layer in enumerate(decoder.layers)
            for name, module in layer.named_modules()
            if isinstance(module, torch.nn.Linear)
        }

    def check(self, candidate: _Weights) -> None:
        """Refuse a candidate that is not this model."""
        shapes = {name: module.weight.shape for name, module in self._linears.items()}
        if {name: weight.shape for name, weight in candidate.items()} != shapes:
            raise SystemExit("a candidate's linear layers are not those of the model")

    def linears(
        self, prompts: Sequence[Sequence[int]], candidates: Mapping[str, _Weights]
    ) -> dict[str, dict[str, float]]:
        """Relative output error by candidate and linear layer."""
        lost: dict[tuple[str, str], float] = defaultdict(float)
        output: dict[str, float] = defaultdict(float)
        deltas = {
            candidate: {n: (module.weight - weights[n]).T for n, module in self._linears.items()}
            for candidate, weights in candidates.items()
        }

        def hook(name: str) -> Callable[..., None]:
            def note(module: torch.nn.Linear, inputs: tuple[torch.Tensor], _: Any) -> None:
                rows = inputs[0][0]
                output[name] += _energy(rows @ module.weight.T)
                for candidate in candidates:
                    lost[candidate, name] += _energy(rows @ deltas[candidate][name])

            return note

        hooks = [module.register_forward_hook(hook(n)) for n, module in self._linears.items()]
        for ids in prompts:
            self._model(torch.tensor([ids]))
        for each in hooks:
            each.remove()
        return {c: {n: lost[c, n] / output[n] for n in self._linears} for c in candidates}

    def whole(
        self, prompts: Sequence[Sequence[int]], candidates: Mapping[str, _Weights]
    ) -> dict[str, dict[str, Any]]:
        """Relative errors of the whole quantised model, by candidate."""
        truth = [self._run(ids) for ids in prompts]
        return {
            name: self._compare(prompts, truth, weights) for name, weights in candidates.items()
        }

    def _compare(
        self, prompts: Sequence[Sequence[int]], truth: Sequence[_Found], candidate: _Weights
    ) -> dict[str, Any]:
        kept = {name: module.weight.data for name, module in self._linears.items()}
        for name, module in self._linears.items():
            module.weight.data = candidate[name]
        pairs = [(self._run(ids), exact) for ids, exact in zip(prompts, truth, strict=True)]
        for name, module in self._linears.items():
            module.weight.data = kept[name]
        layers, changes = [], []
        for place in range(1, len(truth[0][0])):
            lost = sum(_energy(f[0][place] - t[0][place]) for f, t in pairs)
            layers.append(lost / sum(_energy(t[0][place]) for t in truth))
            changes.append(lost / sum(_energy(t[0][place] - t[0][0]) for t in truth))
        lost = sum(_energy(f[1] - t[1]) for f, t in pairs)
        logits = lost / sum(_energy(t[1]) for t in truth)
        return {"layers": layers, "changes": changes, "logits": logits}

    def _run(self, ids: Sequence[int]) -> _Found:
        """Residual stream before and behind each layer, and logits."""
        stream: list[torch.Tensor] = []
        layers = self._model.model.layers
        hooks = [layers[0].register_forward_pre_hook(lambda _, args: stream.append(args[0][0]))]
        hooks += [
            layer.register_forward_hook(
                lambda _, args, out: stream.append(out[0] if out.ndim == 3 else out)
            )
            for layer in layers
        ]
        logits = self._model(torch.tensor([ids])).logits[0]
        for each in hooks:
            each.remove()
        return stream, logits


def _energy(values: torch.Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))


def main() -> int:
    """Judge all candidates on all sets of tokens."""
    judge = Judge(Path(sys.argv[1]))
    tokens = json.loads(Path(sys.argv[2]).read_text("utf-8"))
    folders = dict(argument.split("=", 1) for argument in sys.argv[3:])
    candidates = {name: read_candidate(Path(folder)) for name, folder in folders.items()}
    result: dict[str, dict[str, Any]] = {}
    with torch.no_grad():
        for candidate in candidates.values():
            judge.check(candidate)
        for name, prompts in tokens.items():
            linears = judge.linears(prompts, candidates)
            whole = judge.whole(prompts, candidates)
            result[name] = {c: {"linears": linears[c], **whole[c]} for c in candidates}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
