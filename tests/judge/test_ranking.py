"""Several models ranked by several judges: what is asked, what comes of it, and that nothing is asked twice."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from tandem.errors import UserError
from tandem.judge.rank_options import RankOptions
from tandem.judge.ranking import Said, agreement, all_pairs, averaged, rank, strengths_of
from tandem.judge.requests import Comparison
from tandem.report.ranking import table, write_ranking
from tandem.runs import append_jsonl
from tests import tiny
from tests.judge.fault_server import FaultServer, draw
from tests.judge.judge_once import labelled
from tests.judge.test_bradley_terry import NAMES

QUALITY = {"base": 0.2, "sft": 0.5, "dpo": 0.9}
HOSTILE = "<img src=x onerror=alert(1)>"


def write(folder: Path, prompts: int, quality=QUALITY, length=None) -> list[str]:
    files = []
    for label, share in quality.items():
        file = folder / f"generations_{label}.jsonl"
        for index in range(prompts):
            mark = 2 * (draw("mark", label, index) < share) + (draw("half", label, index) < 0.5)
            text = f"answer {mark} {'x' * int(draw('length', label, index) * 40 * (length or {}).get(label, 1))}"
            row = {"prompt_id": f"p{index}", "messages": [{"role": "user", "content": f"Question {index} of base?"}]}
            append_jsonl(file, row | {"text": text, "finish_reason": "stop"})
        files.append(str(file))
    return files


def options(url, files, folder, **more) -> RankOptions:
    given = {"answers": files, "judge_model": ["m"], "base_url": [url], "output_dir": str(folder), "timeout": 10.0}
    return RankOptions(**given | more)


def ranked(given):
    return rank(given, all_pairs(given), labelled(20))


@pytest.fixture
def server():
    state = FaultServer()
    with state.serving() as state.url:
        yield state


def judged(server):
    return sum("<answer_a>" in body["input"][-1]["content"] for body in server.requests)


def test_three_models_are_ranked_by_their_verdicts(tmp_path, server):
    """Every pair in both orders, once: a second run asks nothing, one with another model only for its pairs."""
    files = write(tmp_path, 20)
    result = ranked(options(server.url, files, tmp_path / "out"))
    [judge] = result["judges"]
    pairs = all_pairs(options(server.url, files, tmp_path))
    assert len(pairs) == 3 * 20
    asked = {(frozenset((pair.answer_1, pair.answer_2)), pair.prompt_id) for pair in pairs if not pair.identical}
    assert judged(server) == 2 * len(asked) + 2 * 20
    strengths = [result["together"]["models"][label]["strength"]["value"] for label in NAMES]
    assert strengths == sorted(strengths) and sum(strengths) == pytest.approx(0)
    assert result["conclusion"].startswith("dpo > sft > base with length controlled; ")
    assert judge["distrust"] == [] and result["agreement"] == []
    assert json.loads((tmp_path / "out" / "ranking.json").read_text()) == result
    count = judged(server)
    assert ranked(options(server.url, files, tmp_path / "out")) == result
    two = ranked(options(server.url, files[1:], tmp_path / "out"))
    assert judged(server) == count and list(two["together"]["models"]) == ["sft", "dpo"]


def test_the_first_prompts_are_the_same_for_every_pair(tmp_path):
    """Backends write answers down as they get ready, each model's in an order of its own."""
    files = write(tmp_path, 9)
    for number, file in enumerate(map(Path, files)):
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(lines[number * 3 :] + lines[: number * 3]))
    pairs = all_pairs(options("http://localhost:1", files, tmp_path, max_prompts=3))
    assert [pair.prompt_id for pair in pairs] == ["p0", "p1", "p2"] * 3


def said(outcomes, answers=("one", "two")):
    """What a judge says of base and dpo, prompt by prompt."""
    pairs = [Comparison(str(index), [], *answers, "base", "dpo") for index in range(len(outcomes))]
    return {
        (pair.prompt_id, "base", "dpo"): Said(pair, (n + 1) / 2, n) for pair, n in zip(pairs, outcomes, strict=True)
    }


def test_kappa_is_that_of_the_outcomes():
    one, other = np.random.default_rng(0).integers(-1, 2, (2, 50))
    [row] = agreement([said(one), said(other)])
    assert row["kappa"] == pytest.approx(cohen_kappa_score(one, other)) and row["n"] == 50
    assert row["same"] == np.mean(one == other)
    assert agreement([said(one), said(one)])[0]["kappa"] == 1


