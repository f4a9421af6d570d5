"""The openai engine against a server of the tests' own, over real HTTP."""

import collections
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tandem.answers.backends.options import GenerationOptions
from tandem.answers.generate import generate
from tandem.data.formats import prompt_id
from tandem.errors import UserError
from tandem.models.sampling import SamplingOptions, prompt_seed
from tandem.runs import read_jsonl

ROOT = Path(__file__).parents[3]
PROMPTS = [[{"role": "user", "content": f"question {index}"}] for index in range(12)]
SECRET = "sk-test-0123456789"


class Server(ThreadingHTTPServer):
    """Answers what it was asked; `faults` are statuses and headers to answer with first, one a request."""

    def __init__(self, wait: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.wait = wait
        self.faults: collections.deque[tuple[int, dict[str, str]]] = collections.deque()
        self.bodies: list[dict[str, Any]] = []
        self.reply: Any = None
        self.active = self.most_active = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def asked(self) -> collections.Counter[str]:
        return collections.Counter(body["messages"][-1]["content"] for body in self.bodies)


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.active += 1
            self.server.most_active = max(self.server.active, self.server.most_active)
            status, headers = self.server.faults.popleft() if self.server.faults else (200, {})
        time.sleep(self.server.wait)
        text = f" {body['model']} on {body['messages'][-1]['content']} "
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
        reply["usage"] = {"prompt_tokens": 1, "completion_tokens": 7, "total_tokens": 8}
        if status != 200:
            reply = {"error": {"message": f"no, {SECRET}"}}
        elif self.server.reply is not None:
            reply = self.server.reply
        with self.server.lock:
            self.server.active -= 1
        content = json.dumps(reply).encode()
        with contextlib.suppress(OSError):  # the client was killed
            self.send_response(status)
            for name, value in {**headers, "Content-Type": "application/json", "Content-Length": len(content)}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    started = Server()
    thread = threading.Thread(target=started.serve_forever, args=(0.01,))
    thread.start()
    yield started
    started.shutdown()
    thread.join()
    started.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.005)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.02)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def ask(server: Server, folder: Path, **more: Any) -> list[dict[str, Any]]:
    sampling = SamplingOptions(max_new_tokens=9, **more)
    engine = GenerationOptions(engine="openai", base_url=server.url, batch_size=3)
    return read_jsonl(generate({"dpo": "adapter"}, PROMPTS, sampling, engine, folder)["dpo"])


def test_a_line_a_prompt_and_what_was_asked(server: Server, tmp_path: Path):
    server.wait = 0.02
    records = ask(server, tmp_path, temperature=0.5, seed=7)
    assert {record["prompt_id"]: record["text"] for record in records} == {
        prompt_id(messages): f"adapter on {messages[0]['content']}" for messages in PROMPTS
    }
    record = records[0]
    assert (record["model"], record["adapter"], record["engine"], record["seed"]) == ("adapter", None, "openai", 7)
    assert (record["n_tokens"], record["finish_reason"]) == (7, "stop")
    assert server.most_active == 3
    body = next(body for body in server.bodies if body["messages"] == PROMPTS[5])
    assert body == {
        "model": "adapter",
        "messages": PROMPTS[5],
        "max_completion_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.95,
        "seed": prompt_seed(7, prompt_id(PROMPTS[5])),
        "stream": False,
    }


def test_greedy_asks_for_temperature_zero(server: Server, tmp_path: Path):
    ask(server, tmp_path, greedy=True)
    assert {(body["temperature"], body["top_p"]) for body in server.bodies} == {(0.0, 1.0)}


def test_failures_that_pass_are_retried(server: Server, tmp_path: Path):
    server.faults.extend([(500, {}), (429, {}), (429, {"Retry-After": "0.01"}), (503, {})])
    assert len(ask(server, tmp_path)) == len(PROMPTS)
    assert len(server.bodies) == len(PROMPTS) + 4


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (401, "refuses the key (HTTP 401): set $OPENAI_API_KEY"),
        (404, "has no chat completions or no model adapter (HTTP 404)"),
        (400, "refuses prompt "),
        (500, "InternalServerError: "),
    ],
)
def test_failures_that_stay_are_one_line_and_keep_the_key(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, expected: str
):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    ask_first = [(200, {})] * 2
    server.faults.extend(ask_first + [(status, {})] * 100)
    with pytest.raises(UserError) as error:
        ask(server, tmp_path)
    assert f"--base_url {server.url} " in str(error.value) or f"--base_url {server.url}: " in str(error.value)
    assert expected in str(error.value)
    assert SECRET not in str(error.value)
    kept = read_jsonl(tmp_path / "generations_dpo.jsonl")
    server.faults.clear()
    again = ask(server, tmp_path)
    assert again[: len(kept)] == kept
    assert len(again) == len(PROMPTS)
    assert SECRET not in (tmp_path / "generations_dpo.jsonl").read_text()


