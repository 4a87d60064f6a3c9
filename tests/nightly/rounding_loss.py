"""What rounding costs a trained language model, in nats and other first choices.

    python -m tests.nightly.rounding_loss CHECKPOINT [ARTIFACT ...] [--parts]

Teacher-forced on English text after a short prompt, against transformers in float32. Artifacts are
run by the runtime; ``--parts`` adds emulations in torch, one part rounded at a time. They tell what
an operator can reach before it is built.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

from llava_edge.convert.checkpoint.formats.rounding import round_to_nearest
from llava_edge.convert.verification.quantized.graph_weights import GraphWeights
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.artifact.open import open_artifact
from llava_edge.runtime.util.arrays import Array

TEXTS = tuple(sorted(Path(__file__).parent.glob("english_*.txt")))
_PROMPT = "<|im_start|>user\nTell me something.<|im_end|>\n<|im_start|>assistant\n"
_MOST_TOKENS = 420

Logits = Array
Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Loss:
    """Mean divergence in nats a position, and share of positions with another first choice."""

    nats: float
    other_choices: float

    @classmethod
    def of(cls, ours: Logits, reference: Logits) -> Loss:
        """Compare logits [positions, vocab]."""
        mine, theirs = (
            torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (ours, reference)
        )
        nats = (theirs.exp() * (theirs - mine)).sum(-1).mean()
        other = (mine.argmax(-1) != theirs.argmax(-1)).double().mean()
        return cls(float(nats), float(other))

    def __str__(self) -> str:
        return f"{self.nats:.4f} nats, {self.other_choices:5.1%} other choices"


class Reference:
    """The checkpoint in transformers, float32, and what it makes of one text.

    Args:
        checkpoint: folder.
        text: to be forced after the prompt; at most 420 tokens of it are used.
    """

    def __init__(self, checkpoint: Path, text: str) -> None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
        self._model = transformers.LlavaNextForConditionalGeneration.from_pretrained(
            checkpoint, dtype=torch.float32, local_files_only=True
        ).eval()
        encode = lambda part: tokenizer(part, add_special_tokens=False).input_ids  # noqa: E731
        self._prompt = encode(_PROMPT)
        self.answer: list[int] = encode(text)[:_MOST_TOKENS]
        self.logits = self.run()

    def run(self) -> Logits:
        """Logits after the prompt and after each token of the text but the last."""
        ids = torch.tensor([[*self._prompt, *self.answer[:-1]]])
        with torch.no_grad():
            found = self._model(input_ids=ids, logits_to_keep=len(self.answer)).logits[0]
        logits: Logits = found.numpy()
        return logits

    def artifact(self, folder: Path) -> Loss:
        """What an artifact loses."""
        with LlavaEdge.load(folder) as model:
            ours = model.teacher_forced_logits(_PROMPT, [], self.answer[:-1], raw=True)
        return Loss.of(ours, self.logits)

    @contextmanager
    def with_weights_of(self, folder: Path) -> Iterator[None]:
        """Compute in float with the weights that an artifact's decoder holds."""
        held = GraphWeights.open(open_artifact(folder))
        language = self._model.model.language_model
        kept = []
        for name, module in [*language.named_modules(), ("lm_head", self._model.lm_head)]:
            if isinstance(module, torch.nn.Linear):
                kept.append((module, module.weight))
                full = name if name == "lm_head" else f"language_model.{name}"
                module.weight = torch.nn.Parameter(torch.from_numpy(held.linear(full)), False)
        try:
            yield
        finally:
            for module, weight in kept:
                module.weight = weight

    @contextmanager
    def changed(self, weights: Change | None, rows: Change | None, of: str) -> Iterator[None]:
        """Round weights, activations or both, of layers whose name ends as one of ``of`` says."""
        hooks, kept = [], []
        modules = [
            *self._model.model.language_model.named_modules(),
            ("lm_head", self._model.lm_head),
        ]
        for name, module in modules:
            if not isinstance(module, torch.nn.Linear) or name.split(".")[-1] not in of.split():
                continue
            if weights is not None:
                kept.append((module, module.weight))
                module.weight = torch.nn.Parameter(weights(module.weight.detach()), False)
            if rows is not None:
                hooks.append(module.register_forward_pre_hook(lambda _m, a: (rows(a[0]),)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module, weight in kept:
                module.weight = weight


def main() -> None:
    """Print a line for each artifact and part, and for each text in it."""
    parser = argparse.ArgumentParser(description="what rounding costs a trained language model")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("artifacts", type=Path, nargs="*")
    parser.add_argument("--parts", action="store_true", help="emulate the rounding of each part")
    arguments = parser.parse_args()
    for path in TEXTS:
        reference = Reference(arguments.checkpoint, path.read_text(encoding="utf-8"))
        print(f"{path.stem}, {len(reference.answer)} tokens", flush=True)
        for artifact in arguments.artifacts:
            print(f"  {artifact.name:44} {reference.artifact(artifact)}", flush=True)
            with reference.with_weights_of(artifact):
                loss = Loss.of(reference.run(), reference.logits)
            print(f"  {'its weights alone':44} {loss}", flush=True)
        for what, weights, rows, of in _PARTS if arguments.parts else ():
            with reference.changed(weights, rows, of):
                loss = Loss.of(reference.run(), reference.logits)
            print(f"  {what:44} {loss}", flush=True)


def _weights(bits: int, group: int) -> Change:
    def change(weight: torch.Tensor) -> torch.Tensor:
        rounded = round_to_nearest(weight, bits=bits, group_size=group)
        return torch.from_numpy(rounded.dequantize())

    return change


def _rows(block: int | None) -> Change:
    """127 steps each way up to the largest magnitude of each block, or of the row."""

    def change(values: torch.Tensor) -> torch.Tensor:
        blocks = values.unflatten(-1, (-1, block or values.shape[-1]))
        step = blocks.abs().amax(-1, keepdim=True).clamp_min(np.finfo(np.float32).tiny) / 127
        return ((blocks / step).round() * step).flatten(-2)

    return change


def _two_terms(values: torch.Tensor) -> torch.Tensor:
    """63 steps each way, and 126 in each of them."""
    size = values.abs().amax(-1, keepdim=True).clamp_min(np.finfo(np.float32).tiny)
    share = values / size
    first = (share * 63).round() / 63
    return (first + ((share - first) * (63 * 126)).round() / (63 * 126)) * size


_BODY = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
_ALL = f"{_BODY} lm_head"
_PARTS: tuple[tuple[str, Change | None, Change | None, str], ...] = (
    ("weights, 8 bits, one scale a row", _weights(8, -1), None, _BODY),
    ("the same of the head", _weights(8, -1), None, "lm_head"),
    ("weights, 8 bits, groups of 64", _weights(8, 64), None, _BODY),
    ("the same of the head", _weights(8, 64), None, "lm_head"),
    ("the head, groups of 32", _weights(8, 32), None, "lm_head"),
    ("v, one scale a row", _weights(8, -1), None, "v_proj"),
    ("down, one scale a row", _weights(8, -1), None, "down_proj"),
    ("weights, 4 bits, groups of 64, head of 8", _weights(4, 64), None, _BODY),
    ("activations, one scale a row", None, _rows(None), _ALL),
    ("of q, k, v", None, _rows(None), "q_proj k_proj v_proj"),
    ("of o", None, _rows(None), "o_proj"),
    ("of gate and up", None, _rows(None), "gate_proj up_proj"),
    ("of down", None, _rows(None), "down_proj"),
    ("of the head", None, _rows(None), "lm_head"),
    ("of the head, blocks of 32", None, _rows(32), "lm_head"),
    ("activations, blocks of 64", None, _rows(64), _ALL),
    ("activations, blocks of 32", None, _rows(32), _ALL),
    ("activations, two terms a row", None, _two_terms, _ALL),
)


if __name__ == "__main__":
    main()