@pytest.mark.parametrize(
    ("one", "other", "why"),
    [
        (said([]), said([1]), "no comparison was judged by both"),
        (said([1] * 9), said([1] * 9), "chance cannot be told from agreement"),
        (said([0] * 9, ("same", "same")), said([0] * 9, ("same", "same")), "no comparison was judged by both"),
    ],
)
def test_no_kappa_has_its_reason(one, other, why):
    [row] = agreement([one, other])
    assert row["kappa"] is None and why in row["why"]


def test_judges_together_are_the_mean_of_their_scores():
    """+1, 0 and −1 by one, +1 throughout by the other: 1, ¾ and ½ on average; what only one judged is left out."""
    both = averaged([said([1, 0, -1]), said([1, 1, 1, 1])])
    assert [(each.score, each.outcome) for each in both.values()] == [(1.0, 1), (0.75, 1), (0.5, 0)]


def test_a_judge_that_is_not_believed_is_left_out(tmp_path, server):
    files = write(tmp_path, 10)[1:]
    other = FaultServer(lambda a, b: "A")
    with other.serving() as url:
        given = options(None, files, tmp_path / "out", judge_model=["m", "first"], base_url=[server.url, url])
        result = ranked(given)
    assert [bool(judge["distrust"]) for judge in result["judges"]] == [False, True]
    assert result["together"] == {name: result["judges"][0][name] for name in ("models", "bounded_by", "against")}
    assert "not believed: on 20 pairs labelled by people the judge is right in 50.0%" in table(result)
    assert "κ of m and first: " in table(result)
    write_ranking(tmp_path / "r.html", result)
    assert "This judge is not believed." in (tmp_path / "r.html").read_text()


def test_every_model_has_its_mark_in_the_plot(tmp_path, server):
    """The models of a ranking have no colour of their own, as base, SFT and DPO have in the report."""
    write_ranking(tmp_path / "r.html", ranked(options(server.url, write(tmp_path, 20), tmp_path / "out")))
    page = (tmp_path / "r.html").read_text()
    marks = re.findall(r'<span class="(?:range|dot)"', page)
    colours = re.findall(r"^\.track \.(?:range|dot) \{.*background: var\(--c, var\(--accent\)\)", page, re.MULTILINE)
    assert (len(marks), len(colours)) == (2 * 2 * 3, 2)
    assert page.count('<th scope="col">against ') == 3


def test_a_judge_that_nobody_tried_names_no_ranking(tmp_path, server):
    given = options(server.url, write(tmp_path, 3), tmp_path / "out", calibration_pairs=0)
    result = rank(given, all_pairs(given), [])
    assert result["together"] is None
    assert result["conclusion"].startswith("No ranking is named: m: the judge was not tried on pairs labelled")


def test_a_model_that_wins_everything_has_a_bound():
    found = strengths_of(["base", "dpo"], said([1] * 30))
    assert "won or lost all" in found["bounded_by"]
    best = found["models"]["dpo"]["strength"]
    assert 1 < best["value"] < 20 and best["low"] < best["value"] < best["high"]
    assert found["models"]["dpo"]["mean_score"]["value"] == 1.0 == found["against"][0]["score"]["value"]


def test_answers_that_are_none_say_nothing_of_length():
    rng = np.random.default_rng(0)
    whole = {
        key: each._replace(comparison=replace(each.comparison, answer_1="x" * int(rng.integers(1, 99))))
        for key, each in said(rng.choice([-1, 1], 40)).items()
    }
    empty = Comparison("e", [], "", "x" * 5000, "base", "dpo", non_answer_1="empty")
    spoiled = whole | {(f"e{n}", "base", "dpo"): Said(empty, 1.0, 1) for n in range(9)}
    one, other = strengths_of(["base", "dpo"], whole), strengths_of(["base", "dpo"], spoiled)
    assert one["models"]["dpo"]["length_controlled"] == other["models"]["dpo"]["length_controlled"]
    assert other["models"]["dpo"]["strength"]["n"] == 49


def test_a_budget_and_a_dry_run(tmp_path, server):
    files = write(tmp_path, 5)
    price = {"price_in": [1.0], "price_out": [1000.0]}
    dry = ranked(options(server.url, files, tmp_path / "out", dry_run=True, **price))
    assert dry["judges"][0]["verdicts"]["main"] == 30 and server.requests == []
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="stopped before --max_cost"):
        ranked(options(server.url, files, tmp_path / "out", max_cost=0.0001, **price))


