"""Checkpoints with ``tokenizer.model`` alone: the sentencepiece library is their reference."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers

from llava_edge.convert.checkpoint.open import Checkpoint, open_checkpoint
from llava_edge.convert.pipeline import convert_checkpoint
from llava_edge.convert.planning.request import ConvertRequest
from llava_edge.convert.testing.random_checkpoint import write_random_checkpoint
from llava_edge.convert.testing.random_spec import preset
from llava_edge.convert.text.sentencepiece import probe_texts
from llava_edge.convert.text.tokenizer import build_tokenizer_json
from llava_edge.convert.verification.reference.processor import ReferenceProcessor
from llava_edge.convert.verification.stages.prompt import prompt_stage
from llava_edge.convert.verification.stages.tokenizer import tokenizer_stage
from llava_edge.profiles.boards.hardware import load_profile
from llava_edge.profiles.plan_request import PlanRequest
from llava_edge.runtime.artifact.certificate import StageResult
from llava_edge.runtime.artifact.open import Artifact, open_artifact
from llava_edge.runtime.processing.text.chat_prompt import raw_pieces
from llava_edge.runtime.processing.text.tokenizer import Tokenizer
from llava_edge.runtime.util.opened_file import OpenedFile
from llava_edge.runtime.util.progress import no_progress
from tests.convert.text.test_tokenizer_files import train
from tests.parity.test_variant_prompts import VICUNA, chat_markup
from tests.support.checkpoint_layouts import as_original
from tests.support.tiers import slow_but

LIBRARY = f"sentencepiece {sentencepiece.__version__}"


@dataclass(frozen=True)
class Lookalike:
    """One checkpoint without tokenizer.json.

    Attributes:
        model: what sentencepiece is trained with.
        settings: of tokenizer_config.json.
        added: added_tokens.json; ids count from the end of the vocabulary.
        original: in the layout of the original code, without processor files.
        backbone: of the language model.
        template: chat template.
        eos: token that ends an answer.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] | None = None
    added: tuple[str, ...] = ("<image>",)
    original: bool = False
    backbone: str = "llama"
    template: str = VICUNA
    eos: str = "</s>"


LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
CHATML = ("<|im_start|>", "<|im_end|>", "<|Human|>", "<|System|>")
YI: Mapping[str, Any] = {
    "bos_piece": "<|startoftext|>",
    "eos_piece": "<|endoftext|>",
    "add_dummy_prefix": False,
    "user_defined_symbols": list(CHATML),
}
YI_SETTINGS = {
    **LLAMA,
    "bos_token": "<|startoftext|>",
    "eos_token": "<|im_end|>",
    "add_bos_token": False,
}
LOOKALIKES: Mapping[str, Lookalike] = {
    "Vicuna, original": Lookalike(settings=LLAMA, added=(), original=True),
    "Vicuna, original, no settings": Lookalike(added=(), original=True),
    "Mistral, original": Lookalike(
        settings={**LLAMA, "legacy": True}, added=(), original=True, backbone="mistral"
    ),
    "Yi, original": Lookalike(YI, YI_SETTINGS, (), True, eos="<|im_end|>"),
    "unigram, original": Lookalike({"kind": "unigram"}, LLAMA, (), True),
    "no dummy prefix, original": Lookalike({"add_dummy_prefix": False}, LLAMA, (), True),
    "NFKC and blanks removed, original": Lookalike(
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
        LLAMA,
        (),
        True,
    ),
    "no bytes, original": Lookalike({"byte_fallback": False}, LLAMA, (), True),
    "Vicuna, hub": Lookalike(settings=LLAMA),
    "Mistral, hub": Lookalike(
        settings={**LLAMA, "pad_token": "<pad>"}, added=("<image>", "<pad>"), backbone="mistral"
    ),
    "not legacy, hub": Lookalike(settings={**LLAMA, "legacy": False}),
    "Yi, hub": Lookalike(YI, YI_SETTINGS, template=chat_markup("\n"), eos="<|im_end|>"),
    "unigram, hub": Lookalike({"kind": "unigram"}, LLAMA),
    "no bos, hub": Lookalike(settings={**LLAMA, "add_bos_token": False}),
    "no prefix by its settings, hub": Lookalike(settings={**LLAMA, "add_prefix_space": False}),
}


QUICK = ("Vicuna, original", "NFKC and blanks removed, original", "unigram, hub")


def write_lookalike(folder: Path, kind: Lookalike) -> Path:
    spec = preset("odd", backbone=kind.backbone, image_size=56, vocab_size=448)
    # Families are told by name where a configuration does not say them.
    named = "llava-v1.6-34b" if kind.eos == "<|im_end|>" else "llava-v1.6-vicuna"
    target = folder / named
    if kind.original:
        write_random_checkpoint(folder / "source", spec, seed=6)
        as_original(folder / "source", target)
    else:
        write_random_checkpoint(target, spec, seed=6)
    data = train(**kind.model)
    model = sentencepiece.SentencePieceProcessor(model_proto=data)
    size = model.get_piece_size()
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "chat_template.json",
        *(("processor_config.json", "preprocessor_config.json") if kind.original else ()),
    ):
        (target / name).unlink(missing_ok=True)
    (target / "tokenizer.model").write_bytes(data)
    if kind.settings is not None:
        (target / "tokenizer_config.json").write_text(json.dumps(kind.settings))
    if kind.added:
        added = {content: size + place for place, content in enumerate(kind.added)}
        (target / "added_tokens.json").write_text(json.dumps(added))
    config = json.loads((target / "config.json").read_text())
    stop = model.piece_to_id(kind.eos)
    if not kind.original:
        config["image_token_index"] = size
        (target / "chat_template.jinja").write_text(kind.template)
    inner = config if kind.original else config["text_config"]
    inner |= {"bos_token_id": model.bos_id(), "eos_token_id": stop, "pad_token_id": None}
    (target / "config.json").write_text(json.dumps(config))
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}))
    return target


