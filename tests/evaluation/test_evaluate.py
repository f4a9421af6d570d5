import json
import math
import shutil
from dataclasses import replace
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
from tandem.evaluation.evaluate import (
    EvaluateOptions,
    HeldOut,
    Samples,
    accuracy,
    breakdown,
    common_dtype,
    differences,
    evaluate,
    kl_metrics,
    mcnemar,
    pair_metrics,
    summarize,
    to_markdown,
    wilcoxon,
)
from tandem.options.model import TextOptions
from tests import tiny


def wilson(wins: float, n: int) -> tuple[float, float]:
    """Wilson 1927, with the 97.5% point of the normal distribution."""
    z, p = 1.959963984540054, wins / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return centre - half, centre + half


def test_accuracy_counts_ties_as_half():
    estimate = accuracy(np.array([1.0, -1.0, 0.0, 2.0]))
    assert estimate["value"] == 2.5 / 4
    assert estimate["n"] == 4
    assert (estimate["low"], estimate["high"]) == pytest.approx(wilson(2.5, 4))


def test_wilson_of_eight_in_ten():
    """0.4902–0.9433, as in Agresti & Coull 1998 for 8 of 10."""
    estimate = accuracy(np.array([1.0] * 8 + [-1.0] * 2))
    assert (estimate["low"], estimate["high"]) == pytest.approx((0.49016, 0.94331), abs=1e-5)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_accuracy_at_its_ends_keeps_an_interval(sign: float):
    estimate = accuracy(np.full(10, sign))
    low, high = (estimate["low"], estimate["high"])
    assert estimate["value"] == (sign > 0)
    assert (high - low) == pytest.approx(1 / (1 + 10 / 1.959963984540054**2), rel=1e-6)  # z²/(n + z²)


def held_out(**logps: Any) -> HeldOut:
    """Three pairs; lengths of chosen 2, 3 and 4, longer than rejected by -5, 0 and 7."""
    return HeldOut(
        {label: np.array(values, float) for label, values in logps.items()},
        chosen_tokens=np.array([2.0, 3.0, 4.0]),
        length_difference=np.array([-5, 0, 7]),
        sources=np.array(["x", "x", "y|z"]),
    )


BASE = [[-2, -3], [-2, -2], [-4, -4]]
DPO = [[-1, -4], [-2, -2], [-6, -3]]


def test_pair_metrics_by_hand():
    metrics = pair_metrics(held_out(base=BASE, dpo=DPO), "dpo", seed=0)
    # leads: 3, 0, -3; margins: 3 - 1, 0 - 0, -3 - 0
    assert metrics["preference_accuracy"]["value"] == 1.5 / 3
    assert metrics["ranking_accuracy"]["value"] == 1.5 / 3
    assert metrics["mean_margin"]["value"] == pytest.approx(-1 / 3)
    assert metrics["median_margin"]["value"] == 0
    assert metrics["perplexity_chosen"]["value"] == pytest.approx(math.exp((1 + 2 + 6) / (2 + 3 + 4)))
    for name, metric in metrics.items():
        assert metric["low"] < metric["value"] < metric["high"], name
        assert metric["n"] == 3


def test_the_reference_has_what_needs_no_reference():
    metrics = pair_metrics(held_out(base=BASE, dpo=DPO), "base", seed=0)
    assert list(metrics) == ["ranking_accuracy", "perplexity_chosen"]
    assert metrics["ranking_accuracy"]["value"] == (1 + 0.5 + 0.5) / 3
    assert metrics["perplexity_chosen"]["value"] == pytest.approx(math.exp(8 / 9))


def test_kl_by_hand():
    pairs = [
        {"prompt_ids": [0], "chosen_ids": [0] * 2, "rejected_ids": [0] * 3},
        {"prompt_ids": [0], "chosen_ids": [0] * 5, "rejected_ids": [0] * 5},
    ]
    samples = Samples(pairs, np.array([[-1.0, -2.0], [-3.0, -4.0]]))
    metrics = kl_metrics(samples, np.array([[-2.0, -3.0], [-4.0, -9.0]]), seed=0)
    # log-ratios of the four samples: 1, 1, 1, 5, over 2 + 3 + 5 + 5 tokens
    assert metrics["kl_per_sequence"]["value"] == pytest.approx(8 / 4)
    assert metrics["kl_per_token"]["value"] == pytest.approx(8 / 15)
    assert {metric["n"] for metric in metrics.values()} == {2}
    assert kl_metrics(Samples([], np.empty((0, 2))), np.empty((0, 2)), seed=0) == {}


