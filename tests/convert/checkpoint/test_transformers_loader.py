"""Code of a checkpoint never runs: whatever its files name, and anyone who says yes."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import llava_edge.bench
import llava_edge.convert
from llava_edge.convert.checkpoint.config.image import check_image_class
from llava_edge.convert.checkpoint.transformers_loader import (
    load_model,
    load_processor,
    load_tokenizer,
    meta_model,
    reduced_config,
)
from llava_edge.convert.pipeline import convert_checkpoint
from llava_edge.convert.planning.request import ConvertRequest
from llava_edge.convert.testing.random_checkpoint import write_random_checkpoint
from llava_edge.convert.testing.random_spec import preset
from llava_edge.profiles.errors import CheckpointError
from llava_edge.runtime.util.progress import no_progress
from tests.support.checkpoint_layouts import as_original, renamed

LOADERS = {"transformers_loader.py", "reference_loader.py", "peer_judge.py"}
"""Modules that may call ``from_pretrained``; the last one runs without this project's packages."""

PAYLOAD = """
import os, pathlib
pathlib.Path(os.environ["LLAVA_EDGE_MARKER"]).write_text("ran")
def generate(*args, **kwargs): raise SystemExit("ran")
class Custom:
    def __init__(self, *args, **kwargs): pass
    @classmethod
    def from_pretrained(cls, *args, **kwargs): return cls()
    def register_for_auto_class(*args): pass
"""
AUTO_MAP = {
    "AutoConfig": "payload.Custom",
    "AutoModel": "payload.Custom",
    "AutoModelForCausalLM": "payload.Custom",
    "AutoModelForImageTextToText": "payload.Custom",
    "AutoTokenizer": ["payload.Custom", "payload.Custom"],
    "AutoProcessor": "payload.Custom",
    "AutoImageProcessor": "payload.Custom",
    "AutoVideoProcessor": "payload.Custom",
}
ELSEWHERE = {key: "owner/repo--payload.Custom" for key in AUTO_MAP} | {
    "AutoTokenizer": ["owner/repo--payload.Custom", None]
}


def arm(folder: Path, auto_map: dict[str, Any]) -> None:
    """Name the payload in every file that transformers reads."""
    (folder / "payload.py").write_text(PAYLOAD)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(PAYLOAD)
    for name in ("setup.py", "tokenization_payload.py", "modeling.py", "__init__.py"):
        (folder / name).write_text(PAYLOAD)
    for name in (
        "config.json",
        "tokenizer_config.json",
        "processor_config.json",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "chat_template.json",
    ):
        path = folder / name
        if name in ("preprocessor_config.json", "chat_template.json") and not path.is_file():
            continue
        values = json.loads(path.read_text()) if path.is_file() else {}
        values["auto_map"] = auto_map
        values |= {"_attn_implementation": "owner/kernel", "attn_implementation": "owner/kernel"}
        values |= {"trust_remote_code": True, "custom_generate": str(folder)}
        values |= {"tokenizer_file": "/etc/passwd", "_name_or_path": "owner/repo"}
        for part in ("text_config", "vision_config", "image_processor"):
            if isinstance(values.get(part), dict):
                values[part] |= {"auto_map": auto_map, "_attn_implementation": "owner/kernel"}
                values[part]["num_labels"] = 10**9
        path.write_text(json.dumps(values))
    adapter = {"base_model_name_or_path": "owner/repo", "auto_mapping": auto_map}
    (folder / "audio_tokenizer_config.json").write_text(json.dumps(adapter))
    (folder / "training_args.bin").write_bytes(b"cos\nsystem\n(S'touch marker'\ntR.")


IN_MEMORY = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("image_newline", "model.image_newline"),
)
KINDS: dict[str, tuple[str, Callable[[Path, Path], Path]]] = {
    "hub": ("llava_next", lambda source, target: source),
    "in memory": ("llava_next", lambda source, target: renamed(source, target, IN_MEMORY)),
    "original": ("llava_next", as_original),
    "1.5": ("llava", lambda source, target: source),
    "video": ("llava_next_video", lambda source, target: source),
}


def write(folder: Path, kind: str) -> Path:
    model_type, change = KINDS[kind]
    spec = preset("odd", model_type=model_type, image_size=56)
    write_random_checkpoint(folder / "source", spec, seed=4)
    return change(folder / "source", folder / "model")


