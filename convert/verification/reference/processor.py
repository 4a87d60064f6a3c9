"""ReferenceProcessor: transformers' own processor for a checkpoint, at the artifact's candidates.

Checkpoints in the original layout have no processor files: their image processor is made from the
values that the original code has, and their prompts are joined as it does, chunk by chunk around
the image marks.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import torch
from PIL.Image import Image

from llava_edge.convert.checkpoint.open import Checkpoint
from llava_edge.convert.checkpoint.transformers_loader import image_processor, load_processor
from llava_edge.convert.text.template_sandbox import ChatRequest, Environment, Rendering, render_all
from llava_edge.convert.text.tokenizer import build_tokenizer_json
from llava_edge.convert.verification.reference.streamed_model import ReferenceInputs
from llava_edge.convert.verification.reference.video import frame_pixels
from llava_edge.convert.verification.tokenizer.reference import (
    reads_sentencepiece,
    reference_tokenizer,
)
from llava_edge.profiles.errors import CheckpointError
from llava_edge.runtime.artifact.prompt_date import COMPARED_NOW
from llava_edge.runtime.processing.text.chat_prompt import MARKS, Media, Message, Text

_MARK = MARKS["image"]
_STYLES: tuple[dict[str, str], ...] = (
    {"user": "list", "assistant": "list", "system": "list"},
    {"user": "list", "assistant": "list", "system": "string"},
    {"user": "list", "assistant": "string", "system": "list"},
    {"user": "list", "assistant": "string", "system": "string"},
    {"user": "string", "assistant": "string", "system": "string"},
    {"user": "marks", "assistant": "list", "system": "list"},
)
"""How a template may want the content of each role; ``marks`` is a list of one text with marks."""


class ReferenceProcessor:
    """Prompts and pixels as the reference makes them.

    Args:
        checkpoint: the model.
        pinpoints: candidates (height, width) in the order that decides ties; empty for a thumbnail
            alone.
        image_token_id: of the image mark, where config.json does not name it.

    Raises:
        CheckpointError: the libraries cannot read the checkpoint's processor or tokenizer.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        pinpoints: Sequence[tuple[int, int]],
        image_token_id: int | None = None,
    ) -> None:
        own = checkpoint.dims.image_token_id
        self._image_id = own if image_token_id is None else image_token_id
        self._video_id = checkpoint.dims.video_token_id
        self._has_tiles = bool(pinpoints)
        side = self._side = checkpoint.dims.vision.image_size
        self._patch = checkpoint.dims.vision.patch_size
        self._video_settings: dict[str, Any] = {}
        if checkpoint.dims.takes_video:
            self._video_settings = checkpoint.video_preprocessor_config()
        self._crops = checkpoint.dims.model_type == "llava"
        listed = [list(point) for point in pinpoints] or [[side, side]]
        values = {**checkpoint.preprocessor_config(), "image_grid_pinpoints": listed}
        self._images = image_processor(values, crops=self._crops)
        folder, config = checkpoint.folder, checkpoint.config
        marks = {MARKS["image"]: self._image_id}
        if self._video_id is not None:
            marks[MARKS["video"]] = self._video_id
        is_original = checkpoint.layout == "original"
        self.tokenizer = reference_tokenizer(folder, config, marks, is_original=is_original)
        self._processor: Any = None
        self._rendered: dict[tuple[Message, ...], Rendering] = {}
        if not is_original:
            # Where sentencepiece is the reference, this one serves templates alone.
            own = not reads_sentencepiece(folder, marks)
            stand_in = None if own else build_tokenizer_json(folder, config)
            self._processor = load_processor(folder, stand_in)
            self._processor.image_processor = self._images

    @property
    def has_template(self) -> bool:
        """Whether the checkpoint brings a chat template."""
        return bool(self._processor is not None and self._processor.chat_template)

    @property
    def control_tokens(self) -> frozenset[str]:
        """Texts of the tokenizer's added tokens, which people's text must not become."""
        return frozenset(text for text in self.tokenizer.added if text.strip())

    @property
    def bos_id(self) -> int | None:
        """What the tokenizer calls the beginning of a sequence."""
        return None if self.tokenizer.bos is None else self.tokenizer.id_of(self.tokenizer.bos)

    @property
    def eos_ids(self) -> frozenset[int]:
        """What the tokenizer calls the end of a sequence."""
        found = None if self.tokenizer.eos is None else self.tokenizer.id_of(self.tokenizer.eos)
        return frozenset() if found is None else frozenset({found})

    def render(self, messages: Sequence[Message]) -> str:
        """A conversation through the checkpoint's template, opened for an answer.

        Dates in it are those of ``COMPARED_NOW``.

        Raises:
            CheckpointError: the template takes no form of the messages, or leaves its bounds.
        """
        self.render_ahead([messages])
        known = self._rendered[tuple(messages)]
        if known.text is None:
            raise CheckpointError(f"the chat template takes no form of the messages: {known.error}")
        return known.text

    def render_ahead(self, conversations: Sequence[Sequence[Message]]) -> None:
        """Render conversations together, which takes one child process for all, and keep them.

        Raises:
            CheckpointError: as ``render``, but for messages of which no form is taken.
        """
        new = [each for each in map(tuple, conversations) if each not in self._rendered]
        if new and self.has_template:
            found = self.render_all([(each, COMPARED_NOW) for each in new], environment="own")
            self._rendered |= dict(zip(new, found, strict=True))

    def render_all(
        self,
        conversations: Sequence[tuple[Sequence[Message], datetime]],
        *,
        environment: Environment = "transformers",
    ) -> list[Rendering]:
        """Conversations, each at a time, through the checkpoint's template.

        The template is the one that transformers found in the checkpoint, with the special tokens
        that it read there; a child process with bounds renders it.

        Raises:
            CheckpointError: the template does not parse, or leaves its bounds.
        """
        requests = [
            ChatRequest(
                tuple(_said(m, style[m.role]) for m in messages),
                clock=now.timestamp(),
            )
            for messages, now in conversations
            for style in _STYLES
        ]
        answers = render_all(
            self._template(),
            self._processor.tokenizer.special_tokens_map,
            requests,
            environment=environment,
        )
        pairs = iter(zip(requests, answers, strict=True))
        written = [[_written(*next(pairs)) for _ in _STYLES] for _ in conversations]
        shown = [
            [form.text is not None and _shows(messages, form.text) for form in forms]
            for (messages, _), forms in zip(conversations, written, strict=True)
        ]
        # A template may leave a text out (earlier reasoning); its form is that of the others.
        usual = max(range(len(_STYLES)), key=lambda style: sum(row[style] for row in shown))
        found = []
        for forms, row in zip(written, shown, strict=True):
            chosen = forms[row.index(True) if True in row else usual]
            if not any(map(any, shown)) or chosen.text is None:
                errors = (form.error or f"it wrote {form.text!r:.120}" for form in forms)
                chosen = Rendering(None, "; ".join(errors))
            found.append(chosen)
        return found

    def _template(self) -> str:
        found = self._processor.chat_template
        return str(found["default"] if isinstance(found, dict) else found)

    def ids(self, text: str) -> list[int]:
        """Ids of a finished prompt, one for each image mark."""
        bos = self.tokenizer.bos
        if self._processor is not None:
            # As the library's processors do with what a template wrote: no second bos.
            return self.tokenizer.ids(text, adds_bos=not (bos and text.startswith(bos)))
        # As the original code: chunks are encoded apart, and only the first keeps its bos.
        found: list[int] = []
        for place, chunk in enumerate(text.split(_MARK)):
            ids = self.tokenizer.ids(chunk)
            if place:
                found.append(self._image_id)
                ids = ids[1:] if bos is not None and ids[:1] == [self.bos_id] else ids
            found += ids
        return found

    def pixels(self, image: Image) -> torch.Tensor:
        """Tiles of one image, thumbnail first, float32 [tiles, 3, T, T]."""
        made: torch.Tensor = self._images(images=[image], return_tensors="pt")["pixel_values"][0]
        if self._crops:
            return made[None]
        return made if self._has_tiles else made[:1]

    def frames(self, video: Sequence[Image]) -> torch.Tensor:
        """Pixels of a video's frames, float32 [frames, 3, T, T]; see ``reference_video``."""
        return frame_pixels(video, self._video_settings, self._side)

    def prepare(
        self,
        text: str,
        tiles: Sequence[torch.Tensor],
        sizes: Sequence[tuple[int, int]],
        counts: Sequence[int],
        frames: torch.Tensor | None = None,
    ) -> ReferenceInputs:
        """Inputs of a finished prompt.

        Args:
            text: with one mark an image, and one for the video.
            tiles: pixels of each image, in order.
            sizes: height and width of each image.
            counts: tokens of each image; the model itself refuses wrong ones.
            frames: pixels of the video.
        """
        left = list(counts)[::-1]
        ids: list[int] = []
        for each in self.ids(text):
            if each == self._image_id:
                ids += [each] * left.pop()
            elif each == self._video_id and frames is not None:
                # As the library's processor counts them.
                ids += [each] * ((self._side // self._patch) ** 2 // 4 * len(frames))
            else:
                ids.append(each)
        return ReferenceInputs(torch.tensor(ids), tuple(tiles), tuple(sizes), frames)


def _said(message: Message, form: str) -> dict[str, Any]:
    content: Any
    if form == "list":
        content = [
            {"type": "text", "text": part.text} if isinstance(part, Text) else {"type": part.kind}
            for part in message.parts
        ]
    else:
        media = "".join(f"{MARKS[p.kind]}\n" for p in message.parts if isinstance(p, Media))
        content = media + "".join(p.text for p in message.parts if isinstance(p, Text))
        if form == "marks":
            content = [{"type": "text", "text": content}]
    return {"role": message.role, "content": content}


def _shows(messages: Sequence[Message], text: str) -> bool:
    """Whether every text and image of the messages is in what the template wrote."""
    parts = [part for message in messages for part in message.parts]
    texts = [part.text.strip() for part in parts if isinstance(part, Text)]
    counts = Counter(part.kind for part in parts if isinstance(part, Media))
    shows_media = all(text.count(MARKS[kind]) >= count for kind, count in counts.items())
    return all(each in text for each in texts) and shows_media


def _written(request: ChatRequest, answer: Rendering) -> Rendering:
    """The answer, or an error where a part of a list was printed as such, not its text."""
    contents = (message["content"] for message in request.messages)
    parts = [part for content in contents if isinstance(content, list) for part in content]
    text = answer.text or ""
    if any(str(p) in text or json.dumps(p, ensure_ascii=False) in text for p in parts):
        return Rendering(None, f"it wrote {text!r:.120}")
    return answer
