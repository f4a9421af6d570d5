"""Answers of several models to the same prompts, side by side, with what a glance at them would count."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.config import REQUIRED, opt
from tandem.data.formats import Row, as_messages, prompt_id
from tandem.generate import generate, held_out_prompts
from tandem.runs import read_jsonl, write_json
from tandem.sampling import SamplingOptions


@dataclass
class CompareOptions:
    """Compare."""

    base_model: str = opt(REQUIRED, "model before training: folder or Hub name")
    finetuned_model: str = opt(REQUIRED, "model or adapter folder after DPO")
    sft_model: str | None = opt(None, "model or adapter folder after SFT, as a third column")
    output_dir: str = opt(".", "folder for dpo_comparison_results.json and the generations_*.jsonl")

    @property
    def models(self) -> dict[str, str]:
        """Models to compare, by label."""
        named = {"base": self.base_model, "sft": self.sft_model, "dpo": self.finetuned_model}
        return {label: name for label, name in named.items() if name is not None}


def compare(options: CompareOptions, sampling: SamplingOptions, pairs: Sequence[Row]) -> dict[str, Any]:
    """Have every model answer the same prompts under the same sampling, and write `dpo_comparison_results.json`.

    Answers already in `output_dir` are used as they are.
    """
    folder = Path(options.output_dir)
    prompts = held_out_prompts(pairs, sampling.max_prompts)
    answers = {}
    for label, model in options.models.items():
        records = read_jsonl(generate(model, label, prompts, sampling, folder))
        by_id = {record["prompt_id"]: record for record in records}
        answers[label] = {prompt_id(messages): by_id[prompt_id(messages)] for messages in prompts}
    chosen = {prompt_id(as_messages(pair["prompt"])): _text(pair["chosen"]) for pair in pairs}
    results: dict[str, Any] = {
        "models": options.models,
        "seed": sampling.seed,
        "statistics": {label: _statistics(list(by_prompt.values())) for label, by_prompt in answers.items()},
        "comparisons": [
            {
                "prompt_id": prompt_id(messages),
                "messages": messages,
                "chosen": chosen[prompt_id(messages)],
                "answers": {label: by_prompt[prompt_id(messages)]["text"] for label, by_prompt in answers.items()},
            }
            for messages in prompts
        ],
    }
    write_json(folder / "dpo_comparison_results.json", results)
    write_json(folder / "generation_samples.json", results["comparisons"][:10])
    return results


def _text(completion: Any) -> str:
    return completion.strip() if isinstance(completion, str) else completion[0]["content"]


def _statistics(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Shares and means over one model's answers.

    `repetition` is 1 − distinct / all word trigrams, 0 for an answer of fewer than four words.
    """
    count = len(records)
    return {
        "n": count,
        "mean_tokens": sum(record["n_tokens"] for record in records) / count,
        "truncated": sum(record["finish_reason"] == "length" for record in records) / count,
        "empty": sum(not record["text"] for record in records) / count,
        "repetition": sum(_repetition(record["text"]) for record in records) / count,
    }


def _repetition(text: str) -> float:
    words = text.split()
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) if len(trigrams) > 1 else 0.0


def to_markdown(results: dict[str, Any]) -> str:
    """The statistics as a Markdown table, a model a row."""
    names = list(next(iter(results["statistics"].values())))
    lines = ["| model | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for label, values in results["statistics"].items():
        lines.append(f"| {label} | " + " | ".join(f"{values[name]:.3g}" for name in names) + " |")
    return "\n".join(lines)