CHILD = """
import sys
from llava_edge.runtime.cli.main import main
folder, out = sys.argv[1:]
code = main(["convert", folder, out, "--profile", "cpu-16gb", "--precision", "fp16",
             "--context", "1024", "--verify", "quick"])
print("convert", code)
if code == 0:
    print("verify", main(["verify", out, "--against", folder]))
print("left", len(sys.stdin.read()))
"""


def run_child(code: str, *arguments: str, marker: Path) -> str:
    environment = {**os.environ, "LLAVA_EDGE_MARKER": str(marker), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        input="y\n" * 50,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    return done.stdout + done.stderr


LOAD_ALL = """
import sys
from pathlib import Path
from llava_edge.convert.checkpoint.open import open_checkpoint
from llava_edge.convert.checkpoint.transformers_loader import load_model, load_processor
from llava_edge.convert.checkpoint.transformers_loader import load_tokenizer
from llava_edge.convert.checkpoint.transformers_loader import meta_model
from llava_edge.convert.verification.reference.processor import ReferenceProcessor
for folder in map(Path, sys.argv[1:]):
    checkpoint = open_checkpoint(folder)
    found = [load_tokenizer(folder), meta_model(checkpoint.config)]
    if checkpoint.layout != "original":
        found += [load_processor(folder), load_model(folder)]
    points = checkpoint.dims.image_grid_pinpoints
    found.append(ReferenceProcessor(checkpoint, points, 5).tokenizer)
    print(*(type(each).__name__ for each in found))
print("left", len(sys.stdin.read()))
"""


def test_no_loader_runs_what_the_files_name_or_asks_for_leave(tmp_path: Path) -> None:
    folders = []
    for kind in KINDS:
        folders.append(write(tmp_path / kind, kind))
        arm(folders[-1], AUTO_MAP)
        if kind in ("hub", "original"):
            folders.append(tmp_path / f"{kind} elsewhere")
            write(tmp_path / "again" / kind, kind).rename(folders[-1])
            arm(folders[-1], ELSEWHERE)
    marker = tmp_path / "marker"

    said = run_child(LOAD_ALL, *map(str, folders), marker=marker)

    assert not marker.exists()
    assert said.count("TransformersTokenizer") == len(folders), said
    assert "left 100" in said, said
    assert "Custom" not in said, said


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_conversion_and_verification_run_no_code_of_the_checkpoint(
    kind: str, tmp_path: Path
) -> None:
    folder = write(tmp_path, kind)
    arm(folder, AUTO_MAP)
    marker = tmp_path / "marker"

    said = run_child(CHILD, str(folder), str(tmp_path / "out"), marker=marker)

    assert not marker.exists()
    assert "convert 0" in said, said
    assert "verify 0" in said, said
    assert "left 100" in said, said


def test_an_armed_folder_without_a_known_class_is_refused_with_the_next_step(
    tmp_path: Path,
) -> None:
    folder = write(tmp_path, "hub")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({"tokenizer_class": "Custom", "auto_map": AUTO_MAP}))
    with pytest.raises(CheckpointError, match=r"'Custom'; known are .*name it as tokenizer_class"):
        load_tokenizer(folder)
    path.write_text(json.dumps({"auto_map": AUTO_MAP}))
    with pytest.raises(CheckpointError, match="'Custom'; known are"):
        load_processor(folder)
    path.write_text(json.dumps({"tokenizer_class": "AutoModel"}))
    with pytest.raises(CheckpointError, match="'AutoModel'; known are"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"image_processor_type": "Custom"},
        {"auto_map": {"AutoImageProcessor": "payload.Custom"}},
        {"auto_map": {"AutoImageProcessor": ["owner/repo--payload.Custom", None]}},
    ],
)
def test_an_image_processor_of_the_checkpoints_own_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"image processor is of the class .*Custom"):
        check_image_class(settings)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "custom"}, "model_type 'custom'"),
        ({"model_type": ["llava"]}, "model_type"),
        ({"text_config": {"model_type": "custom"}}, "text_config.model_type 'custom'"),
        ({"vision_config": {"model_type": "timm"}}, "vision_config.model_type 'timm'"),
    ],
)
def test_only_models_of_a_list_are_the_reference(change: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        meta_model({"model_type": "llava_next", **change})


def test_configurations_keep_the_fields_of_their_classes_alone() -> None:
    config = {
        "model_type": "llava_next",
        "auto_map": AUTO_MAP,
        "image_token_index": 7,
        "attn_implementation": "owner/kernel",
        "quantization_config": {"quant_method": "custom"},
        "num_labels": 10**12,
        "text_config": {
            "model_type": "mistral",
            "rope_theta": 5.0,
            "sliding_window": 4,
            "_attn_implementation": "owner/kernel",
            "id2label": {"0": "x"},
            "dtype": "__import__('os')",
        },
    }

    assert reduced_config(config) == {
        "model_type": "llava_next",
        "image_token_index": 7,
        "text_config": {"model_type": "mistral", "rope_theta": 5.0, "sliding_window": 4},
    }


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    folder = write(tmp_path, "hub")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot read the model"):
        load_model(folder)


def test_settings_of_another_type_are_refused_by_name(tmp_path: Path) -> None:
    folder = write(tmp_path, "hub")
    path = folder / "tokenizer_config.json"
    sound = json.loads(path.read_text())
    for key, value in {
        "legacy": "yes",
        "bos_token": ["<s>"],
        "pad_token": {"content": "<pad>", "special": 1},
        "eos_token": {"content": "</s>", "payload": True},
        "added_tokens_decoder": {"99999999": {"content": "x"}},
        "extra_special_tokens": [{"content": ""}],
        "model_max_length": -1,
        "padding_side": "up",
    }.items():
        path.write_text(json.dumps({**sound, key: value}))
        with pytest.raises(CheckpointError, match=f"malformed: {key} is"):
            load_tokenizer(folder)


def calls(tree: ast.AST) -> Iterator[ast.Attribute]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("from_pretrained", "pipeline"):
            yield node


@pytest.mark.parametrize("package", [llava_edge.bench, llava_edge.convert])
def test_only_the_loaders_call_from_pretrained_and_never_with_code_of_others(package: Any) -> None:
    seen = 0
    for file in sorted(Path(next(iter(package.__path__))).rglob("*.py")):
        source = file.read_text("utf-8")
        found = list(calls(ast.parse(source)))
        if file.name not in LOADERS:
            assert not found, f"{file}:{found[0].lineno} loads past the loader"
            assert "trust_remote_code" not in source, file
            continue
        seen += len(found)
        for node in ast.walk(ast.parse(source)):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "from_pretrained"
            ):
                starred = [
                    key.value.id
                    for key in node.keywords
                    if key.arg is None and isinstance(key.value, ast.Name)
                ]
                assert starred[-1:] == ["SAFE"], f"{file}:{node.lineno}"
        assert '"trust_remote_code": False, "local_files_only": True' in source
    assert seen


