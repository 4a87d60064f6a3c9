"""Hub: from a repository id to a folder on disk, with everything said before a byte is fetched.

Only weights in safetensors and the text files that describe them are fetched, always by commit, so
that what was announced is what arrives. A folder needs no network at all.
"""

from __future__ import annotations

import glob
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import tqdm

from llava_edge.convert.checkpoint.hub.cache import (
    bytes_on_disk,
    cached_commit,
    is_cached,
    storage_folder,
)
from llava_edge.convert.checkpoint.hub.files import RemoteFile, needed_files
from llava_edge.convert.util.files import free_bytes
from llava_edge.profiles.errors import HubError, RequestError
from llava_edge.profiles.sizes import format_bytes
from llava_edge.runtime.util.progress import Progress

DEADLINE_SECONDS = 12.0
"""How long the hub may take to answer at all; name lookups have no timeout of their own."""

DISK_RESERVE_BYTES = 256 << 20
"""Left free on disk, so that a download never fills the last block."""

_POLL_SECONDS = 0.2
_FOLDER_HINT = (
    "A folder works without the hub:\n  make convert CHECKPOINT=/path/to/folder PROFILE=…"
)


@dataclass(frozen=True)
class DownloadPlan:
    """What a download comes to, known before it begins.

    Attributes:
        repo_id: hub id.
        revision: commit, 40 hex digits.
        files: what the checkpoint needs of the repository.
        total_bytes: size of all these files.
        bytes_to_fetch: what is not on this disk yet.
        disk_free_bytes: free space where the cache lies.
        cache_dir: the hub cache.
        offline: the hub was not reached and an earlier download serves.
    """

    repo_id: str
    revision: str
    files: tuple[RemoteFile, ...]
    total_bytes: int
    bytes_to_fetch: int
    disk_free_bytes: int
    cache_dir: Path
    offline: bool = False

    @property
    def fits_disk(self) -> bool:
        """Whether the disk takes what is still to be fetched."""
        return (
            self.bytes_to_fetch == 0
            or self.bytes_to_fetch + DISK_RESERVE_BYTES <= self.disk_free_bytes
        )

    @property
    def folder(self) -> Path:
        """Where the checkpoint lies after the download."""
        return storage_folder(self.cache_dir, self.repo_id) / "snapshots" / self.revision


def plan_download(
    repo_id: str, revision: str | None = None, cache_dir: Path | None = None
) -> DownloadPlan:
    """Ask the hub what a checkpoint consists of; writes nothing.

    Where the hub cannot be reached, a snapshot that an earlier download left in the cache serves.

    Args:
        repo_id: hub id.
        revision: branch, tag or commit; the default branch when left out.
        cache_dir: hub cache; the one of huggingface_hub when left out.

    Raises:
        HubError: the hub is out of reach (said within 15 seconds), does not know the repository
            or revision, refuses access, or the repository has no safetensors weights.
    """
    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser().absolute()
    try:
        info = _within_deadline(
            lambda: HfApi(endpoint=_endpoint()).model_info(
                repo_id, revision=revision, files_metadata=True, timeout=DEADLINE_SECONDS / 2
            )
        )
    except HfHubHTTPError as error:
        if (refusal := _refusal(error, repo_id, revision)) is not None:
            raise HubError(refusal) from error
        return _cached_plan(repo_id, revision, cache, error)
    except HFValidationError as error:
        raise HubError(f"{repo_id!r} is no valid hub id: {error}") from error
    except Exception as error:
        # The library's transport raises its own family, which has changed between releases.
        return _cached_plan(repo_id, revision, cache, error)
    commit = str(info.sha)
    files = needed_files(repo_id, info.siblings or [])
    storage = storage_folder(cache, repo_id)
    return DownloadPlan(
        repo_id=repo_id,
        revision=commit,
        files=files,
        total_bytes=sum(file.size for file in files),
        bytes_to_fetch=sum(file.size for file in files if not is_cached(storage, commit, file)),
        disk_free_bytes=free_bytes(cache),
        cache_dir=cache,
    )


def download(plan: DownloadPlan, progress: Progress | None = None) -> Path:
    """Fetch what a plan lists; files that are there already are not fetched again.

    Args:
        plan: from ``plan_download``.
        progress: told bytes on disk and bytes in all, a few times a second.

    Returns:
        The snapshot folder.

    Raises:
        RequestError: the disk is too small.
        HubError: the transfer failed; files that are complete are kept for the next run.
    """
    if plan.offline:
        return plan.folder
    if not plan.fits_disk:
        raise RequestError(
            f"{plan.repo_id} needs {format_bytes(plan.bytes_to_fetch)} on the disk of "
            f"{plan.cache_dir}, free are {format_bytes(plan.disk_free_bytes)} and "
            f"{format_bytes(DISK_RESERVE_BYTES)} stay in reserve. Free some space, or set HF_HOME "
            "to a larger disk."
        )
    try:
        with _Watch(plan, progress):
            folder = snapshot_download(
                plan.repo_id,
                revision=plan.revision,
                cache_dir=plan.cache_dir,
                endpoint=_endpoint(),
                allow_patterns=[glob.escape(file.name) for file in plan.files],
                tqdm_class=_SilentBar,
            )
    except HfHubHTTPError as error:
        refusal = _refusal(error, plan.repo_id, plan.revision)
        raise HubError(refusal or _interrupted(plan, error)) from error
    except Exception as error:
        # Transport, disk and transfer-library errors share no base class.
        raise HubError(_interrupted(plan, error)) from error
    return Path(folder)


