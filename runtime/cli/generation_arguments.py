"""Flags of ``GenerationConfig`` for commands, made from its fields."""

from __future__ import annotations

import argparse
from dataclasses import fields

from llava_edge.runtime.generation.generation_config import GenerationConfig

_TYPES = {"int": int, "float": float, "int | None": int}


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag for each field, ``--max-new-tokens`` and so on."""
    for each in fields(GenerationConfig):
        about = each.metadata
        default = "" if each.default is None else f" (default: {each.default})"
        names = [f"--{each.name.replace('_', '-')}", *filter(None, [about["flag"]])]
        parser.add_argument(
            *names,
            type=_TYPES[str(each.type)],
            metavar=about["metavar"],
            help=about["help"] + default,
        )


def asked_generation(options: argparse.Namespace) -> GenerationConfig:
    """The config that the flags ask for.

    Raises:
        RequestError: a value is out of range.
    """
    given = {each.name: getattr(options, each.name) for each in fields(GenerationConfig)}
    return GenerationConfig.merged(None, **given)
