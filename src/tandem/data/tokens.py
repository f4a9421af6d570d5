"""Pairs as the model sees them: rendered, tokenized in batches, and what a template or a length limit does to them."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tandem.data.formats import Message, Row
from tandem.data.rendering import TemplateFault, keywords_of, templated
from tandem.data.texts import render, trim_prompt
from tandem.data.tokenized import Joint, common_length, own_tokens, pair_texts, text_ids
from tandem.data.unrendered import left_out, lost_parts
from tandem.options.model import TextOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int, str]  # start, end, role

_END = 3  # an answer's last tokens, among which its end-of-turn token is: some templates put a line break after it


@dataclass(frozen=True)
class Seen:
    """A pair as it is trained: `row` rendered and its prompt trimmed, the texts that are tokenized, the token ids.

    `prompt` is the rendered prompt alone, `chosen` and `rejected` the prompt with each answer. The ids are
    `tokenize_pair`'s: prompt and answers apart, nothing cut at `max_length` yet. `merged` says which tokens at the end
    of the prompt would be others together with an answer. A mask is 0 at the tokens of others' turns in an answer; None
    if all are trained.
    """

    row: Row
    prompt: str
    chosen: str
    rejected: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    is_trimmed: bool
    merged: str | None = None
    chosen_mask: list[int] | None = None
    rejected_mask: list[int] | None = None

    @property
    def sides(self) -> tuple[tuple[str, str, list[int]], ...]:
        """Name, text and ids of each answer."""
        return (("chosen", self.chosen, self.chosen_ids), ("rejected", self.rejected, self.rejected_ids))

    def room(self, text: TextOptions) -> int:
        """Tokens of an answer that `max_length` leaves."""
        return max(0, text.limit - len(self.prompt_ids))

    def first_difference(self) -> int | None:
        """Index of the first token in which the answers differ; None if they are the same tokens."""
        if self.chosen_ids == self.rejected_ids:
            return None
        return common_length(self.chosen_ids, self.rejected_ids)


def see(rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", text: TextOptions) -> list[Seen | str]:
    """Each canonical row as the model sees it, or what the chat template says in refusing it."""
    found: list[Row | str] = [_ready(row, tokenizer, text) for row in rows]
    ready = [row for row in found if not isinstance(row, str)]
    seen = iter(_see(ready, tokenizer))
    return [row if isinstance(row, str) else next(seen) for row in found]


def _ready(row: Row, tokenizer: "PreTrainedTokenizerBase", text: TextOptions) -> Row | str:
    """A rendered row, its prompt trimmed, with its texts under `texts`; or what the template says in refusing it."""
    limit = text.max_prompt_length
    try:
        row = render(row, text.use_chat_template)
        prompt = row["prompt"]
        if limit is not None:
            row = row | {"prompt": trim_prompt(prompt, tokenizer, limit, keywords_of(row))}
        return row | {"is_trimmed": row["prompt"] != prompt, "texts": pair_texts(row, tokenizer)}
    except TemplateFault as fault:
        return fault.said.removeprefix("the chat template refuses it: ")


def _see(rows: list[Row], tokenizer: "PreTrainedTokenizerBase") -> Iterator[Seen | str]:
    if not rows:
        return
    is_text = isinstance(rows[0]["prompt"], str)
    ids = _encode([part for row in rows for part in row["texts"]], tokenizer, is_text)
    for number, row in enumerate(rows):
        prompt_text, *wholes = row["texts"]
        prompt, *whole_ids = ids[3 * number : 3 * number + 3]
        if is_text:
            prompt = text_ids(prompt_text, tokenizer)
        joints = [Joint(prompt_text, whole, prompt, ids) for whole, ids in zip(wholes, whole_ids, strict=True)]
        try:
            yield _seen(row, joints, tokenizer)
        except TemplateFault as fault:
            yield fault.said


def _seen(row: Row, joints: list[Joint], tokenizer: "PreTrainedTokenizerBase") -> Seen:
    prompt, merged, masks = joints[0].prompt_ids, None, []
    if all(joint.whole.startswith(joint.prompt) for joint in joints):
        answers = [joint.answer_ids(tokenizer) for joint in joints]
        merged = next((found for joint in joints if (found := joint.merged(tokenizer))), None)
        for side, joint, ids in zip(("chosen", "rejected"), joints, answers, strict=True):
            turns = row.get(f"{side}_turns") or ([] if isinstance(row["prompt"], str) else row[side])
            masks.append(own_tokens(row, side, joint, ids, tokenizer) if len(turns) > 1 else None)
    else:  # training refuses it; what is shown is where they part
        shared = min(common_length(prompt, joint.whole_ids) for joint in joints)
        prompt, answers = prompt[:shared], [joint.whole_ids[shared:] for joint in joints]
        masks = [None, None]
    prompt_text, chosen, rejected = row.pop("texts")
    is_trimmed = row.pop("is_trimmed")
    return Seen(row, prompt_text, chosen, rejected, prompt, answers[0], answers[1], is_trimmed, merged, *masks)


def _encode(texts: list[str], tokenizer: "PreTrainedTokenizerBase", add_special_tokens: bool) -> list[list[int]]:
    if not tokenizer.is_fast:
        encoded: Any = tokenizer(texts, add_special_tokens=add_special_tokens)
        return [list(ids) for ids in encoded["input_ids"]]
    # Not tokenizer(texts), which spends twice the time on masks and offsets nobody reads
    backend: Any = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]


def special_ids(tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Ids of the tokens that no plain text gives."""
    added = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def ends(ids: Sequence[int], specials: frozenset[int]) -> bool:
    """Whether a special token ends an answer, so that a model learns where to stop."""
    return not specials.isdisjoint(ids[-_END:])


