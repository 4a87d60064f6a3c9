"""ArtifactWriter: an artifact appears whole or not at all, and an interrupted one goes on.

Beside the output ``OUT`` lies ``OUT.partial`` while the work is going on:

    OUT.partial/.lock          held as long as a conversion writes here
    OUT.partial/journal.json   the request and the finished parts, with sizes and digests, and how
                               many threads they were computed with
    OUT.partial/artifact/      the files; renamed to OUT in one step at the end
    OUT.partial/work/          what an unfinished part resumes from
    OUT.partial/replaced/      the old OUT, for the moment of the exchange under ``force``

Whatever the journal does not hold is removed before work goes on, so a part is there whole or not
at all as well.

An ``OUT`` that exists and is empty is used. Where it is a mount point (a volume of a container), no
folder can be renamed to it, and what lies beside it is another disk: ``OUT.partial`` and
``OUT.failed`` then lie inside it; see ``volume_output``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from llava_edge.convert.checkpoint.files import changed_names
from llava_edge.convert.output.journal import Journal, Part, read_journal
from llava_edge.convert.output.output_path import output_path, partial_of, refuse_existing
from llava_edge.convert.output.part_files import (
    file_stamps,
    is_intact,
    remove_unlisted,
    seal_new_files,
)
from llava_edge.convert.output.partial_folder import (
    ARTIFACT,
    JOURNAL,
    LOCK,
    REPLACED,
    WORK,
    lock_partial,
    remove,
)
from llava_edge.convert.output.volume_output import (
    is_empty_folder,
    move_up,
)
from llava_edge.convert.util.files import (
    free_bytes,
    full_disk_reason,
    refusal,
)
from llava_edge.profiles.errors import (
    ArtifactError,
    ExportError,
    LlavaEdgeError,
    OutputExistsError,
    RequestError,
    shorten,
)
from llava_edge.profiles.sizes import format_bytes
from llava_edge.runtime.artifact.certificate import utc_now
from llava_edge.runtime.artifact.conversion_record import (
    CONVERSION_VERSION,
    ConversionRecord,
    PartRecord,
)
from llava_edge.runtime.artifact.manifest import FileEntry, Manifest
from llava_edge.runtime.artifact.manifest_validation import (
    CARD,
    CERTIFICATE,
    CONVERSION,
    MANIFEST,
)
from llava_edge.runtime.artifact.open import check_graphs, check_listing, read_manifest
from llava_edge.runtime.artifact.opened_files import OpenedFiles
from llava_edge.runtime.util.atomic_write import sync, write_atomic
from llava_edge.runtime.util.checksummed_json import seal
from llava_edge.runtime.util.host_memory import peak_host_bytes
from llava_edge.runtime.util.json_codec import to_json
from llava_edge.runtime.util.progress import Notify
from llava_edge.runtime.verification.host import describe_host

_LOG = logging.getLogger(__name__)
_REPORT = "failure.json"


class ArtifactWriter:
    """Writes one artifact. Use as a context manager, so that the lock is given back.

    Args:
        out: the artifact's folder; everything is written beside it until it is complete.
        request_key: what was asked (checkpoint by name, options) as JSON values. An unfinished
            conversion is taken over only by a request with an equal key.
        inputs: what else the result depends on (files, libraries), a digest or version each. Where
            one of them differs, everything that an earlier run finished is made again.
        check_inputs: raises where inputs changed since they were digested. Called before a part
            counts as finished, and before the artifact takes its place.
        threads: that a new conversion computes with; one that is resumed keeps its own.
        say: told which inputs changed since an earlier run.
        force: replace an existing artifact, and discard an unfinished conversion.
        needed_bytes: what the whole artifact will take, for the message on a full disk.

    Raises:
        OutputExistsError: ``out`` exists and ``force`` is not set.
        RequestError: another conversion into ``out`` is running; or an unfinished one with another
            request is there; or what lies in the way was not written by this class.
        ExportError: the folder cannot be created.

    Attributes:
        folder: where parts put their files, laid out as in the artifact.
        work: where a part may keep what is needed to go on after an interruption; it is gone once
            the artifact is in its place.
        threads: that every part is to be computed with, since last bits can depend on them.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        request_key: Mapping[str, Any],
        *,
        force: bool = False,
        needed_bytes: int | None = None,
        inputs: Mapping[str, str] | None = None,
        check_inputs: Callable[[], None] = lambda: None,
        threads: int = 1,
        say: Notify = _LOG.warning,
    ) -> None:
        self.out = output_path(out)
        if not self.out.name:
            raise RequestError(f"{self.out} cannot be an output folder. Name a folder below it.")
        self._was_there = os.path.lexists(self.out)
        self._partial = partial_of(self.out)
        self._beside = self._partial.parent
        self.folder = self._partial / ARTIFACT
        self.work = self._partial / WORK
        self._force = force
        self._needed_bytes = needed_bytes
        self._lock = -1
        self._asked: set[str] = set()
        self._check_inputs = check_inputs
        self._say = say
        self._journal = Journal({}, dict(inputs or {}), threads=threads)
        request = json.loads(json.dumps(dict(request_key), allow_nan=False))
        self._refuse_existing()
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._lock = lock_partial(self._partial)
            self._restore_replaced()
            self._refuse_existing()
            self._journal = self._open_journal(request, self._journal.inputs)
            self.folder.mkdir(exist_ok=True)
            self._remove_unfinished()
            self._write_journal()
        except OSError as error:
            self._release()
            raise self._export_error("preparing the folder", error) from error
        except BaseException:
            self._release()
            raise

    @property
    def files(self) -> Mapping[str, FileEntry]:
        """Files of the parts that are finished, by name."""
        return self._journal.files

    @property
    def threads(self) -> int:
        """See the class."""
        return self._journal.threads

    @property
    def record(self) -> ConversionRecord:
        """What the conversion took so far, in all its runs, and where it runs."""
        journal = self._journal
        return ConversionRecord(
            schema_version=CONVERSION_VERSION,
            manifest_sha256="",
            began=journal.began,
            finished=utc_now(),
            runs=journal.runs,
            threads=journal.threads,
            host=describe_host("cpu"),
            parts={name: part.took for name, part in journal.parts.items()},
        )

    @property
    def finished_bytes(self) -> int:
        """Bytes of the parts that are finished, by this run or an earlier one."""
        return sum(entry.bytes for entry in self._journal.files.values())

    def part(self, name: str, build: Callable[[Path], Any]) -> Any:
        """Have one part of the artifact built, unless an earlier run finished it.

        Args:
            name: of the part, in the journal only.
            build: called with ``folder``; creates files anywhere below it, touches no file of
                another part, and returns a JSON value (or None).

        Returns:
            The JSON value of ``build``, now or when the part was built (lists for tuples).

        Raises:
            ExportError: writing failed, the disk is full, or the part left files that an artifact
                cannot hold. Earlier parts stay for the next run.
        """
        self._asked.add(name)
        finished = self._journal.parts.get(name)
        if finished is not None:
            if is_intact(self.folder, finished.files):
                _LOG.info("part %s is taken from %s", name, self._partial)
                return finished.value
            _LOG.warning("part %s in %s was changed and is built again", name, self._partial)
            del self._journal.parts[name]
            self._remove_unfinished()
        with self._cleaning(f"part {name!r}"):
            before = file_stamps(self.folder)
            started = time.perf_counter()
            value = json.loads(json.dumps(build(self.folder), allow_nan=False))
            took = PartRecord(round(time.perf_counter() - started, 3), peak_host_bytes())
            self._require_inputs()
            self._journal.parts[name] = Part(seal_new_files(self.folder, before), value, took)
            try:
                self._write_journal()
            except BaseException:
                del self._journal.parts[name]
                raise
        return value

    def prepare(
        self, manifest: Manifest, card: str, conversion: ConversionRecord | None = None
    ) -> Path:
        """Complete the folder: manifest with all files, and what it does not list.

        Args:
            manifest: ``files`` and ``self_sha256`` are filled in here.
            card: text of ``README.md``.
            conversion: for ``conversion.json``; ``manifest_sha256`` is filled in here.

        Returns:
            ``folder``, which is still in ``OUT.partial``.

        Raises:
            ExportError: writing failed, or the runtime would refuse the result.
        """
        with self._cleaning("the manifest"):
            for name in set(self._journal.parts) - self._asked:
                # Left by an earlier run and not asked for by this one: nobody compared its files.
                del self._journal.parts[name]
            self._remove_unfinished()
            complete = replace(manifest, files=self._journal.files, self_sha256="")
            write_atomic(self.folder / CARD, card.encode("utf-8"))
            write_atomic(self.folder / MANIFEST, seal(to_json(complete)))
            try:
                written, digest = read_manifest(self.folder)
                record = replace(conversion or self.record, manifest_sha256=digest)
                text = json.dumps(to_json(record), indent=2, sort_keys=True, allow_nan=False)
                write_atomic(self.folder / CONVERSION, text.encode("ascii") + b"\n")
                check_listing(self.folder, written)
                with OpenedFiles(self.folder, written.files) as files:
                    check_graphs(files, written)
            except ArtifactError as error:
                raise ExportError(f"the artifact just written would be refused: {error}") from error
        return self.folder

    def publish(self) -> Path:
        """Move the prepared folder to its place in one step, and return that.

        Raises:
            OutputExistsError: something appeared at ``out`` meanwhile.
            ExportError: moving failed; the prepared folder stays.
        """
        self._require_inputs()
        if os.path.lexists(self.out) and not (self._was_there or self._force):
            raise OutputExistsError(
                f"{self.out} appeared meanwhile. Nothing is overwritten unasked: remove it and run "
                "the same command again."
            )
        self._refuse_existing()
        old = self._partial / REPLACED
        try:
            if self._beside == self.out:
                move_up(self.out, self._partial)
                failed = self.out / f"{self.out.name}.failed"
                if (failed / _REPORT).is_file():
                    remove(failed)
                self._discard()
                return self.out
            # An empty folder is replaced by another one by itself.
            if os.path.lexists(self.out) and not is_empty_folder(self.out):
                os.rename(self.out, old)
            try:
                os.rename(self.folder, self.out)
            except BaseException:
                self._restore_replaced()
                raise
            sync(self.out.parent)
        except OSError as error:
            raise self._export_error("moving the artifact to its place", error) from error
        self._discard()
        return self.out

    def finish(self, manifest: Manifest, card: str) -> Path:
        """``prepare`` and ``publish``."""
        self.prepare(manifest, card)
        return self.publish()

    def keep_failed(self, report: Mapping[str, Any]) -> Path:
        """Put what was written aside in ``OUT.failed`` with the report, for people to look at.

        An older ``OUT.failed`` of this tool is replaced. Numbers that are not finite stand in the
        report as text.

        Raises:
            RequestError: a folder of that name exists that this tool did not write.
            ExportError: writing failed.
        """
        failed = self._beside / f"{self.out.name}.failed"
        if os.path.lexists(failed) and not (failed / _REPORT).is_file():
            raise RequestError(f"{failed} exists and holds no {_REPORT}; move it out of the way.")
        self._require_inputs()
        try:
            text = json.dumps(_finite(report), indent=2, sort_keys=True, default=str)
            write_atomic(self.folder / _REPORT, text.encode("utf-8") + b"\n")
            if os.path.lexists(failed):
                shutil.rmtree(failed)
            os.rename(self.folder, failed)
            sync(failed.parent)
        except OSError as error:
            raise self._export_error(f"keeping {failed}", error) from error
        self._discard()
        return failed

    def close(self) -> None:
        """Give the lock back; finished parts and work stay for the next run of the same request."""
        if self._lock >= 0 and not self._journal.parts and not self._has_work():
            self._discard()
        self._release()

    def _has_work(self) -> bool:
        return self.work.is_dir() and any(self.work.iterdir())

    def __enter__(self) -> ArtifactWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _refuse_existing(self) -> None:
        refuse_existing(self.out, force=self._force)

    def _restore_replaced(self) -> None:
        """Undo an exchange that ended half way: the old artifact belongs where it was."""
        old = self._partial / REPLACED
        if not os.path.lexists(old):
            return
        if os.path.lexists(self.out):
            remove(old)
        else:
            os.rename(old, self.out)

    def _open_journal(self, request: dict[str, Any], inputs: dict[str, str]) -> Journal:
        path = self._partial / JOURNAL
        if self._force or not path.exists():
            return self._begin_anew(request, inputs)
        found = read_journal(path, request, self._journal.threads)
        changed = changed_names(found.inputs, inputs)
        if changed:
            # What one part is made of goes into the others through calibration and golden prompts.
            made = ", ".join(sorted(found.parts)) or "nothing so far"
            self._say(
                f"changed since the interrupted run: {shorten(changed)}. Made again: {made}, and "
                "what was begun."
            )
            return self._begin_anew(request, inputs)
        found.runs += 1
        return found

    def _begin_anew(self, request: dict[str, Any], inputs: dict[str, str]) -> Journal:
        remove(self.folder)
        remove(self.work)
        return Journal(request, inputs, threads=self._journal.threads)

    def _require_inputs(self) -> None:
        """Make sure that inputs are unchanged; else what was begun is a mixture and goes."""
        try:
            self._check_inputs()
        except LlavaEdgeError:
            remove(self.work)
            raise

    def _write_journal(self) -> None:
        text = json.dumps(to_json(self._journal), indent=1, allow_nan=False)
        write_atomic(self._partial / JOURNAL, text.encode("utf-8"))

    @contextlib.contextmanager
    def _cleaning(self, doing: str) -> Iterator[None]:
        """Remove what was left unfinished when anything goes wrong, and say what to do."""
        try:
            yield
        except BaseException as error:
            written = self._unfinished_bytes()
            with contextlib.suppress(OSError):
                self._remove_unfinished()
            if not isinstance(error, Exception):
                raise
            if isinstance(error, OSError) or full_disk_reason(error) is not None:
                raise self._export_error(f"writing {doing}", error, written) from error
            if isinstance(error, ArtifactError):
                raise ExportError(f"writing {doing} of {self.out} failed: {error}") from error
            raise

    def _unfinished_bytes(self) -> int:
        listed = self._journal.files
        with contextlib.suppress(OSError):
            return sum(
                stamp[0] for name, stamp in file_stamps(self.folder).items() if name not in listed
            )
        return 0

    def _remove_unfinished(self) -> None:
        remove_unlisted(self.folder, self._journal.files)

    def _export_error(self, doing: str, error: BaseException, written: int = 0) -> LlavaEdgeError:
        reason = full_disk_reason(error)
        kept = sorted(self._journal.parts)
        resume = (
            f"Finished parts ({', '.join(kept)}) are kept in {self._partial}: the same command "
            "goes on from there."
            if kept
            else "Nothing is left half-written: run the same command again."
        )
        if reason is None:
            said = refusal(error) if isinstance(error, OSError) else str(error)
            return ExportError(f"{doing} of {self.out} failed: {said}. {resume}")
        room = [f"{format_bytes(free_bytes(self._beside))} are free at {self._beside}"]
        if self._needed_bytes is not None:
            left = max(self._needed_bytes - self.finished_bytes, 0)
            room.insert(0, f"{format_bytes(left)} are still needed")
        elif written:
            room.insert(0, f"more than {format_bytes(written)} are needed")
        return ExportError(
            f"{doing} of {self.out} failed: {reason}; {', '.join(room)}. Make room first. {resume}"
        )

    def _discard(self) -> None:
        """Remove the partial folder and give the lock back; the lock goes last."""
        try:
            names = sorted(entry.name for entry in self._partial.iterdir())
            for name in [name for name in names if name != LOCK] + [LOCK]:
                remove(self._partial / name)
            self._partial.rmdir()
        except OSError as error:
            _LOG.warning("%s could not be removed: %s", self._partial, error)
        self._release()

    def _release(self) -> None:
        descriptor, self._lock = self._lock, -1
        if descriptor >= 0:
            os.close(descriptor)


def write_certificate(folder: Path, certificate: Mapping[str, Any]) -> Path:
    """Seal a certificate for the manifest that lies in ``folder`` and put it there.

    Args:
        folder: an artifact, finished or prepared.
        certificate: JSON values; ``passed`` decides whether the artifact counts as verified.
            ``manifest_sha256`` and ``self_sha256`` are filled in here.

    Raises:
        ArtifactError: the folder's manifest is not in order.
        ExportError: writing failed, or a value has no JSON form.
    """
    _, manifest_sha256 = read_manifest(folder)
    path = folder / CERTIFICATE
    data = seal({**certificate, "manifest_sha256": manifest_sha256})
    try:
        write_atomic(path, data)
    except OSError as error:
        raise ExportError(f"the certificate cannot be written: {refusal(error)}.") from error
    return path


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity, and failures are where they occur."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
