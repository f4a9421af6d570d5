"""Each example of docs/extending.md, run as it stands there, from a folder outside the package."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tandem.data.options import DataOptions
from tandem.data.sources import load_pairs
from tandem.errors import UserError
from tandem.runs import read_jsonl
from tests import tiny
from tests.judge import judge_once

EXAMPLES = dict(
    re.findall(r"```python\n# (\w+\.py)\n(.*?)```", (Path(__file__).parents[1] / "docs/extending.md").read_text(), re.S)
)


@pytest.fixture(autouse=True)
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, which has the examples' files."""
    for name, content in EXAMPLES.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


def train(script: Callable[[str], ModuleType], model: Path, data: Path, *more: str) -> dict[str, float]:
    """Two steps of DPO; the last step's log."""
    given = f"--model_name_or_path {model} --dataset_name {data} --output_dir out --max_steps 2 --logging_steps 1"
    script("dpo").main([*given.split(), "--max_length", "96", *more])
    return json.loads(Path("out/training_metrics.json").read_text())["log_history"][0]


def test_every_kind_has_its_example() -> None:
    assert list(EXAMPLES) == ["my_loss.py", "my_format.py", "my_judge.py", "my_backend.py", "my_accelerator.py"]


def test_a_loss(script: Callable[[str], ModuleType], tiny_model: Path, tiny_data: Path) -> None:
    """−log σ(r(chosen) − r(rejected) − β/2), of the rewards that are logged beside it; no reference is scored."""
    log = train(script, tiny_model, tiny_data, "--loss_type", "my_loss.py:loss", "--per_device_train_batch_size", "1")
    margin = torch.tensor(log["rewards/margins"] - 0.05)
    assert log["loss"] == pytest.approx(-torch.nn.functional.logsigmoid(margin).item(), abs=1e-4)
    assert not list(Path(os.environ["HOME"]).rglob("*.sqlite"))


def test_a_data_format(tmp_path: Path) -> None:
    rows = [
        {"q": "Which?", "a": "This.", "b": "That.", "votes_a": 1, "votes_b": 3},
        {"q": "Who?", "a": "He.", "b": "She.", "votes_a": 2, "votes_b": 2},
        {"q": "Where?", "a": "Here.", "b": "There.", "votes_a": 2, "votes_b": 0},
    ]
    file = tiny.save_pairs(tmp_path / "train.jsonl", rows)
    options = DataOptions(dataset_name=str(file), row_function="my_format.py:votes", max_bad_rows=1)
    pairs = load_pairs(options, "train")
    assert [(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in pairs] == [
        ("Which?", "That.", "This."),
        ("Where?", "Here.", "There."),
    ]
    strict = DataOptions(dataset_name=str(file), row_function="my_format.py:votes")
    with pytest.raises(UserError, match=r"row 2: --row_function my_format.py:votes: ValueError: a draw"):
        load_pairs(strict, "train")
    with pytest.raises(UserError, match=r"--row_function my_format.py:gone: my_format.py has no gone"):
        load_pairs(DataOptions(dataset_name=str(file), row_function="my_format.py:gone"), "train")


def test_a_judges_backend(tmp_path: Path) -> None:
    """Who wins is counted from the lengths of the answers; nothing is asked twice."""
    from tandem.judge.run import judge

    options = judge_once.options("http://127.0.0.1:9", str(tmp_path / "judge"), judge_backend="my_judge.py:Longest")
    comparisons = judge_once.comparisons(30)
    summary = judge(options, comparisons, judge_once.labelled(10))
    lengths = [(len(each.answer_1), len(each.answer_2)) for each in comparisons]
    agreed = summary["result"]["orders_agree"]
    assert (agreed["wins"], agreed["losses"]) == (sum(b > a for a, b in lengths), sum(b < a for a, b in lengths))
    heard = len(read_jsonl(tmp_path / "judge" / "raw.jsonl"))
    assert judge(options, comparisons, judge_once.labelled(10)) == summary
    assert len(read_jsonl(tmp_path / "judge" / "raw.jsonl")) == heard > 0
    file = Path("my_judge.py")
    file.write_text(file.read_text() + "\n# another version, which may judge otherwise\n")
    judge(options, comparisons, judge_once.labelled(10))
    assert len(read_jsonl(tmp_path / "judge" / "raw.jsonl")) == 2 * heard


@pytest.mark.parametrize("option", ["--backend", "--engine"])
def test_a_backend_of_answers(
    script: Callable[[str], ModuleType], tiny_data: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    given = f"--models own=parrot --dataset_name {tiny_data} --output_dir answers --max_prompts 2 --max_new_tokens 3"
    script("generate").main([*given.split(), option, "my_backend.py:Echo"])
    records = read_jsonl(Path("answers/generations_own.jsonl"))
    asked = [record["messages"][-1]["content"].split()[:3] for record in records]
    assert [record["text"].split() for record in records] == [["parrot", *words] for words in asked]
    assert len(records) == 2
    file = Path("my_backend.py")
    file.write_text(file.read_text() + "\n# another version, which may answer otherwise\n")
    with pytest.raises(UserError, match="answers of another version of --backend"):
        script("generate").main([*given.split(), option, "my_backend.py:Echo"])
    assert ("engine is called backend here" in capsys.readouterr().err) == (option == "--engine")


def test_an_accelerator(
    script: Callable[[str], ModuleType], tiny_model: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows are 96 tokens long, whatever the pairs."""
    widths = set()
    forward = torch.nn.Embedding.forward

    def watched(self: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            widths.add(ids.shape[1])
        return forward(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", watched)
    monkeypatch.setenv("TANDEM_TRAINERS", "my_accelerator.py:builders")
    train(script, tiny_model, tiny_data)
    assert widths == {96}
