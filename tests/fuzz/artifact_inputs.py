"""Artifacts to fuzz with: copies of a sound one, damaged and, mostly, sealed again.

Anyone who can change a file can change its digest in the manifest and seal that; so most damage
here is made to pass the digests, and what reads the files must find it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from onnx import AttributeProto, ModelProto, TensorProto

from llava_edge.profiles.errors import LlavaEdgeError
from llava_edge.runtime.util.checksummed_json import seal
from tests.fuzz.mutate import INTERESTING, mutated

MANIFEST, CERTIFICATE = "manifest.json", "certificate.json"
DAMAGES = ("manifest", "certificate", "golden", "tokenizer", "embeddings", "graph", "folder")


def damaged_artifact(random: Random, sound: Path, out: Path, damage: str) -> str:
    """Write a damaged copy of an artifact.

    Args:
        random: decides.
        sound: a verified artifact.
        out: folder to write, new.
        damage: one of ``DAMAGES``.

    Returns:
        What was done.
    """
    shutil.copytree(sound, out, copy_function=os.link)
    return _DAMAGE[damage](random, out)


def replace(path: Path, data: bytes) -> None:
    """New contents for a file that may be a link to the sound one's."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def relist(folder: Path, *names: str) -> None:
    """Enter changed files into the manifest, seal it, and have the certificate speak for it."""
    document = json.loads((folder / MANIFEST).read_bytes())
    for name in names:
        data = (folder / name).read_bytes()
        document["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    replace(folder / MANIFEST, seal(document))
    certify(folder)


def certify(folder: Path) -> None:
    """A certificate that speaks for the manifest as it is."""
    document = json.loads((folder / CERTIFICATE).read_bytes())
    document["manifest_sha256"] = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    replace(folder / CERTIFICATE, seal(document))


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Ways to every value of a document."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path] * bool(path) + [
        place for key, item in items for place in _places(item, (*path, key))
    ]


def _strange(random: Random, old: Any) -> Any:
    """A value in place of another, of the same kind or of none."""
    numbers = (*INTERESTING, -1, -(2**31), 10**25, 0.5, -0.5, 1e308, 1e-320, 3, 5, 64, 100, 1000)
    texts = ("", "x", "../x", "/etc/passwd", "a/../../b", "\0", "\n", "a" * 70_000, "é", "<image>")
    act = random.randrange(6)
    if act < 3 and isinstance(old, (int, float)) and not isinstance(old, bool):
        return random.choice((*numbers, old + 1, old - 1, old * 2, old // 2, -old, float(old)))
    if act < 3 and isinstance(old, str):
        return random.choice((*texts, old + "x", old[:-1], old.upper(), old * 2))
    if act < 3 and isinstance(old, list):
        return random.choice(([], old[:-1], old + old[-1:], old[::-1], old * 50, [old]))
    return random.choice((None, True, False, [], {}, "", 0, 1, [[]], {"a": 1}, *numbers, *texts))


def damage_document(random: Random, document: Any) -> str:
    """One to three values, keys or places of a document."""
    said = []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        places = _places(document)
        place = random.choice(places)
        owner = document
        for key in place[:-1]:
            owner = owner[key]
        key, act = place[-1], random.randrange(8)
        said.append(f"{'.'.join(map(str, place))} by {act}")
        if act == 0:
            del owner[key]
        elif act == 1 and isinstance(owner, dict):
            owner[random.choice(("x", "", key + "x", "__class__", "a" * 300))] = owner[key]
        elif act == 2:
            other = document
            for step in random.choice(places):
                other = other[step] if isinstance(other, dict) or isinstance(step, int) else other
                if not isinstance(other, (dict, list)):
                    break
            owner[key] = copy.deepcopy(other)
        elif act == 3 and isinstance(owner[key], (int, float)):
            depth = random.choice((10, 400))
            deep: Any = owner[key]
            for _ in range(depth):
                deep = [deep]
            owner[key] = deep
        else:
            owner[key] = _strange(random, owner[key])
        if not _places(document):
            break
    return "; ".join(said)


def damage_text(random: Random, data: bytes) -> bytes:
    """JSON text beyond what a serialiser writes."""
    act = random.randrange(6)
    text = data.decode()
    if act == 0:
        depth = random.choice((100, 5000, 200_000))
        return random.choice(
            ("[" * depth, '{"a":' * depth, text[:-2] + ',"z":' + "[" * depth)
        ).encode()
    if act == 1:
        at = text.rfind(":", 0, random.randrange(1, len(text))) + 1
        value = random.choice(
            ("NaN", "-Infinity", "1e999", "9" * 4000, "-" * 9, '"\\ud800"', "0x9")
        )
        return (text[:at] + value + "," + text[at:]).encode()
    if act == 2:
        lines = text.splitlines(True)
        line = random.choice([line for line in lines if ":" in line] or lines or [text])
        return text.replace(line, line + line, 1).encode()
    if act == 3:
        return random.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b" " * (9 << 20))) + data
    return mutated(random, data, [data])


