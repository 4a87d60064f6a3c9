"""Fixtures of verification, for the tests of this folder."""

from tests.support.verification_fixtures import (
    make_form,
    models,
    opened,
    renderings_are_kept,
)

__all__ = ["make_form", "models", "opened", "renderings_are_kept"]
