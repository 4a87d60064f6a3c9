"""LayerInputs: what every decoder layer of the reference reads on one prompt, kept in files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from llava_edge.convert.verification.reference.scratch_folder import ScratchFolder
from llava_edge.convert.verification.reference.streamed_model import StreamedModel
from llava_edge.runtime.util.arrays import Array

_FINAL_NORM = "language_model.norm"


class LayerInputs:
    """Watches one run of the reference, below a folder of its own.

    Args:
        num_layers: of the decoder.

    Attributes:
        error: why a file could not be written, where one could not; nothing is kept then.
    """

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._folder = ScratchFolder("llava-edge-layers-")
        self.error: OSError | None = None

    @contextmanager
    def watching(self, model: StreamedModel) -> Iterator[None]:
        """Keep what the layers of a model read in this block, which runs it once.

        A file that cannot be written does not stop the run: ``error`` has the reason.
        """

        def see(name: str, first: torch.Tensor, output: torch.Tensor) -> None:
            self._save(name.rsplit(".", 1)[-1], first)
            if name == _FINAL_NORM:
                self._save("normed", output)

        names = [f"language_model.layers.{layer}" for layer in range(self._num_layers)]
        try:
            with model.observed([*names, _FINAL_NORM], see):
                yield
        except BaseException:
            self.close()
            raise

    @property
    def normed(self) -> Array:
        """What the final norm makes, float32 [tokens, hidden]."""
        return self._load("normed")

    def load(self, layer: int) -> Array:
        """Input of a layer, float32 [tokens, hidden]; of the final norm after the last."""
        return self._load("norm" if layer == self._num_layers else str(layer))

    def close(self) -> None:
        """Remove the files."""
        self._folder.close()

    def _save(self, name: str, rows: torch.Tensor) -> None:
        if self.error is not None:
            return
        try:
            np.save(self._folder.path / f"{name}.npy", rows[0].numpy())
        except OSError as error:
            self.error = error
            self.close()

    def _load(self, name: str) -> Array:
        loaded: Array = np.load(self._folder.path / f"{name}.npy")
        return loaded
