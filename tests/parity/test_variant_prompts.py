"""Prompts of the nine released variants through chat templates of their kind, against transformers.

No hub is asked. Each variant has a small tokenizer of the same class and the same control tokens,
made the way the conversions made theirs (base tokenizer, then the marks are added and saved by
transformers), and a template written here that renders what the variant's own one is published to
render. The strings below are golden; token ids are compared with transformers' tokenizer on all of
the verifier's conversations and finished prompts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.trainers import BpeTrainer

from llava_edge.convert.checkpoint.open import open_checkpoint
from llava_edge.convert.pipeline import convert_checkpoint
from llava_edge.convert.planning.request import ConvertRequest
from llava_edge.convert.testing.random_checkpoint import write_random_checkpoint
from llava_edge.convert.testing.random_spec import preset
from llava_edge.convert.verification.reference.processor import ReferenceProcessor
from llava_edge.convert.verification.stages.prompt import prompt_stage
from llava_edge.profiles.boards.hardware import load_profile
from llava_edge.profiles.plan_request import PlanRequest
from llava_edge.runtime.artifact.open import Artifact, open_artifact
from llava_edge.runtime.processing.text.chat_prompt import (
    Message,
    Text,
    compose,
    rendered,
    user_message,
)
from llava_edge.runtime.processing.text.tokenizer import Tokenizer
from llava_edge.runtime.util.progress import no_progress
from tests.convert.text.test_tokenizer_files import corpus, train
from tests.support.tiers import slow_but

Maker = Callable[[Path], Any]

_MEDIA = (
    "{% macro media(m) %}{% for kind in ['image', 'video'] %}{% for c in m.content %}"
    "{% if c.type == kind %}{{ '<' + kind + '>\n' }}{% endif %}{% endfor %}{% endfor %}"
    "{% endmacro %}"
)
_WORDS = (
    "{% macro words(m) %}{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endmacro %}"
)
INSTRUCT = (
    f"{_MEDIA}{_WORDS}{{% for m in messages %}}{{% if m.role == 'system' %}}"
    "{{ '<<SYS>>\n' + words(m) + '\n<</SYS>>\n\n' }}{% elif m.role == 'user' %}"
    "{{ '[INST] ' + media(m) + words(m) + ' [/INST]' }}{% else %}"
    "{{ ' ' + words(m) + ' </s>' }}{% endif %}{% endfor %}"
)
# A blank and no </s> behind an answer; no system text of its own.
VICUNA = (
    f"{_MEDIA}{{% for m in messages %}}{{% if m.role != 'system' %}}"
    "{{ m.role.upper() + ': ' }}{% endif %}{{ media(m) }}{% for c in m.content %}"
    "{% if c.type == 'text' %}{{ c.text + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def chat_markup(newline: str = "", default: str = "") -> str:
    """ChatML, with or without newlines behind end marks and a system turn of its own."""
    own = (
        f"{{% if messages[0].role != 'system' %}}{{{{ '<|im_start|>system\n{default}<|im_end|>"
        f"{newline}' }}}}{{% endif %}}"
    )
    return (
        f"{_MEDIA}{_WORDS}{own if default else ''}{{% for m in messages %}}"
        "{{ '<|im_start|>' + m.role + '\n' + media(m) + words(m) + '<|im_end|>"
        f"{newline}' }}}}{{% endfor %}}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


# Texts on lines of their own, and nothing in front of a picture.
_LINES = (
    "{% macro lines(m) %}{% for c in m.content if c.type == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for c in m.content if c.type == 'text' %}{{ '\n' + c.text }}{% endfor %}{% endmacro %}"
)
LLAMA3 = (
    f"{_LINES}{{{{ bos_token }}}}{{% for m in messages %}}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n' + lines(m) "
    "+ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN_LINES = (
    f"{_LINES}{{% if messages[0].role != 'system' %}}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + lines(m) + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def sentencepiece(*, adds_bos: bool, eos: str = "</s>", **options: Any) -> Maker:
    """A LlamaTokenizer over a sentencepiece model."""

    def make(folder: Path) -> Any:
        folder.mkdir()
        (folder / "tokenizer.model").write_bytes(train(**options))
        config = {
            "tokenizer_class": "LlamaTokenizer",
            "bos_token": options.get("bos_piece", "<s>"),
            "eos_token": eos,
            "unk_token": "<unk>",
            "pad_token": "<unk>",
            "add_bos_token": adds_bos,
            "add_eos_token": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        loader: Any = transformers.AutoTokenizer
        return loader.from_pretrained(folder)

    return make


def byte_level(*controls: str, bos: str | None, eos: str, adds_bos: bool, kind: str) -> Maker:
    """A byte-level BPE with control tokens behind the words."""

    def make(_: Path) -> Any:
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer: Any = BpeTrainer
        backend.train_from_iterator(
            corpus(),
            trainer(
                vocab_size=380,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
        backend.add_special_tokens([AddedToken(c, special=True) for c in controls])
        if adds_bos:
            template: Any = processors.TemplateProcessing
            backend.post_processor = template(
                single=f"{bos} $A",
                pair=f"{bos} $A $B",
                special_tokens=[(bos, backend.token_to_id(str(bos)))],
            )
        whole: Any = getattr(transformers, kind)
        named = {"bos_token": bos, "eos_token": eos}
        if kind == "PreTrainedTokenizerFast":
            return whole(tokenizer_object=backend, **named)
        document = json.loads(backend.to_str())["model"]
        made = whole(vocab=document["vocab"], merges=document["merges"], **named)
        made.add_special_tokens({"additional_special_tokens": list(controls)})
        return made

    return make


YI = sentencepiece(
    adds_bos=False,
    eos="<|im_end|>",
    bos_piece="<|startoftext|>",
    eos_piece="<|endoftext|>",
    add_dummy_prefix=False,
    user_defined_symbols=[
        "<|Human|>",
        "<|Assistant|>",
        "<|System|>",
        "<|im_start|>",
        "<|im_end|>",
    ],
)
LLAMA = sentencepiece(adds_bos=True)
LLAMA3_TOKENS = byte_level(
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    bos="<|begin_of_text|>",
    eos="<|eot_id|>",
    adds_bos=True,
    kind="PreTrainedTokenizerFast",
)
QWEN = byte_level(
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    bos=None,
    eos="<|im_end|>",
    adds_bos=False,
    kind="PreTrainedTokenizerFast",
)


@dataclass(frozen=True)
class Released:
    """One variant.

    Attributes:
        backbone: of the random checkpoint.
        tokenizer: makes the base tokenizer.
        template: of the checkpoint.
        asked: golden: one picture (or video) and a question.
        talked: golden: the same, an answer and a second question.
        stops: texts of the tokens that end an answer.
        bos: how often the ids begin with bos: once or never.
        model_type: of config.json.
        marks: added to the tokenizer, in this order.
        added: control tokens that the conversion put in front of the marks.
    """

    backbone: str
    tokenizer: Maker
    template: str
    asked: str
    talked: str
    stops: tuple[str, ...]
    bos: int
    model_type: str = "llava_next"
    marks: tuple[str, ...] = ("<image>",)
    added: tuple[str, ...] = field(default=())


_SYSTEM = "<|im_start|>system\n{}<|im_end|>"
_USER = "<|im_start|>user\n<{}>\nQ1<|im_end|>"
_HEAD = "<|start_header_id|>{}<|end_header_id|>\n\n"
_DIRECT = _SYSTEM.format("Answer the questions.") + _USER.format("image")
_QWEN = _SYSTEM.format("You are a helpful assistant.") + "\n<|im_start|>user<image>\nQ1<|im_end|>\n"
_VIDEO_YI = _USER.format("video") + "\n"
_OPEN = "<|im_start|>assistant\n"
_LLAMA3 = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n<image>\nQ1<|eot_id|>"

QWEN_72 = Released(
    "qwen2",
    QWEN,
    QWEN_LINES,
    f"{_QWEN}{_OPEN}",
    f"{_QWEN}{_OPEN}A1<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n{_OPEN}",
    ("<|im_end|>",),
    0,
)
VICUNA_7B = Released(
    "llama",
    LLAMA,
    VICUNA,
    "USER: <image>\nQ1 ASSISTANT:",
    "USER: <image>\nQ1 ASSISTANT: A1 USER: Q2 ASSISTANT:",
    ("</s>",),
    1,
)
VARIANTS: Mapping[str, Released] = {
    "llava-v1.6-mistral-7b": Released(
        "mistral",
        LLAMA,
        INSTRUCT,
        "[INST] <image>\nQ1 [/INST]",
        "[INST] <image>\nQ1 [/INST] A1 </s>[INST] Q2 [/INST]",
        ("</s>",),
        1,
        marks=("<image>", "<pad>"),
    ),
    "llava-v1.6-vicuna-7b": VICUNA_7B,
    "llava-v1.6-vicuna-13b": VICUNA_7B,
    "llava-v1.6-34b": Released(
        "llama",
        YI,
        chat_markup("", "Answer the questions."),
        f"{_DIRECT}{_OPEN}",
        f"{_DIRECT}{_OPEN}A1<|im_end|><|im_start|>user\nQ2<|im_end|>{_OPEN}",
        ("<|im_end|>",),
        0,
    ),
    "llama3-llava-next-8b": Released(
        "llama",
        LLAMA3_TOKENS,
        LLAMA3,
        f"{_LLAMA3}{_HEAD.format('assistant')}",
        f"{_LLAMA3}{_HEAD.format('assistant')}A1<|eot_id|>{_HEAD.format('user')}Q2<|eot_id|>"
        f"{_HEAD.format('assistant')}",
        ("<|eot_id|>", "<|end_of_text|>"),
        1,
        marks=("<image>", "<pad>"),
    ),
    "llava-next-72b": QWEN_72,
    "llava-next-110b": QWEN_72,
    "LLaVA-NeXT-Video-7B": Released(
        "llama",
        LLAMA,
        VICUNA,
        "USER: <video>\nQ1 ASSISTANT:",
        "USER: <video>\nQ1 ASSISTANT: A1 USER: Q2 ASSISTANT:",
        ("</s>",),
        1,
        "llava_next_video",
        ("<video>", "<image>"),
    ),
    # Newlines behind end marks and no system turn, which training did not have; and three reserved
    # tokens in front of the marks, which moved their ids between revisions.
    "LLaVA-NeXT-Video-34B": Released(
        "llama",
        YI,
        chat_markup("\n"),
        f"{_VIDEO_YI}{_OPEN}",
        f"{_VIDEO_YI}{_OPEN}A1<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n{_OPEN}",
        ("<|im_end|>",),
        0,
        "llava_next_video",
        ("<video>", "<image>"),
        ("<|reserved000|>", "<|reserved001|>", "<|reserved002|>"),
    ),
}


@pytest.fixture(scope="module")
def make_variant(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    made: dict[str, tuple[Path, Path]] = {}

    def make(name: str) -> tuple[Path, Path]:
        if name not in made:
            place = tmp_path_factory.mktemp("variant")
            folder = write_variant(place / f"{name}-hf", VARIANTS[name])
            request = ConvertRequest(
                checkpoint=str(folder),
                out=place / "artifact",
                profile=load_profile("cpu-16gb"),
                wishes=PlanRequest(precision="fp16", context_tokens=1024),
                verify="none",
            )
            made[name] = folder, convert_checkpoint(request, no_progress, lambda _: None).folder
        return made[name]

    return make


def write_variant(folder: Path, released: Released) -> Path:
    """A random checkpoint with the variant's tokenizer, template and ids."""
    spec = preset(
        "odd",
        backbone=released.backbone,
        model_type=released.model_type,
        image_size=56,
        vocab_size=448,
    )
    write_random_checkpoint(folder, spec, seed=3)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    tokenizer = released.tokenizer(folder.with_name("base"))
    for text in (*released.added, *released.marks):
        tokenizer.add_tokens(AddedToken(text, special=True, normalized=False), special_tokens=True)
    if "<pad>" in released.marks:
        tokenizer.pad_token = "<pad>"
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(released.template, "utf-8")
    ids = {text: tokenizer.convert_tokens_to_ids(text) for text in released.marks}
    stops = [tokenizer.convert_tokens_to_ids(text) for text in released.stops]
    config = json.loads((folder / "config.json").read_text())
    config["image_token_index"] = ids["<image>"]
    if "<video>" in ids:
        config["video_token_index"] = ids["<video>"]
    text_config = config["text_config"]
    text_config |= {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": stops[0],
        "pad_token_id": tokenizer.pad_token_id,
    }
    (folder / "config.json").write_text(json.dumps(config))
    generation = {"eos_token_id": stops if len(stops) > 1 else stops[0]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def talk(released: Released) -> tuple[Message, ...]:
    video = "<video>" in released.marks
    return (
        user_message("Q1", images=int(not video), videos=int(video)),
        Message("assistant", (Text("A1"),)),
        user_message("Q2"),
    )


def opened(artifact: Path) -> tuple[Artifact, Tokenizer]:
    found = open_artifact(artifact, verify_digests=False)
    manifest = found.manifest
    return found, Tokenizer.open(found.files[manifest.tokenizer], manifest.tokens, manifest.prompt)


@pytest.mark.parametrize("name", VARIANTS)
def test_prompt_strings_are_the_published_ones(
    name: str, make_variant: Callable[[str], tuple[Path, Path]]
) -> None:
    released = VARIANTS[name]
    artifact, _ = opened(make_variant(name)[1])
    prompt = artifact.manifest.prompt
    assert prompt is not None
    assert prompt.source == "template"

    conversation = talk(released)

    assert rendered(compose(prompt, conversation[:1])) == released.asked
    assert rendered(compose(prompt, conversation)) == released.talked


@pytest.mark.parametrize("name", VARIANTS)
def test_ids_are_those_of_the_reference(
    name: str, make_variant: Callable[[str], tuple[Path, Path]]
) -> None:
    released = VARIANTS[name]
    folder, place = make_variant(name)
    artifact, tokenizer = opened(place)
    loader: Any = transformers.AutoTokenizer
    theirs = loader.from_pretrained(folder)
    assert artifact.manifest.prompt is not None

    ids = tokenizer.encode_pieces(compose(artifact.manifest.prompt, talk(released)))

    # As transformers' processors do it: what begins with bos gets no second one.
    writes_bos = bool(theirs.bos_token) and released.talked.startswith(theirs.bos_token)
    assert ids == theirs(released.talked, add_special_tokens=not writes_bos)["input_ids"]
    bos = theirs.bos_token_id
    assert ids[:2].count(bos) == released.bos
    mark = "<video>" if "<video>" in released.marks else "<image>"
    assert ids.count(theirs.convert_tokens_to_ids(mark)) == 1


@pytest.mark.parametrize("name", slow_but(list(VARIANTS)[:2], VARIANTS))
def test_the_verifier_finds_no_other_prompt_and_no_other_stop(
    name: str, make_variant: Callable[[str], tuple[Path, Path]]
) -> None:
    released = VARIANTS[name]
    folder, place = make_variant(name)
    artifact, _ = opened(place)
    checkpoint = open_checkpoint(folder)
    pinpoints = artifact.manifest.image_processing.image_grid_pinpoints

    stage = prompt_stage(artifact, checkpoint, ReferenceProcessor(checkpoint, pinpoints))

    assert stage.verdict == "pass", stage
    loader: Any = transformers.AutoTokenizer
    theirs = loader.from_pretrained(folder)
    stops = {theirs.convert_tokens_to_ids(text) for text in released.stops}
    assert set(artifact.manifest.tokens.stop) == stops


def test_control_tokens_of_the_34b_keep_their_ids(
    make_variant: Callable[[str], tuple[Path, Path]],
) -> None:
    image, _ = opened(make_variant("llava-v1.6-34b")[1])
    video, _ = opened(make_variant("LLaVA-NeXT-Video-34B")[1])

    # <|im_end|> is 7 in every revision; the marks are where the tokenizer has them.
    assert image.manifest.tokens.stop == video.manifest.tokens.stop == (7,)
    marks = (video.manifest.tokens.video, video.manifest.tokens.image)
    assert marks == (image.manifest.tokens.image + 3, image.manifest.tokens.image + 4)
