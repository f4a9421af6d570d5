"""Pairs as the model sees them. The tiny tokenizer makes one token of each byte and of each special token."""

import random
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from tandem.data.texts import render, tokenize_pair, trim_prompt
from tandem.data.tokens import Seen, check_seen, role_spans, see, special_ids, special_texts
from tandem.options.model import TextOptions
from tests import tiny
from tests.data.pairs import pair, turns

GOOD = pair("q", "abc", "abd")


def one(row: dict[str, Any], template: str = tiny.TEMPLATE, **text: Any) -> dict[str, str]:
    """Findings of one row."""
    tokenizer = tiny.tokenizer(template)
    options = TextOptions(**text)
    (seen,) = see([row], tokenizer, options)
    assert isinstance(seen, Seen)
    return check_seen(seen, tokenizer, options, special_ids(tokenizer))


@pytest.mark.parametrize("options", [{}, {"max_prompt_length": 20}, {"use_chat_template": False}], ids=str)
def test_ids_are_those_that_are_trained(options: dict[str, Any]):
    """In batches and from the fast backend, against one by one as training does it."""
    noise = random.Random(0)
    rows = [
        pair(turns(*(" ".join(noise.choices(tiny.WORDS, k=noise.randrange(1, 9))) for _ in range(2 * half + 1))),
             turns(noise.choice(tiny.WORDS), first="assistant"), turns(f"no {index}", first="assistant"))
        for index, half in enumerate([0, 1, 2] * 5)
    ]  # fmt: skip
    text, tokenizer = TextOptions(**options), tiny.tokenizer()
    for row, seen in zip(rows, see(rows, tokenizer, text), strict=True):
        assert isinstance(seen, Seen)
        rendered = render(row, text.use_chat_template)
        if text.max_prompt_length:
            rendered["prompt"] = trim_prompt(rendered["prompt"], tokenizer, text.max_prompt_length)
        trained = {"prompt_ids": seen.prompt_ids, "chosen_ids": seen.chosen_ids, "rejected_ids": seen.rejected_ids}
        assert trained == tokenize_pair(rendered, tokenizer)


def test_a_good_pair_has_no_findings():
    assert one(GOOD) == {}
    assert one(GOOD, use_chat_template=False) == {}


def test_lengths_at_the_limit_itself():
    """`<|user|>q</s><|assistant|>` is 4 tokens, `abc</s>` 4; the answers differ in their third token."""
    assert one(GOOD, max_length=8) == {}
    assert one(GOOD, max_length=7) == {"answer_cut": "prompt 4, chosen 4, rejected 4 tokens"}
    assert one(GOOD, max_length=6).keys() == {"answer_cut", "difference_cut"}
    assert one(GOOD, max_length=4) == {
        "answer_cut": "prompt 4, chosen 4, rejected 4 tokens",
        "answer_lost": "prompt 4 tokens",
    }


def test_an_answer_that_the_other_begins_with_differs_at_its_end():
    seen = see([pair("q", "ab", "abc")], tiny.tokenizer(), TextOptions())[0]
    assert isinstance(seen, Seen)
    assert seen.first_difference() == 2  # </s> against c
    assert seen.room(TextOptions(max_length=6)) == 2


def test_a_trimmed_prompt():
    assert one(pair("q" * 30, "abc", "abd"), max_prompt_length=10) == {"prompt_cut": "cut to 10 tokens"}


def test_a_tokenizer_that_ends_an_answer_again():
    """In plain text an end token of ours stands behind the answer, and some tokenizers add another."""
    tokenizer = tiny.tokenizer()
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"$A {end}", None, [(end, tokenizer.eos_token_id)])
    text = TextOptions(use_chat_template=False)
    (seen,) = see([GOOD], tokenizer, text)
    assert isinstance(seen, Seen)
    assert seen.chosen_ids[-2:] == [tokenizer.eos_token_id] * 2
    assert "closed_twice" in check_seen(seen, tokenizer, text, special_ids(tokenizer))
    twice = tiny.TEMPLATE.replace(" + eos_token", " + eos_token + eos_token")
    assert one(GOOD, twice)["closed_twice"].startswith("chosen ends ")


