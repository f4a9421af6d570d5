"""Measures models on held-out pairs against one reference, with intervals and tests of their differences."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tandem import ranks
from tandem.data.formats import Row
from tandem.errors import UserError
from tandem.evaluation.benchmark import BenchmarkOptions, run_benchmarks
from tandem.evaluation.tables import to_markdown
from tandem.intervals import Array, Estimate, bootstrap, length_terciles, mean, wilson
from tandem.options.fields import REQUIRED, opt
from tandem.options.model import PreparationOptions, TemplateOptions, check_models
from tandem.runs import write_atomic, write_json

REFERENCE = "base"  # label of the reference among the models


@dataclass
class EvaluateOptions(TemplateOptions, PreparationOptions):
    """Evaluate."""

    reference_model: str = opt(REQUIRED, "model that implicit rewards and KL are measured against")
    sft_model: str | None = opt(None, "model or adapter folder of the SFT policy")
    dpo_model: str | None = opt(None, "model or adapter folder of the DPO policy")
    output_file: str = opt("results.json", "file for the numbers; the tables are written beside it as .md")
    eval_batch_size: int = opt(8, "pairs per batch", low=1)
    max_eval_samples: int | None = opt(None, "use the first N held-out pairs", low=1)
    kl_prompts: int = opt(32, "held-out prompts that each policy answers twice to estimate its KL; 0: none", low=0)
    kl_max_new_tokens: int = opt(64, "longest of these answers, in tokens", low=1)
    eval_seed: int = opt(42, "seed of these answers and of the bootstrap")
    eval_dtype: str = opt(
        "auto",
        "type that the weights of all models are held in; auto: float32 on the CPU, else the type they are stored in, "
        "or float32 if they differ in that",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    eval_bf16: bool | None = opt(None, "bfloat16 autocast; unset: where the device multiplies it fast")

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        if not self.policies:
            yield "nothing to evaluate: give --sft_model, --dpo_model or both"
        if Path(self.output_file).suffix != ".json":
            yield f"--output_file {self.output_file}: must end in .json"
        if self.eval_bf16:
            from tandem.devices import gpu_without_bf16  # torch takes seconds, which only --eval_bf16 pays

            if gpu := gpu_without_bf16():
                yield f"--eval_bf16: {gpu} has no bfloat16, only a slow emulation: leave it out for float32"

    @property
    def policies(self) -> dict[str, str]:
        """The models to evaluate against the reference, by label."""
        named = {"sft": self.sft_model, "dpo": self.dpo_model}
        return {label: name for label, name in named.items() if name is not None}


@dataclass(frozen=True)
class Samples:
    """A policy's own answers, two to each of k prompts as a pair, and the policy's log-probs of them, (k, 2) nats."""

    pairs: list[dict[str, list[int]]]
    logps: Array


@dataclass(frozen=True)
class HeldOut:
    """What is measured: n pairs and every model's log-probs of them.

    Attributes:
        logps: by label, the reference's too: (n, 2) nats, summed over the completion, chosen then rejected
        chosen_tokens: (n,) tokens of each chosen completion
        length_difference: (n,) tokens of chosen minus those of rejected
        sources: (n,) the source that each pair is from
    """

    logps: Mapping[str, Array]
    chosen_tokens: Array
    length_difference: Array
    sources: Array

    def lead(self, label: str) -> Array:
        """(n,) log π(y_w|x) − log π(y_l|x)."""
        return self.logps[label][:, 0] - self.logps[label][:, 1]

    def margins(self, label: str) -> Array:
        """(n,) the model's lead minus the reference's: the margin in Rafailov et al. 2023, Eq. 5, without β."""
        return self.lead(label) - self.lead(REFERENCE)

    def part(self, rows: Array) -> "HeldOut":
        """The pairs with the indices `rows`."""
        logps = {label: logps[rows] for label, logps in self.logps.items()}
        return HeldOut(logps, self.chosen_tokens[rows], self.length_difference[rows], self.sources[rows])


def accuracy(leads: Array) -> Estimate:
    """The share of leads, (n,), above 0, ties as ½, with Wilson's interval for n pairs."""
    wins = float((leads > 0).sum() + 0.5 * (leads == 0).sum())
    return wilson(wins, len(leads), "there is no pair")


