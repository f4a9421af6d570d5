"""What a person should know about their pairs before a GPU-hour is spent on them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tandem.config import opt
from tandem.data.formats import Row, prompt_id
from tandem.data.texts import render, tokenize_pair
from tandem.errors import UserError
from tandem.options import TextOptions
from tandem.runs import sha256_json, write_json


@dataclass
class CheckOptions:
    """Check."""

    tokenizer_name_or_path: str | None = opt(
        None, "tokenizer (or model) that lengths are counted with; unset: not counted"
    )
    report: str | None = opt(None, "write data_report.json here")


def check(splits: dict[str, Sequence[Row]], tokenizer: Any, text: TextOptions) -> dict[str, Any]:
    """Counts of each split, and of the prompts that all splits share."""
    report: dict[str, Any] = {"splits": {}}
    for name, pairs in splits.items():
        report["splits"][name] = _describe(pairs) | (_lengths(pairs, tokenizer, text) if tokenizer else {})
    prompts = {name: {prompt_id(pair["prompt"]) for pair in pairs} for name, pairs in splits.items()}
    shared = set.intersection(*prompts.values()) if len(prompts) > 1 else set()
    report["shared_prompts"] = len(shared)
    return report


def _describe(pairs: Sequence[Row]) -> dict[str, Any]:
    sizes = np.array([[_size(pair["chosen"]), _size(pair["rejected"])] for pair in pairs])
    return {
        "pairs": len(pairs),
        "prompts": len({prompt_id(pair["prompt"]) for pair in pairs}),
        "sources": dict(Counter(pair["source"] for pair in pairs)),
        "fingerprint": sha256_json(sorted(pair["pair_id"] for pair in pairs)),
        "duplicate_pairs": len(pairs) - len({pair["pair_id"] for pair in pairs}),
        "identical_answers": sum(pair["chosen"] == pair["rejected"] for pair in pairs),
        "several_turn_answers": sum(_turns(pair) > 1 for pair in pairs),
        "chosen_longer": float((sizes[:, 0] > sizes[:, 1]).mean()) if len(pairs) else None,
    }


def _size(completion: Any) -> int:
    return len(completion) if isinstance(completion, str) else sum(len(message["content"]) for message in completion)


def _turns(pair: Row) -> int:
    return max(len(pair[side]) if isinstance(pair[side], list) else 1 for side in ("chosen", "rejected"))


def _lengths(pairs: Sequence[Row], tokenizer: Any, text: TextOptions) -> dict[str, Any]:
    """Token counts, and how many pairs lose what at `max_length`."""
    tokenized = [tokenize_pair(render(pair, text.use_chat_template), tokenizer) for pair in pairs]
    prompt, chosen, rejected = (
        np.array([len(pair[side]) for pair in tokenized]) for side in ("prompt_ids", "chosen_ids", "rejected_ids")
    )
    longest = prompt + np.maximum(chosen, rejected)
    return {
        "tokens": {
            name: {"median": float(np.median(values)), "max": int(values.max())}
            for name, values in {"prompt": prompt, "chosen": chosen, "rejected": rejected}.items()
        },
        "answers_cut": int((longest > text.max_length).sum()),
        "answers_lost": int((prompt >= text.max_length).sum()),
    }


def findings(report: dict[str, Any]) -> list[str]:
    """What is wrong, a line each."""
    lines = []
    for name, split in report["splits"].items():
        for key, text in {
            "duplicate_pairs": "pairs are there more than once",
            "identical_answers": "pairs have chosen equal to rejected: they give no gradient",
            "several_turn_answers": "pairs have answers of several turns: a user's turn is trained on",
            "answers_cut": "pairs lose the end of an answer at --max_length",
            "answers_lost": "pairs lose their answers at --max_length and are left out",
        }.items():
            if split.get(key):
                lines.append(f"{name}: {split[key]} of {split['pairs']} {text}")
    if report["shared_prompts"]:
        lines.append(f"{report['shared_prompts']} prompts are in training and held-out data")
    return lines


def to_markdown(report: dict[str, Any]) -> str:
    """The counts as a Markdown table, a split a row, with the findings below."""
    columns = "split | pairs | prompts | chosen longer | prompt / chosen / rejected tokens (median)"
    lines = [f"| {columns} |", "|---" * 5 + "|"]
    for name, split in report["splits"].items():
        tokens = " / ".join(f"{value['median']:.0f}" for value in split.get("tokens", {}).values()) or "not counted"
        longer = f"{split['chosen_longer']:.2f}"
        lines.append(f"| {name} | {split['pairs']} | {split['prompts']} | {longer} | {tokens} |")
    return "\n".join([*lines, *(f"warning: {line}" for line in findings(report))])


def run_check(options: CheckOptions, text: TextOptions, splits: dict[str, Sequence[Row]]) -> None:
    """Print the table and write the report.

    Raises:
        UserError: there is nothing to train on.
    """
    tokenizer = None
    if options.tokenizer_name_or_path:
        from tandem.models import load_tokenizer
        from tandem.options import ModelOptions

        tokenizer = load_tokenizer(ModelOptions(model_name_or_path=options.tokenizer_name_or_path))
    report = check(splits, tokenizer, text)
    print(to_markdown(report))
    if options.report:
        write_json(Path(options.report), report | {"findings": findings(report)})
    for name, split in report["splits"].items():
        if split["pairs"] == split.get("answers_lost"):
            raise UserError(f"{name}: every prompt alone fills --max_length {text.max_length}")
