"""Flags of commands that load an artifact: what runs it, what its cache holds."""

from __future__ import annotations

import argparse
from typing import get_args

from llava_edge.profiles.memory.buffers import CACHE_FLAGS
from llava_edge.runtime.loading.placement import AskedCache
from llava_edge.runtime.vision.select import AskedEngine


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--engine``, ``--trust-engines`` and ``--strict-device``; see ``LlavaEdge.load``."""
    parser.add_argument(
        "--engine",
        choices=get_args(AskedEngine),
        default="auto",
        help="what runs the vision tower; auto: the first that works",
    )
    parser.add_argument(
        "--trust-engines",
        action="store_true",
        help="open TensorRT engines that came with the artifact",
    )
    parser.add_argument(
        "--strict-device",
        action="store_true",
        help="on cuda: refuse where a part of the model would be computed on the CPU",
    )


def add_cache_argument(parser: argparse._ActionsContainer) -> None:
    """Add ``--cache``; ``asked_cache`` says what was asked."""
    parser.add_argument(
        "--cache",
        choices=("auto", *CACHE_FLAGS),
        default="auto",
        help="type of the key and value cache; int8 where the artifact was converted with it",
    )


def asked_cache(flag: str) -> AskedCache:
    """A value of ``--cache`` as ``LlavaEdge.load`` takes it."""
    return "auto" if flag == "auto" else CACHE_FLAGS[flag]
