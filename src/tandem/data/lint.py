"""Findings about pairs that a person should know before they spend GPU hours on them."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tandem.data.balance import Balance
from tandem.data.examine import Examined, examine
from tandem.data.formats import Row, as_messages
from tandem.data.messages import answer_text
from tandem.data.near import CROWD, SIMILAR, Candidates, jaccard
from tandem.data.shortcuts import bag_of_words, pick_longer
from tandem.data.turn_end import differing
from tandem.options.model import TextOptions
from tandem.runs import sha256_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Json = dict[str, Any]

LEVELS = ("error", "warning", "note")
TRAIN = "train"
HELD_OUT = "held-out"
EXAMPLES = 5
_EXCERPT = 160  # characters of an example
_LONGER = (0.4, 0.6)  # up to this accuracy of "pick the longer" there is no finding
_KEYWORDS = 0.75  # from this accuracy of a bag of words on, the pairs teach single words

# Every finding in the order of a report: its level, and its words after "N of M"
KINDS: dict[str, tuple[str, str]] = {
    "unreadable": ("warning", "rows cannot be read and are left out, as --max_bad_rows allows"),
    "unread_columns": ("warning", "rows have text that differs from row to row and that no format reads"),
    "ignored_columns": ("note", "rows have columns or keys that are not part of a pair"),
    "template_refuses": ("error", "pairs are refused by the chat template"),
    "template_trains_user": (
        "error",
        "pairs have words of the user's turn trained: the chat template alters the prompt",
    ),
    "template_prompt_differs": (
        "error",
        "prompts read differently alone and before an answer: not what is trained is asked",
    ),
    "template_drops": ("error", "pairs have a part that the chat template leaves out: it would not be trained"),
    "template_no_end": ("error", "pairs have an answer that no special token ends: a model would not learn to stop"),
    "template_other_end": (
        "note",
        "pairs have answers that end in another token than the tokenizer's end of sequence: models saved here stop at "
        "both",
    ),
    "answer_lost": ("warning", "pairs lose their answers at --max_length and are left out"),
    "difference_cut": ("warning", "pairs differ only beyond --max_length: they give no gradient"),
    "answer_cut": ("warning", "pairs lose the end of an answer at --max_length"),
    "closed_twice": ("warning", "pairs have an answer that the tokenizer ends a second time"),
    "system_cut": ("note", "prompts lose their whole system message at --max_prompt_length"),
    "prompt_cut": ("note", "prompts lose their beginning at --max_prompt_length"),
    "template_leaves_out": (
        "note",
        "pairs have what the chat template leaves out on purpose, as reasoning of earlier turns",
    ),
    "identical": ("warning", "pairs have chosen equal to rejected: they give no gradient"),
    "identical_tokens": (
        "warning",
        "pairs have answers that differ, and not as the chat template renders them: they give no gradient",
    ),
    "contradictory": ("warning", "pairs are there both ways round: one row prefers what another rejects"),
    "duplicates": ("warning", "pairs are there more than once"),
    "near_duplicates": ("warning", "pairs are nearly the same as an earlier one"),
    "leaked_prompts": ("warning", "pairs have a prompt that is in the held-out data too"),
    "near_leaked_prompts": ("warning", "pairs have nearly the same prompt as held-out data"),
    "repeated_prompts": ("note", "pairs have the prompt of an earlier one, with other answers"),
    "near_prompts": ("note", "pairs have nearly the prompt of an earlier one"),
    "several_turns": ("note", "pairs have answers of several turns: those of others in them are not trained"),
    "turn_markers": ("warning", "pairs have an answer that goes on with a turn marker of a transcript"),
    "role_order": ("warning", "pairs have turns out of order"),
    "prompt_repeated": ("warning", "pairs repeat the prompt in an answer, where it is trained"),
    "wrapped_prompt": ("warning", "pairs have a prompt that is in a chat template already: it gets a second one"),
    "score_order": ("warning", "pairs have a chosen answer that is scored no higher than the rejected one"),
    "missing_value": ("warning", "pairs have a text that stands for no value, as nan from pandas"),
    "boundary_merges": (
        "note",
        "pairs have tokens that would reach over the end of the prompt: the answer begins after them",
    ),
    "unfinished": ("note", "pairs have an answer that ends in the middle of a sentence"),
    "single_token": ("warning", "pairs have an answer of a single token"),
    "special_tokens": ("warning", "pairs hold text that the tokenizer reads as a special token"),
    "not_text": ("warning", "pairs hold control characters, or characters that were decoded wrongly"),
    "personal_data": ("warning", "pairs hold what looks like personal data or a secret"),
    "other_language": ("note", "pairs are in another language than most"),
    "length_bias": ("warning", "pairs have their label told by which answer is longer"),
    "keywords": ("warning", "pairs have their label told by a bag of words, with prompts held out"),
}


@dataclass(frozen=True)
class Finding:
    """What is wrong with `rows`, indices into the split, ascending. A finding about a whole split has only `count`."""

    name: str
    split: str
    count: int
    of: int
    rows: Sequence[int] = ()
    examples: Sequence[Json] = ()

    @property
    def share(self) -> float:
        """The share of the split's pairs."""
        return self.count / self.of

    @property
    def level(self) -> str:
        """One of LEVELS."""
        return KINDS[self.name][0]

    def __str__(self) -> str:
        return f"{self.split}: {self.count} of {self.of} {KINDS[self.name][1]}"

    def to_json(self) -> Json:
        """As in data_report.json."""
        return {
            "name": self.name,
            "level": self.level,
            "split": self.split,
            "count": self.count,
            "share": self.share,
            "message": str(self),
            "examples": list(self.examples),
        }


