"""Array: any numpy array. DeviceKind: what kind of device holds and computes it."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

DeviceKind = Literal["cpu", "cuda"]
