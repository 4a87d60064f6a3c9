"""An interrupted conversion goes on with the inputs it began with, or makes its parts again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from llava_edge.convert.checkpoint.files import CheckpointFiles
from llava_edge.convert.output.artifact_writer import ArtifactWriter
from llava_edge.convert.pipeline import convert_checkpoint
from llava_edge.convert.planning import conversion_plan
from llava_edge.convert.planning.request import ConvertRequest
from llava_edge.convert.quantization.plan import QuantizationRequest
from llava_edge.convert.verification.conversion import Verification
from llava_edge.convert.writing.artifact_builder import PartBuilders
from llava_edge.profiles.errors import CheckpointError, RequestError
from llava_edge.profiles.plan_request import PlanRequest
from llava_edge.runtime.artifact.manifest_validation import MANIFEST, UNLISTED
from llava_edge.runtime.cli.main import main
from llava_edge.runtime.util.progress import no_progress
from tests.support.tiers import one_of_each, slow_but

Change = Callable[[Path], None]


@pytest.fixture
def folder(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint and a calibration set beside it."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(make_checkpoint("odd", backbone="mistral", layers=2), copy)
    samples = tmp_path / "samples"
    samples.mkdir()
    lines = [{"question": "What is it?", "answer": "A square.", "image": "a.png"}]
    lines += [{"question": f"Say {word}.", "answer": word} for word in ("red", "blue", "green")]
    values = ("<image>\nAnd this?", "A circle.", "<image>\nAnd that?", "A line.")
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    lines.append({"conversations": turns, "image": ["b.png", "c.png"]})
    (samples / "all.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (40, 60), "navy").save(samples / name)
    return copy


def request_of(
    folder: Path, out: Path, *, calibrates: bool = False, **changes: Any
) -> ConvertRequest:
    samples = QuantizationRequest("rtn", num_samples=2)
    if calibrates:
        samples = QuantizationRequest("gptq", folder.parent / "samples", num_samples=8)
    request = ConvertRequest(
        checkpoint=str(folder),
        out=out,
        wishes=PlanRequest(precision="int4" if calibrates else "fp16", context_tokens=640),
        quantization=samples,
        verify="none",
    )
    return replace(request, **changes)


def convert(request: ConvertRequest) -> list[str]:
    said: list[str] = []
    convert_checkpoint(request, no_progress, said.append)
    return said


def interrupt_after(part: str, request: ConvertRequest) -> None:
    """Convert until a part is finished."""
    build = ArtifactWriter.part

    def stopping(self: ArtifactWriter, name: str, how: Callable[[Path], Any]) -> Any:
        value = build(self, name, how)
        if name == part:
            raise KeyboardInterrupt
        return value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ArtifactWriter, "part", stopping)
        with pytest.raises(KeyboardInterrupt):
            convert(request)


def contents(out: Path) -> dict[str, bytes]:
    """The manifest and every file that it lists."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in UNLISTED - {MANIFEST}
    }


