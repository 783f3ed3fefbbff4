"""A hub on this machine, with as much of its protocol as a model needs, and its local copy (the client's cache)."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


def use(monkeypatch: pytest.MonkeyPatch, cache: Path, endpoint: str | None) -> None:
    """Let the client ask this hub and keep its copies there; endpoint None = offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", endpoint is None)
    if endpoint is not None:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # keeps the hub that it was made for


def keep(cache: Path, repository: str, commit: str, folder: Path, branch: str = "main") -> Path:
    """A local copy of a commit, as the client leaves it, and what the branch stands for. Returns the snapshot's folder."""
    root = cache / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir(exist_ok=True)
    for file in folder.iterdir():
        blob = root / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(blob)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / branch).write_text(commit)
    return snapshot


class Hub(ThreadingHTTPServer):
    """commits: folders of one repository's files by commit; branches: commits by name; asked: methods and paths, in order."""

    daemon_threads = True

    def __init__(self, repository: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repository = repository
        self.commits: dict[str, Path] = {}
        self.branches: dict[str, str] = {}
        self.asked: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(repository: str) -> Iterator[Hub]:
    with Hub(repository) as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        """Nothing: the tests read `asked`."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        hub, path = self.server, self.path.split("?")[0]
        hub.asked.append(f"{self.command} {path}")
        info, files = f"/api/models/{hub.repository}", f"/{hub.repository}/resolve/"
        if path == info or path.startswith(f"{info}/revision/"):
            commit = self._commit(path.removeprefix(info).removeprefix("/revision/") or "main")
            if commit is not None:
                siblings = [{"rfilename": file.name} for file in sorted(hub.commits[commit].iterdir())]
                self._send(200, json.dumps({"id": hub.repository, "sha": commit, "siblings": siblings}).encode(), body)
        elif path.startswith(files):
            revision, _, name = path.removeprefix(files).partition("/")
            commit = self._commit(revision)
            if commit is not None:
                file = hub.commits[commit] / name
                if file.is_file():
                    content = file.read_bytes()
                    etag = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
                    self._send(200, content, body, etag)
                else:
                    self._send(404, b"", body, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        elif path.startswith(f"{info}/tree/"):
            self._send(404, b"", body, {"X-Error-Code": "EntryNotFound"})
        else:
            self._send(404, b"", body, {"X-Error-Code": "RepoNotFound"})

    def _commit(self, revision: str) -> str | None:
        commit = self.server.branches.get(revision, revision)
        if commit in self.server.commits:
            return commit
        self._send(404, b"", True, {"X-Error-Code": "RevisionNotFound"})
        return None

    def _send(self, status: int, content: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)
