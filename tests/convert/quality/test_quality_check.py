"""The user's questions: right answers before and after, on pages that the model was trained on."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_edge.bench.lab.pages.drawing.draw import FILE, write_questions
from llava_edge.bench.lab.pages.training.checkpoint import SHIPPED
from llava_edge.convert.planning import replanning
from llava_edge.convert.planning.conversion_plan import ConversionPlan
from llava_edge.convert.quality.check import quality_row
from llava_edge.convert.writing import artifact_parts
from llava_edge.convert.writing.artifact_builder import PartBuilders
from llava_edge.profiles.errors import RequestError
from llava_edge.runtime.artifact.certificate import Quality
from llava_edge.runtime.artifact.open import open_artifact
from llava_edge.runtime.cli.main import main
from llava_edge.runtime.model import LlavaEdge

COUNT = 8


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages") / "drawn"
    write_questions(folder, COUNT, 2)
    return folder / FILE


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def convert(out: Path, questions: Path, *options: str, precision: str = "int4") -> int:
    command = ["convert", str(SHIPPED), str(out), "--profile", "cpu-16gb", "--context", "1024"]
    command += ["--precision", precision, "--quantizer", "rtn", "--verify", "none"]
    return main([*command, "--vision-precision", "fp16", "--quality", str(questions), *options])


def quality_of(out: Path) -> Quality:
    certificate = open_artifact(out).certificate
    assert certificate is not None
    assert certificate.quality is not None
    return certificate.quality


def plant_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows of every quantised layer change places."""
    quantize = artifact_parts.quantize

    class Damaged:
        def __init__(self, source: Any) -> None:
            self._source = source

        def __getattr__(self, name: str) -> Any:
            return getattr(self._source, name)

        def linear(self, name: str) -> Any:
            weight = self._source.linear(name)
            return replace(weight, qweight=np.roll(weight.qweight, 1, axis=0))

    def damaging(*given: Any) -> Any:
        layers, facts = quantize(*given)
        return replace(layers, source=Damaged(layers.source)), facts

    monkeypatch.setattr(artifact_parts, "quantize", damaging)


