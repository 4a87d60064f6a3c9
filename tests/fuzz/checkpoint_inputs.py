"""Hostile checkpoints: copies of sound ones with a file damaged, replaced or added.

Nothing seals a checkpoint, so every change reaches the code that reads it.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.artifact_inputs import (
    TOKENIZERS,
    damage_document,
    damage_tensors,
    damage_text,
    put_in_place,
    replace,
)
from tests.fuzz.mutate import INTERESTING, mutated
from tests.support.checkpoint_layouts import as_original

MARKER = "the-code-of-a-checkpoint-ran"
"""Name of the file that code inside a checkpoint would leave in the folder beside it."""

DAMAGES = ("config", "index", "header", "words", "template", "processor", "files", "code")

_CONFIGS = ("config.json", "generation_config.json")
_PROCESSORS = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
_WORDS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
)


def sound_checkpoints(folder: Path) -> Mapping[str, Path]:
    """Checkpoints of some hundred kilobytes by name, in three layouts; made unless they are there.

    Args:
        folder: to write into.
    """
    from llava_edge.convert.testing.random_checkpoint import write_random_checkpoint
    from llava_edge.convert.testing.random_spec import preset

    spec = preset("odd", backbone="mistral", image_size=56)
    found = {name: folder / name for name in ("hub", "sharded", "original")}
    if not found["hub"].is_dir():
        write_random_checkpoint(found["hub"], spec, seed=1)
    if not found["sharded"].is_dir():
        write_random_checkpoint(found["sharded"], spec, seed=1, max_shard_bytes=200_000)
    if not found["original"].is_dir():
        making = folder / "original.partial"
        shutil.rmtree(making, ignore_errors=True)
        as_original(found["hub"], making)
        making.rename(found["original"])
    return found


def damaged_checkpoint(random: Random, sound: Path, out: Path, damage: str) -> str:
    """Write a damaged copy of a checkpoint.

    Args:
        random: decides.
        sound: one of ``sound_checkpoints``.
        out: folder to write, new.
        damage: one of ``DAMAGES``.

    Returns:
        What was done.
    """
    shutil.copytree(sound, out, copy_function=os.link)
    return _DAMAGE[damage](random, out)


def _document(random: Random, path: Path) -> str:
    """A JSON file: its values, its text, or its bytes."""
    data = path.read_bytes() if path.exists() else b"{}\n"
    act = random.randrange(10)
    if act == 0:
        data, said = damage_text(random, data), "text"
    elif act == 1:
        data, said = mutated(random, data, [data]), "bytes"
    else:
        document = json.loads(data)
        said = damage_document(random, document) if document else "empty"
        data = json.dumps(document).encode()
    replace(path, data)
    return f"{path.name}: {said}"


def _config(random: Random, folder: Path) -> str:
    if random.random() < 0.4:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        said = _set_size(random, config)
        replace(path, json.dumps(config).encode())
        return f"config.json: {said}"
    return _document(random, folder / random.choice((*_CONFIGS, "config.json")))


def _set_size(random: Random, config: dict[str, Any]) -> str:
    """A size of the model that no model has."""
    owner = config
    part = random.choice(("", "text_config", "vision_config"))
    if isinstance(config.get(part), dict):
        owner = config[part]
    numbers = [key for key, value in owner.items() if isinstance(value, (int, float))]
    key = random.choice(numbers or ["hidden_size"])
    strange = (
        *INTERESTING,
        -1,
        10**9,
        10**18,
        10**4000,
        0.5,
        1e308,
        float("nan"),
        "7",
        None,
        [],
        {},
    )
    owner[key] = random.choice(strange)
    if random.random() < 0.2:
        config["image_grid_pinpoints"] = random.choice(
            (
                [[336, 672]] * 200_000,
                [[0, 0]],
                [[10**9, 10**9]],
                [[-336, 336]],
                [336],
                [[]],
                {},
                "x",
            )
        )
    return f"{part or 'top'}.{key} = {str(owner[key])[:40]}"


def _index(random: Random, folder: Path) -> str:
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        names = ["a", "b"] * random.choice((1, 50))
        document = {"weight_map": {name: "model.safetensors" for name in names}}
        replace(path, json.dumps(document).encode())
    if random.random() < 0.3:
        document = json.loads(path.read_text())
        target = random.choice(
            ("../x.safetensors", "/etc/passwd", "model.bin", "config.json", "", ".", "a" * 5000)
        )
        name = random.choice(sorted(document["weight_map"]))
        document["weight_map"][name] = target
        replace(path, json.dumps(document).encode())
        return f"index: {name} in {target[:40]!r}"
    return _document(random, path)


def _header(random: Random, folder: Path) -> str:
    path = random.choice(sorted(folder.glob("*.safetensors")))
    if random.random() < 0.6:
        return damage_tensors(random, path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    document, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    name = random.choice([name for name in document if name != "__metadata__"])
    key = random.choice(("shape", "data_offsets", "dtype"))
    document[name][key] = random.choice(
        (
            [10**4000, 10**4000],
            [2**63] * 5000,
            [0] * 100_000,
            [-1, -1],
            [2**64, 0],
            [0, 2**62],
            [1e308, 1],
            [True, False],
            "F16",
            "I8",
            "BOOL",
            "F8_E4M3",
            None,
            {},
        )
    )
    header = json.dumps(document).encode()
    replace(path, struct.pack("<Q", len(header)) + header + body)
    return f"{path.name}: {name}.{key}"


def _words(random: Random, folder: Path) -> str:
    """Files of the tokenizer."""
    if random.random() < 0.4:
        path = folder / "tokenizer.json"
        document = json.loads(path.read_text("utf-8"))
        said, change = random.choice(TOKENIZERS)
        change(document)
        replace(path, json.dumps(document).encode())
        return f"tokenizer.json: {said}"
    name = random.choice(_WORDS)
    path = folder / name
    if name == "tokenizer.model":
        replace(folder / "tokenizer.model", _sentencepiece(random))
        if random.random() < 0.7:
            (folder / "tokenizer.json").unlink()
        return "tokenizer.model"
    return _document(random, path)


def _sentencepiece(random: Random) -> bytes:
    """Something like a sentencepiece model: protobuf fields of any length and kind."""
    pieces = []
    for number in range(random.choice((1, 50, 3000))):
        text = random.choice(
            (b"<unk>", b"<s>", b"\xe2\x96\x81a", b"<0x41>", b"%d" % number, b"\xff")
        )
        score = struct.pack("<f", random.choice((0.0, -1.0, float("nan"), float("inf"))))
        kind = random.choice((1, 2, 3, 4, 6, 99))
        piece = b"\x0a" + bytes([len(text)]) + text + b"\x15" + score + b"\x18" + bytes([kind])
        pieces.append(b"\x0a" + bytes([len(piece)]) + piece)
    data = b"".join(pieces)
    return mutated(random, data, [data]) if random.random() < 0.7 else data


_TEMPLATES = (
    "{{ 'a' * 9000000000 }}",
    "{% for i in range(10**9) %}{% for j in range(10**9) %}x{% endfor %}{% endfor %}",
    "{% if strftime_now('%Y') != '1970' %}"
    "{% for i in range(99999999) %}{{ i }}{% endfor %}{% endif %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}{{ raise_exception.__globals__ }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ '%999999999d' % 1 }}",
    "{{ 'x'|center(999999999) }}",
    "{{ messages|tojson(indent=99999999) }}",
    "{% set ns = namespace(t='a') %}"
    "{% for i in range(60) %}{% set ns.t = ns.t + ns.t %}{% endfor %}{{ ns.t }}",
    "{{ (1,) * 999999999 }}",
    "{{ 9 ** 9 ** 9 ** 9 }}",
    "{{ '\\ud800' }}{{ messages[0]['content'] }}",
    "{% include 'x' %}{% import 'os' as os %}",
    "{{ messages",
    "",
    "{% raw %}" * 5000,
    "(" * 20_000,
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "{{ lipsum(n=10**7) }}{{ cycler.__init__.__globals__ }}",
    "{% for m in messages %}{{ loop(messages) }}{% endfor %}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{% for m in messages %}{{ m['role'] }}{{ loop.index }}{{ m['content'] }}{% endfor %}",
)


def _template(random: Random, folder: Path) -> str:
    target = random.choice(("chat_template.json", "chat_template.jinja", "tokenizer_config.json"))
    stored = _stored_template(folder)
    if random.random() < 0.6:
        number = random.randrange(len(_TEMPLATES))
        source, said = _TEMPLATES[number], f"number {number}"
        if random.random() < 0.3 and stored:
            at = random.randrange(len(stored))
            source = stored[:at] + source + stored[at:]
    else:
        data = stored.encode()
        source = mutated(random, data or b"{{ messages }}", [data or b"x"]).decode(
            "utf-8", "replace"
        )
        said = "bytes"
    for name in ("chat_template.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    if target.endswith(".jinja"):
        replace(folder / target, source.encode("utf-8", "replace"))
    else:
        path = folder / target
        document = json.loads(path.read_text()) if path.exists() else {}
        kinds: tuple[Any, ...] = (
            source,
            source,
            source,
            [{"name": "default", "template": source}],
            {"default": source},
            [source],
            {"template": {"template": source}},
        )
        document["chat_template"] = random.choice(kinds)
        replace(path, json.dumps(document).encode())
    return f"{target}: {said}"


def _stored_template(folder: Path) -> str:
    for name in ("chat_template.json", "tokenizer_config.json", "processor_config.json"):
        path = folder / name
        if path.exists():
            found = json.loads(path.read_text()).get("chat_template")
            if isinstance(found, str):
                return found
    path = folder / "chat_template.jinja"
    return path.read_text() if path.exists() else ""


def _processor(random: Random, folder: Path) -> str:
    present = [name for name in _PROCESSORS if (folder / name).exists()]
    path = folder / random.choice(present or ["preprocessor_config.json"])
    if path.exists() and random.random() < 0.5:
        document = json.loads(path.read_text())
        owner = document.get("image_processor", document)
        key = random.choice([*owner, "crop_size", "size", "image_mean", "resample"])
        values = (None, [], {}, [336, 336], 336, 0, -1, 1e308, "x", [None] * 3, [float("nan")] * 3)
        owner[key] = random.choice((*values, True, [0, 0, 0], [1] * 10**5, {"longest_edge": 7}))
        replace(path, json.dumps(document).encode())
        return f"{path.name}: {key} = {str(owner[key])[:40]}"
    return _document(random, path)


def _files(random: Random, folder: Path) -> str:
    """Files of other kinds, missing ones, huge ones, links out of the folder."""
    name = random.choice(sorted(path.name for path in folder.iterdir()))
    path, act = folder / name, random.randrange(7 + len(_TARGETS))
    path.unlink()
    if act < 7:
        put_in_place(path, act)
    else:
        os.mkfifo(folder / "pipe")
        path.symlink_to(_TARGETS[act - 7])
    return f"{name} by {act}"


_TARGETS = ("/dev/zero", "/proc/self/mem", "/dev/tty", "pipe")


def _code(random: Random, folder: Path) -> str:
    """Python beside the weights, and JSON files that name it."""
    payload = f"open({str(folder.parent / MARKER)!r}, 'w').close()\n"
    body = "class Payload:\n    def __init__(self, *a, **k): pass\n"
    for name in ("payload.py", "configuration_payload.py", "modeling_payload.py", "__init__.py"):
        (folder / name).write_text(payload + body)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text(payload + "def generate(*a, **k): pass\n")
    names = {
        "config.json": ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor"),
        "tokenizer_config.json": ("AutoTokenizer", "AutoProcessor"),
        "preprocessor_config.json": ("AutoImageProcessor", "AutoProcessor"),
        "processor_config.json": ("AutoProcessor", "AutoImageProcessor"),
        "generation_config.json": ("AutoConfig",),
    }
    touched = []
    for name, classes in names.items():
        if random.random() < 0.4:
            continue
        path = folder / name
        if not path.exists() and random.random() < 0.7:
            continue
        document = json.loads(path.read_text()) if path.exists() else {}
        reference = random.choice(
            ("payload.Payload", "own/repo--payload.Payload", ["payload.Payload", None])
        )
        document["auto_map"] = {each: reference for each in classes}
        if random.random() < 0.5:
            for key in ("tokenizer_class", "image_processor_type", "processor_class"):
                if key in document or random.random() < 0.2:
                    document[key] = random.choice(("Payload", "payload.Payload", "os.system"))
        if random.random() < 0.2 and name == "config.json":
            document["model_type"] = "payload"
            document["architectures"] = ["Payload"]
        for part in ("text_config", "vision_config"):
            if isinstance(document.get(part), dict) and random.random() < 0.4:
                document[part]["auto_map"] = document["auto_map"]
        replace(path, json.dumps(document).encode())
        touched.append(name)
    return f"code named by {', '.join(touched) or 'nothing'}"


_DAMAGE: dict[str, Callable[[Random, Path], str]] = {
    "config": _config,
    "index": _index,
    "header": _header,
    "words": _words,
    "template": _template,
    "processor": _processor,
    "files": _files,
    "code": _code,
}
