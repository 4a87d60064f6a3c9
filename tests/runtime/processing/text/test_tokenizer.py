"""Ids equal those of the reference's processor; user text never becomes a control id."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.trainers import BpeTrainer
from transformers import LlavaNextImageProcessorPil, LlavaNextProcessor, PreTrainedTokenizerFast

from llava_edge.convert.text.builtin_templates import builtin_format
from llava_edge.convert.text.sentencepiece import SentencePieceModel, SentencePieceSettings
from llava_edge.profiles.errors import ArtifactError, PromptError
from llava_edge.runtime.artifact.manifest import PromptFormat, TokenIds
from llava_edge.runtime.processing.text.chat_prompt import (
    Message,
    Piece,
    Text,
    compose,
    raw_pieces,
    rendered,
    user_message,
)
from llava_edge.runtime.processing.text.tokenizer import Tokenizer
from llava_edge.runtime.util.opened_file import OpenedFile

WORDS = """
the a of image what is this in describe detail color text user assistant question answer two cats
dog on table blue red large small where who USER ASSISTANT INST naïve 日本 good-bye 12
"""
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def corpus() -> list[str]:
    chance = random.Random(7)
    words = WORDS.split()
    return [" ".join(chance.choices(words, k=9)) + chance.choice(".?!") for _ in range(400)]


def sentencepiece_backend(folder: Path, kind: str, **options: Any) -> Backend:
    file = folder / f"{kind}.model"
    if not file.exists():
        data = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus()),
            model_writer=data,
            model_type=kind,
            vocab_size=420,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            hard_vocab_limit=False,
            num_threads=1,
            minloglevel=2,
        )
        file.write_bytes(data.getvalue())
    backend = SentencePieceModel.open(file).build(SentencePieceSettings(**options))
    backend.add_special_tokens([AddedToken("<image>", special=True, normalized=False)])
    return backend


def byte_level_backend(special: Sequence[str], bos: str | None) -> Backend:
    backend = Backend(models.BPE())
    if bos is None:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=500,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(corpus(), trainer)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    # An ordinary added token, as some vocabularies have them for runs of blanks.
    backend.add_tokens([AddedToken("good-bye", normalized=True)])
    if bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A $B",
            special_tokens=[(bos, backend.token_to_id(bos))],
        )
    return backend


@dataclass(frozen=True)
class Model:
    """One kind of tokenizer: ours, and the reference's processor around the same file."""

    family: str
    prompt_format: PromptFormat
    backend: Backend
    tokenizer: Tokenizer
    processor: Any

    def reference_ids(self, text: str, images: int) -> list[int]:
        pictures = [Image.fromarray(p) for p in PICTURES[:images]] or None
        # The rule of apply_chat_template(tokenize=True): no second bos.
        bos = self.processor.tokenizer.bos_token
        add = not (bos and text.startswith(bos))
        ids = self.processor(text=text, images=pictures, add_special_tokens=add)["input_ids"]
        return [int(i) for i in ids[0]]

    def our_ids(self, pieces: Sequence[Piece]) -> list[int]:
        ids = self.tokenizer.encode_pieces(pieces)
        count = sum(i == self.tokenizer.image_id for i in ids)
        sizes = [list(p.shape[:2]) for p in PICTURES[:count]]
        counts = self.processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens
        return self.tokenizer.expand_media(ids, counts)


PICTURES = [np.zeros(shape, np.uint8) for shape in ((30, 30, 3), (40, 90, 3), (90, 20, 3))]
SPECIALS = {
    "llama3": (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<image>",
        "<pad>",
    ),
    "chatml_newline": ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"),
    "chatml_direct": ("<|startoftext|>", "<|im_start|>", "<|im_end|>", "<image>"),
}
KINDS: dict[str, tuple[str, Callable[[Path], Backend], str | None, str]] = {
    "sentencepiece BPE, blank before every run": (
        "mistral_instruct",
        lambda folder: sentencepiece_backend(folder, "bpe"),
        "<s>",
        "</s>",
    ),
    "sentencepiece BPE, blank at the start only": (
        "vicuna",
        lambda folder: sentencepiece_backend(folder, "bpe", legacy=False),
        "<s>",
        "</s>",
    ),
    "sentencepiece unigram": (
        "vicuna",
        lambda folder: sentencepiece_backend(folder, "unigram"),
        "<s>",
        "</s>",
    ),
    "byte-level, bos in template and tokenizer": (
        "llama3",
        lambda folder: byte_level_backend(SPECIALS["llama3"], "<|begin_of_text|>"),
        "<|begin_of_text|>",
        "<|eot_id|>",
    ),
    "byte-level, no bos": (
        "chatml_newline",
        lambda folder: byte_level_backend(SPECIALS["chatml_newline"], None),
        None,
        "<|im_end|>",
    ),
    "byte-level, chatml without newlines": (
        "chatml_direct",
        lambda folder: byte_level_backend(SPECIALS["chatml_direct"], None),
        None,
        "<|im_end|>",
    ),
}


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="session")
def models_by_kind(tokenizer_folder: Path) -> dict[str, Model]:
    return {name: make_model(name, tokenizer_folder) for name in KINDS}


