"""Where an artifact runs, and whether memory allows it. Asked before anything is allocated."""

from __future__ import annotations

from typing import Literal

from llava_edge.profiles.errors import EngineError, OutOfMemoryError
from llava_edge.runtime.artifact import Artifact
from llava_edge.runtime.host_memory import available_host_bytes
from llava_edge.runtime.manifest import Flavour
from llava_edge.runtime.session import DeviceKind, available_devices

Device = Literal["auto", "cpu", "cuda"]


def choose_device(asked: Device, flavour: Flavour, allow_slow: bool) -> DeviceKind:
    """The device for an artifact of a flavour.

    Raises:
        EngineError: the device is not there, or does not suit the flavour.
    """
    if flavour == "cpu":
        if asked == "cuda":
            raise EngineError(
                "this artifact is of the cpu flavour (float32 activations) and does not run on "
                "cuda. Convert again with the profile of a GPU."
            )
        return "cpu"
    if asked != "cpu" and "cuda" in available_devices():
        return "cuda"
    if asked == "cuda":
        raise EngineError(
            "cuda was asked; this ONNX Runtime has no CUDA provider. Install onnxruntime-gpu in "
            "place of onnxruntime: pip install 'llava-edge[gpu]'"
        )
    if not allow_slow:
        raise EngineError(
            "this artifact is of the cuda flavour (float16) and there is no CUDA provider to run "
            "it; on the CPU it is several times slower than a cpu artifact. Convert for a cpu "
            "profile, or insist with allow_slow=True (--allow-slow)."
        )
    return "cpu"


def check_host_memory(artifact: Artifact, context_tokens: int) -> None:
    """Ask before allocating: a system that promises too much kills, it does not refuse.

    Raises:
        OutOfMemoryError: weights and cache exceed what is free now.
    """
    manifest = artifact.manifest
    text = manifest.model.text
    stored = sum(
        entry.bytes
        for name, entry in manifest.files.items()
        if name.split("/")[0] in {"vision", "decoder"}
    )
    # fp16 weights are computed in float32 on the CPU.
    weights = 2 * stored
    size = 4 if manifest.flavour == "cpu" else 2
    cache = 2 * text.num_hidden_layers * text.key_value_size * context_tokens * size
    free = available_host_bytes()
    if free is not None and weights + cache > free:
        raise OutOfMemoryError(
            f"{artifact.folder} needs {weights / 2**30:.2f} GiB for weights and "
            f"{cache / 2**30:.2f} GiB for a context of {context_tokens} tokens; "
            f"{free / 2**30:.2f} GiB are free. Load with a smaller context_tokens (--context), "
            "close other programs, or convert at a lower precision."
        )
