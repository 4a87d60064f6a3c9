"""The parts of an artifact: each builder writes its files below a folder, streamed."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from llava_edge.convert.checkpoint.open import Checkpoint
from llava_edge.convert.onnx.builder import GraphBuilder
from llava_edge.convert.onnx.decoder import build_decoder_graph
from llava_edge.convert.onnx.embeddings import write_embeddings
from llava_edge.convert.onnx.graph_part import GraphPart
from llava_edge.convert.onnx.int8_kv_cache import write_int8_cache_graph
from llava_edge.convert.onnx.linear import QuantizedLayers
from llava_edge.convert.onnx.vision import build_vision_graph
from llava_edge.convert.quantization.calibration.calibration_set import CalibrationSet
from llava_edge.convert.quantization.kv_cache_scales import calibrate_cache
from llava_edge.convert.quantization.vision.activations import VisionTrace
from llava_edge.convert.quantization.vision.calibration_tiles import CalibrationTiles
from llava_edge.convert.quantization.vision.fp16_overflow import write_guarded_vision
from llava_edge.convert.quantization.vision.int8 import Int8Calibration, write_int8_vision
from llava_edge.convert.text.tokenizer import prepare_tokenizer
from llava_edge.profiles.boards.hardware import Target
from llava_edge.profiles.memory.buffers import BEST_TOKENS
from llava_edge.runtime.artifact.graph_inputs import POOLING
from llava_edge.runtime.artifact.manifest import GraphSpec, Precision, TokenIds
from llava_edge.runtime.backends.process import configure_process
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.util.progress import Progress
from llava_edge.runtime.vision.pooling import pooling_index

_LOG = logging.getLogger(__name__)

EMBEDDINGS_FILE = "embeddings.safetensors"
TOKENIZER_FILE = "tokenizer.json"
_EMBEDDING_ROWS = 4096


class PartBuilders:
    """Builders for one checkpoint and one board.

    Args:
        checkpoint: where tensors are read from.
        target: decides the type that the graphs compute in.
        context_tokens: positions that the decoder's rotary tables cover.
        report: told about bytes written.
    """

    def __init__(
        self, checkpoint: Checkpoint, target: Target, context_tokens: int, report: Progress
    ) -> None:
        self._checkpoint = checkpoint
        self._context_tokens = context_tokens
        self._report = report
        self._compute: type[np.float32] | type[np.float16] = (
            np.float32 if target == "cpu" else np.float16
        )

    def vision(self, folder: Path) -> GraphPart:
        """Tower and projector as they are."""
        graph = build_vision_graph(self._checkpoint.dims, self._checkpoint, self._compute)
        return GraphPart(self._save(graph, folder, "vision"))

    def int8_vision(self, folder: Path, tiles: CalibrationTiles, work: Path) -> GraphPart:
        """Tower and projector at 8 bits.

        Args:
            folder: of the artifact.
            tiles: that decide which layers stay in float.
            work: where the float graph lies meanwhile.
        """
        with self._traced(tiles, work) as trace:
            calibration = Int8Calibration(self._checkpoint, trace, self._report)
        part = write_int8_vision(
            self._checkpoint,
            calibration,
            tiles.pixel_values,
            folder,
            lambda graph: self._save(graph, folder, "vision"),
        )
        return replace(part, facts={**part.facts, "calibration": tiles.report})

    def guarded_vision(self, folder: Path, tiles: CalibrationTiles, work: Path) -> GraphPart:
        """Tower and projector in float16, with islands of float32 where tiles overflow it.

        Args:
            folder: of the artifact.
            tiles: whose values decide.
            work: where the float32 graph lies meanwhile.
        """
        with self._traced(tiles, work) as trace:
            part = write_guarded_vision(
                self._checkpoint,
                trace,
                tiles.pixel_values,
                folder,
                lambda graph: self._save(graph, folder, "vision"),
            )
        return replace(part, facts={**part.facts, "calibration": tiles.report})

    @contextmanager
    def _traced(self, tiles: CalibrationTiles, work: Path) -> Iterator[VisionTrace]:
        """The float32 graph, in a folder that is gone afterwards, to be looked into."""
        # Pieces of the tower come and go; what they took shall leave the process.
        configure_process()
        place = work / "vision-trace"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        try:
            graph = build_vision_graph(self._checkpoint.dims, self._checkpoint, np.float32)
            graph.save(place)
            # Frames are looked at unpooled: means of four patches stay within their range.
            vision = self._checkpoint.dims.vision
            given = {}
            if self._checkpoint.dims.takes_video:
                given[POOLING] = pooling_index(vision, vision.num_patches)
            yield VisionTrace(place / "model.onnx", tiles.pixel_values, given=given)
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def decoder(self, folder: Path, weights: QuantizedLayers | None = None) -> GraphSpec:
        """The language model without its embeddings."""
        text = self._checkpoint.dims.text
        graph = build_decoder_graph(
            text,
            self._checkpoint,
            self._compute,
            self._context_tokens,
            weights=weights,
            # On the CPU logits are where they are needed.
            num_best=0 if self._compute == np.float32 else min(BEST_TOKENS, text.vocab_size),
        )
        return self._save(graph, folder, "decoder")

    def int8_cache(
        self,
        folder: Path,
        decoder: GraphSpec,
        precision: Precision,
        samples: CalibrationSet,
        work: Path,
    ) -> GraphPart:
        """The decoder with an int8 KV cache.

        Args:
            folder: of the artifact.
            decoder: the float graph, which is there already.
            precision: of the artifact.
            samples: that the scales are taken from.
            work: where hidden states lie meanwhile.
        """
        dims = self._checkpoint.dims
        scales, facts = calibrate_cache(
            folder / decoder.file, dims, precision, samples, work, self._report
        )
        spec = write_int8_cache_graph(folder, decoder, dims.text, scales)
        return GraphPart(spec, facts)

    def embeddings(self, folder: Path) -> None:
        """Embedding rows and the newline."""
        newline = None
        if "image_newline" in self._checkpoint.tensors:
            newline = self._checkpoint.read("image_newline")
        write_embeddings(folder / EMBEDDINGS_FILE, self._embedding_rows(), newline)

    def tokenizer(self, folder: Path) -> TokenIds:
        """``tokenizer.json``."""
        return prepare_tokenizer(
            self._checkpoint.folder,
            self._checkpoint.config,
            folder / TOKENIZER_FILE,
            self._checkpoint.dims.text.vocab_size,
            source_id=self._checkpoint.source_id,
            report=_LOG.warning,
        )

    def _save(self, graph: GraphBuilder, folder: Path, name: str) -> GraphSpec:
        (folder / name).mkdir()
        graph.save(folder / name, self._report)
        return graph.spec(f"{name}/model.onnx")

    def _embedding_rows(self) -> Iterator[Array]:
        text = self._checkpoint.dims.text
        row_bytes = 2 * text.hidden_size
        for start in range(0, text.vocab_size, _EMBEDDING_ROWS):
            stop = min(start + _EMBEDDING_ROWS, text.vocab_size)
            yield self._checkpoint.read("language_model.embed_tokens.weight", slice(start, stop))
            self._report("embeddings", stop * row_bytes, text.vocab_size * row_bytes)
