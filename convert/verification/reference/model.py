"""The reference: transformers' own model and processor, in float32, at the pinned version.

Used to show its answer beside ours and by tests; the runtime never sees it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from llava_edge.convert.checkpoint.transformers_loader import load_model, load_processor
from llava_edge.convert.text.template_sandbox import ChatRequest, render_all
from llava_edge.convert.text.tokenizer import build_tokenizer_json
from llava_edge.convert.util.text_files import read_object
from llava_edge.convert.verification.reference.video import frame_pixels
from llava_edge.profiles.errors import CheckpointError


class ReferenceModel:
    """A checkpoint folder in Hugging Face layout, loaded whole in float32 on the CPU."""

    def __init__(self, folder: Path) -> None:
        stand_in = None
        if not (folder / "tokenizer.json").is_file() and (folder / "tokenizer.model").is_file():
            stand_in = build_tokenizer_json(folder, read_object(folder / "config.json"))
        self.processor: Any = load_processor(folder, stand_in)
        self.model: Any = load_model(folder)

    def render(self, prompt: str, num_images: int, num_videos: int = 0) -> str:
        """One user turn through the checkpoint's chat template, images first, then videos.

        Raises:
            CheckpointError: the template refuses it, or leaves its bounds.
        """
        media = [{"type": "image"}] * num_images + [{"type": "video"}] * num_videos
        content = [*media, {"type": "text", "text": prompt}]
        request = ChatRequest(({"role": "user", "content": content},), clock=time.time())
        (answer,) = render_all(
            self.processor.chat_template, self.processor.tokenizer.special_tokens_map, [request]
        )
        if answer.text is None:
            raise CheckpointError(f"the chat template refuses the question: {answer.error}")
        return answer.text

    def prepare(self, text: str, images: Sequence[Image], video: Sequence[Image] = ()) -> Any:
        """Model inputs of a finished prompt; all frames of a video are looked at."""
        if not video:
            return self.processor(images=list(images) or None, text=text, return_tensors="pt")
        vision = self.model.config.vision_config
        frames = frame_pixels(video, {}, vision.image_size)
        # As LlavaNextVideoProcessor counts them.
        count = (vision.image_size // vision.patch_size) ** 2 // 4 * len(video)
        expanded = text.replace("<video>", "<video>" * count)
        inputs = self.processor(images=list(images) or None, text=expanded, return_tensors="pt")
        inputs["pixel_values_videos"] = frames[None]
        return inputs

    def greedy(self, inputs: Any, max_new_tokens: int) -> list[int]:
        """New token ids of the greedy answer, the stop token included."""
        with torch.no_grad():
            ids = self.model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        new: list[int] = ids[0, inputs["input_ids"].shape[1] :].tolist()
        return new

    def logits(self, inputs: Any, appended: Sequence[int] = ()) -> torch.Tensor:
        """float32 (tokens + appended, vocab) of the prompt with ``appended`` ids behind it."""
        values = dict(inputs)
        if appended:
            tail = torch.tensor([list(appended)])
            values["input_ids"] = torch.cat([values["input_ids"], tail], dim=1)
            values["attention_mask"] = torch.ones_like(values["input_ids"])
        with torch.no_grad():
            output = self.model(**values)
        logits: torch.Tensor = output.logits[0].float()
        return logits
