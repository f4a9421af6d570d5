"""Held-out metrics of each model against one reference, with intervals."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tandem.config import REQUIRED, opt
from tandem.data.formats import Row
from tandem.errors import UserError
from tandem.runs import write_json

Estimate = dict[str, float | int | None]


@dataclass
class EvaluateOptions:
    """Evaluate."""

    reference_model: str = opt(REQUIRED, "model that implicit rewards and KL are measured against")
    sft_model: str | None = opt(None, "model or adapter folder of the SFT policy")
    dpo_model: str | None = opt(None, "model or adapter folder of the DPO policy")
    output_file: str = opt("results.json", "where the numbers go")
    eval_batch_size: int = opt(8, "pairs per batch")
    max_eval_samples: int | None = opt(None, "use the first N held-out pairs")
    kl_prompts: int = opt(32, "held-out prompts that each policy answers twice to estimate its KL; 0: none")
    kl_max_new_tokens: int = opt(64, "longest of these answers")
    eval_seed: int = opt(42, "seed of these answers and of the bootstrap")
    eval_bf16: bool | None = opt(None, "bfloat16 autocast; unset: where the device multiplies it fast")

    def __post_init__(self) -> None:
        if not self.models:
            raise UserError("nothing to evaluate: give --sft_model, --dpo_model or both")
        for name, low in {"eval_batch_size": 1, "max_eval_samples": 1, "kl_prompts": 0, "kl_max_new_tokens": 1}.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise UserError(f"--{name} must be at least {low}, not {value}")
        if Path(self.output_file).suffix != ".json":
            raise UserError(f"--output_file {self.output_file}: must end in .json")

    @property
    def models(self) -> dict[str, str]:
        """Models to evaluate, by label."""
        named = {"sft": self.sft_model, "dpo": self.dpo_model}
        return {label: name for label, name in named.items() if name is not None}


@dataclass(frozen=True)
class PairScores:
    """One model's log-probs on the held-out pairs, and of its own samples.

    `logps`: (n, 2) nats, summed over the completion, chosen then rejected. `samples`: token ids of its own answers,
    two to each KL prompt, as pairs; `sample_logps`: (k, 2) of these.
    """

    logps: np.ndarray
    samples: list[dict[str, list[int]]]
    sample_logps: np.ndarray


def preference_accuracy(margins: np.ndarray) -> Estimate:
    """Share of pairs with a positive margin, ties as ½, with Wilson's 95% interval on n pairs."""
    from statsmodels.stats.proportion import proportion_confint

    wins = float((margins > 0).sum() + 0.5 * (margins == 0).sum())
    low, high = proportion_confint(wins, len(margins), method="wilson")
    return _estimate(wins / len(margins), low, high, len(margins))


def bootstrap(statistic: Callable[..., Any], samples: Sequence[np.ndarray], seed: int) -> Estimate:
    """`statistic` of paired `samples`, (n,) each, with a BCa bootstrap 95% interval; none below two units.

    Units that are all alike have an interval of no width, where BCa itself is undefined.
    """
    from scipy import stats

    value, count = float(statistic(*samples, axis=-1)), len(samples[0])
    if count < 2:
        return _estimate(value, None, None, count)
    if all(np.ptp(sample) == 0 for sample in samples):
        return _estimate(value, value, value, count)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of BCa on nearly constant data, for which see below
        result = stats.bootstrap(
            samples, statistic, paired=True, vectorized=True, n_resamples=2000, rng=np.random.default_rng(seed)
        )
    low, high = result.confidence_interval
    if not np.isfinite([low, high]).all():  # BCa fails on some nearly constant data; the percentile interval does not
        low, high = np.quantile(result.bootstrap_distribution, [0.025, 0.975])
    return _estimate(value, float(low), float(high), count)


def _estimate(value: float, low: float | None, high: float | None, n: int) -> Estimate:
    return {"value": float(value), "low": None if low is None else float(low), "high": high, "n": n}


def _mean(values: np.ndarray, axis: int) -> Any:
    return values.mean(axis)


def _ratio(sums: np.ndarray, counts: np.ndarray, axis: int) -> Any:
    return sums.sum(axis) / counts.sum(axis)


def _perplexity(logps: np.ndarray, counts: np.ndarray, axis: int) -> Any:
    return np.exp(-logps.sum(axis) / counts.sum(axis))


def _median(values: np.ndarray, axis: int) -> Any:
    return np.median(values, axis)


