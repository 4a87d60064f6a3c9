"""Downloads from a stand-in for the hub on the loopback device, and every way they can fail."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants

from llava_edge.convert.checkpoint.hub import download as hub
from llava_edge.convert.checkpoint.hub.download import (
    DownloadPlan,
    download,
    fetch_checkpoint,
    plan_download,
)
from llava_edge.convert.checkpoint.open import open_checkpoint
from llava_edge.convert.checkpoint.source import resolve_source
from llava_edge.convert.testing.random_checkpoint import write_random_checkpoint
from llava_edge.convert.testing.random_spec import preset
from llava_edge.profiles.errors import CheckpointError, HubError, RequestError

COMMIT = "c" * 40
REPO = "llava-hf/llava-v1.6-odd-hf"


@dataclass
class Hub:
    """What the stand-in serves, how it misbehaves, and what it was asked."""

    files: dict[str, bytes]
    repo_id: str = REPO
    status: int = 200
    error_code: str = ""
    files_status: int = 200
    silent_seconds: float = 0.0
    cut_once: set[str] = field(default_factory=set)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    url: str = ""

    def fetched(self) -> list[str]:
        return [
            path.rsplit("/", 1)[-1]
            for verb, path, _ in self.requests
            if verb == "GET"
            if "/resolve/" in path
        ]


def etag_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_handler(state: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            state.requests.append((self.command, self.path, self.headers.get("Range")))
            time.sleep(state.silent_seconds)
            path = self.path.split("?")[0]
            if path.startswith("/api/models/"):
                self.answer_api(path)
            else:
                self.answer_file(path)

        def answer_api(self, path: str) -> None:
            if state.status != 200:
                self.send(state.status, b"{}", {"X-Error-Code": state.error_code})
            elif not path.startswith(f"/api/models/{state.repo_id}"):
                self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif "/tree/" in path:
                self.send_json([self.entry("path", name) for name in state.files])
            elif re.search(r"/revision/(?!main$|c{40}$)", path):
                self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            else:
                siblings = [self.entry("rfilename", name) for name in state.files]
                self.send_json({"id": REPO, "sha": COMMIT, "siblings": siblings})

        def entry(self, key: str, name: str) -> dict[str, Any]:
            data = state.files[name]
            sha = etag_of(data)
            entry: dict[str, Any] = {key: name, "size": len(data), "type": "file"}
            entry |= {"blobId": sha[:40], "oid": sha[:40]}
            if name.endswith(".safetensors"):
                lfs = {"sha256": sha, "oid": sha, "size": len(data), "pointerSize": 134}
                entry["lfs"] = lfs
            return entry

        def answer_file(self, path: str) -> None:
            name = path.split(f"/resolve/{COMMIT}/")[-1]
            if state.files_status != 200:
                self.send(state.files_status, b"{}", {"X-Error-Code": state.error_code})
                return
            data = state.files[name]
            lfs = name.endswith(".safetensors")
            etag = etag_of(data) if lfs else etag_of(data)[:40]
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
            if wanted:
                start = int(wanted[1])
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                self.send(206, data[start:], headers)
            elif self.command == "GET" and name in state.cut_once:
                state.cut_once.discard(name)
                self.send(200, data, headers, cut=len(data) // 2)
            else:
                self.send(200, data, headers)

        def send_json(self, value: object) -> None:
            self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def send(
            self, status: int, data: bytes, headers: dict[str, str], cut: int | None = None
        ) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                # A client that gave up has closed its end.
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(data[:cut])
            if cut is not None:
                self.close_connection = True

    return Handler


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "odd"
    write_random_checkpoint(folder, preset("odd"), max_shard_bytes=300_000)
    return folder


@pytest.fixture
def serving(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    files = {file.name: file.read_bytes() for file in sorted(checkpoint.iterdir())}
    files |= {
        "README.md": b"# a card",
        ".gitattributes": b"",
        "pytorch_model.bin": b"never",
        "pytorch_model.bin.index.json": b"{}",
        "onnx/model.safetensors": b"an export",
    }
    state = Hub(files)
    server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(state))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", state.url)
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    return f"http://127.0.0.1:{port}"


def test_a_checkpoint_arrives_whole_by_commit_and_nothing_else_does(
    serving: Hub, cache: Path, checkpoint: Path
) -> None:
    announced: list[DownloadPlan] = []
    folder = fetch_checkpoint(REPO, cache_dir=cache, announce=announced.append)
    assert {file.name for file in folder.iterdir()} == {f.name for f in checkpoint.iterdir()}
    opened, first = open_checkpoint(folder), open_checkpoint(checkpoint)
    assert opened.digest() == first.digest()
    np.testing.assert_array_equal(opened.read("lm_head.weight"), first.read("lm_head.weight"))
    assert (opened.source_id, opened.revision) == (REPO, COMMIT)
    assert folder == announced[0].folder
    resolved = [path for _, path, _ in serving.requests if "/resolve/" in path]
    assert all(f"/resolve/{COMMIT}/" in path for path in resolved)
    assert not {"pytorch_model.bin", "README.md"} & set(serving.fetched())


def test_the_plan_says_everything_before_a_byte_is_fetched(
    serving: Hub, cache: Path, checkpoint: Path
) -> None:
    plan = plan_download(REPO, "main", cache)
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    assert (plan.repo_id, plan.revision, plan.offline) == (REPO, COMMIT, False)
    assert (plan.total_bytes, plan.bytes_to_fetch) == (size, size)
    assert plan.disk_free_bytes == pytest.approx(shutil.disk_usage(cache.parent).free, rel=0.2)
    assert not cache.exists()
    assert serving.fetched() == []


def test_what_is_there_already_is_not_fetched_again(serving: Hub, cache: Path) -> None:
    folder = fetch_checkpoint(REPO, cache_dir=cache)
    serving.requests.clear()
    shard = next(folder.glob("model-00002*"))
    size = shard.stat().st_size
    shard.resolve().unlink()
    shard.unlink()
    plan = plan_download(REPO, cache_dir=cache)
    assert plan.bytes_to_fetch == size
    assert download(plan) == folder
    assert serving.fetched() == [shard.name]
    assert plan_download(REPO, cache_dir=cache).bytes_to_fetch == 0


def test_a_connection_that_breaks_is_resumed_in_the_middle(
    serving: Hub, cache: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The library keeps whole chunks only, and its own are larger than this checkpoint.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    name = "model-00002-of-00003.safetensors"
    assert name in serving.files
    serving.cut_once.add(name)
    folder = fetch_checkpoint(REPO, cache_dir=cache)
    half = len(serving.files[name]) // 2 // 1000 * 1000
    ranges = [
        span for verb, path, span in serving.requests if verb == "GET" and path.endswith(name)
    ]
    assert ranges == [None, f"bytes={half}-"]
    assert open_checkpoint(folder).digest() == open_checkpoint(checkpoint).digest()


def test_progress_ends_at_the_total(serving: Hub, cache: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    serving.silent_seconds = 0.1
    fetch_checkpoint(REPO, cache_dir=cache, progress=lambda *at: seen.append(at))
    total = plan_download(REPO, cache_dir=cache).total_bytes
    assert seen[-1] == ("download", total, total)
    assert len(seen) > 1
    assert all(0 <= done <= of == total for _, done, of in seen)


def test_a_disk_that_is_too_small_is_refused_before_the_download(
    serving: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "free_bytes", lambda _: 300 << 20)
    monkeypatch.setattr(hub, "DISK_RESERVE_BYTES", 300 << 20)
    with pytest.raises(RequestError, match=r"free are 300\.0 MiB") as caught:
        fetch_checkpoint(REPO, cache_dir=cache)
    assert caught.value.exit_code == 2
    assert serving.fetched() == []
    assert not cache.exists()


def test_a_hub_that_is_not_there_is_said_at_once_with_the_way_out(
    unreachable: str, cache: Path
) -> None:
    begin = time.monotonic()
    with pytest.raises(HubError) as caught:
        fetch_checkpoint(REPO, cache_dir=cache)
    assert time.monotonic() - begin < 5
    assert caught.value.exit_code == 1
    for part in (unreachable, "cannot be reached", "CHECKPOINT=/path/to/folder"):
        assert part in str(caught.value)
    assert not cache.exists()


def test_a_hub_that_never_answers_is_given_up(
    serving: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hub.DEADLINE_SECONDS < 15
    monkeypatch.setattr(hub, "DEADLINE_SECONDS", 0.4)
    serving.silent_seconds = 2
    begin = time.monotonic()
    with pytest.raises(HubError, match="cannot be reached"):
        plan_download(REPO, cache_dir=cache)
    assert time.monotonic() - begin < 1.5


def test_a_lookup_that_hangs_is_given_up(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Name resolution has no timeout; only the deadline around the whole question has."""
    release = threading.Event()
    monkeypatch.setattr(hub, "DEADLINE_SECONDS", 0.2)
    monkeypatch.setattr(hub.HfApi, "model_info", lambda *_, **__: release.wait(5))
    with pytest.raises(HubError, match=r"no answer within 0 s"):
        plan_download(REPO, cache_dir=cache)
    release.set()


