"""A server of chat completions that answers by the seed it is sent, and fails as often as it is told to."""

import collections
import contextlib
import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("429", "500", "503", "cut", "truncated_json", "no_choices", "closed")


def draw(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts alone."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") / 2**64


class ChatServer(ThreadingHTTPServer):
    """The fault of a request depends on its content and on how often that was sent."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, share: float = 0.0, wait: float = 0.0, refuses: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.share, self.wait, self.refuses = share, wait, refuses
        self.lock = threading.Lock()
        self.attempts: collections.Counter[str] = collections.Counter()
        self.paid: collections.Counter[str] = collections.Counter()  # whole replies, by what was asked
        self.active = self.most_active = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    @contextlib.contextmanager
    def serving(self) -> Iterator["ChatServer"]:
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ChatServer

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError, ValueError):  # a client that was killed
            super().handle()

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = json.dumps([body["messages"], body["seed"]])
        with self.server.lock:
            self.server.attempts[asked] += 1
            attempt = self.server.attempts[asked]
            self.server.active += 1
            self.server.most_active = max(self.server.active, self.server.most_active)
        time.sleep(self.server.wait)
        try:
            self._answer(body, asked, attempt)
        finally:
            with self.server.lock:
                self.server.active -= 1

    def _answer(self, body: dict, asked: str, attempt: int) -> None:
        question = body["messages"][-1]["content"]
        if self.server.refuses and self.server.refuses in question:
            return self._send(400, json.dumps({"error": {"message": "context length exceeded"}}))
        fault = None
        if draw(asked, attempt) < self.server.share:
            fault = FAULTS[int(draw("kind", asked, attempt) * len(FAULTS))]
        text = f"{question} drawn with {body['seed']}"
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        reply: dict = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [choice],
        }
        reply["usage"] = {"prompt_tokens": 1, "completion_tokens": 7, "total_tokens": 8}
        content = json.dumps(reply)
        if fault in ("429", "500", "503"):
            return self._send(int(fault), json.dumps({"error": {"message": "busy"}}), retry_after="0.01")
        if fault == "closed":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return None
        if fault == "cut":
            self._send(200, content[: len(content) // 2], length=len(content))
            self.close_connection = True
            return None
        if fault == "truncated_json":
            return self._send(200, content[: len(content) // 2])
        if fault == "no_choices":
            return self._send(200, json.dumps({"choices": []}))
        with self.server.lock:
            self.server.paid[asked] += 1
        return self._send(200, content)

    def _send(self, status: int, content: str, length: int | None = None, retry_after: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content) if length is None else length))
        if retry_after:
            self.send_header("Retry-After", retry_after)
        self.end_headers()
        self.wfile.write(content.encode())