def lint(
    splits: Mapping[str, Sequence[Row]], tokenizer: "PreTrainedTokenizerBase | None", text: TextOptions
) -> tuple[dict[str, Json], list[Finding]]:
    """Figures of each split, and the findings in the order of KINDS.

    Without a tokenizer nothing is said of tokens, lengths and templates. Splits of thousands of pairs are examined by
    as many processes as there are cores.
    """
    figures, findings = {}, []
    examined = {name: examine(pairs, tokenizer, text) for name, pairs in splits.items()}
    for name, pairs in splits.items():
        seen = examined[name]
        seen.found |= _repeats(pairs, seen)
        words = bag_of_words(pairs)
        figures[name] = _describe(pairs, seen, tokenizer is not None) | {"bag_of_words": words}
        findings += [_finding(kind, name, pairs, rows) for kind, rows in seen.found.items() if rows]
        findings += _shortcuts(name, figures[name])
        if tokenizer is not None and text.use_chat_template and pairs:
            findings += _other_end(name, len(pairs), tokenizer)
    if {TRAIN, HELD_OUT} <= splits.keys():
        leaks = _leaks(examined[TRAIN], splits[HELD_OUT], examined[HELD_OUT])
        findings += [_finding(kind, TRAIN, splits[TRAIN], rows) for kind, rows in leaks.items() if rows]
    order = {kind: number for number, kind in enumerate(KINDS)}
    return figures, sorted(findings, key=lambda finding: order[finding.name])


def unreadable(skipped: Sequence[str], kept: int) -> Finding:
    """The finding on rows that the reader left out, each given as place and reason, beside the `kept` ones."""
    examples = [{"found": line} for line in skipped[:EXAMPLES]]
    return Finding("unreadable", "all", len(skipped), kept + len(skipped), examples=examples)


def unread_columns(balances: Sequence[Balance]) -> Iterator[Finding]:
    """Columns and message keys that were not read: those that may be part of the pairs, and the others."""
    for balance in balances:
        suspects = balance.suspects()
        others = [name for name in balance.unread if name not in suspects]
        for kind, names in (("unread_columns", suspects), ("ignored_columns", others)):
            if names:
                most = max(balance.unread[name].count for name in names)
                examples = [{"found": balance.describe(name)} for name in names]
                yield Finding(kind, balance.place, most, max(most, balance.rows), examples=examples)


