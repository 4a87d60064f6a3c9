"""Bounds: how far an artifact may be from its reference, as data with a reason for each number.

They ship with the tool and are never read from the artifact that is judged.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from llava_edge.profiles.boards.hardware import Target
from llava_edge.runtime.artifact.manifest import Precision

ANY = "any"
GAP = "max_gap_of_range"
CACHE_LOSS = "int8_cache_loss"
"""Stage of what an int8 cache costs beside a float one."""
VISION_INT8 = "vision-int8"
"""Form of artifacts whose tower computes at 8 bits, whatever the language model does."""


@dataclass(frozen=True)
class Bound:
    """The largest value that a metric of a stage may take.

    ``form`` says for which artifacts (see ``form_of``); ``measured`` is the largest value seen on
    sound ones when ``value`` was set.
    """

    stage: str
    metric: str
    form: str
    value: float
    measured: float
    reason: str


class Bounds:
    """The table, for artifacts of one form."""

    def __init__(
        self,
        rows: tuple[Bound, ...],
        form: str,
        *,
        int8_vision: bool = False,
        int8_cache: bool = False,
    ) -> None:
        self.form = form
        self.int8_vision = int8_vision
        self.int8_cache = int8_cache
        self._first = (VISION_INT8,) if int8_vision else ()
        self._rows: Mapping[tuple[str, str, str], Bound] = {
            (row.stage, row.metric, row.form): row for row in rows
        }

    @property
    def rounds_activations(self) -> bool:
        """Whether kernels of such artifacts round what the language model reads to 8 bits.

        End to end two sound implementations then differ by the size of the rounding itself.
        """
        return self.form.startswith("cpu-int")

    @property
    def compares_layers(self) -> bool:
        """Whether layers are compared one by one, since end to end their rounding adds up.

        So it is where activations are rounded to 8 bits, and in float16.
        """
        return self.rounds_activations or self.form.startswith("cuda")

    def get(self, stage: str, metric: str) -> Bound:
        """The bound of the nearest form: ``cpu-int8-integer``, else ``cpu-int8``, ``cpu``, ``any``.

        A row for ``vision-int8`` comes before them where the tower has 8 bits.

        Raises:
            KeyError: there is none; every metric that is measured must have one.
        """
        parts = self.form.split("-")
        forms = ["-".join(parts[:count]) for count in range(len(parts), 0, -1)]
        for form in (*self._first, *forms, ANY):
            if (stage, metric, form) in self._rows:
                return self._rows[stage, metric, form]
        raise KeyError(f"no bound for {metric} of {stage} at {self.form}")

    def value(self, stage: str, metric: str) -> float:
        """``get(stage, metric).value``."""
        return self.get(stage, metric).value

    def answer_gap(self, stage: str) -> float:
        """Bound on the gap of a stage of whole answers, with what an int8 cache may add to it."""
        gap = self.value(stage, GAP)
        if self.int8_cache and stage in ("prefill_logits", "decode_logits"):
            gap += self.value(CACHE_LOSS, GAP)
        return gap

    def path_gap(self) -> float:
        """Bound on the gap between two paths of one model.

        With an int8 cache a sum that differs in its last digit may be rounded to the next code, as
        activations are in int8 kernels.
        """
        gap = self.value("loop", GAP)
        return max(gap, bound_value("loop", GAP, "cpu-int8")) if self.int8_cache else gap


def bounds_for(target: Target, precision: Precision, *, int8_cache: bool = False) -> Bounds:
    """The bounds of artifacts like this one; of answers with an int8 cache where that is asked."""
    return Bounds(
        bound_rows(),
        form_of(target, precision),
        int8_vision=precision.vision_tower == "int8",
        int8_cache=int8_cache,
    )


def bound_value(stage: str, metric: str, form: str) -> float:
    """The value of the one row of exactly this form."""
    return next(
        row.value
        for row in bound_rows()
        if (row.stage, row.metric, row.form) == (stage, metric, form)
    )


def form_of(target: Target, precision: Precision) -> str:
    """``cpu-fp16``, ``cpu-int8-integer``, ``cpu-int8-nbits``, ``cpu-int4-nbits``, ``cuda-…``."""
    route = f"-{precision.int8_route}" if precision.int8_route is not None else ""
    return f"{target}-{precision.language_model}{route}"


@cache
def bound_rows() -> tuple[Bound, ...]:
    """All rows of the table that ships with the tool."""
    text = files("llava_edge.runtime").joinpath("data", "bounds.toml").read_text("utf-8")
    return tuple(Bound(**row) for row in tomllib.loads(text)["bound"])
