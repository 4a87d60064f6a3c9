"""Inspect: find the checkpoint that was named or that the board takes, and open it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llava_edge.convert.checkpoint.files import CheckpointFiles
from llava_edge.convert.checkpoint.hub.download import fetch_checkpoint
from llava_edge.convert.checkpoint.hub.preflight import check_download
from llava_edge.convert.checkpoint.open import Checkpoint, open_checkpoint
from llava_edge.convert.checkpoint.source import resolve_source
from llava_edge.convert.planning.artifact_plan import choose_hub_id, refuse_misfit_by_id
from llava_edge.convert.planning.request import ConvertRequest
from llava_edge.runtime.util.progress import Notify, Progress


@dataclass(frozen=True)
class Inspected:
    """A checkpoint that was opened: settings and names of tensors are read, weights are not.

    Attributes:
        checkpoint: what its files say.
        files: their stamps from before they were read, which show what changes meanwhile.
    """

    checkpoint: Checkpoint
    files: CheckpointFiles


def inspect_checkpoint(request: ConvertRequest, report: Progress, say: Notify) -> Inspected:
    """Open the checkpoint; one that has to be downloaded is planned for first.

    Raises:
        BudgetError: a released variant that was named by its hub id does not fit the board.
        RequestError: the checkpoint is not there, or cannot be kept faithfully.
        HubError: the hub could not be reached.
    """
    source = resolve_source(request.checkpoint or choose_hub_id(request, say))
    folder = source.folder
    if folder is None:
        assert source.repo_id is not None
        refuse_misfit_by_id(request, source.repo_id)
        parent = request.out.parent if request.out is not None else Path("artifacts")
        folder = fetch_checkpoint(
            source.repo_id,
            source.revision,
            progress=report,
            announce=lambda plan: check_download(plan, parent, say),
        )
    files = CheckpointFiles(folder)
    return Inspected(open_checkpoint(folder), files)
