"""A judge's server that gives no usable reply: the script ends with exit code 2 and one line, after few requests."""

import pytest

from tandem.commands.judge import main
from tandem.errors import script_main
from tandem.judge.asking import PILOT
from tandem.runs import append_jsonl
from tests import tiny
from tests.judge.fault_server import FaultServer


def message(reply, **change):
    return reply | {"output": [reply["output"][0] | change]}


VERDICT = '{"rationale": "so", "verdict": "A"}'


def said(reply, text):
    return message(reply, content=[{"type": "output_text", "text": text}])


def tool_call(reply):
    return reply | {"output": [{"type": "function_call", "name": "f", "call_id": "1", "arguments": VERDICT}]}


# what the server says in place of its reply (status, body): the most judged requests, and words of the line
CASES = {
    "cut off": (lambda reply: (200, reply | {"status": "incomplete", "output": []}), PILOT, "--max_output_tokens"),
    "empty text": (lambda reply: (200, message(reply, content=[])), PILOT, "no verdict on any of the first 10"),
    "no output": (lambda reply: (200, reply | {"output": []}), PILOT, "no verdict on any of the first 10"),
    "content null": (lambda reply: (200, message(reply, content=None)), PILOT, "no verdict on any of the first 10"),
    "html": (lambda reply: (200, b"<html>Welcome</html>"), PILOT, "127.0.0.1"),
    "empty body": (lambda reply: (200, b""), PILOT, "127.0.0.1"),
    "a list": (lambda reply: (200, b"[]"), PILOT, "127.0.0.1"),
    "key refused": (lambda reply: (401, {"error": {"message": "bad key"}}), 1, "bad key"),
    "no credit": (lambda reply: (402, {"error": {"message": "no credit"}}), 1, "has no credit"),
    "loading": (lambda reply: (503, {"error": {"message": "Loading model"}}), PILOT, "Loading model"),
    "gateway": (lambda reply: (502, b"<html>502 Bad Gateway</html>"), PILOT, "502"),
    "cancelled": (lambda reply: (200, reply | {"status": "cancelled", "output": []}), PILOT, "cancelled"),
    "model unknown, in a 400": (lambda reply: (400, {"error": {"message": "no model m"}}), PILOT, "no model m"),
    "error in a stream": (lambda reply: (200, b'data: {"error": {"message": "too old"}}\n\n'), PILOT, "too old"),
    "never closed": (lambda reply: (200, said(reply, f"<think>{VERDICT}")), PILOT, "no JSON object in the reply"),
    "in a number": (lambda reply: (200, said(reply, VERDICT.replace('"A"', "1"))), PILOT, "verdict: Input should be"),
    "scores only": (lambda reply: (200, said(reply, '{"a": 7, "b": 3}')), PILOT, "rationale"),
    "prose": (lambda reply: (200, said(reply, "Answer A is better.")), PILOT, "no JSON object in the reply"),
    "in a tool call": (lambda reply: (200, tool_call(reply)), PILOT, "no verdict on any of the first 10"),
    "quota": (lambda reply: (429, {"error": {"code": "insufficient_quota", "message": "used up"}}), 1, "quota"),
    "model unknown": (lambda reply: (404, {"error": {"message": "no model m"}}), 2, "no model m"),
    "too long": (lambda reply: (400, {"error": {"message": "context length"}}), PILOT, "context length"),
}


@pytest.mark.parametrize("case", CASES)
def test_exit_code_two_and_one_line_after_few_requests(case, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.005)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    change, most, words = CASES[case]
    for label in ("a", "b"):
        for index in range(8):
            prompt = [{"role": "user", "content": f"Question {index}?"}]
            row = {"prompt_id": f"p{index}", "messages": prompt, "text": f"{label} {index}", "finish_reason": "stop"}
            append_jsonl(tmp_path / f"generations_{label}.jsonl", row)
    tiny.save_pairs(tmp_path / "pairs.jsonl", tiny.hh_rows(20))
    server = FaultServer()
    server.instead = lambda body, reply: change(reply)
    with server.serving() as url:
        line = f"judge.py --judge_model m --base_url {url} --generations_a {tmp_path}/generations_a.jsonl "
        line += f"--generations_b {tmp_path}/generations_b.jsonl --dataset_name {tmp_path}/pairs.jsonl --self_pairs 0"
        monkeypatch.setattr("sys.argv", line.split())
        with pytest.raises(SystemExit) as ended:
            script_main(main)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2, said
    assert "Traceback" not in said and words in said
    judged = sum("<answer_a>" in str(body["input"][-1]["content"]) for body in server.requests)
    assert judged <= 3 * most
