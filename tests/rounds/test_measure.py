import json
from pathlib import Path
from typing import Any

import pytest

from tandem.errors import UserError
from tandem.rounds.measure import distinct_bigrams, measure
from tandem.rounds.options import RoundsOptions


def write(
    run: Path, number: int, scores: list[float | None], other: list[float] | None = None, name: str = "f"
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


def results(run: Path, seed: int = 42) -> dict[str, Any]:
    return measure(RoundsOptions(run_dir=str(run), seed=seed))


def test_a_row_a_round_by_hand(tmp_path: Path):
    write(tmp_path, 0, [0, 0, 1, 0, None, 0, 0, 1])
    write(tmp_path, 1, [1, 0, 1, 1, 1, 0, 1, 0])
    first, second = results(tmp_path)["rounds"]
    assert first["difference"]["value"] == 0
    assert second["difference"]["value"] == pytest.approx((3 - 1) / 7)  # of seven prompts with both, 3 gained, 1 lost
    assert second["difference"]["low"] < 2 / 7 < second["difference"]["high"]
    assert second["win_rate"]["value"] == pytest.approx((3 + 0.5 * 3) / 7)
    assert second["mean_score"]["value"] == 5 / 8
    assert (first["non_answers"], second["mean_tokens"]) == (1 / 8, 11)
    for name in ("rounds.json", "rounds.md", "rounds.html"):
        assert (tmp_path / name).stat().st_size > 100


def test_the_seed_of_the_bootstrap(tmp_path: Path):
    write(tmp_path, 0, [float(i % 7) for i in range(40)])
    write(tmp_path, 1, [float(i % 5) for i in range(40)])
    lows = {results(tmp_path, seed)["rounds"][1]["difference"]["low"] for seed in (1, 2, 3, 1)}
    assert 1 < len(lows) <= 3


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
    assert results(tmp_path / "fine")["warnings"] == []


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
