import dataclasses
import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tandem.answers import ab_files
from tandem.answers.backends.options import GenerationOptions
from tandem.answers.compare import CompareOptions, repetition, statistics, to_markdown
from tandem.answers.compare import compare as compare_by
from tandem.data.formats import prompt_id
from tandem.data.options import DataOptions
from tandem.data.sources import load_pairs
from tandem.errors import UserError
from tandem.models.sampling import SamplingOptions
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
    assert repetition(text) == pytest.approx(expected)


def test_statistics_by_hand():
    records = [
        {"n_tokens": 4, "finish_reason": "stop", "text": "a a a a"},
        {"n_tokens": 8, "finish_reason": "length", "text": ""},
    ]
    assert statistics(records) == {
        "n": 2,
        "mean_tokens": 6.0,
        "mean_characters": 3.5,
        "truncated": 0.5,
        "empty": 0.5,
        "refusal": 0.0,
        "repetition": 0.25,
    }


def test_statistics_of_answers_no_model_drew():
    """The data's own have no tokens and were not cut; a server may not count."""
    chosen = statistics([{"text": "I can't help you."}, {"text": "yes"}])
    assert (chosen["mean_tokens"], chosen["truncated"], chosen["refusal"]) == (None, None, 0.5)
    served = statistics([{"text": "a", "n_tokens": None, "finish_reason": "stop"}])
    assert (served["mean_tokens"], served["truncated"]) == (None, 0.0)
    assert to_markdown({"statistics": {"chosen": chosen}}).splitlines()[2].startswith("| chosen | 2 | – | 10 | – |")


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("models") / "other", seed=1)


def sampling(**changes: Any) -> SamplingOptions:
    return SamplingOptions(**{"max_new_tokens": 6, "seed": 123} | changes)


def compare(options: CompareOptions, draw: SamplingOptions, pairs: list[Any]) -> dict[str, Any]:
    return compare_by(options, GenerationOptions(), draw, pairs)


def test_side_by_side(tmp_path: Path, tiny_model: Path, other_model: Path, tiny_data: Path):
    pairs = load_pairs(DataOptions(str(tiny_data)), "test")
    options = CompareOptions(str(tiny_model), str(other_model), sft_model=str(tiny_model), output_dir=str(tmp_path))
    results = compare(options, sampling(), pairs)
    assert json.loads((tmp_path / "dpo_comparison_results.json").read_text()) == results
    assert json.loads((tmp_path / "generation_samples.json").read_text()) == results["comparisons"][:10]
    assert list(results["statistics"]) == ["base", "sft", "dpo", "chosen"]
    assert (results["policy"], results["against"]) == ("dpo", "base")
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


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[CompareOptions, list[dict[str, Any]]]:
    """A folder with the answers of two models, and the options and pairs that made it."""
    pairs = [{"prompt": f"say {index}", "chosen": f"answer {index}", "rejected": "b"} for index in range(6)]
    pairs[0]["chosen"] = "</textarea><script>alert(1)</script>"
    folder = tmp_path_factory.mktemp("compared")
    models = [str(tiny.save_model(folder / name, seed, tied=False)) for seed, name in enumerate(("base", "dpo"))]
    options = CompareOptions(*models, output_dir=str(folder))
    compare(options, sampling(greedy=True), pairs)
    return options, pairs


@pytest.mark.parametrize(("policy", "against"), [("dpo", "base"), ("dpo", "chosen"), ("base", "chosen")])
def test_an_outside_judge_who_prefers_the_policy(
    compared: tuple[CompareOptions, list[dict[str, Any]]], policy: str, against: str, tmp_path: Path
):
    """Through the command's own files: questions out, verdicts in; the policy wins 3, loses 1, ties 1, 1 is missing."""
    options, pairs = compared
    sides = dataclasses.replace(options, policy=policy, against=against, shuffle_ab=True)
    rows = compare(sides, sampling(greedy=True), pairs)["comparisons"]
    of_policy = {row["prompt_id"]: row["answers"][policy] for row in rows}
    questions = [json.loads(line) for line in (Path(options.output_dir) / ab_files.QUESTIONS).read_text().splitlines()]
    lines = []
    for number, question in enumerate(questions[:5]):
        a_is_policy = question["answer_a"] == of_policy[question["prompt_id"]]
        prefers_a = a_is_policy if number < 3 else not a_is_policy
        verdict = "tie" if number == 4 else "A" if prefers_a else "B"
        lines.append(json.dumps({"prompt_id": question["prompt_id"], "verdict": verdict}) + "\n")
    (tmp_path / "verdicts.jsonl").write_text("".join(lines))
    judged = dataclasses.replace(sides, shuffle_ab=False, ab_verdicts=str(tmp_path / "verdicts.jsonl"))
    results = compare(judged, sampling(greedy=True), pairs)
    won = [row[f"winner_model_vs_{against}"] for row in results["comparisons"]]
    assert won == ["model", "model", "model", against, "tie", None]
    outside = results["outside_verdicts"]
    assert [outside[name] for name in ("wins", "losses", "ties", "unjudged")] == [3, 1, 1, 1]
    assert (outside["win_rate"]["value"], outside["win_rate"]["n"]) == (0.75, 4)
    assert outside["win_rate"]["low"] == pytest.approx(0.3006, abs=1e-4)  # Wilson for 3 of 4, z = 1.96, by hand
    assert "won 3 prompts and lost 1" in (Path(options.output_dir) / "side_by_side.html").read_text()


def test_the_page_shows_both_sides_as_text(compared: tuple[CompareOptions, list[dict[str, Any]]]):
    options, pairs = compared
    results = compare(dataclasses.replace(options, against="chosen"), sampling(greedy=True), pairs)
    page = (Path(options.output_dir) / "side_by_side.html").read_text()
    assert "<script" not in page
    assert "&lt;/textarea&gt;&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert page.count('<div class="answer m-dpo">') == page.count('<div class="answer m-chosen">') == 6
    assert "m-base" not in page.partition("</style>")[2]
    shown = re.findall(
        r'm-dpo"><h4>DPO<span class="mark">cut off by the limit of tokens</span></h4><div class="text">(.*?)</div>',
        page,
        re.DOTALL,
    )
    assert [html.unescape(text) for text in shown] == [row["answers"]["dpo"] for row in results["comparisons"]]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"against": "sft"}, "--against sft needs --sft_model"),
        ({"policy": "sft"}, "--policy sft needs --sft_model"),
        ({"policy": "base"}, "--policy and --against are both base: nothing to compare"),
        ({"ab_verdicts": "v"}, "--ab_verdicts v: no such file"),
        (
            {"shuffle_ab": True, "ab_verdicts": "v"},
            "--shuffle_ab writes questions anew, which --ab_verdicts answers: give one of them",
        ),
    ],
)
def test_sides_that_cannot_be(given: dict[str, Any], expected: str):
    with pytest.raises(UserError) as error:
        CompareOptions("base", "dpo", **given)
    assert str(error.value) == expected
