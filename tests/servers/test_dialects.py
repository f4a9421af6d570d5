"""Bodies and replies of both forms, and which words of a server blame a parameter."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.errors import UserError
from tandem.servers.address import parse_address
from tandem.servers.dialects import NoReply, Request, body_of, read_reply, refused_parameter
from tandem.servers.endpoint import Endpoint

REQUEST = Request("m", [{"role": "user", "content": "?"}], 9, 0.5, 0.9, 7, {"name": "V", "strict": True, "schema": {}})


def test_bodies_by_hand():
    assert body_of(REQUEST, "responses") == {
        "model": "m",
        "input": REQUEST.messages,
        "store": False,
        "stream": False,
        "temperature": 0.5,
        "top_p": 0.9,
        "max_output_tokens": 9,
        "text": {"format": {"type": "json_schema", "name": "V", "strict": True, "schema": {}}},
    }
    assert body_of(REQUEST, "chat", ["max_completion_tokens", "top_p"]) == {
        "model": "m",
        "messages": REQUEST.messages,
        "stream": False,
        "temperature": 0.5,
        "max_tokens": 9,
        "seed": 7,
        "response_format": {"type": "json_schema", "json_schema": {"name": "V", "strict": True, "schema": {}}},
    }
    assert set(body_of(Request("m", []), "chat")) == {"model", "messages", "stream"}


def completion(content, reason="stop", **message):
    choice = {"finish_reason": reason, "message": {"content": content, **message}}
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 5, "completion_tokens": 2}})


@pytest.mark.parametrize(
    ("body", "text", "end", "only_reasoning"),
    [
        (completion("yes"), "yes", "stop", False),
        (completion([{"type": "text", "text": "y"}, {"type": "thinking", "thinking": []}, "es"]), "yes", "stop", False),
        (completion(None, "length", reasoning_content="hm"), "", "length", True),
        (completion("", reasoning="hm"), "", "stop", True),
        (completion("part", "content_filter"), "part", "filtered", False),
        (completion(None, refusal="no"), "", "refused", False),
        (completion("x", "error", error={"message": "overloaded"}), "x", "failed", False),
        (completion("x", None), "x", "stop", False),
        (completion("x", "tool_calls"), "x", "tool_calls", False),
    ],
)
def test_chat_completions(body, text, end, only_reasoning):
    reply = read_reply(body)
    assert (reply.text, reply.end, reply.only_reasoning) == (text, end, only_reasoning)
    assert (reply.input_tokens, reply.output_tokens) == (5, 2)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda x: (
            st.lists(x)
            | st.dictionaries(
                st.sampled_from(
                    ["output", "choices", "message", "content", "type", "text", "usage", "error", "status"]
                ),
                x,
            )
        ),
    )
)
def test_whatever_a_server_sends_is_a_reply_or_none(value):
    for body in (
        value,
        {"output": value},
        {"choices": [{"message": value}]},
        {"output": [{"type": "message", "content": value}]},
    ):
        try:
            read_reply(json.dumps(body))
        except NoReply as problem:
            assert "not a reply" in str(problem)


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("Unsupported parameter: 'temperature' is not supported with this model.", "temperature"),
        (
            "Unsupported value: 'temperature' does not support 0.2 with this model. Only the default (1) is supported.",
            "temperature",
        ),
        ('Invalid JSON payload received. Unknown name \\"seed\\": Cannot find field.', "seed"),
        (
            '{"detail":[{"type":"extra_forbidden","loc":["body","seed"],"msg":"Extra inputs are not permitted"}]}',
            "seed",
        ),
        ("Unrecognized request argument supplied: top_p", "top_p"),
        ("litellm.UnsupportedParamsError: x does not support parameters: ['seed']", "seed"),
        ("max_completion_tokens is not supported; use max_tokens", "max_completion_tokens"),
        ("Unsupported parameter: 'max_completion_tokens'", "max_completion_tokens"),
        # faults of the prompt or of a value
        (
            "'max_tokens' or 'max_completion_tokens' is too large: 9. This model's maximum context length is not known",
            None,
        ),
        ("Invalid 'temperature': decimal above maximum value. Expected a value <= 2, but got 5 instead.", None),
        ("The response was filtered: content is not allowed", None),
        ("flagged: the seedling is not allowed", None),
        ("Unknown parameter: 'frequency'", None),
    ],
)
def test_which_parameter_is_refused(said, name):
    assert refused_parameter(body_of(REQUEST, "chat"), said) == name


def test_the_ways_in_their_order_and_what_is_kept():
    address = parse_address("http://h")
    endpoint = Endpoint(address, ("responses", "chat"))
    urls = []
    first = endpoint.attempt(REQUEST)
    for status in (404, 405, 501):
        attempt = endpoint.attempt(REQUEST)
        urls.append(attempt.url)
        assert endpoint.may_mend(attempt, status, "", "no")
        assert endpoint.may_mend(attempt, status, "", "no")  # another request of the same moment goes on as well
    attempt = endpoint.attempt(REQUEST)
    assert [*urls, attempt.url] == [
        "http://h/responses",
        "http://h/v1/responses",
        "http://h/chat/completions",
        "http://h/v1/chat/completions",
    ]
    assert endpoint.may_mend(attempt, 400, "unknown parameter seed", "no")
    attempt = endpoint.attempt(REQUEST)
    assert endpoint.accept(attempt, completion("yes"))
    assert not endpoint.may_mend(attempt, 404, "", "no")  # from now on it is of one prompt
    assert endpoint.may_mend(first, 404, "", "no")  # sent before the way was found
    again = Endpoint(address, ("responses", "chat"), endpoint.state)
    assert again.attempt(REQUEST) == attempt
    assert endpoint.state == {"base": "http://h/v1", "form": "chat", "left_out": ["seed"]}


def test_the_last_way_is_not_left():
    endpoint = Endpoint(parse_address("http://h/v1"), ("responses", "chat"))
    assert not endpoint.accept(endpoint.attempt(REQUEST), "<html>")
    assert endpoint.accept(attempt := endpoint.attempt(REQUEST), "<html>")
    assert not endpoint.may_mend(attempt, 404, "", "no")
    named = Endpoint(parse_address("http://h/v1/chat/completions"), ("responses", "chat"))
    assert not named.may_mend(named.attempt(REQUEST), 404, "", "no")
    lmstudio = Endpoint(parse_address("http://h"), ("chat",))
    assert not lmstudio.accept(lmstudio.attempt(REQUEST), '{"error": "Unexpected endpoint or method. (POST /chat)"}')
    assert lmstudio.attempt(REQUEST).url == "http://h/v1/chat/completions"


def test_tools_and_calls_go_both_ways():
    call = {"function": {"name": "weather", "arguments": {"city": "Lima"}}}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "21 °C"},
    ]
    extras = {"tools": [{"type": "function"}], "chat_template_kwargs": {"enable_thinking": False}}
    request = Request("m", messages, extras=extras)
    sent = body_of(request, "chat")
    assert (sent["tools"], sent["chat_template_kwargs"]) == (extras["tools"], extras["chat_template_kwargs"])
    function = {"name": "weather", "arguments": '{"city": "Lima"}'}
    assert sent["messages"][1]["tool_calls"] == [{"id": "call_1_0", "type": "function", "function": function}]
    assert sent["messages"][2] == {"role": "tool", "content": "21 °C", "tool_call_id": "call_1_0"}
    for asked in (request, Request("m", messages)):
        with pytest.raises(UserError, match="asked with by chat completions"):
            body_of(asked, "responses")
    reply = read_reply(completion(None, "tool_calls", tool_calls=[{"id": "1", "function": function}]))
    assert reply.text == '<tool_call>\n{"name": "weather", "arguments": {"city": "Lima"}}\n</tool_call>'
    broken = read_reply(completion("Let me see.", tool_calls=[{"function": {"name": "f", "arguments": "{"}}, 3]))
    assert broken.text == 'Let me see.\n<tool_call>\n{"name": "f", "arguments": "{"}\n</tool_call>'