def test_an_earlier_download_serves_when_the_hub_is_away(
    serving: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch_checkpoint(REPO, cache_dir=cache)
    serving.status = 503
    for revision in (None, COMMIT):
        plan = plan_download(REPO, revision, cache)
        assert (plan.offline, plan.bytes_to_fetch, plan.revision) == (True, 0, COMMIT)
        assert download(plan) == folder
    refs = folder.parent.parent / "refs"
    refs.mkdir(exist_ok=True)
    (refs / "a-tag").write_text(COMMIT)
    assert plan_download(REPO, "a-tag", cache).revision == COMMIT
    for revision in ("other-branch", "d" * 40):
        with pytest.raises(HubError, match="cannot be reached"):
            plan_download(REPO, revision, cache)


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (404, "RepoNotFound", "knows no model"),
        (401, "RepoNotFound", "knows no model"),
        (403, "GatedRepo", "is gated"),
        (404, "RevisionNotFound", "has no revision"),
        (403, "", "refuses"),
        (500, "", "cannot be reached"),
    ],
)
def test_a_refusal_is_said_in_words(
    serving: Hub, cache: Path, status: int, code: str, said: str
) -> None:
    serving.status, serving.error_code = status, code
    with pytest.raises(HubError, match=said):
        plan_download(REPO, cache_dir=cache)


