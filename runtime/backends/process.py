"""configure_process: everything that llava-edge changes for the whole process.

A library is a guest in its application's process. What it must change there stands here, and
nowhere else; an application may call ``configure_process`` itself, before it loads a model.
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from contextlib import redirect_stdout
from functools import cache
from typing import Any

# ONNX Runtime 1.29 and later, as pip installs it on Linux, holds a client that reports to its maker
# over the network: a thread, a database in the user's cache folder, a file in the folder for
# temporary ones, and a process that never ends after fork(). It looks at this when it is imported.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import onnxruntime as ort

from llava_edge.runtime.backends.cuda_libraries import nvidia_folders
from llava_edge.runtime.util.arrays import DeviceKind
from llava_edge.runtime.util.host_memory import map_large_blocks as set_map_threshold

_WARNINGS, _ERRORS = 2, 3
"""ONNX Runtime's levels of what it writes to stderr."""

_CHANGED: set[str] = set()
_CHOICES: dict[str, bool] = {}


def configure_process(
    device: DeviceKind = "cpu", *, map_large_blocks: bool = True
) -> frozenset[str]:
    """Change what has to be changed for the whole process; called by ``LlavaEdge.load``.

    Calling it again changes nothing a second time. What it changes, by the names it returns:

    ``telemetry``
        ONNX Runtime reports to nobody: ``ORT_DISABLE_TELEMETRY=1`` is in the environment from the
        import of ``llava_edge.runtime.backends.onnxruntime`` on (later would be too late for its
        thread), for child processes as well.
    ``fork``
        A hook for children of ``fork()``, where sessions are never ended: their threads are not
        there. Nothing is done in this process.
    ``allocator``
        ``mallopt(M_MMAP_THRESHOLD, 1 MiB)``: the C library maps every block of 1 MiB and more on
        its own, and gives it back to the system when it is freed. Left as it is with
        ``map_large_blocks=False``, at the price of a higher peak.
    ``cuda_libraries``
        On ``cuda``: CUDA's libraries of pip's packages are loaded. What ONNX Runtime prints
        about that goes to stderr.
    ``cuda_arena``
        On ``cuda``: ONNX Runtime's own arena for buffers on a GPU allocates the requested size, not
        the next power of two. For that call its log level is *errors*, after it *warnings*.

    Signal handlers, the locale, limits of the system, filters of warnings and logging stay as the
    application has them.

    Args:
        device: where models will run.
        map_large_blocks: see ``allocator``. The first call decides, so an application that wants
            to keep its own allocator says so before it loads a model.

    Returns:
        Names of what this process has had changed so far.
    """
    _stop_telemetry()
    keep_in_children()
    if _CHOICES.setdefault("allocator", map_large_blocks):
        _map_large_blocks()
    if device == "cuda":
        preload_cuda()
        take_exact_memory()
    return frozenset(_CHANGED)


@cache
def _stop_telemetry() -> None:
    # Where an application imported ONNX Runtime first, the variable came too late for the thread;
    # this does not for the reports.
    ort.disable_telemetry_events()
    _CHANGED.add("telemetry")


@cache
def _map_large_blocks() -> None:
    if set_map_threshold():
        _CHANGED.add("allocator")


_OPEN: weakref.WeakSet[Any] = weakref.WeakSet()


def keep_in_children(session: object = None) -> None:
    """Let a session, an object with ONNX Runtime's as ``_session``, never end in a child of fork.

    Its end would wait for threads that only the parent has; seen are a child that never exits, and
    one that dies of a segmentation fault. The memory is the parent's and costs the child nothing.
    """
    if "fork" not in _CHANGED:
        os.register_at_fork(after_in_child=_keep_in_child)
        _CHANGED.add("fork")
    if session is not None:
        _OPEN.add(session)


def _keep_in_child() -> None:
    for session in list(_OPEN):
        held = getattr(session, "_session", None)
        if held is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(held))


@cache
def preload_cuda() -> None:
    """Let the loader find CUDA libraries that pip installed; the graphs need no cuDNN.

    ONNX Runtime looks beside its own folder alone; the libraries may be of another one on the
    search path, such as that of the environment below this one.
    """
    if not hasattr(ort, "preload_dlls"):
        return
    major = (getattr(ort, "cuda_version", None) or "").partition(".")[0]
    folders = [str(folder) for folder in nvidia_folders([f"cu{major}/lib"])] if major else []
    # It reports on stdout, which belongs to answers.
    with redirect_stdout(sys.stderr):
        ort.preload_dlls(cudnn=False, directory=folders[0] if folders else None)
    _CHANGED.add("cuda_libraries")


@cache
def take_exact_memory() -> None:
    """Let buffers on a GPU take what they ask for.

    ONNX Runtime's Python layer has an arena of its own for them, one a process. No option of a
    session reaches it, and it doubles: a cache of 8.1 GiB would take 16. What is said to it holds
    when it is said before the first buffer. Source: ``GetCudaAllocator`` in ONNX Runtime's
    ``onnxruntime_pybind_mlvalue.cc``; the call is in 1.31.1, marked as deprecated.
    """
    layer = ort.capi.onnxruntime_pybind11_state
    if not hasattr(layer, "set_arena_extend_strategy"):
        return
    # It warns of its end; an application's own level cannot be asked for, so this is the default.
    ort.set_default_logger_severity(_ERRORS)
    try:
        layer.set_arena_extend_strategy(layer.ArenaExtendStrategy.kSameAsRequested)
    finally:
        ort.set_default_logger_severity(_WARNINGS)
    _CHANGED.add("cuda_arena")
