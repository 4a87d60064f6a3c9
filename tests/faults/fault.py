"""Fault: one thing that goes quietly wrong, how it is planted, and which stage must find it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from llava_edge.runtime.processing.request import Request

Where = Literal["conversion", "artifact", "runtime"]


@dataclass(frozen=True)
class Fault:
    """One seeded fault.

    Attributes:
        id: short name.
        part: of the model or tool.
        wrong: a sentence.
        where: ``conversion`` patches the converter while it writes, ``artifact`` edits a finished
            artifact's files and seals it anew, ``runtime`` patches the runtime that is verified.
        stage: that must find it, and be the first that fails unless ``earlier`` says why not.
        plant: given a ``pytest.MonkeyPatch``, or the ``Tampered`` copy for ``artifact``.
        model: key of ``fault_models.MODELS``.
        tensor: what the certificate's first deviation must begin with; empty where there is none,
            because what the graphs compute with these weights is right.
        earlier: why another stage fails before.
        mode: of verification.
    """

    id: str
    part: str
    wrong: str
    where: Where
    stage: str
    plant: Callable[[Any], None]
    model: str = "qwen2"
    tensor: str = ""
    earlier: str = ""
    mode: Literal["quick", "full"] = "quick"


LoopFault = tuple[str, str, Callable[[Any], None]]
"""Name, what is wrong, and what plants it."""


def with_tiles(request: Request, tiles: Sequence[Any]) -> Request:
    """A request whose pictures show other tiles, one entry a picture."""
    shown = iter(tiles)
    media = tuple(
        medium if medium.layout is None else replace(medium, pixels=next(shown))
        for medium in request.media
    )
    return replace(request, media=media)


def loop_faults(part: str, *faults: LoopFault, model: str = "") -> tuple[Fault, ...]:
    """Faults of the runtime that the stage ``loop`` finds, spread over the precisions.

    Args:
        part: of the tool; stands before each name.
        faults: of that part.
        model: that all are planted in; empty for int8, int4 and fp16 in turn.
    """
    models = (model,) if model else ("int8", "int4", "qwen2")
    return tuple(
        Fault(f"{part}: {name}", part, wrong, "runtime", "loop", plant, models[at % len(models)])
        for at, (name, wrong, plant) in enumerate(faults)
    )
