"""A judge on loopback that speaks the chat API, and misbehaves as a test's script says."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GOOD = "Short and right. Rating: [[7]]"


@dataclass
class Says:
    """One reply: a verdict with status 200, or an error status, or `raw` bytes instead of JSON."""

    text: str | None = GOOD
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    seconds: float = 0.0

    def body(self) -> bytes:
        if self.raw is not None:
            return self.raw
        if self.status != 200:
            return json.dumps({"error": {"message": self.text}}).encode()
        message = {"role": "assistant", "content": self.text}
        usage = {"prompt_tokens": 100, "completion_tokens": 10}
        return json.dumps({"model": "judge-2024", "choices": [{"message": message}], "usage": usage}).encode()


@dataclass
class Judge:
    """What the server was asked, and what it says next: `script` in turn, then `otherwise`."""

    script: list[Says] = field(default_factory=list)
    otherwise: Says = field(default_factory=Says)
    for_text: dict[str, Says] = field(default_factory=dict)
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    url: str = ""
    lock: Any = field(default_factory=threading.Lock)

    def reply(self, path: str, body: dict[str, Any], key: str | None) -> Says:
        with self.lock:
            self.asked.append(body)
            self.keys.append(key)
            self.times.append(time.monotonic())
            if path != "/v1/chat/completions":
                return Says("no such page", status=404)
            for text, says in self.for_text.items():
                if text in body["messages"][-1]["content"]:
                    return says
            return self.script.pop(0) if self.script else self.otherwise


@contextmanager
def serve() -> Iterator[Judge]:
    """A judge at `.url`, gone afterwards."""
    judge = Judge()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            says = judge.reply(self.path, body, self.headers.get("Authorization"))
            time.sleep(says.seconds)
            content = says.body()
            try:
                self.send_response(says.status)
                for name, value in says.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except OSError:
                pass  # the client did not wait

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=lambda: server.serve_forever(0.02), daemon=True)
    thread.start()
    judge.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    yield judge
    server.shutdown()
    server.server_close()