def special_texts(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    """Finds what the tokenizer would read as one of its special tokens."""
    names = sorted(map(str, tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer)))), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or r"(?!)")


def check_seen(
    seen: Seen, tokenizer: "PreTrainedTokenizerBase", text: TextOptions, specials: frozenset[int]
) -> dict[str, str]:
    """Findings of one pair as it is trained: name → what was found. `specials` are the tokenizer's `special_ids`."""
    found = _check_lengths(seen, text) | _check_template(seen, tokenizer)
    for side, whole, ids in seen.sides:
        if not ends(ids, specials):
            found.setdefault("template_no_end", f"{side} ends {whole[-60:]!r}")
        if len(ids) > 1 and ids[-1] == ids[-2] and ids[-1] in specials:
            found.setdefault("closed_twice", f"{side} ends {whole[-60:]!r}, and in tokens {ids[-3:]}")
        if sum(id not in specials for id in ids) == 1:
            found.setdefault("single_token", side)
        if not isinstance(seen.row["prompt"], str) and "template_prompt_differs" not in found:
            for lost in lost_parts(seen.row, side, whole, str(tokenizer.chat_template)):
                found.setdefault("template_drops", lost)
            if names := left_out(seen.row, side, whole, str(tokenizer.chat_template)):
                found.setdefault("template_leaves_out", ", ".join(sorted(names)))
    if seen.merged:
        found["boundary_merges"] = seen.merged
    if seen.chosen_ids == seen.rejected_ids and seen.row["chosen"] != seen.row["rejected"]:
        found["identical_tokens"] = f"{len(seen.chosen_ids)} tokens, {seen.chosen[len(seen.prompt) :][:60]!r}"
    return found


def _check_lengths(seen: Seen, text: TextOptions) -> dict[str, str]:
    found = {}
    room = seen.room(text)
    prompt, chosen, rejected = len(seen.prompt_ids), len(seen.chosen_ids), len(seen.rejected_ids)
    if seen.is_trimmed:
        found["prompt_cut"] = f"cut to {prompt} tokens"
    if max(chosen, rejected) > room:
        found["answer_cut"] = f"prompt {prompt}, chosen {chosen}, rejected {rejected} tokens"
        if room == 0:
            found["answer_lost"] = f"prompt {prompt} tokens"
        elif seen.chosen_ids[:room] == seen.rejected_ids[:room] and seen.chosen_ids != seen.rejected_ids:
            found["difference_cut"] = f"the first {room} tokens of both answers are the same"
    return found


def _check_template(seen: Seen, tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    """What the template makes of the prompt when an answer follows."""
    for side, whole, _ in seen.sides:
        if whole.startswith(seen.prompt):
            continue
        shared = common_length(whole, seen.prompt)
        alone, before = seen.prompt[max(0, shared - 20) :][:80], whole[max(0, shared - 20) :][:80]
        found = {"template_prompt_differs": f"alone it reads {alone!r}, before {side} it reads {before!r}"}
        spans = role_spans(whole, seen.row["prompt"] + seen.row[side], tokenizer)
        turns = [span for span in spans[: len(seen.row["prompt"])] if span[2] == "user"]
        if turns and turns[-1][1] > shared:
            found["template_trains_user"] = f"trained with {side}: {whole[shared : turns[-1][1]][:80]!r}"
        return found
    return {}


def role_spans(text: str, messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase") -> list[Span]:
    """Where in their rendered text the messages stand; one that the template has rewritten is left out.

    Rendering marks in place of the words gives what the template puts between them, so that a word is not found in
    the name of a role or of a special token.
    """
    between = _between(messages, tokenizer)
    spans, cursor = [], 0
    for index, message in enumerate(messages):
        contents = (message["content"], message["content"].strip())
        if between is not None and text.startswith(between[index], cursor):
            start = cursor + len(between[index])
            content = next((each for each in contents if text.startswith(each + between[index + 1], start)), None)
        else:
            content = None
        if content is None:
            content = contents[1]
            start = text.find(content, cursor)
        if start >= 0:
            cursor = start + len(content)
            spans.append((start, cursor, message["role"]))
    return spans


def _between(messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase") -> list[str] | None:
    """What the chat template puts before, between and after the words of `messages`; None if it changes any words."""
    mark = "\ue000"  # private use: in no template
    marked = [{**message, "content": f"{mark}{index}{mark}"} for index, message in enumerate(messages)]
    try:
        rendered = templated(marked, tokenizer)
    except TemplateFault:
        return None
    pieces = rendered.split(mark)
    numbers = [str(index) for index in range(len(messages))]
    return pieces[::2] if pieces[1::2] == numbers else None
