"""What only the manifest or the golden prompts say wrongly is found as well."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_edge.convert.checkpoint.open import open_checkpoint
from llava_edge.convert.verification.stages.prompt import prompt_stage
from llava_edge.convert.verification.structure.manifest_record import manifest_record_faults
from llava_edge.convert.verification.structure.stage import structure_stage
from llava_edge.convert.verification.verifier import VerifyOptions, open_reference, verify_artifact
from llava_edge.runtime.artifact.open import open_artifact
from llava_edge.runtime.util.opened_file import OpenedFile
from llava_edge.runtime.util.progress import no_progress
from llava_edge.runtime.verification.golden.probes import GOLDEN_FILE, golden_bytes, read_golden
from tests.faults.models.fault_models import FaultModels
from tests.faults.models.tamper import Tampered
from tests.support.conversion_cache import ConversionCache
from tests.support.tiers import one_of_each


def _reversed_candidates(manifest: dict[str, Any]) -> None:
    manifest["image_processing"]["image_grid_pinpoints"].reverse()


def _lost_candidate(manifest: dict[str, Any]) -> None:
    del manifest["image_processing"]["image_grid_pinpoints"][0]


def _other_order(manifest: dict[str, Any]) -> None:
    manifest["image_processing"]["reference"] = "original"


def _half_the_words(manifest: dict[str, Any]) -> None:
    manifest["tokens"]["num_text_tokens"] //= 2


def _no_prompt(manifest: dict[str, Any]) -> None:
    manifest["prompt"] = None


def _no_bos(manifest: dict[str, Any]) -> None:
    manifest["tokens"]["bos"] = None


def _no_special_tokens(manifest: dict[str, Any]) -> None:
    manifest["prompt"]["special_tokens"] = manifest["prompt"]["special_tokens"][1:]


def _other_prompt_source(manifest: dict[str, Any]) -> None:
    manifest["prompt"]["source"] = "builtin"


def _other_family(manifest: dict[str, Any]) -> None:
    manifest["prompt"]["family"] = "chatml"


def _smaller_chunk(manifest: dict[str, Any]) -> None:
    manifest["prefill_chunk"] //= 2


def _other_layout(manifest: dict[str, Any]) -> None:
    manifest["source"]["layout"] = "original"


def _other_variant(manifest: dict[str, Any]) -> None:
    manifest["variant"] = "llava-v1.6-mistral-7b"


def _planned_precision(manifest: dict[str, Any]) -> None:
    manifest["plan"]["precision"] = "fp16"


def _planned_vision(manifest: dict[str, Any]) -> None:
    manifest["plan"]["vision_precision"] = "fp16"


def _planned_context(manifest: dict[str, Any]) -> None:
    manifest["plan"]["context_tokens"] *= 2


def _planned_tiles(manifest: dict[str, Any]) -> None:
    manifest["plan"]["max_tiles"] += 1


def _planned_tokens(manifest: dict[str, Any]) -> None:
    manifest["plan"]["max_image_tokens"] -= 1


def _planned_memory(manifest: dict[str, Any]) -> None:
    """By it the memory of a whole verification is judged."""
    manifest["plan"]["memory"]["total_bytes"] *= 10


def _misfit(manifest: dict[str, Any]) -> None:
    manifest["plan"]["fits"] = False


def _other_embeddings(manifest: dict[str, Any]) -> None:
    manifest["precision"]["embeddings"] = "int8"


def _trained_weights(manifest: dict[str, Any]) -> None:
    manifest["conversion"]["random_weights"] = False


def _untrained_grid(manifest: dict[str, Any]) -> None:
    manifest["conversion"]["is_trained_grid"] = False


def _no_digests(manifest: dict[str, Any]) -> None:
    manifest["conversion"]["weights_sha256"] = {}


def _other_bits(manifest: dict[str, Any]) -> None:
    manifest["conversion"]["bits"] = 8


def _unknown_quantizer(manifest: dict[str, Any]) -> None:
    manifest["conversion"]["quantizer"] = "awq"


def _said_to_be_solved(manifest: dict[str, Any]) -> None:
    manifest["conversion"]["quantizer"] = "gptq"


def _no_layers(manifest: dict[str, Any]) -> None:
    manifest["conversion"]["layers"] = []


def _one_layer_less(manifest: dict[str, Any]) -> None:
    del manifest["conversion"]["layers"][-1]


def _other_settings(manifest: dict[str, Any]) -> None:
    manifest["conversion"]["settings"]["bits"] = 3


@pytest.fixture(scope="module")
def sound(make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]) -> Path:
    return make_artifact(make_checkpoint("odd", backbone="mistral"), verify="quick")


@pytest.fixture
def failing(make_checkpoint: Callable[..., Path]) -> Callable[[Path], list[str]]:
    """Names of the stages that an artifact fails."""

    def verify(artifact: Path) -> list[str]:
        opened = open_artifact(artifact, read_certificate_too=False)
        checkpoint = open_checkpoint(make_checkpoint("odd", backbone="mistral"))
        reference = open_reference(opened, checkpoint)
        options = VerifyOptions(threads=1)
        certificate = verify_artifact(opened, checkpoint, options, no_progress, reference)
        return [stage.name for stage in certificate.stages if stage.verdict == "fail"]

    return verify


@pytest.mark.parametrize(
    ("change", "stage"),
    one_of_each(
        lambda given: given[1],
        [
            (_reversed_candidates, "structure"),
            (_lost_candidate, "structure"),
            (_other_order, "structure"),
            (_half_the_words, "structure"),
            (_no_prompt, "prompt"),
            (_no_bos, "prompt"),
        ],
    ),
)
def test_a_wrong_fact_of_the_manifest_is_found(
    sound: Path,
    failing: Callable[[Path], list[str]],
    tmp_path: Path,
    change: Callable[[dict[str, Any]], None],
    stage: str,
) -> None:
    tampered = Tampered(sound, tmp_path / "artifact")
    change(tampered.manifest)

    assert stage in failing(tampered.seal())


def test_golden_prompts_that_say_something_else_are_found(
    sound: Path, failing: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    tampered = Tampered(sound, tmp_path / "artifact")
    path = tmp_path / "artifact" / GOLDEN_FILE
    manifest = open_artifact(sound).manifest
    probes = [
        replace(probe, logits=np.flip(probe.logits, axis=1).copy())
        for probe in read_golden(OpenedFile(path), manifest)
    ]
    path.write_bytes(golden_bytes(probes, manifest))

    assert failing(tampered.seal()) == ["golden"]


LABELS: tuple[tuple[str, Callable[[dict[str, Any]], None], str], ...] = (
    *(
        ("int4", change, "structure")
        for change in (
            _smaller_chunk,
            _other_layout,
            _other_variant,
            _planned_precision,
            _planned_vision,
            _planned_context,
            _planned_tiles,
            _planned_tokens,
            _planned_memory,
            _misfit,
            _other_embeddings,
            _trained_weights,
            _untrained_grid,
            _no_digests,
            _other_bits,
            _unknown_quantizer,
            _said_to_be_solved,
        )
    ),
    *(
        ("int4", change, "prompt")
        for change in (_no_special_tokens, _other_prompt_source, _other_family)
    ),
    *(
        ("int4 gptq", change, "structure")
        for change in (_no_layers, _one_layer_less, _other_settings)
    ),
)


@pytest.fixture(scope="module")
def models(
    tmp_path_factory: pytest.TempPathFactory, conversion_cache: ConversionCache
) -> FaultModels:
    return FaultModels(tmp_path_factory.mktemp("labels"), cache=conversion_cache)


@pytest.mark.parametrize(
    ("model", "change", "stage"), LABELS, ids=lambda value: getattr(value, "__name__", value)
)
def test_a_label_that_nothing_is_computed_from_is_found(
    models: FaultModels,
    tmp_path: Path,
    model: str,
    change: Callable[[dict[str, Any]], None],
    stage: str,
) -> None:
    made = models[model]
    tampered = Tampered(made.artifact, tmp_path / "artifact")
    change(tampered.manifest)
    artifact = open_artifact(tampered.seal(), read_certificate_too=False)

    if stage == "prompt":
        processor = open_reference(artifact, made.checkpoint).processor
        row = prompt_stage(artifact, made.checkpoint, processor)
    else:
        row = structure_stage(artifact, made.checkpoint)

    assert row.verdict == "fail"
    assert row.value, row.detail


@pytest.mark.parametrize("model", ["int4", "int4 gptq", "video", "qwen2", "int8 cache"])
def test_a_sound_manifest_has_no_fault(models: FaultModels, model: str) -> None:
    made = models[model]
    artifact = open_artifact(made.artifact)

    assert manifest_record_faults(artifact, made.checkpoint) == []


def test_a_board_of_ones_own_may_have_any_chunk(models: FaultModels, tmp_path: Path) -> None:
    made = models["qwen2"]
    tampered = Tampered(made.artifact, tmp_path / "artifact")
    tampered.manifest["prefill_chunk"] = 96
    tampered.manifest["plan"]["profile"] = "kitchen"

    artifact = open_artifact(tampered.seal(), read_certificate_too=False)

    assert manifest_record_faults(artifact, made.checkpoint) == []
