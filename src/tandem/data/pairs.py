"""Makes tokenized pairs of canonical rows, as DPO trains them and as evaluation measures them."""

from collections import Counter
from typing import TYPE_CHECKING, Any

from tandem.data.formats import TEXT
from tandem.data.kept import count_unrendered, refuse_none, tell_unrendered, warn_of_endless
from tandem.data.prepare import Made
from tandem.data.rendering import keywords_of
from tandem.data.rows import Row
from tandem.data.several import TRAINED_BY
from tandem.data.texts import render, trim_prompt
from tandem.data.tokenized import MASKS, tell_inside, tokenize_pair
from tandem.data.tokens import ends, special_ids
from tandem.options.model import TextOptions
from tandem.ranks import warn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ENDLESS, _SAME, _LOST, _INSIDE, _MASKED = "endless", "same", "lost", "inside", "masked"


def rendered(row: Row, text: TextOptions, tokenizer: "PreTrainedTokenizerBase") -> Row:
    """A canonical row as the model reads it, with its prompt trimmed.

    Raises:
        TemplateFault: the template refuses it.
        UserError: the template alone is longer than a prompt may be.
    """
    if row.get("format") == TEXT:
        return row
    ready = render(row, text.use_chat_template)
    if text.max_prompt_length is None:
        return ready
    return ready | {"prompt": trim_prompt(ready["prompt"], tokenizer, text.max_prompt_length, keywords_of(ready))}


class PairMaker:
    """See `data.prepare.Maker`."""

    what = "pair"

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", text: TextOptions) -> None:
        self._tokenizer, self._text = tokenizer, text
        self._specials = special_ids(tokenizer)

    def settings(self) -> Any:
        text = self._text
        return [text.use_chat_template, text.max_prompt_length, text.limit]

    def make(self, row: Row, counts: Counter[str]) -> Made | None:
        unrendered: set[str] = set()
        pair = tokenize_pair(rendered(row, self._text, self._tokenizer), self._tokenizer, unrendered)
        answers = pair["chosen_ids"], pair["rejected_ids"]
        count_unrendered(counts, unrendered)
        counts[_INSIDE] += sum(not all(pair[mask]) for mask in MASKS if mask in pair)
        counts[_MASKED] += any(mask in pair for mask in MASKS)
        counts[_ENDLESS] += not all(ends(ids, self._specials) for ids in answers)
        counts[_SAME] += answers[0] == answers[1]
        if len(pair["prompt_ids"]) >= self._text.limit:
            counts[_LOST] += 1
            return None
        return {**pair, "pair_id": row["pair_id"], **{name: row[name] for name in TRAINED_BY if name in row}}

    def tell(self, counts: Counter[str], total: int) -> None:
        self._tell_parts(counts, total)
        warn_of_endless(counts[_ENDLESS], total, self.what)
        if counts[_SAME]:
            warn(f"{counts[_SAME]} of {total} pairs have the same tokens on both sides, which train nothing")
        why = "the prompt alone fills --max_length"
        refuse_none(counts[_LOST], total, self.what, why, self._text.limit)

    def _tell_parts(self, counts: Counter[str], total: int) -> None:
        tell_unrendered(counts, total, self.what)
        if counts[_MASKED]:
            tell_inside(counts[_INSIDE], total)


class WholePairMaker(PairMaker):
    """See `data.prepare.Maker`. Keeps all pairs, with their whole prompts: evaluation itself leaves some out."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", use_chat_template: bool) -> None:
        super().__init__(tokenizer, TextOptions(use_chat_template=use_chat_template, max_length=None))

    def tell(self, counts: Counter[str], total: int) -> None:
        self._tell_parts(counts, total)
