"""Where an artifact runs, and whether memory allows it. Asked before anything is allocated."""

from __future__ import annotations

from typing import get_args

from llava_edge.profiles.boards.device_name import parse_device
from llava_edge.profiles.boards.hardware import Target
from llava_edge.profiles.errors import EngineError, OutOfMemoryError
from llava_edge.profiles.memory.buffers import CacheType
from llava_edge.profiles.memory.terms import MemoryTerms
from llava_edge.runtime.artifact.manifest import Manifest
from llava_edge.runtime.artifact.memory_estimate import certain_phases
from llava_edge.runtime.artifact.open import Artifact
from llava_edge.runtime.backends.onnxruntime import available_devices
from llava_edge.runtime.util.arrays import DeviceKind
from llava_edge.runtime.util.choices import AskedCache as AskedCache
from llava_edge.runtime.util.host_memory import available_host_bytes
from llava_edge.runtime.util.validation import require_name

Device = str
"""``auto``, ``cpu``, ``cuda`` or, for another GPU than the first, ``cuda:1`` and so on."""


def choose_device(asked: Device, target: Target, allow_slow: bool) -> DeviceKind:
    """The device for an artifact of a target.

    Raises:
        EngineError: the device is not there, or does not suit the target.
        RequestError: there is no device of that name.
    """
    kind = parse_device(asked).kind
    if target == "cpu":
        if kind == "cuda":
            raise EngineError(
                "this artifact is for the cpu target (float32 activations) and does not run on "
                "cuda. Convert again with the profile of a GPU."
            )
        return "cpu"
    if kind != "cpu" and "cuda" in available_devices():
        return "cuda"
    if kind == "cuda":
        raise EngineError(
            f"{asked} was asked; this ONNX Runtime has no CUDA provider. Install onnxruntime-gpu "
            "in place of onnxruntime: pip install 'llava-edge[gpu]'"
        )
    if not allow_slow:
        raise EngineError(
            "this artifact is for the cuda target (float16) and there is no CUDA provider to run "
            "it; on the CPU it is several times slower than a cpu artifact. Convert for a cpu "
            "profile, or insist with allow_slow=True (--allow-slow)."
        )
    return "cpu"


def choose_cache(asked: AskedCache, manifest: Manifest) -> CacheType:
    """Type of the KV cache; ``auto`` is the type that the artifact computes in.

    Raises:
        EngineError: the artifact has no decoder graph with that cache.
        RequestError: there is no cache type of that name.
    """
    require_name("cache", "types", asked, get_args(AskedCache))
    if asked == "auto":
        return manifest.precision.computes
    if asked in manifest.decoders:
        return asked
    advice = "Load without cache (--cache)"
    if asked == "int8":
        advice += ", or convert again with --cache int8"
    raise EngineError(
        f"a cache of {asked} was asked; this artifact for the {manifest.target} target has "
        f"{' and '.join(manifest.decoders)}. {advice}."
    )


def check_host_memory(
    artifact: Artifact,
    context_tokens: int,
    vision_cache_bytes: int = 0,
    cache: CacheType | None = None,
) -> None:
    """Ask before allocating: a system that promises too much kills, it does not refuse.

    Counted is what loading certainly takes, by the same model that plans: weights, the largest of
    them twice while it is packed, the KV cache, and what the vision cache may grow to. Room for
    images is not asked for here, so that nothing is refused that would have fitted.

    Raises:
        OutOfMemoryError: it exceeds what is free now.
    """
    load, decode = certain_phases(artifact.manifest, context_tokens, cache)
    # Nothing is in the vision cache yet while weights are loaded.
    needed = max(load.total, decode.total + vision_cache_bytes)
    free = available_host_bytes()
    if free is None or needed <= free:
        return
    terms = load.as_dict() if needed == load.total else decode.as_dict()
    terms["vision_cache"] = vision_cache_bytes if needed != load.total else 0
    largest = sorted(terms.items(), key=lambda item: -item[1])[:4]
    listed = ", ".join(
        f"{size / 2**30:.2f} GiB {name.replace('_', ' ')}" for name, size in largest if size
    )
    smaller = "context_tokens (--context)"
    if vision_cache_bytes:
        smaller += " or vision_cache_bytes"
    raise OutOfMemoryError(
        f"{artifact.folder} with a context of {context_tokens} tokens needs at least "
        f"{needed / 2**30:.2f} GiB ({listed}); {free / 2**30:.2f} GiB are free. Load with a "
        f"smaller {smaller}, close other programs, or convert at a lower precision."
    )


def certain_host_terms(
    manifest: Manifest, context_tokens: int, cache: CacheType | None = None
) -> MemoryTerms:
    """Terms of the memory model that loading takes whatever is asked afterwards.

    See ``certain_phases``; the larger of its phases.
    """
    return max(certain_phases(manifest, context_tokens, cache), key=lambda terms: terms.total)
