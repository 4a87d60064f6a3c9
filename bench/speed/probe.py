"""``python -m llava_edge.bench.speed.probe ARTIFACT``: one round over one artifact, timed.

A process of its own, whose peak memory is the artifact's. It prints one JSON object a line:
``loaded`` when it can answer, ``begin`` and ``end`` around the timed requests, for anyone who keeps
the time outside; the last line holds everything. Nothing is reused between requests: pictures and
first words differ from one to the next, and reuse by content is switched off.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from llava_edge.bench.speed.cases import SpeedCase, context_cases, draw_picture, speed_cases
from llava_edge.profiles.boards.device_name import DEVICE_METAVAR, device_argument
from llava_edge.profiles.errors import LlavaEdgeError
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.artifact.open import open_artifact
from llava_edge.runtime.backends.cuda_options import CudaOptions
from llava_edge.runtime.cli.arguments import add_cache_argument, asked_cache
from llava_edge.runtime.generation.output import Answer
from llava_edge.runtime.util.host_memory import peak_host_bytes
from llava_edge.runtime.verification.self_test_policy import self_test_if_needed

_SENTENCE = "Describe what is shown here, please. "
_ENOUGH_SECONDS = 0.6
_MOST_REPEATS = 5
_QUICK_SECONDS = 0.5
_RAW = getattr(time, "CLOCK_MONOTONIC_RAW", None)


def main(argv: list[str] | None = None) -> int:
    """Load, warm up, ask, print; the last line says why where that fails."""
    options = _parser().parse_args(argv)
    # Anyone who starts this has opened the artifact and said what is to be said of it.
    logging.disable(logging.WARNING)
    try:
        _run(options)
    except LlavaEdgeError as error:
        _say({"error": {"type": type(error).__name__, "message": str(error)}})
        return error.exit_code
    return 0


def _run(options: argparse.Namespace) -> None:
    started = time.perf_counter()
    artifact = open_artifact(options.artifact)
    checked = time.perf_counter()
    tokens = replace(artifact.manifest.tokens, stop=())
    # Without stop tokens an answer has exactly the length that a case asks for.
    chunk = options.prefill_chunk or artifact.manifest.prefill_chunk
    manifest = replace(artifact.manifest, tokens=tokens, prefill_chunk=chunk)
    endless = replace(artifact, manifest=manifest)
    with LlavaEdge.over(
        endless,
        options.device,
        cache=asked_cache(options.cache),
        threads=options.threads,
        allow_slow=options.allow_slow,
        engine=options.engine,
        trust_engines=options.trust_engines,
        prefix_reuse=False,
        strict_device=options.strict_device,
        cuda=CudaOptions(**json.loads(options.cuda)),
    ) as model:
        self_test_if_needed(model)
        loaded = time.perf_counter()
        _say({"event": "loaded"})
        load = {
            "check_seconds": checked - started,
            "load_seconds": loaded - started,
            "peak_bytes": peak_host_bytes(),
        }
        cases = speed_cases(artifact.manifest, thorough=options.thorough)
        if options.cases:
            cases = tuple(case for case in cases if case.name in options.cases) or cases[-1:]
        cases += context_cases(artifact.manifest, options.contexts)
        asker = _Asker(model, options.round)
        _warm_up(asker, cases)
        # Before every case and behind the last: the machine drifts in the middle of a round, too.
        yardstick = [yardstick_seconds()]
        _say({"event": "begin"})
        perf, raw = time.perf_counter(), _raw_seconds()
        found = []
        for case in cases:
            found.append(_measure(asker, case))
            yardstick.append(yardstick_seconds())
        inside = {"perf_seconds": time.perf_counter() - perf, "raw_seconds": _raw_seconds() - raw}
        _say({"event": "end"})
        result = {
            "round": options.round,
            "device": model.device,
            "engine": model.engine,
            "off_device": list(model.off_device),
            "context_tokens": model.context_tokens,
            "device_bytes": found[-1]["peak_memory"]["device_bytes"],
            "cache": model.cache,
            **load,
            "inside": inside,
            "yardstick_seconds": yardstick,
            "cases": found,
        }
    _say(result)


def yardstick_seconds() -> float:
    """A fixed piece of work on one thread, median of five: how fast this processor is just now."""
    values = np.arange(1 << 16, dtype=np.uint64)
    took = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(16):
            values = (values * np.uint64(6364136223846793005)) ^ (values >> np.uint64(7))
        took.append(time.perf_counter() - start)
    return statistics.median(took)


class _Asker:
    """Asks cases, each time with words and pictures that were not asked before."""

    def __init__(self, model: LlavaEdge, round_number: int) -> None:
        self._model = model
        self._round = round_number
        self._count = 0
        self._each = self._tokens_a_sentence()

    def ask(self, case: SpeedCase) -> tuple[Answer, float]:
        """The answer, and the seconds from the call to its end."""
        prompt, pictures = self._next(case)
        start = time.perf_counter()
        answer = self._model.generate(
            prompt, pictures, grid=case.grid, max_new_tokens=case.new_tokens
        )
        return answer, time.perf_counter() - start

    def _next(self, case: SpeedCase) -> tuple[str, list[bytes]]:
        self._count += 1
        opening = f"{self._round}, {self._count}. "
        pictures = [
            draw_picture((self._round, self._count, place), case.height, case.width)
            for place in range(case.num_images)
        ]
        least = self._model.count_tokens(opening)
        sentences = max(1, round((case.text_tokens - least) / self._each))
        return opening + _SENTENCE * sentences, pictures

    def _tokens_a_sentence(self) -> float:
        one, eleven = (self._model.count_tokens(_SENTENCE * n) for n in (1, 11))
        return (eleven - one) / 10


def _warm_up(asker: _Asker, cases: Sequence[SpeedCase]) -> None:
    """A prompt without pictures and one with thumbnails; all of them where that takes no time."""
    first = {bool(case.num_images): case for case in reversed(cases)}
    short = [
        replace(case, new_tokens=2, grid="base" if case.num_images else None)
        for case in first.values()
    ]
    took = max(asker.ask(case)[1] for case in short)
    if took < _QUICK_SECONDS:
        for case in cases:
            asker.ask(case)


def _measure(asker: _Asker, case: SpeedCase) -> dict[str, Any]:
    """Ask once, and again where one answer is too short a time to go by."""
    requests: list[dict[str, float]] = []
    spent = 0.0
    while not requests or (spent < _ENOUGH_SECONDS and len(requests) < _MOST_REPEATS):
        answer, seconds = asker.ask(case)
        requests.append({"end_to_end_seconds": seconds, **asdict(answer.timings)})
        spent += seconds
    return {
        **asdict(case),
        "prompt_tokens": answer.prompt_tokens,
        "image_tokens": answer.image_tokens,
        "answer_tokens": len(answer.token_ids),
        "degraded": list(answer.degraded),
        "peak_memory": asdict(answer.peak_memory),
        "requests": requests,
    }


def _raw_seconds() -> float:
    """The processor's own clock, which nothing corrects; where there is none, the system's."""
    return time.monotonic() if _RAW is None else time.clock_gettime(_RAW)


def _say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="One round over one artifact, timed.")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--round", type=int, default=0, help="other words and pictures in each")
    parser.add_argument("--thorough", action="store_true")
    parser.add_argument("--cases", nargs="*", help="names of those to ask; all unless given")
    parser.add_argument("--device", type=device_argument, metavar=DEVICE_METAVAR, default="auto")
    add_cache_argument(parser)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--allow-slow", action="store_true")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--trust-engines", action="store_true")
    parser.add_argument("--strict-device", action="store_true")
    parser.add_argument("--contexts", type=int, nargs="*", default=[], help="of text prompts")
    parser.add_argument("--prefill-chunk", type=int)
    parser.add_argument("--cuda", default="{}", help="JSON: fields of CudaOptions")
    return parser


if __name__ == "__main__":
    sys.exit(main())
