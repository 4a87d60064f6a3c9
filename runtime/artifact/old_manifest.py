"""What manifests of earlier schema versions looked like, and how they become today's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from llava_edge.runtime.artifact.manifest import Joint, PartKind, PromptFormat, Trim, Turn
from llava_edge.runtime.util.json_codec import from_json, to_json

_STRIPPED = Trim("any", "any")
_IN_PLACE: tuple[tuple[PartKind, ...], ...] = (("image", "video", "text"),)


@dataclass(frozen=True)
class _Turn2:
    before: str
    after: str


@dataclass(frozen=True)
class _PromptFormat2:
    """``PromptFormat`` up to schema version 2.

    ``text_separator`` stood between two text parts in a row, ``text_after`` after the last one and
    before a medium; texts of ``stripped_roles`` lost their outer white space.
    """

    source: Literal["template", "builtin"]
    family: str
    prefix: str
    default_system: str
    system: _Turn2 | None
    user: _Turn2
    user_after_system: str
    assistant: _Turn2
    generation_prompt: str
    text_separator: str
    text_after: str
    image: str
    video: str
    media_first: bool
    stripped_roles: tuple[str, ...]
    special_tokens: tuple[str, ...]

    def today(self) -> PromptFormat:
        """The same prompts in today's form."""

        def turn(role: str, old: _Turn2) -> Turn:
            trim = _STRIPPED if role in self.stripped_roles else Trim()
            return Turn(old.before, old.after, trim)

        joints: tuple[Joint, ...] = ()
        if self.text_separator != self.text_after:
            joints = (Joint("text", "text", self.text_separator),)
        made = PromptFormat(
            source=self.source,
            family=self.family,
            prefix=self.prefix,
            default_system=self.default_system,
            system=None if self.system is None else turn("system", self.system),
            user=turn("user", self.user),
            user_after_system=self.user_after_system,
            assistant=turn("assistant", self.assistant),
            generation_prompt=self.generation_prompt,
            image=self.image,
            video=self.video,
            special_tokens=self.special_tokens,
            text_after=self.text_after,
            joints=joints,
        )
        return made if self.media_first else replace(made, part_order=_IN_PLACE)


def with_prompt_of_2(document: Any) -> Any:
    """A manifest of schema version 1 or 2 with its prompt format in today's form.

    Raises:
        ArtifactError: the prompt format is not of that version.
    """
    old = document.get("prompt") if isinstance(document, Mapping) else None
    if old is None:
        return document
    read = from_json(_PromptFormat2, old, "manifest.json.prompt")
    return {**document, "prompt": to_json(read.today())}
