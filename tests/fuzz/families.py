"""Families of fuzzed inputs: how one is made from a number, and what is done with it.

The input of a number is the same whenever and wherever it is made, so a number is all that is
needed to have it again.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from llava_edge.profiles.memory.estimate import Machine, Workload, estimate_memory
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.util.limits import Limits
from llava_edge.runtime.util.progress import no_progress
from tests.fuzz import (
    artifact_inputs,
    checkpoint_inputs,
    image_inputs,
    text_inputs,
    video_inputs,
)

Act = Callable[[], object]
MIB = 1 << 20
SLACK_BYTES = 64 * MIB
"""What a measured peak may lie above the plan's sum, as everywhere in this project."""

CONVERSION_BYTES = 512 * MIB
"""What a conversion of so small a checkpoint may use beside the plan's sum."""
VERIFIED_SHARE = 0.1
"""Of the checkpoints, how many of those that convert are verified too, which takes longer."""

SMALL = Limits(max_image_pixels=1 << 20, max_video_pixels=1 << 20)


@dataclass
class Case:
    """One input.

    Attributes:
        label: what it is.
        act: gives it to the runtime.
        evidence: file contents to keep when something is found.
        folder: a folder to keep.
        extra_bytes: of the input itself, which the plan does not count.
        limits: those of the model that it is given to.
    """

    label: str
    act: Act
    evidence: bytes | None = None
    folder: Path | None = None
    extra_bytes: int = 0
    limits: Limits = field(default_factory=Limits)


class Bench:
    """Loaded models and a folder of one's own.

    Args:
        artifacts: folder with the artifacts ``image`` and ``video``.
        work: folder to write in.
        seed: of all inputs.
    """

    def __init__(self, artifacts: Path, work: Path, seed: int) -> None:
        self.artifacts, self.work, self.seed = artifacts, work, seed
        self._models: dict[tuple[str, Limits], LlavaEdge] = {}
        self.scratch = work / "scratch"

    def model(self, name: str, limits: Limits) -> LlavaEdge:
        """One of the sound artifacts, loaded once."""
        key = (name, limits)
        if key not in self._models:
            self._models[key] = LlavaEdge.load(
                self.artifacts / name, threads=2, limits=limits, vision_cache_bytes=MIB
            )
        return self._models[key]

    @cached_property
    def special(self) -> list[str]:
        """Control tokens of the artifacts' tokenizers, and those of other models."""
        known = ["<s>", "</s>", "<unk>", "[INST]", "[/INST]", "<|im_start|>", "<|im_end|>"]
        known += ["<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "USER:", "ASSISTANT:"]
        for name in ("image", "video"):
            document = json.loads((self.artifacts / name / "tokenizer.json").read_text("utf-8"))
            known += [token["content"] for token in document["added_tokens"]]
        return sorted(set(known))

    @cached_property
    def checkpoints(self) -> Mapping[str, Path]:
        """Sound checkpoints; the libraries that convert them are loaded and warm."""
        found = checkpoint_inputs.sound_checkpoints(self.artifacts)
        for path in found.values():
            out = self.work / "warm" / path.name
            convert(path, out, "int8", verify=True)
            shutil.rmtree(out)
        return found

    def probe(self) -> tuple[int, ...]:
        """Tokens of a fixed question, which must stay the same."""
        answer = self.model("image", SMALL).generate(
            "What is this?", [image_inputs.picture()], max_new_tokens=8
        )
        return answer.token_ids

    def case(self, family: str, number: int) -> Case:
        """The input of a number."""
        random = Random(f"{self.seed}/{family}/{number}")
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)
        return FAMILIES[family](self, random, number)

    def most_bytes(self, case: Case) -> int:
        """What a request may add to a loaded model, by the plan, with the slack of elsewhere."""
        manifest = self.model("video", SMALL).artifact.manifest
        pixels = max(case.limits.max_image_pixels, case.limits.max_video_pixels)
        work = Workload(
            manifest.context_tokens,
            num_images=1,
            num_frames=8,
            image_pixels=pixels,
            tiles_per_image=5,
        )
        phases = estimate_memory(manifest.model, "fp16", work, Machine("cpu")).host.values()
        idle = estimate_memory(
            manifest.model,
            "fp16",
            Workload(manifest.context_tokens, 0, image_pixels=0),
            Machine("cpu"),
        ).host["decode"]
        return max(phase.total for phase in phases) - idle.total + SLACK_BYTES + case.extra_bytes


