"""An endpoint on this machine that answers, or fails, as it is told, and counts what it is asked."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from typing import Any, NamedTuple


class Asked(NamedTuple):
    """One request."""

    at: float
    path: str
    key: str | None
    payload: dict[str, Any]

    @property
    def first(self) -> str:
        """What the person said first: the question, whatever followed."""
        return next(turn["content"] for turn in self.payload["messages"] if turn["role"] == "user")


class Endpoint:
    """``act(asked, number)`` says what happens to each request: a text to reply with, or a function of the handler."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.act: Callable[[Asked, int], Any] = lambda asked, number: "0"
        self.closing, self._lock = Event(), Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint._lock:
                    asked = Asked(time.monotonic(), self.path, self.headers["Authorization"], payload)
                    endpoint.asked.append(asked)
                    number = len(endpoint.asked)
                what = endpoint.act(asked, number)
                if isinstance(what, str):
                    what = reply(what)
                what(self)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                """A client that has gone away is what some tests are about."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def respond(status: int, body: bytes, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    """A response as it is."""

    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **{k.replace("_", "-"): v for k, v in headers.items()}}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    return send


def completion(text: str) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


def reply(text: str) -> Callable[[BaseHTTPRequestHandler], None]:
    """A proper chat completion."""
    return respond(200, completion(text))


def drop(handler: BaseHTTPRequestHandler) -> None:
    """End the connection without a word."""
    handler.close_connection = True
    handler.connection.close()
