"""Whatever lies under the name of a checkpoint's file, opening ends soon and says what is wrong."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llava_edge.convert.checkpoint.config.original import to_hugging_face
from llava_edge.convert.checkpoint.layouts import hub_name
from llava_edge.convert.checkpoint.open import READ_BY_NAME, open_checkpoint
from llava_edge.profiles.errors import CheckpointError
from llava_edge.profiles.models.model_dims import ModelDims
from tests.support.saved_layouts import config, shapes, write

SECONDS = 20
INDEX = "model.safetensors.index.json"
SHARD = "model.safetensors"


@pytest.fixture(autouse=True)
def alarm() -> Iterator[None]:
    """A test that waits or computes for ever fails."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"still busy after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    names = {name: hub_name(name) for name in shapes("llava_next")}
    return write(tmp_path / "checkpoint", config("llava_next", "untied"), names)


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


STRANGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "is a named pipe"),
    "link to a device": (lambda path: path.symlink_to("/dev/zero"), "is a link to a device"),
    "folder": (lambda path: path.mkdir(), "is a folder"),
    "link to nothing": (
        lambda path: path.symlink_to("none"),
        "is a link to none, where there is nothing",
    ),
    "terabyte of holes": (sparse, "1.0 TiB"),
}


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("name", [*READ_BY_NAME, SHARD])
def test_a_file_that_is_none_is_named(folder: Path, name: str, kind: str) -> None:
    make, named = STRANGE[kind]
    (folder / name).unlink(missing_ok=True)
    make(folder / name)

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert name in str(caught.value)
    assert named in str(caught.value)


@pytest.mark.parametrize("kind", STRANGE)
def test_a_template_in_the_folder_of_templates_counts_as_one(folder: Path, kind: str) -> None:
    make, named = STRANGE[kind]
    (folder / "additional_chat_templates").mkdir()
    make(folder / "additional_chat_templates" / "tool.jinja")

    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(folder)


@pytest.mark.parametrize("kind", STRANGE)
def test_a_shard_that_is_no_file_is_named(folder: Path, kind: str) -> None:
    make, named = STRANGE[kind]
    (folder / SHARD).rename(folder / "model-00001-of-00002.safetensors")
    make(folder / "model-00002-of-00002.safetensors")
    files = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))

    with pytest.raises(CheckpointError, match="model-00002") as caught:
        open_checkpoint(folder)
    assert named in str(caught.value)


def test_all_files_that_are_none_are_named_together(folder: Path) -> None:
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert f"{name} is a named pipe" in str(caught.value)


def test_files_that_nothing_reads_may_be_anything(folder: Path) -> None:
    os.mkfifo(folder / "notes.txt")
    (folder / "trainer_state.json").symlink_to("/dev/zero")
    sparse(folder / "training.log")

    assert open_checkpoint(folder).layout == "hub"


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


MANY = list(range(100_000))
HUGE = int("9" * 4000)
VALUES: dict[str, Any] = {
    "10^9": 10**9,
    "2^63": 2**63,
    "digits": HUGE,
    "negative": -1,
    "zero": 0,
    "float": 32.0,
    "bool": True,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "text": "32",
    "long text": "3" * 100_000,
    "list": [32],
    "many": MANY,
    "object": {"a": 1},
    "deep": nested(90),
    "null": None,
}
PLACES = (
    ("text_config", "num_hidden_layers"),
    ("text_config", "hidden_size"),
    ("text_config", "num_attention_heads"),
    ("text_config", "num_key_value_heads"),
    ("text_config", "vocab_size"),
    ("text_config", "rope_theta"),
    ("text_config", "rope_scaling"),
    ("text_config", "sliding_window"),
    ("text_config", "model_type"),
    ("text_config", "hidden_act"),
    ("text_config", "tie_word_embeddings"),
    ("vision_config", "num_hidden_layers"),
    ("vision_config", "image_size"),
    ("vision_config", "patch_size"),
    ("vision_config", "model_type"),
    ("text_config",),
    ("vision_config",),
    ("image_grid_pinpoints",),
    ("vision_feature_layer",),
    ("vision_feature_select_strategy",),
    ("image_token_index",),
    ("model_type",),
    ("architectures",),
    ("tie_word_embeddings",),
    ("quantization_config",),
    ("projector_hidden_act",),
)


