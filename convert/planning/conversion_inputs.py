"""Inputs of a conversion beside its checkpoint: calibration by contents, libraries, processor."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from llava_edge.convert.checkpoint.files import file_stamp, hash_contents
from llava_edge.convert.quantization.calibration.conversations import Conversation, find_files
from llava_edge.profiles.errors import RequestError, shorten
from llava_edge.runtime.util.versions import tool_versions
from llava_edge.runtime.verification.host import describe_host

_LIBRARIES = (
    "jinja2",
    "llava-edge",
    "ml_dtypes",
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "pillow",
    "safetensors",
    "sentencepiece",
    "tokenizers",
    "torch",
    "transformers",
)


class CalibrationFiles:
    """A calibration set by its contents: its lists whole, and the images that were chosen.

    Which ones are chosen follows from the lists, the seed and the sizes of images, so another
    choice shows here as well. A public data set has a hundred gigabytes of others.

    Args:
        path: the folder or file that was asked for.
        chosen: conversations that will be used.

    Attributes:
        digest: SHA-256, in hex, over lists, names and bytes of images.
    """

    def __init__(self, path: Path, chosen: Iterable[Conversation]) -> None:
        _, lists = find_files(path)
        self._stamps = {file: file_stamp(file) for file in lists}
        # The folder's name stands in the artifact.
        whole = hashlib.sha256(path.name.encode("utf-8", "surrogateescape"))
        for file in lists:
            whole.update(_contents(file).encode())
        for conversation in chosen:
            whole.update(hashlib.sha256(conversation.name.encode("utf-8", "replace")).digest())
            for opened in conversation.images:
                image = opened()
                if isinstance(image, Path):
                    self._stamps[image] = file_stamp(image)
                    whole.update(_contents(image).encode())
        self.digest = whole.hexdigest()

    def check(self) -> None:
        """Make sure that lists and images are still the ones they were.

        Raises:
            RequestError: one was changed or removed.
        """
        changed = [path.name for path, stamp in self._stamps.items() if file_stamp(path) != stamp]
        if changed:
            raise RequestError(
                f"the calibration set changed while it was in use: {shorten(sorted(changed))}. Run "
                "the same command again once it is complete."
            )


def environment() -> dict[str, str]:
    """Libraries and processor: they decide the last bits of what is computed.

    The number of threads is not among them: solving goes on with the one that it began with.
    """
    host = describe_host("cpu")
    return {
        **tool_versions(_LIBRARIES),
        "processor": f"{host.machine}, {host.cpu}, {host.int8_isa}",
    }


def _contents(path: Path) -> str:
    """Digest of a file; nothing where it cannot be read, which leaves the sample out."""
    try:
        return hash_contents(path).sha256 if file_stamp(path) is not None else ""
    except OSError:
        return ""
