"""Examples for SFT: token ids, the labels that say which of them count in the loss, and packing."""

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from tandem.data.formats import TEXT
from tandem.data.kept import count_unrendered, refuse_none, tell_unrendered, warn_of_endless
from tandem.data.pairs import rendered
from tandem.data.prepare import Made
from tandem.data.rendering import keywords_of, templated
from tandem.data.rows import Row
from tandem.data.tokenized import check_rendered, closed, plain_ids, tokenize_pair
from tandem.data.tokens import ends, special_ids
from tandem.data.unrendered import left_out
from tandem.engine.layout import IGNORED_LABEL
from tandem.engine.pairs import completion_mask
from tandem.training.option_sets import SFTOptionSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ENDLESS, _LOST = "endless", "lost"

Example = dict[str, list[int]]
"""`input_ids`, and `labels`, which are `IGNORED_LABEL` at tokens that do not count in the loss."""


class ExampleMaker:
    """A `data.prepare.Maker` of examples of at most `max_length` tokens. Those without a token in the loss are left
    out."""

    what = "example"

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", run: SFTOptionSet) -> None:
        self._tokenizer, self._run = tokenizer, run
        self._longest = None if run.train.packing_strategy == "bfd_split" else run.text.limit
        self._specials = special_ids(tokenizer)

    def settings(self) -> Any:
        text, train = self._run.text, self._run.train
        own = [train.assistant_only_loss, train.completion_only_loss, self._longest]
        return [text.use_chat_template, text.max_prompt_length, *own]

    def make(self, row: Row, counts: Counter[str]) -> Made | None:
        unrendered: set[str] = set()
        example = _example(rendered(row, self._run.text, self._tokenizer), self._tokenizer, self._run, unrendered)
        count_unrendered(counts, unrendered)
        counts[_ENDLESS] += not ends(_trained(example), self._specials)
        cut = {name: ids[: self._longest] for name, ids in example.items()}
        if not _trained(cut):
            counts[_LOST] += 1
            return None
        return cut

    def tell(self, counts: Counter[str], total: int) -> None:
        tell_unrendered(counts, total, self.what)
        warn_of_endless(counts[_ENDLESS], total, self.what)
        why = "--max_length keeps none of their answer"
        refuse_none(counts[_LOST], total, self.what, why, self._run.text.limit)


def _trained(example: Example) -> list[int]:
    return [label for label in example["labels"] if label != IGNORED_LABEL]


def _example(row: Row, tokenizer: "PreTrainedTokenizerBase", run: SFTOptionSet, unrendered: set[str]) -> Example:
    train = run.train
    if row["format"] == TEXT:
        ids = list(tokenizer(closed(row["prompt"], tokenizer))["input_ids"])
        return {"input_ids": ids, "labels": ids}
    is_conversation = row.get("kind") == "conversation"
    if is_conversation and not train.assistant_only_loss:
        ids = _whole(row, tokenizer, unrendered)
        return {"input_ids": ids, "labels": ids}
    pair = tokenize_pair(row | {"rejected": row["chosen"]}, tokenizer, unrendered)
    ids = pair["prompt_ids"] + pair["chosen_ids"]
    if train.completion_only_loss is False and not is_conversation:
        return {"input_ids": ids, "labels": ids}
    mask = completion_mask(pair, "chosen")
    return {"input_ids": ids, "labels": [id if own else IGNORED_LABEL for id, own in zip(ids, mask, strict=True)]}


def _whole(row: Row, tokenizer: "PreTrainedTokenizerBase", unrendered: set[str]) -> list[int]:
    """A whole conversation as the template renders it; plain text gets an end-of-sequence token."""
    if isinstance(row["prompt"], str):
        return list(tokenizer(closed(row["prompt"] + row["chosen"], tokenizer))["input_ids"])
    text = templated(row["prompt"] + row["chosen"], tokenizer, keywords_of(row))
    check_rendered(row, "chosen", "", text, tokenizer)
    unrendered |= left_out(row, "chosen", text, str(tokenizer.chat_template))
    return plain_ids(text, tokenizer)


def packed(examples: Dataset, run: SFTOptionSet) -> Dataset:
    """The rows of a run: an example each, or with `packing` as many as `max_length` holds.

    Packed rows have `seq_lengths`. TRL's function fills them by best fit, in order of decreasing length (Fewer
    Truncations Improve Language Modeling, arXiv 2404.10830, section 3). The collator separates the examples again, and
    the engine forwards them side by side: no example attends to another.
    """
    if not run.train.packing:
        return examples
    from trl import pack_dataset  # not in Gaudi's TRL

    columns = examples.select_columns(["input_ids", "labels"])
    return pack_dataset(columns, run.text.limit, run.train.packing_strategy)


def untrained(example: Mapping[str, list[int]]) -> int:
    """How many tokens stand before the first that is trained."""
    return next(place for place, label in enumerate(example["labels"]) if label != IGNORED_LABEL)