def edited(name: str, **values: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def one_word_more(folder: Path) -> None:
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    document["added_tokens"][-1]["single_word"] = True
    path.write_text(json.dumps(document))


def another_weight(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if name.endswith("q_proj.weight"))
    tensors[name] = tensors[name] + torch.tensor(0.5, dtype=tensors[name].dtype)
    save_file(tensors, path, {"format": "pt"})


def another_picture(folder: Path) -> None:
    Image.new("RGB", (40, 60), "gold").save(folder.parent / "samples" / "a.png")


def another_later_picture(folder: Path) -> None:
    Image.new("RGB", (40, 60), "gold").save(folder.parent / "samples" / "c.png")


def another_answer(folder: Path) -> None:
    path = folder.parent / "samples" / "all.jsonl"
    path.write_text(path.read_text().replace("green", "white"))


def another_later_answer(folder: Path) -> None:
    path = folder.parent / "samples" / "all.jsonl"
    path.write_text(path.read_text().replace("A line", "A cross"))


def another_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text("{{- 'Look closely. ' -}}" + path.read_text())


CHANGES: dict[str, tuple[Change, str]] = {
    "image processor": (edited("preprocessor_config.json", image_mean=[0.4, 0.5, 0.6]), "prepr"),
    "stop token": (edited("generation_config.json", eos_token_id=[2, 0]), "generation_config"),
    "tokenizer": (one_word_more, "tokenizer.json"),
    "template": (another_template, "chat_template.jinja"),
    "configuration": (edited("config.json", projector_hidden_act="gelu", note=1), "config.json"),
    "weights": (another_weight, "model.safetensors"),
    "picture": (another_picture, "calibration"),
    "answer": (another_answer, "calibration"),
    "picture of a later turn": (another_later_picture, "calibration"),
    "answer of a later turn": (another_later_answer, "calibration"),
}


@pytest.mark.parametrize("kind", one_of_each(lambda kind: CHANGES[kind][1], CHANGES))
def test_an_input_changed_after_an_interruption_gives_what_a_fresh_conversion_gives(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    change, named = CHANGES[kind]
    calibrates = named == "calibration"
    resumed = request_of(folder, tmp_path / "a", calibrates=calibrates)
    fresh = request_of(folder, tmp_path / "b", calibrates=calibrates)
    interrupt_after("decoder", resumed)
    change(folder)

    said = convert(resumed)

    (note,) = (line for line in said if "changed since the interrupted run" in line)
    assert named in note
    assert "Made again: decoder, embeddings, tokenizer, vision" in note
    convert(fresh)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("part", slow_but(["gptq"], ["vision", "gptq"]))
def test_pixel_values_changed_after_the_first_or_last_part_are_in_all_of_them(
    folder: Path, tmp_path: Path, part: str
) -> None:
    int4 = PlanRequest(precision="int4", context_tokens=640)
    resumed = request_of(folder, tmp_path / "a", emit_hf=True, wishes=int4)
    interrupt_after(part, resumed)
    CHANGES["image processor"][0](folder)

    convert(resumed)

    convert(request_of(folder, tmp_path / "b", emit_hf=True, wishes=int4))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.slow
def test_golden_prompts_are_made_again_with_another_tokenizer(folder: Path, tmp_path: Path) -> None:
    resumed = request_of(folder, tmp_path / "a", verify="quick")
    interrupt_after("golden", resumed)
    CHANGES["template"][0](folder)

    convert(resumed)

    convert(request_of(folder, tmp_path / "b", verify="quick"))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_unchanged_inputs_build_nothing_twice_wherever_the_checkpoint_lies(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of(folder, tmp_path / "a", calibrates=True)
    interrupt_after("decoder", request)
    shutil.copytree(folder, tmp_path / "moved" / "checkpoint")
    shutil.copytree(tmp_path / "samples", tmp_path / "moved" / "samples")
    (tmp_path / "moved" / "checkpoint" / "README.md").write_text("read by nobody")

    def never(*_: Any) -> None:
        raise AssertionError("a finished part is built again")

    for name in ("vision", "int8_vision", "embeddings", "tokenizer", "decoder"):
        monkeypatch.setattr(PartBuilders, name, never)

    said = convert(request_of(tmp_path / "moved" / "checkpoint", tmp_path / "a", calibrates=True))

    assert not any("changed" in line for line in said)


@pytest.mark.parametrize("name", slow_but(["torch"], ["torch", "tokenizers", "processor"]))
def test_another_library_or_processor_makes_parts_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    request = request_of(folder, tmp_path / "a")
    known = conversion_plan.environment()
    assert name in known
    interrupt_after("embeddings", request)
    monkeypatch.setattr(conversion_plan, "environment", lambda: {**known, name: "another"})

    said = convert(request)

    assert any(f"changed since the interrupted run: {name}." in line for line in said)


def test_a_checkpoint_of_another_name_is_another_request(folder: Path, tmp_path: Path) -> None:
    interrupt_after("embeddings", request_of(folder, tmp_path / "a"))
    shutil.copytree(folder, tmp_path / "other")

    with pytest.raises(RequestError, match=r'checkpoint was "checkpoint" and is now "other"'):
        convert(request_of(tmp_path / "other", tmp_path / "a"))


@pytest.mark.parametrize(
    "kind", slow_but(["weights"], ["image processor", "tokenizer", "weights", "picture"])
)
def test_an_input_that_changes_while_a_part_is_built_ends_in_an_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    build = PartBuilders.embeddings

    def changing(self: PartBuilders, place: Path) -> None:
        build(self, place)
        CHANGES[kind][0](folder)

    monkeypatch.setattr(PartBuilders, "embeddings", changing)
    named = {"image processor": "preprocessor_config", "picture": "a.png"}.get(kind, "model|token")

    calibrates = kind == "picture"
    request = request_of(folder, tmp_path / "a", calibrates=calibrates)
    with pytest.raises(RequestError, match=rf"changed while it was in use: .*({named})"):
        convert(request)

    monkeypatch.undo()
    assert not (tmp_path / "a").exists()
    convert(request)
    convert(request_of(folder, tmp_path / "b", calibrates=calibrates))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_file_that_appears_during_verification_leaves_no_certified_artifact(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certify = Verification.certify

    def changing(self: Any, *given: Any) -> Any:
        (folder / "special_tokens_map.json").write_text("{}")
        return certify(self, *given)

    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    monkeypatch.setattr(Verification, "certify", changing)

    with pytest.raises(CheckpointError, match=r"in use: special_tokens_map\.json"):
        convert(request_of(folder, tmp_path / "a"))

    assert not (tmp_path / "a").exists()


def test_notes_and_logs_beside_a_checkpoint_are_no_inputs(tmp_path: Path) -> None:
    for name in ("notes.txt", "merges.txt"):
        (tmp_path / name).write_text("a")
    files = CheckpointFiles(tmp_path)
    digests = files.digests([])
    (tmp_path / "notes.txt").write_text("more")
    (tmp_path / "convert.log.txt").write_text("vision: done")
    files.check()
    assert list(digests) == ["merges.txt"]

    (tmp_path / "merges.txt").write_text("more")
    with pytest.raises(CheckpointError, match=r"in use: merges\.txt\."):
        files.check()


@pytest.mark.parametrize("kind", ["tokenizer", "image processor", "template", "stop token"])
def test_verifying_against_other_settings_names_them(
    folder: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, named = CHANGES[kind]
    convert(request_of(folder, tmp_path / "a"))
    change(folder)

    assert main(["verify", str(tmp_path / "a"), "--against", str(folder)]) == 2

    message = capsys.readouterr().err
    assert "was made from other files" in message
    assert named in message


def test_what_is_left_out_of_a_calibration_set_is_reported_once(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder.parent / "samples" / "all.jsonl"
    shown = {"question": "What happens?", "answer": "Rain.", "video": "clip.mp4"}
    path.write_text(path.read_text() + "\n" + json.dumps(shown))

    said = convert(request_of(folder, tmp_path / "a", calibrates=True))

    told = [*said, *(record.getMessage() for record in caplog.records)]
    assert len([line for line in told if "all.jsonl:6 is left out" in line]) == 1
