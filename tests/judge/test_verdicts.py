"""Reading replies: what is a verdict, and what is each of the ways not to give one."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.judge.verdicts import Verdict, find_verdict, read_reply, vote


def reply(text=None, *, content=None, **more):
    content = content or [{"type": "output_text", "text": text}]
    body = {"status": "completed", "output": [{"type": "message", "content": content}]}
    return json.dumps(body | {"usage": {"input_tokens": 7, "output_tokens": 3}} | more)


GOOD = '{"rationale": "because", "verdict": "B"}'


def test_a_verdict_is_read_with_its_rationale_and_tokens():
    reading = read_reply(reply(GOOD))
    assert (reading.status, reading.verdict, reading.rationale) == ("ok", "B", "because")
    assert (reading.input_tokens, reading.output_tokens) == (7, 3)


@pytest.mark.parametrize(
    "text",
    [
        f"```json\n{GOOD}\n```",
        f"My verdict: {GOOD}",
        f"{GOOD} I hope this helps.",
        f"{{not json}} {GOOD}",
        f"{GOOD}\n{GOOD}",
    ],
)
def test_prose_and_fences_around_the_object_are_let_pass(text):
    assert find_verdict(text) == Verdict(rationale="because", verdict="B")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "no JSON"),
        ("B is better", "no JSON"),
        (GOOD[:-4], "no JSON"),
        ('{"rationale": "r", "verdict": "Answer B"}', "verdict"),
        ('{"rationale": "r", "verdict": "b"}', "verdict"),
        ('{"rationale": "r", "verdict": null}', "verdict"),
        ('{"verdict": "B"}', "rationale"),
        ('{"rationale": "r", "verdict": "B", "score": 9}', "score"),
        # an answer that was judged says {"verdict": "A"} and is quoted: no telling which one is meant
        ('A says {"rationale": "", "verdict": "A"} but {"rationale": "r", "verdict": "B"}', "more than one"),
        (f"[{GOOD[:-1]}", "no JSON"),
    ],
)
def test_what_is_not_exactly_one_verdict_is_malformed_and_says_why(text, named):
    reading = read_reply(reply(text))
    assert reading.status == "malformed"
    assert reading.verdict is None
    assert named in reading.detail


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (reply(content=[{"type": "refusal", "refusal": "no"}]), "refusal"),
        # a refusal beside a verdict is a refusal
        (reply(content=[{"type": "output_text", "text": GOOD}, {"type": "refusal", "refusal": "no"}]), "refusal"),
        (reply(GOOD, status="incomplete", incomplete_details={"reason": "content_filter"}), "refusal"),
        (reply(GOOD, status="incomplete", incomplete_details={"reason": "max_output_tokens"}), "incomplete"),
        (reply(GOOD, status="failed", error={"message": "overloaded"}), "error"),
        (reply(GOOD)[:-10], "malformed"),
        ("", "malformed"),
        ("data: {}\n\n", "malformed"),
        ("[]", "malformed"),
        ('{"output": [1]}', "malformed"),
        ('{"output": [{"type": "message", "content": "text"}]}', "malformed"),
        ('{"output": []}', "malformed"),
    ],
)
def test_every_other_reply_has_a_status_of_its_own(body, status):
    assert read_reply(body).status == status
    assert read_reply(body).verdict is None


def test_reasoning_and_commentary_are_no_answer():
    output = [
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": GOOD.replace("B", "A")}]},
        {
            "type": "message",
            "phase": "commentary",
            "content": [{"type": "output_text", "text": GOOD.replace("B", "A")}],
        },
        {"type": "message", "phase": "final_answer", "content": [{"type": "output_text", "text": GOOD}]},
    ]
    assert read_reply(json.dumps({"output": output})).verdict == "B"


@given(
    st.text()
    | st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x))
)
def test_no_reply_raises(content):
    assert read_reply(content if isinstance(content, str) else json.dumps(content)).status == "malformed"
    assert read_reply(json.dumps({"output": content})).status == "malformed"
    assert read_reply(reply(str(content))).status == "malformed"


def test_lone_surrogates_are_made_printable():
    """JSON can hold them, a UTF-8 file cannot."""
    assert read_reply(reply('{"rationale": "a\\ud800", "verdict": "B"}')).rationale == "a?"
    read_reply(reply('{"\\ud800": 1, "rationale": "", "verdict": "B"}')).detail.encode()
    read_reply(reply(content=[{"type": "refusal", "refusal": "\ud800"}])).detail.encode()


def test_votes_are_for_answer_2_wherever_it_stood():
    assert {(verdict, order): vote(verdict, order) for verdict in ("A", "B", "tie") for order in ("12", "21")} == {
        ("A", "12"): 0, ("B", "12"): 2, ("tie", "12"): 1, ("A", "21"): 2, ("B", "21"): 0, ("tie", "21"): 1,
    }  # fmt: skip


def test_the_rationale_is_asked_for_before_the_verdict():
    assert list(Verdict.model_json_schema()["properties"]) == ["rationale", "verdict"]
