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


@pytest.mark.parametrize(
    "text",
    [
        '{"rationale": "because", "verdict": "b"}',
        '{"rationale": "because", "verdict": "B", "confidence": 0.9}',
        '{"response": {"rationale": "because", "verdict": "B"}}',
        '{"response": "{\\"rationale\\": \\"because\\", \\"verdict\\": \\"B\\"}"}',
        '"{\\"rationale\\": \\"because\\", \\"verdict\\": \\"B\\"}"',
        '[{"rationale": "because", "verdict": "B"}]',
        '{"Rationale": "because", "VERDICT": " B\\n"}',
        "{'rationale': 'because', 'verdict': 'B'}",
        '{"rationale": "because", "verdict": "B",}',
        "```python\n{'rationale': \"because\", 'verdict': 'b',}\n```",
        "{“rationale”: “because”, “verdict”: “B”}",
        '{"Result": {"Rationale": "because", "Verdict": "B"}}',
        '<|channel|>analysis<|message|>{"rationale": "", "verdict": "A"}<|end|><|channel|>final<|message|>'
        '{"rationale": "because", "verdict": "B"}',
    ],
)
def test_where_no_schema_is_enforced_the_form_is_less_strict(text):
    assert find_verdict(text, lenient=True) == Verdict(rationale="because", verdict="B")


def test_a_raw_newline_in_a_rationale_is_read_where_no_schema_is_enforced():
    text = '{"rationale": "one\ntwo", "verdict": "Tie"}'
    assert find_verdict(text, lenient=True) == Verdict(rationale="one\ntwo", verdict="tie")
    assert isinstance(find_verdict(text), str)


@pytest.mark.parametrize(
    "text",
    [
        '{"rationale": "r", "verdict": "Answer B"}',
        '{"verdict": "B"}',
        '{"a": {"rationale": "r", "verdict": "A"}, "b": {"rationale": "r", "verdict": "B"}}',
        '{"a": {"b": {"rationale": "r", "verdict": "A"}}}',
        '{"rationale": "r", "verdict": "a"} {"rationale": "r", "verdict": "B"}',
        '{"rationale": "r", "verdict": 1}',
        '{"rationale": "r", "verdict": ["B"]}',
        '{"rationale": "r", "verdict": "A/B"}',
        "{'rationale': 'r', 'verdict': __import__('os')}",
        "{'rationale': 'r', 'verdict': 'A'} {'rationale': 'r', 'verdict': 'B'}",
        "{" * 5000 + "'",
        "[" * 5000 + "{'a': " + "[" * 5000,
    ],
)
def test_and_yet_not_everything_is_a_verdict(text):
    assert isinstance(find_verdict(text, lenient=True), str)


def test_a_draft_while_thinking_is_no_verdict():
    draft = GOOD.replace('"B"', '"A"')
    assert find_verdict(f"<think>{draft} no, wait</think>\n{GOOD}") == Verdict(rationale="because", verdict="B")
    assert isinstance(find_verdict(f"<think>{GOOD}</think> I cannot say."), str)
    for begun in ("<think>", "[THINK]", "<|channel|>analysis<|message|>", "◁think▷"):  # and never ended
        assert isinstance(find_verdict(f"{begun}{GOOD}"), str)
    assert find_verdict(f"[THINK]{draft}[/THINK]{GOOD}").verdict == "B"


@pytest.mark.parametrize("tag", ["</think>", "<think>", "[/THINK]"])
def test_a_rationale_may_speak_of_tags(tag):
    assert find_verdict(json.dumps({"rationale": f"A leaks {tag} tags", "verdict": "B"})).verdict == "B"


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"prompt_tokens": 7, "completion_tokens": 3}, (7, 3)),
        ({"input_tokens": 7.0, "output_tokens": 3.0}, (7, 3)),
        ({"input_tokens": None}, (None, None)),
        ({}, (None, None)),
    ],
)
def test_a_count_of_tokens_never_decides_over_a_verdict(usage, tokens):
    reading = read_reply(reply(GOOD, usage=usage))
    assert (reading.status, reading.input_tokens, reading.output_tokens) == ("ok", *tokens)


def test_an_error_sent_as_a_success_is_an_error():
    reading = read_reply('{"error": {"message": "Provider returned error"}}')
    assert (reading.status, reading.detail) == ("error", "the server reports: Provider returned error")
