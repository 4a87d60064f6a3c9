"""ConvertRequest: what was asked of one conversion, as given."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from llava_edge.convert.quality.request import QualityRequest
from llava_edge.convert.quantization.request import QuantizationRequest
from llava_edge.profiles.boards.hardware import HardwareProfile, load_profile
from llava_edge.profiles.plan_request import PlanRequest
from llava_edge.runtime.artifact.certificate import Mode
from llava_edge.runtime.artifact.manifest import Reference
from llava_edge.runtime.util.validation import require_name


@dataclass(frozen=True)
class ConvertRequest:
    """Options of one conversion; what is None follows from checkpoint, board and plan.

    Attributes:
        checkpoint: a folder, ``owner/name`` or ``owner/name@revision``; None takes the hub id of
            the variant that the plan chooses.
        out: the artifact's folder; ``artifacts/<variant>-<precision>-<profile>`` when left out.
        profile: the board.
        wishes: what the plan must keep to: precision, grid, context and so on.
        quantization: how int8 and int4 codes are found.
        emit_hf: also write the weights as a Hugging Face GPTQ checkpoint, into ``OUT/gptq``.
        reference: order of candidates on ties; the checkpoint's layout decides when left out.
        use_template: compile the chat template; without it the artifact takes raw prompts only.
        force: replace an existing artifact and discard an unfinished one.
        verify: how much is compared with the checkpoint before the artifact takes its place.
        quality: questions that fp16 and the artifact are asked; None for none.

    Raises:
        RequestError: there is no such ``verify`` or ``reference``.
    """

    checkpoint: str | None
    out: Path | None = None
    profile: HardwareProfile = field(default_factory=lambda: load_profile("cpu-16gb"))
    wishes: PlanRequest = field(default_factory=PlanRequest)
    quantization: QuantizationRequest = field(default_factory=QuantizationRequest)
    emit_hf: bool = False
    reference: Reference | None = None
    use_template: bool = True
    force: bool = False
    verify: Mode = "quick"
    quality: QualityRequest | None = None

    def __post_init__(self) -> None:
        require_name("verify", "modes", self.verify, get_args(Mode))
        if self.reference is not None:
            require_name("reference", "orders", self.reference, get_args(Reference))
