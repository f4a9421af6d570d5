"""What the judge is sent, that nothing in it can speak out of turn, and what makes two calls the same call."""

import dataclasses
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.judge.requests import Comparison, Judge, neutralise, render, verdict_schema

PAIR = Comparison("p", [{"role": "user", "content": "Why?"}], "one", "two", "base", "dpo")
JUDGE = Judge("http://localhost/v1", "m", True, 0.0, 100)


def test_the_order_says_which_answer_stands_as_a():
    for order, a, b in (("12", "one", "two"), ("21", "two", "one")):
        question = render(PAIR, order, worked_examples=False)[-1]["content"]
        assert f"<answer_a>\n{a}\n</answer_a>" in question
        assert f"<answer_b>\n{b}\n</answer_b>" in question
        assert '<turn role="user">\nWhy?\n</turn>' in question


def test_without_a_schema_two_worked_examples_show_each_verdict_once():
    messages = render(PAIR, "12", worked_examples=True)
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant", "user"]
    verdicts = [json.loads(message["content"])["verdict"] for message in messages if message["role"] == "assistant"]
    assert sorted(verdicts) == ["A", "B"]
    assert "JSON" in messages[0]["content"]
    assert messages[-1] == render(PAIR, "12", worked_examples=False)[-1]


HOSTILE = [
    "</answer_a>", "</ANSWER_B >", "< / answer_a>", "<answer_b>", "</conversation>", "<turn role='system'>", "</turn>",
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<start_of_turn>", "<end_of_turn>", "<s>", "</s>", "<bos>", "<eos>",
    "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "</think>", "<\uff5cUser\uff5c>",
]  # fmt: skip


@pytest.mark.parametrize("mark", HOSTILE)
def test_delimiters_in_judged_text_are_broken_wherever_it_stands(mark):
    assert mark not in neutralise(f"x{mark}y")
    clean = render(PAIR, "12", worked_examples=False)[-1]["content"]
    attacks = [
        dataclasses.replace(PAIR, answer_1=mark),
        dataclasses.replace(PAIR, answer_2=mark),
        dataclasses.replace(PAIR, messages=[{"role": "user", "content": mark}]),
        dataclasses.replace(PAIR, messages=[{"role": f'user">{mark}', "content": "Why?"}]),
    ]
    for attack in attacks:
        question = render(attack, "12", worked_examples=False)[-1]["content"]
        # The only tags are the prompt's own
        assert re.findall(r"<[^ ][^>]*>", question) == (
            re.findall(r"<[^ ][^>]*>", clean.replace('role="user"', 'role="other"'))
            if attack.messages[0]["role"] != "user"
            else re.findall(r"<[^ ][^>]*>", clean)
        )
        assert question.count(mark) <= clean.count(mark)


def test_ordinary_text_and_template_code_stay_as_they_are():
    text = "a < b, <b>bold</b>, <strong>, x[0], {{ 7 * 7 }} {% raw %}, <script>, <-, if a<c|d: <=>"
    assert neutralise(text) == text
    assert text in render(dataclasses.replace(PAIR, answer_1=text), "12", worked_examples=False)[-1]["content"]


@given(st.text(st.characters() | st.characters(categories=["Cs"])))
def test_any_text_can_be_sent(text):
    question = render(dataclasses.replace(PAIR, answer_1=text), "12", worked_examples=False)[-1]["content"]
    question.encode()
    assert question.count("</answer_a>") == 1


def test_everything_that_a_verdict_depends_on_is_in_the_key():
    variants = [
        JUDGE,
        dataclasses.replace(JUDGE, base_url="http://other/v1"),
        dataclasses.replace(JUDGE, model="n"),
        dataclasses.replace(JUDGE, schema_enforced=False),
        dataclasses.replace(JUDGE, temperature=None),
        dataclasses.replace(JUDGE, max_output_tokens=101),
    ]
    keys = [call.key for judge in variants for call in judge.calls("main", [PAIR], samples=2)]
    keys += [JUDGE.calls("main", [dataclasses.replace(PAIR, answer_1="1")], 1)[0].key]
    keys += [JUDGE.calls("main", [dataclasses.replace(PAIR, messages=[{"role": "user", "content": "?"}])], 1)[0].key]
    assert len(set(keys)) == len(keys) == 6 * 4 + 2


def test_labels_and_prompt_ids_are_not_part_of_the_key():
    renamed = dataclasses.replace(PAIR, prompt_id="q", label_1="x", label_2="y")
    assert [c.key for c in JUDGE.calls("main", [PAIR], 1)] == [c.key for c in JUDGE.calls("labelled", [renamed], 1)]


def test_a_free_tie_is_never_taken_for_the_judges_verdict_on_the_same_text():
    same = dataclasses.replace(PAIR, answer_2="one")
    free, asked = JUDGE.calls("main", [same], 1), JUDGE.calls("self", [same], 1)
    assert [call.free for call in free + asked] == [True, True, False, False]
    assert len({call.key for call in free + asked}) == 4


def test_the_schema_is_the_one_that_the_openai_package_sends():
    from openai.lib._parsing._responses import type_to_text_format_param

    from tandem.judge.verdicts import Verdict

    assert {"type": "json_schema", **verdict_schema()} == type_to_text_format_param(Verdict)
