"""Flags of commands that load an artifact: what runs it."""

from __future__ import annotations

import argparse
from typing import get_args

from llava_edge.runtime.tower import AskedEngine


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
