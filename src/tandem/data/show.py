"""Shows pairs as they are trained, token by token: whose turn each is in, which are trained, where they are cut."""

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from tandem.data.formats import Row
from tandem.data.lint import KINDS
from tandem.data.tokens import Seen, Span, check_seen, role_spans, see, special_ids
from tandem.options.model import TextOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Json = dict[str, Any]

TEMPLATE = "template"  # the role of what is no one's words
_BEYOND = 20  # tokens shown of what max_length cuts
_STYLES = {"system": "magenta", "user": "blue", "assistant": "green", TEMPLATE: "bright_black"}
_CONTROLS = {"Cc", "Cf", "Co", "Cs"}  # would move the cursor or turn the text round; ours to show, not to obey


def show_pairs(rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", text: TextOptions) -> list[Json]:
    """Each canonical row as data_report.json shows it.

    `prompt`, `chosen` and `rejected` are lists of [text of a token, role]; only tokens of the answers are trained, and
    of these the first `room`. `differs_at` is the first token in which the answers differ. `problems` are the
    findings of this pair's tokens, by name.
    """
    specials = special_ids(tokenizer)
    return [
        {"file": row["source"], "row": row["row"], "pair_id": row["pair_id"]}
        | ({"refused": seen} if isinstance(seen, str) else _show(seen, tokenizer, text, specials))
        for row, seen in zip(rows, see(rows, tokenizer, text) if rows else [], strict=True)
    ]


def _show(seen: Seen, tokenizer: "PreTrainedTokenizerBase", text: TextOptions, specials: frozenset[int]) -> Json:
    prompt_length, room = len(seen.prompt_ids), seen.room(text)
    answers = {
        side: _pieces(whole, seen.prompt_ids + ids, _spans(seen, side, whole, tokenizer), tokenizer)
        for side, whole, ids in seen.sides
    }
    return {
        "prompt": answers["chosen"][:prompt_length][-text.limit :],
        **{side: pieces[prompt_length:][: room + _BEYOND] for side, pieces in answers.items()},
        "lengths": {"prompt": prompt_length, "chosen": len(seen.chosen_ids), "rejected": len(seen.rejected_ids)},
        "room": room,
        "differs_at": seen.first_difference(),
        "problems": check_seen(seen, tokenizer, text, specials),
    }


def _spans(seen: Seen, side: str, whole: str, tokenizer: "PreTrainedTokenizerBase") -> list[Span]:
    prompt, answer = seen.row["prompt"], seen.row[side]
    if not isinstance(prompt, str):
        return role_spans(whole, prompt + answer, tokenizer)
    return [(0, len(prompt), "user"), (len(prompt), len(prompt) + len(answer), "assistant")]


def _pieces(
    whole: str, ids: Sequence[int], spans: Sequence[Span], tokenizer: "PreTrainedTokenizerBase"
) -> list[tuple[str, str]]:
    """The text of each token, made visible, and the role whose words it is in."""
    names = tokenizer.convert_ids_to_tokens(list(ids))
    offsets = _offsets(whole, ids, tokenizer)
    if offsets is None:
        return [(visible(name), TEMPLATE) for name in names]
    pieces, end_before = [], 0
    for name, (_, end) in zip(names, offsets, strict=True):
        # Not from the token's own start: some tokenizers leave a space out of it
        piece = whole[end_before:end]
        role = next((role for start, stop, role in spans if start < end <= stop), TEMPLATE)
        # No text of its own: a token added at the beginning, or the next bytes of a character
        pieces.append((visible(piece), role) if piece else (visible(name), TEMPLATE if end == 0 else role))
        end_before = max(end, end_before)
    return pieces


def _offsets(whole: str, ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> list[tuple[int, int]] | None:
    """Where each token stands in the text; None for a tokenizer that does not say."""
    if not tokenizer.is_fast:
        return None
    for add_special_tokens in (False, True):  # a template brings its own
        encoded: Any = tokenizer(whole, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
        if list(encoded["input_ids"]) == list(ids):
            return list(encoded["offset_mapping"])
    return None


def visible(text: str) -> str:
    """`text` with line breaks marked and control characters as escapes."""
    marks = {"\n": "↵\n", "\t": "⇥", "\r": "␍"}
    return "".join(
        marks.get(char) or (f"\\u{ord(char):04x}" if unicodedata.category(char) in _CONTROLS else char) for char in text
    )


def print_pair(pair: Json, console: Console) -> None:
    """Print a pair of `show_pairs`: words coloured by role, tokens apart by |, what is trained underlined."""
    heading = f"{pair['split']}: {pair['file']} row {pair['row']} ({pair['pair_id']})"
    console.print(Text(heading, style="bold"))
    if "refused" in pair:
        console.print(Text(f"error: the chat template refuses it: {visible(pair['refused'])}\n", style="red"))
        return
    lengths = pair["lengths"]
    console.print(Text(f"prompt: {lengths['prompt']} tokens, shared by both answers, not trained"))
    console.print(_line(pair["prompt"]))
    for side in ("chosen", "rejected"):
        trained = min(lengths[side], pair["room"])
        cut = "" if trained == lengths[side] else f", {lengths[side] - trained} cut at --max_length"
        console.print(Text(f"{side}: {trained} tokens trained{cut}"))
        console.print(_line(pair[side], trained, pair["differs_at"]))
    for name, found in pair["problems"].items():
        console.print(Text(f"{KINDS[name][0]}: {name}: {visible(found)}"))
    console.print()


def _line(pieces: Sequence[tuple[str, str]], trained: int | None = None, differs_at: int | None = None) -> Text:
    """Tokens with marks where they are cut and where the answers differ; `trained` is None for a prompt."""
    line = Text()
    for index, (piece, role) in enumerate(pieces):
        if index == trained:
            line.append(" [cut at --max_length] ", style="bold red")
        if index == differs_at:
            line.append(" [differs from here] ", style="bold yellow")
        style = _STYLES[role] + (" underline" if trained is not None and index < trained else "")
        line.append(piece, style=style)
        line.append("|", style="bright_black")
    return line.append("\n")
