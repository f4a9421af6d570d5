"""What is an answer, what is reasoning, and what is neither."""

import pytest

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


def test_a_record_that_names_no_reason():
    assert non_answer({"text": "yes"}) is None
