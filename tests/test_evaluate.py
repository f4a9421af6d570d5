import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tandem.data.options import DataOptions
from tandem.data.sources import load_pairs
from tandem.data.texts import render, tokenize_pair
from tandem.errors import UserError
from tandem.evaluate import (
    EvaluateOptions,
    PairScores,
    _mean,
    _median,
    _ratio,
    bootstrap,
    evaluate,
    preference_accuracy,
    summarize,
    to_markdown,
)
from tandem.options import TextOptions
from tests import tiny


def wilson(wins: float, n: int) -> tuple[float, float]:
    """Wilson 1927, with the 97.5% point of the normal distribution."""
    z, p = 1.959963984540054, wins / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return centre - half, centre + half


def test_accuracy_counts_ties_as_half():
    estimate = preference_accuracy(np.array([1.0, -1.0, 0.0, 2.0]))
    assert estimate["value"] == 2.5 / 4
    assert estimate["n"] == 4
    assert (estimate["low"], estimate["high"]) == pytest.approx(wilson(2.5, 4))


def test_wilson_of_eight_in_ten():
    """0.4902–0.9433, as in Agresti & Coull 1998 for 8 of 10."""
    estimate = preference_accuracy(np.array([1.0] * 8 + [-1.0] * 2))
    assert (estimate["low"], estimate["high"]) == pytest.approx((0.49016, 0.94331), abs=1e-5)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_accuracy_at_its_ends_keeps_an_interval(sign: float):
    estimate = preference_accuracy(np.full(10, sign))
    low, high = (estimate["low"], estimate["high"])
    assert estimate["value"] == (sign > 0)
    assert (high - low) == pytest.approx(1 / (1 + 10 / 1.959963984540054**2), rel=1e-6)  # z²/(n + z²)


def test_bootstrap_of_one_unit_and_of_equal_units():
    assert bootstrap(_mean, [np.array([3.0])], 0) == {"value": 3.0, "low": None, "high": None, "n": 1}
    assert bootstrap(_mean, [np.full(5, 3.0)], 0) == {"value": 3.0, "low": 3.0, "high": 3.0, "n": 5}


def test_bootstrap_of_a_ratio_that_is_always_the_same():
    """Every resample gives 2: BCa divides by zero, the percentile interval has no width."""
    counts = np.array([1.0, 2.0, 3.0, 7.0])
    estimate = bootstrap(_ratio, [2 * counts, counts], 0)
    assert (estimate["value"], estimate["low"], estimate["high"]) == pytest.approx((2, 2, 2))


@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0, 0.0, 9.0], [0.0, 0.0, 0.0, 1e-300], [1.0, 2.0]])
def test_bootstrap_of_nearly_constant_values_is_finite(values: list[float]):
    for statistic in (_mean, _median):
        estimate = bootstrap(statistic, [np.array(values)], 0)
        assert min(values) <= estimate["low"] <= estimate["high"] <= max(values)


def test_bootstrap_covers_the_mean_about_as_often_as_it_says():
    """Of 200 samples of 40 exponential values with mean 1, about 95% of the intervals hold 1 (skew costs a little)."""
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        estimate = bootstrap(_mean, [rng.exponential(size=40)], seed)
        covered += estimate["low"] <= 1 <= estimate["high"]
    assert 0.88 <= covered / 200 <= 0.99


def test_bootstrap_is_a_function_of_its_seed():
    values = np.random.default_rng(0).normal(size=30)
    assert bootstrap(_mean, [values], 1) == bootstrap(_mean, [values], 1)
    assert bootstrap(_mean, [values], 1) != bootstrap(_mean, [values], 2)


def ids(count: int) -> list[int]:
    return [0] * count


