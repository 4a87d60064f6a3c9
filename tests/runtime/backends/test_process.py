"""What a loaded model changes for the whole process is what configure_process says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_edge.runtime.backends.process import configure_process

LOOK = """
import json, locale, logging, os, signal, sys, warnings
import numpy, PIL.Image, tokenizers, ctypes
def seen():
    return {
        "environ": dict(os.environ), "signals": [str(signal.getsignal(n)) for n in
            sorted(signal.valid_signals()) if n not in (signal.SIGKILL, signal.SIGSTOP)],
        "locale": locale.setlocale(locale.LC_ALL), "filters": list(map(str, warnings.filters)),
        "hooks": [repr(h) for h in (sys.excepthook, sys.unraisablehook, sys.displayhook)],
        "cwd": os.getcwd(), "umask": os.umask(os.umask(0o22)), "nice": os.nice(0),
        "affinity": sorted(os.sched_getaffinity(0)), "recursion": sys.getrecursionlimit(),
        "logging": [logging.root.level, logging.root.disabled, logging.root.manager.disable,
            len(logging.root.handlers)], "pixels": PIL.Image.MAX_IMAGE_PIXELS,
        "switch": sys.getswitchinterval(), "argv": sys.argv,
    }
os.umask(0o22)
before = seen()
from llava_edge.runtime import LlavaEdge
model = LlavaEdge.load(sys.argv[1], threads=1)
model.generate("Hello", max_new_tokens=2)
model.close()
after = seen()
from llava_edge.runtime.backends.process import configure_process
print(json.dumps([
    {k: (before[k], after[k]) for k in before if before[k] != after[k]},
    sorted(configure_process()),
]))
"""


@pytest.fixture(scope="module")
def artifact(make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]) -> Path:
    return make_artifact(make_checkpoint("odd", backbone="mistral"))


def run(code: str, *arguments: object) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_loading_and_asking_changes_nothing_of_the_process_but_what_is_documented(
    artifact: Path,
) -> None:
    changed, named = run(LOOK, artifact)
    environment = changed.pop("environ", ({}, {}))
    assert changed == {}
    assert {k: v for k, v in environment[1].items() if environment[0].get(k) != v} == {
        "ORT_DISABLE_TELEMETRY": "1"
    }
    assert named == ["allocator", "fork", "telemetry"]
    assert configure_process.__doc__ is not None
    assert all(f"``{name}``" in configure_process.__doc__ for name in named)


def test_configuring_twice_changes_nothing_a_second_time() -> None:
    code = """
import json, os
hooks = []
os.register_at_fork = lambda **hook: hooks.append(hook)
from llava_edge.runtime.backends import process
calls = []
process.set_map_threshold = lambda: calls.append("mallopt") or True
process.ort.disable_telemetry_events = lambda: calls.append("telemetry")
first = process.configure_process()
names = [sorted(first), sorted(process.configure_process()), sorted(process.configure_process())]
print(json.dumps([names, calls, len(hooks)]))
"""
    names, calls, hooks = run(code)
    assert names == [["allocator", "fork", "telemetry"]] * 3
    assert sorted(calls) == ["mallopt", "telemetry"]
    assert hooks == 1


def test_an_application_keeps_its_allocator_if_it_says_so_before_it_loads(artifact: Path) -> None:
    code = """
import json, sys
from llava_edge.runtime import LlavaEdge; from llava_edge.runtime.backends import process
calls = []
process.set_map_threshold = lambda: calls.append("mallopt") or True
process.configure_process(map_large_blocks=False)
LlavaEdge.load(sys.argv[1], threads=1).close()
print(json.dumps(calls))
"""
    assert run(code, artifact) == []
