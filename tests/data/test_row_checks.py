import itertools
from typing import Any

import pytest

from tandem.data.row_checks import check_row, is_iban, language, mask, passes_luhn, personal_data
from tests.data.pairs import pair, turns

ASKED = "How do I repot a large fern without breaking it?"
GOOD = pair(turns(ASKED), turns("Water it first.", first="assistant"), turns("Just pull.", first="assistant"))


def test_a_good_row_has_no_findings():
    assert check_row(GOOD) == {}


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "identical": (pair("q", "same", "same"), "the same text"),
    "identical but for space": (pair("q", "the  same", "the same\n"), "the same but for white space"),
    "several_turns": (GOOD | {"chosen": turns("a", "b", "c", first="assistant")}, "3 turns in an answer"),
    "role_order": (
        GOOD | {"prompt": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
        "prompt has two turns of the user in a row",
    ),
    "role_order at the start": (
        GOOD | {"prompt": turns("Hello.", "Hi", first="assistant")},
        "prompt begins with the assistant's turn",
    ),
    "turn_markers": (pair("q", "Yes.\n\nHuman: and now?", "No."), "chosen holds 'Human:'"),
    "prompt_repeated": (pair(ASKED, "No.", f"You ask: {ASKED.upper()}  Well."), "in rejected"),
    "unfinished": (
        pair("q", "It is a long way from here to the", "No."),
        "chosen: …'It is a long way from here to the'",
    ),
    "wrapped_prompt": (GOOD | {"prompt": turns("[INST] Why? [/INST]")}, "'[INST]'"),
    "wrapped_prompt, alpaca": (
        pair("Below is an instruction.\n\n### Instruction:\nWhy?\n\n### Response:", "a", "b"),
        "'### Instruction:'",
    ),
    "wrapped_prompt, llama 3": (pair("<|start_header_id|>user<|end_header_id|>Hi", "a", "b"), "'<|start_header_id|>'"),
    "score_order": (GOOD | {"scores": [3.0, 3.0]}, "chosen 3, rejected 3"),
    "score_order, turned round": (GOOD | {"scores": [2.0, 3.5]}, "chosen 2, rejected 3.5"),
    "missing_value": (pair("q", "nan", "b"), "chosen is 'nan'"),
    "missing_value, of pandas": (pair("q", "A dog.", " <NA> "), "rejected is '<NA>'"),
    "not_text": (pair("q", "a\x1b[31mb", "c"), "chosen holds U+001B"),
    "not_text, undecodable": (pair("q\ufffd", "a", "c"), "prompt holds U+FFFD"),
    "not_text, mojibake": (pair("q", "a", "itâ€™s"), "rejected holds 'â€™': UTF-8 that was read as another encoding"),
    "personal_data": (pair("q", "Write to ann.lee@mail.org.", "c"), "email an…rg"),
}


@pytest.mark.parametrize("case", CASES)
def test_case(case: str):
    row, found = CASES[case]
    assert check_row(row) == {case.replace(",", " ").split()[0]: found}


@pytest.mark.parametrize("text", ["Yes", "Yes, of course", "1. Bird\n2. Cat", "It is a long way from here to the end."])
def test_words_lists_and_sentences_are_finished(text: str):
    assert "unfinished" not in check_row(pair("q", text, "no"))


PERSONAL = {
    "mail a.b+c@x-y.co.uk now": ("email", "a.b+c@x-y.co.uk"),
    "call (212) 555-0100 today": ("phone", "(212) 555-0100"),
    "call 1-800-555-0199.": ("phone", "1-800-555-0199"),
    "call +44 20 7946 0958": ("phone", "+44 20 7946 0958"),
    "card 4111 1111 1111 1111": ("payment card", "4111 1111 1111 1111"),
    "host 8.8.8.8 answers": ("IPv4 address", "8.8.8.8"),
    "host 2001:4860:4860::8888 answers": ("IPv6 address", "2001:4860:4860::8888"),
    "pay GB82 WEST 1234 5698 7654 32": ("IBAN", "GB82 WEST 1234 5698 7654 32"),
    "ssn 078-05-1120": ("social security number", "078-05-1120"),
    "key sk-abcdefghijklmnopqrstuv": ("secret key", "sk-abcdefghijklmnopqrstuv"),
}


