import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tandem.errors import UserError
from tandem.report.page import ReportOptions, write_report
from tandem.rounds.measure import distinct_bigrams, measure
from tandem.rounds.options import RoundsOptions


def write(
    run: Path, number: int, scores: list[float | None], other: Sequence[float | None] | None = None, name: str = "f"
) -> None:
    folder = run / f"round_{number}" / "held_out"
    folder.mkdir(parents=True)
    rows = [
        {
            "prompt": f"q{index}",
            "text": f"word {index} of {number}",
            "score": score,
            "scorer": name,
            "n_tokens": 10 + number,
            "scores": {name: score} | ({"second": other[index]} if other else {}),
            "non_answer": None if score is not None else "empty",
        }
        for index, score in enumerate(scores)
    ]
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def results(run: Path, **given: Any) -> dict[str, Any]:
    return measure(RoundsOptions(run_dir=str(run), **given))


def test_a_row_a_round_by_hand(tmp_path: Path):
    write(tmp_path, 0, [0, 0, 1, 0, None, 0, 0, 1])
    write(tmp_path, 1, [1, 0, 1, 1, 1, 0, 1, 0])
    first, second = results(tmp_path)["rounds"]
    assert first["difference"]["value"] == 0
    assert second["difference"]["value"] == pytest.approx((3 - 1) / 7)  # of seven prompts with both, 3 gained, 1 lost
    assert second["difference"]["low"] < 2 / 7 < second["difference"]["high"]
    assert second["win_rate"]["value"] == pytest.approx((3 + 1 + 0.5 * 3) / 8)  # an answer wins against none
    assert second["mean_score"]["value"] == 5 / 8
    assert (first["non_answers"], second["mean_tokens"]) == (1 / 8, 11)
    for name in ("rounds.json", "rounds.md", "rounds.html"):
        assert (tmp_path / name).stat().st_size > 100


def test_a_judge_that_compares_with_round_0(tmp_path: Path):
    """Its win rate has ties as ½ and Wilson's interval; what its summary adds stands beside it, on every page."""
    points = [1.0] * 14 + [0.5] * 4 + [0.0] * 2
    for number, scores in ((0, [0.5] * 20), (1, points)):
        write(tmp_path, number, scores, name="judge:m")
    shown = {"length_controlled": {"value": 0.62, "low": 0.41, "high": 0.8, "n": 20}}
    shown |= {"order_flip_rate": {"value": 0.1, "low": 0.02, "high": 0.3, "n": 20}}
    file = tmp_path / "round_1" / "held_out" / "judge_summary.json"
    file.write_text(json.dumps({"judge": {"model": "m"}, "result": shown}))
    row = results(tmp_path)["rounds"][1]
    assert row["win_rate"]["value"] == pytest.approx((14 + 4 / 2) / 20)
    assert row["win_rate"]["low"] == pytest.approx(
        0.584, abs=1e-3
    )  # Wilson's: (16 + 1.92 - 1.96 √(16·4/20 + .96)) / 23.84
    assert (row["length_controlled"]["value"], row["order_flip_rate"]["n"]) == (0.62, 20)
    page, told = (tmp_path / "rounds.html").read_text(), (tmp_path / "rounds.md").read_text()
    assert "compared each answer with round 0&#39;s" in page and "Win rate, length controlled" in page
    assert "Win rate, length controlled" in told and "62" in told
    file.write_text("{}")
    with pytest.raises(UserError, match=r"judge_summary\.json: damaged"):
        results(tmp_path)


def test_the_seed_of_the_bootstrap(tmp_path: Path):
    write(tmp_path, 0, [float(i % 7) for i in range(40)])
    write(tmp_path, 1, [float(i % 5) for i in range(40)])
    lows = {results(tmp_path, seed=seed)["rounds"][1]["difference"]["low"] for seed in (1, 2, 3, 1)}
    assert 1 < len(lows) <= 3


def test_what_a_non_answer_counts(tmp_path: Path):
    write(tmp_path, 0, [1.0, 1.0, None, 0.0])
    write(tmp_path, 1, [1.0, None, 1.0, 1.0])
    assert results(tmp_path)["rounds"][1]["difference"] | {"low": 0, "high": 0} == {
        "value": 0.5, "low": 0, "high": 0, "n": 2,
    }  # fmt: skip
    second = results(tmp_path, non_answer_score=0.0)["rounds"][1]
    assert (second["difference"]["value"], second["difference"]["n"]) == (0.25, 4)
    assert second["mean_score"]["value"] == 0.75
    assert second["win_rate"]["value"] == (0.5 + 0 + 1 + 1) / 4


