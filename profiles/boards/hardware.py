"""HardwareProfile: one board as numbers, read from TOML. Knows nothing of models."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from llava_edge.profiles.boards.engines import RTX_CAPABILITIES, rtx_target
from llava_edge.profiles.errors import (
    ProfileError,
    RequestError,
    did_you_mean,
    plain_reason,
    shorten,
)
from llava_edge.profiles.sizes import format_above, format_bytes, parse_bytes

Kind = Literal["cpu", "cuda", "unified"]
Target = Literal["cpu", "cuda"]
Int8Isa = Literal["vnni", "amx", "neon-dot", "none"]

_MAX_FILE_BYTES = 1 << 20
_MOST_BYTES = 1 << 50
_SLOWEST, _FASTEST = 1e6, 1e18
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class HardwareProfile:
    """What a plan needs to know of a machine; sizes in bytes, rates per second.

    ``kind``: ``cpu`` has host memory only, ``cuda`` a device beside the host, ``unified`` one
    memory for both (Jetson, DGX Spark), counted in ``memory_bytes``. ``host_memory_bytes`` is None
    where a GPU board says nothing of its host; the host is then no constraint. ``memory_bytes``,
    ``bandwidth`` and the peaks are those of ONE device; ``num_devices`` of them make the machine.
    Rates are None where nobody stated them; predictions that need them are then None as well.
    On ``cpu`` ``peak_fp16`` is the float32 rate, since that is what the target computes in.

    ``sources`` says for each number where it comes from.
    """

    name: str
    title: str
    kind: Kind
    memory_bytes: int
    system_reserve_bytes: int
    host_memory_bytes: int | None
    host_reserve_bytes: int
    bandwidth: float | None
    peak_fp16: float | None
    peak_int8: float | None
    compute_capability: str | None
    providers: tuple[str, ...]
    int8_isa: Int8Isa
    num_devices: int
    prefill_chunk: int
    wheels: str
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def target(self) -> Target:
        """Which graphs run here: float32 activations (``cpu``) or float16 (``cuda``)."""
        return "cpu" if self.kind == "cpu" else "cuda"

    @property
    def unified(self) -> bool:
        """Device and host share one memory."""
        return self.kind == "unified"

    @property
    def rtx_target(self) -> str | None:
        """Target name for a TensorRT-RTX engine, or None outside NVIDIA's support matrix."""
        return rtx_target(self.compute_capability)

    @property
    def budget_bytes(self) -> int:
        """What one device leaves to us; on ``cpu`` and ``unified`` the host's part is in it."""
        return self.memory_bytes - self.system_reserve_bytes

    @property
    def host_budget_bytes(self) -> int | None:
        """What the host leaves to us; the same memory as ``budget_bytes`` unless ``cuda``."""
        if self.kind != "cuda":
            return self.budget_bytes
        if self.host_memory_bytes is None:
            return None
        return self.host_memory_bytes - self.host_reserve_bytes


def profile_names() -> tuple[str, ...]:
    """Names of the boards that ship with the package, sorted."""
    files = resources.files("llava_edge.profiles").joinpath("data").iterdir()
    return tuple(sorted(f.name[:-5] for f in files if f.name.endswith(".toml")))


def load_profile(name_or_path: str | Path) -> HardwareProfile:
    """Load a shipped board by name, or a TOML file by path (anything with ``/`` or ``.toml``).

    Raises:
        ProfileError: unknown name, unreadable file, unknown keys or impossible values; every fault
            of the file is listed.
    """
    text = str(name_or_path)
    if "/" in text or text.endswith(".toml"):
        path = Path(name_or_path)
        return parse_profile(_read_file(path), path.stem, where=str(path))
    if text not in profile_names():
        raise ProfileError(
            f"There is no profile {text[:60]!r}{did_you_mean(text, profile_names())}. Profiles: "
            f"{', '.join(profile_names())}. "
            "For a board of your own give the path of a TOML file, for one GPU --vram, for this "
            "machine --detect."
        )
    file = resources.files("llava_edge.profiles").joinpath("data", f"{text}.toml")
    return parse_profile(file.read_text(encoding="utf-8"), text, where=f"profile {text}")


