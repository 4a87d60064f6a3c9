"""How the bench loads artifacts: so that no request profits from the one before it."""

from __future__ import annotations

import inspect
from typing import Any

from llava_edge.runtime import LlavaEdge


def nothing_reused() -> dict[str, Any]:
    """Options of ``LlavaEdge.load`` and ``over`` that switch off reuse by content."""
    known = inspect.signature(LlavaEdge.over).parameters
    return {"prefix_reuse": False} if "prefix_reuse" in known else {}
