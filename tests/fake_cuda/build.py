"""``python -m tests.fake_cuda.build HEADERS OUT``: compile the fake's libraries.

HEADERS is a folder that pip installed ``nvidia-cuda-runtime`` and ``nvidia-cuda-crt`` into; only
their headers are used. OUT gets libraries of the names that ONNX Runtime's CUDA provider asks for.
The environment's ``CFLAGS`` come last; CI makes warnings errors by them, a newer compiler of
somebody else may know warnings that ours does not.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

SOURCES = Path(__file__).parent
RUNTIME = "libcudart.so.13"
_PARTS = ("memory.c", "device.c", "kernels.c", "stream.c", "launch.c", "runtime.c")
_BLAS = ("libcublas.so.13", "libcublasLt.so.13")
_DRIVER = ("libcuda.so.1", "libnvidia-ml.so.1")
_UNUSED = "libcurand.so.10"
"""The provider asks for it and calls nothing of it."""
_FLAGS = ("-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-fPIC", "-shared")


def build(headers: Path, out: Path) -> None:
    """Compile everything into ``out``.

    Raises:
        FileNotFoundError: there is no C compiler, or no header.
        subprocess.CalledProcessError: the compiler refused something; it says what on stderr.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise FileNotFoundError("no C compiler: install gcc (Debian: apt install gcc)")
    include = next(headers.glob("nvidia/*/include/cuda_runtime_api.h"), None)
    if include is None:
        raise FileNotFoundError(f"no cuda_runtime_api.h below {headers}")
    out.mkdir(parents=True, exist_ok=True)
    asked = shlex.split(os.environ.get("CFLAGS", ""))
    command = [compiler, *_FLAGS, *asked, f"-I{include.parent}", f"-I{SOURCES}"]

    def library(name: str, parts: tuple[str, ...], exported: str = "", *more: str) -> None:
        version = []
        if exported:
            # The provider was linked with libraries whose symbols carry their name as a version.
            script = out / f"{name}.map"
            script.write_text(f"{name} {{ global: {exported}; }};\n")
            version = [f"-Wl,--version-script={script}"]
        files = [str(SOURCES / part) for part in parts]
        made = [*command, f"-Wl,-soname,{name}", *version, *files, "-o", str(out / name), *more]
        subprocess.run(made, check=True)

    library(RUNTIME, _PARTS, "*", "-lpthread", "-ldl")
    state = (f"-L{out}", f"-l:{RUNTIME}")
    for name in _BLAS:
        library(name, ("blas.c",), "cublas*", *state)
    for name in _DRIVER:
        library(name, ("driver.c",), "", *state)
    library(_UNUSED, ("unused.c",))


if __name__ == "__main__":
    try:
        build(Path(sys.argv[1]), Path(sys.argv[2]))
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        sys.exit(f"The fake CUDA is not built: {error}")