def _seal_text(data: bytes) -> bytes:
    """The digest of a text that says it is sealed, set right where the field is there."""
    from llava_edge.runtime.util.checksummed_json import _SEAL

    found = list(_SEAL.finditer(data))
    if len(found) != 1:
        return data
    blank = _SEAL.sub(b'"self_sha256": ""', data)
    return _SEAL.sub(b'"self_sha256": "%s"' % hashlib.sha256(blank).hexdigest().encode(), blank)


def _manifest(random: Random, folder: Path) -> str:
    data = (folder / MANIFEST).read_bytes()
    act = random.randrange(10)
    if act < 2:
        damaged = damage_text(random, data)
        replace(folder / MANIFEST, _seal_text(damaged) if act else damaged)
        said = "text"
    else:
        document = json.loads(data)
        said = damage_document(random, document)
        try:
            replace(folder / MANIFEST, seal(document))
        except LlavaEdgeError:
            replace(folder / MANIFEST, json.dumps(document).encode())
    if random.random() < 0.8:
        certify(folder)
    return f"manifest: {said}"


def _certificate(random: Random, folder: Path) -> str:
    data = (folder / CERTIFICATE).read_bytes()
    if random.random() < 0.3:
        damaged = damage_text(random, data)
        replace(folder / CERTIFICATE, _seal_text(damaged) if random.random() < 0.5 else damaged)
        return "certificate: text"
    document = json.loads(data)
    said = damage_document(random, document)
    try:
        replace(folder / CERTIFICATE, seal(document))
    except LlavaEdgeError:
        replace(folder / CERTIFICATE, json.dumps(document).encode())
    return f"certificate: {said}"