def _median(values: Array, axis: int) -> Any:
    return np.median(values, axis)


def _ratio(sums: Array, counts: Array, axis: int) -> Any:
    return sums.sum(axis) / counts.sum(axis)


def _perplexity(logps: Array, counts: Array, axis: int) -> Any:
    return np.exp(-_ratio(logps, counts, axis))


def _perplexity_difference(logps: Array, other: Array, counts: Array, axis: int) -> Any:
    return _perplexity(logps, counts, axis) - _perplexity(other, counts, axis)


def pair_metrics(held_out: HeldOut, label: str, seed: int) -> dict[str, Estimate]:
    """Accuracies, margins and perplexity of one model; the reference, which margins are relative to, has none.

    Preference accuracy is the share of pairs with a margin above 0. Ranking accuracy is the share of pairs whose chosen
    answer is the likelier one, which needs no reference (Chen et al. 2024, Preference Learning Algorithms Do Not Learn
    Preference Rankings). Perplexity is over all tokens of the chosen answers. Intervals resample pairs.
    """
    metrics: dict[str, Estimate] = {}
    if label != REFERENCE:
        margins = held_out.margins(label)
        metrics |= {
            "preference_accuracy": accuracy(margins),
            "mean_margin": bootstrap(mean, [margins], seed),
            "median_margin": bootstrap(_median, [margins], seed),
        }
    chosen = held_out.logps[label][:, 0]
    return metrics | {
        "ranking_accuracy": accuracy(held_out.lead(label)),
        "perplexity_chosen": bootstrap(_perplexity, [chosen, held_out.chosen_tokens], seed),
    }


def kl_metrics(samples: Samples, reference: Array, seed: int) -> dict[str, Estimate]:
    """KL(π‖π_ref) as the mean log-ratio on the policy's own samples, per token and per answer, in nats.

    Intervals resample prompts.

    Args:
        reference: (k, 2) the reference's log-probs of the samples, in nats
    """
    if not samples.pairs:
        return {}
    log_ratio = (samples.logps - reference).sum(1)
    lengths = np.array([len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in samples.pairs], float)
    return {
        "kl_per_token": bootstrap(_ratio, [log_ratio, lengths], seed),
        "kl_per_sequence": bootstrap(mean, [log_ratio / 2], seed),
    }


def differences(held_out: HeldOut, label: str, other: str, seed: int) -> dict[str, Estimate]:
    """One model's metrics minus another's on the same pairs; intervals resample pairs.

    `p` is that of the exact McNemar test, on the pairs that only one of the models gets right; for margins, in whose
    difference the reference cancels, it is that of the Wilcoxon signed-rank test.
    """
    lead, other_lead = held_out.lead(label), held_out.lead(other)
    chosen, other_chosen = held_out.logps[label][:, 0], held_out.logps[other][:, 0]
    found: dict[str, Estimate] = {}
    if other != REFERENCE:
        found["preference_accuracy"] = _accuracy_difference(held_out.margins(label), held_out.margins(other), seed)
    return found | {
        "mean_margin": bootstrap(mean, [lead - other_lead], seed) | {"p": wilcoxon(lead - other_lead)},
        "ranking_accuracy": _accuracy_difference(lead, other_lead, seed),
        "perplexity_chosen": bootstrap(_perplexity_difference, [chosen, other_chosen, held_out.chosen_tokens], seed),
    }


def _accuracy_difference(leads: Array, other: Array, seed: int) -> Estimate:
    scores = (np.sign(leads) - np.sign(other)) / 2  # right 1, tie ½, wrong 0, as `accuracy` counts
    return bootstrap(mean, [scores], seed) | {"p": mcnemar(leads > 0, other > 0)}


def mcnemar(right: Array, other: Array) -> float:
    """p of the exact McNemar test: two models, each right or not on the same pairs, (n,), are right equally often."""
    from statsmodels.stats.contingency_tables import mcnemar as test

    table = [[(right & other).sum(), (right & ~other).sum()], [(~right & other).sum(), (~right & ~other).sum()]]
    return float(test(table, exact=True).pvalue)


