"""A model in a child of fork(): said clearly, never a hang; and ONNX Runtime reports to nobody."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PARENT = """
import gc, os, signal, sys, warnings
# Python 3.12 and later warn of fork() beside threads, which is the matter here.
warnings.simplefilter("ignore", DeprecationWarning)
from llava_edge.profiles.errors import EngineError
from llava_edge.runtime import LlavaEdge

# More than one worker: the end of such a pool in a child is what fails.
model = LlavaEdge.load(sys.argv[1], threads=4)
chat = model.chat()
stream = model.stream("Tell me everything", max_new_tokens=20)
first = next(stream)
child = os.fork()
if child == 0:
    signal.alarm(60)
    {child}
status = os.waitpid(child, 0)[1]
rest = first + "".join(stream)
assert rest == stream.answer.text
assert model.generate("Tell me everything", max_new_tokens=20).text == rest
print("status", status)
"""

CHILDREN = {
    "asks": """
    for ask in (
        lambda: model.generate("Hello"),
        lambda: model.count_tokens("Hello"),
        lambda: model.replay("Hello", [], [5], lambda *_: None),
        lambda: chat.send("Hello"),
        lambda: next(stream),
    ):
        try:
            ask()
        except EngineError as error:
            assert str(os.getpid()) in str(error) and "fork()" in str(error), error
        else:
            os._exit(3)
    os._exit(0)""",
    "closes": "stream.close(); model.close(); model.close(); os._exit(0)",
    "drops": "del stream, chat, model; gc.collect(); os._exit(0)",
    "ends": "sys.exit(0)",
}


@pytest.fixture(scope="module")
def artifact(make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]) -> Path:
    return make_artifact(make_checkpoint("odd", backbone="mistral"))


@pytest.mark.parametrize("child", CHILDREN.values(), ids=CHILDREN)
def test_a_child_is_refused_and_ends_and_the_parent_goes_on(artifact: Path, child: str) -> None:
    code = PARENT.replace("{child}", child)
    done = subprocess.run(
        [sys.executable, "-c", code, str(artifact)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.stdout.strip() == "status 0", done.stderr[-2000:]


def test_onnx_runtime_leaves_no_thread_and_no_file_behind(tmp_path: Path) -> None:
    code = (
        "import os, time, numpy, tokenizers\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "import llava_edge.runtime.backends.onnxruntime\n"
        "time.sleep(0.5)\n"
        "print(len(os.listdir('/proc/self/task')) - before)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    places = ("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME")
    environment |= dict.fromkeys(places, str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == "0"
    assert list(tmp_path.rglob("*")) == []
