"""The openai engine against a server of the tests' own, over real HTTP."""

import collections
import contextlib
import json
import os
import re
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

from tandem.answers.backends.openai import RETRIES
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
        self.refuses: str | None = None  # prompts that hold this are refused
        self.refusal = 400, {"error": {"message": f"flagged by the content filter, {SECRET}"}}
        self.unknown = ""  # a parameter that is refused
        self.route = "/v1/chat/completions"
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
        if not self.path.endswith(self.server.route):
            return self._send(404, {"detail": "Not Found"}, {})
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.active += 1
            self.server.most_active = max(self.server.active, self.server.most_active)
            status, headers = self.server.faults.popleft() if self.server.faults else (200, {})
        time.sleep(self.server.wait)
        text = f" {body['model']} on {body.get('messages', body.get('input'))[-1]['content']} "
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
        reply["usage"] = {"prompt_tokens": 1, "completion_tokens": 7, "total_tokens": 8}
        if status == 0:
            status, reply = 200, {"error": {"message": "Provider returned error"}}
        elif status != 200:
            reply = {"error": {"message": f"no, {SECRET}"}}
        elif self.server.reply is not None:
            reply = self.server.reply
        elif self.server.unknown in body:
            status, reply = 400, {"error": {"message": f"Unknown name {self.server.unknown!r}: Cannot find field."}}
        elif self.server.refuses is not None and self.server.refuses in str(body):
            status, reply = self.server.refusal
        with self.server.lock:
            self.server.active -= 1
        return self._send(status, reply, headers)

    def _send(self, status: int, reply: Any, headers: dict[str, str]) -> None:
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
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def ask(server: Server, folder: Path, **more: Any) -> list[dict[str, Any]]:
    sampling = SamplingOptions(max_new_tokens=9, **more)
    engine = GenerationOptions(backend="openai", base_url=server.url, batch_size=3)
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
        (500, "InternalServerError 500: "),
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


