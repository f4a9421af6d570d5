"""The token that ends an assistant's turn: the one that the chat template writes after an answer. It need not be the
tokenizer's end-of-sequence token.

A base model with a ChatML template often has `<|endoftext|>` as its end of sequence and `<|im_end|>` after turns. A
generation that stops only at the first lets every answer run on into further turns.
"""

from typing import TYPE_CHECKING

from tandem.data.rendering import TemplateFault, templated

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "\ue000"  # private use: in no template


def turn_end(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The token with which the chat template ends an answer, as it renders one.

    None where there is no template, or none such token: the template ends an answer with words, or not at all.
    """
    if tokenizer.chat_template is None:
        return None
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": f"{_MARK}Hello{_MARK}"}]
    try:
        after = templated(turns, tokenizer).rpartition(_MARK)[2].lstrip()
    except TemplateFault:
        return None
    known = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
    known |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    found = [text for text in known if text.strip() and after.startswith(text.strip())]
    return known[max(found, key=len)] if found else None


def stop_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokens that end an answer by the tokenizer and its chat template, ascending."""
    return sorted({end for end in (tokenizer.eos_token_id, turn_end(tokenizer)) if end is not None})


def named(tokenizer: "PreTrainedTokenizerBase") -> str:
    """What ends an answer, in words."""
    ends = tokenizer.convert_ids_to_tokens(stop_tokens(tokenizer))
    return " or ".join(map(str, ends)) or "no token: every answer is as long as it may be"


def differing(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, str] | None:
    """The token that ends a turn and the tokenizer's end of sequence, where they are not the same."""
    end = turn_end(tokenizer)
    if end is None or end == tokenizer.eos_token_id:
        return None
    return str(tokenizer.convert_ids_to_tokens(end)), str(tokenizer.eos_token)