def damage_tensors(random: Random, path: Path) -> str:
    """A safetensors file: its header as a document or text, its length, its values."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    act, said = random.randrange(6), "bytes"
    if act < 3:
        document = json.loads(header)
        said = damage_document(random, document)
        header = json.dumps(document).encode()
    elif act == 3:
        header = damage_text(random, header)
    elif act == 4:
        bits = random.choice(
            (b"\x00\x7c", b"\xff\xff", b"\x00\x00\x80\x7f", b"\xff" * 8, b"\0" * 8)
        )
        start = random.randrange(len(body))
        body = body[:start] + bits * random.choice((1, 50, 5000)) + body[start:]
        body = body[: len(data) - 8 - length]
    else:
        body = mutated(random, body, [body])
    claimed = len(header) if random.random() < 0.8 else random.choice(INTERESTING)
    replace(path, struct.pack("<Q", claimed % (1 << 64)) + header + body)
    return f"{path.name}: {said}"


def _tensors_file(random: Random, folder: Path, name: str) -> str:
    said = damage_tensors(random, folder / name)
    relist(folder, name)
    return said


def _golden(random: Random, folder: Path) -> str:
    said = _tensors_file(random, folder, "golden.safetensors")
    # Other instructions on the certificate have the probes run.
    document = json.loads((folder / CERTIFICATE).read_bytes())
    document["host"]["int8_isa"] = "neon-dot"
    replace(folder / CERTIFICATE, seal(document))
    manifest = json.loads((folder / MANIFEST).read_bytes())
    manifest["precision"]["int8_route"] = "integer"
    replace(folder / MANIFEST, seal(manifest))
    certify(folder)
    return said


def _embeddings(random: Random, folder: Path) -> str:
    return _tensors_file(random, folder, "embeddings.safetensors")


def _tokenizer(random: Random, folder: Path) -> str:
    name = "tokenizer.json"
    data = (folder / name).read_bytes()
    act, said = random.randrange(8), "text"
    document = json.loads(data)
    if act < 3:
        said = damage_document(random, document)
        data = json.dumps(document).encode()
    elif act == 3:
        data = damage_text(random, data)
    elif act == 4:
        data = mutated(random, data, [data])
    else:
        said, change = random.choice(TOKENIZERS)
        change(document)
        data = json.dumps(document).encode()
    replace(folder / name, data)
    relist(folder, name)
    return f"{name}: {said}"


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


def _replacing(what: dict[str, str], content: str, times: int = 1) -> dict[str, Any]:
    return _sequence(*[{"type": "Replace", "pattern": what, "content": content}] * times)


def _set(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        document[key] = value

    return change


def _vocabulary(change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    return lambda document: change(document["model"])


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


TOKENIZERS: list[tuple[str, Callable[[dict[str, Any]], None]]] = [
    ("doubles 40 times", _set("normalizer", _replacing({"String": "e"}, "ee", 40))),
    ("grows by 100000", _set("normalizer", _replacing({"String": "e"}, "e" * 100_000, 3))),
    ("everything grows", _set("normalizer", _replacing({"Regex": ""}, "abc", 30))),
    (
        "prepends",
        _set("normalizer", _sequence(*[{"type": "Prepend", "prepend": "a" * 10**6}] * 300)),
    ),
    ("evil pattern", _set("pre_tokenizer", _split("(a+)+$|(e|e)*x|(.*)*y"))),
    ("evil replace", _set("normalizer", _replacing({"Regex": "(.*.*)*x"}, "y"))),
    ("no pattern", _set("pre_tokenizer", _split("(((("))),
    ("huge repetition", _set("pre_tokenizer", _split("(?:a{1,1000}){1,1000}"))),
    ("look behind", _set("pre_tokenizer", _split("(?<=a+)b|\\k<x>|\\g<0>"))),
    (
        "bad charsmap",
        _set("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"}),
    ),
    (
        "charsmap lies",
        _set("normalizer", {"type": "Precompiled", "precompiled_charsmap": "/////wAAAAA="}),
    ),
    ("nested", _set("normalizer", None)),
    ("no model", _set("model", {"type": "Unigram", "vocab": [], "unk_id": 7})),
    ("empty unigram", _set("model", {"type": "Unigram", "vocab": [["a", float(-1)]], "unk_id": 0})),
    (
        "word level",
        _set("model", {"type": "WordLevel", "vocab": {"a": 2**32 - 1}, "unk_token": "b"}),
    ),
    (
        "word piece",
        _set(
            "model",
            {
                "type": "WordPiece",
                "vocab": {"a": 0},
                "unk_token": "?",
                "continuing_subword_prefix": "#",
                "max_input_chars_per_word": 2**63,
            },
        ),
    ),
    ("no vocabulary", _vocabulary(lambda model: model.update(vocab={}, merges=[]))),
    ("high ids", _vocabulary(lambda model: model["vocab"].update({"zz": 2**32 - 1, "zy": 2**31}))),
    ("ids twice", _vocabulary(lambda model: model.update(vocab=dict.fromkeys(model["vocab"], 5)))),
    ("merges of nothing", _vocabulary(lambda model: model.update(merges=["a b", "q q"]))),
    (
        "truncation",
        _set(
            "truncation",
            {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 2**40},
        ),
    ),
    (
        "padding",
        _set(
            "padding",
            {
                "strategy": {"Fixed": 2**40},
                "direction": "Right",
                "pad_to_multiple_of": 0,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "x",
            },
        ),
    ),
    (
        "template",
        _set(
            "post_processor",
            {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "x", "type_id": 0}}] * 2000,
                "pair": [],
                "special_tokens": {"x": {"id": "x", "ids": [1] * 2000, "tokens": ["x"] * 2000}},
            },
        ),
    ),
    (
        "template without",
        _set(
            "post_processor",
            {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "y", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            },
        ),
    ),
    (
        "decoder grows",
        _set(
            "decoder",
            {
                "type": "Sequence",
                "decoders": [{"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 3000}]
                * 6,
            },
        ),
    ),
    (
        "decoder strips",
        _set("decoder", {"type": "Strip", "content": " ", "start": 2**62, "stop": 2**62}),
    ),
    ("no decoder", _set("decoder", None)),
    (
        "added tokens of nothing",
        lambda document: document["added_tokens"].append(
            {**document["added_tokens"][-1], "id": 2**32 - 1, "content": ""}
        ),
    ),
    (
        "added tokens everywhere",
        lambda document: document["added_tokens"].extend(
            {**document["added_tokens"][-1], "id": 9000 + i, "content": chr(97 + i)}
            for i in range(26)
        ),
    ),
    ("no added tokens", _set("added_tokens", [])),
]


def _graph(random: Random, folder: Path) -> str:
    name = random.choice(("vision/model.onnx", "decoder/model.onnx"))
    data = (folder / name).read_bytes()
    if random.random() < 0.3:
        said, data = "bytes", mutated(random, data, [data])
    else:
        model = ModelProto.FromString(data)
        said = "; ".join(_inside_graph(random, model) for _ in range(random.choice((1, 1, 1, 2))))
        data = model.SerializeToString()
    replace(folder / name, data)
    relist(folder, name)
    if random.random() < 0.4:
        _restate(folder, name, data)
    return f"{name}: {said}"


def _restate(folder: Path, name: str, data: bytes) -> None:
    """Have the manifest state the inputs and outputs that the graph now has."""
    from llava_edge.runtime.artifact.onnx_proto import parse_onnx_header

    try:
        header = parse_onnx_header(data, name)
    except LlavaEdgeError:
        return
    document = json.loads((folder / MANIFEST).read_bytes())
    spec = document[name.split("/")[0]]
    for what, values in (("inputs", header.inputs), ("outputs", header.outputs)):
        spec[what] = [
            {"name": v.name, "dtype": v.dtype or "", "shape": list(v.shape or ())} for v in values
        ]
    replace(folder / MANIFEST, seal(document))
    certify(folder)


def _inside_graph(random: Random, model: ModelProto) -> str:
    """A part of a graph: a node, an attribute, a tensor, an input."""
    graph = model.graph
    act = random.randrange(14)
    node = random.choice(graph.node)
    if act == 0:
        operators = (
            "If",
            "Loop",
            "Scan",
            "Conv",
            "Add",
            "Gather",
            "Reshape",
            "Expand",
            "MatMulNBits",
        )
        operators += (
            "Concat",
            "Slice",
            "TopK",
            "Split",
            "Softmax",
            "Identity",
            "Transpose",
            "Shape",
        )
        node.op_type = random.choice(operators)
    elif act == 1:
        node.domain = random.choice(("", "com.microsoft", "ai.onnx.ml", "evil", "ai.onnx.contrib"))
    elif act == 2 and node.input:
        names = [t.name for t in graph.initializer] + [o for n in graph.node for o in n.output]
        node.input[random.randrange(len(node.input))] = random.choice([*names, "", "nowhere"])
    elif act == 3 and node.attribute:
        _inside_attribute(random, random.choice(node.attribute))
    elif act == 4:
        node.attribute.add(name="axis", type=AttributeProto.INT, i=random.choice((-9, 9, 2**62)))
    elif act == 5:
        graph.node.remove(node)
    elif act == 6:
        graph.node.append(copy.deepcopy(node))
    elif act == 7 and node.output:
        node.output[0] = random.choice(random.choice(graph.node).output)
    elif act < 12 and graph.initializer:
        _inside_tensor(random, random.choice(graph.initializer))
    elif act == 12:
        value = random.choice([*graph.input, *graph.output])
        dims = value.type.tensor_type.shape.dim
        if dims:
            random.choice(dims).dim_value = random.choice((0, 1, -1, 7, 2**31, 2**62))
        else:
            value.type.tensor_type.elem_type = random.randrange(24)
    else:
        model.opset_import[0].version = random.choice((0, 1, 7, 13, 99, 2**31 - 1))
    return f"act {act} on {node.op_type}"


def _inside_attribute(random: Random, attribute: AttributeProto) -> None:
    act = random.randrange(4)
    number = random.choice((-1, 0, 1, 2, 3, 7, 1000, 2**31, 2**62, -(2**63)))
    if act == 0:
        attribute.i = number
    elif act == 1:
        attribute.f = random.choice((0.0, -1.0, float("nan"), float("inf"), 1e-40))
    elif act == 2:
        attribute.ints.extend([number] * random.choice((1, 5)))
    else:
        attribute.type = random.randrange(12)  # type: ignore[assignment]


def _inside_tensor(random: Random, tensor: TensorProto) -> None:
    act = random.randrange(6)
    entries = {entry.key: entry for entry in tensor.external_data}
    if act == 0 and tensor.dims:
        place = random.randrange(len(tensor.dims))
        tensor.dims[place] = random.choice((0, 1, 2, 2**31, 2**62, -1, tensor.dims[place] + 1))
    elif act == 1:
        dims = list(tensor.dims)
        del tensor.dims[:]
        tensor.dims.extend(random.choice((dims[::-1], [*dims, 1], [1, *dims], dims[:-1], [])))
    elif act == 2:
        tensor.data_type = random.randrange(24)
    elif act == 3 and entries:
        key = random.choice(sorted(entries))
        texts = (
            "0",
            "1",
            "-1",
            "99999999999999999999",
            "4096",
            "/etc/passwd",
            "../weights.bin",
            "",
        )
        entries[key].value = random.choice(
            (*texts, "*/_ORT_MEM_ADDR_/*", "weights.bin", "model.onnx")
        )
    elif act == 4:
        tensor.name = random.choice(("", "x", tensor.name + "x", "cos_cache", "a" * 70_000))
    elif tensor.raw_data:
        tensor.raw_data = mutated(random, tensor.raw_data, [tensor.raw_data])
    else:
        tensor.external_data.add(key=random.choice(("location", "checksum", "basepath")), value="x")


def _folder(random: Random, folder: Path) -> str:
    """The folder itself: files missing, added, of other kinds."""
    names = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file()]
    name, act = random.choice(names), random.randrange(16)
    path = folder / name
    moved = folder.with_name("moved")
    moved.mkdir()
    path.rename(moved / "one")
    if act < 8:
        put_in_place(path, act)
    elif act == 8:
        path.symlink_to(os.path.relpath(moved / "one", path.parent))
    elif act == 9:
        (moved / "two").symlink_to("one")
        path.symlink_to(moved / "two")
    elif act == 10:
        path.symlink_to(
            random.choice(("/dev/zero", "/dev/stdin", "/proc/self/mem", "/proc/1/maps"))
        )
    elif act == 11:
        path.symlink_to(random.choice((moved, "..", "/", moved / "missing", "\udcff\n", "x" * 255)))
    else:
        (moved / "one").rename(path)
        _leave_beside(random, path, act)
    return f"{name} by {act}"


def put_in_place(path: Path, act: int) -> None:
    """Something else than the file; 0 leaves nothing."""
    if act == 1:
        path.symlink_to("/etc/passwd")
    elif act == 2:
        os.mkfifo(path)
    elif act == 3:
        path.mkdir()
    elif act == 4:
        path.write_bytes(b"")
    elif act == 5:
        with path.open("wb") as file:
            file.truncate(1 << 40)
    elif act == 6:
        path.symlink_to(path)
    elif act == 7:
        deep = path.parent.joinpath(*["d"] * 60)
        deep.mkdir(parents=True)
        (deep / "x").write_bytes(b"x")


def _leave_beside(random: Random, path: Path, act: int) -> None:
    """What tools leave: to be ignored under a name with a dot, and refused under any other."""
    name = random.choice((".DS_Store", ".git", ".cache", ".", "..x", "Thumbs.db", ".\udcff"))
    beside = path.with_name(name if name != "." else ".hidden")
    if act == 12:
        beside.write_bytes(b"anything")
    elif act == 13:
        beside.mkdir()
        (beside / "x").symlink_to(path.parent)
    elif act == 14:
        os.mkfifo(beside)
    else:
        beside.symlink_to(path.parent)


def change_in_use(random: Random, folder: Path) -> str:
    """Change one file of an artifact that is loaded, as copying tools and people do."""
    names = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file()]
    name, act = random.choice(names), random.randrange(9)
    path = folder / name
    status, data = path.stat(), path.read_bytes()
    if act in (0, 1, 2):
        with path.open("r+b") as file:
            file.write(data if act == 2 else mutated(random, data, [data])[: len(data)])
        if act == 1:
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif act == 3:
        os.truncate(path, random.randrange(len(data)))
    elif act == 4:
        replace(path, mutated(random, data, [data]))
    elif act == 5:
        path.unlink()
    elif act == 6:
        path.touch()
    elif act == 7:
        os.link(path, path.with_name(".link"))
    else:
        path.parent.rename(path.parent.with_name(".old"))
    return f"{name} changed by {act}"


_DAMAGE: dict[str, Callable[[Random, Path], str]] = {
    "manifest": _manifest,
    "certificate": _certificate,
    "golden": _golden,
    "tokenizer": _tokenizer,
    "embeddings": _embeddings,
    "graph": _graph,
    "folder": _folder,
}