def test_a_refused_prompt_is_that_answers_fate(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """The first prompt is among them, and the others are answered; nothing is asked again."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    server.refuses = "question 0"
    for _ in range(2):
        records = {record["messages"][0]["content"]: record for record in ask(server, tmp_path)}
        assert len(records) == len(PROMPTS) == len(server.bodies)
    refused = [record for record in records.values() if record["finish_reason"] == "refused"]
    assert [(record["messages"], record["text"], record["n_tokens"]) for record in refused] == [(PROMPTS[0], "", None)]
    told = capsys.readouterr().err
    assert "refused 1 prompts, whose answers are empty: BadRequestError 400" in told and SECRET not in told


@pytest.mark.parametrize(
    ("status", "body", "fate"),
    [  # llama.cpp, Ollama, TGI, OpenRouter, Anthropic's and others' servers about one prompt
        (400, {"error": {"code": 400, "message": "the request exceeds the available context size"}}, "refused"),
        (403, {"error": {"message": "moderation", "metadata": {"reasons": ["violence"]}}}, "refused"),
        (404, {"error": {"message": "No endpoints found that can serve this prompt"}}, "refused"),
        (413, {"error": "Payload Too Large"}, "refused"),
        (422, {"detail": [{"loc": ["body", "messages"], "msg": "too long"}]}, "refused"),
        (451, {"error": {"message": "unavailable for legal reasons"}}, "failed"),
        (424, {"error": "Request failed during generation", "error_type": "generation"}, "failed"),
        (500, {"error": {"message": "EngineCore encountered an issue"}}, "failed"),
        (503, {"error": {"message": "Slot unavailable"}}, "failed"),
        (529, {"error": {"type": "overloaded_error"}}, "failed"),
        (200, {"error": {"message": "Provider returned error", "code": 502}}, "failed"),
        (200, {"choices": [{"finish_reason": "error", "message": {"content": "ye"}}]}, "failed"),
        (200, {"choices": []}, "failed"),
        (200, {"choices": [{"finish_reason": "SAFETY", "message": {"content": None}}]}, "content_filter"),
    ],
)
def test_one_prompt_that_a_server_cannot_bear_is_that_answers_fate(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], status: int, body: Any, fate: str
):
    """The others are answered, the script ends well, and the same command asks nothing more; also if it is the last."""
    server.refuses, server.refusal = "question 7", (status, body)
    for _ in range(2):
        records = {record["messages"][0]["content"]: record for record in ask(server, tmp_path)}
        assert [record["finish_reason"] for record in records.values()].count("stop") == len(PROMPTS) - 1
        assert (records["question 7"]["text"], records["question 7"]["finish_reason"]) == ("", fate)
    count = server.asked()["question 7"]
    assert count <= (2 * (RETRIES + 1) if fate == "failed" else 1)
    assert sum(server.asked().values()) - count - server.asked()["Say yes."] == len(PROMPTS) - 1
    (tmp_path / "alone").mkdir()
    rows = [line for line in (tmp_path / "generations_dpo.jsonl").open() if '"question 7"' not in line]
    (tmp_path / "alone" / "generations_dpo.jsonl").write_text("".join(rows))
    if fate != "refused":  # a server that refuses the one prompt it is asked may refuse them all
        assert {row["finish_reason"] for row in ask(server, tmp_path / "alone")} == {"stop", fate}


def test_a_server_that_refuses_every_prompt_is_not_taken_at_its_word(server: Server, tmp_path: Path):
    server.refuses = "question"
    with pytest.raises(UserError, match=r"refuses 12 prompts, one after another: .*content filter"):
        ask(server, tmp_path)
    assert read_jsonl(tmp_path / "generations_dpo.jsonl") == []
    many = [[{"role": "user", "content": f"question {index} of many"}] for index in range(60)]
    sampling = SamplingOptions(max_new_tokens=9)
    engine = GenerationOptions(backend="openai", base_url=server.url, batch_size=3)
    server.bodies.clear()
    with pytest.raises(UserError, match="refuses 20 prompts, one after another"):
        generate({"dpo": "adapter"}, many, sampling, engine, tmp_path / "many")
    assert len(server.bodies) <= 20 + 3


@pytest.mark.parametrize("status", [403, 404])
def test_a_refusal_of_all_before_the_first_answer(server: Server, tmp_path: Path, status: int):
    server.faults.extend([(status, {})] * 100)
    with pytest.raises(UserError, match=r"\(HTTP 40[34]\)"):
        ask(server, tmp_path)
    assert len(server.bodies) <= 6  # one more of each that was under way


@pytest.mark.parametrize("status", [403, 404])
def test_the_same_of_one_prompt_later(server: Server, tmp_path: Path, status: int):
    server.faults.extend([(200, {})] * 6 + [(status, {})])
    records = ask(server, tmp_path)
    assert sorted(record["finish_reason"] for record in records) == ["refused"] + ["stop"] * 11


def test_an_error_sent_as_a_success_is_asked_again(server: Server, tmp_path: Path):
    server.faults.extend([(0, {}), (200, {}), (0, {})])
    assert len(ask(server, tmp_path)) == len(PROMPTS)
    assert len(server.bodies) == len(PROMPTS) + 2


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1", "http://no-such-host.invalid/v1"])
def test_nobody_listens(tmp_path: Path, url: str):
    began = time.monotonic()
    engine = GenerationOptions(backend="openai", base_url=url)
    with pytest.raises(UserError, match=rf"^--base_url {url} does not answer \(.*\): start the server"):
        generate({"dpo": "adapter"}, PROMPTS, SamplingOptions(max_new_tokens=9), engine, tmp_path)
    assert time.monotonic() - began < 5


def test_what_arrives_with_a_failure_is_kept(server: Server, tmp_path: Path):
    server.faults.extend([(401, {})])
    server.wait = 0.05
    with pytest.raises(UserError, match="refuses the key"):
        ask(server, tmp_path)
    assert len(read_jsonl(tmp_path / "generations_dpo.jsonl")) >= 2  # those that were under way


@pytest.mark.parametrize(
    ("name", "instead"),
    [("seed", None), ("temperature", None), ("top_p", None), ("max_completion_tokens", "max_tokens")],
)
def test_a_parameter_that_a_server_refuses(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, instead: str | None
):
    server.unknown = name
    assert len(ask(server, tmp_path)) == len(PROMPTS)
    answered = [body for body in server.bodies if name not in body]
    assert len(answered) == len(PROMPTS) and len(server.bodies) <= len(PROMPTS) + 3
    assert instead is None or {body[instead] for body in answered} == {9}
    assert capsys.readouterr().err.count(f"does not take {name}: ") == 1


def test_content_in_chunks_and_the_responses_api(server: Server, tmp_path: Path):
    chunks = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "yes"}]
    server.reply = {"choices": [{"finish_reason": "stop", "message": {"content": chunks}}]}
    assert {record["text"] for record in ask(server, tmp_path / "a")} == {"yes"}
    server.route = "/v1/responses"
    message = {"type": "message", "content": [{"type": "output_text", "text": "no"}]}
    server.reply = {"status": "completed", "output": [message], "usage": {"output_tokens": 3}}
    server.bodies.clear()
    records = ask(server, tmp_path / "b")
    assert {(record["text"], record["n_tokens"]) for record in records} == {("no", 3)}
    assert {(body["max_output_tokens"], body["store"]) for body in server.bodies} == {(9, False)}


@pytest.mark.parametrize("reply", [{}, {"choices": []}, {"choices": [{"finish_reason": "stop"}]}, [], "text"])
def test_replies_that_are_none(server: Server, tmp_path: Path, reply: Any):
    server.reply = reply
    with pytest.raises(UserError, match=r"not a reply of|neither the Responses API"):
        ask(server, tmp_path)
    assert not (tmp_path / "generations_dpo.jsonl").exists()


def test_what_a_server_may_leave_out(server: Server, tmp_path: Path):
    """No count of tokens, no text; and half of a surrogate pair, which no file can hold."""
    server.reply = {"choices": [{"finish_reason": "length", "message": {"content": "a\ud83d"}}]}
    first = ask(server, tmp_path / "a")[0]
    assert (first["text"], first["n_tokens"], first["finish_reason"]) == ("a?", None, "length")
    server.reply = {"choices": [{"finish_reason": "content_filter", "message": {"content": None}}]}
    assert {record["text"] for record in ask(server, tmp_path / "b")} == {""}


PROGRAM = f"""
import pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
from tandem.errors import script_main
from tests.answers.backends.test_openai import PROMPTS, GenerationOptions, SamplingOptions, generate
engine = GenerationOptions(backend="openai", base_url=sys.argv[1], batch_size=3)
folder = pathlib.Path(sys.argv[2])
script_main(lambda argv: generate({{"dpo": "adapter"}}, PROMPTS, SamplingOptions(max_new_tokens=9), engine, folder))
"""


def test_ctrl_c_waits_for_no_server_that_hangs(server: Server, tmp_path: Path):
    server.wait = 30.0
    argv = [sys.executable, "-c", PROGRAM, server.url, str(tmp_path)]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    while len(server.bodies) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 130 and "Traceback" not in said and "Exception" not in said


def test_kill_and_go_on(server: Server, tmp_path: Path):
    """kill -9 in a real process: answers on disk are not asked for again, and the end is that of an undisturbed run."""
    server.wait = 0.2
    path = tmp_path / "generations_dpo.jsonl"
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, server.url, str(tmp_path)], env=os.environ)
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
        ({"backend": "openai"}, "--backend openai needs --base_url or $OPENAI_BASE_URL: the server"),
        ({"base_url": "http://h/v1"}, "--base_url has no effect with --backend transformers"),
        ({"tensor_parallel_size": 2}, "--tensor_parallel_size has no effect with --backend transformers"),
        (
            {"backend": "openai", "base_url": "http://h", "dtype": "float32"},
            "--dtype has no effect with --backend openai",
        ),
        ({"backend": "openai", "base_url": "http://me:pw@h"}, "--base_url must hold no credentials"),
        ({"batch_size": 0}, "--batch_size must be at least 1, not 0"),
    ],
)
def test_options_without_effect(given: dict[str, Any], expected: str):
    with pytest.raises(UserError, match=re.escape(expected)):
        GenerationOptions(**given)


def test_the_server_has_the_tokenizer(server: Server, tmp_path: Path):
    with pytest.raises(UserError, match="--max_prompt_length has no effect with --backend openai"):
        ask(server, tmp_path, max_prompt_length=20)
    assert not server.bodies


def test_vllm_that_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--backend vllm needs vLLM: pip install -e '.\[vllm\]'"):
        GenerationOptions(backend="vllm")


def test_another_server_under_the_same_name(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Answers of one server are not taken for another's; of the same one they are, and that is said."""
    ask(server, tmp_path)
    count = len(server.bodies)
    ask(server, tmp_path)
    assert len(server.bodies) == count
    assert "12 answers from up to " in capsys.readouterr().err
    other = GenerationOptions(backend="openai", base_url="http://127.0.0.1:9/v1")
    with pytest.raises(UserError, match=r"another server \(http://127.0.0.1:\d+/v1, now http://127.0.0.1:9/v1\)"):
        generate({"dpo": "adapter"}, PROMPTS, SamplingOptions(max_new_tokens=9), other, tmp_path)