def summarize(
    policy: PairScores, reference: np.ndarray, reference_on_samples: np.ndarray, chosen_tokens: np.ndarray, seed: int
) -> dict[str, Estimate]:
    """The metrics of one policy.

    With M = (log π(y_w|x) − log π(y_l|x)) − (log π_ref(y_w|x) − log π_ref(y_l|x)) (Rafailov et al. 2023, Eq. 5, up
    to β): accuracy is the share M > 0; perplexity is over all chosen tokens; KL(π‖π_ref) is estimated on the policy's
    own samples by the mean log-ratio, per sequence (nats) and per token. Intervals resample pairs (KL: prompts).

    Args:
        policy: scores of the policy.
        reference: (n, 2) the reference's log-probs of the same pairs.
        reference_on_samples: (k, 2) the reference's log-probs of the policy's samples.
        chosen_tokens: (n,) tokens of each chosen completion.
        seed: of the bootstrap.
    """
    margins = (policy.logps[:, 0] - policy.logps[:, 1]) - (reference[:, 0] - reference[:, 1])
    metrics = {
        "preference_accuracy": preference_accuracy(margins),
        "mean_margin": bootstrap(_mean, [margins], seed),
        "median_margin": bootstrap(_median, [margins], seed),
        "perplexity_chosen": bootstrap(_perplexity, [policy.logps[:, 0], chosen_tokens], seed),
    }
    if len(policy.samples):
        log_ratio = (policy.sample_logps - reference_on_samples).sum(1)
        lengths = np.array([len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in policy.samples], float)
        metrics["kl_per_token"] = bootstrap(_ratio, [log_ratio, lengths], seed)
        metrics["kl_per_sequence"] = bootstrap(_mean, [log_ratio / 2], seed)
    return metrics


def evaluate(options: EvaluateOptions, text: Any, pairs: Sequence[Row]) -> dict[str, Any]:
    """Score every model on the same pairs, write `output_file` and return what it holds.

    One model is in memory at a time; the reference, last, scores the pairs and every policy's samples.
    """
    from tandem.data.texts import render, tokenize_pair
    from tandem.models import load_tokenizer
    from tandem.options import ModelOptions

    tokenizer = load_tokenizer(ModelOptions(model_name_or_path=options.reference_model))
    rows = [render(pair, text.use_chat_template) for pair in pairs[: options.max_eval_samples]]
    tokenized = [tokenize_pair(row, tokenizer) for row in rows]
    fitting = [pair for pair in tokenized if len(pair["prompt_ids"]) < text.max_length]
    if not fitting:
        raise UserError(f"--max_length {text.max_length}: no held-out pair keeps any of its answers")
    chosen_tokens = np.array(
        [min(len(pair["chosen_ids"]), text.max_length - len(pair["prompt_ids"])) for pair in fitting], float
    )

    policies = {
        label: _score_policy(name, label, fitting, options, text.max_length) for label, name in options.models.items()
    }
    reference = _scorer(options.reference_model, options)
    reference_logps = reference.pair_logps(fitting, text.max_length, "reference")
    results = {
        "models": {
            label: summarize(
                policy,
                reference_logps,
                reference.pair_logps(policy.samples, None, f"samples of {label}"),
                chosen_tokens,
                options.eval_seed,
            )
            for label, policy in policies.items()
        },
        "reference": options.reference_model,
        "paths": options.models,
        "n_pairs": len(fitting),
        "n_dropped": len(tokenized) - len(fitting),
    }
    write_json(Path(options.output_file), results)
    return results


def _scorer(name: str, options: EvaluateOptions) -> Any:
    from tandem.models import load_model, load_tokenizer
    from tandem.options import ModelOptions
    from tandem.scoring import Scorer

    source = ModelOptions(model_name_or_path=name)
    return Scorer(
        load_model(source), load_tokenizer(source), batch_size=options.eval_batch_size, bf16=options.eval_bf16
    )


def _score_policy(
    name: str, label: str, pairs: list[dict[str, list[int]]], options: EvaluateOptions, max_length: int
) -> PairScores:
    from tandem.sampling import Sampling

    scorer = _scorer(name, options)
    logps = scorer.pair_logps(pairs, max_length, label)
    prompts = list(dict.fromkeys(tuple(pair["prompt_ids"]) for pair in pairs))[: options.kl_prompts]
    prompts.sort(key=len)  # prompts of like length together: less padding
    own = Sampling(options.kl_max_new_tokens, temperature=1.0, top_p=1.0)
    samples = []
    for start in range(0, len(prompts), options.eval_batch_size):
        batch = [list(prompt) for prompt in prompts[start : start + options.eval_batch_size]]
        answers = scorer.sample(batch * 2, own, options.eval_seed + start)
        samples += [
            {"prompt_ids": prompt, "chosen_ids": first, "rejected_ids": second}
            for prompt, first, second in zip(batch, answers, answers[len(batch) :], strict=False)
        ]
    return PairScores(logps, samples, scorer.pair_logps(samples, None, f"samples of {label}"))


def to_markdown(results: dict[str, Any]) -> str:
    """The metrics as a Markdown table, a model a column."""
    labels = list(results["models"])
    names = list(next(iter(results["models"].values())))
    lines = [
        f"| {results['n_pairs']} held-out pairs | " + " | ".join(labels) + " |",
        "|---" * (len(labels) + 1) + "|",
    ]
    for name in names:
        cells = [_cell(results["models"][label][name]) for label in labels]
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(estimate: Estimate) -> str:
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    if low is None or high is None:
        return f"{value:.3f}"
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"