def test_a_revision_that_is_not_there_is_named(serving: Hub, cache: Path) -> None:
    with pytest.raises(HubError, match="has no revision 'v9'"):
        plan_download(REPO, "v9", cache)


def test_gated_files_are_said_as_such(serving: Hub, cache: Path) -> None:
    plan = plan_download(REPO, cache_dir=cache)
    serving.files_status, serving.error_code = 403, "GatedRepo"
    with pytest.raises(HubError, match="is gated"):
        download(plan)


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        (["config.json", "pytorch_model.bin"], "only pickle files (pytorch_model.bin)"),
        (["config.json", "onnx/model.safetensors"], "found none"),
        (["model-00001-of-00003.safetensors"], "has no config.json"),
    ],
    ids=["pickles only", "export only", "no config"],
)
def test_a_repository_without_what_is_needed_is_refused(
    serving: Hub, cache: Path, keep: list[str], said: str
) -> None:
    serving.files = {name: serving.files[name] for name in keep}
    with pytest.raises(HubError) as caught:
        plan_download(REPO, cache_dir=cache)
    assert said in str(caught.value)


def test_one_weight_file_is_preferred_to_shards_as_when_opening(serving: Hub, cache: Path) -> None:
    serving.files["model.safetensors"] = b"one"
    serving.files["consolidated.safetensors"] = b"two"
    names = [file.name for file in plan_download(REPO, cache_dir=cache).files]
    assert [name for name in names if name.endswith(".safetensors")] == ["model.safetensors"]


def test_an_existing_folder_always_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unreachable: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / REPO).mkdir(parents=True)
    assert resolve_source(REPO).folder == Path(REPO)
    assert resolve_source(str(tmp_path)).repo_id is None


def test_ids_carry_a_revision_behind_the_at_sign() -> None:
    plain, pinned = resolve_source(REPO), resolve_source(f"{REPO}@refs/pr/4")
    assert (plain.folder, plain.repo_id, plain.revision) == (None, REPO, None)
    assert (pinned.repo_id, pinned.revision) == (REPO, "refs/pr/4")


@pytest.mark.parametrize(
    "text",
    ["", "model", "./odd", "/no/such/folder", "a/b/c", "a/..", f"{REPO}@", f"{REPO}@../x", "a b/c"],
)
def test_what_is_neither_folder_nor_id_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match="neither an existing folder nor a hub id"):
        resolve_source(text)


def test_a_file_is_neither_folder_nor_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="neither"):
        resolve_source("a/model.safetensors")
