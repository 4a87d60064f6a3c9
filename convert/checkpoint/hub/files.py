"""Hub files: which files of a repository make up its checkpoint."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llava_edge.convert.checkpoint.open import CONFIG_FILE, INDEX_FILE, SINGLE_FILE
from llava_edge.profiles.errors import HubError, shorten

_TEXT_SUFFIXES = (".json", ".jinja", ".model", ".txt")
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository; ``etag`` is the name of its blob in the cache."""

    name: str
    size: int
    etag: str | None


def needed_files(repo_id: str, siblings: Sequence[Any]) -> tuple[RemoteFile, ...]:
    """Choose weights and the texts that describe them.

    Args:
        repo_id: for messages.
        siblings: files as ``model_info`` lists them.

    Raises:
        HubError: the repository has no safetensors weights, or no configuration.
    """
    files = {
        str(sibling.rfilename): RemoteFile(
            str(sibling.rfilename),
            int(sibling.size or 0),
            str(sibling.lfs.sha256 if sibling.lfs else sibling.blob_id or "") or None,
        )
        for sibling in siblings
    }
    # Weights of other frameworks and exports lie in sub-folders; a checkpoint itself does not.
    top = [name for name in files if "/" not in name and "\\" not in name]
    weights = _weight_names(top)
    if not weights and any(name.startswith(("adapter_config.", "adapter_model.")) for name in top):
        raise HubError(
            f"{repo_id} is an adapter, not a model: it holds adapter_* files and no weights of its "
            "own. Fetch it, merge it into its base model (adapter_config.json names it; PEFT: "
            "PeftModel.from_pretrained(model, FOLDER).merge_and_unload()), save the whole and give "
            "that folder."
        )
    if not weights:
        pickles = [name for name in top if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        found = (
            f"only pickle files ({shorten(pickles)}), which are never read" if pickles else "none"
        )
        raise HubError(
            f"{repo_id} has no safetensors weights: found {found}. Give another repository or, "
            "with @revision, a revision that has them (many have one under refs/pr/)."
        )
    if CONFIG_FILE not in files:
        raise HubError(f"{repo_id} has no {CONFIG_FILE}, so it is no model of transformers.")
    texts = [
        name
        for name in top
        if name.endswith(_TEXT_SUFFIXES) and not name.endswith((".bin.index.json", "README.txt"))
    ]
    return tuple(files[name] for name in sorted({*weights, *texts}))


def _weight_names(names: Sequence[str]) -> list[str]:
    """The same preference as when a folder is opened, so that nothing is fetched in vain."""
    if SINGLE_FILE in names:
        return [SINGLE_FILE]
    shards = [name for name in names if _SHARD.fullmatch(name)]
    if INDEX_FILE in names and shards:
        return shards
    return [
        name
        for name in names
        if name.endswith(".safetensors") and not name.startswith(("adapter_model", "consolidated"))
    ]