def test_metrics_by_hand():
    policy = PairScores(
        logps=np.array([[-1.0, -4.0], [-2.0, -2.0], [-6.0, -3.0]]),
        samples=[
            {"prompt_ids": ids(1), "chosen_ids": ids(2), "rejected_ids": ids(3)},
            {"prompt_ids": ids(1), "chosen_ids": ids(5), "rejected_ids": ids(5)},
        ],
        sample_logps=np.array([[-1.0, -2.0], [-3.0, -4.0]]),
    )
    reference = np.array([[-2.0, -3.0], [-2.0, -2.0], [-4.0, -4.0]])
    on_samples = np.array([[-2.0, -3.0], [-4.0, -9.0]])
    metrics = summarize(policy, reference, on_samples, np.array([2.0, 3.0, 4.0]), seed=0)
    # margins: (3 - 1), (0 - 0), (-3 - 0)
    assert metrics["preference_accuracy"]["value"] == 1.5 / 3
    assert metrics["mean_margin"]["value"] == pytest.approx(-1 / 3)
    assert metrics["median_margin"]["value"] == 0
    assert metrics["perplexity_chosen"]["value"] == pytest.approx(math.exp((1 + 2 + 6) / (2 + 3 + 4)))
    # log-ratios of the four samples: 1, 1, 1, 5, over 2 + 3 + 5 + 5 tokens
    assert metrics["kl_per_sequence"]["value"] == pytest.approx(8 / 4)
    assert metrics["kl_per_token"]["value"] == pytest.approx(8 / 15)
    assert metrics["kl_per_token"]["n"] == 2
    assert {name: metric["n"] for name, metric in metrics.items() if "kl" not in name} == dict.fromkeys(
        ["preference_accuracy", "mean_margin", "median_margin", "perplexity_chosen"], 3
    )


def test_no_kl_without_samples():
    scores = PairScores(np.zeros((2, 2)), [], np.empty((0, 2)))
    assert not any("kl" in name for name in summarize(scores, np.zeros((2, 2)), np.empty((0, 2)), np.ones(2), 0))


def options(tmp_path: Path, reference: Path, dpo: Path, **changes: Any) -> EvaluateOptions:
    given: dict[str, Any] = {
        "reference_model": str(reference),
        "dpo_model": str(dpo),
        "output_file": str(tmp_path / "results.json"),
        "eval_batch_size": 3,
        "kl_prompts": 4,
        "kl_max_new_tokens": 8,
        "eval_bf16": False,
    }
    return EvaluateOptions(**given | changes)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("models") / "other", seed=1)


def held_out(tiny_data: Path) -> list[dict[str, Any]]:
    return load_pairs(DataOptions(str(tiny_data)), "test")


def test_a_model_against_itself(tmp_path: Path, tiny_model: Path, tiny_data: Path):
    results = evaluate(options(tmp_path, tiny_model, tiny_model), TextOptions(), held_out(tiny_data))
    metrics = results["models"]["dpo"]
    assert metrics["preference_accuracy"]["value"] == 0.5  # all ties
    assert metrics["mean_margin"] == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 8}
    assert metrics["kl_per_token"] == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 4}
    assert metrics["kl_per_sequence"]["value"] == 0.0
    assert json.loads((tmp_path / "results.json").read_text()) == results


def logp(model: Any, prompt: list[int], answer: list[int]) -> float:
    """Of one answer, by itself, without any of our code."""
    with torch.no_grad():
        scores = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    positions = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return sum(float(scores[position, token]) for position, token in zip(positions, answer, strict=True))


