import json
from collections import Counter
from pathlib import Path

import pytest

from tandem.data.options import DataOptions
from tandem.data.sources import load_pairs
from tandem.errors import UserError
from tandem.rounds.options import PairOptions
from tandem.rounds.pairs import make_pairs, to_markdown
from tandem.rounds.records import read_records

WORDS = "amber birch cedar delta ember frost grove heath inlet jetty knoll ledge marsh north ocean plain".split()  # noqa: SIM905


def answer(prompt: str, score: float | None, text: str, **more) -> dict:
    messages = [{"role": "user", "content": prompt}]
    return {"messages": messages, "text": text, "score": score, "scorer": "test"} | more


def prose(seed: int, words: int = 12) -> str:
    return " ".join(WORDS[(seed * 7 + i * (seed + 3)) % len(WORDS)] for i in range(words)) + "."


def write(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def made(tmp_path: Path, rows: list, **options):
    file = write(tmp_path / "scores.jsonl", rows)
    report = make_pairs(PairOptions(scores=str(file), output_dir=str(tmp_path / "pairs"), fail_on="none", **options))
    return report, [json.loads(line) for line in (tmp_path / "pairs" / "pairs.jsonl").read_text().splitlines()]


def test_best_and_worst_with_their_provenance(tmp_path: Path):
    rows = [
        answer("a?", 1.0, prose(1), draw=0, model="m", label="policy", seed=7, sampling={"temperature": 0.8}),
        answer("a?", 3.0, prose(2), draw=1, model="m", label="policy", n_tokens=12),
        answer("a?", 2.0, prose(3), draw=2, model="m", label="policy"),
        answer("b?", 1.0, prose(4)),
        answer("c?", 1.0, prose(5)),
        answer("c?", 1.0, prose(6)),
    ]
    report, pairs = made(tmp_path, rows, round=3)
    assert len(pairs) == 1
    assert pairs[0]["prompt"] == [{"role": "user", "content": "a?"}]
    assert pairs[0]["chosen"] == [{"role": "assistant", "content": prose(2)}]
    assert pairs[0]["rejected"] == [{"role": "assistant", "content": prose(1)}]
    assert pairs[0]["provenance"]["round"] == 3
    rejected = {"label": "policy", "model": "m", "draw": 0, "seed": 7, "score": 1.0, "scorer": "test"}
    assert pairs[0]["provenance"]["rejected"] == rejected | {"sampling": {"temperature": 0.8}}
    assert pairs[0]["provenance"]["chosen"]["score"] == 3.0
    assert report["prompts"] == 3
    assert report["prompts_with_pairs"] == 1
    assert report["prompts_without_pairs"] == {"fewer_than_two_scored": 1, "tied": 1}
    assert report["margin"]["median"] == 2.0
    read = load_pairs(DataOptions(dataset_name=str(tmp_path / "pairs" / "pairs.jsonl")), "train")
    assert [pair["chosen"] for pair in read] == [pairs[0]["chosen"]]
    assert (tmp_path / "pairs" / "data_report.json").is_file()


def test_answers_that_are_none_are_counted_and_never_chosen(tmp_path: Path):
    rows = [
        answer("a?", 9.0, ""),
        answer("a?", 9.0, "<think>so far"),
        answer("a?", 9.0, "<think>done</think>  "),
        answer("a?", 9.0, prose(9), finish_reason="length"),
        answer("a?", 9.0, "bad \ud800 text"),
        answer("a?", 2.0, "<think>yes</think> " + prose(1), finish_reason="stop"),
        answer("a?", 1.0, prose(2)),
        answer("a?", None, prose(3)),
    ]
    report, pairs = made(tmp_path, rows)
    assert pairs[0]["chosen"][0]["content"] == "<think>yes</think> " + prose(1)
    assert pairs[0]["rejected"][0]["content"] == prose(2)
    assert report["non_answers"] == {"cut_off": 1, "empty": 2, "not_text": 1, "unclosed_think": 1}
    assert "cut_off 1" in to_markdown(report)


def test_an_answer_drawn_twice_is_one_with_the_mean_of_its_scores(tmp_path: Path):
    rows = [answer("a?", 4.0, prose(1)), answer("a?", 0.0, prose(1) + " "), answer("a?", 3.0, prose(2))]
    _, pairs = made(tmp_path, rows)
    assert pairs[0]["chosen"][0]["content"] == prose(2)
    assert pairs[0]["rejected"][0]["content"] == prose(1)


def test_near_duplicates_are_left_out_unless_kept(tmp_path: Path):
    near = prose(1, 40)
    rows = [answer("a?", 2.0, near), answer("a?", 1.0, near[:-1] + "!")]
    with pytest.raises(UserError, match="near_duplicates 1"):
        made(tmp_path, rows)
    _, pairs = made(tmp_path, rows, keep_near_duplicates=True)
    assert len(pairs) == 1
    with pytest.raises(UserError, match="near_duplicates 1"):
        made(tmp_path, rows)
    assert not (tmp_path / "pairs" / "pairs.jsonl").exists()


def test_lengths_are_tokens_where_all_are_known(tmp_path: Path):
    rows = [answer("a?", 2.0, prose(1, 30), n_tokens=10), answer("a?", 1.0, prose(2, 5), n_tokens=9)]
    assert len(made(tmp_path, rows, max_length_ratio=1.2)[1]) == 1
    del rows[1]["n_tokens"]
    with pytest.raises(UserError, match="length_ratio 1"):
        made(tmp_path, rows, max_length_ratio=1.2)


def test_all_pairs_up_to_a_number(tmp_path: Path):
    rows = [answer(f"{prompt}?", float(i), prose(i + prompt)) for prompt in range(3) for i in range(4)]
    assert len(made(tmp_path, rows, pair_strategy="all")[1]) == 3 * 6
    assert (
        len(made(tmp_path, rows, pair_strategy="all", min_score_margin=1)[1]) == 3 * 3
    )  # 2 above 0, and 3 above 1 and 0
    _, pairs = made(tmp_path, rows, pair_strategy="all", max_pairs_per_prompt=2, min_score_margin=1)
    assert Counter(pair["prompt"][0]["content"] for pair in pairs) == {"0?": 2, "1?": 2, "2?": 2}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "row 2"),
        ({"text": "x", "score": 1}, "row 2: field 'messages'"),
        (answer("a?", 1.0, "x") | {"messages": [{"role": "robot", "content": "x"}]}, "'role' must be one of"),
        (answer("a?", 1.0, "x") | {"text": None}, "row 2: field 'text'"),
        (answer("a?", 1.0, "x") | {"score": "good"}, "row 2: field 'score'"),
        (answer("a?", 1.0, "x") | {"score": 10**400}, "not finite"),
        (answer("a?", 1.0, "x") | {"score": True}, "must be a number or null"),
        ('{"prompt": "a?", "text": "x", "score": NaN}', "row 2"),
        ({"prompt": "a?", "text": "x"}, "'score' is missing"),
        (answer("a?", 1.0, "x") | {"n_tokens": -1}, "field 'n_tokens'"),
        (answer("a?", 1.0, "x") | {"draw": 0}, "is in row 1"),
        (answer("a?", 1.0, "x") | {"draw": "0"}, "field 'draw'"),
        (answer("a?", 1.0, "x") | {"label": 3}, "field 'label'"),
    ],
)
def test_what_is_wrong_with_a_line_is_told(tmp_path: Path, row, said: str):
    file = write(tmp_path / "scores.jsonl", [answer("a?", 1.0, "x"), row])
    with pytest.raises(UserError, match=said) as error:
        read_records(file, scored=True)
    assert str(file) in str(error.value)


