"""Faults of videos: pooling, frames, and the order of their tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from llava_edge.convert.onnx import vision as vision_graph
from llava_edge.profiles.models.model_dims import VisionDims
from llava_edge.runtime.artifact.manifest import VideoProcessing
from llava_edge.runtime.generation.inputs.input_embeds import PromptEmbeddings
from llava_edge.runtime.processing.video import video_processor
from llava_edge.runtime.processing.video.video_processor import VideoProcessor
from llava_edge.runtime.vision import encoder as vision
from tests.faults.fault import Fault

_Patch = pytest.MonkeyPatch
_PROJECTOR = "multi_modal_projector"


def _pooled_behind(patch: _Patch) -> None:
    pooled, projector = vision_graph._pooled, vision_graph._projector
    patch.setattr(vision_graph, "_pooled", lambda _, features: features)
    patch.setattr(
        vision_graph,
        "_projector",
        lambda p, hidden, features: pooled(p.g, projector(p, hidden, features)),
    )


def _sum(patch: _Patch) -> None:
    real = vision_graph.GraphBuilder.op

    def op(self: Any, op_type: str, *inputs: Any, **attributes: Any) -> Any:
        # Shares of one each: four times the mean.
        return inputs[0] if op_type == "Div" else real(self, op_type, *inputs, **attributes)

    patch.setattr(vision_graph.GraphBuilder, "op", op)


def _strips(patch: _Patch) -> None:
    real = vision.pooling_index

    def index(dims: VisionDims, num_tokens: int) -> NDArray[np.int64]:
        found = real(dims, num_tokens)
        return np.sort(found.ravel()).reshape(found.shape)

    patch.setattr(vision, "pooling_index", index)


def _pillow(patch: _Patch) -> None:
    def resize(frame: NDArray[np.uint8], height: int, width: int, side: int) -> NDArray[np.uint8]:
        image = Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)
        top, left = (height - side) // 2, (width - side) // 2
        return np.asarray(image)[top : top + side, left : left + side]

    patch.setattr(video_processor, "resize_middle", resize)


def _not_folded(patch: _Patch) -> None:
    real = VideoProcessor.__init__

    def init(self: VideoProcessor, processing: VideoProcessing) -> None:
        real(self, processing)
        values = (np.arange(256) * processing.rescale_factor).astype(np.float32)
        mean = np.array(processing.image_mean, np.float32)[:, None]
        std = np.array(processing.image_std, np.float32)[:, None]
        self._normalized = (values - mean) / std

    patch.setattr(VideoProcessor, "__init__", init)


def _reversed(patch: _Patch) -> None:
    real = VideoProcessor.preprocess

    def preprocess(
        self: VideoProcessor, frames: Iterable[NDArray[np.uint8]], count: int
    ) -> NDArray[np.float32]:
        return real(self, list(frames)[::-1], count)

    patch.setattr(VideoProcessor, "preprocess", preprocess)


def _shifted(patch: _Patch) -> None:
    real = PromptEmbeddings.__init__

    def init(self: PromptEmbeddings, ids: Any, *rest: Any) -> None:
        real(self, ids, *rest)
        video = rest[-1] if len(rest) == 6 else None
        places = np.flatnonzero(ids == video)
        if len(places):
            self._feature_rows[places] = np.roll(self._feature_rows[places], 1)

    patch.setattr(PromptEmbeddings, "__init__", init)


FAULTS: tuple[Fault, ...] = (
    Fault(
        "pooled behind the projector",
        "video",
        "frames are pooled behind the projector, as later code of the original does",
        "conversion",
        "structure",
        _pooled_behind,
        model="video",
        tensor=f"{_PROJECTOR}.linear_1",
    ),
    Fault(
        "sum for mean",
        "video",
        "the sum of four patches stands for their mean",
        "conversion",
        "structure",
        _sum,
        model="video",
        tensor=f"{_PROJECTOR}.linear_1",
    ),
    Fault(
        "strips for squares",
        "video",
        "four patches of a row are pooled, not two by two",
        "runtime",
        "tile_features",
        _strips,
        model="video",
    ),
    Fault(
        "Pillow's bicubic",
        "video",
        "frames are resized by Pillow, where the reference takes torch",
        "runtime",
        "preprocessing",
        _pillow,
        model="video",
    ),
    Fault(
        "rescaled first",
        "video",
        "frames are rescaled and normalised as images are, not in one step",
        "runtime",
        "preprocessing",
        _not_folded,
        model="video",
    ),
    Fault(
        "frames reversed",
        "video",
        "the last frame comes first",
        "runtime",
        "preprocessing",
        _reversed,
        model="video",
    ),
    Fault(
        "video tokens shifted",
        "video",
        "each token of the video stands one place later",
        "runtime",
        "packing",
        _shifted,
        model="video",
    ),
)
