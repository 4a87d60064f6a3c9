"""Versions, whichever build of ONNX Runtime an environment holds."""

from __future__ import annotations

from importlib import metadata

import pytest

from llava_edge.runtime.util import versions
from llava_edge.runtime.util.versions import tool_versions


@pytest.mark.parametrize("build", ["onnxruntime", "onnxruntime-gpu"])
def test_onnx_runtime_goes_by_one_name(build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held = {build: "1.31.1", "numpy": "2.4"}

    def version(name: str) -> str:
        if name not in held:
            raise metadata.PackageNotFoundError(name)
        return held[name]

    monkeypatch.setattr(versions, "version", version)

    assert tool_versions(["numpy", "onnxruntime"]) == {"numpy": "2.4", "onnxruntime": "1.31.1"}
    with pytest.raises(metadata.PackageNotFoundError):
        tool_versions(["onnx"])