def _other_end(split: str, count: int, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Finding]:
    if ends := differing(tokenizer):
        found = f"the chat template ends answers with {ends[0]}, the tokenizer's end of sequence is {ends[1]}"
        yield Finding("template_other_end", split, count, count, examples=[{"found": found}])


def _finding(kind: str, split: str, pairs: Sequence[Row], found: Mapping[int, str]) -> Finding:
    rows = sorted(found)
    examples = [_example(pairs[row], kind, found[row]) for row in rows[:EXAMPLES]]
    return Finding(kind, split, len(rows), len(pairs), rows, examples)


def _example(pair: Row, kind: str, found: str) -> Json:
    example = {"file": pair["source"], "row": pair["row"], "found": found}
    if kind == "personal_data":  # the text around it would show it
        return example
    asked = as_messages(pair["prompt"])[-1]["content"]
    texts = {"prompt": asked, "chosen": answer_text(pair["chosen"]), "rejected": answer_text(pair["rejected"])}
    return example | {part: content[:_EXCERPT] for part, content in texts.items()}


def _describe(pairs: Sequence[Row], seen: Examined, has_tokens: bool) -> Json:
    """Counts of a split; `fingerprint` is of its pairs in any order."""
    figures: Json = {
        "pairs": len(pairs),
        "prompts": len(set(seen.prompt_ids)),
        "formats": dict(Counter(pair["format"] for pair in pairs).most_common()),
        "sources": dict(Counter(pair["source"] for pair in pairs)),
        "fingerprint": sha256_json(sorted(pair["pair_id"] for pair in pairs)),
        "languages": dict(Counter(code or "unknown" for code in seen.languages).most_common()),
        "chosen_longer": float((seen.sizes[:, 0] > seen.sizes[:, 1]).mean()),
        "pick_longer": pick_longer(seen.sizes),
    }
    counted = seen.tokens[seen.tokens[:, 0] >= 0]
    if has_tokens and len(counted):
        figures["tokens"] = {
            part: {"median": float(np.median(values)), "max": int(values.max())}
            for part, values in zip(("prompt", "chosen", "rejected"), counted.T, strict=True)
        }
    return figures


def _shortcuts(split: str, figures: Json) -> Iterator[Finding]:
    longer, words = figures["pick_longer"], figures["bag_of_words"]
    low, high = _LONGER
    if longer["low"] > high or longer["high"] < low:
        accuracy = max(longer["value"], 1 - longer["value"])
        yield Finding("length_bias", split, round(accuracy * longer["n"]), longer["n"])
    if words and words["low"] > _KEYWORDS:
        found = f"for chosen: {', '.join(words['chosen_words'])}; for rejected: {', '.join(words['rejected_words'])}"
        count = round(words["value"] * words["n"])
        yield Finding("keywords", split, count, words["n"], examples=[{"found": found}])