def convert(folder: Path, out: Path, verify: Any = "none") -> Path:
    request = ConvertRequest(
        checkpoint=str(folder),
        out=out,
        profile=load_profile("cpu-16gb"),
        wishes=PlanRequest(precision="fp16", context_tokens=1024),
        verify=verify,
    )
    return convert_checkpoint(request, no_progress, lambda _: None).folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    known: dict[str, tuple[Path, Path]] = {}

    def make(name: str) -> tuple[Path, Path]:
        if name not in known:
            place = tmp_path_factory.mktemp("lookalike")
            folder = write_lookalike(place, LOOKALIKES[name])
            known[name] = folder, convert(folder, place / "artifact")
        return known[name]

    return make


def stage(folder: Path, opened: Artifact) -> StageResult:
    checkpoint = open_checkpoint(folder)
    return prompt_stage(opened, checkpoint, reference_of(checkpoint, opened))


def reference_of(checkpoint: Checkpoint, opened: Artifact) -> ReferenceProcessor:
    mark = opened.manifest.tokens.image if checkpoint.layout == "original" else None
    return ReferenceProcessor(checkpoint, checkpoint.dims.image_grid_pinpoints, mark)


@pytest.mark.parametrize("name", slow_but(QUICK, LOOKALIKES))
def test_a_right_artifact_passes_and_the_stage_names_its_reference(
    name: str, made: Callable[[str], tuple[Path, Path]]
) -> None:
    folder, artifact = made(name)

    found = stage(folder, open_artifact(artifact))

    assert found.verdict == "pass", found
    assert LIBRARY in str(found), found


@pytest.mark.parametrize("name", slow_but(QUICK, LOOKALIKES))
def test_the_tokenizer_of_a_right_artifact_is_that_of_the_library(
    name: str, made: Callable[[str], tuple[Path, Path]]
) -> None:
    folder, artifact = made(name)
    checkpoint, opened = open_checkpoint(folder), open_artifact(artifact)

    rows = tokenizer_stage(opened, checkpoint, reference_of(checkpoint, opened))

    assert [row.verdict for row in rows] == ["pass"] * 3, rows
    assert LIBRARY in str(rows)


@pytest.mark.parametrize("name", slow_but(QUICK, LOOKALIKES))
def test_ids_of_whole_prompts_are_those_of_the_library(
    name: str, made: Callable[[str], tuple[Path, Path]]
) -> None:
    folder, artifact = made(name)
    checkpoint = open_checkpoint(folder)
    manifest = open_artifact(artifact, verify_digests=False).manifest
    opened = OpenedFile(artifact / "tokenizer.json")
    tokenizer = Tokenizer.open(opened, manifest.tokens, manifest.prompt)
    reference = ReferenceProcessor(checkpoint, (), manifest.tokens.image)
    controls = reference.control_tokens
    count = 0
    for text in probe_texts(count=400):
        prompt = f"USER: <image>\n{text} ASSISTANT:"
        if any(control in text for control in controls):
            continue
        count += 1
        assert tokenizer.encode_pieces(raw_pieces(prompt, images=1)) == reference.ids(prompt), text
    assert count > 300


@pytest.mark.parametrize("name", ["Vicuna, original", "Vicuna, hub"])
def test_an_artifact_with_another_tokenizer_fails(
    name: str, made: Callable[[str], tuple[Path, Path]]
) -> None:
    folder, artifact = made(name)
    opened = open_artifact(artifact)
    file = artifact / "tokenizer.json"
    right = file.read_text("utf-8")
    document = json.loads(right)
    # A blank in front of the whole prompt alone, as transformers 5 reads the model file.
    document["normalizer"] = None
    document["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": "first",
        "split": False,
    }
    file.write_text(json.dumps(document), "utf-8")
    try:
        found = stage(folder, opened)
    finally:
        file.write_text(right, "utf-8")

    assert found.verdict == "fail"
    assert "other ids" in str(found) or "ids are" in str(found)


def test_a_tokenizer_json_that_contradicts_the_configuration_is_no_reference(
    tmp_path: Path,
) -> None:
    folder = write_lookalike(tmp_path, LOOKALIKES["Vicuna, hub"])
    config = json.loads((folder / "config.json").read_text())
    document = json.loads(build_tokenizer_json(folder, config))
    for token in document["added_tokens"]:
        if token["content"] == "<image>":
            token["id"] += 1
    (folder / "tokenizer.json").write_text(json.dumps(document), "utf-8")
    artifact = convert(folder, tmp_path / "artifact", verify="none")

    found = stage(folder, open_artifact(artifact))

    assert found.verdict == "pass", found
    assert LIBRARY in str(found), found


def test_the_reading_of_transformers_is_another_one(
    made: Callable[[str], tuple[Path, Path]],
) -> None:
    """Why it is no reference here: its own ids differ from the library's for the same file."""
    folder, _ = made("Vicuna, original")
    loader: Any = transformers.AutoTokenizer
    theirs = loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    library = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    texts = probe_texts(count=400)
    differing = [t for t in texts if theirs(t)["input_ids"][1:] != list(library.encode(t))]
    assert differing


@pytest.mark.nightly
@pytest.mark.parametrize("name", LOOKALIKES)
def test_conversion_and_full_verification_pass(name: str, tmp_path: Path) -> None:
    folder = write_lookalike(tmp_path, LOOKALIKES[name])
    artifact = convert(folder, tmp_path / "artifact", verify="full")
    certificate = json.loads((artifact / "certificate.json").read_text())
    assert certificate["passed"]
    assert LIBRARY in certificate["reference"]
