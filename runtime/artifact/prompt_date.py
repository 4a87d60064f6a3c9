"""The date in a prompt: a template that writes it names a form, which a request fills in."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

DATE_MARK = "<date:{}>"
"""How a date stands in compiled segments; the form is one of ``strftime``."""

_FORM = re.compile(r"(?:[^%\x00-\x1f]|%-?[aAbBdHIjmMpSyY]|%%){1,64}")
_DIRECTIVE = re.compile(r"%(-?)(.)")

COMPARED_NOW = datetime(2025, 6, 15, 12, 0, tzinfo=UTC)
"""The clock of prompts whose answers are compared with stored ones."""


def is_date_form(form: str) -> bool:
    """Whether a form of ``strftime`` is one that prompts may hold: known directives, no widths."""
    return _FORM.fullmatch(form) is not None


def format_date(form: str, now: datetime) -> str:
    """``now.strftime(form)``; ``%-d`` and the like work on every system."""

    def one(directive: re.Match[str]) -> str:
        text = now.strftime(f"%{directive[2]}")
        return (text.lstrip("0") or "0") if directive[1] else text

    return _DIRECTIVE.sub(one, form)


def fill_dates(forms: Sequence[str], now: datetime | None) -> Callable[[str], str]:
    """What replaces each mark in a segment by the date.

    Args:
        forms: those in use.
        now: None for this machine's local time, as transformers takes it.
    """
    if not forms:
        return lambda text: text
    moment = now or datetime.now()
    written = {DATE_MARK.format(form): format_date(form, moment) for form in forms}

    def fill(text: str) -> str:
        for mark, date in written.items():
            text = text.replace(mark, date)
        return text

    return fill