def test_right_answers_before_and_after_stand_in_certificate_card_and_output(
    pages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    assert convert(out, pages, "--max-loss", "0.5", "--json") == 0

    found = quality_of(out)
    entries = [json.loads(line) for line in pages.read_text().splitlines()]
    with LlavaEdge.load(out) as model:
        said = [
            model.generate(entry["question"], images=[pages.parent / entry["image"]]).text
            for entry in entries
        ]
    right = sum(text == entry["answer"] for text, entry in zip(said, entries, strict=True))
    assert found.questions == COUNT
    assert found.questions_sha256 == hashlib.sha256(pages.read_bytes()).hexdigest()
    assert found.right_before == COUNT, "the model was trained on such pages"
    assert found.right_after == right
    assert (found.lost, found.gained) == (COUNT - right, 0)
    assert found.loss == (COUNT - right) / COUNT
    output = capsys.readouterr()
    assert json.loads(output.out.splitlines()[-1])["quality"]["right_after"] == right
    assert f"quality: fp16 answers {COUNT} of {COUNT} questions right" in output.err
    card = (out / "README.md").read_text()
    assert f"| right at fp16 | {COUNT} |" in card
    assert f"| right in this artifact (int4) | {right} |" in card
    assert "at most 50 % were allowed" in card
    assert not any("quality" in name for name in open_artifact(out).manifest.files)


def test_an_artifact_that_loses_more_right_answers_is_kept_aside(
    pages: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    plant_damage(monkeypatch)

    assert convert(out, pages, "--max-loss", "0.02") == 1

    assert not out.exists()
    report = json.loads((tmp_path / "out.failed" / "failure.json").read_text())
    assert report["quality"]["right_before"] == COUNT
    assert report["quality"]["loss"] > 0.5
    assert report["verdict"] == "fail"
    message = capsys.readouterr().err
    assert "answers fewer questions right than --max-loss allows" in message
    assert "right_answers_lost" in message

    assert convert(tmp_path / "measured", pages) == 0, "without a bound it is measured alone"
    assert quality_of(tmp_path / "measured").loss == report["quality"]["loss"]


def test_fp16_is_asked_once_and_loses_nothing(
    pages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []
    build = PartBuilders.decoder

    def counted(self: PartBuilders, *given: Any) -> Any:
        built.append("decoder")
        return build(self, *given)

    monkeypatch.setattr(PartBuilders, "decoder", counted)

    assert convert(tmp_path / "out", pages, "--max-loss", "0", precision="fp16") == 0

    found = quality_of(tmp_path / "out")
    assert built == ["decoder"]
    assert found.right_before == found.right_after == COUNT
    assert (found.lost, found.gained, found.changed, found.loss) == (0, 0, 0, 0.0)


def test_an_interrupted_conversion_asks_no_question_of_fp16_twice(
    pages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    generate = LlavaEdge.generate

    def stopping(self: LlavaEdge, prompt: str, *given: Any, **options: Any) -> Any:
        if len(asked) == 5:
            asked.append("interrupted")
            raise KeyboardInterrupt
        asked.append(prompt)
        return generate(self, prompt, *given, **options)

    monkeypatch.setattr(LlavaEdge, "generate", stopping)
    assert convert(tmp_path / "out", pages) == 130
    (kept,) = (tmp_path / "out.partial").rglob("answers-*.jsonl")
    # The process may have been killed within a line.
    kept.write_text(kept.read_text()[:-9])
    assert asked.pop() == "interrupted"
    embedded: list[Path] = []
    build = PartBuilders.embeddings

    def watched(self: PartBuilders, folder: Path) -> None:
        embedded.append(folder)
        build(self, folder)

    monkeypatch.setattr(PartBuilders, "embeddings", watched)
    asked += ["so far"] * 100

    assert convert(tmp_path / "out", pages) == 0

    assert len(asked) == 105 + (COUNT - 4) + COUNT
    assert len(embedded) == 1, "the artifact at fp16 is not made again"
    assert quality_of(tmp_path / "out").right_before == COUNT


WRONG: dict[str, tuple[str, str]] = {
    "no JSON": ("{", "line 2: no JSON"),
    "no answers": ('{"question": "What?", "answers": []}', "line 2: there are no answers"),
    "no question": ('{"answer": "red"}', "line 2: question is None"),
    "no picture": ('{"question": "q", "answer": "a", "image": "none.png"}', "line 2: .*none.png"),
    "outside": ('{"question": "q", "answer": "a", "image": "../x.png"}', "no path inside"),
    "no image": ('{"question": "q", "answer": "a", "image": "text.png"}', "line 2: .*text.png"),
    "no video": ('{"question": "q", "answer": "a", "video": "none.mp4"}', "no video .*none.mp4"),
    "video": (
        '{"question": "q", "answer": "a", "video": "clip.mp4"}',
        "line 2: it shows a video, and the model takes images only",
    ),
    "videos": ('{"question": "q", "answer": "a", "video": ["a", "b"]}', "not one path"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_malformed_questions_are_refused_before_anything_is_written(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line, message = WRONG[kind]
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "Who?", "answer": "me"}\n' + line)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "clip.mp4").write_bytes(b"video")

    assert convert(tmp_path / "out", file) == 2

    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-loss", "2"), "argument --max-loss: '2' is no number of at least 0 and at most 1"),
        (("--max-loss", "nan"), "argument --max-loss: 'nan' is no number"),
        (("--max-loss", "-0.1"), "argument --max-loss: '-0.1' is no number"),
        (("--no-template",), "--no-template were both given"),
    ],
)
def test_options_that_do_not_go_with_questions_are_refused(
    pages: Path, tmp_path: Path, options: tuple[str, ...], message: str, capsys: Any
) -> None:
    assert convert(tmp_path / "out", pages, *options) == 2

    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_a_largest_loss_without_questions_is_refused(tmp_path: Path, capsys: Any) -> None:
    assert main(["convert", str(SHIPPED), str(tmp_path / "out"), "--max-loss", "0.1"]) == 2

    assert "without --quality FILE" in capsys.readouterr().err


def test_a_file_that_is_missing_is_named(tmp_path: Path, capsys: Any) -> None:
    assert convert(tmp_path / "out", tmp_path / "none.jsonl") == 2

    assert "none.jsonl cannot be read" in capsys.readouterr().err


def test_questions_that_fp16_answers_wrong_end_a_conversion_with_a_bound_at_once(
    pages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    file = pages.with_name("wrong.jsonl")
    entry = json.loads(pages.read_text().splitlines()[0])
    file.write_text(json.dumps({**entry, "answer": "", "answers": ["no such colour"]}))

    def never(*_: Any) -> None:
        raise AssertionError("quantised before fp16 was asked")

    monkeypatch.setattr(artifact_parts, "quantize", never)

    assert convert(tmp_path / "out", file, "--max-loss", "0.1") == 2

    assert "none of 1 questions" in capsys.readouterr().err


def test_too_little_memory_for_fp16_is_found_before_anything_is_written(
    pages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    detect = replanning.detect_profile

    def small(**given: Any) -> Any:
        found = detect(**given)
        return replace(found, system_reserve_bytes=found.memory_bytes - (60 << 20))

    monkeypatch.setattr(replanning, "detect_profile", small)

    assert convert(tmp_path / "out", pages) == 2

    assert "--quality asks the model at fp16 on this machine first" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
def test_verifying_again_keeps_what_the_questions_showed(pages: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert convert(out, pages, precision="fp16") == 0
    before = quality_of(out)

    assert main(["verify", str(out), "--against", str(SHIPPED)]) == 0

    artifact = open_artifact(out, require_verified=True)
    assert artifact.certificate is not None
    assert artifact.certificate.quality == before
    assert "| right at fp16 |" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("before", "after", "most", "verdict"),
    [
        (100, 98, 0.02, "pass"),
        (100, 97, 0.02, "fail"),
        (50, 49, 0.02, "pass"),
        (3, 2, 0.3, "fail"),
        (10, 12, 0.0, "pass"),
        (10, 9, None, "pass"),
    ],
)
def test_the_share_of_right_answers_decides(
    before: int, after: int, most: float | None, verdict: str
) -> None:
    loss = max(0, before - after) / before
    found = Quality(120, "0" * 64, before, after, 4, 2, 9, 0, loss, most)

    row = quality_row(found)

    assert row.verdict == verdict
    assert row.question == "loss"
    assert f"{before} of 120 answers right at fp16, {after} after; 4 lost, 2 gained" in row.detail


def test_a_quantised_checkpoint_has_no_fp16_to_compare_with(
    make_checkpoint: Callable[..., Path], pages: Path, tmp_path: Path
) -> None:
    plan_to_convert = ConversionPlan.__new__(ConversionPlan)
    plan = type("Plan", (), {"precision": "int4", "vision_precision": "fp16"})
    checkpoint = type("Checkpoint", (), {"gptq": object(), "source_id": "toy-gptq"})
    object.__setattr__(plan_to_convert, "planned", type("Planned", (), {"plan": plan}))
    object.__setattr__(plan_to_convert, "checkpoint", checkpoint)

    with pytest.raises(RequestError, match="toy-gptq is quantised already"):
        plan_to_convert.at_fp16()