def _image(bench: Bench, random: Random, number: int) -> Case:
    act = random.randrange(20)
    source: Any
    evidence = None
    if act < 16:
        label, source = image_inputs.damaged_file(random)
        evidence = source
    elif act < 18:
        label, source = image_inputs.odd_objects(random)
    elif act == 18:
        places = sorted(image_inputs.odd_places(bench.work / "places").items())
        label, source = random.choice(places)
    else:
        label, source = random.choice(sorted(image_inputs.harmful_files().items()))
        evidence = source
    if evidence is not None and random.random() < 0.3:
        path = bench.scratch / "image"
        path.write_bytes(evidence)
        source = path if random.random() < 0.5 else str(path)
    limits = Limits() if random.random() < 0.15 else SMALL
    model = bench.model("image", limits)
    few = random.randrange(1, 3)

    def ask() -> object:
        if random.random() < 0.1:
            return model.count_tokens("What?", [source])
        return model.generate("What?", [source] * few, max_new_tokens=1)

    # The file is read whole, twice where it comes from a path, and a sparse one has 100 MiB.
    extra = 128 * MIB if act >= 18 else 2 * len(evidence or b"")
    return Case(f"image: {label}", ask, evidence, None, extra, limits)


def _harmful_image(bench: Bench, random: Random, number: int) -> Case:
    """Each of the files made to harm, and each odd place, in turn, under the default limits."""
    files: list[tuple[str, Any]] = sorted(image_inputs.harmful_files().items())
    every = files + sorted(image_inputs.odd_places(bench.work / "places").items())
    label, source = every[number % len(every)]
    model = bench.model("image", Limits())
    evidence = source if isinstance(source, bytes) else None
    return Case(
        f"harmful: {label}",
        lambda: model.generate("What?", [source], max_new_tokens=1),
        evidence,
        None,
        128 * MIB,
    )


def _video(bench: Bench, random: Random, number: int) -> Case:
    evidence = None
    source: Any
    if random.random() < 0.8:
        label, source = video_inputs.damaged_video(random)
        evidence = source
        if random.random() < 0.5:
            path = bench.scratch / "clip"
            path.write_bytes(source)
            source = path
    elif random.random() < 0.3:
        places = sorted(image_inputs.odd_places(bench.work / "places").items())
        label, source = random.choice(places)
    else:
        label, source = video_inputs.frames(random)
    limits = Limits() if random.random() < 0.15 else SMALL
    model = bench.model("video", limits)
    frames = random.choice((None, 1, 3, 8))
    choice = random.choice(("reference", "original"))

    def ask() -> object:
        return model.generate(
            "What?", video=source, num_frames=frames, frame_choice=choice, max_new_tokens=1
        )

    return Case(f"video: {label}", ask, evidence, None, 2 * len(evidence or b""), limits)


def _prompt(bench: Bench, random: Random, number: int) -> Case:
    text = text_inputs.prompt(random, bench.special)
    images = [image_inputs.picture()] * random.choice((0, 0, 1, 2))
    model = bench.model(random.choice(("image", "video")), SMALL)
    act = random.randrange(4)
    options: dict[str, Any] = {"max_new_tokens": 2}
    if random.random() < 0.5:
        options["image_marks"] = random.random() < 0.5

    def ask() -> object:
        if act == 0:
            return model.generate(text, images, raw=True, max_new_tokens=2)
        if act == 1:
            chat = model.chat(random.choice((None, text, "Be brief.")))
            chat.send("Hello", max_new_tokens=2)
            return chat.send(text, images, max_new_tokens=2)
        if act == 2:
            return model.count_tokens(text, images, image_marks=options.get("image_marks", True))
        return model.generate(text, images, **options)

    # The text itself, some copies of it, and where each of its characters came from.
    return Case("prompt", ask, text.encode("utf-8", "surrogatepass"), None, 64 * len(text), SMALL)


