"""A server with OpenAI's Responses API, chat completions and Batch API that fails on purpose.

Behind it is a judge whose bias is known.

The fault of a request is drawn from a hash of its messages and of how often they were sent before, so that two runs
meet the same faults whatever their order.
"""

import contextlib
import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = (
    "429",
    "429_retry_after",
    "500",
    "hang",
    "cut",
    "truncated_json",
    "refusal",
    "schema_ignored",
    "wrong_word",
)
HANG_SECONDS = 3.0
RETRY_AFTER = 0.3

Decide = Callable[[str, str], str]  # (answer A, answer B) → A, B or tie


def shown_answers(question: str) -> tuple[str, str]:
    """Answers A and B of a rendered question."""
    a, b = (re.search(f"<answer_{side}>\n(.*?)\n</answer_{side}>", question, re.DOTALL) for side in "ab")
    return (a[1], b[1]) if a and b else ("", "")


def fair(a: str, b: str) -> str:
    """Prefers the answer with the higher number in it, wherever it stands."""
    quality_a, quality_b = (int((re.findall(r"\d+", text) or ["0"])[0]) for text in (a, b))
    return "tie" if quality_a == quality_b else "A" if quality_a > quality_b else "B"


def draw(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts alone."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") / 2**64


class FaultServer:
    """`share` of the requests fail, in one of the ways of `faults`; the rest is decided by `decide`."""

    def __init__(self, decide: Decide = fair, share: float = 0.0, faults: tuple[str, ...] = FAULTS) -> None:
        self.decide = decide
        self.share = share
        self.faults = faults
        self.enforces_schema = True
        self.refuses_schema = False
        self.base = "/v1"  # where the interface is
        self.routes = ("responses", "chat/completions")
        self.no_route: tuple[int, dict | bytes] = (404, {"detail": "Not Found"})  # what other addresses answer
        self.refuses: tuple[str, ...] = ()  # parameters
        self.content: Callable[[str], object] = lambda text: text  # the content of a chat completion's message
        self.status: int | None = None  # every request fails with this
        self.delay = 0.0
        # (request, reply that was due) → status and body in its place, or None to leave it
        self.instead: Callable[[dict, dict], tuple[int, dict | bytes] | None] | None = None
        self.batch_status: int | None = None  # every question about batches fails with this
        self.batch_created: Callable[[], object] = lambda: None  # called before the reply that names the batch
        self.lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Forget all requests, so that a second run meets the faults of the first."""
        self.attempts: Counter[str] = Counter()
        self.requests: list[dict] = []  # bodies, with `input` also where they came as `messages`
        self.paths: list[str] = []  # of all POSTs, with their query
        self.met: Counter[str] = Counter()  # faults
        self.active = self.most_active = 0
        self.batch_files: dict[str, bytes] = {}
        self.batches: dict[str, dict] = {}
        self.batch_polls_needed = 0
        self.keys_seen: set[str] = set()

    def fault(self, messages: list[dict], attempt: int) -> str | None:
        """The fault that this attempt meets."""
        key = json.dumps(messages)
        if draw(key, attempt) >= self.share:
            return None
        return self.faults[int(draw("kind", key, attempt) * len(self.faults))]

    def answer(self, body: dict, fault: str | None = None) -> dict:
        """The Responses API's reply to a request."""
        question = body["input"][-1]["content"]
        schema = "format" in body.get("text", {})
        verdict = self.decide(*shown_answers(question))
        reply = json.dumps({"rationale": f"I prefer {verdict}.", "verdict": verdict})
        worked_examples = len(body["input"]) > 2
        if fault == "schema_ignored" or (schema and not self.enforces_schema) or not (schema or worked_examples):
            reply = f"Both are fine, but I like {verdict} best."
        if fault == "wrong_word":
            reply = json.dumps({"rationale": "Hm.", "verdict": "Answer A"})
        content = {"type": "output_text", "text": reply, "annotations": []}
        if fault == "refusal":
            content = {"type": "refusal", "refusal": "I cannot help with that."}
        message = {"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": [content]}
        usage = {"input_tokens": len(question) // 4, "output_tokens": 20, "total_tokens": len(question) // 4 + 20}
        response = {"id": "r", "object": "response", "created_at": 1, "model": body["model"], "status": "completed"}
        return response | {"output": [message], "usage": usage, "tools": [], "parallel_tool_calls": False}

    def completion(self, reply: dict) -> dict:
        """A Responses API's reply as a chat completion."""
        item = next((item for item in reply["output"] if item["type"] == "message"), {"content": []})
        text = "".join(part.get("text", "") for part in item["content"])
        message = {"role": "assistant", "content": self.content(text)}
        refusals = [part["refusal"] for part in item["content"] if part["type"] == "refusal"]
        reason = "length" if reply["status"] == "incomplete" else "stop"
        usage = {"prompt_tokens": reply["usage"]["input_tokens"], "completion_tokens": reply["usage"]["output_tokens"]}
        choice = {
            "index": 0,
            "finish_reason": reason,
            "message": message | ({"refusal": refusals[0]} if refusals else {}),
        }
        return {"id": "r", "object": "chat.completion", "created": 1, "choices": [choice], "usage": usage}

    def run_batch(self, batch: dict) -> None:
        """What OpenAI does within a day."""
        lines = []
        for line in self.batch_files[batch["input_file_id"]].splitlines():
            request = json.loads(line)
            body = request["body"]
            as_chat = "messages" in body
            if as_chat:
                body["input"] = body.pop("messages")
                body["text"] = {"format": body.get("response_format")}
            with self.lock:
                self.attempts[json.dumps(body["input"])] += 1
                self.requests.append(body)
            fault = self.fault(body["input"], self.attempts[json.dumps(body["input"])])
            answer = self.answer(body, fault)
            answer = self.completion(answer) if as_chat else answer
            response = {"status_code": 200, "request_id": "q", "body": answer}
            if fault == "500":
                response = {"status_code": 500, "request_id": "q", "body": {"error": {"message": "broken"}}}
            lines.append(json.dumps({"id": "x", "custom_id": request["custom_id"], "response": response}))
        name = f"file-out-{len(self.batch_files)}"
        self.batch_files[name] = "\n".join(lines).encode()
        batch.update(status="completed", output_file_id=name)

    @contextlib.contextmanager
    def serving(self, port: int = 0) -> Iterator[str]:
        """Serve on loopback, at any free port or at `port`; yields the base URL."""
        server = _Server(("127.0.0.1", port), type("Handler", (_Handler,), {"state": self}))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            server.shutdown()
            server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # with the default of 5, connections made at once wait for a second


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: FaultServer

    def log_message(self, *args: object) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError, ValueError):  # a client that was killed in the middle of its request
            super().handle()

    def _send(self, status: int, content: bytes | dict, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        with self.state.lock:
            self.state.paths.append(self.path)
        route = self.path.split("?")[0].removeprefix(f"{self.state.base}/")
        if route in self.state.routes:
            return self._respond(json.loads(content))
        if route == "files":
            return self._upload(content)
        if route == "batches":
            return self._create_batch(json.loads(content))
        return self._send(*self.state.no_route)

    def _respond(self, body: dict) -> None:
        state = self.state
        self.as_chat = "messages" in body
        if self.as_chat:
            body["input"] = body.pop("messages")
            if "response_format" in body:
                body["text"] = {"format": body["response_format"]}
        key = json.dumps(body["input"])
        with state.lock:
            state.attempts[key] += 1
            attempt = state.attempts[key]
            state.requests.append(body)
            state.keys_seen.add(self.headers.get("Authorization", ""))
            state.active += 1
            state.most_active = max(state.most_active, state.active)
            fault = state.fault(body["input"], attempt)
            if fault:
                state.met[fault] += 1
        try:
            time.sleep(state.delay)
            self._reply(body, fault)
        finally:
            with state.lock:
                state.active -= 1

    def _reply(self, body: dict, fault: str | None) -> None:
        state = self.state
        if state.status is not None:
            return self._send(state.status, {"error": {"message": f"no: {self.headers.get('Authorization')}"}})
        for name in state.refuses:
            if name in body:
                error = {"message": f"Unsupported parameter: '{name}' is not supported with this model.", "param": name}
                return self._send(400, {"error": error})
        if state.refuses_schema and "text" in body:
            return self._send(400, {"error": {"message": "unknown parameter: text"}})
        if state.instead is not None and (instead := state.instead(body, state.answer(body))) is not None:
            status, content = instead
            if self.as_chat and isinstance(content, dict) and "output" in content:
                content = state.completion(content)
            return self._send(status, content)
        if fault in ("429", "429_retry_after"):
            headers = {"Retry-After": str(RETRY_AFTER)} if fault == "429_retry_after" else {}
            return self._send(429, {"error": {"message": "slow down"}}, headers)
        if fault == "500":
            return self._send(500, {"error": {"message": "broken"}})
        if fault == "hang":
            time.sleep(HANG_SECONDS)
            self.close_connection = True
            return None
        answer = state.answer(body, fault)
        data = json.dumps(state.completion(answer) if self.as_chat else answer).encode()
        if fault == "cut":
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return None
        return self._send(200, data[: len(data) // 2] if fault == "truncated_json" else data)

    def _upload(self, content: bytes) -> None:
        state = self.state
        # The one part of the form that is a file: between the blank line and the boundary
        boundary = content.split(b"\r\n", 1)[0]
        part = next(part for part in content.split(boundary) if b"filename=" in part)
        name = f"file-in-{len(state.batch_files)}"
        state.batch_files[name] = part.split(b"\r\n\r\n", 1)[1].rsplit(b"\r\n", 1)[0]
        self._send(200, {"id": name, "object": "file", "purpose": "batch"})

    def _create_batch(self, body: dict) -> None:
        state = self.state
        batch = {"id": f"batch-{len(state.batches)}", "object": "batch", "status": "in_progress", "polls": 0, **body}
        state.batches[batch["id"]] = batch
        state.batch_created()
        self._send(200, batch)

    def do_GET(self) -> None:
        state = self.state
        path = self.path.split("?")[0]
        if state.batch_status is not None:
            return self._send(state.batch_status, {"error": {"message": "no"}})
        if path == "/v1/batches":
            return self._send(200, {"object": "list", "data": list(state.batches.values())[::-1], "has_more": False})
        if path.startswith("/v1/files/"):
            return self._send(200, state.batch_files[path.split("/")[3]])
        batch = state.batches[path.split("/")[3]]
        batch["polls"] += 1
        if batch["status"] == "in_progress" and batch["polls"] > state.batch_polls_needed:
            state.run_batch(batch)
        return self._send(200, batch)
