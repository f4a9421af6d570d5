"""Who won each prompt, against a model or the data's own answers; and one judge in a folder at a time."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.data.formats import prompt_id
from tandem.errors import UserError
from tandem.judge.comparisons import load_comparisons
from tandem.judge.options import JudgeOptions
from tandem.judge.requests import Call, Comparison, Judge
from tandem.judge.run import judge
from tandem.judge.summary import winners
from tandem.runs import append_jsonl, locked


def options(folder: Path, **more: str) -> JudgeOptions:
    return JudgeOptions(judge_model="m", base_url="http://localhost:1", run_dir=str(folder), **more)


def test_comparisons_against_the_data(tmp_path: Path):
    """Side 1 is the answer that people chose, by prompt; the other pairs of the data are not asked about."""
    pairs = [{"prompt": f"ask {index}", "chosen": f" chosen {index} ", "rejected": "r"} for index in range(3)]
    for index in (2, 0):
        message = {"role": "user", "content": f"ask {index}"}
        row = {"prompt_id": prompt_id([message]), "messages": [message], "text": f"d{index}"}
        append_jsonl(tmp_path / "generations_dpo.jsonl", row)
    found = load_comparisons(options(tmp_path, against="chosen"), pairs)
    assert [(pair.answer_1, pair.answer_2, pair.label_1, pair.label_2) for pair in found] == [
        ("chosen 2", "d2", "chosen", "dpo"),
        ("chosen 0", "d0", "chosen", "dpo"),
    ]
    with pytest.raises(UserError, match="1 prompts are none of the held-out pairs"):
        load_comparisons(options(tmp_path, against="chosen"), pairs[1:])


@given(
    wanted=st.lists(st.sampled_from(["model", "chosen", "tie", "disagree"]), min_size=1, max_size=12), data=st.data()
)
def test_winners_are_right_whatever_the_order(wanted: list[str], data: st.DataObject):
    """Verdicts name the letter under which the wanted answer was shown, in whatever order the calls were answered."""
    comparisons = [Comparison(f"p{index}", [], "people", "model", "chosen", "dpo") for index in range(len(wanted))]
    calls = Judge("url", "m", True, None, 1).calls("main", comparisons, 1)
    verdicts = {}
    for call in data.draw(st.permutations(calls)):
        want = wanted[int(call.comparison.prompt_id[1:])]
        if want == "disagree":
            want = "model" if call.order == "12" else "chosen"
        shown_first = "chosen" if call.order == "12" else "model"
        verdict = "tie" if want == "tie" else "A" if want == shown_first else "B"
        verdicts[id(call)] = {"status": "ok", "verdict": verdict, "order": call.order}

    class Said:
        def verdict(self, call: Call) -> dict[str, str]:
            return verdicts[id(call)]

    rows = winners(calls, Said())
    assert [(row["prompt_id"], row["winner_model_vs_chosen"]) for row in rows] == [
        (f"p{index}", want) for index, want in enumerate(wanted)
    ]
    keys = [call.key for call in calls]
    assert [row["calls"] for row in rows] == [keys[start : start + 2] for start in range(0, len(keys), 2)]
    one_order = [call for call in calls if call.order == "12"]
    assert {row["winner_model_vs_chosen"] for row in winners(one_order, Said())} == {"unjudged"}


def test_two_judges_in_one_folder(tmp_path: Path):
    here = options(tmp_path)
    comparison = Comparison("p", [], "a", "b", "base", "dpo")
    with locked(here.folder), pytest.raises(UserError, match=r"judge: process \d+ on .+ is writing there"):
        judge(here, [comparison], [])
    assert not here.folder.exists()  # nothing came into it