@pytest.fixture(params=list(KINDS))
def model(request: pytest.FixtureRequest, models_by_kind: dict[str, Model]) -> Model:
    return models_by_kind[request.param]


def make_model(name: str, folder: Path) -> Model:
    family, make, bos, eos = KINDS[name]
    backend = make(folder)
    file = folder / f"{sorted(KINDS).index(name)}.json"
    backend.save(str(file))
    tokens = TokenIds(
        image=backend.token_to_id("<image>"),
        video=None,
        bos=None if bos is None else backend.token_to_id(bos),
        stop=(backend.token_to_id(eos),),
        num_text_tokens=backend.token_to_id("<image>"),
    )
    prompt_format = builtin_format(family)
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": 28},
            crop_size={"height": 28, "width": 28},
            image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
        ),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_file=str(file), bos_token=bos, eos_token=eos, pad_token=eos
        ),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return Model(
        family=family,
        prompt_format=prompt_format,
        backend=backend,
        tokenizer=Tokenizer.open(OpenedFile(file), tokens, prompt_format),
        processor=processor,
    )


QUESTIONS = (
    "What is shown in this image?",
    "Describe this image in detail.",
    " leading blank",
    "trailing blank ",
    "  two  inside  and outside  ",
    "\nnewlines\n\nall over\n",
    "\ttab",
    "naïve Größe 日本語 🦙🔥 עברית",
    "e\u0301 decomposed, ﬁ ligature, ½",
    "1234567 3.14",
    "good-bye and good-bye",
    "a < b > c </ s> < image> <|im",
    "<0x0A> and ▁ as text",
    "[INST] x [/INST] <<SYS>>",
    "USER: a ASSISTANT: b",
    "x",
    "a" * 50,
    "(c) 'quotes' \"double\" \\",
)


def conversations(question: str) -> list[tuple[tuple[Message, ...], int]]:
    say = Message("assistant", (Text(f"{question} indeed."),))
    rule = Message("system", (Text(f"{question} Be brief."),))
    return [
        ((user_message(question),), 0),
        ((user_message(question, images=1),), 1),
        ((user_message(question, images=2), say, user_message(question, images=1)), 3),
        ((rule, user_message(f"{question} <image> here", images=1)), 1),
    ]


@pytest.mark.parametrize("question", QUESTIONS)
def test_ordinary_prompts_have_the_ids_of_the_reference(model: Model, question: str) -> None:
    for messages, images in conversations(question):
        pieces = compose(model.prompt_format, messages)
        assert model.our_ids(pieces) == model.reference_ids(rendered(pieces), images)


RAW = (
    ("[INST] <image>\nDescribe this image in detail. [/INST]", 1),
    (
        "[INST] <image>\nWhat is shown in this image? [/INST] There is a red stop sign in the "
        "image.</s> [INST] <image>\nWhat about this image? How many cats do you see [/INST]",
        2,
    ),
    ("<image>", 1),
    ("<image><image> both", 2),
    ("USER: <image>\nWhat? ASSISTANT:", 1),
    ("<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\n", 1),
    ("<s>[INST] bos written out [/INST]", 0),
    ("<|begin_of_text|>bos written out<|eot_id|>", 0),
)


@pytest.mark.parametrize(("prompt", "images"), RAW)
def test_raw_prompts_have_the_ids_of_the_reference(model: Model, prompt: str, images: int) -> None:
    pieces = raw_pieces(prompt, images=images)
    assert model.our_ids(pieces) == model.reference_ids(prompt, images)


def test_control_tokens_of_a_raw_prompt_are_real(model: Model) -> None:
    (stop,) = model.tokenizer.stop_ids
    content = model.backend.id_to_token(stop)
    assert stop in model.tokenizer.encode_pieces(raw_pieces(f"a{content}b"))