def test_a_round_is_compared_with_the_best_before_it_prompt_by_prompt(tmp_path: Path):
    """Prompts differ far more than rounds do: only pairing shows that each round gains."""
    for number in range(3):
        write(tmp_path, number, [100.0 * index + 0.1 * number * (1 + index % 3) for index in range(30)])
    rows = results(tmp_path)["rounds"]
    assert [row["stop"] for row in rows] == [False, False, False]
    assert rows[2]["gain"]["value"] == pytest.approx(0.2)
    assert rows[2]["gain"]["low"] > 0.15
    write(tmp_path, 3, [100.0 * index + 0.3 * (index % 2) for index in range(30)])
    found = results(tmp_path)
    assert (found["best_round"], found["stop"]) == (2, True)


def test_the_best_round_and_when_to_stop(tmp_path: Path):
    write(tmp_path, 0, [0.0] * 10 + [1.0] * 10)
    write(tmp_path, 1, [1.0] * 9 + [0.0] + [1.0] * 10)
    found = results(tmp_path)
    assert (found["best_round"], found["stop"]) == (1, False)
    write(tmp_path, 2, [1.0] * 8 + [0.0] * 2 + [1.0] * 10)
    found = results(tmp_path)
    assert (found["best_round"], found["stop"]) == (1, True)


def test_over_optimisation_is_said_first(tmp_path: Path):
    write(tmp_path, 0, [0.0, 0.1] * 10, other=[1.0, 2.0] * 10, name="<b>f")
    write(tmp_path, 1, [1.0, 1.2] * 10, other=[0.5, 2.0] * 10, name="<b>f")
    found = results(tmp_path)
    assert "over-optimised" in found["warnings"][0]
    assert (tmp_path / "rounds.md").read_text().startswith("round 1: the score of <b>f has risen by 1.05")
    assert "<b>f" not in (tmp_path / "rounds.html").read_text()
    write(tmp_path / "fine", 0, [0.0, 0.1] * 10, other=[1.0, 2.0] * 10)
    write(tmp_path / "fine", 1, [1.0, 1.2] * 10, other=[1.5, 2.8] * 10)
    fine = results(tmp_path / "fine")
    assert fine["warnings"] == []
    assert fine["rounds"][1]["others"]["second"]["win_rate"]["value"] == 1
    for number, scores in enumerate(([0.0, 0.1], [1.0, 1.2])):
        write(tmp_path / "silent", number, scores * 10, other=[None] * 20)
    assert "no answer has a score of second" in results(tmp_path / "silent")["warnings"][0]


def test_the_page_of_rounds_and_the_report_it_is_part_of(tmp_path: Path):
    for number in range(3):
        write(tmp_path, number, [0.1 * number + index % 3 for index in range(20)], other=[float(number)] * 20)
    results(tmp_path)
    (tmp_path / "round_1" / "report.html").write_text("")
    report = write_report(ReportOptions(run_dir=str(tmp_path))).read_text()
    page = (tmp_path / "rounds.html").read_text()
    for text in (page, report):
        assert text.count("<svg") == 7  # win rate, lead, score, length, bigrams, refusals, non-answers
        assert "by the scorer that ranks" in text  # two scorers share a drawing
        assert "Round 2 is the best: its score is 0.200 (95% interval 0.200 to 0.200) above round 0&#39;s" in text
        assert text.index("Win rate") < text.index("Length")
    assert '<a href="round_1/report.html">round 1</a>.' in report  # round 2 has none
    assert "No judgement" not in report  # nor any other part of a run that a folder of rounds never has
    assert "over-optimisation would not show" not in page
    (tmp_path / "rounds.json").write_text('{"rounds": [{}]}')
    with pytest.raises(UserError, match=r"rounds\.json: not as this version"):
        write_report(ReportOptions(run_dir=str(tmp_path)))


def test_what_cannot_be_measured(tmp_path: Path):
    with pytest.raises(UserError, match="no round_0"):
        results(tmp_path)
    write(tmp_path, 0, [0.0, 1.0])
    write(tmp_path, 1, [0.0])
    with pytest.raises(UserError, match="not to the prompts of round 0"):
        results(tmp_path)


def test_distinct_bigrams():
    assert distinct_bigrams(["a b a b", "a b"]) == 2 / 4
    assert distinct_bigrams(["a", ""]) is None
