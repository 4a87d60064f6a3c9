"""StreamedModel: transformers' own LLaVA-NeXT, with weights in memory only while they are used.

The model is built without weights (torch's meta device); every module reads its tensors from the
checkpoint right before it runs and lets them go right after. So the arithmetic, the merging of
image and text and the order of everything are the reference's own code, in the memory of one linear
layer. Embedding rows are read by position, the head some rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling

from llava_edge.convert.checkpoint.open import Checkpoint
from llava_edge.convert.checkpoint.transformers_loader import meta_model
from llava_edge.convert.checkpoint.weights import as_float16
from llava_edge.profiles.errors import CheckpointError

_EMBED_TOKENS = "language_model.embed_tokens.weight"
_HEAD = "lm_head"
_HEAD_ROWS = 8192


class LinearSupply(Protocol):
    """Weights that linear layers take in place of the checkpoint's."""

    def holds(self, name: str) -> bool:
        """Whether a layer (canonical, without ``.weight``) takes its weight from here."""

    def linear(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        """Weight [outputs, inputs] of a layer (canonical, without ``.weight``), or some rows."""

    def rounding(self, name: str) -> int | None:
        """Inputs rounded to 8 bits as one: a block's length, -1 the row, None for no rounding.

        -2 is the row as well, in 63 steps each way, and what is left over in 126 of each step.
        """

    def input_scale(self, name: str) -> NDArray[np.float32] | None:
        """What inputs [inputs] are divided by before that; the weight is for what is left."""


@dataclass(frozen=True)
class ReferenceInputs:
    """One prompt as the reference's processor made it.

    Attributes:
        ids: int64 [tokens].
        pixel_values: float32 [tiles, 3, T, T] of each image.
        image_sizes: (height, width) of each image.
        frame_pixels: float32 [frames, 3, T, T] of a video, where there is one.
    """

    ids: torch.Tensor
    pixel_values: tuple[torch.Tensor, ...]
    image_sizes: tuple[tuple[int, int], ...]
    frame_pixels: torch.Tensor | None = None

    def equals(self, other: ReferenceInputs) -> bool:
        """Whether both are the same prompt, to the last pixel."""
        mine, theirs = (
            [
                each.ids,
                *each.pixel_values,
                *([] if each.frame_pixels is None else [each.frame_pixels]),
            ]
            for each in (self, other)
        )
        sizes = (self.image_sizes, len(mine)) == (other.image_sizes, len(theirs))
        return sizes and all(map(torch.equal, mine, theirs))


class StreamedModel:
    """The reference for one checkpoint, in float32 on the CPU.

    Args:
        checkpoint: in any layout; tensors are found by canonical name.
        pinpoints: candidates (height, width) in the order that decides ties; empty for a thumbnail
            alone.
        as_stored: take tensors as an artifact stores them, rounded to fp16; else as they are.
        image_token_id: of the image mark, where config.json does not name it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        pinpoints: Sequence[tuple[int, int]],
        *,
        as_stored: bool = True,
        image_token_id: int | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._as_stored = as_stored
        self._supply: LinearSupply | None = None
        config = {
            key: value for key, value in checkpoint.config.items() if key != "quantization_config"
        }
        if image_token_id is not None:
            config["image_token_index"] = image_token_id
        if pinpoints:
            config["image_grid_pinpoints"] = [list(point) for point in pinpoints]
        self._has_tiles = bool(pinpoints)
        self._crops = config["model_type"] == "llava"
        whole = meta_model(config).to(torch.float32).eval()
        self.config: Any = whole.config
        self._core: Any = whole.model
        self._language: Any = self._core.language_model
        embed = _StreamedEmbedding(self._rows, checkpoint.dims.text.hidden_size)
        self._language.embed_tokens = embed
        self._core.language_model = _Echo(embed)
        self._materialise_buffers()
        self._attach(self._core, "")
        self._attach(self._language, "language_model")

    def use(self, supply: LinearSupply | None) -> None:
        """Take other weights for linear layers from now on."""
        self._supply = supply

    def embed(self, inputs: ReferenceInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """What the language model reads.

        Returns:
            Features of all tiles, float32 [tiles, patches, hidden] (no tile without an image), or
            of all frames of a video, [frames, tokens, hidden]; where there are both, the rows of
            each tile stand as if it were several frames. And the merged embeddings, float32
            [tokens, hidden].
        """
        seen: list[torch.Tensor] = []
        hook = self._core.multi_modal_projector.register_forward_hook(
            lambda _module, _args, output: seen.append(output)
        )
        try:
            with torch.no_grad():
                given = self._images(inputs)
                if inputs.frame_pixels is not None:
                    self._add_video(given, inputs.frame_pixels[None])
                merged = self._core(input_ids=inputs.ids[None], **given)
        finally:
            hook.remove()
        dims = self._checkpoint.dims
        empty = torch.empty(0, dims.vision.num_patches, dims.text.hidden_size)
        # The library encodes images first, then the video.
        rows = min((each.shape[1] for each in seen), default=1)
        parts = [each.reshape(-1, rows, dims.text.hidden_size) for each in seen]
        features = torch.cat(parts) if parts else empty
        return features, merged.last_hidden_state[0]

    def tile_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Tower and projector on some tiles [n, 3, T, T], float32 [n, patches, hidden]."""
        layer = self.config.vision_feature_layer
        with torch.no_grad():
            states = self._core.vision_tower(pixels, output_hidden_states=True).hidden_states
            chosen = [layer] if isinstance(layer, int) else layer
            selected = torch.cat([states[each] for each in chosen], dim=-1)[:, 1:]
            features: torch.Tensor = self._core.multi_modal_projector(selected)
        return features

    def token_rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Embedding rows of an answer's tokens, float32 [tokens, hidden].

        In an answer the id of an image mark is a token like any other.
        """
        return self._rows(ids)

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        """The reference's own pooling of frames [frames, patches, width]."""
        pooled: torch.Tensor = self._core.vision_resampler(features)
        return pooled

    def pack(
        self,
        features: Sequence[torch.Tensor],
        image_sizes: Sequence[tuple[int, int]],
        newline: torch.Tensor,
    ) -> list[torch.Tensor]:
        """The reference's own packing of features [tiles, patches, width], by image."""
        if self._crops:
            # Nothing is packed: the library takes the features of each image as they are.
            return [tiles[0] for tiles in features]
        packed, _ = self._core.pack_image_features(
            list(features), torch.tensor(list(image_sizes)), "default", newline
        )
        return list(packed)

    def decode(
        self, embeddings: torch.Tensor, keep: Sequence[int], layers: int | None = None
    ) -> torch.Tensor:
        """Logits, float32 [len(keep), vocab], at some positions of embeddings [tokens, hidden].

        Args:
            embeddings: what the first layer reads.
            keep: the positions.
            layers: so many of the first layers, with the head right behind them; None for all.
        """
        return self.head(self.hidden(embeddings, layers)[list(keep)])

    def hidden(self, embeddings: torch.Tensor, layers: int | None = None) -> torch.Tensor:
        """Normed hidden states behind the last layer that runs, float32 [tokens, hidden]."""
        whole = self._language.layers
        try:
            self._language.layers = whole if layers is None else whole[:layers]
            with torch.no_grad():
                output = self._language(inputs_embeds=embeddings[None], use_cache=False)
        finally:
            self._language.layers = whole
        states: torch.Tensor = output.last_hidden_state[0]
        return states

    def layer(self, index: int, rows: torch.Tensor) -> torch.Tensor:
        """One decoder layer by itself: float32 [tokens, hidden] in and out."""
        seen: list[torch.Tensor] = []
        layers = self._language.layers
        # The others hand on what they get: masks, angles and the order of layers stay the
        # library's own affair.
        others = [layer if i == index else _PassThrough() for i, layer in enumerate(layers)]
        self._language.layers = nn.ModuleList(others)
        try:
            with self.observed(["language_model.norm"], lambda _n, first, _o: seen.append(first)):
                self.hidden(rows)
        finally:
            self._language.layers = layers
        return seen[0][0]

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of normed hidden states [rows, hidden], some rows of the weight at a time."""
        block = None if self._supply is None else self._supply.rounding(_HEAD)
        rows = hidden if block is None else _rounded(hidden, block)
        vocab = self._checkpoint.dims.text.vocab_size
        parts: list[torch.Tensor] = []
        for first in range(0, vocab, _HEAD_ROWS):
            chosen = slice(first, min(first + _HEAD_ROWS, vocab))
            parts.append(rows @ self._head_rows(chosen).T)
        return torch.cat(parts, dim=1)

    @contextmanager
    def observed(
        self, modules: Sequence[str], see: Callable[[str, torch.Tensor, torch.Tensor], None]
    ) -> Iterator[None]:
        """Have ``see(name, first input, output)`` called whenever one of some modules ran.

        Args:
            modules: canonical names, such as ``language_model.layers.3.self_attn.q_proj``.
            see: told about each call.
        """
        hooks: list[Any] = []
        given: dict[str, torch.Tensor] = {}

        def watch(name: str) -> None:
            def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
                given[name] = args[0] if args else kwargs["hidden_states"]

            def behind(_module: nn.Module, _args: Any, output: Any) -> None:
                see(name, given.pop(name), output[0] if isinstance(output, tuple) else output)

            module = self.module(name)
            # First of all hooks: what the others make of the input, such as rounding it, is
            # the module's own affair.
            hooks.append(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
            hooks.append(module.register_forward_hook(behind))

        for name in modules:
            watch(name)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def module(self, name: str) -> nn.Module:
        """A module by canonical name."""
        inside = name.removeprefix("language_model.")
        root: nn.Module = self._core if inside == name else self._language
        return root.get_submodule(inside)

    def _images(self, inputs: ReferenceInputs) -> dict[str, Any]:
        if not inputs.pixel_values:
            return {}
        pixels = torch.cat(inputs.pixel_values)
        if self._crops:
            return {"pixel_values": pixels}
        sizes = torch.tensor(inputs.image_sizes)
        if self._has_tiles:
            return {"pixel_values": pixels, "image_sizes": sizes}
        # Without candidates the library's forward has no grid to look for; its packing takes a
        # thumbnail alone all the same.
        features = self.tile_features(pixels)
        newline = self._read("image_newline")
        packed = self.pack([each[None] for each in features], inputs.image_sizes, newline)
        # The library itself puts the list of images there.
        output = BaseModelOutputWithPooling(pooler_output=cast(Any, packed))
        return {"mm_encoder_outputs": {"image": output}}

    def _add_video(self, given: dict[str, Any], frames: torch.Tensor) -> None:
        """Have the library read a video [1, frames, 3, T, T] beside images, however those come."""
        encoded = given.get("mm_encoder_outputs")
        if encoded is None:
            given["pixel_values_videos"] = frames
        else:
            # It takes pixels or features, not both kinds.
            encoded["video"] = self._core.get_video_features(frames, return_dict=True)

    def _attach(self, root: nn.Module, prefix: str) -> None:
        """Have every module of a tree load its own tensors before it runs."""
        for path, module in root.named_modules():
            names = [name for name, _ in module.named_parameters(recurse=False)]
            if not names:
                continue
            full = ".".join(part for part in (prefix, path) if part)
            module.register_forward_pre_hook(self._loader(full, names))
            module.register_forward_hook(_dropper(names), always_call=True)

    def _loader(self, path: str, names: Sequence[str]) -> Callable[..., Any]:
        def load(module: nn.Module, args: Any) -> Any:
            supplied = self._supplied(path)
            for name in names:
                meta = module._parameters[name]
                assert meta is not None
                if supplied and name == "weight":
                    assert self._supply is not None
                    tensor = torch.from_numpy(self._supply.linear(path))
                else:
                    tensor = self._parameter(f"{path}.{name}" if path else name, meta.shape)
                module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
            if not supplied or self._supply is None:
                return None
            values = args[0]
            scale = self._supply.input_scale(path)
            if scale is not None:
                values = values / torch.from_numpy(scale)
            block = self._supply.rounding(path)
            if block is not None:
                values = _rounded(values, block)
            return (values, *args[1:])

        return load

    def _supplied(self, path: str) -> bool:
        return self._supply is not None and self._supply.holds(path)

    def _parameter(self, name: str, shape: torch.Size) -> torch.Tensor:
        if name not in self._checkpoint.tensors:
            if name.startswith("vision_tower."):
                # Blocks behind the feature layer and the last norm: checkpoints may leave them
                # out, and nothing of what they compute is ever read.
                return torch.zeros(shape)
            raise CheckpointError(f"{self._checkpoint.folder} holds no tensor {name!r}")
        return self._read(name).reshape(shape)

    def _read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        array = self._checkpoint.read(name, rows)
        if self._as_stored:
            array = as_float16(name, array)
        return torch.from_numpy(array).to(torch.float32)

    def _rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding table; zeros for a media mark that has no row of its own."""
        size = self._checkpoint.tensors[_EMBED_TOKENS].shape[0]
        unique, place = torch.unique(ids, return_inverse=True)
        table = torch.zeros(len(unique), self._checkpoint.dims.text.hidden_size)
        for index, each in enumerate(unique.tolist()):
            if each < size:
                table[index] = self._read(_EMBED_TOKENS, slice(each, each + 1))[0]
        return table[place]

    def _head_rows(self, rows: slice) -> torch.Tensor:
        if self._supply is not None:
            return torch.from_numpy(self._supply.linear(_HEAD, rows))
        return self._read(f"{_HEAD}.weight", rows)

    def _materialise_buffers(self) -> None:
        """Buffers are no weights: they follow from the configuration and are made for real."""
        for root in (self._core, self._language):
            for module in root.modules():
                made = [name for name, b in module.named_buffers(recurse=False) if b.is_meta]
                if not made:
                    continue
                if made == ["position_ids"]:
                    count = module.position_ids.shape[-1]
                    module.register_buffer(
                        "position_ids", torch.arange(count).expand(1, -1), persistent=False
                    )
                elif "inv_freq" in made:
                    fresh: Any = type(module)
                    for name, buffer in fresh(config=module.config).named_buffers():
                        module.register_buffer(name, buffer, persistent=False)
                else:
                    raise RuntimeError(f"{type(module).__name__} has unknown buffers {made}")


class _StreamedEmbedding(nn.Module):
    """An embedding table of which only the asked rows are read."""

    def __init__(self, rows: Callable[[torch.Tensor], torch.Tensor], width: int) -> None:
        super().__init__()
        self._rows = rows
        self.embedding_dim = width

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self._rows(ids.reshape(-1)).reshape(*ids.shape, -1)


class _Echo(nn.Module):
    """Stands where the language model stood and hands out what it was given to read."""

    def __init__(self, embed_tokens: nn.Module) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(self, inputs_embeds: torch.Tensor, **_: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)


class _PassThrough(nn.Module):
    """Stands where a layer stood and changes nothing."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        return hidden_states


def _dropper(names: Sequence[str]) -> Callable[..., None]:
    def drop(module: nn.Module, *_: Any) -> None:
        for name in names:
            parameter = module._parameters[name]
            assert parameter is not None
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    return drop


def _rounded(values: torch.Tensor, block: int) -> torch.Tensor:
    """Rows as kernels see them: each block over its largest magnitude, in 127 steps each way.

    ``block`` is as ``LinearSupply.rounding`` returns it.
    """
    width = values.shape[-1]
    size = width if block < 0 else min(block, width)
    short = -width % size
    padded = nn.functional.pad(values, (0, short)) if short else values
    blocks = padded.reshape(*padded.shape[:-1], -1, size)
    largest = blocks.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    if block == -2:
        share = blocks / largest
        first = (share * 63).round() / 63
        rest = ((share - first) * (63 * 126)).round() / (63 * 126)
        rounded = ((first + rest) * largest).flatten(-2)
    else:
        rounded = ((blocks / largest * 127).round() * largest / 127).flatten(-2)
    kept: torch.Tensor = rounded[..., :width]
    return kept