def test_differences_by_hand():
    scores = held_out(base=BASE, sft=[[-3, -3], [-2, -3], [-5, -6]], dpo=DPO)
    found = differences(scores, "dpo", "sft", seed=0)
    # leads of dpo: 3, 0, -3; of sft: 0, 1, 1; of base: 1, 0, 0; margins: 2, 0, -3 and -1, 1, 1
    assert found["mean_margin"]["value"] == pytest.approx((3 - 1 - 4) / 3)
    assert found["preference_accuracy"]["value"] == pytest.approx((1.5 - 2) / 3)
    assert found["ranking_accuracy"]["value"] == pytest.approx((1.5 - 2.5) / 3)
    assert found["perplexity_chosen"]["value"] == pytest.approx(math.exp(9 / 9) - math.exp(10 / 9))
    assert found["preference_accuracy"]["p"] == 1.0  # each alone right: 1 of dpo, 2 of sft, so 2 · (1 + 3) / 8
    assert "p" not in found["perplexity_chosen"]
    against_base = differences(scores, "dpo", "base", seed=0)
    assert against_base["mean_margin"]["value"] == pytest.approx(-1 / 3)
    assert "preference_accuracy" not in against_base


def test_a_difference_is_that_of_the_metrics():
    """With random scores: what `differences` says against what `pair_metrics` says of each model."""
    rng = np.random.default_rng(0)
    logps = {label: rng.normal(-20, 4, (40, 2)) for label in ("base", "sft", "dpo")}
    scores = HeldOut(logps, rng.integers(1, 9, 40).astype(float), rng.integers(-9, 9, 40), np.array(["x"] * 40))
    sft, dpo = (pair_metrics(scores, label, seed=0) for label in ("sft", "dpo"))
    for name, difference in differences(scores, "dpo", "sft", seed=0).items():
        assert difference["value"] == pytest.approx(dpo[name]["value"] - sft[name]["value"]), name
    back = differences(scores, "sft", "dpo", seed=0)
    for name, difference in differences(scores, "dpo", "sft", seed=0).items():
        assert difference.get("p") == pytest.approx(back[name].get("p"))


def test_mcnemar_by_hand():
    """Fisher's lady at 8 to 1: 2 · (C(9, 0) + C(9, 1)) / 2⁹; pairs that both or neither get right do not count."""
    right = np.array([True] * 8 + [False] + [True, False] * 5)
    other = np.array([False] * 8 + [True] + [True, False] * 5)
    assert mcnemar(right, other) == pytest.approx(2 * (1 + 9) / 2**9)
    assert mcnemar(right, right) == 1.0


def test_wilcoxon_by_hand():
    """All of 6 ranks are positive in 1 of 2⁶ sign patterns, two-sided 2 / 64."""
    assert wilcoxon(np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.5])) == pytest.approx(2 / 64)
    assert wilcoxon(np.zeros(5)) == 1.0


def test_paired_tests_keep_their_level():
    """Two equally good models on 60 pairs, 400 times: 5% are called different, by the exact McNemar test fewer."""
    rng = np.random.default_rng(1)
    called = {"mean_margin": 0, "ranking_accuracy": 0}
    for _ in range(400):
        logps = {label: rng.normal(-20, 4, (60, 2)) for label in ("base", "dpo")}
        lead, other = (values[:, 0] - values[:, 1] for values in logps.values())
        called["mean_margin"] += wilcoxon(lead - other) < 0.05
        called["ranking_accuracy"] += mcnemar(lead > 0, other > 0) < 0.05
    assert 8 <= called["mean_margin"] <= 34  # 20 expected, 3 standard deviations either way
    assert called["ranking_accuracy"] <= 34


