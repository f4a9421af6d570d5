"""What evaluate and compare measure in the Gaudi environment: the main environment's numbers, in few shapes."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandem.models.sampling import Sampling
from tandem.models.scorer import Scorer, load_scorer
from tests import tiny

HERE = Path(__file__).parent
MAX_LENGTH = 91  # cuts some rows; no multiple of anything
MODELS = ("llama", "other_llama", "gemma", "adapter")


@pytest.fixture(scope="module")
def models(gemma: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    llamas = [tiny.save_model(folder / f"llama{seed}", seed, tied=False) for seed in (0, 1)]
    adapter = tiny.save_adapter(folder / "adapter", llamas[0], std=0.02)
    return dict(zip(MODELS, map(str, (*llamas, gemma, adapter)), strict=True))


@pytest.fixture(scope="module")
def pairs() -> list[dict[str, list[int]]]:
    """18 pairs, no multiple of a batch, of 5 to 96 tokens; short answers: a sum of 20 log-probs is rounded to 1e-5."""
    draw = random.Random(0)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(6, 260) for _ in range(draw.randint(low, high))]

    return [
        {"prompt_ids": ids(3, 90), "chosen_ids": [*ids(1, 5), 2], "rejected_ids": [*ids(1, 5), 2]} for _ in range(18)
    ]


@pytest.fixture(scope="module")
def found(
    models: dict[str, str], pairs: list[Any], main_python: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What each says: `gaudi`, ours in the Gaudi environment; `main`, ours in the main one; and `padded`, TRL's."""
    folder = tmp_path_factory.mktemp("scores")
    asked = folder / "asked.json"
    asked.write_text(json.dumps({"models": models, "pairs": pairs, "max_length": MAX_LENGTH}))
    answers = {}
    for name, python, whose in (
        ("gaudi", sys.executable, "ours"),
        ("main", main_python, "ours"),
        ("padded", main_python, "padded"),
    ):
        paths = os.environ["PYTHONPATH"] if name == "gaudi" else ""
        environment = os.environ | {"PYTHONPATH": f"{HERE.parents[1]}:{paths}"}
        command = [python, str(HERE / "scores.py"), whose, str(asked), str(folder / name)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        answers[name] = json.loads((folder / name).read_text())
    return answers


@pytest.mark.parametrize("model", MODELS)
def test_log_probs_are_those_of_the_padded_layout(found: dict[str, Any], model: str):
    gaudi, padded = (np.array(found[name][model]["logps"]) for name in ("gaudi", "padded"))
    assert gaudi.shape == (18, 2)
    np.testing.assert_allclose(gaudi, padded, rtol=0, atol=1e-5)


@pytest.mark.parametrize("policy", ["other_llama", "adapter"])
def test_margins_are_those_of_the_padded_layout(found: dict[str, Any], policy: str):
    def margins(name: str) -> np.ndarray:
        leads = [np.array(found[name][model]["logps"]) @ [1, -1] for model in (policy, "llama")]
        return leads[0] - leads[1]

    assert np.abs(margins("padded")).max() > 0.1
    np.testing.assert_allclose(margins("gaudi"), margins("padded"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_greedy_answers_are_the_main_environments(found: dict[str, Any], model: str):
    answers = found["gaudi"][model]["answers"]
    assert answers == found["main"][model]["answers"]
    assert len({tuple(answer) for answer in answers}) > 2


def shapes_of(scorer: Scorer) -> set[tuple[int, ...]]:
    seen = set()

    def note(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.add((*kwargs["input_ids"].shape, kwargs["attention_mask"].shape[-1]))

    scorer.model.model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def test_few_shapes(models: dict[str, str], pairs: list[Any]):
    """One of scoring; two of sampling, for a prompt and for a token. Another length of prompts takes another bucket."""
    scorer = load_scorer(models["llama"], "float32", batch_size=4, bf16=False)
    seen = shapes_of(scorer)
    scorer.pair_logps(pairs, 128)
    assert seen == {(8, 128, 128)}
    seen.clear()
    for start in range(0, 18, 4):
        prompts = [pair["prompt_ids"] for pair in pairs[start : start + 4]]
        answers = scorer.draw(prompts, Sampling(5, 1.0, 0.9), range(len(prompts)))
        assert len(answers) == min(4, 18 - start)
        assert all(0 < len(answer) <= 5 for answer in answers)
    assert seen == {(4, 133, 133), (4, 1, 133)}
    scorer.draw([[5] * 129], Sampling(5, 1.0, 1.0), [0])
    assert (4, 261, 261) in seen
