"""DeploymentPlan: what was chosen for a board, with every number that led to it. Plain data.

The artifact carries it, the runtime reads it, ``llava-edge plan --json`` prints it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from llava_edge.profiles.errors import BudgetError, RequestError
from llava_edge.profiles.memory.terms import MemoryTerms
from llava_edge.profiles.sizes import format_bytes

_TERMS = tuple(MemoryTerms().as_dict())
_TOTALS = ("total_bytes", "budget_bytes")


@dataclass(frozen=True)
class PlanMemory:
    """Terms of the phase that needs most, against the budget; of ONE device.

    Attributes:
        terms: bytes by term; on a CPU the host's, on a unified board device and host together.
        budget_bytes: what the board leaves to us.
        host_terms: the host's own on a board with its own GPU memory; empty elsewhere.
        host_budget_bytes: None where the board says nothing of its host.
    """

    terms: Mapping[str, int]
    budget_bytes: int
    host_terms: Mapping[str, int]
    host_budget_bytes: int | None = None

    @property
    def total_bytes(self) -> int:
        """Sum of the terms."""
        return sum(self.terms.values())

    @property
    def host_total_bytes(self) -> int:
        """Sum of the host's own terms."""
        return sum(self.host_terms.values())

    @property
    def shortfall_bytes(self) -> int:
        """What is missing, on device or host; 0 where all fits."""
        missing = [self.total_bytes - self.budget_bytes]
        if self.host_budget_bytes is not None:
            missing.append(self.host_total_bytes - self.host_budget_bytes)
        return max(0, *missing)

    def to_json(self) -> dict[str, Any]:
        """``<term>_bytes`` …, ``total_bytes``, ``budget_bytes``; the host's own under ``host``."""
        document: dict[str, Any] = _terms_json(self.terms)
        document |= {"total_bytes": self.total_bytes, "budget_bytes": self.budget_bytes}
        if self.host_terms:
            document["host"] = {
                **_terms_json(self.host_terms),
                "total_bytes": self.host_total_bytes,
                "budget_bytes": self.host_budget_bytes,
            }
        return document

    @classmethod
    def from_json(cls, value: Any) -> PlanMemory:
        """The inverse of ``to_json``; raises ``RequestError`` where it does not add up."""
        outer = _object(value, "memory")
        terms = _read_terms(outer, "memory")
        host = _object(outer.get("host", {}), "memory.host")
        memory = cls(
            terms=terms,
            budget_bytes=_count(
                outer.get("budget_bytes", sum(terms.values())), "memory.budget_bytes"
            ),
            host_terms=_read_terms(host, "memory.host") if host else {},
            host_budget_bytes=None
            if host.get("budget_bytes") is None
            else _count(host["budget_bytes"], "memory.host.budget_bytes"),
        )
        if outer.get("total_bytes") != memory.total_bytes:
            raise RequestError(
                f"memory.total_bytes is {outer.get('total_bytes')!r:.40}, but the terms add up to "
                f"{memory.total_bytes}. The plan was changed by hand; make it again."
            )
        return memory


@dataclass(frozen=True)
class RejectedCandidate:
    """A candidate larger than the one chosen, and why it was not."""

    variant: str
    precision: str
    grid: str
    total_bytes: int
    reason: str


@dataclass(frozen=True)
class PredictedSpeed:
    """Predicted, not measured; None where the board states no rate."""

    decode_tokens_per_second: float | None
    ttft_seconds: float | None


