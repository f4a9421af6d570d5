"""What real servers and models do to a judge, case by case: how often it asks, how it ends, and what it says."""

import json
import time

import pytest

from tandem.errors import UserError
from tandem.judge.asking import PILOT
from tandem.judge.conclusions import distrust
from tandem.judge.run import judge
from tandem.runs import read_jsonl
from tests.judge.fault_server import FaultServer
from tests.judge.judge_once import comparisons, labelled, options

VERDICT = '{"rationale": "because", "verdict": "B"}'


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.005)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.05)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def server():
    state = FaultServer()
    with state.serving() as state.url:
        yield state


def judged(body):
    return "<answer_a>" in body["input"][-1]["content"]


def asked(server):
    return sum(map(judged, server.requests))


def run(server, tmp_path, **more):
    return judge(options(server.url, str(tmp_path / "judge"), **more), comparisons(30), labelled(20))


# ---- a failure of every reply stops the run


def cut_off(body, reply):
    reasoning = {"type": "reasoning", "id": "r", "summary": []}
    details = {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    return 200, reply | {"output": [reasoning]} | details


def reasoning_only(body, reply):
    text = reply["output"][0]["content"][0]["text"]
    item = {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": text}]}
    return 200, reply | {"output": [item]}


def refusal(body, reply):
    content = [{"type": "refusal", "refusal": "I do not compare."}]
    return 200, reply | {"output": [reply["output"][0] | {"content": content}]}


def no_json(body, reply):
    content = [{"type": "output_text", "text": "Answer B.", "annotations": []}]
    return 200, reply | {"output": [reply["output"][0] | {"content": content}]}


@pytest.mark.parametrize(
    ("instead", "said"),
    [
        (cut_off, r"incomplete \(max_output_tokens, all of it reasoning\): raise --max_output_tokens, now 2048"),
        (reasoning_only, r"malformed \(nothing but reasoning in the reply\)"),
        (refusal, r"refusal \(I do not compare.\): take another --judge_model"),
        (no_json, r"malformed \(no JSON object in the reply\): take another --judge_model, or a server"),
    ],
)
def test_a_judge_without_any_verdict_is_asked_ten_times_and_no_more(server, tmp_path, instead, said):
    server.instead = instead
    with pytest.raises(UserError, match=rf"no verdict on any of the first {PILOT} calls; on 10 of them: {said}"):
        run(server, tmp_path)
    assert asked(server) == PILOT
    lines = read_jsonl(tmp_path / "judge/verdicts.jsonl")
    assert {line["kind"] for line in lines if line["attempt"]} == {"labelled"}
    assert not (tmp_path / "judge_summary.json").exists()


def test_a_reply_cut_off_is_not_asked_for_again_at_the_same_limit(server, tmp_path):
    server.instead = lambda body, reply: cut_off(body, reply) if judged(body) else None
    for _ in range(2):
        with pytest.raises(UserError, match="raise --max_output_tokens, now 2048"):
            run(server, tmp_path)
        assert asked(server) == PILOT
    server.instead = None
    assert run(server, tmp_path, max_output_tokens=9000)["winner"] == "dpo"


def test_probes_that_were_cut_off_decide_nothing(server, tmp_path):
    server.instead = cut_off
    with pytest.raises(UserError, match="raise --max_output_tokens"):
        run(server, tmp_path)
    assert not (tmp_path / "judge/server.json").exists()
    server.instead = None
    assert run(server, tmp_path, max_output_tokens=8000)["judge"]["schema_enforced"] is True


def test_what_one_limit_showed_of_the_schema_is_not_believed_at_another(server, tmp_path):
    server.enforces_schema = False
    assert run(server, tmp_path)["judge"]["schema_enforced"] is False
    server.enforces_schema = True
    assert run(server, tmp_path)["judge"]["schema_enforced"] is False  # else all would be judged anew
    assert run(server, tmp_path, max_output_tokens=8000)["judge"]["schema_enforced"] is True


@pytest.mark.parametrize(
    ("content", "said", "requests"),
    [  # what is no reply in one form is asked for in the other
        (b"<html>Welcome</html>", "<html>Welcome</html>", 5),
        ({"error": {"message": "Provider returned error", "code": 502}}, "Provider returned error", 4),
        ({"object": "list"}, "neither output nor choices in it", 5),
    ],
)
def test_a_probe_that_brings_no_reply_ends_the_run(server, tmp_path, content, said, requests):
    server.instead = lambda body, reply: (200, content)
    with pytest.raises(UserError, match=f"HTTP 200 and no reply: .*{said}"):
        run(server, tmp_path)
    assert len(server.requests) == requests
    assert not (tmp_path / "judge").exists()


def test_an_empty_account_ends_the_run_at_once(server, tmp_path):
    error = {"error": {"message": "You exceeded your quota", "type": "insufficient_quota"}}
    server.instead = lambda body, reply: (429, error) if asked(server) > 20 else None
    with pytest.raises(UserError, match="quota of this key is used up"):
        run(server, tmp_path)
    assert asked(server) <= 20 + 8  # those under way
    count = len(server.requests)
    server.instead = lambda body, reply: (429, error)
    with pytest.raises(UserError, match="quota of this key is used up"):
        run(server, tmp_path, max_concurrency=1)
    assert len(server.requests) == count + 1


# ---- some failures do not


def test_lost_verdicts_are_told_with_their_reasons(server, tmp_path, capsys):
    server.instead = lambda body, reply: cut_off(body, reply) if "Question 3 of base" in str(body) else None
    summary = run(server, tmp_path, self_pairs=0)
    assert summary["accounting"]["main"]["incomplete"] == 2
    assert "verdicts were lost: 2 incomplete (max_output_tokens, all of it reasoning)." in summary["conclusion"]
    assert sum(judged(body) and "Question 3 of base" in str(body) for body in server.requests) == 2


@pytest.mark.parametrize("status", [400, 403, 404])
def test_a_refusal_of_one_prompt_is_that_prompts(server, tmp_path, status):
    """Also in a second run, which asks for nothing else."""
    refused = {"error": {"message": "flagged by our filter"}}
    server.instead = lambda body, reply: (status, refused) if "Question 3 of base" in str(body) else None
    for _ in range(2):
        summary = run(server, tmp_path, self_pairs=0)
        assert (summary["accounting"]["main"]["error"], summary["result"]["n_missing"]) == (2, 1)
    assert "flagged by our filter" in read_jsonl(tmp_path / "judge/verdicts.jsonl")[-1]["detail"]


@pytest.mark.parametrize(
    ("status", "said", "requests"),
    [(401, "refuses the key", 1), (403, "refuses the key", 1), (404, "no model m", 2), (501, "no model m", 2)],
)
def test_before_the_first_success_a_refusal_is_of_the_server(server, tmp_path, status, said, requests):
    server.instead = lambda body, reply: (status, {"error": {"message": "the words of the server"}})
    with pytest.raises(UserError, match=rf"{said}.*the words of the server"):
        run(server, tmp_path)
    assert len(server.requests) == requests


def test_a_key_that_is_withdrawn_ends_the_run(server, tmp_path):
    server.instead = lambda body, reply: (401, {"error": {"message": "no"}}) if asked(server) > 20 else None
    with pytest.raises(UserError, match="HTTP 401"):
        run(server, tmp_path)
    assert asked(server) <= 20 + 8


def test_an_error_sent_as_a_success_is_asked_again(server, tmp_path):
    seen = set()

    def first_time(body, reply):
        key = json.dumps(body["input"])
        if not judged(body) or key in seen or "Question 3" not in key:
            return None
        seen.add(key)
        return 200, {"error": {"message": "Provider returned error"}}

    server.instead = first_time
    summary = run(server, tmp_path, self_pairs=0)
    assert summary["accounting"]["main"]["ok"] == 2 * 29 and len(seen) > 0


def test_nobody_listens(tmp_path):
    began = time.monotonic()
    with pytest.raises(UserError, match=r"^--base_url http://127.0.0.1:9/v1 does not answer \(.*\): start the"):
        judge(options("http://127.0.0.1:9/v1", str(tmp_path / "judge")), comparisons(4), [])
    assert time.monotonic() - began < 5
    assert not (tmp_path / "judge").exists()


def test_a_failed_connection_says_why(tmp_path):
    """The openai package's own words are "Connection error." """
    server = FaultServer()
    with server.serving() as url, pytest.raises(UserError, match="the server may speak http:// and no https://"):
        judge(options(url.replace("http:", "https:"), str(tmp_path / "judge"), max_attempts=1), comparisons(4), [])
    with pytest.raises(UserError, match=r"http://127.0.0..1:8/v1: 127.0.0..1 is no name of a host; see the address"):
        judge(options("http://127.0.0..1:8/v1", str(tmp_path / "judge")), comparisons(4), [])


@pytest.mark.parametrize(
    "error",
    [  # of one prompt, amid successes
        (400, {"error": {"code": "context_length_exceeded", "message": "too long"}}),
        (413, {"error": "Payload Too Large"}),
        (424, {"error": "Request failed during generation"}),
        (451, {"error": {"message": "unavailable for legal reasons"}}),
        (500, {"error": {"message": "EngineCore encountered an issue"}}),
        (200, {"error": {"message": "moderation", "code": 403}}),
        (200, {"choices": [{"finish_reason": "abort", "message": {"content": ""}}]}),
        (200, b"<html>502 Bad Gateway</html>"),
        (200, b""),
        (200, {"status": "cancelled", "output": []}),
    ],
)
def test_a_failure_of_one_prompt_is_that_prompts(server, tmp_path, error):
    server.instead = lambda body, reply: error if "Question 3 of base" in str(body) else None
    summary = run(server, tmp_path, self_pairs=0)
    assert summary["winner"] == "dpo" and summary["result"]["n_missing"] == 1
    assert (summary["accounting"]["main"]["ok"], "verdicts were lost: 2 " in summary["conclusion"]) == (56, True)


# ---- tried and untried


def test_not_tried_and_tried_without_a_verdict_are_two_things(server, tmp_path):
    untried = judge(options(server.url, str(tmp_path / "a/judge")), comparisons(30), [])
    assert "was not tried on pairs labelled by people" in untried["conclusion"]
    server.instead = lambda body, reply: no_json(body, reply) if "of rejected" in str(body) else None
    tried = judge(options(server.url, str(tmp_path / "b/judge"), max_attempts=1), comparisons(30), labelled(4))
    assert "was tried on 4 pairs labelled by people and gave on none of them a verdict" in tried["conclusion"]
    assert "not tried" not in str(distrust(tried["calibration"]["labelled"], tried["result"], 0.4))


# ---- servers as they are


def test_a_server_with_chat_completions_only(server, tmp_path):
    """One request finds that out, a second run none; every fault is read as in the other form."""
    server.routes = ("chat/completions",)
    summary = run(server, tmp_path)
    assert summary["winner"] == "dpo"
    assert (summary["judge"]["form"], summary["judge"]["schema_enforced"]) == ("chat", True)
    assert server.paths.count("/v1/responses") == 1
    body = server.requests[-1]
    assert body["text"]["format"]["type"] == "json_schema" and body["max_completion_tokens"] == 2048
    count = len(server.paths)
    assert run(server, tmp_path) == summary
    assert len(server.paths) == count
    server.instead = cut_off
    with pytest.raises(UserError, match=r"incomplete \(length\): raise --max_output_tokens"):
        judge(options(server.url, str(tmp_path / "b/judge")), comparisons(30), labelled(20))


def test_chunks_of_content(server, tmp_path):
    server.routes = ("chat/completions",)
    server.content = lambda text: [{"type": "thinking", "thinking": []}, {"type": "text", "text": text}]
    assert run(server, tmp_path)["winner"] == "dpo"


@pytest.mark.parametrize("given", ["", "/v1", "/v1/", "/v1/responses", "/v1/chat/completions", "/v1?api-version=1"])
def test_addresses_as_people_write_them(server, tmp_path, given):
    url = server.url.removesuffix("/v1") + given
    summary = judge(options(url, str(tmp_path / "judge")), comparisons(4), [])
    assert summary["accounting"]["main"]["ok"] == 8
    assert summary["judge"]["form"] == ("chat" if "chat" in given else "responses")
    assert "api-version" not in given or all("api-version=1" in path for path in server.paths)


@pytest.mark.parametrize("routes", [("responses",), ("chat/completions",)])
def test_parameters_that_are_refused_are_left_out_and_named(server, tmp_path, capsys, routes):
    server.routes, server.refuses = routes, ("temperature", "max_completion_tokens", "max_output_tokens")
    summary = run(server, tmp_path, temperature=0.5)
    assert summary["winner"] == "dpo" and summary["judge"]["schema_enforced"] is True
    limit = "max_output_tokens" if routes == ("responses",) else "max_completion_tokens"
    assert summary["judge"]["left_out"] == [limit, "temperature"]
    assert capsys.readouterr().err.count("does not take temperature: it is left out") == 1
    answered = [body for body in server.requests if "temperature" not in body and limit not in body]
    assert len(server.requests) - len(answered) == 2


def test_a_system_message_that_is_refused(server, tmp_path):
    """As the chat templates of Gemma 2 do behind vLLM; the judge's instructions then come with the question."""
    said = {"object": "error", "message": "System role not supported", "type": "BadRequestError", "code": 400}
    server.routes = ("chat/completions",)
    server.instead = lambda body, reply: (400, said) if body["input"][0]["role"] == "system" else None
    summary = run(server, tmp_path, self_pairs=0)
    assert summary["winner"] == "dpo" and summary["judge"]["left_out"] == ["system"]
    assert server.requests[-1]["input"][0]["content"].startswith("You ")
    assert [message["role"] for message in server.requests[-1]["input"]] == ["user"]


@pytest.mark.parametrize("status", [400, 422, 500])
def test_a_schema_that_is_refused(server, tmp_path, status):
    """In whatever way: the schema is then asked for in words, and lost verdicts are few."""
    server.enforces_schema = False
    said = {"error": {"message": "This response_format type is unavailable now"}}
    server.instead = lambda body, reply: (status, said) if "text" in body else None
    summary = run(server, tmp_path, self_pairs=0)
    assert summary["winner"] == "dpo" and summary["judge"]["schema_enforced"] is False


def test_a_stream_that_nobody_asked_for(server, tmp_path):
    def streamed(body, reply):
        text = reply["output"][0]["content"][0]["text"]
        chunks = [{"choices": [{"delta": {"content": piece}}]} for piece in (text[:9], text[9:])]
        chunks.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        return 200, "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks).encode() + b"data: [DONE]\n\n"

    server.instead = streamed
    assert run(server, tmp_path, self_pairs=0)["winner"] == "dpo"


def test_a_batch_of_chat_completions(server, tmp_path, monkeypatch):
    monkeypatch.setattr("tandem.judge.backends.batch.BATCH_POLL", 0.01)
    server.routes = ("chat/completions",)
    assert run(server, tmp_path, batch=True)["winner"] == "dpo"
    assert [batch["endpoint"] for batch in server.batches.values()] == ["/v1/chat/completions"]


def test_a_batch_does_not_follow_a_judge_without_any_verdict(server, tmp_path, monkeypatch):
    monkeypatch.setattr("tandem.judge.backends.batch.BATCH_POLL", 0.01)
    server.instead = no_json
    with pytest.raises(UserError, match="no verdict on any of the first 10 calls"):
        run(server, tmp_path, batch=True)
    assert server.batches == {} and asked(server) == PILOT


def test_replies_of_two_judges_are_priced_as_asked(server, tmp_path):
    cheap = {"price_in": 0.0, "price_out": 0.1, "self_pairs": 0}
    run(server, tmp_path, **cheap)
    first = json.loads((tmp_path / "judge/usage.json").read_text())
    assert first["cost"] == pytest.approx(first["output_tokens"] * 0.1 / 1e6)
    run(server, tmp_path, judge_model="dear", **cheap | {"price_out": 10.0})
    both = json.loads((tmp_path / "judge/usage.json").read_text())
    added = both["output_tokens"] - first["output_tokens"]
    assert both["cost"] == pytest.approx(first["cost"] + added * 10 / 1e6)
    assert both["unpriced"] == 0
