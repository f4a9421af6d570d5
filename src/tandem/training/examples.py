"""Rows as SFT trains them: token ids, which of them count in the loss, and several examples in one row."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from datasets import Dataset

from tandem.data.formats import TEXT
from tandem.data.rendering import keywords_of, templated
from tandem.data.rows import Row
from tandem.data.tokenized import all_placed, check_rendered, closed, plain_ids, tell_left_out, tokenize_pair
from tandem.data.unrendered import left_out
from tandem.engine.layout import IGNORED_LABEL
from tandem.engine.pairs import completion_mask
from tandem.training.kept import kept, warn_of_endless
from tandem.training.option_sets import SFTOptionSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Example = dict[str, list[int]]
"""`input_ids`, and `labels`, which are `IGNORED_LABEL` at what is not trained."""


def tokenize_examples(rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", run: SFTOptionSet) -> Dataset:
    """Rendered rows as examples of at most `max_length` tokens; those of which nothing would be trained are left out.

    Raises:
        UserError: the template's fault with a row, or no example left.
    """
    longest = None if run.train.packing_strategy == "bfd_split" else run.text.limit
    counts: Counter[str] = Counter()

    def example(row: Row) -> Example:
        unrendered: set[str] = set()
        made = _example(row, tokenizer, run, unrendered)
        counts.update(unrendered)
        return made

    examples = all_placed(rows, example)
    tell_left_out(counts, len(examples), "examples")
    warn_of_endless(([_trained(example)] for example in examples), tokenizer, "example")
    cut = [{name: ids[:longest] for name, ids in example.items()} for example in examples]
    why = "--max_length keeps none of their answer"
    return Dataset.from_list(
        kept(cut, lambda example: bool(_trained(example)), what="example", why=why, max_length=run.text.limit)
    )


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
    """A whole conversation as the template renders it; one of plain text gets its end-of-sequence token."""
    if isinstance(row["prompt"], str):
        return list(tokenizer(closed(row["prompt"] + row["chosen"], tokenizer))["input_ids"])
    text = templated(row["prompt"] + row["chosen"], tokenizer, keywords_of(row))
    check_rendered(row, "chosen", "", text, tokenizer)
    unrendered |= left_out(row, "chosen", text, str(tokenizer.chat_template))
    return plain_ids(text, tokenizer)


def packed(examples: Dataset, run: SFTOptionSet) -> Dataset:
    """Training examples as the run has them in rows: one each, or with `packing` as many as `max_length` holds.

    Rows of several have `seq_lengths`. They are filled best fit first, longest first, by TRL's function (Fewer
    Truncations Improve Language Modeling, arXiv 2404.10830, section 3). The collator takes them apart again, and the
    engine forwards them side by side: no example sees another.
    """
    if not run.train.packing:
        return examples
    from trl import pack_dataset  # which Gaudi's TRL has not

    columns = examples.select_columns(["input_ids", "labels"])
    return pack_dataset(columns, run.text.max_length, run.train.packing_strategy)


def untrained(example: Mapping[str, list[int]]) -> int:
    """How many tokens stand before the first that is trained."""
    return next(place for place, label in enumerate(example["labels"]) if label != IGNORED_LABEL)