def _read_file(path: Path) -> str:
    try:
        if not path.is_file():
            raise ProfileError(f"The profile {path} is not a file. Check the path.")
        size = path.stat().st_size
        if size > _MAX_FILE_BYTES:
            raise ProfileError(
                f"The profile {path} has {format_above(size, _MAX_FILE_BYTES)}; a profile has at "
                f"most {format_bytes(_MAX_FILE_BYTES)}. Check that this is the right file."
            )
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ProfileError(f"The profile {path} cannot be read: {plain_reason(error)}.") from error


def parse_profile(text: str, name: str, where: str = "the profile") -> HardwareProfile:
    """Read one TOML document; ``name`` is used unless the document names itself.

    Raises:
        ProfileError: with every fault listed.
    """
    try:
        raw = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ProfileError(f"{where} is not TOML: {error}. Correct the file.") from error
    reader = _Reader(raw)
    profile = reader.read(name)
    if reader.faults or profile is None:
        listed = "\n  - ".join(reader.faults)
        raise ProfileError(f"{where} cannot be used:\n  - {listed}")
    return profile


_KEYS = (
    *("name", "title", "kind", "memory", "system_reserve", "host_memory", "host_reserve"),
    *("bandwidth", "peak_fp16", "peak_int8", "compute_capability", "rtx_target", "providers"),
    *("int8_isa", "num_devices", "prefill_chunk", "wheels", "sources"),
)
_PROVIDERS = (
    "CUDAExecutionProvider",
    "TensorrtExecutionProvider",
    "NvTensorRTRTXExecutionProvider",
    "CPUExecutionProvider",
)


