"""What is trained is what is asked, under the chat templates that TRL ships and short ones that behave like others."""

import datetime
import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from tandem.data.adapt import adapt_template, day_of_models
from tandem.data.rendering import TemplateFault
from tandem.data.texts import prompt_ids, render, tokenize_pair
from tandem.data.tokenized import tokenize_rows
from tandem.data.tokens import check_seen, see, special_ids
from tandem.errors import UserError
from tandem.models.load import load_tokenizer
from tandem.options.model import ModelOptions, TemplateOptions, TextOptions
from tandem.ranks import forget_told
from tests import tiny
from tests.data.test_texts import merging

TURN = "{% for m in messages %}"
SHORT = {
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}"
        "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
        + TURN
        + "{% if m['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'].strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "mistral v0.1": (
        "{{ bos_token }}" + TURN + "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "mistral v0.3": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
        "{% set messages = messages[1:] %}{% endif %}" + TURN + "{% if m['role'] == 'user' %}"
        "{% if loop.last and system is defined %}{{ '[INST] ' + system + '\n\n' + m['content'] + '[/INST]' }}"
        "{% else %}{{ '[INST] ' + m['content'] + '[/INST]' }}{% endif %}"
        "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "zephyr": (
        TURN + "{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "phi4": (
        TURN + "{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
    ),
    "no EOS": TURN + "{{ m['role'] | upper + ': ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    "no generation prompt": TURN
    + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}",
    "refuses system": "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}" + tiny.TEMPLATE,
    "drops system": TURN + "{% if m['role'] != 'system' %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    "keeps the last thought": TURN + "{{ '<|' + m['role'] + '|>' + m['content'].split('</think>')[-1] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}",
}
SHIPPED = {
    file.name.removesuffix(".jinja"): file.read_text()
    for file in sorted((resources.files("trl") / "chat_templates").iterdir(), key=lambda file: file.name)
    if file.name.endswith(".jinja")
}
TEMPLATES = SHORT | SHIPPED
# They cut every thought out of an answer that is asked for with one; or render parts of content only, for images
BYTES, MERGING = tiny.tokenizer(), merging()
NONE = (
    "keeps the last thought", "deepseek_r1_distill", "deepseekv3", "deepseekv3_training", "smolvlm", "smolvlm_training",
    "llava_next", "llava_next_training", "idefics3", "idefics3_training",
)  # fmt: skip


def turns(*texts: str) -> list[dict[str, Any]]:
    return [{"role": "assistant" if index % 2 else "user", "content": text} for index, text in enumerate(texts)]


def says(text: str, **parts: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text, **parts}]


SYSTEM = {"role": "system", "content": "Answer in French."}
CALL = {"type": "function", "function": {"name": "weather_of", "arguments": {"city": "Lima"}}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather_of",
            "description": "Tells it.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Which."}}},
        },
    }
]
PLAIN = {
    "prompt": turns("Which river?"),
    "chosen": says("The Nile."),
    "rejected": says("Inland."),
    "source": "f",
    "row": 3,
}
CASES: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "system": PLAIN | {"prompt": [SYSTEM, *turns("Which river?")]},
    "multi-turn": PLAIN | {"prompt": turns("Hello there.", "Good day.", "Which river?")},
    "tools": PLAIN | {"tools": TOOLS, "chosen": says("", tool_calls=[CALL])},
    "reasoning": PLAIN
    | {
        "chosen": says("The Nile.", reasoning_content="It is long."),
        "rejected": says("Inland.", reasoning_content="No idea."),
    },
    "thought in the text": PLAIN
    | {
        "chosen": says("<think>\nIt is long.\n</think>\n\nThe Nile."),
        "rejected": says("<think>\nNo idea.\n</think>\n\nInland."),
    },
    "white space": PLAIN | {"chosen": says("\n\nThe Nile."), "rejected": says("  Inland.")},
    "a user's turn inside": PLAIN | {"chosen": [*says("The Nile."), *turns("Another one?", "The Amazon.")]},
    "system and several turns": PLAIN | {"prompt": [SYSTEM, *turns("Hello there.", "Good day.", "Which river?")]},
    "a tool's result in the prompt": PLAIN
    | {
        "tools": TOOLS,
        "prompt": [*turns("How warm?"), *says("", tool_calls=[CALL]), {"role": "tool", "content": "21 degrees"}],
        "chosen": says("Warm."),
        "rejected": says("Cold."),
    },
    "a tool's result inside": PLAIN
    | {
        "tools": TOOLS,
        "chosen": [*says("", tool_calls=[CALL]), {"role": "tool", "content": "21 degrees"}, *says("Warm in Lima.")],
    },
    "reasoning in an earlier turn": PLAIN
    | {"prompt": [*turns("Hello there."), *says("Good day.", reasoning_content="A greeting."), *turns("Which one?")]},
    "reasoning, then a call": PLAIN
    | {"tools": TOOLS, "chosen": says("", reasoning_content="I should look.", tool_calls=[CALL])},
    "line ends first": PLAIN | {"chosen": says("\n\n\nThe Nile."), "rejected": says("\t Inland.\n\n")},
}


