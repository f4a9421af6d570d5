"""The tokens that end an answer: used when a model generates here, and saved for those who load it elsewhere."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from tandem.data.turn_end import stop_tokens
from tandem.errors import UserError


def end_ids(configured: int | list[int] | None, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end an answer: those of the model's generation config, the tokenizer's, and the one with which its
    chat template ends a turn."""
    ends = configured if isinstance(configured, list) else [configured]
    if wrong := [end for end in ends if end is not None and not isinstance(end, int)]:
        raise UserError(f"generation_config.json: eos_token_id must be a token's number, or several, not {wrong[0]!r}")
    return {end for end in [*ends, *stop_tokens(tokenizer)] if end is not None}


def stop_at_turn_end(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Have the generation config that is saved with `model` stop at all of `end_ids`, for whoever generates with it."""
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    configured = config.eos_token_id
    before = configured if isinstance(configured, list) else [end for end in [configured] if end is not None]
    ends = [*before, *(end for end in stop_tokens(tokenizer) if end not in before)]
    if ends != before:
        config.eos_token_id = ends