def wilcoxon(differences: Array) -> float:
    """p of the Wilcoxon signed-rank test that (n,) `differences` are symmetric about 0, zeros ranked (Pratt 1959)."""
    from scipy import stats

    if not differences.any():
        return 1.0
    return float(stats.wilcoxon(differences, zero_method="pratt").pvalue)


def breakdown(held_out: HeldOut, seed: int) -> dict[str, list[dict[str, Any]]]:
    """The policies' metrics by tercile of the length difference and, if there are several sources, by source."""
    policies = [label for label in held_out.logps if label != REFERENCE]

    def group(name: str, rows: Array) -> dict[str, Any]:
        part = held_out.part(rows)
        return {
            "name": name,
            "n": len(rows),
            "tokens": [int(part.length_difference.min()), int(part.length_difference.max())],
            "models": {label: pair_metrics(part, label, seed) for label in policies},
        }

    terciles = length_terciles(held_out.length_difference)
    sources = {str(name): np.flatnonzero(held_out.sources == name) for name in np.unique(held_out.sources)}
    return {
        "length_difference": [group(name, rows) for name, rows in terciles.items() if len(rows)],
        "source": [group(name, rows) for name, rows in sources.items() if len(sources) > 1],
    }


def summarize(held_out: HeldOut, kl: Mapping[str, dict[str, Estimate]], seed: int) -> dict[str, Any]:
    """`models`: the metrics of each, with its KL; `differences` of every two models; and the `breakdown`."""
    return {
        "models": {label: pair_metrics(held_out, label, seed) | kl.get(label, {}) for label in held_out.logps},
        "differences": [
            {"model": label, "other": other, "metrics": differences(held_out, label, other, seed)}
            for other, label in itertools.combinations(held_out.logps, 2)
        ],
        "breakdown": breakdown(held_out, seed),
    }


def evaluate(options: EvaluateOptions, text: Any, pairs: Sequence[Row]) -> dict[str, Any]:
    """Score the same pairs with every model, write `output_file` and its tables, and return the file's content.

    One model is in memory at a time. The reference comes last: it scores the pairs and every policy's samples.
    """
    check_models([*options.policies.values(), options.reference_model])
    from tandem.data.adapt import day_of_models
    from tandem.models.load import check_model, load_tokenizer
    from tandem.options.model import ModelOptions

    for name in (*options.policies.values(), options.reference_model):
        check_model(name)
    options.day = day_of_models(options.policies.values())
    tokenizer = load_tokenizer(ModelOptions(model_name_or_path=options.reference_model), options)
    pairs = pairs[: options.max_eval_samples]
    tokenized = _tokenized(options, text, pairs, tokenizer)
    kept = [index for index, pair in enumerate(tokenized) if len(pair["prompt_ids"]) < text.limit]
    if not kept:
        raise UserError(f"--max_length {text.max_length}: no held-out pair keeps any of its answers")
    fitting = [tokenized[index] for index in kept]

    dtype = common_dtype(options)
    logps: dict[str, Array] = {REFERENCE: np.empty(0)}  # scored last, shown first
    samples = {}
    for label, name in options.policies.items():
        logps[label], samples[label] = _score_policy(_scorer(name, options, dtype), label, fitting, options, text)
    reference = _scorer(options.reference_model, options, dtype)
    logps[REFERENCE] = reference.pair_logps(fitting, text.max_length, "reference")
    held_out = HeldOut(
        logps,
        chosen_tokens=np.array(
            [min(len(pair["chosen_ids"]), text.limit - len(pair["prompt_ids"])) for pair in fitting], float
        ),
        length_difference=np.array([len(pair["chosen_ids"]) - len(pair["rejected_ids"]) for pair in fitting]),
        sources=np.array([pairs[index]["source"] for index in kept]),
    )
    kl = {
        label: kl_metrics(answers, reference.pair_logps(answers.pairs, None, f"samples of {label}"), options.eval_seed)
        for label, answers in samples.items()
    }
    results = {
        **summarize(held_out, kl, options.eval_seed),
        "reference": options.reference_model,
        "paths": options.policies,
        "dtype": dtype,
        "n_pairs": len(fitting),
        "n_dropped": len(tokenized) - len(fitting),
    }
    _write(options, results)
    return results


