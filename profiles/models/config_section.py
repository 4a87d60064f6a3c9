"""Section: typed access to one level of a configuration, with all faults collected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]

MAX_SIZE = 2**31 - 1
"""No size of a model is larger; what computes with sizes need not guard against nonsense."""

_MAX_NUMBER = 1e30


@dataclass(frozen=True)
class Section:
    """One level of a configuration file.

    ``name`` goes before keys in messages, ``defaults`` stand in for absent and null values, and
    ``faults`` is shared by all levels. Every getter returns a usable value even after a fault, so
    that one pass finds all of them.
    """

    name: str
    values: Config
    defaults: Config
    faults: list[str]

    def section(self, name: str, defaults: Config) -> Section:
        """The object under ``name``; empty where it is absent or no object."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, Mapping):
            self.fault(name, value, "an object")
        return Section(
            f"{self.name}{name}.",
            value if isinstance(value, Mapping) else {},
            defaults,
            self.faults,
        )

    def integer(
        self,
        key: str,
        default: int | None = None,
        minimum: int = 1,
        maximum: int = MAX_SIZE,
    ) -> int:
        """An integer from ``minimum`` to ``maximum``."""
        value = self._get(key, default)
        if type(value) is int and minimum <= value <= maximum:
            return value
        self.fault(key, value, f"an integer from {minimum} to {maximum}")
        return minimum

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number of ordinary size."""
        value = self._get(key, default)
        if type(value) in (int, float) and 0 < value < _MAX_NUMBER:
            return float(value)
        self.fault(key, value, "a positive number")
        return 1.0

    def word(self, key: str, default: str) -> str:
        """A string."""
        value = self._get(key, default)
        if not isinstance(value, str):
            self.fault(key, value, "a string")
        return str(value)

    def flag(self, key: str, default: bool) -> bool:
        """A truth value."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            self.fault(key, value, "true or false")
        return bool(value)

    def fault(self, key: str, value: object, rule: str) -> None:
        """Note that ``key`` holds ``value``, which breaks ``rule``."""
        self.faults.append(f"{self.name}{key} is {value!r:.80}, not {rule}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        return self.defaults.get(key) if default is None else default
