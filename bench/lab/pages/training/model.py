"""Model: transformers' own LLaVA-NeXT, run over packed batches, with labels on the way.

The forward pass uses the modules of the model itself. Beside the answers it is taught what lies
under each patch (after the projector) and where on the page that is (half-way up the decoder); the
heads for this are left behind when training ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from llava_edge.bench.lab.pages.drawing.page import COLOURS, SIGNS
from llava_edge.bench.lab.pages.training.attention import NAME as ATTENTION
from llava_edge.bench.lab.pages.training.batch import IGNORED, NEWLINE, NUM_PLACES, TEXT, Batch
from llava_edge.bench.lab.pages.training.spec import Spec

NUM_PLACE_CLASSES = 20
_GAIN = 0.02
_PATCH_WEIGHT, _PLACE_WEIGHT = 0.3, 0.3


@dataclass(frozen=True)
class Losses:
    """Means over the labelled positions of a batch; accuracies are in 0 to 1."""

    total: Tensor
    answer: Tensor
    patch: Tensor
    place: Tensor
    answer_accuracy: Tensor
    sign_accuracy: Tensor
    place_accuracy: Tensor


class PageModel(nn.Module):
    """The model and the training heads.

    Attributes:
        llava: what ships.
        patch_heads, place_heads: what does not.
    """

    def __init__(self, spec: Spec, tokenizer: Tokenizer, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        config: Any = transformers.LlavaNextConfig(**spec.config(tokenizer))
        config.dtype = torch.float32
        loader: Any = transformers.LlavaNextForConditionalGeneration
        self.llava: Any = loader._from_config(config, attn_implementation=ATTENTION)
        width = spec.hidden_size
        self.sign_head = nn.Linear(width, len(SIGNS) + 1)
        self.colour_head = nn.Linear(width, len(COLOURS) + 1)
        self.place_head = nn.Linear(width, NUM_PLACES * NUM_PLACE_CLASSES)
        self.label_layer = (spec.layers + 1) // 2
        with torch.no_grad():
            nn.init.normal_(self.llava.model.image_newline, std=_GAIN)
            self._scale_down_branches(spec)

    def _scale_down_branches(self, spec: Spec) -> None:
        """What adds to the residual stream starts smaller the more layers there are."""
        factor = (2 * spec.layers) ** -0.5
        for layer in self.llava.model.language_model.layers:
            layer.self_attn.o_proj.weight.mul_(factor)
            layer.mlp.down_proj.weight.mul_(factor)

    def features(self, pixel_values: Tensor) -> Tensor:
        """Projected features (tiles * patches, hidden) of tiles (tiles, 3, side, side)."""
        tower = self.llava.model.vision_tower
        states = tower.pre_layrnorm(tower.embeddings(pixel_values))
        # The select layer is -2: the last block is never run.
        for block in tower.encoder.layers[:-1]:
            out = block(states, None)
            states = out[0] if isinstance(out, tuple) else out
        projected: Tensor = self.llava.model.multi_modal_projector(states[:, 1:])
        return projected.flatten(0, 1)

    def patch_loss(self, features: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Loss of sign and colour of each cell, and the share of signs that are right."""
        wanted = batch["signs"] != IGNORED
        rows = features.index_select(0, batch["source"][wanted])
        signs = batch["signs"][wanted]
        logits = self.sign_head(rows).float()
        loss = functional.cross_entropy(logits, signs)
        colours = self.colour_head(rows).float()
        loss = loss + 0.5 * functional.cross_entropy(colours, batch["colours"][wanted])
        inked = signs > 0
        right = (logits.argmax(-1) == signs)[inked].float().mean()
        return loss, right

    def forward(self, batch: dict[str, Tensor], patches_only: bool = False) -> Losses:
        """Losses of one batch, see ``to_tensors``."""
        features = self.features(batch["pixel_values"])
        patch, sign_accuracy = self.patch_loss(features, batch)
        zero = torch.zeros((), device=features.device)
        if patches_only:
            return Losses(patch, zero, patch.detach(), zero, zero, sign_accuracy, zero)
        inner = self.llava.model
        source = batch["source"]
        # One table of all there is to be put in place; index_select has a quick backward pass.
        text = inner.language_model.embed_tokens.weight
        table = torch.cat([features.to(text.dtype), inner.image_newline[None], text])
        row = torch.where(source == NEWLINE, len(features), source)
        row = torch.where(source == TEXT, len(features) + 1 + batch["ids"], row)
        states = table.index_select(0, row.flatten()).view(*row.shape, -1)
        states, middle = self._decode(states, batch)
        place, place_accuracy = self._place_loss(middle, batch)
        answered = batch["targets"] != IGNORED
        logits = self.llava.lm_head(inner.language_model.norm(_rows(states, answered))).float()
        targets, weights = batch["targets"][answered], batch["weights"][answered]
        each = functional.cross_entropy(logits, targets, reduction="none")
        answer = (each * weights).sum() / weights.sum()
        right = (logits.argmax(-1) == targets).float().mean()
        total = answer + _PATCH_WEIGHT * patch + _PLACE_WEIGHT * place
        return Losses(
            total,
            answer.detach(),
            patch.detach(),
            place.detach(),
            right,
            sign_accuracy,
            place_accuracy,
        )

    def _decode(self, states: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        decoder = self.llava.model.language_model
        blocks, positions = batch["blocks"], batch["positions"]
        length = blocks.shape[1]
        steps = torch.arange(length, device=blocks.device)
        earlier = steps[:, None] >= steps[None, :]
        same = (blocks[:, None, :] == 0) | (blocks[:, :, None] == blocks[:, None, :])
        # In the type that queries will have under autocast, or nothing is gained by it.
        kind = torch.bfloat16 if torch.is_autocast_enabled(states.device.type) else states.dtype
        mask = torch.zeros(same.shape, dtype=kind, device=states.device)
        mask = mask.masked_fill(~(earlier & same), -1e9)[:, None]
        angles = decoder.rotary_emb(states, position_ids=positions)
        middle = states
        for number, layer in enumerate(decoder.layers, start=1):
            states = layer(
                states, attention_mask=mask, position_ids=positions, position_embeddings=angles
            )
            if number == self.label_layer:
                middle = states
        return states, middle

    def _place_loss(self, middle: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        places = batch["places"]
        wanted = places[..., 0] != IGNORED
        # The mean square is about one whatever the depth, as the heads expect.
        rows = functional.rms_norm(_rows(middle, wanted), middle.shape[-1:])
        logits = self.place_head(rows).float().view(-1, NUM_PLACES, NUM_PLACE_CLASSES)
        labels = places[wanted]
        loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        right = (logits.argmax(-1) == labels).all(-1)
        inked = batch["signs"][wanted] > 0
        return loss, right[inked].float().mean()


def mean_losses(losses: Sequence[Losses]) -> Losses:
    """The mean of each, without what gradients need."""
    return Losses(
        **{
            field.name: torch.stack([getattr(one, field.name).detach() for one in losses]).mean()
            for field in fields(Losses)
        }
    )


def _rows(states: Tensor, wanted: Tensor) -> Tensor:
    """Rows (n, width) of states (B, S, width) where ``wanted`` (B, S) holds."""
    return states.flatten(0, 1).index_select(0, wanted.flatten().nonzero()[:, 0])


def to_tensors(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The arrays of a batch on the device, by name."""
    return {name: torch.from_numpy(array).to(device) for name, array in vars(batch).items()}
