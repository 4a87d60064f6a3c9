"""Ask one question about one picture.

    python quickstart.py ARTIFACT PICTURE "What is the total?"

Needs: pip install './llava-edge[cpu]'
"""

import sys

from llava_edge.runtime import LlavaEdge, LlavaEdgeError


def main() -> int:
    artifact, picture, question = sys.argv[1:4]
    try:
        with LlavaEdge.load(artifact) as model:
            for piece in model.stream(question, images=[picture], max_new_tokens=128):
                print(piece, end="", flush=True)
            print()
    except LlavaEdgeError as error:
        # The message states what was asked, what was found, the rule, and the next step.
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
