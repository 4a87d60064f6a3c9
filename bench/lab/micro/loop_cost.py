"""``python -m llava_edge.bench.lab.micro.loop_cost``: what our own loop costs per token.

Everything but the call into ONNX Runtime: reading the embedding row, writing lengths, the argmax,
text. The model is as narrow as it gets with 32 layers and a vocabulary of 32,064, so that the loop
stands out; its cost does not depend on the width. Prints a sentence, and JSON as the last line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from llava_edge.runtime import LlavaEdge

LAYERS, VOCABULARY = 32, 32064


def main(argv: list[str] | None = None) -> int:
    """Run the measurement and return the exit code."""
    parser = argparse.ArgumentParser(description="Measure the decode loop's own cost per token.")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        artifact = _write_artifact(Path(folder))
        milliseconds = _measure(artifact, options.tokens, options.repeats)
    result = {
        "layers": LAYERS,
        "vocabulary": VOCABULARY,
        "tokens": options.tokens,
        "loop_milliseconds_per_token": statistics.median(milliseconds),
        "spread": [min(milliseconds), max(milliseconds)],
    }
    print(
        f"the loop's own cost: {result['loop_milliseconds_per_token']:.3f} ms a token "
        f"({LAYERS} layers, {VOCABULARY} words, greedy; {min(milliseconds):.3f} to "
        f"{max(milliseconds):.3f} over {options.repeats} runs of {options.tokens} tokens)"
    )
    print(json.dumps(result))
    return 0


def _write_artifact(folder: Path) -> Path:
    """Through the commands, as a user would: bench knows nothing of convert."""
    sizes = {"layers": LAYERS, "vocab_size": VOCABULARY, "hidden_size": 64, "heads": 4}
    changes = [f"--set={name}={value}" for name, value in sizes.items()]
    checkpoint, artifact = folder / "checkpoint", folder / "artifact"
    writer = [
        sys.executable,
        "-m",
        "llava_edge.convert.testing.random_cli",
        "tiny",
        str(checkpoint),
    ]
    subprocess.run([*writer, *changes], check=True)
    program = Path(sys.executable).with_name("llava-edge")
    convert = [str(program), "convert", str(checkpoint), str(artifact), "--verify", "none"]
    subprocess.run(convert, check=True, stdout=subprocess.DEVNULL)
    return artifact


def _measure(artifact: Path, num_tokens: int, repeats: int) -> list[float]:
    """Milliseconds a token outside ONNX Runtime, one value a repeat, after a warm-up."""
    found = []
    with LlavaEdge.load(artifact, threads=1) as model:
        for repeat in range(repeats + 1):
            before = model.decode_run_seconds
            answer = model.generate(f"Question {repeat}", max_new_tokens=num_tokens)
            inside = model.decode_run_seconds - before
            steps = len(answer.token_ids) - 1
            if repeat and steps:
                found.append((answer.timings.decode_seconds - inside) / steps * 1e3)
    return found


if __name__ == "__main__":
    sys.exit(main())
