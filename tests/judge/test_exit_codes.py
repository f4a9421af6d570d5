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
    "no credit": (lambda reply: (402, {"error": {"message": "no credit"}}), PILOT, "no credit"),
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