def test_scripts_of_other_environments_load_with_the_same_arguments() -> None:
    folder = Path(__file__).parents[2] / "interop"
    seen = 0
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if node.func.attr != "from_pretrained":
                    continue
                seen += 1
                given = {key.arg: ast.unparse(key.value) for key in node.keywords if key.arg}
                starred = [ast.unparse(key.value) for key in node.keywords if key.arg is None]
                assert "SAFE" in starred or given.get("trust_remote_code") == "False", file
    assert seen


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("use_cache", "no", "use_cache"),
        ("initializer_range", None, "initializer_range"),
        ("rope_theta", None, "NoneType"),
    ],
)
def test_a_value_that_transformers_refuses_is_named_before_anything_is_written(
    make_checkpoint: Callable[..., Path], tmp_path: Path, key: str, value: Any, said: str
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(make_checkpoint("odd", backbone="mistral", layers=2), folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    request = ConvertRequest(checkpoint=str(folder), out=tmp_path / "out")

    with pytest.raises(CheckpointError, match=rf"transformers refuses config\.json.*{said}"):
        convert_checkpoint(request, no_progress, lambda _: None)

    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_chat_template_file_without_a_template_is_none(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(make_checkpoint("odd", backbone="mistral", layers=2), folder)
    before = load_processor(folder).chat_template
    (folder / "chat_template.json").write_text("{}")

    assert load_processor(folder).chat_template == before