@pytest.mark.parametrize("reply", [{}, {"choices": []}, {"choices": [{"finish_reason": "stop"}]}, [], "text"])
def test_replies_that_are_none(server: Server, tmp_path: Path, reply: Any):
    server.reply = reply
    with pytest.raises(UserError, match="its reply is no chat completion"):
        ask(server, tmp_path)
    assert not (tmp_path / "generations_dpo.jsonl").exists()


def test_what_a_server_may_leave_out(server: Server, tmp_path: Path):
    """No count of tokens, no text; and half of a surrogate pair, which no file can hold."""
    server.reply = {"choices": [{"finish_reason": "length", "message": {"content": "a\ud83d"}}]}
    first = ask(server, tmp_path / "a")[0]
    assert (first["text"], first["n_tokens"], first["finish_reason"]) == ("a?", None, "length")
    server.reply = {"choices": [{"finish_reason": "content_filter", "message": {"content": None}}]}
    assert {record["text"] for record in ask(server, tmp_path / "b")} == {""}


def test_kill_and_go_on(server: Server, tmp_path: Path):
    """kill -9 in a real process: answers on disk are not asked for again, and the end is that of an undisturbed run."""
    server.wait = 0.2
    code = (
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "import pathlib\n"
        "from tests.answers.backends.test_openai import PROMPTS, GenerationOptions, SamplingOptions, generate\n"
        "engine = GenerationOptions(engine='openai', base_url=sys.argv[1], batch_size=3)\n"
        "sampling = SamplingOptions(max_new_tokens=9)\n"
        "generate({'dpo': 'adapter'}, PROMPTS, sampling, engine, pathlib.Path(sys.argv[2]))"
    )
    path = tmp_path / "generations_dpo.jsonl"
    process = subprocess.Popen([sys.executable, "-c", code, server.url, str(tmp_path)], env=os.environ)
    while len(read_jsonl(path)) < 4:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    written = read_jsonl(path)
    assert 4 <= len(written) < len(PROMPTS)
    time.sleep(0.5)  # until the server has answered what the killed run had asked
    server.wait = 0.0
    server.bodies.clear()
    records = ask(server, tmp_path)
    assert records[: len(written)] == written
    answered = {record["messages"][0]["content"] for record in written}
    assert server.asked() == collections.Counter(
        messages[0]["content"] for messages in PROMPTS if messages[0]["content"] not in answered
    )
    undisturbed = ask(server, tmp_path / "other")
    assert sorted(map(str, records)) == sorted(map(str, undisturbed))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"engine": "openai"}, "--engine openai needs --base_url: the server, as http://127.0.0.1:8000/v1"),
        ({"base_url": "http://h/v1"}, "--base_url has no effect with --engine transformers"),
        ({"tensor_parallel_size": 2}, "--tensor_parallel_size has no effect with --engine transformers"),
        (
            {"engine": "openai", "base_url": "http://h", "dtype": "float32"},
            "--dtype has no effect with --engine openai",
        ),
        ({"engine": "openai", "base_url": "http://me:pw@h"}, "--base_url must hold no credentials"),
        ({"batch_size": 0}, "--batch_size must be at least 1, not 0"),
    ],
)
def test_options_without_effect(given: dict[str, Any], expected: str):
    with pytest.raises(UserError, match=expected.replace("(", r"\(")):
        GenerationOptions(**given)


def test_the_server_has_the_tokenizer(server: Server, tmp_path: Path):
    with pytest.raises(UserError, match="--max_prompt_length has no effect with --engine openai"):
        ask(server, tmp_path, max_prompt_length=20)
    assert not server.bodies


def test_vllm_that_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--engine vllm needs vLLM: pip install -e '.\[vllm\]'"):
        GenerationOptions(engine="vllm")