def test_the_bos_token_is_put_first_once(model: Model) -> None:
    ids = model.tokenizer.encode_pieces(compose(model.prompt_format, (user_message("What?"),)))
    if model.tokenizer.bos_id is None:
        assert not model.tokenizer.adds_bos
    else:
        assert model.tokenizer.adds_bos
        assert ids[0] == model.tokenizer.bos_id
        assert ids.count(model.tokenizer.bos_id) == 1
        written = raw_pieces(f"{model.backend.id_to_token(ids[0])}What?")
        assert model.tokenizer.encode_pieces(written).count(ids[0]) == 1


def test_the_ids_are_those_of_apply_chat_template_with_a_bos_in_the_template(
    models_by_kind: dict[str, Model],
) -> None:
    model = models_by_kind["byte-level, bos in template and tokenizer"]
    template = (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
        "'<|end_header_id|>\n\n' }}{% for c in m['content'] %}{% if c['type'] == 'image' %}"
        "{{ '<image>\n' }}{% else %}{{ c['text'] }}{% endif %}{% endfor %}{{ '<|eot_id|>' }}"
        "{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    )
    picture = Image.fromarray(PICTURES[0])
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]
    theirs = model.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=template,
        tokenize=True,
        return_dict=True,
    )["input_ids"][0]
    plain = replace(model.prompt_format, default_system="")
    assert model.our_ids(compose(plain, (user_message("What?", images=1),))) == list(theirs)


