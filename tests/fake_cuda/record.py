"""What a fake CUDA was asked, as Python sees it."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.fake_cuda.build import RUNTIME

_KERNEL = "kernel "


@dataclass
class Record:
    """Lines in the order in which things were done; see ``fake_note`` in the C files."""

    lines: list[str] = field(default_factory=list)

    @property
    def kernels(self) -> list[str]:
        """Launched kernels by their readable names, without arguments."""
        names = [line.removeprefix(_KERNEL) for line in self.lines if line.startswith(_KERNEL)]
        given = subprocess.run(
            ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
        )
        plain = [re.sub(r"^void ", "", name) for name in given.stdout.splitlines()]
        # Templates and arguments say little more, and differ from device to device.
        return [re.split(r"[<(]", name, maxsplit=1)[0].rpartition("::")[2] for name in plain]

    def counted(self) -> Counter[str]:
        """How often each kernel was launched."""
        return Counter(self.kernels)

    def copies(self, direction: str) -> list[int]:
        """Bytes of all copies of a direction, such as ``host to device``."""
        found = (re.fullmatch(rf"copy {direction} (\d+)( pageable)?", line) for line in self.lines)
        return [int(match[1]) for match in found if match]

    def taken(self) -> list[int]:
        """Bytes of all allocations on the device."""
        found = (re.fullmatch(r"take (\d+)", line) for line in self.lines)
        return [int(match[1]) for match in found if match]


class FakeCuda:
    """The fake that this process runs on.

    Raises:
        OSError: the process was not started with it; see ``make test-cuda``.
        AttributeError: another libcudart was found.
    """

    def __init__(self) -> None:
        self.library = ctypes.CDLL(RUNTIME)
        self.library.fake_lines.restype = ctypes.c_char_p
        for name in ("used", "peak", "total"):
            getattr(self.library, f"fake_{name}").restype = ctypes.c_size_t

    @contextmanager
    def record(self) -> Iterator[Record]:
        """Everything that is asked within; the lines are there behind it."""
        record = Record()
        self.library.fake_record(1)
        try:
            yield record
        finally:
            record.lines[:] = self.library.fake_lines().decode().splitlines()
            self.library.fake_record(0)

    @property
    def used(self) -> int:
        """Bytes in use on the device."""
        return int(self.library.fake_used())

    @property
    def peak(self) -> int:
        """The most that was in use since ``forget_peak``."""
        return int(self.library.fake_peak())

    def forget_peak(self) -> None:
        """Begin anew."""
        self.library.fake_reset_peak()
