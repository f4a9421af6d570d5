import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tandem.answers.backends.options import GenerationOptions
from tandem.errors import UserError
from tandem.models.sampling import SamplingOptions
from tandem.rounds.options import PairOptions, SampleOptions
from tandem.rounds.pairs import make_pairs
from tandem.rounds.prompts import Prompt
from tandem.rounds.records import read_records
from tandem.rounds.sample import sample
from tandem.runs import read_jsonl
from tests import tiny

PROMPTS = [
    Prompt([{"role": "user", "content": f"say {word}"}], {"word": word}, "Done." if index else None)
    for index, word in enumerate(tiny.WORDS[:5])
]


def drawn(
    folder: Path, *models: str, prompts: list[Prompt] = PROMPTS, sampling: dict | None = None, **given: Any
) -> list:
    options = SampleOptions(models=list(models), output_dir=str(folder), **{"num_samples": 3} | given)
    draw = SamplingOptions(**{"max_new_tokens": 8, "temperature": 1.0} | (sampling or {}))
    return read_records(sample(options, GenerationOptions(batch_size=4), draw, prompts))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("models") / "untied", tied=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    drawn(folder, f"policy={model}")
    return folder


def test_every_draw_is_there_once_in_order(whole: Path, model: Path):
    records = read_records(whole / "samples.jsonl")
    assert [(record["prompt_id"], record["draw"]) for record in records] == [
        (prompt.prompt_id, number) for prompt in PROMPTS for number in range(3)
    ]
    assert len({record["draw_seed"] for record in records}) == 15
    assert len({record["text"] for record in records}) > 12  # draws of a prompt differ
    record = records[0]
    assert (record["label"], record["model"], record["engine"]) == ("policy", str(model), "transformers")
    assert record["sampling"]["temperature"] == 1.0
    assert record["finish_reason"] in ("stop", "length")
    assert 1 <= record["n_tokens"] <= 8
    rows = read_jsonl(whole / "prompts.jsonl")
    assert [row["row"] for row in rows] == [prompt.row for prompt in PROMPTS]


@pytest.mark.parametrize("keep", [0, 1, 7, 14])
def test_a_killed_run_draws_what_is_missing_and_no_more(
    tmp_path: Path, whole: Path, model: Path, keep: int, monkeypatch: pytest.MonkeyPatch
):
    from tandem.answers.backends.transformers import TransformersBackend

    asked: list[Any] = []
    draws = TransformersBackend.draws

    def spy(self: Any, prompts: Any, count: int, wanted: Any) -> Any:
        asked.extend(wanted)
        return draws(self, prompts, count, wanted)

    monkeypatch.setattr(TransformersBackend, "draws", spy)
    lines = (whole / "draws_policy.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "draws_policy.jsonl").write_bytes(b"".join(lines[:keep]) + lines[keep][:20])  # torn
    drawn(tmp_path, f"policy={model}")
    assert (tmp_path / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    assert len(asked) == 15 - keep


def test_more_draws_are_added_to_those_that_are_there(tmp_path: Path, whole: Path, model: Path):
    shutil.copy(whole / "draws_policy.jsonl", tmp_path)
    records = drawn(tmp_path, f"policy={model}", num_samples=4)
    first = [record["text"] for record in records if record["draw"] < 3]
    assert first == [record["text"] for record in read_records(whole / "samples.jsonl")]
    assert len(records) == 20


def test_several_models_and_the_datas_own_answers(tmp_path: Path, model: Path):
    adapter = tiny.save_adapter(tmp_path / "adapter", model, std=0.5)
    records = drawn(tmp_path / "out", f"old={model}", f"new={adapter}", num_samples=2, with_chosen=True)
    assert [record["label"] for record in records] == ["old"] * 10 + ["new"] * 10 + ["data"] * 4
    assert records[10]["adapter"] == str(adapter)
    assert [record["text"] for record in records[:10]] != [record["text"] for record in records[10:20]]
    assert records[-1]["text"] == "Done."


def test_parts_are_other_prompts(tmp_path: Path, model: Path):
    parts = [drawn(tmp_path / str(part), f"p={model}", num_samples=1, parts=2, part=part) for part in (1, 2)]
    said = [[record["messages"][0]["content"] for record in part] for part in parts]
    assert said == [["say the", "say sat", "say a"], ["say cat", "say on"]]
    first = drawn(tmp_path / "3", f"p={model}", num_samples=1, parts=2, part=1, sampling={"max_prompts": 1})
    assert [record["messages"][0]["content"] for record in first] == ["say the"]
    with pytest.raises(UserError, match="only 5 prompts"):
        drawn(tmp_path / "4", f"p={model}", parts=6)


def test_draws_of_other_sampling_or_another_model_are_refused(tmp_path: Path, whole: Path, model: Path):
    shutil.copy(whole / "draws_policy.jsonl", tmp_path)
    with pytest.raises(UserError, match="other sampling"):
        drawn(tmp_path, f"policy={model}", sampling={"temperature": 0.5})
    with pytest.raises(UserError, match="other sampling"):
        drawn(tmp_path, f"policy={model}", sampling={"seed": 1})
    (tmp_path / "draws_policy.jsonl").write_text('{"prompt_id": 3}\n')
    with pytest.raises(UserError, match="damaged"):
        drawn(tmp_path, f"policy={model}")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"models": ["x"]}, "label=MODEL"),
        ({"models": ["a=x", "a=y"]}, "twice"),
        ({"models": ["data=x"]}, "own answers"),
        ({"num_samples": 0}, "at least 1"),
        ({"part": 2}, "from 1 to --parts 1"),
        ({"part": 0}, "at least 1"),
    ],
)
def test_options_that_cannot_be(given: dict, said: str):
    with pytest.raises(UserError, match=said):
        SampleOptions(**{"models": ["a=x"], "output_dir": "o"} | given)