def _tokenized(options: EvaluateOptions, text: Any, pairs: Sequence[Row], tokenizer: Any) -> list[dict[str, list[int]]]:
    from tandem.data.content import tokenizer_content
    from tandem.data.pairs import WholePairMaker
    from tandem.data.prepare import HELD_OUT, Rows, prepare, rows_of

    maker, tokens = WholePairMaker(tokenizer, text.use_chat_template), tokenizer_content(tokenizer)
    settings = None if tokens is None else [tokens, type(maker).__name__, maker.settings()]
    prepared = prepare(Rows(lambda: {HELD_OUT: list(pairs)}, lambda: None), maker, settings, options)
    rows = rows_of(prepared.tables[HELD_OUT])
    return [{name: ids for name, ids in row.items() if isinstance(ids, list)} for row in rows]


def _write(options: EvaluateOptions, results: Mapping[str, Any]) -> None:
    if ranks.is_first():
        write_json(Path(options.output_file), results)
        write_atomic(Path(options.output_file).with_suffix(".md"), to_markdown(results) + "\n")


def add_benchmarks(options: EvaluateOptions, asked: BenchmarkOptions, results: Mapping[str, Any]) -> dict[str, Any]:
    """Run the tasks on the reference and the policies, and write the file of `evaluate` again, with `benchmarks`."""

    def loads(name: str) -> Any:
        def load() -> tuple[Any, Any]:
            scorer = _scorer(name, options, str(results["dtype"]))
            return scorer.model, scorer.tokenizer

        return load

    models = {REFERENCE: loads(options.reference_model)} | {
        label: loads(name) for label, name in options.policies.items()
    }
    more = {**results, "benchmarks": run_benchmarks(asked, models, options.eval_batch_size)}
    _write(options, more)
    return more


def common_dtype(options: EvaluateOptions) -> str:
    """The type that all models are held in: if only one were rounded, it would look like a difference between them."""
    from tandem.devices import has_accelerator
    from tandem.models.configuration import stored_dtype

    if options.eval_dtype != "auto":
        return options.eval_dtype
    if not has_accelerator():
        return "float32"
    stored = {stored_dtype(name) for name in (options.reference_model, *options.policies.values())}
    return stored.pop() if len(stored) == 1 else "float32"


def _scorer(name: str, options: EvaluateOptions, dtype: str) -> Any:
    from tandem.models.scorer import load_scorer

    return load_scorer(name, dtype, batch_size=options.eval_batch_size, bf16=options.eval_bf16)


def _score_policy(
    scorer: Any, label: str, pairs: list[dict[str, list[int]]], options: EvaluateOptions, text: Any
) -> tuple[Array, Samples]:
    from tandem.models.sampling import Sampling, draw_seed

    logps = scorer.pair_logps(pairs, text.max_length, label)
    prompts = list(dict.fromkeys(tuple(pair["prompt_ids"]) for pair in pairs))[: options.kl_prompts]
    prompts.sort(key=len)  # batches of prompts of similar length have less padding
    own = Sampling(options.kl_max_new_tokens, temperature=1.0, top_p=1.0)
    size = max(1, scorer.rows_at_a_time(max(map(len, prompts), default=1), own.max_new_tokens) // 2)

    def sample(batch: list[tuple[int, ...]]) -> list[dict[str, list[int]]]:
        seeds = [draw_seed(options.eval_seed, str(prompt), number) for number in range(2) for prompt in batch]
        answers = scorer.draw([list(prompt) for prompt in batch] * 2, own, seeds)
        return [
            {"prompt_ids": list(prompt), "chosen_ids": first, "rejected_ids": second}
            for prompt, first, second in zip(batch, answers, answers[len(batch) :], strict=False)
        ]

    batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    samples = list(itertools.chain.from_iterable(ranks.in_turns(batches, sample)))
    return logps, Samples(samples, scorer.pair_logps(samples, None, f"samples of {label}"))
