import json
from pathlib import Path
from typing import Any

import pytest

from tandem.compare import CompareOptions, _repetition, _statistics, compare, to_markdown
from tandem.data.formats import prompt_id
from tandem.data.options import DataOptions
from tandem.data.sources import load_pairs
from tandem.sampling import SamplingOptions
from tests import tiny


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0.0),
        ("a b c", 0.0),
        ("a b c d", 0.0),
        ("a a a a", 0.5),  # 2 trigrams, 1 of them distinct
        ("a b a b a b", 0.5),  # aba bab aba bab
        ("x " * 102, 0.99),
    ],
)
def test_repetition(text: str, expected: float):
    assert _repetition(text) == pytest.approx(expected)


def test_statistics_by_hand():
    records = [
        {"n_tokens": 4, "finish_reason": "stop", "text": "a a a a"},
        {"n_tokens": 8, "finish_reason": "length", "text": ""},
    ]
    assert _statistics(records) == {"n": 2, "mean_tokens": 6.0, "truncated": 0.5, "empty": 0.5, "repetition": 0.25}


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("models") / "other", seed=1)


def sampling(**changes: Any) -> SamplingOptions:
    return SamplingOptions(**{"max_new_tokens": 6, "seed": 123} | changes)


def test_side_by_side(tmp_path: Path, tiny_model: Path, other_model: Path, tiny_data: Path):
    pairs = load_pairs(DataOptions(str(tiny_data)), "test")
    options = CompareOptions(str(tiny_model), str(other_model), sft_model=str(tiny_model), output_dir=str(tmp_path))
    results = compare(options, sampling(), pairs)
    assert json.loads((tmp_path / "dpo_comparison_results.json").read_text()) == results
    assert json.loads((tmp_path / "generation_samples.json").read_text()) == results["comparisons"][:10]
    assert list(results["statistics"]) == ["base", "sft", "dpo"]
    assert results["seed"] == 123
    assert len(results["comparisons"]) == len(pairs)
    for pair, row in zip(pairs, results["comparisons"], strict=True):
        assert row["prompt_id"] == prompt_id(pair["prompt"])
        assert row["chosen"] == pair["chosen"][0]["content"]
        assert row["answers"]["base"] == row["answers"]["sft"]  # one model under two names
    assert any(row["answers"]["base"] != row["answers"]["dpo"] for row in results["comparisons"])

    # Fewer prompts in the same folder: answers are reused, and counted only where they are compared
    fewer = compare(options, sampling(max_prompts=3), pairs)
    assert fewer["comparisons"] == results["comparisons"][:3]
    assert {values["n"] for values in fewer["statistics"].values()} == {3}
    assert to_markdown(fewer).splitlines()[2].startswith("| base | 3 |")


def test_text_prompts(tmp_path: Path, tiny_model: Path):
    pair = {"prompt": "say a", "chosen": " a ", "rejected": "b"}
    options = CompareOptions(str(tiny_model), str(tiny_model), output_dir=str(tmp_path))
    results = compare(options, sampling(), [pair])
    assert list(results["models"]) == ["base", "dpo"]
    assert results["comparisons"][0]["messages"] == [{"role": "user", "content": "say a"}]
    assert results["comparisons"][0]["chosen"] == "a"
