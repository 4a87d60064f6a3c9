"""QuantizationRequest: how a user wants the language model quantised, checked without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from llava_edge.convert.quantization.calibration.files import find_files
from llava_edge.runtime.util.limits import Limits
from llava_edge.runtime.util.validation import require_count, require_name

Quantizer = Literal["gptq", "rtn"]

NUM_SAMPLES = 32
"""About 50,000 tokens on stock grids; a layer of a 7B took 5.6 minutes at 4,600 on two cores."""


@dataclass(frozen=True)
class QuantizationRequest:
    """How the language model is quantised; nothing of it matters at fp16.

    ``calibration`` is a folder or file of conversations; None draws a small set. ``limits`` are
    bounds on its images.

    Raises:
        RequestError: there is no such folder or file, less than one sample is wanted, or there is
            no such quantizer.
    """

    quantizer: Quantizer = "gptq"
    calibration: Path | None = None
    num_samples: int = NUM_SAMPLES
    seed: int = 0
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        require_name("quantizer", "quantizers", self.quantizer, get_args(Quantizer))
        require_count("the number of calibration samples (--samples)", self.num_samples, 1)
        if self.calibration is not None:
            # Now, not after the hours that come before the samples are read.
            find_files(self.calibration)