def _repeats(pairs: Sequence[Row], seen: Examined) -> dict[str, dict[int, str]]:
    """Pairs and prompts that come again, whole, nearly or the other way round, and pairs of another language."""
    found: dict[str, dict[int, str]] = {
        name: {} for name in ("duplicates", "contradictory", "near_duplicates", "repeated_prompts", "near_prompts")
    }
    first_pair: dict[tuple[str, str, str], int] = {}
    first_prompt: dict[str, int] = {}
    near_pairs, near_prompts = Candidates(), Candidates()

    def add(kind: str, row: int, other: int) -> None:
        found[kind].setdefault(row, f"as {_place(pairs[other])}")

    for row, pair in enumerate(pairs):
        prompt, chosen, rejected = seen.prompt_ids[row], answer_text(pair["chosen"]), answer_text(pair["rejected"])
        turned = first_pair.get((prompt, rejected, chosen)) if chosen != rejected else None
        earlier = first_pair.setdefault((prompt, chosen, rejected), row)
        if turned is not None:
            add("contradictory", row, turned)
            add("contradictory", turned, row)
        if earlier != row:
            add("duplicates", row, earlier)
            continue
        for kind, like in _near_pairs(row, seen, near_pairs):
            add(kind, row, like)
            if kind == "contradictory":
                add(kind, like, row)
        if (earlier := first_prompt.setdefault(prompt, row)) != row:
            add("repeated_prompts", row, earlier)
            continue
        candidates = near_prompts.like(seen.prompt_signatures[row])
        if (near := _near_prompt(row, seen, seen, candidates)) is not None:
            add("near_prompts", row, near)
        elif len(candidates) < CROWD:
            near_prompts.add(row, seen.prompt_signatures[row])
    # Copies from before the opposite came are there both ways round too
    for row in found["duplicates"]:
        first = first_pair[seen.prompt_ids[row], answer_text(pairs[row]["chosen"]), answer_text(pairs[row]["rejected"])]
        if first in found["contradictory"]:
            found["contradictory"].setdefault(row, found["contradictory"][first])
    return found | {"other_language": _other_language(seen.languages)}


def _place(pair: Row) -> str:
    return f"{pair['source']} row {pair['row']}"


def _near_pairs(row: int, seen: Examined, index: Candidates) -> Iterator[tuple[str, int]]:
    """The first earlier row that is nearly the same pair, and the first that is nearly the same turned round.

    A row that has no such earlier row is added to the index: the first of a group stands for the group.
    """
    candidates = index.like(seen.pair_signatures[row])
    prompt, chosen, rejected = seen.parts(row)
    relations: dict[str, int] = {}
    for earlier in candidates:
        its_prompt, its_chosen, its_rejected = seen.parts(earlier)
        if not _alike((prompt, its_prompt)):
            continue
        if _alike((chosen, its_chosen), (rejected, its_rejected)):
            relations.setdefault("near_duplicates", earlier)
        elif _alike((chosen, its_rejected), (rejected, its_chosen)):
            relations.setdefault("contradictory", earlier)
    if "near_duplicates" not in relations and len(candidates) < CROWD:
        index.add(row, seen.pair_signatures[row])
    return iter(relations.items())


def _alike(*couples: tuple[np.ndarray, np.ndarray]) -> bool:
    return all(jaccard(left, right) >= SIMILAR for left, right in couples)


def _near_prompt(row: int, seen: Examined, others: Examined, candidates: Sequence[int]) -> int | None:
    """The first of the `candidates`, rows of `others`, whose prompt is nearly `row`'s."""
    prompt = seen.parts(row)[0]
    return next((other for other in candidates if _alike((prompt, others.parts(other)[0]))), None)


def _leaks(seen: Examined, held_out: Sequence[Row], others: Examined) -> dict[str, dict[int, str]]:
    """Training pairs, examined as `seen`, whose prompt is held out as well, or nearly so."""
    first: dict[str, int] = {}
    index = Candidates()
    for row, prompt in enumerate(others.prompt_ids):
        signature = others.prompt_signatures[row]
        if first.setdefault(prompt, row) == row and len(index.like(signature)) < CROWD:
            index.add(row, signature)
    found: dict[str, dict[int, str]] = {"leaked_prompts": {}, "near_leaked_prompts": {}}
    for row, prompt in enumerate(seen.prompt_ids):
        if (same := first.get(prompt)) is not None:
            found["leaked_prompts"][row] = f"as {_place(held_out[same])}"
        elif (near := _near_prompt(row, seen, others, index.like(seen.prompt_signatures[row]))) is not None:
            found["near_leaked_prompts"][row] = f"as {_place(held_out[near])}"
    return found


def _other_language(languages: Sequence[str | None]) -> dict[int, str]:
    known = Counter(code for code in languages if code)
    if not known:
        return {}
    most = known.most_common(1)[0][0]
    return {row: code for row, code in enumerate(languages) if code not in (None, most)}
