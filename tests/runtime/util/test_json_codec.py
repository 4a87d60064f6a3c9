from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from llava_edge.profiles.errors import ArtifactError
from llava_edge.runtime.util.json_codec import KEY, from_json, to_json


@dataclass(frozen=True)
class Inner:
    count: int
    rate: float


@dataclass(frozen=True)
class Outer:
    name: str
    kind: Literal["a", "b"]
    inner: Inner
    pairs: tuple[tuple[int, int], ...]
    maybe: str | None
    table: dict[str, Inner]
    free: dict[str, Any]
    flag: bool = False


VALUE = Outer("x", "a", Inner(1, 2.0), ((1, 2), (3, 4)), None, {"k": Inner(5, 6.5)}, {"z": [1]})


def test_a_dataclass_tree_survives_json() -> None:
    assert from_json(Outer, to_json(VALUE)) == VALUE


def test_an_integer_is_accepted_where_a_float_belongs() -> None:
    assert from_json(Inner, {"count": 1, "rate": 2}) == Inner(1, 2.0)


def test_a_field_with_a_default_may_be_absent() -> None:
    document = to_json(VALUE)
    del document["flag"]

    assert from_json(Outer, document) == VALUE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"extra": 1}, r"\$ has unknown keys: extra", id="unknown key"),
        pytest.param({"name": 3}, r"\$\.name must be str", id="wrong scalar"),
        pytest.param({"kind": "c"}, r"\$\.kind is 'c'; allowed are 'a', 'b'", id="literal"),
        pytest.param({"flag": 1}, r"\$\.flag must be bool", id="int for bool"),
        pytest.param(
            {"inner": {"count": True, "rate": 1.0}}, r"\$\.inner\.count must be int", id="bool"
        ),
        pytest.param({"inner": {"rate": 1.0}}, r"\$\.inner lacks keys: count", id="missing"),
        pytest.param({"pairs": [[1, 2, 3]]}, r"\$\.pairs\[0\] must be a list of 2", id="length"),
        pytest.param({"table": {"k": 1}}, r"\$\.table\.k must be an object", id="nested"),
        pytest.param({"pairs": {}}, r"\$\.pairs must be a list", id="object for list"),
    ],
)
def test_what_does_not_fit_is_named_by_its_path(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        from_json(Outer, to_json(VALUE) | change)


@dataclass(frozen=True)
class Renamed:
    target: int = field(metadata={KEY: "before"})


def test_a_field_can_keep_a_key_of_another_name() -> None:
    assert to_json(Renamed(3)) == {"before": 3}
    assert from_json(Renamed, {"before": 3}) == Renamed(3)
    with pytest.raises(ArtifactError, match=r"\$ has unknown keys: target"):
        from_json(Renamed, {"target": 3})
