"""An artifact's tokenizer, opened once for all stages of a verification.

Judging and opening ``tokenizer.json`` takes a fifth of a second of processor time at 50,000 entries
and most of a second at 150,000. The model that answers in the stage "greedy" opens its own, as a
user's does.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

from llava_edge.runtime.artifact.open import Artifact
from llava_edge.runtime.processing.text.tokenizer import Tokenizer
from llava_edge.runtime.util.opened_file import OpenedFile

_OPENED: WeakKeyDictionary[OpenedFile, dict[object, Tokenizer]] = WeakKeyDictionary()


def artifact_tokenizer(artifact: Artifact) -> Tokenizer:
    """The tokenizer of an artifact; the same one while its file is open and unchanged.

    Raises:
        ArtifactError: as ``Tokenizer.open``.
    """
    manifest = artifact.manifest
    file, tokens, prompt = artifact.files[manifest.tokenizer], manifest.tokens, manifest.prompt
    written = None if prompt is None else prompt.special_tokens
    known, key = _OPENED.setdefault(file, {}), (file.current_fingerprint(), tokens, written)
    if key not in known:
        known[key] = Tokenizer.open(file, tokens, prompt)
    return known[key]
