"""A hub on loopback that speaks what its clients use of the real protocol, and misbehaves as a test's rules say.

Large files are redirected to another host by a signed address, small ones are sent by the hub itself; hashes are those
of the real hub: SHA-256 for large files, git's SHA-1 for small ones.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import hub_uploads

LARGE = (".safetensors", ".bin", ".parquet", ".h5", ".gz")


@dataclass
class Rule:
    """What happens to requests `METHOD /path` that match: each `times` times, then no more.

    Attributes:
        pattern: regular expression, searched.
        status: answered instead, with `headers` and `body`.
        cut: the body ends after this share, and the connection with it.
        seconds: to wait before the answer.
        drop: close the connection without an answer.
        garble: change a byte in the middle of the body.
    """

    pattern: str
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut: float | None = None
    seconds: float = 0.0
    drop: bool = False
    garble: bool = False
    times: float = float("inf")


@dataclass
class Repo:
    """A repository: its states by commit, and who may read it."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: bool = False
    xet: bool = False
    private: bool = False
    message: str = ""  # of the newest commit

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    def push(self, files: dict[str, bytes]) -> str:
        commit = hashlib.sha1(json.dumps({name: oid(name, body) for name, body in files.items()}).encode()).hexdigest()
        self.commits.pop(commit, None)
        self.commits[commit] = files
        return commit


def oid(name: str, body: bytes) -> str:
    if name.endswith(LARGE):
        return hashlib.sha256(body).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


@dataclass
class Hub:
    """The repositories by `models/org/name` or `datasets/org/name`, the valid tokens, and what was asked."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    rules: list[Rule] = field(default_factory=list)
    tokens: tuple[str, ...] = ("hf_good",)
    asked: list[str] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)  # large files that were uploaded, before their commit
    lock: Any = field(default_factory=threading.Lock)

    def add(self, name: str, files: dict[str, bytes], **fields: Any) -> Repo:
        self.repos[name] = Repo(**fields)
        self.repos[name].push(files)
        return self.repos[name]

    def fault(self, request: str) -> Rule:
        with self.lock:
            self.asked.append(request)
            for rule in self.rules:
                if rule.times > 0 and re.search(rule.pattern, request):
                    rule.times -= 1
                    return rule
        return Rule("")

    def answer(self, path: str, query: dict[str, list[str]], token: str | None) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a path of the hub or of its storage."""
        if path.startswith("/storage/"):
            sha = path.rpartition("/")[2]
            files = (one for repo in self.repos.values() for state in repo.commits.values() for one in state.items())
            name, body = next((name, body) for name, body in files if oid(name, body) == sha)
            shown = f'inline; filename="{name.rpartition("/")[2]}";'
            return 200, {"ETag": f'"{sha}"', "Content-Disposition": shown}, body
        if token is not None and token not in self.tokens:
            return error(401, "Invalid credentials in Authorization header")
        if path == "/api/whoami-v2":
            return 200, {}, b'{"name": "me", "auth": {"accessToken": {"displayName": "mine", "role": "read"}}}'
        match = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+).*)?", path)
        file = re.fullmatch(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if match is None and file is None:
            return (200, {}, b"<html>a hub</html>") if path == "/" else error(404, "Not Found")
        kind, name = (match[1], match[2]) if match else (file[1] or "models", file[2])  # type: ignore[index]
        revision = (match[4] if match else file[3]) or "main"  # type: ignore[index]
        repo = self.repos.get(f"{kind}/{name}")
        if repo is None:
            if token is None:
                return error(401, "Invalid username or password.")
            return error(404, "Repository not found", "RepoNotFound")
        commit = repo.head if revision == "main" else revision
        if commit not in repo.commits:
            return error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if match:
            return self._answer_api(repo, name, commit, match[3] == "tree", "recursive" in query)
        return self._answer_file(repo, commit, file[4], token)  # type: ignore[index]

    def _answer_api(
        self, repo: Repo, name: str, commit: str, tree: bool, recursive: bool
    ) -> tuple[int, dict[str, str], bytes]:
        found: list[dict[str, Any]] = []
        for path, body in sorted(repo.commits[commit].items()):
            one: dict[str, Any] = {"size": len(body), "type": "file", "path": path, "rfilename": path}
            one |= {"oid": oid("", body), "blobId": oid("", body)}
            if path.endswith(LARGE):
                sha = oid(path, body)
                one["lfs"] = {"oid": sha, "sha256": sha, "size": len(body), "pointerSize": 134}
            if recursive or not tree or "/" not in path:
                found.append(one)
        if tree:
            return 200, {}, json.dumps(found).encode()
        about = {"id": name, "sha": commit, "private": False, "gated": "manual" if repo.gated else False, "tags": []}
        return 200, {}, json.dumps({**about, "downloads": 0, "likes": 0, "siblings": found}).encode()

    def _answer_file(self, repo: Repo, commit: str, path: str, token: str | None) -> tuple[int, dict[str, str], bytes]:
        if repo.gated and token is None:
            return error(401, "Access to this model is restricted.", "GatedRepo")
        body = repo.commits[commit].get(path)
        if body is None:
            status, headers, text = error(404, "Entry not found", "EntryNotFound")
            return status, {**headers, "X-Repo-Commit": commit}, text
        etag = oid(path, body)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}
        if not path.endswith(LARGE):
            return 200, headers, body
        if repo.xet:
            auth = f'<{self.url}/api/xet-read-token/{commit}>; rel="xet-auth"'
            headers |= {"X-Xet-Hash": hashlib.sha256(body).hexdigest(), "Link": auth}
        storage = self.url.replace("127.0.0.1", "localhost")  # another host, as far as the client knows
        headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(body))}
        return 302, {**headers, "Location": f"{storage}/storage/{etag}?X-Signature=secret"}, b""


def error(status: int, message: str, code: str | None = None) -> tuple[int, dict[str, str], bytes]:
    headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
    return status, headers, json.dumps({"error": message}).encode()


class _Handler(BaseHTTPRequestHandler):
    """Answers for the hub of its server, as the rule for the request says."""

    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        rule = self.server.hub.fault(f"{self.command} {self.path}")
        time.sleep(rule.seconds)
        if rule.drop:
            self.close_connection = True
            return
        parts = urlsplit(self.path)
        answer = self.server.hub.answer(unquote(parts.path), parse_qs(parts.query), self._read_token())
        with suppress(OSError):  # the client did not wait
            self._send(rule, *answer)

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        rule = self.server.hub.fault(f"{self.command} {self.path}")
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if rule.drop:
            self.close_connection = True
            return
        self._send(rule, *hub_uploads.accept(self.server.hub, self.path, content, self._read_token()))

    do_PUT = do_POST  # noqa: N815

    def _read_token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _send(self, rule: Rule, status: int, headers: dict[str, str], body: bytes) -> None:
        if rule.status is not None:
            status, headers, body = rule.status, rule.headers, rule.body
        if rule.garble:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked and status == 200:
            first = int(asked[1])
            headers = {**headers, "Content-Range": f"bytes {first}-{len(body) - 1}/{len(body)}"}
            status, body = 206, body[first:]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if rule.cut is None else body[: int(len(body) * rule.cut)])
            self.close_connection = rule.cut is not None

    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub at `.url`, gone afterwards."""
    hub = Hub()
    server = _Server(hub)
    threading.Thread(target=lambda: server.serve_forever(0.02), daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield hub
    server.shutdown()
    server.server_close()
