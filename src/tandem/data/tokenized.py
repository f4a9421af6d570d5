"""Canonical rows → token ids for training and scoring. Each answer follows exactly the prompt that a model is asked."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from tandem.data.messages import Message
from tandem.data.rendering import TemplateFault, keywords_of, templated
from tandem.data.rows import Row, listed
from tandem.data.unrendered import left_out, lost_parts
from tandem.errors import UserError
from tandem.ranks import tell_once

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = TypeVar("Item")
Made = TypeVar("Made")

SIDES = ("chosen", "rejected")
MASKS = tuple(f"{side}_mask" for side in SIDES)
_ANCHOR = "\n"  # put before a text so that a tokenizer adds no space in front of it
_NO_THOUGHT = """ask for no thought with --chat_template_kwargs '{"enable_thinking": false}', or """
_FOLDED = "put the system message into the first user turn with --system_prompt fold, or "
# Methods of a tokenizer that encode, and where those of the plain classes stand in transformers 5 and 4
_ENCODING = ("__call__", "_encode_plus")
_PLAIN = (
    ("tokenization_utils_base", "tokenization_utils_tokenizers"),
    ("tokenization_utils_base", "tokenization_utils_fast"),
)
_NO_OTHER = "give a template that renders both alike with --chat_template"


@dataclass(frozen=True)
class Joint:
    """A prompt and what follows it as text, and their ids tokenized apart and together."""

    prompt: str
    whole: str
    prompt_ids: list[int]
    whole_ids: list[int]

    @property
    def is_prefix(self) -> bool:
        """Whether the prompt's tokens are the first of both together."""
        return self.whole_ids[: len(self.prompt_ids)] == self.prompt_ids

    def answer_ids(self, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
        """Ids of what follows the prompt's own ids; tokens never reach over the boundary.

        Raises:
            TemplateFault: the tokenizer cannot go on from there.
        """
        if self.is_prefix:
            return self.whole_ids[len(self.prompt_ids) :]
        rest = self.whole[len(self.prompt) :]
        wanted = tokenizer.decode(self.whole_ids)
        before = plain_ids(_ANCHOR, tokenizer)
        for ids, skipped in ((plain_ids(rest, tokenizer), 0), (plain_ids(_ANCHOR + rest, tokenizer), len(before))):
            if ids[:skipped] == before[:skipped] and tokenizer.decode(self.prompt_ids + ids[skipped:]) == wanted:
                return ids[skipped:]
        raise TemplateFault(f"tokens reach over the end of the prompt ({self.prompt[-20:]!r})", _NO_OTHER)

    def merged(self, tokenizer: "PreTrainedTokenizerBase") -> str | None:
        """The tokens at the boundary, where together they are others than apart."""
        if self.is_prefix:
            return None
        shared = common_length(self.prompt_ids, self.whole_ids)
        apart = tokenizer.convert_ids_to_tokens(self.prompt_ids[shared:])
        together = tokenizer.convert_ids_to_tokens(self.whole_ids[shared : shared + 1])
        return f"the prompt ends {' '.join(map(str, apart))!r}; with the answer it would be {together[0]!r}"


def common_length(left: Sequence[Any], right: Sequence[Any]) -> int:
    """How long a beginning two sequences share."""
    differ = (index for index, (one, other) in enumerate(zip(left, right, strict=False)) if one != other)
    return next(differ, min(len(left), len(right)))


def ids_of(text: str, tokenizer: "PreTrainedTokenizerBase", *, special: bool) -> list[int]:
    """`tokenizer(text, add_special_tokens=special)["input_ids"]`, without masks and offsets that nobody reads."""
    if not _encodes_plainly(type(tokenizer)) or tokenizer.split_special_tokens:
        return list(tokenizer(text, add_special_tokens=special)["input_ids"])
    backend: Any = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = False
    return list(backend.encode_batch_fast([text], add_special_tokens=special)[0].ids)


def _encodes_plainly(kind: type) -> bool:
    """Whether a class of tokenizers hands a text to `tokenizers` as it is: none of its own methods stands between."""
    made_by = [getattr(getattr(kind, name, None), "__module__", None) for name in _ENCODING]
    return any(made_by == [f"transformers.{base}" for base in bases] for bases in _PLAIN)


def plain_ids(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Ids of a text, no special tokens added."""
    return ids_of(text, tokenizer, special=False)


def text_ids(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Ids of a prompt of plain text: what the tokenizer puts before a text, and not the end it may put after it."""
    ids = ids_of(text, tokenizer, special=True)
    end = tokenizer.eos_token_id
    return ids[:-1] if ids and ids[-1] == end and not text.endswith(tokenizer.eos_token or "\0") else ids


def closed(completion: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """A completion of plain text with the end-of-sequence token, if the tokenizer has one."""
    end = tokenizer.eos_token or ""
    return completion if completion.endswith(end) else completion + end


def pair_texts(row: Row, tokenizer: "PreTrainedTokenizerBase") -> tuple[str, str, str]:
    """The prompt of a rendered row alone and with each answer, as text that is tokenized."""
    if isinstance(row["prompt"], str):
        chosen, rejected = (row["prompt"] + closed(row[side], tokenizer) for side in SIDES)
        return row["prompt"], chosen, rejected
    keywords = keywords_of(row)
    chosen, rejected = (templated(row["prompt"] + row[side], tokenizer, keywords) for side in SIDES)
    return templated(row["prompt"], tokenizer, keywords, asks=True), chosen, rejected


def tokenize_pair(
    row: Row, tokenizer: "PreTrainedTokenizerBase", unrendered: set[str] | None = None
) -> dict[str, list[int]]:
    """`prompt_ids`, `chosen_ids` and `rejected_ids` of a rendered row.

    The prompt's ids are those that the model is asked with, and the answers' those that follow: as TRL 1.16's
    DPOTrainer makes them wherever it does not warn. Plain text gets the end-of-sequence token, a template brings its
    own. Where an answer has turns of others inside, `chosen_mask` and `rejected_mask` are 1 at the answer's own tokens.
    Names of what the template leaves out on purpose are added to `unrendered`.

    Raises:
        TemplateFault: the template refuses the row, leaves out a part of it, or renders the prompt otherwise once the
            answer follows.
    """
    prompt_text, *wholes = pair_texts(row, tokenizer)
    is_text = isinstance(row["prompt"], str)
    prompt = text_ids(prompt_text, tokenizer) if is_text else plain_ids(prompt_text, tokenizer)
    pair = {"prompt_ids": prompt}
    for side, whole in zip(SIDES, wholes, strict=True):
        check_rendered(row, side, prompt_text, whole, tokenizer)
        if unrendered is not None:
            unrendered |= left_out(row, side, whole, _template(tokenizer))
        ids = ids_of(whole, tokenizer, special=is_text)
        joint = Joint(prompt_text, whole, prompt, ids)
        pair[f"{side}_ids"] = joint.answer_ids(tokenizer)
        if len(row.get(f"{side}_turns") or (() if is_text else row[side])) > 1:
            pair[f"{side}_mask"] = own_tokens(row, side, joint, pair[f"{side}_ids"], tokenizer)
    fill_masks([pair])
    return pair


def fill_masks(pairs: Sequence[dict[str, Any]]) -> None:
    """Give both answers of all tokenized pairs a mask if any answer has one; those that had none are trained whole."""
    if any(mask in pair for pair in pairs for mask in MASKS):
        for pair in pairs:
            for side in SIDES:
                pair.setdefault(f"{side}_mask", [1] * len(pair[f"{side}_ids"]))


def check_rendered(row: Row, side: str, prompt: str, whole: str, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a rendered answer that does not follow the prompt as it is asked, or lacks a part of the row.

    Raises:
        TemplateFault: saying which.
    """
    if not whole.startswith(prompt):
        shared = common_length(whole, prompt)
        alone, before = prompt[max(0, shared - 20) :][:60], whole[max(0, shared - 20) :][:60]
        raise TemplateFault(
            f"the chat template renders the prompt differently once an answer follows: alone it reads {alone!r}, "
            f"before {side} {before!r}",
            (_NO_THOUGHT if "enable_thinking" in _template(tokenizer) else "")
            + (_FOLDED if not isinstance(row["prompt"], str) and row["prompt"][0]["role"] == "system" else "")
            + _NO_OTHER,
        )
    if not isinstance(row["prompt"], str):
        _refuse_lost(lost_parts(row, side, whole, _template(tokenizer)))


def check_asked(row: Row, text: str, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a rendered prompt that lacks a part of `row`, which has `prompt` and perhaps `tools`.

    Raises:
        TemplateFault: saying which.
    """
    _refuse_lost(lost_parts(row | {"answer": []}, "answer", text, _template(tokenizer)))


def _refuse_lost(parts: Iterator[str]) -> None:
    if (lost := next(parts, None)) is not None:
        remedy = "--chat_template or --ignore_columns"
        if lost.startswith("the system"):
            remedy = "--system_prompt fold or drop"
        raise TemplateFault(f"the chat template leaves out {lost}", f"see {remedy}")


def _template(tokenizer: "PreTrainedTokenizerBase") -> str:
    return str(tokenizer.chat_template)


def own_tokens(
    row: Row, side: str, joint: Joint, answer_ids: list[int], tokenizer: "PreTrainedTokenizerBase"
) -> list[int]:
    """1 at the tokens of an answer that the model writes itself, 0 at those of a user's turn or a tool's result in it.

    Raises:
        TemplateFault: the template renders a turn otherwise once others follow.
    """
    if isinstance(row["prompt"], str):
        start = len(joint.prompt)
        spans = [(start + left, start + right) for left, right in row[f"{side}_turns"]]
        spans[-1] = (spans[-1][0], len(joint.whole))  # with the end-of-sequence token
    else:
        spans = _own_spans(row, side, joint, tokenizer)
    index = _token_index(joint, answer_ids, tokenizer, add_special_tokens=isinstance(row["prompt"], str))
    mask = [0] * len(answer_ids)
    for start, end in spans:
        left, right = index(start), index(end)
        mask[left:right] = [1] * (right - left)
    return mask


def _own_spans(row: Row, side: str, joint: Joint, tokenizer: "PreTrainedTokenizerBase") -> list[tuple[int, int]]:
    """Where in the whole text the assistant's turns of an answer stand, from what asks for them to their end."""
    keywords, spans = keywords_of(row), []
    messages: list[Message] = row["prompt"]
    for number, turn in enumerate(row[side]):
        if turn["role"] == "assistant":
            before = templated([*messages, *row[side][:number]], tokenizer, keywords, asks=True)
            after = templated([*messages, *row[side][: number + 1]], tokenizer, keywords)
            end = common_length(after, joint.whole)
            content = turn["content"].strip()
            if not joint.whole.startswith(before) or content not in joint.whole[len(before) : end]:
                raise TemplateFault(
                    f"the chat template renders turn {number + 1} of {side} differently once others follow", _NO_OTHER
                )
            spans.append((len(before), end))
    return spans


def _token_index(
    joint: Joint, answer_ids: list[int], tokenizer: "PreTrainedTokenizerBase", *, add_special_tokens: bool
) -> Callable[[int], int]:
    """From a place in the whole text to the first token of the answer that begins there or later."""

    def index(place: int) -> int:
        if place >= len(joint.whole):
            return len(answer_ids)
        if not joint.is_prefix:
            start = len(joint.prompt)
            return common_length(plain_ids(joint.whole[start:place], tokenizer), answer_ids)
        ids: Any = tokenizer(joint.whole[:place], add_special_tokens=add_special_tokens)["input_ids"]
        return max(0, common_length(list(ids), joint.whole_ids) - len(joint.prompt_ids))

    return index


def tokenize_rows(rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase") -> list[dict[str, list[int]]]:
    """`tokenize_pair` of each; all have masks where one has. A line on stderr names what the template leaves out.

    Raises:
        UserError: the template's fault with the first row that has one, and how many have.
    """
    counts: Counter[str] = Counter()

    def tokenized(row: Row) -> dict[str, list[int]]:
        unrendered: set[str] = set()
        pair = tokenize_pair(row, tokenizer, unrendered)
        counts.update(unrendered)
        return pair

    pairs = all_placed(rows, tokenized)
    tell_left_out(counts, len(pairs), "pairs")
    if any(MASKS[0] in pair for pair in pairs):
        tell_inside(sum(not all(pair[mask]) for pair in pairs for mask in MASKS if mask in pair), len(pairs))
        fill_masks(pairs)
    return pairs


def tell_inside(inside: int, total: int) -> None:
    """Say once how many answers of `total` pairs have turns of others inside."""
    tell_once(f"{inside} answers of {total} pairs have turns of others inside, which are not trained")


def tell_left_out(counts: Counter[str], total: int, what: str) -> None:
    """Say once what the chat template leaves out (`unrendered.left_out`), and of how many of `total`."""
    if counts:
        names = listed([f"{name} in {count}" for name, count in counts.most_common()])
        tell_once(f"the chat template leaves out, of {total} {what}: {names}")


def token_hash(splits: Mapping[str, Iterable[Mapping[str, Any]]]) -> str:
    """SHA-256 of the token ids, masks, labels and numbers of tokenized data, of one split after the other."""
    digest = hashlib.sha256()
    for name in sorted(splits):
        for row in splits[name]:
            lists = [(column, row[column]) for column in sorted(row) if isinstance(row[column], list | float | int)]
            digest.update(json.dumps([name, lists], separators=(",", ":")).encode())
    return digest.hexdigest()


def all_placed(rows: Sequence[Row], make: Callable[[Row], Made]) -> list[Made]:
    """What `make` makes of each row.

    Raises:
        UserError: a `TemplateFault`, with file and row of the first, and how many rows have one.
    """
    places = [f"{row['source']} row {row['row']}" if "source" in row else "" for row in rows]
    return all_made(rows, places, make, "pairs")


def all_made(items: Sequence[Item], places: Sequence[str], make: Callable[[Item], Made], what: str) -> list[Made]:
    """What `make` makes of each of `items`, which stand at `places`.

    Raises:
        UserError: a `TemplateFault`, with the place of the first, and how many of `what` have one.
    """
    made, faults = [], []
    for item, place in zip(items, places, strict=True):
        try:
            made.append(make(item))
        except TemplateFault as fault:
            faults.append(f"{place}: {fault}" if place else str(fault))
    refuse_faults(faults, len(items), what)
    return made


def refuse_faults(faults: Sequence[str], total: int, what: str) -> None:
    """Refuse rows with faults, of `total`.

    Raises:
        UserError: the first, and how many there are.
    """
    if faults:
        count = f" (and so it is with {len(faults)} of {total} {what})" if len(faults) > 1 else ""
        raise UserError(faults[0] + count)
