"""libtiff, as Pillow brings it along: kept from writing on stderr.

It reports every damaged strip there, whatever the caller makes of it, so that a file could fill the
log of an application. Pillow raises its errors as exceptions all the same.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

_MAPS = Path("/proc/self/maps")


@cache
def quiet_libtiff() -> bool:
    """Take away libtiff's handlers of errors and warnings, for the whole process.

    Returns:
        Whether it was found. It is not where it is built into Pillow, or on another system.
    """
    try:
        lines = _MAPS.read_text("utf-8", "replace").splitlines()
    except OSError:
        return False
    paths = {fields[5] for line in lines if len(fields := line.split(maxsplit=5)) == 6}
    found = [path for path in sorted(paths) if Path(path).name.startswith("libtiff")]
    for path in found:
        try:
            library = ctypes.CDLL(path)
            for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
                setter = getattr(library, name)
                setter.argtypes, setter.restype = [ctypes.c_void_p], ctypes.c_void_p
                setter(None)
        except (OSError, AttributeError):
            return False
    return bool(found)
