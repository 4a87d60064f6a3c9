"""The card: an artifact's README.md, for the person who finds the folder."""

from __future__ import annotations

from collections.abc import Sequence

from llava_edge.profiles.memory.formats import rounded_activations
from llava_edge.profiles.models.anyres import format_pinpoints
from llava_edge.runtime.artifact.certificate import QUALITY_STAGE, Certificate, StageResult
from llava_edge.runtime.artifact.manifest import Manifest
from llava_edge.runtime.artifact.manifest_validation import CERTIFICATE
from llava_edge.runtime.backends.engine_cache import ENGINES

_VERDICTS = {
    "pass": "passed",
    "fail": "**failed**",
    "inconclusive": "**did not prove enough either way**",
}
_MODES = {
    "quick": "quickly (the decoder in groups of layers, one small picture)",
    "full": "in full (the whole decoder, every grid)",
}
_MEASURES = {
    "kl_divergence": "KL divergence of the next token's distribution (nats)",
    "top1_disagreement": "share of positions with another best token",
    "answer_loss_rise": "rise of the loss on the tokens of the answers (nats)",
}
"""Words for the measures of quantisation loss; others go by their name."""


def write_card(
    manifest: Manifest, artifact_bytes: int, certificate: Certificate | None = None
) -> str:
    """Markdown for people: what it is, for which board, how it was verified, how to load it.

    Args:
        manifest: of the artifact.
        artifact_bytes: size of the folder.
        certificate: what verifying found; None where there is none yet. The card is not listed in
            the manifest, so it can be written again afterwards.
    """
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
| board | {plan["profile"]} |
| flavour | {manifest.target} (computes in {computes}) |
| language model | {manifest.precision.language_model}, head {manifest.precision.lm_head}\
{_activations_note(manifest)} |
| vision tower and projector | {manifest.precision.vision_tower}{_vision_note(manifest)} |
| engine of the tower | {_engine(manifest)} |
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

{_quality(manifest, certificate)}## Verification

{_verification(manifest, certificate)}
"""


def _activations_note(manifest: Manifest) -> str:
    stored = manifest.precision
    note = rounded_activations(stored.language_model, stored.int8_route, manifest.target)
    return "" if note is None else f"; {note}"


def _vision_note(manifest: Manifest) -> str:
    """Which layers of the tower differ from the others, in short."""
    facts = manifest.conversion.get("vision", {})
    left, islands = len(facts.get("layers_in_float", {})), facts.get("islands", {})
    if left:
        return f", {left} layers in fp16 (calibration asked for it)"
    if islands:
        return f", partly float32 in {', '.join(islands)} (float16 would not hold it)"
    return ""


def _engine(manifest: Manifest) -> str:
    shipped = sorted(name for name in manifest.files if name.startswith(f"{ENGINES}/"))
    engines = [name for name in shipped if name.endswith(".engine")]
    if not engines:
        return "ONNX Runtime"
    return (
        f"`{'`, `'.join(engines)}`, opened only where you trust this folder "
        "(`trust_engines=True`, `--trust-engines`); ONNX Runtime otherwise"
    )


def _verification(manifest: Manifest, certificate: Certificate | None) -> str:
    if certificate is None or certificate.mode == "none":
        return (
            "Nothing here has been compared with the original weights: verification was left out. "
            "`llava-edge verify FOLDER --against CHECKPOINT` makes up for it."
        )
    host = certificate.host
    export = [row for row in certificate.stages if row.question == "export"]
    loss = [
        row for row in certificate.stages if row.question == "loss" and row.name != QUALITY_STAGE
    ]
    paragraphs = [
        f"Verified {_MODES[certificate.mode]} against {certificate.reference} on "
        f"{certificate.issued[:10]}, on {host.machine} ({host.cpu}; {host.provider} of ONNX "
        f"Runtime {host.onnxruntime}; int8 instructions: {host.int8_isa}). "
        f"It {_VERDICTS[certificate.verdict]}{_where(certificate)}.",
        "The artifact against torch with the very same weights:\n\n" + _table(export)
        if export
        else "Nothing was compared with torch running the same weights.",
        _loss(manifest, loss),
        f"The whole of it is in `{CERTIFICATE}`.",
    ]
    return "\n\n".join(paragraphs)


def _quality(manifest: Manifest, certificate: Certificate | None) -> str:
    """A section on the user's own questions; empty where none were asked."""
    found = None if certificate is None else certificate.quality
    if found is None:
        return ""
    allowed = (
        "" if found.max_loss is None else f" (at most {100 * found.max_loss:g} % were allowed)"
    )
    refused = f" {found.refused} could not be asked and count as wrong." * bool(found.refused)
    return f"""## Right answers

{found.questions} questions of the person who converted it, asked of fp16 and of this artifact:

| | |
|---|---|
| right at fp16 | {found.right_before} |
| right in this artifact ({manifest.precision.language_model}) | {found.right_after} |
| right before, wrong now | {found.lost} |
| wrong before, right now | {found.gained} |
| answers of another text | {found.changed} |
| right answers lost, on balance | {100 * found.loss:.3g} %{allowed} |

An answer is right where it is one of those given, up to case, white space and a full stop at the
end, or names the right letter.{refused}

"""


def _where(certificate: Certificate) -> str:
    if certificate.verdict == "pass":
        return ""
    names = dict.fromkeys(
        row.name for row in certificate.stages if row.verdict == certificate.verdict
    )
    first = certificate.first_deviation
    return f" at {', '.join(names)}" * bool(names) + (
        f"; the first tensor to leave its tolerance is `{first.tensor}`" if first else ""
    )


def _loss(manifest: Manifest, rows: Sequence[StageResult]) -> str:
    language_model = manifest.precision.language_model
    if rows:
        return (
            f"What {language_model} costs, measured against the checkpoint's own weights:\n\n"
            + _table(rows)
        )
    if language_model == "fp16":
        return "Its weights are the checkpoint's own in fp16, so quantisation loses nothing."
    return f"What {language_model} costs against the checkpoint's own weights was not measured."


def _table(rows: Sequence[StageResult]) -> str:
    lines = ["| stage | measure | value | bound | verdict |", "|---|---|---|---|---|"]
    for row in rows:
        measure = _MEASURES.get(row.metric, row.metric.replace("_", " "))
        cells = (row.name, measure, _number(row.value), _number(row.bound), row.verdict)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