def _options(bench: Bench, random: Random, number: int) -> Case:
    given = text_inputs.options(random)
    model = bench.model("image", SMALL)
    strange = text_inputs.strange_value(random)
    act = random.randrange(9)
    label = f"options: {act} {_told(given)}"

    def ask() -> object:
        if act == 0:
            return model.generate(strange, **given)
        if act == 1:
            return model.generate("Hello", strange, **given)
        if act == 2:
            return model.generate("Hello", video=strange)
        if act == 3:
            return model.chat(strange)
        if act == 4:
            names = ["threads", "context_tokens", "vision_cache_bytes", "device", "engine"]
            names += ["require_verified", "trust_engines", "prefix_reuse", "allow_slow"]
            names += ["limits", "progress"]
            name = random.choice(names)
            value = strange if random.random() < 0.7 else random.choice((1, 64, 10**6, "cpu", None))
            with LlavaEdge.load(bench.artifacts / "image", **{name: value}) as loaded:
                return loaded.generate("Hello", max_new_tokens=1)
        if act == 5:
            name = random.choice(sorted(Limits.__dataclass_fields__))
            return Limits(**{name: strange})
        if act == 7:
            name = random.choice(("num_frames", "frame_choice"))
            frames = [image_inputs.picture()] * 3
            seeing = bench.model("video", SMALL)
            return seeing.generate("Hello", video=frames, max_new_tokens=1, **{name: strange})
        if act == 6:
            shared = ("raw", "image_marks", "grid")
            rest = {name: value for name, value in given.items() if name not in shared}
            return model.chat().send("Hello", **rest)
        return model.generate("Hello", [image_inputs.picture()], **given)

    return Case(label, ask, repr((act, given)).encode("utf-8", "replace"), None, 0, SMALL)


