"""What a command imports at its beginning is not looked through for garbage."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest

from llava_edge.runtime.cli.settled_imports import settled_imports


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = "imported_by_a_test"
    (tmp_path / f"{name}.py").write_text("import gc\nCOLLECTED = gc.isenabled()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


def test_modules_are_imported_without_collecting_and_are_left_out_afterwards(module: str) -> None:
    before = gc.get_freeze_count()
    try:
        with settled_imports():
            imported = __import__(module)
        assert not imported.COLLECTED
        assert gc.isenabled()
        assert gc.get_freeze_count() > before
    finally:
        del sys.modules[module]


def test_where_nothing_is_imported_nothing_is_left_out() -> None:
    before = gc.get_freeze_count()
    with settled_imports():
        import json  # noqa: F401 (imported long before)
    assert gc.isenabled()
    assert gc.get_freeze_count() == before


def test_a_block_that_fails_has_collection_back() -> None:
    with pytest.raises(ImportError), settled_imports():
        __import__("no_such_module_of_a_test")
    assert gc.isenabled()
