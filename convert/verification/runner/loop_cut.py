"""LoopCut: the whole runtime over an artifact, or over its first layers where all cost too much.

A cut is a smaller model made of the artifact's own parts: its tower, tokenizer and embeddings, the
first layers of its decoder, and right behind them its final norm and head. The graph is written
into a temporary folder; weights are read from the artifact in place. Sampling, cache, chunks, stop
tokens and all else of the loop are what a user runs, and the reference is cut at the same layer, so
answers are comparable token by token.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_edge.convert.onnx.decoder_slice import DecoderGraph
from llava_edge.convert.verification.runner.artifact_runner import ArtifactRunner
from llava_edge.profiles.models.model_dims import TextDims
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.artifact.manifest import GraphSpec, Manifest
from llava_edge.runtime.artifact.open import Artifact
from llava_edge.runtime.artifact.opened_files import OpenedFiles
from llava_edge.runtime.util.opened_file import Fingerprint, OpenedFile

LOOP_PRODUCTS = 4e11
"""Products of one pass over the probes that ``quick`` spends on the loop, which makes three."""
_LEAST_LAYERS = 4
"""Of a cut that products decide: each layer has a cache of its own, and they must not be mixed."""


@dataclass(frozen=True)
class LoopCut:
    """An artifact that the whole runtime can load in the memory at hand.

    Attributes:
        artifact: with as many layers as there are in the cut; closed with the cut.
        num_layers: of the cut.
        of_layers: of the artifact.
    """

    artifact: Artifact
    num_layers: int
    of_layers: int

    @property
    def reference_layers(self) -> int | None:
        """How many layers the reference must run; None for all."""
        return None if self.num_layers == self.of_layers else self.num_layers

    def __str__(self) -> str:
        if self.reference_layers is None:
            return f"the loop ran on all {self.of_layers} layers"
        return (
            f"the loop ran on a cut: the first {self.num_layers} of {self.of_layers} layers with "
            "the final norm and the head behind them"
        )

    def load(
        self, change: Callable[[Manifest], Manifest] | None = None, **options: Any
    ) -> LlavaEdge:
        """Load the cut as users load an artifact, on the CPU; close what is returned.

        Args:
            change: makes another manifest of the cut's, such as one without stop tokens.
            options: as ``LlavaEdge.over``.

        Raises:
            LlavaEdgeError: as ``LlavaEdge.over``.
        """
        artifact = self.artifact
        if change is not None:
            artifact = replace(artifact, manifest=change(artifact.manifest))
        return LlavaEdge.over(artifact, "cpu", allow_slow=True, **options)


def layer_weights(text: TextDims) -> int:
    """Weights of the products of one decoder layer: that many products for each token."""
    projections = 2 * text.query_size + 2 * text.key_value_size + 3 * text.intermediate_size
    return text.hidden_size * projections


def loop_layers(subject: ArtifactRunner, tokens: int, products: float | None) -> int:
    """How many of the first layers the loop runs on; all of a model that is small enough.

    Args:
        subject: the artifact, and the memory that the decoder's weights may need.
        tokens: of all prompts and answers together.
        products: that one pass over them may cost; four layers may cost more. None for any number.
    """
    text = subject.dims.text
    count = text.num_hidden_layers if subject.is_whole else subject.layers_beside_head
    if products is None:
        return count
    return min(count, max(_LEAST_LAYERS, int(products // (tokens * layer_weights(text)))))


@contextmanager
def loop_cut(subject: ArtifactRunner, layers: int) -> Iterator[LoopCut]:
    """The artifact whole where the loop runs on all layers, else a cut of it.

    Args:
        subject: the artifact.
        layers: see ``loop_layers``.

    Raises:
        ArtifactError: the decoder's graph has not the layers that the manifest says.
    """
    artifact, count = subject.artifact, subject.dims.text.num_hidden_layers
    if layers == count:
        yield LoopCut(artifact, count, count)
        return
    manifest = artifact.manifest
    with tempfile.TemporaryDirectory(prefix="llava-edge-cut-") as folder:
        graphs: dict[str, Path] = {}
        specs: dict[str, GraphSpec] = {}
        text = manifest.model.text
        for cache, spec in manifest.decoders.items():
            cut = DecoderGraph(artifact.path(spec.file), manifest.model).slice(0, layers, head=True)
            path = Path(folder) / f"{cache}.onnx"
            path.write_bytes(cut.model)
            graphs[spec.file], text = path, cut.text
            specs[spec.file] = replace(
                spec,
                inputs=tuple(each for each in spec.inputs if each.name in cut.values),
                outputs=tuple(each for each in spec.outputs if each.name in cut.values),
            )
        second = manifest.decoder_int8_cache
        smaller = replace(
            manifest,
            model=replace(manifest.model, text=text),
            decoder=specs[manifest.decoder.file],
            decoder_int8_cache=None if second is None else specs[second.file],
        )
        with _CutFiles(artifact.files, graphs) as files:
            yield LoopCut(replace(artifact, manifest=smaller, files=files), layers, count)


class _CutFiles(OpenedFiles):
    """The files of an artifact, some graphs among them replaced.

    Args:
        files: of the artifact; they stay open.
        graphs: what stands for a file, by its name.
    """

    def __init__(self, files: OpenedFiles, graphs: dict[str, Path]) -> None:
        super().__init__(files.root)
        self._whole = files
        self._graphs = {name: OpenedFile(path, name) for name, path in graphs.items()}

    def __getitem__(self, name: str) -> OpenedFile:
        return self._graphs.get(name) or self._whole[name]

    @contextmanager
    def unchanged(self, on_change: Callable[[], None] = lambda: None) -> Iterator[None]:
        """See ``OpenedFiles``; the cut's own graphs are in memory once they are loaded."""
        with self._whole.unchanged(on_change):
            yield

    def require_unchanged(self) -> dict[str, Fingerprint]:
        """See ``OpenedFiles``."""
        return self._whole.require_unchanged()

    def close(self) -> None:
        """Close the graphs; the artifact's files are not ours."""
        for opened in getattr(self, "_graphs", {}).values():
            opened.close()
