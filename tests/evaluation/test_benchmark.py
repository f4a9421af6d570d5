"""Tasks of lm-evaluation-harness: what is asked for, what comes of it, and, with the harness installed, a whole run."""

import json
from pathlib import Path

import pytest
from statsmodels.stats.proportion import proportion_confint

from tandem.errors import UserError
from tandem.evaluation import benchmark
from tandem.evaluation.benchmark import BenchmarkOptions, repetitions, sums
from tests import tiny

TASK = """task: my_colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: ["red", "blue"]
doc_to_target: a
metric_list: [{{metric: acc}}]
"""


def test_without_the_harness_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"lm-evaluation-harness: pip install .*\[benchmark\]"):
        BenchmarkOptions(benchmark=["tandem_sums"])


@pytest.mark.parametrize(
    "given", [{"benchmark_limit": 3}, {"benchmark_fewshot": 0}, {"benchmark_chat": True}, {"benchmark_tasks": "."}]
)
def test_options_of_no_benchmark_are_refused(given):
    with pytest.raises(UserError, match="no effect without --benchmark"):
        BenchmarkOptions(**given)


def test_a_folder_of_tasks_must_be_there(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    with pytest.raises(UserError, match="--benchmark_tasks nowhere: no such folder"):
        BenchmarkOptions(benchmark=["x"], benchmark_tasks="nowhere")


def test_the_sums_are_right_and_no_place_is_the_right_one_more_often():
    rows = sums()
    assert rows == sums() and len(rows) == 200
    assert all(int(row["choices"][row["label"]]) == row["a"] + row["b"] for row in rows)
    assert all(len(set(row["choices"])) == 4 for row in rows)
    places = [sum(row["label"] == place for row in rows) for place in range(4)]
    assert min(places) > 25
    assert all(row["target"].split() == [row["word"]] * row["times"] for row in repetitions())


def test_intervals_of_shares_are_wilsons_and_others_by_their_standard_error():
    share = benchmark.task_estimate(0.0, 0.0, 20)
    assert (share["low"], share["high"]) == (0.0, pytest.approx(proportion_confint(0, 20, method="wilson")[1]))
    half = benchmark.task_estimate(0.5, (0.25 / 19) ** 0.5, 20)
    assert half["low"] == pytest.approx(proportion_confint(10, 20, method="wilson")[0])
    other = benchmark.task_estimate(12.0, 1.0, 20)
    assert (other["low"], other["high"]) == (pytest.approx(12 - 1.959964), pytest.approx(12 + 1.959964))
    assert benchmark.task_estimate(12.0, "N/A", 20)["why"]


@pytest.mark.slow
def test_tasks_run_before_and_after_from_end_to_end(tmp_path: Path, script):
    """Two tasks whose data the project makes, and one of the user's; the numbers are those of the harness itself."""
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install -e '.[benchmark]'")
    models = {name: tiny.save_model(tmp_path / name, seed=seed) for seed, name in enumerate(("base", "dpo"))}
    data = tiny.save_pairs(tmp_path / "pairs.jsonl", tiny.hh_rows(8))
    colours = tmp_path / "colours.jsonl"
    colours.write_text("".join(json.dumps({"q": f"sky {n}", "a": n % 2}) + "\n" for n in range(8)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text(TASK.format(file=colours))
    line = f"--reference_model {models['base']} --dpo_model {models['dpo']} --dataset_name {data} --kl_prompts 0 "
    line += f"--output_file {tmp_path}/results.json --benchmark_limit 12 --benchmark_tasks {tmp_path}/tasks "
    asked = ["--benchmark", "tandem_sums", "tandem_words", "my_colours"]
    script("evaluate").main([*line.split(), *asked])
    rows = json.loads((tmp_path / "results.json").read_text())["benchmarks"]
    assert [(row["task"], row["metric"]) for row in rows] == [
        ("tandem_sums", "acc"),
        ("tandem_words", "exact_match"),
        ("my_colours", "acc"),
    ]
    assert [list(row["models"]) for row in rows] == [["base", "dpo"]] * 3
    assert [row["models"]["dpo"]["n"] for row in rows] == [12, 12, 8]
    assert "| tandem_sums, acc | " in (tmp_path / "results.md").read_text()
    script("evaluate").main([*line.split(), *asked[:2], "--benchmark_fewshot", "2", "--benchmark_chat", "true"])
    with pytest.raises(UserError, match="no such task"):
        script("evaluate").main([*line.split(), "--benchmark", "nonsense"])