def _told(given: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={type(value).__name__}" for name, value in given.items())


def _quality(bench: Bench, random: Random, number: int) -> Case:
    from llava_edge.runtime.quality.questions import read_quality_questions

    path = text_inputs.write_questions(random, bench.scratch)
    limit = random.choice((None, 1, 3))
    return Case("quality", lambda: read_quality_questions(path, limit), path.read_bytes())


def _artifact(damage: str) -> Callable[[Bench, Random, int], Case]:
    def make(bench: Bench, random: Random, number: int) -> Case:
        name = random.choice(("image", "image", "video"))
        folder = bench.scratch / "artifact"
        said = artifact_inputs.damaged_artifact(random, bench.artifacts / name, folder, damage)
        verified = random.random() < 0.3

        def ask() -> object:
            with LlavaEdge.load(folder, threads=1, require_verified=verified) as model:
                model.generate("What?", [image_inputs.picture()], max_new_tokens=2)
                return model.count_tokens("Hello </s> there")

        return Case(f"{damage} of {name}: {said}", ask, None, folder, 0, SMALL)

    return make


def _checkpoint(damage: str) -> Callable[[Bench, Random, int], Case]:
    def make(bench: Bench, random: Random, number: int) -> Case:
        sound = bench.checkpoints[random.choice(sorted(bench.checkpoints))]
        folder, out = bench.scratch / "checkpoint", bench.scratch / "out"
        told = checkpoint_inputs.damaged_checkpoint(random, sound, folder, damage)
        precision = random.choice(("fp16", "fp16", "int8", "int4"))
        verify = random.random() < VERIFIED_SHARE

        def ask() -> object:
            try:
                return convert(folder, out, precision, verify=verify)
            finally:
                marker = bench.scratch / checkpoint_inputs.MARKER
                assert not marker.exists(), "code of the checkpoint ran"

        label = f"{damage} of {sound.name} at {precision}: {told}"
        return Case(label, ask, None, folder, CONVERSION_BYTES, SMALL)

    return make


def convert(checkpoint: Path, out: Path, precision: str, *, verify: bool) -> object:
    """Convert a checkpoint for a CPU board, as the command would."""
    from llava_edge.convert.pipeline import convert_checkpoint
    from llava_edge.convert.planning.request import ConvertRequest
    from llava_edge.convert.quantization.plan import QuantizationRequest
    from llava_edge.profiles.boards.hardware import load_profile
    from llava_edge.profiles.plan_request import PlanRequest

    request = ConvertRequest(
        checkpoint=str(checkpoint),
        out=out,
        profile=load_profile("cpu-16gb"),
        wishes=PlanRequest(precision=precision),  # type: ignore[arg-type]
        quantization=QuantizationRequest(quantizer="rtn"),
        verify="quick" if verify else "none",
    )
    return convert_checkpoint(request, no_progress, lambda _: None)


def _changed(bench: Bench, random: Random, number: int) -> Case:
    """A loaded artifact of which a file changes: the answer of before, or no answer."""
    folder = bench.scratch / "artifact"
    shutil.copytree(bench.artifacts / "image", folder)

    def ask() -> object:
        with LlavaEdge.load(folder, threads=1) as model:
            before = model.generate("What?", [image_inputs.picture()], max_new_tokens=4)
            artifact_inputs.change_in_use(random, folder)
            after = model.generate("What?", [image_inputs.picture()], max_new_tokens=4)
            assert after.token_ids == before.token_ids, (before, after)
            return after

    return Case("changed in use", ask, None, folder, 0, SMALL)


def _misbehaving(bench: Bench, random: Random, number: int) -> Case:
    """What a fuzzed runtime must not do, so that the watch over it can be tested."""

    def open_for_good() -> None:
        os.open("/dev/null", os.O_RDONLY)

    def leave_behind() -> None:
        with tempfile.NamedTemporaryFile(delete=False):
            return

    def take_memory() -> None:
        np.ones(bench.most_bytes(case) + (64 << 20), np.uint8)

    def change_answers() -> None:
        bench.probe = lambda: ()  # type: ignore[method-assign]

    acts: tuple[Act, ...] = (
        os.abort,
        lambda: time.sleep(3600),
        lambda: os.kill(os.getpid(), signal.SIGKILL),
        lambda: [][0],
        lambda: warnings.warn("careful", UserWarning, stacklevel=1),
        lambda: os.write(2, b"a word"),
        open_for_good,
        leave_behind,
        take_memory,
        lambda: threading.Thread(target=time.sleep, args=(3600,), daemon=True).start(),
        lambda: sys.exit(0),
        change_answers,
    )
    case = Case("misbehaving", acts[number], b"evidence", None, 0, SMALL)
    return case


FAMILIES: dict[str, Callable[[Bench, Random, int], Case]] = {
    "image": _image,
    "harmful": _harmful_image,
    "video": _video,
    "prompt": _prompt,
    "options": _options,
    "quality": _quality,
    **{damage: _artifact(damage) for damage in artifact_inputs.DAMAGES},
    **{f"checkpoint-{d}": _checkpoint(d) for d in checkpoint_inputs.DAMAGES},
    "changed": _changed,
    "misbehaving": _misbehaving,
}

COUNTS: dict[str, int] = {
    "image": 2400,
    "harmful": 90,
    "video": 700,
    "prompt": 500,
    "options": 500,
    "quality": 250,
    "manifest": 700,
    "certificate": 150,
    "golden": 150,
    "tokenizer": 300,
    "embeddings": 150,
    "graph": 700,
    "folder": 160,
    "changed": 100,
    "checkpoint-config": 400,
    "checkpoint-index": 150,
    "checkpoint-header": 350,
    "checkpoint-words": 400,
    "checkpoint-template": 250,
    "checkpoint-processor": 250,
    "checkpoint-files": 120,
    "checkpoint-code": 80,
}
"""Inputs of a family in ``make fuzz``."""
