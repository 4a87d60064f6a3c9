"""QualityCheck: the user's questions to fp16 and to the artifact, and what was lost between them.

fp16 is asked first, before anything is quantised: questions that nobody answers right show before
the long work. What it says is kept in the work folder line by line, so that an interrupted
conversion asks no question twice, and is gone with that folder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from llava_edge.convert.quality.request import QualityRequest
from llava_edge.convert.util.progress import spoken_seconds
from llava_edge.profiles.errors import ArtifactError, RequestError
from llava_edge.runtime.artifact.certificate import QUALITY_STAGE, Quality, StageResult, bounded
from llava_edge.runtime.artifact.open import open_artifact
from llava_edge.runtime.model import LlavaEdge
from llava_edge.runtime.quality.run import Given, QualityResult, measure_quality
from llava_edge.runtime.util.json_codec import from_json, to_json
from llava_edge.runtime.util.jsonl import NoEntriesError, read_entries
from llava_edge.runtime.util.progress import Notify, Progress

_TIMED = 3
"""Questions after which the time for all of them is estimated."""


class QualityCheck:
    """Asks the questions of one conversion.

    Args:
        request: the questions.
        work: where answers of fp16 are kept meanwhile.
        report: told about questions.
        say: prints what was found, a line at a time.
    """

    def __init__(self, request: QualityRequest, work: Path, report: Progress, say: Notify) -> None:
        self._request = request
        self._kept = work / f"answers-{request.key[:16]}-{request.max_new_tokens}.jsonl"
        self._report = report
        self._say = say
        self._before: QualityResult | None = None

    def ask_reference(self, build: Callable[[], Path]) -> None:
        """Ask fp16.

        Args:
            build: makes its artifact, or finds it where an earlier run made it.

        Raises:
            RequestError: it answers nothing right, so that nothing can be lost.
        """
        known = self._known()
        with self._kept_answers(known) as keep:
            self._before = self._ask("fp16", build(), known, keep)
        right, count = sum(self._before.right), len(self._before.right)
        self._say(f"quality: fp16 answers {right} of {count} questions right")
        if not right:
            self._require_some(count)

    def compare(self, artifact: Path) -> tuple[Quality, StageResult]:
        """Ask the artifact, which is its own reference where fp16 was not asked.

        Raises:
            RequestError: nothing is answered right, so that nothing can be lost.
        """
        after = self._ask("artifact", artifact)
        before = self._before or after
        pairs = list(zip(before.right, after.right, strict=True))
        right_before, right_after = sum(before.right), sum(after.right)
        if not right_before:
            self._require_some(len(pairs))
        texts = zip(before.predictions, after.predictions, strict=True)
        found = Quality(
            questions=len(pairs),
            questions_sha256=self._request.digest,
            right_before=right_before,
            right_after=right_after,
            lost=sum(was and not now for was, now in pairs),
            gained=sum(now and not was for was, now in pairs),
            changed=sum(was != now for was, now in texts),
            refused=len(after.refused),
            loss=max(0, right_before - right_after) / right_before if right_before else 0.0,
            max_loss=self._request.max_loss,
        )
        row = quality_row(found)
        self._say(f"quality: {row.detail}")
        for message in after.refused[:5]:
            self._say(f"note: {message}")
        return found, row

    def _require_some(self, count: int) -> None:
        message = (
            f"none of {count} questions of {self._request.file} is answered right before anything "
            "is quantised, so a loss cannot be measured. Answers are compared whole, up to case "
            'and white space: ask for short ones, as in "Answer with one word."'
        )
        if self._request.max_loss is not None:
            raise RequestError(f"--max-loss {self._request.max_loss}: {message}")
        self._say(f"note: {message}")

    def _ask(
        self,
        name: str,
        folder: Path,
        known: tuple[Given, ...] = (),
        keep: Callable[[Given], None] = lambda given: None,
    ) -> QualityResult:
        questions = self._request.questions
        started, asked = time.monotonic(), 0

        def progress(_: str, done: int, total: int) -> None:
            nonlocal asked
            self._report(f"{QUALITY_STAGE} {name}", done, total)
            asked = done - len(known)
            if asked == _TIMED and total - done > _TIMED:
                left = (time.monotonic() - started) / asked * (total - done)
                shown = spoken_seconds(left)
                self._say(f"quality: {name}, about {shown} for {total - done} more questions")

        artifact = open_artifact(folder, read_certificate_too=False)
        # The cuda target runs on a CPU as well: slowly, and with the same answers.
        with LlavaEdge.over(
            artifact, allow_slow=True, prefix_reuse=False, limits=self._request.limits
        ) as model:
            started = time.monotonic()
            limit = self._request.max_new_tokens
            return measure_quality(model, questions, None, limit, progress, known, keep)

    def _known(self) -> tuple[Given, ...]:
        """What fp16 said in an earlier run, as far as the file is whole."""
        if not self._kept.exists():
            return ()
        found: list[Given] = []
        faults: list[str] = []
        try:
            for _, entry in read_entries(self._kept, faults):
                if faults:
                    break
                found.append(from_json(Given, entry))
        except (NoEntriesError, ArtifactError):
            pass
        return tuple(found[: len(self._request.questions)])

    @contextmanager
    def _kept_answers(self, known: tuple[Given, ...]) -> Iterator[Callable[[Given], None]]:
        self._kept.parent.mkdir(parents=True, exist_ok=True)
        with self._kept.open("w", encoding="utf-8") as file:
            for given in known:
                _write(file, given)
            yield lambda given: _write(file, given)


def quality_row(found: Quality) -> StageResult:
    """The row of a certificate: share of right answers lost, held against what is allowed."""
    detail = (
        f"{found.right_before} of {found.questions} answers right at fp16, {found.right_after} "
        f"after; {found.lost} lost, {found.gained} gained, {found.changed} of another text"
    )
    if found.max_loss is None:
        return StageResult(
            QUALITY_STAGE, "right_answers_lost", found.loss, None, "pass", "loss", detail
        )
    return bounded(QUALITY_STAGE, "right_answers_lost", found.loss, found.max_loss, "loss", detail)


def _write(file: TextIO, given: Given) -> None:
    print(json.dumps(to_json(given)), file=file, flush=True)
