"""ReferenceAnswer: everything that the reference says to one probe, computed once.

Two models answer: one with the very weights of the artifact (codes as its graph holds them, inputs
rounded as its kernels round them), which an export must match; and one with the checkpoint's own
weights, from which the loss is measured. Where both are the same they are computed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from llava_edge.convert.checkpoint.open import Checkpoint
from llava_edge.convert.verification.reference.input_sketch import InputSketch
from llava_edge.convert.verification.reference.layer_inputs import LayerInputs
from llava_edge.convert.verification.reference.media import MediaReference
from llava_edge.convert.verification.reference.probes import NUM_STEPS, Probe
from llava_edge.convert.verification.reference.processor import ReferenceProcessor
from llava_edge.convert.verification.reference.stored_linears import StoredLinears
from llava_edge.convert.verification.reference.streamed_model import (
    LinearSupply,
    ReferenceInputs,
    StreamedModel,
)
from llava_edge.convert.verification.tokenizer.artifact import artifact_tokenizer
from llava_edge.profiles.errors import ArtifactError
from llava_edge.runtime.artifact.open import Artifact
from llava_edge.runtime.artifact.prompt_date import COMPARED_NOW
from llava_edge.runtime.processing.images.image_processor import ImageProcessor
from llava_edge.runtime.processing.text.chat_prompt import (
    Message,
    Piece,
    compose,
    rendered,
    user_message,
)
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.verification.tolerances import bounds_for

_MOST_KEPT = 64
"""Prompt positions, the last ones, whose logits are looked at."""
_MIN_CHUNKS = 3
"""A prompt is cut at least so often, so that what happens at a border is seen."""


@dataclass(frozen=True)
class Positions:
    """Which positions of prompt and forced answer are computed together, and which are looked at.

    Attributes:
        num_prompt: tokens of the prompt.
        num_steps: forced tokens behind it, one at a time.
        chunk: prompt tokens computed at once.
        keep_from: first position whose logits are compared.
    """

    num_prompt: int
    num_steps: int
    chunk: int
    keep_from: int

    @classmethod
    def of(cls, num_prompt: int, num_steps: int, largest_chunk: int) -> Positions:
        """Cut a prompt; the kept positions lie in its last chunk, as the runtime's loop wants."""
        chunk = max(1, min(largest_chunk, -(-num_prompt // _MIN_CHUNKS)))
        last = num_prompt - (num_prompt - 1) // chunk * chunk
        # Not the whole chunk, where it has more: which positions are kept is to be seen as well.
        return cls(num_prompt, num_steps, chunk, num_prompt - min(_MOST_KEPT, max(1, last - 1)))

    @property
    def total(self) -> int:
        """Prompt and steps."""
        return self.num_prompt + self.num_steps

    def runs(self) -> Iterator[tuple[int, int]]:
        """First position and position after the last of every run of the decoder."""
        for start in range(0, self.num_prompt, self.chunk):
            yield start, min(start + self.chunk, self.num_prompt)
        yield from ((place, place + 1) for place in range(self.num_prompt, self.total))

    @property
    def kept(self) -> range:
        """All positions that are looked at."""
        return range(self.keep_from, self.total)

    @property
    def num_prefill(self) -> int:
        """How many of the kept positions belong to the prompt."""
        return self.num_prompt - self.keep_from


@dataclass(frozen=True)
class ReferenceAnswer:
    """What the reference says to one probe.

    Attributes:
        probe: the question.
        inputs: as the reference's processor made them, prompt only.
        forced: int64 [steps], the true answer, repeated to fill.
        num_answer: how many of ``forced`` are the answer itself.
        positions: see there.
        features: float32 [tiles, patches, hidden], by the artifact's own weights.
        original_features: the same by the checkpoint's weights.
        embeddings: float32 [positions, hidden].
        export: float32 [kept, vocab], by the artifact's own weights.
        original: float32 [kept, vocab], by the checkpoint's weights.
    """

    probe: Probe
    inputs: ReferenceInputs
    forced: Array
    num_answer: int
    positions: Positions
    features: Array
    embeddings: Array
    export: Array
    original: Array
    original_features: Array


class Reference:
    """The reference for one artifact.

    Args:
        artifact: decides candidates, tokenizer of the forced answers, and chunks.
        checkpoint: what it was made from.
        supply: the artifact's quantised weights; None at fp16.

    Attributes:
        checkpoint: as given.
        sketch: of what the checkpoint's own layers read on the answers that are remembered.
    """

    def __init__(
        self, artifact: Artifact, checkpoint: Checkpoint, supply: LinearSupply | None
    ) -> None:
        manifest = artifact.manifest
        pinpoints = ImageProcessor(manifest.image_processing).anyres.candidates
        # A config.json of the original code names no mark: the tokenizer's is taken on both sides.
        mark = manifest.tokens.image if checkpoint.layout == "original" else None
        self.processor = ReferenceProcessor(checkpoint, pinpoints, mark)
        self.model = StreamedModel(checkpoint, pinpoints, image_token_id=mark)
        self.checkpoint = checkpoint
        self.supply = supply
        self._original: StreamedModel | None = None
        self._own = None if checkpoint.gptq is None else StoredLinears(checkpoint)
        if supply is not None or any(ref.dtype != "F16" for ref in checkpoint.tensors.values()):
            self._original = StreamedModel(
                checkpoint, pinpoints, as_stored=False, image_token_id=mark
            )
        self._manifest = manifest
        self._tokenizer = artifact_tokenizer(artifact)
        self._answers: dict[str, ReferenceAnswer] = {}
        self.sketch = InputSketch()
        self._layers: dict[str, LayerInputs] = {}
        self._keeps_layers = bounds_for(manifest.target, manifest.precision).compares_layers

    def close(self) -> None:
        """Remove what lies in files; answers stay, and what layers read is computed anew."""
        self.sketch.close()
        for kept in self._layers.values():
            kept.close()
        self._layers.clear()

    @cached_property
    def media(self) -> MediaReference:
        """Picture and video files, and what is read of them."""
        anyres = ImageProcessor(self._manifest.image_processing).anyres
        return MediaReference(self._manifest, anyres, self)

    @property
    def models(self) -> list[tuple[StreamedModel, LinearSupply | None]]:
        """With the artifact's weights and, where they differ, with the checkpoint's own."""
        own = [] if self._original is None else [(self._original, self._own)]
        return [(self.model, self.supply), *own]

    def remembers(self, probe: Probe) -> bool:
        """Whether it has answered a probe, and will not compute anew."""
        return probe.name in self._answers

    def norm_scale(self, name: str) -> Array | None:
        """What the artifact divides a layer norm's output by; None for nothing."""
        if self.supply is None:
            return None
        for layer, norm in ((".self_attn.q_proj", ".layer_norm1"), (".mlp.fc1", ".layer_norm2")):
            if name.endswith(norm):
                reader = name.removesuffix(norm) + layer
                return self.supply.input_scale(reader) if self.supply.holds(reader) else None
        return None

    def text(self, probe: Probe) -> str:
        """The finished prompt by the checkpoint's own template, else its family's."""
        if self._manifest.prompt is None:
            return probe.prompt(raw=True)
        return self.rendered(_asked(probe))

    def render_ahead(self, probes: Sequence[Probe]) -> None:
        """Render what probes and files need together: one child process in place of many.

        Raises:
            CheckpointError: the template leaves its bounds.
        """
        if self._manifest.prompt is not None:
            asked = [_asked(probe) for probe in probes]
            self.processor.render_ahead([*asked, *self.media.conversations.values()])

    def rendered(self, messages: Sequence[Message]) -> str:
        """A conversation by the checkpoint's own template, else its family's.

        Raises:
            ArtifactError: the artifact has no template.
        """
        if self.processor.has_template:
            return self.processor.render(messages)
        if self._manifest.prompt is None:
            raise ArtifactError("the artifact has no chat template to render a conversation with")
        return rendered(compose(self._manifest.prompt, messages, now=COMPARED_NOW))

    def inputs(self, probe: Probe) -> ReferenceInputs:
        """Ids and tiles of a probe; image tokens are counted by the reference's own packing."""
        frames = None if not probe.video else self.processor.frames(probe.video)
        tiles = [self.processor.pixels(image) for image in probe.images]
        sizes = [(image.height, image.width) for image in probe.images]
        return self.prepare(self.text(probe), tiles, sizes, frames)

    def prepare(
        self,
        text: str,
        tiles: Sequence[torch.Tensor],
        sizes: Sequence[tuple[int, int]],
        frames: torch.Tensor | None,
    ) -> ReferenceInputs:
        """Inputs of a finished prompt with one mark for each image, and one for the frames."""
        patches = self._manifest.model.vision.num_patches
        blank = [torch.zeros(len(pixels), patches, 1) for pixels in tiles]
        packed = self.model.pack(blank, sizes, torch.zeros(1)) if blank else []
        return self.processor.prepare(text, tiles, sizes, [len(p) for p in packed], frames)

    def answer(self, probe: Probe, *, remember: bool = False) -> ReferenceAnswer:
        """Answer a probe with its true answer forced.

        Args:
            probe: the question.
            remember: keep the result for the next call, and what layers read where layers are
                compared one by one.

        Raises:
            ArtifactError: the prompt does not fit the artifact's context.
        """
        if probe.name in self._answers:
            return self._answers[probe.name]
        inputs = self.inputs(probe)
        room = self._manifest.context_tokens - len(inputs.ids)
        if room < 1:
            raise ArtifactError(
                f"the probe {probe.name!r} takes {len(inputs.ids)} tokens; the context holds "
                f"{self._manifest.context_tokens}"
            )
        ids = self.answer_ids(probe.answer)
        steps = min(NUM_STEPS, room)
        forced = np.resize(np.asarray(ids, np.int64), steps)
        positions = Positions.of(len(inputs.ids), steps, self._manifest.prefill_chunk)
        watched = self._watching(probe, inputs, forced) if remember else nullcontext()
        layers = self._new_layer_inputs() if remember and self._keeps_layers else None
        found = ReferenceAnswer(
            probe,
            inputs,
            forced,
            min(len(ids), steps),
            positions,
            *self._run(inputs, forced, positions, watched, layers),
        )
        if remember:
            self._answers[probe.name] = found
            if layers is not None and layers.error is None:
                self._layers[probe.name] = layers
        return found

    def layer_inputs(self, answer: ReferenceAnswer) -> LayerInputs:
        """What each layer with the artifact's own weights read for an answer; kept until closed.

        Raises:
            OSError: there is no place for it.
        """
        name = answer.probe.name
        if name not in self._layers:
            found = self._new_layer_inputs()
            self.model.use(self.supply)
            with found.watching(self.model):
                self.model.hidden(torch.from_numpy(answer.embeddings))
            if found.error is not None:
                raise found.error
            self._layers[name] = found
        return self._layers[name]

    def _new_layer_inputs(self) -> LayerInputs:
        return LayerInputs(self._manifest.model.text.num_hidden_layers)

    def logits(self, answer: ReferenceAnswer, supply: LinearSupply) -> Array:
        """Logits of an answer's kept positions by other weights of the language model."""
        self.model.use(supply)
        embeddings = torch.from_numpy(answer.embeddings)
        found: Array = self.model.decode(embeddings, answer.positions.kept).numpy()
        return found

    def following(
        self, inputs: ReferenceInputs, tokens: Sequence[int], layers: int | None = None
    ) -> Array:
        """Logits behind a prompt and behind each of some tokens, float32 [1 + tokens, vocab].

        Args:
            inputs: the prompt.
            tokens: the answer.
            layers: as ``StreamedModel.decode``.
        """
        forced = np.asarray(tokens, np.int64)
        first = len(inputs.ids) - 1
        kept = range(first, first + 1 + len(forced))
        self.model.use(self.supply)
        prompt = self._remembered_rows(inputs)
        if prompt is None:
            _, prompt = self.model.embed(inputs)
        rows = torch.cat([prompt, self.model.token_rows(torch.from_numpy(forced))])
        found: Array = self.model.decode(rows, kept, layers).numpy()
        return found

    def _remembered_rows(self, inputs: ReferenceInputs) -> torch.Tensor | None:
        """Embeddings of a prompt that was answered before: the tower need not run again."""
        for answer in self._answers.values():
            if answer.inputs.equals(inputs):
                return torch.from_numpy(answer.embeddings[: len(inputs.ids)])
        return None

    def answer_ids(self, text: str) -> list[int]:
        """Ids of an answer, without what the tokenizer puts before a prompt."""
        ids = self._tokenizer.encode_pieces((Piece("text", text),))
        bos = self._manifest.tokens.bos
        return ids[1:] if ids[:1] == [bos] else ids

    def _watching(
        self, probe: Probe, inputs: ReferenceInputs, forced: Array
    ) -> AbstractContextManager[None]:
        """Have the sketch see what the checkpoint's layers read, where weights are quantised."""
        if self.supply is None or self._original is None:
            return nullcontext()
        tokens = self._manifest.tokens
        marks = [mark for mark in (tokens.image, tokens.video) if mark is not None]
        in_prompt = torch.isin(inputs.ids, torch.tensor(marks))
        is_image = torch.cat([in_prompt, torch.zeros(len(forced), dtype=torch.bool)])
        count = self._manifest.model.text.num_hidden_layers
        return self.sketch.watching(self._original, count, probe.name, is_image)

    def _run(
        self,
        inputs: ReferenceInputs,
        forced: Array,
        positions: Positions,
        watched: AbstractContextManager[None],
        layers: LayerInputs | None,
    ) -> tuple[Array, Array, Array, Array, Array]:
        kept = positions.kept
        with nullcontext() if layers is None else layers.watching(self.model):
            features, embeddings, export = self._model_logits(
                self.model, self.supply, inputs, forced, kept
            )
        own_features, original = features, export
        if self._original is not None:
            with watched:
                own_features, _, original = self._model_logits(
                    self._original, self._own, inputs, forced, kept
                )
        return features, embeddings, export, original, own_features

    def _model_logits(
        self,
        model: StreamedModel,
        supply: LinearSupply | None,
        inputs: ReferenceInputs,
        forced: Array,
        kept: range,
    ) -> tuple[Array, Array, Array]:
        model.use(supply)
        features, prompt = model.embed(inputs)
        embeddings = torch.cat([prompt, model.token_rows(torch.from_numpy(forced))])
        logits: Any = model.decode(embeddings, kept).numpy()
        return features.numpy(), embeddings.numpy(), logits


def _asked(probe: Probe) -> list[Message]:
    return [user_message(probe.question, len(probe.images), probe.num_videos)]
