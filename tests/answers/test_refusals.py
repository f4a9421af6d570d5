import pytest

from tandem.answers.refusals import OPENING, is_refusal


@pytest.mark.parametrize(
    "text",
    [
        "I can't help you with that.",
        "I’m sorry, but I cannot assist with this request.",
        "Sorry. I'm unable to provide instructions for that.",
        "As an AI, I am not able to give you medical records.",
        "I must decline.",
        "I won't do that, it is illegal.",
    ],
)
def test_refusals(text: str):
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I'm sorry to hear that! Here is what helps.",
        "I can't help but smile at this question.",
        "As an AI, I like this one: 42.",
        "You cannot provide an answer without data.",
        "I can help you with that.",
        "x" * OPENING + " I can't help you with that.",
        "Wi cannot provide",
    ],
)
def test_answers(text: str):
    assert not is_refusal(text)