@dataclass(frozen=True)
class DeploymentPlan:
    """What runs on a board.

    Attributes:
        profile: name of the board.
        variant: key of ``variants.json`` or name of the checkpoint folder.
        precision: of the language model; ``formats.part_precisions`` gives the other parts.
        grid: a named grid, or candidates as ``HxW,…``.
        max_tiles: most tiles of one image, thumbnail included.
        max_image_tokens: most tokens of one image.
        context_tokens: positions of the cache.
        engine: ``ort``, ``tensorrt``, ``tensorrt-rtx`` (the last two run the tower), or
            ``vllm tensor_parallel=N pipeline_parallel=M`` where one device cannot hold the model.
        memory: terms and budget.
        predicted: speed.
        fits: whether the terms are within the budget.
        rejected: larger candidates with reasons.
        vision_precision: of tower and projector, ``fp16`` or ``int8``; ``fp16`` in plans of before
            there was a choice.
    """

    profile: str
    variant: str
    precision: str
    grid: str
    max_tiles: int
    max_image_tokens: int
    context_tokens: int
    engine: str
    memory: PlanMemory
    predicted: PredictedSpeed
    fits: bool
    rejected: tuple[RejectedCandidate, ...] = ()
    vision_precision: str = "fp16"

    @property
    def distributed(self) -> bool:
        """Whether the model is spread over several devices."""
        return self.engine.startswith("vllm")

    def require_fit(self) -> None:
        """Raise unless the plan fits.

        Raises:
            BudgetError: names the shortfall.
        """
        if self.fits:
            return
        memory = self.memory
        raise BudgetError(
            f"{self.variant} at {self.precision} with grid {self.grid} and "
            f"{self.context_tokens} tokens of context needs {format_bytes(memory.total_bytes)}; "
            f"{self.profile} leaves {format_bytes(memory.budget_bytes)}. It is short of "
            f"{format_bytes(memory.shortfall_bytes)}."
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values with the documented keys."""
        return {
            "profile": self.profile,
            "variant": self.variant,
            "precision": self.precision,
            "vision_precision": self.vision_precision,
            "grid": self.grid,
            "max_tiles": self.max_tiles,
            "max_image_tokens": self.max_image_tokens,
            "context_tokens": self.context_tokens,
            "engine": self.engine,
            "memory": self.memory.to_json(),
            "predicted": asdict(self.predicted),
            "fits": self.fits,
            "rejected": [asdict(candidate) for candidate in self.rejected],
        }

    @classmethod
    def from_json(cls, value: Any) -> DeploymentPlan:
        """The inverse of ``to_json``.

        A manifest keeps a plan without its rejected candidates and without budgets, which are then
        taken to be what the plan needs.

        Raises:
            RequestError: a key is missing or unknown, or a value has another type.
        """
        document = _object(value, "the plan")
        known = cls.__dataclass_fields__
        faults = [f"unknown key {key!r:.40}" for key in document if key not in known]
        document = {"vision_precision": "fp16", "rejected": [], **document}
        faults += [f"missing key {key!r}" for key in known if key not in document]
        if faults:
            raise RequestError(f"This is no deployment plan: {'; '.join(faults)}.")
        predicted = _object(document["predicted"], "predicted")
        rejected = document["rejected"]
        if not isinstance(rejected, list) or not isinstance(document["fits"], bool):
            raise RequestError("rejected must be a list and fits true or false in a plan.")
        texts = {key: _text(document[key], key) for key in _TEXTS}
        counts = {key: _count(document[key], key) for key in _COUNTS}
        return cls(
            profile=texts["profile"],
            variant=texts["variant"],
            precision=texts["precision"],
            grid=texts["grid"],
            engine=texts["engine"],
            max_tiles=counts["max_tiles"],
            max_image_tokens=counts["max_image_tokens"],
            context_tokens=counts["context_tokens"],
            memory=PlanMemory.from_json(document["memory"]),
            predicted=PredictedSpeed(
                _rate(predicted.get("decode_tokens_per_second"), "decode_tokens_per_second"),
                _rate(predicted.get("ttft_seconds"), "ttft_seconds"),
            ),
            fits=document["fits"],
            rejected=tuple(_rejected(item) for item in rejected),
            vision_precision=texts["vision_precision"],
        )


_TEXTS = ("profile", "variant", "precision", "vision_precision", "grid", "engine")
_COUNTS = ("max_tiles", "max_image_tokens", "context_tokens")


def _terms_json(terms: Mapping[str, int]) -> dict[str, int]:
    return {f"{name}_bytes": count for name, count in terms.items()}


def _read_terms(value: Mapping[str, Any], where: str) -> dict[str, int]:
    extra = set(value) - {f"{name}_bytes" for name in _TERMS} - {*_TOTALS, "host"}
    if extra:
        raise RequestError(f"{where} has unknown keys: {', '.join(sorted(map(str, extra)))}.")
    found = (name for name in _TERMS if f"{name}_bytes" in value)
    return {name: _count(value[f"{name}_bytes"], f"{where}.{name}_bytes") for name in found}


def _rejected(value: Any) -> RejectedCandidate:
    item = _object(value, "rejected")
    texts = {key: _text(item.get(key), key) for key in ("variant", "precision", "grid", "reason")}
    return RejectedCandidate(total_bytes=_count(item.get("total_bytes"), "total_bytes"), **texts)


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise RequestError(f"{where} must be an object, found {type(value).__name__}.")
    return value


def _count(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise RequestError(f"{where} must be a whole number, found {value!r:.40}.")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{where} must be text, found {value!r:.40}.")
    return value


def _rate(value: Any, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RequestError(f"{where} must be a number or null, found {value!r:.40}.")
    return float(value)