def test_single_token():
    assert one(pair("q", "a", "bc")) == {"single_token": "chosen"}


ALTERS_LAST = tiny.TEMPLATE.replace(
    "m['content']", "(m['content'] if not loop.last or m['role'] != 'user' else 'Please answer: ' + m['content'])"
)
ADDS_THOUGHT = tiny.TEMPLATE.replace("{{ '<|assistant|>' }}", "{{ '<|assistant|><think></think>' }}")
NO_END = tiny.TEMPLATE.replace(" + eos_token", "")
END_THAT_IS_NO_TOKEN = tiny.TEMPLATE.replace("eos_token", "'<|done|>'")


def test_a_template_that_trains_the_users_words():
    found = one(GOOD, ALTERS_LAST)
    assert found["template_trains_user"] == "trained with chosen: 'q'"
    assert found["template_prompt_differs"] == (
        "alone it reads '<|user|>Please answer: q</s><|assistant|>', "
        "before chosen it reads '<|user|>q</s><|assistant|>abc</s>'"
    )


def test_a_template_that_reads_differently_alone():
    assert one(GOOD, ADDS_THOUGHT) == {
        "template_prompt_differs": "alone it reads '|>q</s><|assistant|><think></think>', "
        "before chosen it reads '|>q</s><|assistant|>abc</s>'"
    }


@pytest.mark.parametrize("template", [NO_END, END_THAT_IS_NO_TOKEN], ids=["none", "plain text"])
def test_a_template_without_an_end_of_turn_token(template: str):
    assert one(GOOD, template).keys() == {"template_no_end"}


def test_a_template_that_refuses_one_row_does_not_lose_the_others():
    strict = "{% if messages | length > 2 %}{{ raise_exception('Too many turns') }}{% endif %}" + tiny.TEMPLATE
    long = pair(turns("a", "b", "c"), turns("d", first="assistant"), turns("e", first="assistant"))
    good = pair(turns("a"), turns("d", first="assistant"), turns("e", first="assistant"))
    first, second, third = see([good, long, good], tiny.tokenizer(strict), TextOptions())
    assert second == "Too many turns"
    assert first == third
    assert isinstance(first, Seen)


def test_special_tokens():
    tokenizer = tiny.tokenizer()
    assert special_texts(tokenizer).search("x </s> y").group() == "</s>"  # type: ignore[union-attr]
    assert special_texts(tokenizer).search("<s >") is None
    assert {tokenizer.convert_tokens_to_ids("<|user|>"), tokenizer.eos_token_id} <= special_ids(tokenizer)
    assert tokenizer.convert_tokens_to_ids("a") not in special_ids(tokenizer)


def test_role_spans():
    """Not the s of `</s>`, nor the `user` of `<|user|>`; the last is what a template adds."""
    messages = turns("user", "s", "</s>", "s")
    text = tiny.tokenizer().apply_chat_template(messages, tokenize=False)
    assert text == "<|user|>user</s><|assistant|>s</s><|user|></s></s><|assistant|>s</s>"
    spans = role_spans(text, messages, tiny.tokenizer())
    assert [(text[start:end], role) for start, end, role in spans] == [
        ("user", "user"),
        ("s", "assistant"),
        ("</s>", "user"),
        ("s", "assistant"),
    ]
    assert [start for start, _, _ in spans] == [8, 29, 42, 63]


def test_role_spans_of_a_template_that_trims_or_rewrites():
    trims = tiny.tokenizer(tiny.TEMPLATE.replace("m['content']", "m['content'] | trim"))
    assert role_spans("<|user|>hi</s>", turns(" hi\n"), trims) == [(8, 10, "user")]
    shouts = tiny.tokenizer(tiny.TEMPLATE.replace("m['content']", "m['content'] | upper"))
    assert role_spans("<|user|>HI</s><|assistant|>OK</s>", turns("HI", "ok"), shouts) == [(8, 10, "user")]
