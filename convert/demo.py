"""``make demo``: the whole straight line on a small checkpoint, beside the reference.

Writes a checkpoint with random weights (so the words mean nothing; the numbers do), converts it
with the command, asks the artifact about a picture that Pillow draws, and prints the reference's
token ids beside ours. Exits 1 when they differ.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from llava_edge.convert.random_checkpoint import write_random_checkpoint
from llava_edge.convert.random_spec import preset
from llava_edge.convert.reference import REFERENCE, ReferenceModel

FOLDER = Path("artifacts/demo")
PROMPT = "What is in the picture?"
NUM_TOKENS = 32


def main() -> int:
    """Run the demo and return its exit code."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    checkpoint, artifact, picture = (
        FOLDER / name for name in ("checkpoint", "artifact", "picture.png")
    )
    _say("1. a small LLaVA-NeXT checkpoint with random weights", checkpoint)
    write_random_checkpoint(checkpoint, preset("demo"), seed=0)
    _say("2. a picture", picture)
    draw_picture().save(picture)
    _say("3. llava-edge convert", artifact)
    _command(
        *("convert", str(checkpoint), str(artifact)),
        *("--profile", "cpu-16gb", "--precision", "fp16"),
    )
    _say("4. llava-edge run", f"{PROMPT!r}, {NUM_TOKENS} tokens, greedy")
    shown = _command(
        *("run", str(artifact), "--prompt", PROMPT, "--image", str(picture)),
        *("--max-new-tokens", str(NUM_TOKENS), "--json"),
    )
    ours = json.loads(shown.splitlines()[-1])
    _say("5. the reference", f"{REFERENCE}, float32")
    reference = ReferenceModel(checkpoint)
    text = reference.render(PROMPT, num_images=1)
    inputs = reference.prepare(text, [Image.open(picture)])
    theirs = reference.greedy(inputs, NUM_TOKENS)
    print(f"\nreference  {theirs}\nllava-edge {ours['token_ids']}")
    num_prompt = inputs["input_ids"].shape[1]
    equal = theirs == ours["token_ids"] and num_prompt == ours["prompt_tokens"]
    print(
        f"\nprompt: {ours['prompt_tokens']} tokens here, {num_prompt} in the reference, "
        f"{ours['image_tokens']} of them for the picture\n"
        + ("the same tokens" if equal else "DIFFERENT tokens")
    )
    return 0 if equal else 1


def draw_picture() -> Image.Image:
    """A few shapes and a word, 3:2, so that a grid of several tiles is used."""
    picture = Image.new("RGB", (600, 400), "white")
    pen = ImageDraw.Draw(picture)
    pen.rectangle((40, 60, 220, 240), fill="royalblue")
    pen.ellipse((260, 120, 460, 320), fill="tomato", outline="black", width=4)
    pen.polygon([(480, 340), (580, 340), (530, 220)], fill="seagreen")
    pen.text((60, 320), "llava-edge", fill="black", font_size=40)
    return picture


def _say(step: str, detail: object) -> None:
    print(f"{step}: {detail}", flush=True)


def _command(*arguments: str) -> str:
    """Run the installed command as a user would; its progress stays visible."""
    program = Path(sys.executable).with_name("llava-edge")
    done = subprocess.run([program, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