def test_two_models_against_plain_forwards(tmp_path: Path, tiny_model: Path, other_model: Path, tiny_data: Path):
    """Margins and perplexity recomputed a pair at a time, with truncation to 22 tokens."""
    text, pairs = TextOptions(max_length=22), held_out(tiny_data)
    results = evaluate(options(tmp_path, tiny_model, other_model, sft_model=str(tiny_model)), text, pairs)
    assert list(results["models"]) == ["sft", "dpo"]
    policy, reference = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (other_model, tiny_model))
    tokenized = [tokenize_pair(render(pair, True), tiny.tokenizer()) for pair in pairs]
    fitting = [pair for pair in tokenized if len(pair["prompt_ids"]) < 22]
    assert 0 < len(fitting) < len(pairs)
    assert (results["n_pairs"], results["n_dropped"]) == (len(fitting), len(pairs) - len(fitting))
    margins, chosen_logp, chosen_tokens, cut = [], 0.0, 0, 0
    for pair in fitting:
        prompt = pair["prompt_ids"]
        chosen, rejected = (pair[side][: 22 - len(prompt)] for side in ("chosen_ids", "rejected_ids"))
        cut += len(rejected) < len(pair["rejected_ids"])
        scores = [[logp(model, prompt, answer) for answer in (chosen, rejected)] for model in (policy, reference)]
        margins.append(scores[0][0] - scores[0][1] - scores[1][0] + scores[1][1])
        chosen_logp += scores[0][0]
        chosen_tokens += len(chosen)
    assert cut
    metrics = results["models"]["dpo"]
    assert metrics["mean_margin"]["value"] == pytest.approx(np.mean(margins), abs=1e-4)
    assert metrics["median_margin"]["value"] == pytest.approx(np.median(margins), abs=1e-4)
    assert metrics["preference_accuracy"]["value"] == np.mean(np.array(margins) > 0)
    assert metrics["perplexity_chosen"]["value"] == pytest.approx(math.exp(-chosen_logp / chosen_tokens), rel=1e-5)
    assert metrics["kl_per_sequence"]["n"] == 4


def test_kl_is_estimated_on_samples_of_the_policy_itself(
    tmp_path: Path, tiny_model: Path, other_model: Path, tiny_data: Path
):
    """A repetition penalty that the model ships would draw answers from another distribution: it must not matter."""
    penalised = shutil.copytree(other_model, tmp_path / "penalised")
    generation = json.loads((penalised / "generation_config.json").read_text())
    generation |= {"repetition_penalty": 50.0, "do_sample": True, "top_k": 2}
    (penalised / "generation_config.json").write_text(json.dumps(generation))
    plain, with_penalty = (
        evaluate(options(tmp_path, tiny_model, path), TextOptions(), held_out(tiny_data))["models"]["dpo"]
        for path in (other_model, penalised)
    )
    assert plain == with_penalty


def test_a_model_of_nothing_but_nan_has_no_accuracy(tmp_path: Path, tiny_model: Path, tiny_data: Path):
    broken = AutoModelForCausalLM.from_pretrained(tiny_model)
    broken.model.norm.weight.data[:] = math.nan
    folder = shutil.copytree(tiny_model, tmp_path / "broken")
    broken.save_pretrained(folder)
    with pytest.raises(UserError, match=f"^{folder}: its log-probabilities are not finite"):
        evaluate(options(tmp_path, tiny_model, folder), TextOptions(), held_out(tiny_data))
    assert not (tmp_path / "results.json").exists()


def test_nothing_fits(tmp_path: Path, tiny_model: Path, tiny_data: Path):
    with pytest.raises(UserError, match="--max_length 4: no held-out pair keeps any of its answers"):
        evaluate(options(tmp_path, tiny_model, tiny_model), TextOptions(max_length=4), held_out(tiny_data))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "nothing to evaluate: give --sft_model, --dpo_model or both"),
        ({"dpo_model": "d", "eval_batch_size": 0}, "--eval_batch_size must be at least 1, not 0"),
        ({"dpo_model": "d", "max_eval_samples": -1}, "--max_eval_samples must be at least 1, not -1"),
        ({"dpo_model": "d", "kl_prompts": -1}, "--kl_prompts must be at least 0, not -1"),
        ({"dpo_model": "d", "output_file": "out"}, "--output_file out: must end in .json"),
    ],
)
def test_refusals(given: dict[str, Any], message: str):
    with pytest.raises(UserError) as error:
        EvaluateOptions(reference_model="r", **given)
    assert str(error.value) == message


def test_table():
    estimate = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 4}
    point = {"value": 0.5, "low": None, "high": None, "n": 1}
    results = {"n_pairs": 4, "models": {"sft": {"mean_margin": point}, "dpo": {"mean_margin": estimate}}}
    assert to_markdown(results) == (
        "| 4 held-out pairs | sft | dpo |\n|---|---|---|\n| mean margin | 0.500 | 0.500 [0.250, 0.750] |"
    )
