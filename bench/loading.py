"""How the bench loads artifacts: so that no request profits from the one before it."""

from __future__ import annotations

from typing import Any


def nothing_reused() -> dict[str, Any]:
    """Options of ``LlavaEdge.load`` and ``over`` that switch off reuse by content."""
    return {"prefix_reuse": False}
