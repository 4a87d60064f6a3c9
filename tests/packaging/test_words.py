"""Words that were retired for the field's own; CONTRIBUTING.md has those in use."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
RETIRED = re.compile(
    "giving way|gives way|given up|turnstile|loud channel|whoever|strangers|gone on with|lowering"
    "|answers that copy|borrowed machine|kept_logits|sealed_json|cache_contents|answerer",
    re.IGNORECASE,
)
FOLDERS = ("profiles", "runtime", "convert", "bench", "tests", "docs")


def texts() -> Iterator[Path]:
    yield from ROOT.glob("*.md")
    for folder in FOLDERS:
        for kind in ("*.py", "*.md", "*.toml"):
            # Data of packages and of tests is as it was made.
            yield from (p for p in (ROOT / folder).rglob(kind) if "data" not in p.parts)


def test_no_text_of_the_project_has_a_retired_word() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in texts()
        if path != Path(__file__)
        for number, line in enumerate(path.read_text("utf-8").split("\n"), 1)
        if RETIRED.search(line)
    ]

    assert found == []