def test_every_judge_has_its_options(tmp_path):
    prices = {"price_in": [1.0, 2.0], "price_out": [3.0]}
    more = {"max_flip_rate": 0.2, "max_concurrency": 3, "max_attempts": 2, "samples": 4, "seed": 9, "timeout": 7.0}
    given = options("http://a/v1", ["a=a", "b=b"], tmp_path, judge_model=["m/1", "n"], **prices, **more)
    first, second = (given.of_judge(index) for index in (0, 1))
    assert (first.judge_model, first.price_in, first.price_out) == ("m/1", 1.0, 3.0)
    assert (second.judge_model, second.price_in, second.price_out) == ("n", 2.0, 3.0)
    assert {name: getattr(second, name) for name in more} == more
    assert first.folder.parent == tmp_path / "judges" == second.folder.parent and first.folder != second.folder


def test_what_a_judge_is_asked(tmp_path, server, script):
    """As the script does it: the first prompts only, the labelled pairs of the seed, in the words of the options."""
    files = write(tmp_path, 3)[1:]
    tiny.save_pairs(tmp_path / "data.jsonl", tiny.hh_rows(12))
    line = f"--judge_model m --base_url {server.url} --dataset_name {tmp_path}/data.jsonl --max_prompts 2 --samples 2 "
    line += "--calibration_pairs 1 --temperature 0.5 --max_output_tokens 99 --val_ratio 0.5 --output_dir"
    asked = []
    for seed in ("1", "2"):
        server.reset()
        script("rank").main([*line.split(), str(tmp_path / seed), "--seed", seed, "--answers", *files])
        asked.append({body["input"][-1]["content"] for body in server.requests})
        assert {(body["temperature"], body["max_output_tokens"]) for body in server.requests} == {(0.5, 99)}
        assert judged(server) == 2 * 2 * (1 + 2)
    assert len(asked[0] & asked[1]) == 2 * 2 + 1 < len(asked[0])  # two prompts in two orders, and the probe


def test_no_comparison_at_all_has_its_reason():
    found = strengths_of(["a", "b"], {})
    assert {each["strength"]["why"] for each in found["models"].values()} == {"fewer than 20 prompts"}
    assert found["against"][0]["score"]["value"] is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answers": ["a.jsonl"]}, "two files at least"),
        ({"answers": ["x/generations_a.jsonl", "y/generations_a.jsonl"]}, "a label is there twice: write label=FILE"),
        ({"answers": ["a=", "b=c.jsonl"]}, "must be label=FILE"),
        ({"judge_model": ["m", "m"]}, "a judge is there twice"),
        ({"judge_model": ["m", "n", "o"], "base_url": ["http://a/v1", "http://b/v1"]}, "2 of them for 3 judges"),
        ({"base_url": ["nowhere"]}, "--base_url"),
        ({"price_in": [1.0]}, "need each other"),
        ({"max_cost": 1.0}, "--max_cost needs"),
    ],
)
def test_options_that_cannot_be(change, said):
    given = {"answers": ["a=a.jsonl", "b=b.jsonl"], "judge_model": ["m"], "output_dir": "out"}
    with pytest.raises(UserError, match=said):
        RankOptions(**given | change)


def test_the_page_shows_names_as_text(tmp_path):
    labels = [HOSTILE, "dpo"]
    rng = np.random.default_rng(0)
    found = {(key[0], *labels): each for key, each in said(rng.choice([-1, 1], 40)).items()}
    boards = strengths_of(labels, found)
    judge = {"model": f"m{HOSTILE}", "distrust": [], "warnings": [], "n_missing": 0, "order_flip_rate": None, **boards}
    judge |= {"labelled": {"accuracy": None}, "usage": {"replies": 3, "cost": None}}
    result = {"labels": labels, "n_prompts": 40, "judges": [judge, judge], "together": boards, "conclusion": HOSTILE}
    write_ranking(tmp_path / "r.html", result | {"agreement": agreement([found, found])})
    page = (tmp_path / "r.html").read_text()
    assert "<img" not in page and "&lt;img" in page and "<script" not in page
    assert page.count('class="dot"') == 3 * 2  # together and by each judge; all answers are of one length
    assert "No strength with length controlled: the difference in length is the same everywhere" in page


def test_the_script_from_end_to_end(tmp_path, server, script, tiny_data, capsys, monkeypatch):
    files = write(tmp_path, 2)
    line = f"--judge_model m --base_url {server.url} --output_dir {tmp_path}/out --calibration_pairs 0"
    script("rank").main([*line.split(), "--dataset_name", str(tiny_data), "--answers", *files])
    said = capsys.readouterr().out
    assert "strength: fewer than 20 prompts" in said and "No ranking is named" in said
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"ranking.json", "ranking.html", "rank.yaml"}
