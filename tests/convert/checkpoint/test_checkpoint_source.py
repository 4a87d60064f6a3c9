"""Any text is a folder, a hub id, or a refusal."""

from __future__ import annotations

import pytest

from llava_edge.convert.checkpoint.open import open_checkpoint
from llava_edge.convert.checkpoint.source import resolve_source
from llava_edge.profiles.errors import CheckpointError

TEXTS = ("", "a" * 5000, "~nobody-of-this-name/x/y", "a\0b", "/nowhere/\udcff", "\x1b[2J", "../a/b")


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text)[:20])
def test_a_text_that_names_nothing_is_refused_in_a_short_message(text: str) -> None:
    for call in (resolve_source, open_checkpoint):
        with pytest.raises(CheckpointError) as caught:
            call(text)  # type: ignore[operator]
        assert len(str(caught.value)) < 1_000
        assert "\x1b" not in str(caught.value)
