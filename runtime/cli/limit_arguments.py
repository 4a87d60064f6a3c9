"""Command-line flags for the limits on pictures, the same in every command that opens some."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from llava_edge.profiles.command_line import bar, one_of, whole_number
from llava_edge.runtime.util.image_formats import READABLE_FORMATS
from llava_edge.runtime.util.limits import HighBitDepth, Limits


def add_limit_arguments(parser: argparse._ActionsContainer) -> None:
    """Add ``--max-image-pixels``, ``--image-formats`` and ``--high-bit-depth``."""
    defaults = Limits()
    parser.add_argument(
        "--max-image-pixels",
        type=whole_number(1),
        metavar="N",
        help=f"height times width of the largest picture (default: {defaults.max_image_pixels})",
    )
    parser.add_argument(
        "--image-formats",
        metavar="NAME,...",
        help=f"formats that are read, out of {', '.join(READABLE_FORMATS)} (default: "
        f"{', '.join(defaults.image_formats)})",
    )
    parser.add_argument(
        "--high-bit-depth",
        type=one_of(get_args(HighBitDepth)),
        metavar=bar(get_args(HighBitDepth)),
        help="16-bit and float pictures: scaled to 8 bits (default), or clipped at 255 as the "
        "reference does",
    )


def asked_limits(options: argparse.Namespace) -> Limits:
    """The limits that the flags ask for; the others keep their defaults.

    Raises:
        RequestError: a bound is below 1 or a format is unknown.
    """
    given: dict[str, Any] = {
        "max_image_pixels": options.max_image_pixels,
        "high_bit_depth": options.high_bit_depth,
    }
    if options.image_formats is not None:
        names = options.image_formats.upper().split(",")
        given["image_formats"] = tuple(name.strip() for name in names if name.strip())
    return Limits(**{name: value for name, value in given.items() if value is not None})