def test_breakdown_by_hand():
    groups = breakdown(held_out(base=BASE, dpo=DPO), seed=0)
    by_length = groups["length_difference"]
    assert [(group["name"], group["n"], group["tokens"]) for group in by_length] == [
        ("rejected_longer", 1, [-5, -5]),
        ("similar", 1, [0, 0]),
        ("chosen_longer", 1, [7, 7]),
    ]
    assert [group["models"]["dpo"]["mean_margin"]["value"] for group in by_length] == [2, 0, -3]
    assert [group["models"]["dpo"]["preference_accuracy"]["value"] for group in by_length] == [1, 0.5, 0]
    assert [(group["name"], group["n"]) for group in groups["source"]] == [("x", 2), ("y|z", 1)]
    assert groups["source"][0]["models"]["dpo"]["mean_margin"]["value"] == 1
    assert list(by_length[0]["models"]) == ["dpo"]  # margins are against the base, which has none


def test_one_source_is_no_breakdown():
    scores = held_out(base=BASE, dpo=DPO).part(np.array([0, 1]))
    assert breakdown(scores, seed=0)["source"] == []


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


def pairs_of(tiny_data: Path) -> list[dict[str, Any]]:
    return load_pairs(DataOptions(str(tiny_data)), "test")


def test_a_model_against_itself(tmp_path: Path, tiny_model: Path, tiny_data: Path):
    results = evaluate(options(tmp_path, tiny_model, tiny_model), TextOptions(), pairs_of(tiny_data))
    metrics = results["models"]["dpo"]
    assert metrics["preference_accuracy"]["value"] == 0.5  # all ties
    for name, n in (("mean_margin", 8), ("kl_per_token", 4)):
        assert (metrics[name]["value"], metrics[name]["low"], metrics[name]["n"]) == (0.0, None, n)
    assert metrics["kl_per_sequence"]["value"] == 0.0
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert (tmp_path / "results.md").read_text() == to_markdown(results) + "\n"
    (difference,) = results["differences"]
    assert (difference["model"], difference["other"]) == ("dpo", "base")
    assert difference["metrics"]["mean_margin"]["p"] == difference["metrics"]["ranking_accuracy"]["p"] == 1.0


def logp(model: Any, prompt: list[int], answer: list[int]) -> float:
    """Of one answer, by itself, without any of our code."""
    with torch.no_grad():
        scores = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    positions = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return sum(float(scores[position, token]) for position, token in zip(positions, answer, strict=True))


def test_two_models_against_plain_forwards(tmp_path: Path, tiny_model: Path, other_model: Path, tiny_data: Path):
    """Margins and perplexity recomputed a pair at a time, with truncation to 22 tokens."""
    text, pairs = TextOptions(max_length=22), pairs_of(tiny_data)
    results = evaluate(options(tmp_path, tiny_model, other_model, sft_model=str(tiny_model)), text, pairs)
    assert list(results["models"]) == ["base", "sft", "dpo"]
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
    assert sum(group["n"] for group in results["breakdown"]["length_difference"]) == len(fitting)


def test_kl_is_estimated_on_samples_of_the_policy_itself(
    tmp_path: Path, tiny_model: Path, other_model: Path, tiny_data: Path
):
    """A repetition penalty that the model ships would draw answers from another distribution: it must not matter."""
    penalised = shutil.copytree(other_model, tmp_path / "penalised")
    generation = json.loads((penalised / "generation_config.json").read_text())
    generation |= {"repetition_penalty": 50.0, "do_sample": True, "top_k": 2}
    (penalised / "generation_config.json").write_text(json.dumps(generation))
    plain, with_penalty = (
        evaluate(options(tmp_path, tiny_model, path), TextOptions(), pairs_of(tiny_data))["models"]["dpo"]
        for path in (other_model, penalised)
    )
    assert plain == with_penalty


def test_a_model_of_nothing_but_nan_has_no_accuracy(tmp_path: Path, tiny_model: Path, tiny_data: Path):
    broken = AutoModelForCausalLM.from_pretrained(tiny_model)
    broken.model.norm.weight.data[:] = math.nan
    folder = shutil.copytree(tiny_model, tmp_path / "broken")
    broken.save_pretrained(folder)
    with pytest.raises(UserError, match=f"^{folder}: its log-probabilities are not finite"):
        evaluate(options(tmp_path, tiny_model, folder), TextOptions(), pairs_of(tiny_data))
    assert not (tmp_path / "results.json").exists()


