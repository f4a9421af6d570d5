"""What is an answer, what is reasoning, and what is neither."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.data.non_answers import non_answer, spoken


@pytest.mark.parametrize(
    ("text", "said", "reason", "why"),
    [
        ("yes", "yes", "stop", None),
        ("<think>hm</think>\n\nyes", "yes", "stop", None),
        ("hm\nhm</think>\nyes", "yes", "stop", None),  # the template had opened the block
        ("<think>a <think>b</think> c</think>yes", "yes", "stop", None),
        ("<think>a</think>yes<think>b</think> and no", "yes and no", "stop", None),
        ("<THINKING>a</THINKING>yes", "yes", "stop", None),
        ("[THINK]a[/THINK]yes", "yes", "stop", None),
        ("Write `<think>` and `</think>`.", "Write `<think>` and `</think>`.", "stop", None),
        ("<think>hm</think>  ", "", "stop", "empty"),
        ("", "", "stop", "empty"),
        ("<think>hm, and on", "", "length", "unclosed_think"),
        ("yes<think>hm", "yes", "stop", "unclosed_think"),
        ("yes, si", "yes, si", "length", "cut_off"),
        ("", "", "refused", "filtered"),
        ("ye", "ye", "content_filter", "filtered"),
        ("a\0", "a\0", "stop", "not_text"),
    ],
)
def test_answers(text, said, reason, why):
    assert spoken(text) == said
    assert non_answer({"text": text, "finish_reason": reason}) == why


FINAL = "<|channel|>final<|message|>"
FENCED = "Split it:\n```python\ntext.split('</think>')[-1]\nre.sub(r'<think>.*?</think>', '', text)\n```"


@pytest.mark.parametrize(
    ("text", "said", "why"),
    [
        # other notations
        ("<seed:think>a<seed:cot_budget_reflect>b</seed:cot_budget_reflect></seed:think>yes", "yes", None),
        ("<longcat_think>a</longcat_think>yes", "yes", None),
        ('<thought time="3">a</thought>yes', "yes", None),
        ("<reasoning>\na\n</reasoning>\n<answer>\nyes\n</answer>", "yes", None),
        ("<think>a</think>\n\n<response>yes</response>", "yes", None),
        ("<think/>yes", "yes", None),
        ("<think></think>yes", "yes", None),
        ("◁think▷a◁/think▷yes", "yes", None),
        ("<|START_THINKING|>a<|END_THINKING|><|START_RESPONSE|>yes<|END_RESPONSE|>", "yes", None),
        ("<|begin_of_thought|>a<|end_of_thought|>\n<|begin_of_solution|>yes<|end_of_solution|>", "yes", None),
        ("<unused94>thought\na<unused95>yes", "yes", None),
        ("<|channel>thought\na<channel|>yes", "yes", None),
        ("Here is my thought process:\na\n\nHere is my response:\nyes", "yes", None),
        ("Here are my reasoning steps:\na\n[BEGIN FINAL RESPONSE]\nyes\n[END FINAL RESPONSE]", "yes", None),
        # OpenAI's harmony, with and without its special tokens
        (f"<|channel|>analysis<|message|>a<|end|><|start|>assistant{FINAL}yes<|return|>", "yes", None),
        ("analysis<|message|>a<|end|><|start|>assistant<|channel|>final <|constrain|>json<|message|>{}", "{}", None),
        ("<|channel|>final<|message|>yes", "yes", None),
        ("analysisWe need a.assistantfinalyes", "yes", None),
        ("<|channel|>analysis<|message|>We", "", "unclosed_think"),
        ("analysisWe need", "", "unclosed_think"),
        ("Analysis shows that we need", "Analysis shows that we need", None),
        # never closed
        ("<seed:think>a", "", "unclosed_think"),
        ("◁think▷a", "", "unclosed_think"),
        ("[THINK]a", "", "unclosed_think"),
        ("<|START_THINKING|>a", "", "unclosed_think"),
        ("Here is my thought process: a", "", "unclosed_think"),
        ("<think>a</think>yes\n<think>b", "yes", "unclosed_think"),
        # nested, doubled, of two kinds
        ("<think>a tag is <think> of two</think>yes", "yes", None),
        ("<think>a<think>b</think>c</think>yes<think>d</think>", "yes", None),
        ("<think>a</think>draft</think>yes", "yes", None),
        ("<think>a</think>yes</think>", "yes", None),
        ("<thinking>a</think>yes", "yes", None),
        ("a</think>", "", "empty"),
        # spoken of, in code and quotes
        (FENCED, FENCED, None),
        (f"<think>a ```b</think>{FENCED}", FENCED, None),
        ("```\n<think>\na\n</think>\n```", "```\n<think>\na\n</think>\n```", None),
        ("~~~\n<think>", "~~~", "unclosed_think"),  # no code: the fence is never closed
        ("The tag '<think>' begins it.", "The tag '<think>' begins it.", None),
        ("Use `a <think> b` here.", "Use `a <think> b` here.", None),
        ("<think>Write `</think>`?</think>yes", "yes", None),
        ("Draft:\n```python\nprint(1)\n</think>\n```python\nprint(1)\n```", "```python\nprint(1)\n```", None),
        # words that are no tags
        ("[think] he said", "[think] he said", None),
        ("I <thinker> am", "I <thinker> am", None),
        # nothing that anyone could see
        ("\u200b\ufeff \n", "\u200b\ufeff", "empty"),
        ("<think>a</think>\u200b", "\u200b", "empty"),
    ],
)  # fmt: skip
def test_reasoning_as_models_write_it(text, said, why):
    assert spoken(text) == said
    assert non_answer({"text": text, "finish_reason": "stop"}) == why


@given(st.lists(st.sampled_from(["<think>", "</think>", "```", "\n", "`", "a", "'", "[/THINK]", "<|channel|>"])))
def test_what_is_said_is_part_of_the_text(pieces):
    text = "".join(pieces)
    assert len(spoken(text)) <= len(text) and set(spoken(text)) <= set(text)
    if "think>" not in text.lower() and "THINK]" not in text:
        assert spoken(text) == text.strip()


def test_long_hostile_text_takes_no_quadratic_time():
    began = time.process_time()
    for piece in ("```a\n", "<think>", "</think>", "`", "~~~\n", "<think>'", "'</think>'\n"):
        spoken(piece * 20_000)
    assert time.process_time() - began < 5


def test_a_record_that_names_no_reason():
    assert non_answer({"text": "yes"}) is None