def test_greedy_gives_one_answer(tmp_path: Path, model: Path):
    with pytest.raises(UserError, match="--num_samples 1"):
        drawn(tmp_path, f"p={model}", sampling={"greedy": True, "temperature": 0.7})
    once = drawn(tmp_path, f"p={model}", num_samples=1, sampling={"greedy": True, "temperature": 0.7})
    assert len(once) == 5


def test_a_row_may_hold_what_json_cannot(tmp_path: Path, model: Path):
    import datetime

    prompt = Prompt(PROMPTS[0].messages, {"when": datetime.date(2020, 1, 2), "x": float("nan"), "y": [b"z"]})
    drawn(tmp_path, f"p={model}", prompts=[prompt], num_samples=1)
    assert json.loads((tmp_path / "prompts.jsonl").read_text())["row"] == {
        "when": "2020-01-02",
        "x": None,
        "y": ["b'z'"],
    }


def test_the_script(tmp_path: Path, tiny_data: Path, model: Path, script: Any):
    line = f"--models policy={model} --dataset_name {tiny_data} --output_dir {tmp_path} --num_samples 2 --max_prompts 3"
    script("sample").main([*line.split(), "--max_new_tokens", "4"])
    assert len(read_records(tmp_path / "samples.jsonl")) == 6
    assert "num_samples: 2" in (tmp_path / "sample.yaml").read_text()


def test_held_out_prompts_are_measured_and_never_paired(tmp_path: Path, tiny_data: Path, model: Path, script: Any):
    line = f"--models p={model} --dataset_name {tiny_data} --output_dir {tmp_path} --num_samples 2 --held_out"
    script("sample").main([*line.split(), "--max_new_tokens", "4"])
    records = read_records(tmp_path / "samples.jsonl")
    assert len(records) == 16
    scores = tmp_path / "scores.jsonl"
    scores.write_text("".join(json.dumps(record | {"score": record["draw"]}) + "\n" for record in records))
    with pytest.raises(UserError, match="held-out prompts"):
        make_pairs(PairOptions(scores=str(scores), output_dir=str(tmp_path / "pairs")))