def test_the_reference_is_looked_for_before_a_policy_is_scored(
    tmp_path: Path, tiny_model: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
):
    """It is loaded last."""
    monkeypatch.setattr("tandem.models.scorer.load_model", None)
    reference = shutil.copytree(tiny_model, tmp_path / "reference")
    (reference / "model.safetensors").unlink()
    with pytest.raises(UserError, match=f"^{reference}: has no weights"):
        evaluate(options(tmp_path, reference, tiny_model), TextOptions(), pairs_of(tiny_data))


def test_nothing_fits(tmp_path: Path, tiny_model: Path, tiny_data: Path):
    with pytest.raises(UserError, match="--max_length 4: no held-out pair keeps any of its answers"):
        evaluate(options(tmp_path, tiny_model, tiny_model), TextOptions(max_length=4), pairs_of(tiny_data))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "nothing to evaluate: give --sft_model, --dpo_model or both"),
        ({"dpo_model": "d", "eval_batch_size": 0}, "--eval_batch_size must be at least 1, not 0"),
        ({"dpo_model": "d", "max_eval_samples": -1}, "--max_eval_samples must be at least 1, not -1"),
        ({"dpo_model": "d", "kl_prompts": -1}, "--kl_prompts must not be negative, got -1"),
        ({"dpo_model": "d", "output_file": "out"}, "--output_file out: must end in .json"),
    ],
)
def test_refusals(given: dict[str, Any], message: str):
    with pytest.raises(UserError) as error:
        EvaluateOptions(reference_model="r", **given)
    assert str(error.value) == message


def test_tables():
    results = summarize(held_out(base=BASE, dpo=DPO), {}, seed=0) | {"n_pairs": 3}
    whole, differing, by_length, by_source = to_markdown(results).split("\n\n")
    assert whole.startswith(
        "| 3 held-out pairs | base | dpo |\n| --- | --- | --- |\n| preference accuracy | – | 0.500 ["
    )
    assert "| difference | dpo − base |\n" in differing and "| mean margin | -0.333 [" in differing
    assert ", p = 1 |" in differing
    assert by_length.splitlines()[0] == "| by length difference | pairs | accuracy, dpo | margin, dpo |"
    assert by_length.splitlines()[2].startswith("| rejected longer (-5 to -5 tokens) | 1 | 1.000 [")
    assert by_source.splitlines()[3].startswith("| y\\|z | 1 |")  # a source may be any file's name
    for table in (whole, differing, by_length, by_source):
        assert len({line.replace("\\|", "").count("|") for line in table.splitlines()}) == 1


@pytest.mark.parametrize(
    ("stored", "accelerator", "expected"),
    [
        (("bfloat16", "bfloat16"), True, "bfloat16"),
        (("bfloat16", "float32"), True, "float32"),
        (("bfloat16", "bfloat16"), False, "float32"),
    ],
)
def test_weights_are_held_as_they_are_stored_where_there_is_an_accelerator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: tuple[str, str], accelerator: bool, expected: str
):
    for name, dtype in zip(("reference", "policy"), stored, strict=True):
        tiny.save_model(tmp_path / name, dtype=dtype)
    monkeypatch.setattr("tandem.devices.has_accelerator", lambda: accelerator)
    given = options(tmp_path, tmp_path / "reference", tmp_path / "policy")
    assert common_dtype(given) == expected
    assert common_dtype(replace(given, eval_dtype="float16")) == "float16"


def test_weights_in_bfloat16_give_about_the_same_log_probs(
    tmp_path: Path, tiny_model: Path, other_model: Path, tiny_data: Path
):
    """Sums of log-probs are taken in float32 whatever the weights are held in."""
    exact, coarse = (
        evaluate(options(tmp_path, tiny_model, other_model, eval_dtype=dtype), TextOptions(), pairs_of(tiny_data))
        for dtype in ("float32", "bfloat16")
    )
    assert (exact["dtype"], coarse["dtype"]) == ("float32", "bfloat16")
    for label in ("base", "dpo"):
        values = [results["models"][label]["perplexity_chosen"]["value"] for results in (exact, coarse)]
        assert values[1] == pytest.approx(values[0], rel=2e-3)
        assert values[1] != values[0]