def test_no_file_and_no_answers(tmp_path: Path):
    with pytest.raises(UserError, match="no such file"):
        read_records(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="has no answers"):
        read_records(write(tmp_path / "none.jsonl", []))


def test_the_seed_of_a_random_partner(tmp_path: Path):
    rows = [answer("a?", float(i), prose(i)) for i in range(8)]
    drawn = {made(tmp_path, rows, pair_strategy="best_random", pair_seed=seed)[1][0]["rejected"][0]["content"]
             for seed in range(20)}  # fmt: skip
    assert 4 < len(drawn) < 8


def test_the_data_check_stops_on_what_it_is_told_to(tmp_path: Path):
    long, short = prose(1, 40), prose(2, 4)
    rows = [answer(f"{i}?", float(side), f"{i} " + (long, short)[side]) for i in range(120) for side in range(2)]
    options = {"scores": str(write(tmp_path / "scores.jsonl", rows)), "output_dir": str(tmp_path / "pairs")}
    make_pairs(PairOptions(**options))
    with pytest.raises(UserError, match="length_bias"):
        make_pairs(PairOptions(**options, fail_on="warning"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_pairs_per_prompt": 2}, "no effect with --pair_strategy best_worst"),
        ({"max_pairs_per_prompt": 0, "pair_strategy": "all"}, "at least 1"),
        ({"pair_seed": 1}, "no effect"),
        ({"min_score_margin": -1.0}, "at least 0"),
        ({"max_length_ratio": 0.5}, "at least 1"),
    ],
)
def test_options_that_cannot_be(given: dict, said: str):
    with pytest.raises(UserError, match=said):
        PairOptions(scores="s", output_dir="o", **given)
