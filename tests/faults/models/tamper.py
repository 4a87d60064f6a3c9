"""Tampered: a copy of an artifact with one thing changed, sealed anew so that it opens.

Every digest, size and seal is right again afterwards: only verification can find the fault.

    copy = Tampered(artifact, tmp_path / "copy")
    copy.set_attributes("decoder", "language_model.norm", epsilon=1e-3)
    copy.change_tensor("decoder", "lm_head.weight", lambda codes: codes ^ 1)
    folder = copy.seal()
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import helper, numpy_helper

from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.util.checksummed_json import seal

Part = Literal["vision", "decoder", "decoder_int8_cache"]
Change = Callable[[Array], Array]

_TYPES = {1: "<f4", 2: "u1", 3: "i1", 7: "<i8", 10: "<f2"}
_SAFETENSORS = {"F16": "<f2", "BF16": "<u2", "F32": "<f4"}


class Tampered:
    """One copy. Methods change its files; ``seal`` makes it whole.

    Args:
        artifact: stays as it is.
        folder: where the copy goes; must not exist.
    """

    def __init__(self, artifact: Path, folder: Path) -> None:
        shutil.copytree(artifact, folder)
        self.folder = folder
        self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text("utf-8"))
        self._models: dict[str, Any] = {}

    def model(self, part: Part) -> Any:
        """The ONNX proto of a part, to be changed in place."""
        if part not in self._models:
            path = self.folder / self.manifest[part]["file"]
            self._models[part] = onnx.load(path, load_external_data=False)
        return self._models[part]

    def nodes(self, part: Part, op_type: str) -> list[Any]:
        """All nodes of a type, in the file's order."""
        return [node for node in self.model(part).graph.node if node.op_type == op_type]

    def node(self, part: Part, name: str) -> Any:
        """The node of this name."""
        (found,) = (node for node in self.model(part).graph.node if node.name == name)
        return found

    def set_attributes(self, part: Part, name: str, **values: Any) -> None:
        """Give a node attributes in place of those it has; None removes one."""
        node = self.node(part, name)
        kept = [entry for entry in node.attribute if entry.name not in values]
        new = [helper.make_attribute(k, v) for k, v in values.items() if v is not None]
        del node.attribute[:]
        node.attribute.extend([*kept, *new])

    def rewire(self, part: Part, name: str, place: int, value: str) -> None:
        """Let a node read another value; behind its last input, empty ones fill the gap."""
        node = self.node(part, name)
        while len(node.input) <= place:
            node.input.append("")
        node.input[place] = value

    def swap_inputs(self, part: Part, first: tuple[str, int], second: tuple[str, int]) -> None:
        """Exchange what two (node, place) read."""
        one, other = (self.node(part, name) for name, _ in (first, second))
        a, b = one.input[first[1]], other.input[second[1]]
        one.input[first[1]], other.input[second[1]] = b, a

    def bypass(self, part: Part, name: str, place: int = 0) -> None:
        """Remove a node: who read its first output reads its input ``place``."""
        graph = self.model(part).graph
        node = self.node(part, name)
        old, new = node.output[0], node.input[place]
        graph.node.remove(node)
        for other in graph.node:
            if old in (value.name for value in graph.output) and new in other.output:
                # The graph's own output keeps its name.
                other.output[list(other.output).index(new)] = old
            for index, value in enumerate(other.input):
                if value == old:
                    other.input[index] = new

    def set_constant(self, part: Part, name: str, place: int, array: Array) -> None:
        """Let one node read a new small constant."""
        graph = self.model(part).graph
        fresh = f"changed_{len(graph.initializer)}"
        graph.initializer.append(numpy_helper.from_array(array, fresh))
        self.rewire(part, name, place, fresh)

    def tensor(self, part: Part, name: str) -> Array:
        """A copy of an initializer in its stored type; 4-bit types as packed bytes."""
        file, start, dtype, shape = self._place(part, name)
        if file is None:
            return np.frombuffer(self._proto(part, name).raw_data, dtype).reshape(shape).copy()
        count = int(np.prod(shape))
        return np.fromfile(file, dtype, count, offset=start).reshape(shape)

    def change_tensor(self, part: Part, name: str, change: Change) -> None:
        """Replace an initializer's values by ``change`` of them; the size stays."""
        file, start, dtype, shape = self._place(part, name)
        new = np.ascontiguousarray(change(self.tensor(part, name)), dtype).reshape(shape)
        if file is None:
            self._proto(part, name).raw_data = new.tobytes()
            return
        with open(file, "r+b") as stream:
            stream.seek(start)
            stream.write(new.tobytes())

    def swap_tensors(self, part: Part, first: str, second: str) -> None:
        """Exchange the values of two initializers of one shape."""
        one, other = self.tensor(part, first), self.tensor(part, second)
        self.change_tensor(part, first, lambda _: other)
        self.change_tensor(part, second, lambda _: one)

    def change_embeddings(self, name: str, change: Change) -> None:
        """Replace a tensor of the embeddings file (``embed_tokens``, ``image_newline``)."""
        path = self.folder / self.manifest["embeddings"]
        with open(path, "r+b") as stream:
            length = int.from_bytes(stream.read(8), "little")
            entry = json.loads(stream.read(length))[name]
            start, end = entry["data_offsets"]
            dtype = _SAFETENSORS[entry["dtype"]]
            stream.seek(8 + length + start)
            values = np.frombuffer(stream.read(end - start), dtype).reshape(entry["shape"])
            stream.seek(8 + length + start)
            stream.write(np.ascontiguousarray(change(values.copy()), dtype).tobytes())

    def seal(self) -> Path:
        """Write what was changed, and digests and sizes of all files."""
        for part, model in self._models.items():
            onnx.save(model, self.folder / self.manifest[part]["file"])
        for name in self.manifest["files"]:
            data = (self.folder / name).read_bytes()
            self.manifest["files"][name] = {
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
        (self.folder / "manifest.json").write_bytes(seal(self.manifest))
        return self.folder

    def _proto(self, part: Part, name: str) -> Any:
        (found,) = (t for t in self.model(part).graph.initializer if t.name == name)
        return found

    def _place(self, part: Part, name: str) -> tuple[Path | None, int, str, tuple[int, ...]]:
        """File (None for inline), offset, type and shape of an initializer's bytes."""
        proto = self._proto(part, name)
        shape = tuple(proto.dims)
        if proto.data_location != onnx.TensorProto.EXTERNAL:
            return None, 0, _TYPES[proto.data_type], shape
        entries = {entry.key: entry.value for entry in proto.external_data}
        file = (self.folder / self.manifest[part]["file"]).parent / entries["location"]
        if proto.data_type not in _TYPES:
            return file, int(entries["offset"]), "u1", (int(entries["length"]),)
        return file, int(entries["offset"]), _TYPES[proto.data_type], shape
