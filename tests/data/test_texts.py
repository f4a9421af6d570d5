import itertools
import random
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from tandem.data.texts import ensure_chat_template, prompt_ids, render, tokenize_pair, trim_prompt
from tandem.data.tokenized import ids_of
from tandem.errors import UserError
from tests import tiny

BYTES = tiny.tokenizer()  # one token a byte


def merging() -> PreTrainedTokenizerFast:
    """A BPE that merges across words, with a beginning-of-sequence token: what makes boundaries move."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet)
    text = "\n\nHuman: say the cat\n\nAssistant: the cat sat on the mat, they said. naïve 日本 answer \ufffd"
    inner.train_from_iterator([text] * 4, trainer)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = tiny.TEMPLATE
    return tokenizer


MERGING = merging()


def conversation(*texts: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if index % 2 else "user", "content": text} for index, text in enumerate(texts)]


ROWS: list[dict[str, Any]] = [
    {
        "prompt": conversation("say the cat", "the cat", "say more"),
        "chosen": [{"role": "assistant", "content": "the cat sat"}],
        "rejected": [{"role": "assistant", "content": "naïve 日本"}],
    },
    {
        "prompt": [{"role": "system", "content": "Be kind."}, *conversation("hi")],
        "chosen": [{"role": "assistant", "content": " hello "}],
        "rejected": conversation("x", "y")[::-1],
    },
]
TEXTS = [
    {"prompt": "say the ", "chosen": "cat", "rejected": "mat"},
    {"prompt": "the", "chosen": "y said", "rejected": " cat</s>"},
    {"prompt": "\n\nHuman: say\n\nAssistant:", "chosen": " the answer", "rejected": " answer"},
]


def by_trl(rows: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, list[int]]]:
    """What TRL's own DPOTrainer makes of the rows."""
    arguments = DPOConfig(output_dir="unused", max_length=None, use_cpu=True, bf16=False)
    stand_in: Any = SimpleNamespace(_tokenizer=tokenizer)
    prepared = DPOTrainer._prepare_dataset(stand_in, Dataset.from_list(rows), tokenizer, arguments, "train")
    return [{key: row[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in prepared]


def assert_as_trl_or_as_asked(rows: list[dict[str, Any]], tokenizer: Any) -> int:
    """TRL's ids where it does not warn; elsewhere the prompt's own and the same text. How many are as TRL's."""
    alike = 0
    for row, by_them in zip(rows, by_trl(rows, tokenizer), strict=True):
        ours, prompt = tokenize_pair(row, tokenizer), prompt_ids(row["prompt"], tokenizer)
        assert ours["prompt_ids"] == prompt
        if by_them["prompt_ids"] == prompt:
            assert {name: ours[name] for name in by_them} == by_them
            alike += 1
        for side in ("chosen_ids", "rejected_ids"):
            theirs = tokenizer.decode(by_them["prompt_ids"] + by_them[side])
            assert tokenizer.decode(ours["prompt_ids"] + ours[side]) == theirs
    return alike


@pytest.mark.parametrize("tokenizer", [BYTES, MERGING], ids=["bytes", "merging"])
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS[1:], TEXTS], ids=["conversation", "system", "text"])
def test_tokens_are_those_of_trl(rows: list[dict[str, Any]], tokenizer: Any):
    assert assert_as_trl_or_as_asked(rows, tokenizer) >= 1


def test_no_token_reaches_across_the_boundary():
    """`the` + `y said` would be `they` …: the answer begins after the prompt as it is asked."""
    pair = tokenize_pair({"prompt": "on the", "chosen": " cat", "rejected": "y said"}, MERGING)
    assert pair["prompt_ids"] == prompt_ids("on the", MERGING)
    for side, text in (("chosen_ids", "on the cat"), ("rejected_ids", "on they said")):
        assert MERGING.decode(pair["prompt_ids"] + pair[side]) == f"<s>{text}</s>"


def test_transcripts_are_as_they_came():
    """`--use_chat_template false` gives prompt and answers as in the HH files."""
    row = {
        "prompt": conversation("a", "b", "c"),
        "chosen": conversation("", "d")[1:],
        "rejected": conversation("", "e")[1:],
    }
    rendered = render(row, use_chat_template=False)
    assert rendered["prompt"] == "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert (rendered["chosen"], rendered["rejected"]) == (" d", " e")


def test_text_becomes_a_conversation():
    rendered = render(TEXTS[0], use_chat_template=True)
    assert rendered["prompt"] == conversation("say the ")
    assert rendered["chosen"] == [{"role": "assistant", "content": "cat"}]
    assert render(TEXTS[0], use_chat_template=False) == TEXTS[0]
    assert render(ROWS[0], use_chat_template=True) == ROWS[0]


def test_a_model_without_a_chat_template_gets_the_plain_one():
    tokenizer = tiny.tokenizer(chat_template=None)
    assert ensure_chat_template(tokenizer)
    assert not ensure_chat_template(tokenizer)
    messages = [{"role": "system", "content": "Be kind."}, *conversation("a", "b", "c")]
    asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert asked == "Be kind.\n\nHuman: a\n\nAssistant: b</s>\n\nHuman: c\n\nAssistant:"
    pair = tokenize_pair(ROWS[0], tokenizer)
    assert tokenizer.decode(pair["chosen_ids"]) == " the cat sat</s>"


