"""Wrong options are refused in one line, before anything is loaded."""

import subprocess
import sys

import pytest

from tandem.errors import UserError
from tandem.judge.options import JudgeOptions
from tandem.options.parsing import parse

GIVEN = {"judge_model": "m", "base_url": "http://localhost:1/v1", "run_dir": "run"}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"samples": 0}, "--samples"),
        ({"max_attempts": 0}, "--max_attempts"),
        ({"max_concurrency": 0}, "--max_concurrency"),
        ({"timeout": 0.0}, "--timeout"),
        ({"timeout": float("nan")}, "--timeout"),
        ({"temperature": -1.0}, "--temperature"),
        ({"max_flip_rate": 1.1}, "--max_flip_rate"),
        ({"price_in": 1.0}, "--price_out"),
        ({"max_cost": 1.0}, "--price_in"),
        ({"max_cost": float("nan"), "price_in": 1.0, "price_out": 1.0}, "--max_cost"),
        ({"base_url": "localhost:8000"}, "--base_url"),
        ({"base_url": "ftp://host/v1"}, "--base_url"),
        ({"base_url": "http://[::1/v1"}, "--base_url"),
        ({"base_url": "https://me:sk-secret@host/v1"}, "credentials"),
        ({"base_url": "https://host/v1?key=sk-secret"}, "credentials"),
        ({"generations_a": "a"}, "--generations_b"),
        ({"generations_a": "a", "generations_b": "b"}, "--run_dir"),
        ({"run_dir": None}, "--run_dir"),
        ({"against": "dpo"}, "--against"),
        (
            {"run_dir": None, "generations_a": "a", "generations_b": "b", "against": "chosen", "policy": "sft"},
            "--policy, --against have no effect without --run_dir",
        ),
    ],
)
def test_wrong_options_are_named(wrong, named):
    with pytest.raises(UserError) as caught:
        JudgeOptions(**GIVEN | wrong)
    assert named in str(caught.value)
    assert "secret" not in str(caught.value)


def test_the_judge_model_has_no_default():
    with pytest.raises(UserError, match="--judge_model is required"):
        parse(["--run_dir", "run"], [JudgeOptions], prog="judge")


def test_files_of_a_run_folder_and_of_two_files():
    options = JudgeOptions(**GIVEN, against="sft")
    assert [str(file) for file in options.generation_files] == [
        "run/generations_sft.jsonl",
        "run/generations_dpo.jsonl",
    ]
    assert str(options.folder) == "run/judge"
    assert options.summary_file.parts[-2:] == ("run", "judge_summary.json")
    options = JudgeOptions(**GIVEN | {"run_dir": None, "generations_a": "x/a.jsonl", "generations_b": "y/b.jsonl"})
    assert str(options.folder) == "y/judge"
    options = JudgeOptions(**GIVEN, output_dir="run/vs_chosen")  # two judges' summaries do not take each other's place
    assert options.summary_file.parts[-2:] == ("run", "vs_chosen_summary.json")


def test_cost_by_hand():
    options = JudgeOptions(**GIVEN, price_in=2.0, price_out=8.0)
    assert options.cost(500_000, 250_000) == 3.0
    assert JudgeOptions(**GIVEN).cost(1, 1) is None


def test_options_import_nothing_heavy():
    code = (
        "import sys, tandem.judge.options; print(sorted({'openai', 'numpy', 'torch', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_arithmetic_imports_neither_network_nor_models():
    code = (
        "import sys, tandem.judge.statistics, tandem.judge.verdicts;"
        "print(sorted({'openai', 'httpx2', 'requests', 'torch', 'transformers', 'trl'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
