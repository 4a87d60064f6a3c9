"""InputSketch: what each linear layer of the reference reads on the probes, a few rows of it.

Random sums of all tokens stand for the tokens: with signs drawn for each token, the squared output
of any weight on such a sum is, on average, that weight's squared output on the tokens themselves.
Text and what images bring are kept apart, since few models read both alike, and calibration may
have seen one kind alone. The model is the checkpoint's own, in float: nothing of the artifact is in
it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from llava_edge.convert.verification.quantized.output_error import KindInputs
from llava_edge.convert.verification.reference.scratch_folder import ScratchFolder
from llava_edge.convert.verification.reference.streamed_model import StreamedModel

_SUMS = 16
"""Of one kind of token and one probe."""
_SEED = 2024
_READERS = {
    "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
"""Layers that read the same input, by the one that is watched."""
_WATCHED = {reader: first for first, readers in _READERS.items() for reader in readers}


class InputSketch:
    """Watches the reference and keeps sketches in files, below a folder of its own."""

    def __init__(self) -> None:
        self._probes: list[str] = []
        self._folder = ScratchFolder("llava-edge-inputs-")

    @property
    def path(self) -> Path:
        """The folder, which goes with this object, or when it is closed."""
        return self._folder.path

    def close(self) -> None:
        """Remove what was kept; probes may be watched anew."""
        self._folder.close()
        self._probes.clear()

    @contextmanager
    def watching(
        self, model: StreamedModel, num_layers: int, probe: str, is_image: torch.Tensor
    ) -> Iterator[None]:
        """Keep what the layers of a model read in this block, once for each probe.

        Args:
            model: run once, over the embeddings of the probe.
            num_layers: of its decoder.
            probe: its name.
            is_image: bool [tokens].
        """
        if probe in self._probes:
            yield
            return
        place = len(self._probes)
        generator = torch.Generator().manual_seed(_SEED + place)
        kinds = [mask.nonzero()[:, 0] for mask in (~is_image, is_image)]
        signs = [torch.randint(0, 2, (_SUMS, len(kind)), generator=generator) for kind in kinds]

        def see(name: str, first: torch.Tensor, _output: torch.Tensor) -> None:
            for index, (kind, drawn) in enumerate(zip(kinds, signs, strict=True)):
                if not len(kind):
                    continue
                rows = first[0][kind]
                squares = rows.square().mean(0, dtype=torch.float64)
                # As many tokens as sums, or fewer, stand for themselves.
                sums = rows if len(rows) <= _SUMS else (2.0 * drawn - 1.0) @ rows * _SUMS**-0.5
                sums = sums * len(rows) ** -0.5
                np.savez(self._file(place, index, name), sums=sums, squares=squares)

        names = [
            f"language_model.layers.{layer}.{first}"
            for layer in range(num_layers)
            for first in _READERS
        ]
        with model.observed(names, see):
            yield
        self._probes.append(probe)

    def load(self, name: str) -> list[KindInputs]:
        """Inputs of a layer by kind of token, of all probes that were watched.

        Args:
            name: canonical, such as ``language_model.layers.3.mlp.up_proj``.
        """
        layer, linear = name.split(".", 3)[2:]
        watched = f"language_model.layers.{layer}.{_WATCHED[linear]}"
        found: list[KindInputs] = []
        for index in (0, 1):
            files = [self._file(place, index, watched) for place in range(len(self._probes))]
            loaded = [_loaded(path) for path in files if path.is_file()]
            if loaded:
                share = len(loaded) ** -0.5
                sums = [each * share for each, _ in loaded]
                squares = torch.stack([each for _, each in loaded])
                found.append(KindInputs(torch.cat(sums), squares.mean(0)))
        return found

    def _file(self, place: int, kind: int, name: str) -> Path:
        return self.path / f"{place}-{kind}-{name}.npz"


def _loaded(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    with np.load(path) as stored:
        return torch.from_numpy(stored["sums"]), torch.from_numpy(stored["squares"])
