"""The card: an artifact's README.md, for the person who finds the folder."""

from __future__ import annotations

from llava_edge.profiles.anyres import format_pinpoints
from llava_edge.runtime.manifest import Manifest


def write_card(manifest: Manifest, artifact_bytes: int) -> str:
    """Markdown for people: what it is, for which board, how to load it."""
    plan = manifest.plan
    processing = manifest.image_processing
    pinpoints = format_pinpoints(processing.image_grid_pinpoints) or "none (thumbnail only)"
    computes = manifest.precision.computes
    return f"""# {manifest.variant}, {plan["precision"]}, for {plan["profile"]}

Made by llava-edge {manifest.tools["llava-edge"]} from `{manifest.source.id}`\
{f" at revision `{manifest.source.revision}`" if manifest.source.revision else ""} \
({manifest.source.layout} layout).

| | |
|---|---|
| flavour | {manifest.flavour} (computes in {computes}) |
| language model | {manifest.precision.language_model}, head {manifest.precision.lm_head} |
| vision tower and projector | {manifest.precision.vision_tower} |
| AnyRes grid | {plan["grid"]}: {pinpoints} (height x width) |
| most tokens per image | {plan["max_image_tokens"]} ({plan["max_tiles"]} tiles with thumbnail) |
| context | {manifest.context_tokens} tokens |
| size on disk | {artifact_bytes / 2**20:.1f} MiB |
| reference | {manifest.reference}, grid order {processing.reference} |

```python
from llava_edge.runtime import LlavaEdge

model = LlavaEdge.load("path/to/this/folder")
print(model.generate("What is in the picture?", images=["picture.jpg"]).text)
```

Without `certificate.json` nothing here has been compared with the original weights.
"""