def control_positions(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    return [i for i in ids if i in tokenizer.control_ids]


def hostile_texts(model: Model) -> list[str]:
    contents = [t.content for t in model.backend.get_added_tokens_decoder().values() if t.special]
    texts = [f"before {c} after" for c in contents] + contents + [c * 3 for c in contents]
    texts += [f" {c}" for c in contents] + [f"{c}\n" for c in contents]
    return [*texts, "".join(contents), "<image> and </s> and <|im_end|>", "<unk>", "<s></s>"]


def test_control_tokens_in_user_text_stay_text(model: Model) -> None:
    harmless = (user_message("harmless", images=1),)
    expected = control_positions(
        model.tokenizer, model.tokenizer.encode_pieces(compose(model.prompt_format, harmless))
    )
    for text in hostile_texts(model):
        messages = (user_message(text, images=1),)
        pieces = compose(model.prompt_format, messages, image_marks=False)
        ids = model.tokenizer.encode_pieces(pieces)
        assert control_positions(model.tokenizer, ids) == expected, text
        # The letters are all still there.
        assert text.strip() in model.tokenizer.decode(ids), text


def test_a_control_token_completed_across_a_seam_stays_text(model: Model) -> None:
    (stop,) = model.tokenizer.stop_ids
    content = str(model.backend.id_to_token(stop))
    for cut in range(1, len(content)):
        left, right = content[:cut], content[cut:]
        for pieces in (
            (Piece("text", left), Piece("template", right)),
            (Piece("template", left), Piece("text", right)),
        ):
            ids = model.tokenizer.encode_pieces(pieces)
            assert stop not in ids
            assert content in model.tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("added", "text", "expected"),
    [
        pytest.param("xx", "x", ["xx"], id="an ordinary one is what the reference has"),
        pytest.param("x</s>", "x", ["x", "</s>"], id="one that would swallow a control token"),
    ],
)
def test_an_added_token_across_a_seam(
    added: str, text: str, expected: list[str], tmp_path: Path
) -> None:
    vocab = {"<unk>": 0, "x": 1, "<": 2, "/": 3, "s": 4, ">": 5}
    backend = Backend(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.add_special_tokens(["</s>", "<image>"])
    backend.add_tokens([AddedToken(added, normalized=False)])
    file = tmp_path / "tokenizer.json"
    backend.save(str(file))
    tokens = TokenIds(image=7, video=None, bos=None, stop=(6,), num_text_tokens=7)
    rest = "".join(expected).removeprefix(text)
    ids = Tokenizer.open(OpenedFile(file), tokens).encode_pieces(
        (Piece("text", text), Piece("template", rest))
    )
    assert [backend.id_to_token(i) for i in ids] == expected


def test_sealed_text_is_encoded_as_if_the_control_token_were_not_there(
    models_by_kind: dict[str, Model],
) -> None:
    model = models_by_kind["byte-level, no bos"]
    text = "what is <|im_end|> the image"
    ids = model.tokenizer.encode_pieces((Piece("template", "<|im_start|>"), Piece("text", text)))
    plain = Backend.from_str(model.backend.to_str())
    plain.encode_special_tokens = True
    assert ids[1:] == plain.encode(text, add_special_tokens=False).ids


def test_a_vocabulary_that_holds_the_end_mark_as_a_mergeable_piece_never_yields_it(
    tmp_path: Path,
) -> None:
    pieces = ["<unk>", "<s>", "</s>", "▁", "<", "/", "s", ">", "</", "s>", "a"]
    merges = [("<", "/"), ("s", ">"), ("</", "s>")]
    backend = Backend(
        models.BPE(
            vocab={p: i for i, p in enumerate(pieces)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>", "<image>"])
    file = tmp_path / "tokenizer.json"
    backend.save(str(file))
    tokens = TokenIds(image=11, video=None, bos=1, stop=(2,), num_text_tokens=11)
    tokenizer = Tokenizer.open(OpenedFile(file), tokens)
    ids = tokenizer.encode_pieces((Piece("text", "a</s>a"), Piece("template", "</s>")))
    assert ids == [10, 8, 9, 10, 2]
    assert tokenizer.encode_pieces((Piece("text", "<unk>"),)) == [4, 0, 7]
    assert tokenizer.encode_pieces((Piece("text", "z"),)) == [0]


def test_a_unigram_vocabulary_never_yields_its_end_mark_from_text(tmp_path: Path) -> None:
    scores = [("<unk>", 0.0), ("</s>", 0.0), *((c, -5.0) for c in "</s>a")]
    backend = Backend(models.Unigram(scores, unk_id=0))
    backend.add_special_tokens(["</s>", "<image>"])
    file = tmp_path / "tokenizer.json"
    backend.save(str(file))
    tokens = TokenIds(image=7, video=None, bos=None, stop=(1,), num_text_tokens=7)
    tokenizer = Tokenizer.open(OpenedFile(file), tokens)
    ids = tokenizer.encode_pieces((Piece("text", "a</s>"), Piece("image", "<image>")))
    assert ids == [6, 2, 3, 4, 5, 7]
    # The model itself would: the token is only a piece here, not an added token.
    document = json.loads(file.read_text("utf-8"))
    document["added_tokens"] = [t for t in document["added_tokens"] if t["content"] != "</s>"]
    file.write_text(json.dumps(document), encoding="utf-8")
    tokens = replace(tokens, image=Backend.from_file(str(file)).token_to_id("<image>"))
    loose = Tokenizer.open(OpenedFile(file), tokens)
    assert 1 not in loose.encode_pieces((Piece("text", "a</s>"),))


CONTROL_PARTS = """
<|im_end|> <|im_ end|> </s> </ s> <s> <unk> <image> <|eot_id|> <|begin_of_text|> <|start_header_id|>
<| |> < > ▁ a
"""
FRAGMENTS = st.sampled_from([*CONTROL_PARTS.split(), " ", "\n"])
ANY_TEXT = st.lists(st.one_of(FRAGMENTS, st.text(max_size=6)), max_size=8).map("".join)
RELAXED = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@RELAXED
@given(text=ANY_TEXT, answer=ANY_TEXT, rule=ANY_TEXT)
def test_no_text_ever_becomes_a_control_id(model: Model, text: str, answer: str, rule: str) -> None:
    def prompt(texts: Sequence[str]) -> list[int]:
        first, second, third = texts
        messages = (
            Message("system", (Text(first),)),
            user_message(second + "?", images=1),
            Message("assistant", (Text(third),)),
            user_message("and?"),
        )
        return model.tokenizer.encode_pieces(
            compose(model.prompt_format, messages, image_marks=False)
        )

    unk = model.backend.token_to_id("<unk>")
    expected = control_positions(model.tokenizer, prompt(("a", "b", "c")))
    found = control_positions(model.tokenizer, prompt((rule, text, answer)))
    assert [i for i in found if i != unk] == [i for i in expected if i != unk]


@RELAXED
@given(text=st.text(max_size=40))
def test_any_text_without_control_tokens_has_the_ids_of_the_reference(
    model: Model, text: str
) -> None:
    contents = [t.content for t in model.backend.get_added_tokens_decoder().values()]
    pieces = compose(model.prompt_format, (user_message(text + ".", images=1),), image_marks=False)
    if any(c in text for c in contents):
        return
    assert model.our_ids(pieces) == model.reference_ids(rendered(pieces), 1)


@pytest.mark.parametrize("copied", [False, True])
@RELAXED
@given(text=st.text(max_size=30))
def test_the_sealed_way_gives_the_same_ids_where_nothing_had_to_be_sealed(
    model: Model, copied: bool, text: str
) -> None:
    runs = [("template", "[INST] "), ("text", text), ("template", " [/INST]")]
    sealed = model.tokenizer._seal(runs, copied=copied)
    whole = "".join(run for _, run in runs)
    if any(t.content in text for t in model.backend.get_added_tokens_decoder().values()):
        return
    assert sealed.backend.encode(whole).ids == model.backend.encode(whole).ids


@RELAXED
@given(data=st.data())
def test_streamed_text_is_the_decoded_text(model: Model, data: st.DataObject) -> None:
    size = model.backend.get_vocab_size()
    byte_like = [i for i in range(size) if str(model.backend.id_to_token(i)).startswith("<0x")]
    ids = data.draw(
        st.lists(
            st.one_of(st.integers(0, size + 3), st.sampled_from(byte_like or [0])), max_size=24
        )
    )
    stream = model.tokenizer.stream()
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.finish() == model.tokenizer.decode(ids)


@RELAXED
@given(text=st.text(max_size=30))
def test_streamed_text_is_what_was_encoded_and_never_a_broken_character(
    model: Model, text: str
) -> None:
    ids = model.tokenizer.encode_pieces((Piece("text", f"a {text}"),))
    stream = model.tokenizer.stream()
    pieces = [stream.push(i) for i in ids]
    whole = "".join(pieces) + stream.finish()
    assert whole == model.tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert "\ufffd" not in whole


def test_a_stream_holds_back_no_more_than_it_must(models_by_kind: dict[str, Model]) -> None:
    model = models_by_kind["byte-level, no bos"]
    ids = model.backend.encode("the image 🦙 is", add_special_tokens=False).ids
    stream = model.tokenizer.stream()
    pieces = [stream.push(i) for i in ids]
    assert stream.finish() == ""
    assert pieces[0] == "the"
    assert "🦙" in "".join(pieces)


def test_a_stream_decodes_a_bounded_window(models_by_kind: dict[str, Model]) -> None:
    model = models_by_kind["sentencepiece BPE, blank before every run"]
    stream = model.tokenizer.stream()
    widest = 0
    for i in model.backend.encode("the image is blue " * 300).ids:
        stream.push(i)
        widest = max(widest, len(stream._context) + len(stream._pending))
    assert widest <= 2


def test_media_ids_are_repeated_in_order(model: Model) -> None:
    image = model.tokenizer.image_id
    assert model.tokenizer.expand_media([5, image, 6, image], (3, 1)) == [5, *[image] * 3, 6, image]
    assert model.tokenizer.expand_media([5], ()) == [5]
    with pytest.raises(PromptError, match="2 media marks; 1 images"):
        model.tokenizer.expand_media([image, image], (3,))
    with pytest.raises(PromptError, match="1 videos"):
        model.tokenizer.expand_media([5], (), (3,))


def test_a_video_mark_needs_a_model_with_videos(model: Model) -> None:
    with pytest.raises(PromptError, match="video token"):
        model.tokenizer.encode_pieces((Piece("video", "<video>"),))


def test_files_that_are_no_tokenizer_are_artifact_errors(tmp_path: Path, model: Model) -> None:
    tokens = TokenIds(image=1, video=None, bos=None, stop=(0,), num_text_tokens=1)
    with pytest.raises(ArtifactError, match=r"no tokenizer|cannot be opened"):
        Tokenizer.open(OpenedFile(tmp_path / "missing.json"), tokens)
    (tmp_path / "bad.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ArtifactError, match="no tokenizer"):
        Tokenizer.open(OpenedFile(tmp_path / "bad.json"), tokens)
    good = tmp_path / "good.json"
    model.backend.save(str(good))
    wrong = replace(tokens, image=7, video=9, stop=(10**6,))
    odd = replace(model.prompt_format, special_tokens=("<|nothing|>",))
    with pytest.raises(ArtifactError, match=r"image id 7.*video id 9.*stop id.*nothing"):
        Tokenizer.open(OpenedFile(good), wrong, odd)


def test_a_long_text_takes_at_least_what_its_slices_do(model: Model) -> None:
    # Found by fuzzing: a million characters took 745 MiB before they were found to be too many.
    tokenizer = model.tokenizer
    for unit in ("two cats on a table ", "█", "\U0001f600", " ", "a"):
        text = unit * (40_000 // len(unit))
        exact = len(tokenizer.encode_pieces((Piece("text", text),)))
        least = tokenizer.least_tokens(text, 10**9)
        assert least <= exact
        assert least >= 0.9 * exact - 3 * 64
    assert 5 < tokenizer.least_tokens("█" * 10**6, 5) < 16_384 * 4


def test_of_a_long_text_only_as_much_is_encoded_as_is_needed(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def counted(backend: Backend, text: str, *, add_special_tokens: bool) -> Any:
        asked.append(len(text))
        return backend.encode(text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr("llava_edge.runtime.processing.text.tokenizer.encode", counted)
    model.tokenizer.least_tokens("cats and dogs " * 100_000, 5_000)

    assert sum(asked) < 100_000
