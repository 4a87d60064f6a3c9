"""Ask about the newest frame of a camera, again and again.

    python camera_loop.py ARTIFACT /dev/video0 "Is the door open?" --seconds 60
    python camera_loop.py ARTIFACT clip.mp4 "What is shown?"

Each answer has a deadline, so that a slow one does not hold the loop, and features of tiles that
did not change are kept from frame to frame.

Needs: pip install './llava-edge[cpu,video]'
"""

import argparse
import time
from collections.abc import Iterator

import av
import numpy as np

from llava_edge.runtime import DeadlineError, LlavaEdge


def frames(source: str) -> Iterator[np.ndarray]:
    """Decoded frames, uint8 (height, width, 3)."""
    camera = source.startswith("/dev/")
    with av.open(source, format="v4l2" if camera else None) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask about frames of a camera.")
    parser.add_argument("artifact")
    parser.add_argument("source", help="a camera such as /dev/video0, or a video file")
    parser.add_argument("question")
    parser.add_argument("--every", type=int, default=30, help="ask about every n-th frame")
    parser.add_argument("--deadline", type=float, default=30.0, help="seconds for one answer")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after these")
    chosen = parser.parse_args()

    end = time.monotonic() + chosen.seconds
    with LlavaEdge.load(chosen.artifact, vision_cache_bytes=64 << 20) as model:
        for number, frame in enumerate(frames(chosen.source)):
            if time.monotonic() > end:
                break
            if number % chosen.every:
                continue
            try:
                answer = model.generate(
                    chosen.question,
                    images=[frame],
                    max_new_tokens=32,
                    deadline_seconds=chosen.deadline,
                )
            except DeadlineError:
                print(f"frame {number}: no answer in time", flush=True)
                continue
            print(f"frame {number}: {answer.text}", flush=True)
            for step in answer.degraded:
                print(f"  {step}", flush=True)


if __name__ == "__main__":
    main()