class _Reader:
    """Reads one document and gathers what is wrong with it."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw
        self.faults: list[str] = []

    def read(self, name: str) -> HardwareProfile | None:
        unknown = sorted(set(self.raw) - set(_KEYS))
        if unknown:
            self.faults.append(
                f"unknown keys {shorten([repr(k[:40]) for k in unknown])}; known are "
                f"{', '.join(_KEYS)}"
            )
        kind = self.choice("kind", get_args(Kind), None)
        memory = self.size("memory", None)
        reserve = self.size("system_reserve", 0)
        host_memory, host_reserve = self.host(kind, memory, reserve)
        if memory <= reserve:
            self.faults.append(f"system_reserve {reserve} leaves nothing of memory {memory}")
        capability = self.capability(kind)
        self.check_rtx_target(capability)
        profile = HardwareProfile(
            name=self.name(name),
            title=self.text("title", name),
            kind=kind,
            memory_bytes=memory,
            system_reserve_bytes=reserve,
            host_memory_bytes=host_memory,
            host_reserve_bytes=host_reserve,
            bandwidth=self.rate("bandwidth"),
            peak_fp16=self.rate("peak_fp16"),
            peak_int8=self.rate("peak_int8"),
            compute_capability=capability,
            providers=self.providers(kind),
            int8_isa=self.choice("int8_isa", get_args(Int8Isa), "none"),
            num_devices=self.devices(kind),
            prefill_chunk=self.count("prefill_chunk", 512 if kind == "cpu" else 2048, 1 << 20),
            wheels=self.text("wheels", ""),
            sources=self.sources(),
        )
        return None if self.faults else profile

    def host(self, kind: str, memory: int, reserve: int) -> tuple[int | None, int]:
        if kind != "cuda":
            if {"host_memory", "host_reserve"} & set(self.raw):
                self.faults.append(
                    f"kind {kind!r} has one memory: give memory and system_reserve, not "
                    "host_memory or host_reserve"
                )
            return memory, reserve
        if "host_memory" not in self.raw:
            return None, self.size("host_reserve", 0)
        host_memory = self.size("host_memory", None)
        host_reserve = self.size("host_reserve", 0)
        if host_memory <= host_reserve:
            self.faults.append(f"host_reserve {host_reserve} leaves nothing of {host_memory}")
        return host_memory, host_reserve

    def choice(self, key: str, allowed: tuple[str, ...], default: str | None) -> Any:
        value = self.raw.get(key, default)
        if value not in allowed:
            self.faults.append(f"{key} is {value!r:.60}; allowed are {', '.join(allowed)}")
        return value

    def size(self, key: str, default: int | None) -> int:
        value = self.raw.get(key, default)
        if value is None:
            self.faults.append(f"{key} is missing; write a size such as {key} = '24 GiB'")
            return 1
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST_BYTES:
            return value
        try:
            parsed = parse_bytes(value) if isinstance(value, str) else _MOST_BYTES
        except RequestError:
            parsed = _MOST_BYTES
        return parsed if parsed < _MOST_BYTES else self.no_size(key, value)

    def no_size(self, key: str, value: Any) -> int:
        self.faults.append(f"{key} is {value!r:.60}, not a size such as '24 GiB' or bytes")
        return 1

    def rate(self, key: str) -> float | None:
        value = self.raw.get(key)
        if value is None:
            return None
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not _SLOWEST <= value <= _FASTEST:
            self.faults.append(
                f"{key} is {value!r:.60}; a rate is a number per second, {_SLOWEST:.0e} to "
                f"{_FASTEST:.0e}"
            )
            return None
        return float(value)

    def count(self, key: str, default: int, limit: int) -> int:
        value = self.raw.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
            self.faults.append(f"{key} is {value!r:.60}; it must be a whole number, 1 to {limit}")
            return 1
        return value

    def name(self, default: str) -> str:
        """A name is part of an artifact's default path, so it is one plain word."""
        value = self.text("name", default)
        if not _NAME.fullmatch(value):
            self.faults.append(
                f"name is {value!r:.60}; it must be letters, digits, dots, dashes and underscores"
            )
        return value

    def devices(self, kind: str) -> int:
        count = self.count("num_devices", 1, 1024)
        if count > 1 and kind != "cuda":
            self.faults.append(f"num_devices is {count}; kind {kind!r} has one memory, so it is 1")
        return count

    def text(self, key: str, default: str) -> str:
        value = self.raw.get(key, default)
        if not isinstance(value, str):
            self.faults.append(f"{key} is {value!r:.60}, not text")
            return default
        if not value.isprintable():
            self.faults.append(f"{key} holds characters that cannot be printed: {value!r:.60}")
            return default
        return value

    def capability(self, kind: str) -> str | None:
        value = self.raw.get("compute_capability")
        if value is None:
            return None
        parts = value.split(".") if isinstance(value, str) else []
        if len(parts) != 2 or not all(p.isascii() and p.isdigit() for p in parts):
            self.faults.append(f"compute_capability is {value!r:.60}; write it as in '8.6'")
            return None
        if kind == "cpu":
            self.faults.append("compute_capability belongs to a GPU, but kind is 'cpu'")
        return str(value)

    def check_rtx_target(self, capability: str | None) -> None:
        """The key may stand in the file for readers; it must say what follows anyway."""
        value = self.raw.get("rtx_target")
        if value is None:
            return
        follows = rtx_target(capability)
        if value != follows:
            self.faults.append(
                f"rtx_target is {value!r:.40}, but compute capability {capability} gives "
                f"{follows}; TensorRT for RTX supports {', '.join(RTX_CAPABILITIES)}"
            )

    def providers(self, kind: str) -> tuple[str, ...]:
        default = _PROVIDERS[-1:] if kind == "cpu" else (_PROVIDERS[0], _PROVIDERS[-1])
        value = self.raw.get("providers", list(default))
        if not isinstance(value, list) or not value or any(p not in default for p in value):
            if isinstance(value, list) and value and all(p in _PROVIDERS for p in value):
                self.faults.append(f"providers {value!r:.80} do not belong to kind {kind!r}")
                return ()
            self.faults.append(
                f"providers is {value!r:.80}; it lists one or more of {', '.join(_PROVIDERS)}"
            )
            return ()
        return tuple(value)

    def sources(self) -> dict[str, str]:
        value = self.raw.get("sources", {})
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            self.faults.append("sources must be a table of texts, one a number")
            return {}
        if strange := sorted(set(value) - set(_KEYS)):
            self.faults.append(f"sources names unknown keys {shorten(strange)}")
        return dict(value)
