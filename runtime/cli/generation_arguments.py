"""Flags of ``GenerationConfig`` for commands, made from its fields."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields

from llava_edge.profiles.command_line import real_number, whole_number
from llava_edge.runtime.generation.generation_config import GenerationConfig

_LARGE = 1 << 62

_TYPES = {
    "int": whole_number(-_LARGE, _LARGE),
    "int | None": whole_number(-_LARGE, _LARGE),
    "float": real_number(-sys.float_info.max),
}


def add_generation_arguments(parser: argparse._ActionsContainer) -> None:
    """One flag for each field, ``--max-new-tokens`` and so on."""
    for each in fields(GenerationConfig):
        about = each.metadata
        shown = "a new one each time" if each.default is None else each.default
        names = [f"--{each.name.replace('_', '-')}", *filter(None, [about["flag"]])]
        parser.add_argument(
            *names,
            type=_TYPES[str(each.type)],
            metavar=about["metavar"],
            help=f"{about['help']} (default: {shown})",
        )


def asked_generation(options: argparse.Namespace) -> GenerationConfig:
    """The config that the flags ask for.

    Raises:
        RequestError: a value is out of range.
    """
    given = {each.name: getattr(options, each.name) for each in fields(GenerationConfig)}
    return GenerationConfig.merged(None, **given)
