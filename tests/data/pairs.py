"""Canonical rows by hand."""

from typing import Any

from tandem.runs import sha256_json


def pair(prompt: Any, chosen: Any, rejected: Any, row: int = 1, source: str = "a.jsonl") -> dict[str, Any]:
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "pair_id": sha256_json([prompt, chosen, rejected])[:16],
        "source": source,
        "row": row,
        "format": "prompt_pair",
    }


def turns(*contents: str, first: str = "user") -> list[dict[str, str]]:
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]
