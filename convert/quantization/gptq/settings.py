"""QuantizeSettings: everything about quantising a language model that a caller may choose."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from llava_edge.convert.checkpoint.formats.rounding import check_settings
from llava_edge.convert.quantization.calibration.token_weights import KindShares
from llava_edge.convert.quantization.gptq.hessian_factor import LARGEST_DAMP_PERCENT
from llava_edge.profiles.errors import RequestError

HESSIAN_BYTES = 4 << 30
"""Whole Hessians up to 16,384 columns."""


@dataclass(frozen=True)
class QuantizeSettings:
    """How the language model is quantised.

    Attributes:
        bits: 4 or 8.
        group_size: 128, 64, 32, or -1 for one scale a row; see ``body_group_size``.
        quantizer: ``gptq``, or ``rtn`` which needs no samples.
        damp_percent: see ``quantize_weight``.
        reduce_range: 8-bit codes within 7 bits, for processors whose products of uint8 and int8
            saturate at 16 bits.
        shares: of the kinds of token in the Hessians.
        hessian_bytes: what the Hessians of one group and a factor may take; a wider layer is solved
            in column blocks, and where not even those fit it is rounded to nearest.
        seed: that the samples were chosen or drawn with; recorded.
        threads: of torch; None takes those of the run that is resumed, else torch's own.

    Raises:
        RequestError: a setting is outside its set.
    """

    bits: int
    group_size: int
    quantizer: Literal["gptq", "rtn"] = "gptq"
    damp_percent: float = 0.01
    reduce_range: bool = False
    shares: KindShares = field(default_factory=KindShares)
    hessian_bytes: int = HESSIAN_BYTES
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        check_settings(self.bits, self.group_size, self.reduce_range)
        faults: list[str] = []
        if self.quantizer not in ("gptq", "rtn"):
            faults.append(f"quantizer is {self.quantizer!r}; allowed are gptq, rtn")
        if not 0.0 <= self.damp_percent <= LARGEST_DAMP_PERCENT:
            faults.append(f"damp_percent is {self.damp_percent}; it must lie between 0 and 1")
        if self.hessian_bytes < 0:
            faults.append(f"hessian_bytes is {self.hessian_bytes}; it cannot be negative")
        if self.threads is not None and self.threads < 1:
            faults.append(f"threads is {self.threads}; at least 1 is needed")
        if faults:
            raise RequestError("quantisation settings cannot be met: " + "; ".join(faults))
