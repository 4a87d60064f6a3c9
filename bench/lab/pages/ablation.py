"""Spoiling: one AnyRes step done wrongly on purpose in transformers, to see what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args
from unittest import mock

from torch import Tensor
from transformers import LlavaNextProcessor
from transformers.models.llava_next import modeling_llava_next

Fault = Literal["swapped tiles", "no newlines", "no unpadding"]
FAULTS: tuple[Fault, ...] = get_args(Fault)


@contextmanager
def spoiled(fault: Fault | None) -> Iterator[None]:
    """While this holds, the reference makes the named mistake, and counts its tokens to match."""
    if fault == "no newlines":
        with (
            mock.patch.object(
                modeling_llava_next.LlavaNextModel, "pack_image_features", _pack_without_newlines()
            ),
            mock.patch.object(LlavaNextProcessor, "_get_unpadded_features", _count(newlines=False)),
        ):
            yield
    elif fault == "no unpadding":
        with (
            mock.patch.object(modeling_llava_next, "unpad_image", _leave_padding),
            mock.patch.object(LlavaNextProcessor, "_get_unpadded_features", _count(unpad=False)),
        ):
            yield
    elif fault == "swapped tiles":
        with mock.patch.object(LlavaNextProcessor, "__call__", _swap_tiles()):
            yield
    else:
        yield


def _swap_tiles() -> Any:
    original: Any = LlavaNextProcessor.__call__

    def process(self: Any, *given: Any, **named: Any) -> Any:
        inputs = original(self, *given, **named)
        # Images, tiles, …; the thumbnail is the first tile and stays.
        pixels = inputs["pixel_values"]
        inputs["pixel_values"] = pixels[:, [0, 2, 1, *range(3, pixels.shape[1])]]
        return inputs

    return process


def _pack_without_newlines() -> Any:
    original: Any = modeling_llava_next.LlavaNextModel.pack_image_features

    def pack(self: Any, image_features: Any, image_sizes: Any, *rest: Any, **named: Any) -> Any:
        named["image_newline"] = None
        return original(self, image_features, image_sizes, *rest[:1], **named)

    return pack


def _leave_padding(tensor: Tensor, original_size: Any) -> Tensor:
    return tensor


def _count(newlines: bool = True, unpad: bool = True) -> Any:
    original: Any = LlavaNextProcessor._get_unpadded_features

    def count(
        self: Any, height: int, width: int, patches_height: int, patches_width: int,
        scale_height: int, scale_width: int,
    ) -> tuple[int, int]:  # fmt: skip
        unpadded, added = original(
            self, height, width, patches_height, patches_width, scale_height, scale_width
        )
        if not unpad:
            rows = patches_height * scale_height
            unpadded, added = rows * patches_width * scale_width, rows
        return unpadded, added if newlines else 0

    return count
