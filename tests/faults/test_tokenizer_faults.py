"""Every fault of a tokenizer is found by the stage for it; sound tokenizers of all kinds pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend

from llava_edge.convert.checkpoint.transformers_loader import load_tokenizer
from llava_edge.convert.text.tokenizer import prepare_tokenizer
from llava_edge.convert.verification.reference.processor import ReferenceProcessor
from llava_edge.convert.verification.stages.prompt import prompt_stage
from llava_edge.convert.verification.stages.tokenizer import tokenizer_stage
from llava_edge.convert.verification.tokenizer.reference import TransformersTokenizer
from llava_edge.runtime.artifact.certificate import StageResult
from llava_edge.runtime.artifact.open import Artifact, open_artifact
from tests.faults.fault import Fault
from tests.faults.models.fault_models import FaultModels, Made, Model
from tests.faults.models.tamper import Tampered
from tests.faults.models.tokenizer_checkpoints import ROWS, TOKENIZERS
from tests.faults.seeded.model.faults_tokenizer import FAULTS, NAMED
from tests.support.tiers import one_of_each

KINDS = sorted({fault.model for fault in FAULTS})


class Stage:
    """The stage alone, beside references that remember the ids of the texts compared."""

    def __init__(self, models: FaultModels, folder: Path) -> None:
        self.models = models
        self.folder = folder
        self._references: dict[str, ReferenceProcessor] = {}

    def run(self, name: str, artifact: Artifact) -> list[StageResult]:
        """The rows of an artifact of a model."""
        made = self.models[name]
        if name not in self._references:
            manifest = open_artifact(made.artifact, verify_digests=False).manifest
            reference = ReferenceProcessor(made.checkpoint, (), manifest.tokens.image)
            remember(reference)
            self._references[name] = reference
        return tokenizer_stage(artifact, made.checkpoint, self._references[name])

    def examine(self, fault: Fault) -> list[StageResult]:
        """The rows of an artifact with a fault."""
        made = self.models[fault.model]
        copy = Tampered(made.artifact, self.folder / fault.id.replace(" ", "-"))
        with pytest.MonkeyPatch.context() as patch:
            if fault.where == "artifact":
                fault.plant(copy)
            else:
                fault.plant(patch)
            if fault.where == "conversion":
                _written(made, copy)
                patch.undo()
            artifact = open_artifact(copy.seal(), read_certificate_too=False)
            return self.run(fault.model, artifact)


def remember(reference: ReferenceProcessor) -> None:
    """Keep what the reference's tokenizer answers: each fault asks it the same."""
    tokenizer = reference.tokenizer
    for name in ("ids_of_texts", "texts_of_ids"):
        setattr(tokenizer, name, _remembering(getattr(tokenizer, name)))


def _remembering(ask: Callable[[Sequence[Any]], list[Any]]) -> Callable[[Sequence[Any]], list[Any]]:
    known: dict[str, list[Any]] = {}

    def answer(asked: Sequence[Any]) -> list[Any]:
        if (key := repr(asked)) not in known:
            known[key] = ask(asked)
        return known[key]

    return answer


def _written(made: Made, copy: Tampered) -> None:
    """The tokenizer converted again, in place of the one of a copy."""
    checkpoint = made.checkpoint
    tokens = prepare_tokenizer(
        checkpoint.folder,
        checkpoint.config,
        copy.folder / copy.manifest["tokenizer"],
        checkpoint.dims.text.vocab_size,
        source_id=checkpoint.source_id,
    )
    copy.manifest["tokens"] = {**asdict(tokens), "stop": list(tokens.stop)}


@pytest.fixture(scope="module")
def stage(models: FaultModels, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(models, tmp_path_factory.mktemp("tokenizers"))


def test_faults_are_many_of_every_kind_and_beyond_the_known_ones() -> None:
    assert len({fault.id for fault in FAULTS}) == len(FAULTS)
    assert len(FAULTS) - len(NAMED) >= 20
    assert {fault.where for fault in FAULTS} == {"artifact", "conversion", "runtime"}
    assert len(KINDS) == len(TOKENIZERS)


@pytest.mark.parametrize("name", KINDS)
def test_a_sound_tokenizer_passes(name: str, stage: Stage) -> None:
    rows = stage.run(name, open_artifact(stage.models[name].artifact, verify_digests=False))

    assert [row.verdict for row in rows] == ["pass"] * 3, rows


@pytest.mark.parametrize(
    "fault",
    one_of_each(lambda fault: (fault.where, fault.model), FAULTS),
    ids=lambda fault: fault.id,
)
def test_a_fault_of_the_tokenizer_is_found(fault: Fault, stage: Stage) -> None:
    rows = stage.examine(fault)

    assert "fail" in [row.verdict for row in rows], rows


def test_in_the_original_layout_a_file_that_transformers_reads_otherwise_decides(
    tmp_path: Path,
) -> None:
    model = Model("llama", changes={"layers": 1, "vocab_size": ROWS}, alters="original bytes")
    made = FaultModels(tmp_path, {"original": model})["original"]
    artifact = open_artifact(made.artifact, verify_digests=False)
    reference = ReferenceProcessor(made.checkpoint, (), artifact.manifest.tokens.image)

    rows = tokenizer_stage(artifact, made.checkpoint, reference)

    assert [row.verdict for row in rows] == ["pass"] * 3, rows
    assert "tokenizers" in rows[0].detail
    assert artifact.manifest.source.layout == "original"
    # One reference serves all stages; what transformers makes of the file is another tokenizer.
    text = artifact.path(artifact.manifest.tokenizer).read_text("utf-8")
    assert Backend.from_str(text).encode(" ").ids == reference.tokenizer.ids(" ")
    assert prompt_stage(artifact, made.checkpoint, reference).verdict == "pass"
    theirs = TransformersTokenizer(load_tokenizer(made.checkpoint.folder))
    assert theirs.ids(" ") != reference.tokenizer.ids(" ")