def length(prompt: Any, tokenizer: Any = BYTES) -> int:
    return len(prompt_ids(prompt, tokenizer))


def test_the_oldest_turns_go_first():
    prompt = conversation("one", "two", "three", "four", "five")
    assert trim_prompt(prompt, BYTES, length(prompt)) == prompt
    # One token too many costs the oldest question with its answer
    assert trim_prompt(prompt, BYTES, length(prompt) - 1) == conversation("three", "four", "five")
    assert trim_prompt(prompt, BYTES, length(prompt[2:])) == prompt[2:]
    assert trim_prompt(prompt, BYTES, length(prompt[2:]) - 1) == conversation("five")
    assert trim_prompt(prompt, BYTES, length(prompt[4:]) - 1) == conversation("ive")


def test_the_system_message_goes_last_but_for_the_question():
    system = {"role": "system", "content": "S"}
    prompt = [system, *conversation("one", "two", "three")]
    assert trim_prompt(prompt, BYTES, length(prompt) - 1) == [system, *conversation("three")]
    assert trim_prompt(prompt, BYTES, length([system, *conversation("three")]) - 1) == conversation("three")


def test_transcripts_lose_whole_turns():
    prompt = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant:"
    assert trim_prompt(prompt, BYTES, length(prompt)) == prompt
    assert trim_prompt(prompt, BYTES, length(prompt) - 1) == "\n\nHuman: three\n\nAssistant:"
    assert trim_prompt(prompt, BYTES, 14) == "ee\n\nAssistant:"


def test_a_character_is_not_cut_in_two():
    assert trim_prompt("日本", BYTES, 5) == "本"
    assert trim_prompt(conversation("日本"), BYTES, length(conversation("日本")) - 1) == conversation("本")


def test_what_is_left_of_a_cut_character_goes():
    """Like most real tokenizers this one has a token for U+FFFD, and no token for 語 as a whole."""
    assert length("語語", MERGING) == 1 + 6
    assert length("\ufffd", MERGING) == 1 + 1
    assert trim_prompt("語語", MERGING, 1 + 5) == "語"


def test_a_template_longer_than_the_limit_is_refused():
    with pytest.raises(UserError, match="--max_prompt_length 2: the chat template alone takes 3 tokens"):
        trim_prompt(conversation("abc"), BYTES, 2)


words = st.lists(
    st.sampled_from(["the cat", " sat", "they", "naïve", "日本", "語", "\n\nHuman:", "a", " "]), max_size=8
)
prompts = words.map("".join) | st.lists(words.map("".join), min_size=1, max_size=5).map(
    lambda texts: conversation(*texts[: len(texts) - (len(texts) + 1) % 2])
)


@settings(deadline=None)
@given(prompts, st.integers(20, 60), st.sampled_from([BYTES, MERGING]))
def test_a_trimmed_prompt_fits_and_is_the_end_of_the_prompt(prompt: Any, limit: int, tokenizer: Any):
    trimmed = trim_prompt(prompt, tokenizer, limit)
    assert length(trimmed, tokenizer) <= limit
    if isinstance(prompt, str):
        assert prompt.endswith(trimmed)
    else:
        assert trimmed[1:] == prompt[len(prompt) - len(trimmed) + 1 :]
        assert prompt[-len(trimmed)]["content"].endswith(trimmed[0]["content"])
    if length(prompt, tokenizer) <= limit:
        assert trimmed == prompt


def test_many_random_pairs_are_tokenized_as_trl_does():
    rng = random.Random(0)
    pieces = ["the", "y", " ", "cat", "naïve", "日", "\n\n", "</s>", "Human:", "."]

    def text() -> str:
        return "".join(rng.choices(pieces, k=rng.randint(1, 6)))

    rows = [{"prompt": text(), "chosen": text(), "rejected": text()} for _ in range(100)]
    assert 20 < assert_as_trl_or_as_asked(rows, MERGING) < 100


def test_ids_are_those_that_the_tokenizer_itself_gives():
    """Whatever it was asked before; and a class with an encoding of its own is asked itself."""
    closing = tiny.tokenizer()
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", closing.bos_token_id), ("</s>", closing.eos_token_id)]
    )

    class Own(type(closing)):  # type: ignore[misc]
        def _encode_plus(self, text: str, **keywords: Any) -> Any:
            return super()._encode_plus(text + "!", **keywords)

    own, splitting = tiny.tokenizer(), tiny.tokenizer()
    own.__class__ = Own
    splitting.split_special_tokens = True
    for tokenizer in (tiny.tokenizer(), merging(), closing, own, splitting):
        for text, special in itertools.product(("", "a cat", "</s><|user|>é ü\n", "x" * 500), (True, False)):
            tokenizer("cat", truncation=True, max_length=2, split_special_tokens=True)
            got = ids_of(text, tokenizer, special=special)
            assert got == tokenizer(text, add_special_tokens=special)["input_ids"], (text, special)
    assert ids_of("a", own, special=False) == tiny.tokenizer()("a!")["input_ids"]
