"""Puts answers of several models to the same prompts side by side, with simple statistics."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from tandem import ranks
from tandem.answers import ab_files
from tandem.answers.backends.options import GenerationOptions
from tandem.answers.generate import generate
from tandem.answers.refusals import is_refusal
from tandem.data.formats import Row, prompt_id
from tandem.data.held_out import CHOSEN, chosen_answers, held_out_prompts
from tandem.data.non_answers import non_answer, spoken
from tandem.markdown_table import markdown_table
from tandem.models.sampling import SamplingOptions
from tandem.options.fields import REQUIRED, opt
from tandem.options.rules import Options
from tandem.runs import read_jsonl, write_atomic, write_json


@dataclass
class CompareOptions(Options):
    """Compare."""

    base_model: str = opt(REQUIRED, "model before training: folder or Hub name, or name served")
    finetuned_model: str = opt(REQUIRED, "model or adapter after DPO")
    sft_model: str | None = opt(None, "model or adapter after SFT, as a third column")
    policy: str = opt("dpo", "the model of interest", choices=("dpo", "sft", "base"))
    against: str = opt(
        "base", "what it is compared with; chosen: the data's own answers", choices=("base", "sft", CHOSEN)
    )
    shuffle_ab: bool = opt(False, "write ab_questions.jsonl for outside judges, sides shuffled; ab_key.json tells them")
    ab_verdicts: str | None = opt(None, "an outside judge's verdicts on ab_questions.jsonl: prompt_id and A, B or tie")
    output_dir: str = opt(".", "folder for dpo_comparison_results.json, its page and the generations_*.jsonl")

    def conflicts(self) -> Iterator[str]:
        if self.policy == self.against:
            yield f"--policy and --against are both {self.policy}: nothing to compare"
        for name, label in (("policy", self.policy), ("against", self.against)):
            if label not in (*self.models, CHOSEN):
                yield f"--{name} {label} needs --{label}_model"
        if self.shuffle_ab and self.ab_verdicts is not None:
            yield "--shuffle_ab writes questions anew, which --ab_verdicts answers: give one of them"
        elif self.ab_verdicts is not None and not Path(self.ab_verdicts).is_file():  # before answers are drawn
            yield f"--ab_verdicts {self.ab_verdicts}: no such file"

    @property
    def models(self) -> dict[str, str]:
        """The models to compare, by label."""
        named = {"base": self.base_model, "sft": self.sft_model, "dpo": self.finetuned_model}
        return {label: name for label, name in named.items() if name is not None}


def compare(
    options: CompareOptions, engine: GenerationOptions, sampling: SamplingOptions, pairs: Sequence[Row]
) -> dict[str, Any]:
    """Have every model answer the same prompts with the same sampling, and write `dpo_comparison_results.json`.

    Answers that are already in `output_dir` are used as they are. Also written are `generation_samples.json` (the first
    ten prompts), `side_by_side.html`, and with `--shuffle_ab` the files of `tandem.answers.ab_files`.
    """
    ranks.refuse_several("compare")
    folder = Path(options.output_dir)
    prompts = held_out_prompts(pairs, sampling.max_prompts)
    files = generate(options.models, prompts, sampling, engine, folder)
    keys = [prompt_id(messages) for messages in prompts]
    chosen = chosen_answers(pairs)
    drawn = {label: _in_order(file, keys) for label, file in files.items()}
    given: list[dict[str, Any]] = [{"text": chosen[key]} for key in keys]
    rows: list[dict[str, Any]] = [
        {
            "prompt_id": key,
            "messages": prompts[index],
            "chosen": chosen[key],
            "answers": {label: spoken(records[index]["text"]) for label, records in drawn.items()},
            "non_answers": {label: why for label, records in drawn.items() if (why := non_answer(records[index]))},
        }
        for index, key in enumerate(keys)
    ]
    results: dict[str, Any] = {
        "models": options.models,
        "policy": options.policy,
        "against": options.against,
        "seed": sampling.seed,
        "statistics": {label: statistics(records) for label, records in (drawn | {CHOSEN: given}).items()},
        "comparisons": rows,
    }
    sides = [row | {"answers": row["answers"] | {CHOSEN: row["chosen"]}} for row in rows]
    if options.shuffle_ab:
        ab_files.write_questions(folder, sides, options.policy, options.against, sampling.seed)
    if options.ab_verdicts is not None:
        winners = ab_files.read_winners(Path(options.ab_verdicts), folder, sides, options.policy, options.against)
        results |= _with_winners(rows, winners, options.against)
    write_json(folder / "dpo_comparison_results.json", results)
    write_json(folder / "generation_samples.json", rows[:10])
    write_atomic(folder / "side_by_side.html", _page(results))
    return results


def _in_order(file: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    by_prompt = {record["prompt_id"]: record for record in read_jsonl(file)}
    return [by_prompt[key] for key in keys]


def _with_winners(rows: Sequence[dict[str, Any]], winners: Mapping[str, str], against: str) -> dict[str, Any]:
    """Add `winner_model_vs_<against>` to `rows`; returns the counts, with Wilson's 95% interval on decisive prompts."""
    from tandem.intervals import wilson

    name = f"winner_model_vs_{against}"
    for row in rows:
        row[name] = winners.get(row["prompt_id"])
    counts = Counter(row[name] for row in rows)
    wins, decisive = counts[ab_files.MODEL], counts[ab_files.MODEL] + counts[against]
    return {
        "outside_verdicts": {
            "wins": wins,
            "losses": counts[against],
            "ties": counts[ab_files.TIE],
            "unjudged": counts[None],
            "win_rate": wilson(wins, decisive, "no prompt has a winner"),
        }
    }


def statistics(records: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Shares and means over one side's answers; None where its records lack the field.

    `repetition` is 1 − distinct / all word trigrams, 0 for an answer of fewer than four words. `refusal` is a guess
    (`tandem.answers.refusals`). All but `mean_tokens` and `truncated` are of the text without its reasoning; `empty` is
    the share of answers without any such text. A record has `text`, and if a model drew it, `n_tokens` and
    `finish_reason`.
    """
    texts = [spoken(record["text"]) for record in records]
    tokens = [record["n_tokens"] for record in records if record.get("n_tokens") is not None]
    reasons = [record["finish_reason"] for record in records if "finish_reason" in record]
    return {
        "n": len(records),
        "mean_tokens": fmean(tokens) if tokens else None,
        "mean_characters": fmean(map(len, texts)),
        "truncated": fmean(reason == "length" for reason in reasons) if reasons else None,
        "empty": fmean(not text for text in texts),
        "refusal": fmean(map(is_refusal, texts)),
        "repetition": fmean(map(repetition, texts)),
    }


def repetition(text: str) -> float:
    """The share of a text's word trigrams that occurred in it before; 0 if it has fewer than two."""
    words = text.split()
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) if len(trigrams) > 1 else 0.0


def to_markdown(results: Mapping[str, Any]) -> str:
    """The statistics as a Markdown table, with a row for each side."""
    names = list(next(iter(results["statistics"].values())))
    rows = [
        [label, *("–" if values[name] is None else f"{values[name]:.3g}" for name in names)]
        for label, values in results["statistics"].items()
    ]
    return markdown_table(["answers of", *names], rows)


def _page(results: Mapping[str, Any]) -> bytes:
    from tandem.report.side_by_side import render_side_by_side

    # A lone surrogate, which JSON may hold, cannot be encoded as UTF-8
    return render_side_by_side(results).encode(errors="replace")
