"""Bodies and replies of both forms, and which words of a server blame a parameter."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.errors import UserError
from tandem.servers.address import parse_address
from tandem.servers.dialects import NoReply, Request, body_of, read_reply
from tandem.servers.endpoint import Endpoint
from tandem.servers.refusals import JSON_SCHEMA, SYSTEM, refused_parameter

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
        # further words and forms
        (completion("x", "eos_token"), "x", "stop", False),
        (completion("x", "end_turn"), "x", "stop", False),
        (completion("x", ""), "x", "stop", False),
        (completion("x", "MAX_TOKENS"), "x", "length", False),
        (completion("x", "model_length"), "x", "length", False),
        (completion("x", "SAFETY"), "x", "filtered", False),
        (completion(None, "sensitive"), "", "filtered", False),
        (completion("", "refusal"), "", "refused", False),
        (completion("x", "insufficient_system_resource"), "x", "failed", False),
        (completion("x", "abort"), "x", "failed", False),
        (completion({"type": "text", "text": "x"}), "x", "stop", False),
        (completion([]), "", "stop", True),
        (completion([{"type": "reasoning", "text": "hm"}, {"type": "text", "text": "x"}]), "x", "stop", False),
    ],
)
def test_chat_completions(body, text, end, only_reasoning):
    reply = read_reply(body)
    assert (reply.text, reply.end, reply.only_reasoning) == (text, end, only_reasoning)
    assert (reply.input_tokens, reply.output_tokens) == (5, 2)


PIECES = [
    {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
    {"choices": [{"delta": {"reasoning_content": "hm"}}]},
    {"choices": [{"delta": {"content": "y"}}]},
    {"choices": [{"delta": {"content": "es"}, "finish_reason": "length"}]},
    {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}},
]


def stream(events, end="data: [DONE]\n\n"):
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events) + end


def test_a_stream_that_nobody_asked_for():
    whole = read_reply(": ping\n\n" + stream(PIECES))
    assert (whole.text, whole.end, whole.input_tokens, whole.output_tokens) == ("yes", "length", 5, 2)
    assert read_reply(stream(PIECES[:2])).end == "failed"  # it broke off
    assert read_reply(stream(PIECES[:1], 'data: {"choi')).end == "failed"
    assert read_reply(stream([*PIECES[:2], {"error": {"message": "overloaded"}}])).detail == "overloaded"
    output = [{"type": "message", "content": [{"type": "output_text", "text": "yes"}]}]
    last = {"type": "response.completed", "response": {"status": "completed", "output": output}}
    assert read_reply(f"event: x\n{stream([{'type': 'response.created'}, last], '')}").text == "yes"
    for body in ("data: {}\n\n", "data: 1\n", "event: error\n", 'data: {"choices": [1]}\n'):
        with pytest.raises(NoReply):
            read_reply(body)


@pytest.mark.parametrize(
    ("body", "text", "end"),
    [
        ({"choices": [{"text": "x", "finish_reason": "length"}]}, "x", "length"),  # of plain completions
        ({"status": "cancelled", "output": []}, "", "failed"),
        ({"status": "queued", "output": []}, "", "failed"),
        ({"status": "incomplete", "incomplete_details": {"reason": "length"}, "output": []}, "", "length"),
        ({"status": "completed", "output": [{"type": "message", "content": "x"}]}, "x", "stop"),
        ({"output": None, "choices": [{"message": {"content": "x"}}]}, "x", "stop"),
        ({"output": None, "error": {"message": "no"}}, "", "failed"),
        ({"error": "model is loading"}, "", "failed"),
        ({"choices": [], "error": {"message": "no"}}, "", "failed"),
        ({"choices": None, "error": {"message": "no"}}, "", "failed"),
    ],
)
def test_further_forms_of_replies(body, text, end):
    reply = read_reply(json.dumps(body))
    assert (reply.text, reply.end) == (text, end)


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
        ('{"error":{"message":"property \'seed\' is unsupported","type":"invalid_request_error"}}', "seed"),
        ("`temperature` and `top_p` cannot both be specified for this model. Please use only one.", "top_p"),
        ("invalid temperature: only 1 is allowed for this model", "temperature"),
        ("invalid top_p: only 0.95 is allowed for this model", "top_p"),
        ("`temperature` may only be set to 1 when thinking is enabled", "temperature"),
        ("extraneous key [seed] is not permitted", "seed"),
        ("Argument not supported on this model: maxCompletionTokens", "max_completion_tokens"),
        ("Json document validation error: seed should not be present", "seed"),
        ("litellm.BadRequestError: 'temperature' is deprecated for this model.", "temperature"),
        ("参数 top_p 不支持", "top_p"),
        ("Extra inputs are not permitted, field: 'max_completion_tokens', value: 9", "max_completion_tokens"),
        # faults of the prompt or of a value
        ("Input validation error: `seed` must be strictly positive", None),
        ("Invalid max_tokens value, the valid range of max_tokens is [1, 8192]", None),
        ("`temperature` must be strictly positive", None),
        ("System role not supported", None),  # there is none
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


def test_a_top_p_of_one_is_what_a_server_does_without_it():
    said = "Input validation error: `top_p` must be > 0.0 and < 1.0"
    assert refused_parameter({"top_p": 1.0}, said) == "top_p"
    assert refused_parameter({"top_p": 0.9}, said) is None


@pytest.mark.parametrize(
    "said",
    [
        '{"object":"error","message":"System role not supported","type":"BadRequestError","code":400}',
        "Conversation roles must alternate user/assistant/user/assistant/...",
        "Developer instruction is not enabled for models/gemma-3-27b-it",
        "Only user and assistant roles are supported!",
        "This model does not support the system role",
        "system messages aren't supported by this model",
    ],
)
def test_a_system_message_that_is_refused_goes_into_the_users_first(said):
    system, user, rest = ({"role": role, "content": role} for role in ("system", "user", "assistant"))
    request = Request("m", [system, user, rest])
    for form in ("chat", "responses"):
        body = body_of(request, form)
        assert refused_parameter(body, said) == SYSTEM
        sent = body_of(request, form, [SYSTEM])
        assert sent.get("messages", sent.get("input")) == [{"role": "user", "content": "system\n\nuser"}, rest]
        assert refused_parameter(sent, said) is None
    assert refused_parameter(body, "The system is overloaded and not supporting new requests. Try later") is None


@pytest.mark.parametrize(
    "said",
    [
        r"1 validation error:\n  {'type': 'literal_error', 'loc': ('body', 'response_format', 'type'), 'msg': "
        r"\"Input should be 'text' or 'json_object'\", 'input': 'json_schema'}",
        "This response_format type is unavailable now",
        "'response_format.type' must be one of 'text' or 'json_object'",
        "Invalid parameter: 'response_format' of type 'json_schema' is not supported with this model.",
    ],
)
def test_a_schema_that_goes_with_json_object(said):
    assert refused_parameter(body_of(REQUEST, "chat"), said) == JSON_SCHEMA
    sent = body_of(REQUEST, "chat", [JSON_SCHEMA])
    assert sent["response_format"] == {"type": "json_object", "schema": {}}
    assert refused_parameter(sent, said) is None  # then nothing is left but words


def test_a_refusal_sent_as_a_success():
    endpoint = Endpoint(parse_address("http://h/v1"), ("chat",))
    said = json.dumps({"error": {"message": "Provider: seed is not supported", "code": 400}})
    for _ in range(2):  # a request that was under way is asked again as well
        assert not endpoint.accept(endpoint.attempt(REQUEST), said) or endpoint.left_out == ["seed"]
    assert "seed" not in endpoint.attempt(REQUEST).body
    assert endpoint.accept(endpoint.attempt(REQUEST), completion('"error"'))
    assert endpoint.accept(endpoint.attempt(REQUEST), said)  # nothing is left to leave out


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
    for hollow in ('{"choices": []}', '{"output": 1}'):
        right = Endpoint(parse_address("http://h/v1"), ("responses", "chat"))
        assert right.accept(right.attempt(REQUEST), hollow) and right.form == "responses" and not right.is_found
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
