"""LayerInputs: what every decoder layer of the reference reads on one prompt, kept in files."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from llava_edge.convert.verification.reference.answer import Reference
from llava_edge.runtime.util.arrays import Array

_FINAL_NORM = "language_model.norm"


class LayerInputs:
    """Runs the reference once and remembers; use as a context manager.

    Args:
        reference: with the artifact's own weights.
        embeddings: float32 [tokens, hidden].
        num_layers: of the decoder.

    Attributes:
        normed: float32 [tokens, hidden], behind the final norm.
    """

    def __init__(self, reference: Reference, embeddings: torch.Tensor, num_layers: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="llava-edge-layers-")
        self._num_layers = num_layers

        def see(name: str, first: torch.Tensor, _output: torch.Tensor) -> None:
            np.save(self._path(name.rsplit(".", 1)[-1]), first[0].numpy())

        names = [f"language_model.layers.{layer}" for layer in range(num_layers)]
        try:
            reference.model.use(reference.supply)
            with reference.model.observed([*names, _FINAL_NORM], see):
                self.normed: Array = reference.model.hidden(embeddings).numpy()
        except BaseException:
            self._folder.cleanup()
            raise

    def load(self, layer: int) -> Array:
        """Input of a layer, float32 [tokens, hidden]; of the final norm behind the last."""
        loaded: Array = np.load(self._path("norm" if layer == self._num_layers else str(layer)))
        return loaded

    def _path(self, name: str) -> Path:
        return Path(self._folder.name) / f"{name}.npy"

    def __enter__(self) -> LayerInputs:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._folder.cleanup()