def fetch_checkpoint(
    repo_id: str,
    revision: str | None = None,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
    announce: Callable[[DownloadPlan], None] | None = None,
) -> Path:
    """Plan and download in one go.

    Args:
        repo_id: hub id.
        revision: branch, tag or commit; it is resolved to a commit first.
        cache_dir: hub cache; the one of huggingface_hub when left out.
        progress: told bytes on disk and bytes in all.
        announce: given the plan before the first byte is fetched; may raise to stop.

    Raises:
        RequestError: the disk is too small.
        HubError: see ``plan_download`` and ``download``.
    """
    plan = plan_download(repo_id, revision, cache_dir)
    if announce is not None:
        announce(plan)
    return download(plan, progress)


class _SilentBar(tqdm):
    """The library's own bars stay off; the caller decides what is shown."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]


class _Watch:
    """Reports how much of a plan is on disk while something else writes it."""

    def __init__(self, plan: DownloadPlan, progress: Progress | None) -> None:
        self._plan = plan
        self._progress = progress
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        if self._progress is not None:
            self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop.set()
        if self._progress is None:
            return
        self._thread.join()
        if kind is None:
            self._progress("download", self._plan.total_bytes, self._plan.total_bytes)

    def _run(self) -> None:
        assert self._progress is not None
        plan = self._plan
        storage = storage_folder(plan.cache_dir, plan.repo_id)
        while not self._stop.wait(_POLL_SECONDS):
            done = sum(bytes_on_disk(storage, plan.revision, file) for file in plan.files)
            self._progress("download", done, plan.total_bytes)


def _endpoint() -> str | None:
    """Read at each call: the library reads the variable once, when it is imported."""
    return os.environ.get("HF_ENDPOINT") or None


def _within_deadline(ask: Callable[[], Any]) -> Any:
    """Run ``ask`` in a thread of its own and give up waiting after the deadline."""
    outcome: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            outcome.append((True, ask()))
        except BaseException as error:
            outcome.append((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(DEADLINE_SECONDS)
    if not outcome:
        raise TimeoutError(f"no answer within {DEADLINE_SECONDS:.0f} s")
    succeeded, value = outcome[0]
    if succeeded:
        return value
    raise value


def _refusal(error: HfHubHTTPError, repo_id: str, revision: str | None) -> str | None:
    """What to say where the hub answered; None where it is merely out of order."""
    if isinstance(error, GatedRepoError):
        return (
            f"{repo_id} is gated: its owner wants you to accept terms first. Do so on its page, "
            f"then log in with `hf auth login` or set HF_TOKEN. {_FOLDER_HINT}"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no revision {revision!r}. Give a branch, tag or commit that exists."
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"the hub knows no model {repo_id!r}, or it is private. Check the spelling, or log in "
            f"with `hf auth login` if it is yours. {_FOLDER_HINT}"
        )
    status = error.response.status_code
    if 400 <= status < 500 and status not in {408, 429}:
        return f"the hub refuses {repo_id} with status {status}: {error}. {_FOLDER_HINT}"
    return None


def _interrupted(plan: DownloadPlan, error: Exception) -> str:
    return (
        f"fetching {plan.repo_id} at {plan.revision[:12]} broke off: {_first_line(error)}. Run the "
        f"same command again; files that are complete are kept. {_FOLDER_HINT}"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _cached_plan(repo_id: str, revision: str | None, cache: Path, error: Exception) -> DownloadPlan:
    """The plan that an earlier download leaves, where the hub is out of reach."""
    storage = storage_folder(cache, repo_id)
    commit = cached_commit(storage, revision)
    if commit is None:
        raise HubError(
            f"the model hub at {_endpoint() or constants.ENDPOINT} cannot be reached "
            f"({_first_line(error)}), and {repo_id} is not in {cache}. Nothing was written. Check "
            f"the network, proxy or HF_ENDPOINT. {_FOLDER_HINT}"
        ) from error
    folder = storage / "snapshots" / commit
    files = tuple(
        RemoteFile(file.name, file.stat().st_size, None)
        for file in sorted(folder.iterdir())
        if file.is_file()
    )
    return DownloadPlan(
        repo_id=repo_id,
        revision=commit,
        files=files,
        total_bytes=sum(file.size for file in files),
        bytes_to_fetch=0,
        disk_free_bytes=free_bytes(cache),
        cache_dir=cache,
        offline=True,
    )