def message_of(call: Callable[[], object]) -> str:
    """How a request is refused; nothing where it is not, and anything but a refusal is raised."""
    try:
        call()
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_any_value_in_a_configuration_is_kept_or_refused_in_a_short_message(
    folder: Path, place: tuple[str, ...]
) -> None:
    for value in VALUES.values():
        document: Any = config("llava_next", "untied")
        level = document
        for key in place[:-1]:
            level = level[key]
        level[place[-1]] = value
        (folder / "config.json").write_text(json.dumps(document))

        message = message_of(lambda: open_checkpoint(folder))

        assert len(message) < 4_000
        assert message.replace("\n", "").isprintable()


ORIGINAL: dict[str, Any] = {
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "architectures": ["LlavaLlamaForCausalLM"],
    "image_aspect_ratio": "anyres",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_hidden_size": 1024,
    "vocab_size": 32000,
    "image_grid_pinpoints": [[336, 672]],
}


def dims_of(document: dict[str, Any]) -> ModelDims:
    return ModelDims.from_config(to_hugging_face(document))


@pytest.mark.parametrize("key", ORIGINAL)
def test_any_value_in_an_original_configuration_is_kept_or_refused_in_a_short_message(
    key: str,
) -> None:
    for value in (*VALUES.values(), f"[(0x{'f' * 9000}, 336)]", "[(9**9**9, 336)]"):
        document = {**ORIGINAL, key: value}

        message = message_of(partial(dims_of, document))

        assert len(message) < 4_000
        assert message.replace("\n", "").isprintable()


def text_of(document: dict[str, Any], found: str, replaced: str) -> str:
    return json.dumps(document).replace(found, replaced)


TEXTS: dict[str, tuple[str, str]] = {
    "number of 10,000 digits": ('"hidden_size": 32', f'"hidden_size": {"9" * 10_000}'),
    "depth of 100,000": ('"projector_hidden_act": "gelu"', f'"x": {"[" * 100_000}'),
    "depth of 900": ('"projector_hidden_act": "gelu"', f'"x": {"[" * 900}{"]" * 900}'),
    "half a character": ('"model_type": "llava_next"', r'"model_type": "\ud800"'),
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_configuration_that_no_parser_likes_is_no_valid_json(folder: Path, text: str) -> None:
    document = config("llava_next", "untied")
    (folder / "config.json").write_text(text_of(document, *TEXTS[text]))

    with pytest.raises(CheckpointError, match=r"config\.json is no valid JSON"):
        open_checkpoint(folder)


INDEXES: dict[str, tuple[Any, str]] = {
    "too large": ({f"tensor.{i:07}": SHARD for i in range(500_000)}, "MiB; such files"),
    "many tensors": ({f"t{i}": SHARD for i in range(100_000)}, "names tensors that are not there"),
    "many files": ({f"t{i}": f"{i}.safetensors" for i in range(100_000)}, "at most 4096"),
    "names that a terminal obeys": (
        {"a\x1b[2J\nerror: none\u202e": SHARD},
        r"a\x1b[2J\nerror: none\u202e",
    ),
    "a file that a terminal obeys": ({"a": "\x1b[2J.safetensors"}, r"\x1b[2J.safetensors"),
    "a name with NUL": ({"a": "x\x00y.safetensors"}, r"x\x00y.safetensors"),
    "a name of a megabyte": ({"a" * 1_000_000: SHARD}, "…"),
    "a file of a megabyte": ({"a": "a" * 1_000_000 + ".safetensors"}, "…"),
    "files that are numbers": ({"a": 1}, "has no weight_map"),
}


@pytest.mark.parametrize("index", INDEXES)
def test_an_index_of_no_use_is_refused_in_a_short_message(folder: Path, index: str) -> None:
    mapping, named = INDEXES[index]
    (folder / SHARD).rename(folder / "weights.safetensors")
    listed = {k: "weights.safetensors" if v == SHARD else v for k, v in mapping.items()}
    (folder / INDEX).write_text(json.dumps({"weight_map": listed}))

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert named in str(caught.value)
    assert len(str(caught.value)) < 4_000
    assert str(caught.value).replace("\n", "").isprintable()


def test_reading_what_is_refused_takes_little_memory(folder: Path) -> None:
    sparse(folder / "tokenizer.json")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    with pytest.raises(CheckpointError, match=r"tokenizer\.json has 1\.0 TiB; such files"):
        open_checkpoint(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_a_hub_cache_of_links_to_blobs_opens(folder: Path, tmp_path: Path) -> None:
    storage = tmp_path / "models--me--mine"
    snapshot = storage / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (storage / "blobs").mkdir()
    for number, file in enumerate(folder.iterdir()):
        file.rename(storage / "blobs" / f"{number}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number}")

    assert open_checkpoint(snapshot).source_id == "me/mine"
