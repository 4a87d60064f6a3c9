"""Quality: how right an answer is, by the rules of the published tasks.

Each function takes a prediction and the accepted answers and knows nothing of models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

_ANLS_THRESHOLD = 0.5
_RELAXED_TOLERANCE = 0.05


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 where the prediction is one of the answers, else 0.

    Case, runs of white space and one full stop at the end do not count.
    """
    said = _plain(prediction)
    return float(any(said == _plain(answer) for answer in answers))


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Normalised Levenshtein similarity with the nearest answer.

    One half or less counts as 0. Source: Biten et al. 2019, "Scene Text Visual Question
    Answering"; DocVQA's measure.
    """
    best = 0.0
    said = " ".join(prediction.lower().split())
    for answer in answers:
        wanted = " ".join(answer.lower().split())
        longest = max(len(said), len(wanted))
        distance = _edit_distance(said, wanted) / longest if longest else 0.0
        if distance < _ANLS_THRESHOLD:
            best = max(best, 1.0 - distance)
    return best


def relaxed_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1 where a number is within 5 % of the answer's, or a text equals it, else 0.

    Source: Methani et al. 2020 (PlotQA), Masry et al. 2022 (ChartQA). A number may end in ``%``,
    which divides it by 100. A wanted zero allows no deviation.
    """
    said = _number(prediction)
    for answer in answers:
        wanted = _number(answer)
        if said is not None and wanted:
            if abs(said - wanted) <= _RELAXED_TOLERANCE * abs(wanted):
                return 1.0
        elif exact_match(prediction, [answer]):
            return 1.0
    return 0.0


def choice_letter(prediction: str, choices: Sequence[str]) -> str | None:
    """The letter that an answer to a multiple-choice question names; None where it names none.

    The first that is found of: the whole answer is a letter; the whole answer is the text of a
    choice; letters in brackets; letters with a stop or colon behind them; letters that stand alone;
    texts of choices, as whole words. Of several, the last counts. Close to MMMU's evaluation, but
    for its random guess where nothing is found. A bare ``A`` that begins a sentence, and a bare
    ``I``, are words.

    Args:
        prediction: what the model said.
        choices: texts of A, B, C …, at most 26.
    """
    letters = _letters(len(choices))
    said = prediction.strip()
    whole = re.fullmatch(r"\(?([A-Za-z])[).:]?", said)
    if whole and whole[1].upper() in letters:
        return whole[1].upper()
    for letter, choice in zip(letters, choices, strict=True):
        if _plain(choice) and _plain(choice) == _plain(said):
            return letter
    for pattern in (r"\(([A-Z])\)", r"\b([A-Z])[.:)](?!\w)", r"(?<![\w'])([A-HJ-Z])(?![\w'])"):
        found = [
            match[1]
            for match in re.finditer(pattern, said)
            if match[1] in letters and not _is_article(said, match)
        ]
        if found:
            return found[-1]
    return _last_text(said, dict(zip(letters, choices, strict=True)))


def _is_article(text: str, match: re.Match[str]) -> bool:
    """Whether a bare ``A`` begins a sentence and a word follows."""
    bare = match[0] == "A"
    begins = re.search(r"(^|[.!?:]\s+)$", text[: match.start()]) is not None
    return bare and begins and re.match(r" [a-z]", text[match.end() :]) is not None


def _last_text(said: str, choices: Mapping[str, str]) -> str | None:
    """The choice whose text stands last, as whole words; a text inside a longer one is not it."""
    spans = [
        (match.end(), match.end() - match.start(), letter)
        for letter, choice in choices.items()
        if choice.strip()
        for match in re.finditer(
            rf"(?<!\w){re.escape(choice.strip())}(?!\w)", said, flags=re.IGNORECASE
        )
    ]
    outer = [
        span
        for span in spans
        if not any(
            other[1] > span[1] and other[0] >= span[0] and other[0] - other[1] <= span[0] - span[1]
            for other in spans
        )
    ]
    return max(outer)[2] if outer else None


def choice_prompt(question: str, choices: Sequence[str]) -> str:
    """A question with its choices, worded as LLaVA was trained."""
    lines = [
        f"{letter}. {choice}"
        for letter, choice in zip(_letters(len(choices)), choices, strict=True)
    ]
    return "\n".join(
        [question, *lines, "Answer with the option's letter from the given choices directly."]
    )


def _letters(count: int) -> list[str]:
    return [chr(ord("A") + place) for place in range(count)]


def _plain(text: str) -> str:
    words = " ".join(text.casefold().split())
    return words.removesuffix(".") if words != "." else words


def _number(text: str) -> float | None:
    said = text.strip().rstrip(".")
    percent = said.endswith("%")
    try:
        value = float(said.rstrip("%"))
    except ValueError:
        return None
    if not math.isfinite(value) or "_" in said:
        return None
    return value / 100 if percent else value


def _edit_distance(first: str, second: str) -> int:
    """Fewest characters to insert, delete or replace."""
    row = list(range(len(second) + 1))
    for count, letter in enumerate(first, start=1):
        before = row
        row = [count]
        for place, other in enumerate(second, start=1):
            row.append(min(before[place] + 1, row[-1] + 1, before[place - 1] + (letter != other)))
    return row[-1]