@pytest.mark.parametrize("text", PERSONAL)
def test_personal_data(text: str):
    assert list(personal_data(text)) == [PERSONAL[text]]


@pytest.mark.parametrize(
    "text",
    [
        "card 4111 1111 1111 1112",  # the check digit is wrong
        "0000 0000 0000 0000",
        "host 127.0.0.1 and 192.168.1.1",  # no one's
        "version 10.20.30.400",
        "pay GB83 WEST 1234 5698 7654 32",
        "the years 1990-2010 and 3.141592653589793",
        "ssn 000-12-3456",
        "@handle said so at 12:30:45",
        "std::vector<int>",
        "1,234,567,890 people",
    ],
)
def test_other_numbers_are_not_personal(text: str):
    assert list(personal_data(text)) == []


def test_luhn_by_hand():
    """7992739871: doubled from the right 1→2, 8→16→7, 3→6, 2→4, 9→18→9; 2+7+7+9+6+7+4+9+9+7 = 67; check digit 3."""
    assert [digit for digit in range(10) if passes_luhn(f"7992739871{digit}")] == [3]


def test_iban_by_hand():
    assert is_iban("DE89370400440532013000")
    assert not is_iban("DE89370400440532013001")


def test_any_swap_of_neighbours_breaks_an_iban():
    good = "DE89370400440532013000"
    for index in range(4, len(good) - 1):
        left, right = good[index], good[index + 1]
        if left != right:
            assert not is_iban(good[:index] + right + left + good[index + 2 :])


def test_a_masked_datum_cannot_be_read():
    assert mask("ann.lee@mail.org") == "an…rg"


@pytest.mark.parametrize(
    "text", ["a" * 10**6, "1-" * 10**6, "a.b@" * 10**6, ":" * 10**6, "AB12 " * 10**5, "+1 22 " * 10**5]
)
def test_hostile_text_is_searched_in_linear_time(text: str):
    """A quadratic pattern would take days here."""
    assert len(list(itertools.islice(personal_data(text), 1))) in (0, 1)


def test_language():
    english = "The weather in the mountains changes quickly, so take a warm jacket and enough water with you."
    german = "Das Wetter in den Bergen ändert sich schnell, also nimm eine warme Jacke und genug Wasser mit."
    assert language(pair("q", english, english)) == "en"
    assert language(pair("q", german, german)) == "de"
    assert language(pair("q", "ok", "no")) is None


def test_a_short_question_in_an_answer_is_no_accident_and_no_finding():
    """From 30 characters on it is one."""
    for length, found in ((29, False), (30, True)):
        question = ("why " * 10)[:length].strip().ljust(length, "?")
        assert ("prompt_repeated" in check_row(pair(question, f"You ask {question}.", "No."))) is found


def test_a_line_of_eight_words_should_end_like_a_sentence():
    for words, found in ((7, False), (8, True)):
        assert ("unfinished" in check_row(pair("q", " ".join(["word"] * words), "No."))) is found


@pytest.mark.parametrize(("length", "is_one"), [(14, False), (15, True), (34, True), (35, False)])
def test_an_iban_has_15_to_34_characters(length: int, is_one: bool):
    account = "1" * (length - 4)
    check = 98 - int(f"{account}131400") % 97  # DE is 1314; ISO 7064, mod 97-10
    assert is_iban(f"DE{check:02d}{account}") is is_one


def test_a_language_is_told_from_60_letters_on():
    text = "This is an answer of some length, in plain English, on bread and butter and all that is in it."
    letters = 0
    for end, char in enumerate(text, 1):
        letters += char.isalpha()
        if letters in (59, 60):
            assert language({"chosen": text[:end], "rejected": ""}) == ("en" if letters == 60 else None)
    assert letters > 60
