"""The KL divergence of a round's policy from that of round 0, on the policy's own held-out answers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tandem.errors import UserError, first_line
from tandem.intervals import Array, bootstrap, mean
from tandem.options.model import ModelOptions, TemplateOptions, is_adapter
from tandem.rounds.options import RoundsOptions
from tandem.rounds.records import Record
from tandem.runs import sha256_json, write_json

LOG_RATIOS = "log_ratios.json"


def divergence(
    folder: Path, records: Sequence[Record], base: Sequence[Record], options: RoundsOptions
) -> dict[str, Any] | None:
    """KL(π‖π₀) as the mean log-ratio log π(y|x) − log π₀(y|x) of the policy's own answers, like `evaluation`'s.

    The answers are those of `records`, however they were drawn: at a temperature other than 1 they are not from π, but
    from a sharper or flatter distribution. Only whole answers count. The log-ratios are kept in `folder`, so that each
    is computed once.

    Returns:
        `per_token` and `per_answer`, estimates in nats whose intervals resample prompts; where there are none, `why`;
        or None if --kl_prompts is 0.
    """
    if not options.kl_prompts:
        return None
    own = [record for record in records if record.get("non_answer") is None and record["text"].strip()]
    own = own[: options.kl_prompts]
    why = _unknown(own, records[0], base[0])
    if why is None:
        try:
            ratios, lengths = _log_ratios(folder / LOG_RATIOS, own, base[0], options)
        except UserError as error:  # a model that was moved must not cost the other measurements
            why = first_line(error)
    if why is not None:
        return {"per_token": None, "per_answer": None, "why": why}
    return {
        "per_token": bootstrap(_ratio, [ratios, lengths], options.seed),
        "per_answer": bootstrap(mean, [ratios], options.seed),
        "why": None,
    }


def _unknown(own: Sequence[Record], record: Record, first: Record) -> str | None:
    """Why the models that drew the answers cannot give log-probs; None if they can."""
    if not own:
        return "there is no whole answer"
    if "model" not in record or "model" not in first:
        return "the answers do not say which model drew them"
    if "openai" in (record.get("engine"), first.get("engine")):
        return "a server drew the answers, whose weights are not here"
    return None


def _ratio(sums: Array, counts: Array, axis: int) -> Any:
    return sums.sum(axis) / counts.sum(axis)


def _log_ratios(file: Path, own: Sequence[Record], first: Record, options: RoundsOptions) -> tuple[Array, Array]:
    """The answers' log-ratios in nats, (n,), and their numbers of tokens, (n,)."""
    texts = [[record["prompt_id"], record["text"]] for record in own]
    key = sha256_json([own[0].get("weights"), first.get("weights"), _name(own[0]), _name(first), texts])
    known = _known(file)
    if known.get("key") != key:
        pairs = _tokenized(own)
        policy, start = (_logps(_name(record), record, pairs, options.kl_batch_size) for record in (own[0], first))
        lengths = [len(pair["chosen_ids"]) for pair in pairs]
        known = {"key": key, "log_ratios": (policy - start).tolist(), "lengths": lengths}
        write_json(file, known)
    return np.array(known["log_ratios"], float), np.array(known["lengths"], float)


def _known(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # only a cache: what cannot be read is computed anew
        return {}
    return found if isinstance(found, dict) else {}


def _name(record: Mapping[str, Any]) -> str:
    name: str = record.get("adapter") or record["model"]
    return name


def _tokenized(records: Sequence[Record]) -> list[dict[str, list[int]]]:
    """Prompt and answer of each record as the model saw them. The scorer takes pairs: the second answer is a token."""
    from tandem.answers.backends.base import encode
    from tandem.data.tokenized import plain_ids
    from tandem.models.load import load_tokenizer

    sampling = records[0].get("sampling") or {}
    template = TemplateOptions(*sampling.get("template") or ())
    tokenizer = load_tokenizer(ModelOptions(model_name_or_path=_name(records[0])), template)
    prompts = encode([record["messages"] for record in records], tokenizer, sampling.get("max_prompt_length") or 2**31)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    answers = [plain_ids(record["text"], tokenizer) + end for record in records]
    return [
        {"prompt_ids": prompt, "chosen_ids": answer, "rejected_ids": answer[:1]}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _logps(name: str, record: Record, pairs: list[dict[str, list[int]]], batch_size: int) -> Array:
    from tandem.models.load import check_model
    from tandem.models.scorer import load_scorer

    if is_adapter(name) or Path(name).is_dir():
        check_model(name)
    # No autocast: its rounding would be taken for a difference between the models
    scorer = load_scorer(name, record.get("dtype") or "float32", batch_size=batch_size, bf16=False)
    logps: Array = scorer.pair_logps(pairs, None, name)[:, 0]
    return logps
