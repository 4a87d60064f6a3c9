"""Lines to be copied: the answer stands in the prompt, as when a model quotes or edits."""

from __future__ import annotations

import numpy as np

from llava_edge.bench.lab.pages.drawing.page import DIGITS, LETTERS, Question

SHORTEST, LONGEST = 20, 40
_SIGNS = LETTERS + DIGITS + "+-=/"
"""Forty, as none stands twice on a line."""


def copy_line(generator: np.random.Generator) -> Question:
    """A question to repeat a line of 20 to 40 characters, all different."""
    length = int(generator.integers(SHORTEST, LONGEST + 1))
    line = "".join(_SIGNS[i] for i in generator.permutation(len(_SIGNS))[:length].tolist())
    return Question("copy", f"Repeat {line}", line)
