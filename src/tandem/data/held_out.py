"""Held-out pairs for comparing answers: their prompts, and the answers that people chose."""

from collections.abc import Mapping, Sequence
from typing import Any

from tandem.data.formats import Asked, asked_of, prompt_id
from tandem.data.messages import answer_text

CHOSEN = "chosen"  # the label of the data's own answers, where models have theirs


def held_out_prompts(pairs: Sequence[Mapping[str, Any]], limit: int | None) -> list[Asked]:
    """Distinct prompts of `pairs` as messages, in their order."""
    prompts: dict[str, Asked] = {}
    for pair in pairs:
        asked = asked_of(pair)
        prompts.setdefault(prompt_id(asked), asked)
    return list(prompts.values())[:limit]


def chosen_answers(pairs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The answer that people chose, by prompt id; of a prompt that occurs twice, the first."""
    chosen: dict[str, str] = {}
    for pair in pairs:
        chosen.setdefault(prompt_id(asked_of(pair)), answer_text(pair["chosen"]).strip())
    return chosen