@pytest.fixture(scope="module", params=["bytes", "merging"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return tiny.tokenizer() if request.param == "bytes" else merging()


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_trained_is_what_is_asked_or_refused(name: str):
    for tokenizer in (BYTES, MERGING):
        tokenizer.chat_template = TEMPLATES[name]
        trained = sum(_is_trained(case, row, tokenizer) for case, row in CASES.items())
        assert trained or name in NONE, "no case is trained"


def _is_trained(case: str, row: dict[str, Any], tokenizer: Any) -> bool:
    try:
        pair = tokenize_pair(row, tokenizer)
    except TemplateFault as fault:
        assert str(fault).startswith(("the chat template ", "tokens reach over")), fault
        return False
    asked = prompt_ids(row["prompt"], tokenizer, {"tools": row.get("tools")})
    assert pair["prompt_ids"] == asked, case
    for side in ("chosen", "rejected"):
        ids = pair[f"{side}_ids"]
        whole = tokenizer.decode(asked + ids)
        own = pair.get(f"{side}_mask", [1] * len(ids))
        trained_text = tokenizer.decode([token for token, its in zip(ids, own, strict=True) if its])
        for message in row["prompt"]:
            assert message["content"].strip() in whole, case
            assert "Lima" in whole or "tool_calls" not in message, case
        for message in row[side]:
            is_own = message["role"] == "assistant"
            # Where the prompt already asks for a thought, its beginning is not the answer's own
            content = message["content"].strip().removeprefix("<think>\n")
            assert not content or (content in trained_text) == is_own, (case, trained_text)
            assert message.get("reasoning_content", "") in trained_text, case
            assert "Lima" in trained_text or "tool_calls" not in message, case
    return True


def fault(row: dict[str, Any], template: str, tokenizer: Any = None) -> str:
    tokenizer = tokenizer or tiny.tokenizer(template)
    with pytest.raises(UserError) as error:
        tokenize_rows([render(row, True)], tokenizer)
    return str(error.value)


def test_faults_name_file_row_and_remedy():
    refused, dropped, thought = (SHORT[name] for name in ("refuses system", "drops system", "keeps the last thought"))
    assert fault(CASES["system"], refused) == (
        "f row 3: the chat template refuses it: System role not supported; --system_prompt fold puts the system "
        "message into the first user turn, drop leaves it out"
    )
    assert fault(CASES["system"], dropped) == (
        "f row 3: the chat template leaves out the system message ('Answer in French.'); see --system_prompt fold or "
        "drop"
    )
    assert fault(CASES["plain"], thought).startswith(
        "f row 3: the chat template renders the prompt differently once an answer follows: alone it reads "
    )
    assert fault(CASES["system"], SHORT["mistral v0.3"]).endswith(
        "; put the system message into the first user turn with --system_prompt fold, or give a template that renders "
        "both alike with --chat_template"
    )
    assert fault(CASES["tools"], tiny.TEMPLATE) == (
        "f row 3: the chat template leaves out the tool call ('weather_of'); see --chat_template or --ignore_columns"
    )
    assert fault(CASES["reasoning"], tiny.TEMPLATE).startswith(
        "f row 3: the chat template leaves out the reasoning_content of chosen ('It is long.')"
    )
    with pytest.raises(UserError, match=r"f row 3: .* \(and so it is with 2 of 2 pairs\)"):
        tokenize_rows([CASES["system"]] * 2, tiny.tokenizer(refused))


def test_text_has_no_place_for_tools():
    with pytest.raises(TemplateFault, match="tools cannot be written as a transcript; leave out --use_chat_template f"):
        render(PLAIN | {"tools": TOOLS}, use_chat_template=False)


def test_others_turns_in_answers_and_what_is_left_out_are_told(capsys: pytest.CaptureFixture[str]):
    text = tiny.tokenizer(SHIPPED["qwen3_training"])
    forget_told()
    tokenize_rows([CASES["a user's turn inside"], CASES["plain"], CASES["reasoning in an earlier turn"]], text)
    assert capsys.readouterr().err == "1 answers of 3 pairs have turns of others inside, which are not trained\n"
    text = tiny.tokenizer(SHIPPED["qwen3"])
    tokenize_rows(
        [CASES["plain"] | {"chat_template_kwargs": {"mood": "calm"}}, CASES["reasoning in an earlier turn"]], text
    )
    told = capsys.readouterr().err
    assert told == (
        "the chat template leaves out, of 2 pairs: chat_template_kwargs.mood in 1, .reasoning_content in 1\n"
    )


@pytest.mark.parametrize("use_chat_template", [True, False])
def test_only_the_answers_own_turns_are_trained(use_chat_template: bool, tokenizer: Any):
    tokenizer.chat_template = tiny.TEMPLATE
    row = render(CASES["a user's turn inside"], use_chat_template)
    pair = tokenize_pair(row, tokenizer)
    assert pair["rejected_mask"] == [1] * len(pair["rejected_ids"])

    def text(own: int) -> str:
        masked = zip(pair["chosen_ids"], pair["chosen_mask"], strict=True)
        return str(tokenizer.decode([token for token, mask in masked if mask == own]))

    if use_chat_template:
        expected = "The Nile.</s>The Amazon.</s>", "<|user|>Another one?</s><|assistant|>"
    else:
        expected = " The Nile. The Amazon.</s>", "\n\nHuman: Another one?\n\nAssistant:"
    assert (text(1), text(0)) == expected
    [seen] = see([CASES["a user's turn inside"]], tokenizer, TextOptions(use_chat_template))
    assert not isinstance(seen, str) and seen.chosen_mask == pair["chosen_mask"]


def test_tools_and_keywords_of_a_row_reach_the_template():
    template = "{{ tools | length if tools else 0 }}{{ mood | default('none') }}" + tiny.TEMPLATE
    row = PLAIN | {"chat_template_kwargs": {"mood": "calm"}}
    pair = tokenize_pair(row, text := tiny.tokenizer(template))
    assert text.decode(pair["prompt_ids"]) == "0calm<|user|>Which river?</s><|assistant|>"
    assert fault(row | {"tools": TOOLS}, template).startswith(
        "f row 3: the chat template leaves out the tool ('weather_"
    )


def test_merges_and_answers_that_become_the_same_are_findings():
    text = merging()
    text.chat_template = TURN + "{{ m['content'] }}{% endfor %}"
    row = PLAIN | {"prompt": turns("on the"), "chosen": says("y said"), "rejected": says(" cat")}
    [seen] = see([row], text, TextOptions())
    assert not isinstance(seen, str)
    found = check_seen(seen, text, TextOptions(), special_ids(text))
    assert found["boundary_merges"].startswith("the prompt ends ")
    cut = TURN + "{{ '<|' + m['role'] + '|>' + m['content'].split('|')[-1] + eos_token }}{% endfor %}"
    row = PLAIN | {"chosen": says("long|same"), "rejected": says("short|same")}
    [seen] = see([row], text := tiny.tokenizer(cut), TextOptions())
    assert not isinstance(seen, str)
    found = check_seen(seen, text, TextOptions(), special_ids(text))
    assert found["identical_tokens"] == "6 tokens, '<|assistant|>same</s>'" and "template_drops" in found


# Options


def adapted(template: str, day: str | None = None, **options: Any) -> Any:
    text = tiny.tokenizer(template)
    adapt_template(text, TemplateOptions(**options), day)
    return text


def asked(text: Any, *messages: dict[str, Any], **keywords: Any) -> str:
    rendered: Any = text.apply_chat_template(list(messages), tokenize=False, **keywords)
    return str(rendered)


def test_system_messages_are_folded_or_dropped(tmp_path: Path):
    strict = SHORT["refuses system"]
    user = {"role": "user", "content": "Q?"}
    folded, dropped = (adapted(strict, system_prompt=how) for how in ("fold", "drop"))
    assert asked(folded, SYSTEM, user) == "<|user|>Answer in French.\n\nQ?</s>"
    assert asked(dropped, SYSTEM, user) == "<|user|>Q?</s>"
    assert asked(folded, user) == asked(dropped, user) == "<|user|>Q?</s>"
    # Saved with the tokenizer, and the same when it is asked for again
    folded.save_pretrained(tmp_path)
    for options in (None, TemplateOptions(system_prompt="fold")):
        again = load_tokenizer(ModelOptions(model_name_or_path=str(tmp_path)), options)
        assert again.chat_template == folded.chat_template
    pair = tokenize_pair(CASES["system"], folded)
    assert folded.decode(pair["prompt_ids"]) == "<|user|>Answer in French.\n\nWhich river?</s><|assistant|>"
    assert (
        dropped.decode(tokenize_pair(CASES["system"], dropped)["prompt_ids"]) == "<|user|>Which river?</s><|assistant|>"
    )


def test_what_the_template_is_told(tmp_path: Path):
    template = (
        "{{ 'quiet' if think is defined and not think else 'loud' }}{{ n | tojson if n is defined }}" + tiny.TEMPLATE
    )
    text = adapted(template, chat_template_kwargs='{"think": false, "n": {"a": [null, "b"]}}')
    user = {"role": "user", "content": "Q?"}
    assert asked(text, user) == 'quiet{"a": [null, "b"]}<|user|>Q?</s>'
    assert asked(text, user, think=True).startswith("loud")  # a row's own goes before
    for given in ("think", "[1]"):
        with pytest.raises(UserError, match="--chat_template_kwargs must be a JSON object, not"):
            TemplateOptions(chat_template_kwargs=given)
    with pytest.raises(UserError, match="messages is no keyword that a template can be told"):
        adapted(template, chat_template_kwargs='{"messages": []}')


def test_a_template_of_ones_own(tmp_path: Path):
    file = tmp_path / "mine.jinja"
    file.write_text(TURN + "{{ m['content'] }}!{% endfor %}")
    assert asked(adapted(tiny.TEMPLATE, chat_template=str(file)), {"role": "user", "content": "Q?"}) == "Q?!"
    with pytest.raises(UserError, match="--chat_template nowhere: no such file"):
        TemplateOptions(chat_template="nowhere")


@pytest.mark.parametrize("name", [name for name, text in TEMPLATES.items() if "strftime_now" in text])
def test_the_day_is_the_runs_first(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Tomorrow":
            return cls(2033, 3, 4)

    text = adapted(TEMPLATES[name], day="2026-11-29")
    before = asked(text, *turns("Q?"))
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    assert asked(text, *turns("Q?")) == before
    assert "2026" in before and "2033" in asked(tiny.tokenizer(TEMPLATES[name]), *turns("Q?"))
    text.save_pretrained(tmp_path)
    assert day_of_models(["nowhere", str(tmp_path)]) == "2026-11-29"


def test_options_without_a_template_have_no_effect():
    from tandem.options.parsing import parse

    argv = ["--use_chat_template", "false", "--system_prompt", "fold", "--model_name_or_path", "m"]
    with pytest.raises(UserError, match="--system_prompt has no effect with --use_chat_template false"):
        parse(argv, (ModelOptions, TextOptions), prog="x", description="")
    assert json.loads("{}") == TemplateOptions().keywords
