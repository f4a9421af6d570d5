import io
from typing import Any

import pytest
from rich.console import Console

from tandem.data.show import print_pair, show_pairs, visible
from tandem.options.model import TextOptions
from tests import tiny
from tests.data.pairs import pair, turns

ROW = pair(turns("q", "r", "s"), turns("abc", first="assistant"), turns("abd", first="assistant"))


def shown(row: dict[str, Any], template: str = tiny.TEMPLATE, **text: Any) -> dict[str, Any]:
    (found,) = show_pairs([row], tiny.tokenizer(template), TextOptions(**text))
    return found | {"split": "train"}


def printed(found: dict[str, Any]) -> str:
    out = io.StringIO()
    print_pair(found, Console(file=out, soft_wrap=True, highlight=False))
    return out.getvalue()


def test_tokens_roles_and_the_first_difference():
    found = shown(ROW)
    end, asked = ("</s>", "template"), ("<|user|>", "template")
    answered = ("<|assistant|>", "template")
    assert found["prompt"] == [
        asked,
        ("q", "user"),
        end,
        answered,
        ("r", "assistant"),
        end,
        asked,
        ("s", "user"),
        end,
        answered,
    ]
    assert found["chosen"] == [("a", "assistant"), ("b", "assistant"), ("c", "assistant"), end]
    assert found["rejected"][2] == ("d", "assistant")
    assert found["differs_at"] == 2
    assert found["lengths"] == {"prompt": 10, "chosen": 4, "rejected": 4}
    assert found["problems"] == {}


def test_no_token_is_lost():
    """The pieces put together are the rendered text, in characters of several tokens as well."""
    row = pair(turns("wie süß 😀?"), turns("où\nça", first="assistant"), turns("😀", first="assistant"))
    found = shown(row)
    whole = "".join(piece for piece, _ in found["prompt"] + found["chosen"]).replace("↵", "")
    for text in ("<|user|>wie süß 😀?</s><|assistant|>", "où\nça</s>"):
        assert text[0] in whole
    assert len(found["prompt"]) == found["lengths"]["prompt"] == 3 + len("wie süß 😀?".encode())
    assert len(found["rejected"]) == 5  # four bytes and the end


def test_plain_text_has_roles_too():
    found = shown(pair("ask", "ab", "cd"), use_chat_template=False)
    assert [role for _, role in found["prompt"]] == ["user"] * 3
    assert found["chosen"] == [("a", "assistant"), ("b", "assistant"), ("</s>", "template")]


def test_printed_without_colours():
    text = printed(shown(ROW, max_length=12))
    assert "train: a.jsonl row 1" in text
    assert "prompt: 10 tokens, shared by both answers, not trained" in text
    assert "<|user|>|q|</s>|<|assistant|>|r|" in text
    assert "chosen: 2 tokens trained, 2 cut at --max_length" in text
    assert "a|b| [cut at --max_length]  [differs from here] c|</s>|" in text
    assert "warning: difference_cut: the first 2 tokens of both answers are the same" in text


def test_printed_when_nothing_is_left_to_train():
    text = printed(shown(ROW, max_length=5))
    assert "chosen: 0 tokens trained, 4 cut at --max_length" in text
    assert "[cut at --max_length]" in text


def test_a_template_error_is_printed_with_its_text():
    broken = tiny.TEMPLATE.replace(" + eos_token", "")
    assert "error: template_no_end: chosen ends '<|user|>q<|assistant|>r<|user|>s<|assistant|>abc'" in printed(
        shown(ROW, broken)
    )
    refusing = "{{ raise_exception('Turns must\x1b[2J alternate') }}"
    assert "error: the chat template refuses it: Turns must\\u001b[2J alternate" in printed(shown(ROW, refusing))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nb", "a↵\nb"),
        ("\x1b[2J", "\\u001b[2J"),
        ("\u202eabc", "\\u202eabc"),
        ("é😀\t", "é😀⇥"),
        ("[red]x", "[red]x"),
    ],
)
def test_visible(text: str, expected: str):
    assert visible(text) == expected


def test_markup_in_data_is_text():
    found = shown(pair(turns("[red]q[/red]"), turns("[/]", first="assistant"), turns("b", first="assistant")))
    assert "[|r|e|d|]|q|[|/|r|e|d|]|" in printed(found)
