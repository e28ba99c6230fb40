"""A small HTTP server of a user's own that scores, and misbehaves as it is told."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[BaseHTTPRequestHandler, Any], None]


def send(handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: str) -> None:
    """A whole answer."""
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def right(handler: BaseHTTPRequestHandler, asked: Any) -> None:
    """1 for the reference, else 0."""
    pairs = zip(asked["responses"], asked["prompts"], strict=True)
    send(handler, json.dumps([float(r == p["answer"]) for r, p in pairs]).encode())


class Server:
    """Answers as `script` says, entry by entry, and then `otherwise`; keeps what it was asked."""

    def __init__(self, *script: Answer, otherwise: Answer = right) -> None:
        self.asked: list[Any] = []
        self.headers: list[dict[str, str]] = []
        self.stopping = threading.Event()
        script_left = list(script)
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.asked.append(asked)
                    server.headers.append(dict(self.headers))
                    answer = script_left.pop(0) if script_left else otherwise
                try:
                    answer(self, asked)
                except OSError:
                    pass  # whoever asked has gone

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port: int = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/score"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self) -> None:
        """End it."""
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def serving(*script: Answer, otherwise: Answer = right) -> Iterator[Server]:
    """A server, for the time of the block."""
    server = Server(*script, otherwise=otherwise)
    try:
        yield server
    finally:
        server.close()


def free_port() -> int:
    """A port at which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
