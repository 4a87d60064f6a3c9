"""Ask the same question about every picture of a folder; one JSON object a line.

    python batch_folder.py ARTIFACT FOLDER "What is shown?" > answers.jsonl

A picture that is refused gets a line with the reason, and the next one is read.

Needs: pip install './llava-edge[cpu]'
"""

import json
import sys
from pathlib import Path

from llava_edge.runtime import ImageError, LlavaEdge


def main() -> int:
    artifact, folder, question = sys.argv[1:4]
    pictures = sorted(path for path in Path(folder).iterdir() if path.is_file())
    refused = 0
    with LlavaEdge.load(artifact) as model:
        for picture in pictures:
            row: dict[str, object] = {"image": picture.name, "question": question}
            try:
                answer = model.generate(question, images=[picture], max_new_tokens=64)
            except ImageError as error:
                refused += 1
                row["error"] = str(error)
            else:
                row["answer"] = answer.text
                row["seconds"] = round(answer.timings.ttft_seconds, 3)
            print(json.dumps(row), flush=True)
    print(f"{len(pictures) - refused} answered, {refused} refused", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
