"""Draws by inverse distribution: the distribution is transformers' own, and no row depends on another."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from tandem.models.draws import RowDraws, pick
from tandem.models.sampling import Sampling
from tandem.models.scorer import load_scorer


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.01])
def test_the_distribution_is_that_of_transformers_warpers(top_p: float):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1, 20, generator=generator) * 2
    expected = TopPLogitsWarper(top_p)(None, logits) if top_p < 1 else logits
    expected = expected.softmax(-1)[0].double().numpy()
    count = 40_000
    uniform = torch.from_numpy(np.random.default_rng(0).random(count, np.float32))
    drawn = np.bincount(pick(logits.expand(count, -1), top_p, uniform).numpy(), minlength=20)
    assert (drawn[expected == 0] == 0).all()
    inside = expected > 0
    if inside.sum() > 1:
        wanted = expected[inside] / expected[inside].sum() * count
        assert stats.chisquare(drawn[inside], wanted).pvalue > 0.001


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_tokens_without_probability_are_never_drawn(top_p: float):
    logits = torch.full((3, 8), -torch.inf)
    logits[:, 2], logits[:, 5] = 0.0, 0.0
    drawn = pick(logits, top_p, torch.tensor([0.0, 0.49, float(np.nextafter(np.float32(1), np.float32(0)))]))
    assert drawn.tolist() == [2, 2, 5]


def test_temperature_sharpens():
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(5000, -1).contiguous()
    sampling = Sampling(1, temperature=0.5, top_p=1.0)
    draws = RowDraws(range(5000), sampling, width=4)
    scores = draws(torch.zeros(5000, 4, dtype=torch.long), logits)
    counts = np.bincount(scores.argmax(1).numpy(), minlength=3)
    wanted = TemperatureLogitsWarper(0.5)(None, logits[:1]).softmax(-1)[0].double().numpy() * 5000
    assert stats.chisquare(counts, wanted / wanted.sum() * 5000).pvalue > 0.001


def test_a_draw_is_the_same_in_any_company(tmp_path: Path, untied_model: Path):
    scorer = load_scorer(str(untied_model), "float32", batch_size=4)
    sampling = Sampling(12, temperature=1.0, top_p=0.95)
    prompts = [[10, 11, 12], [20] * 9, [30, 31]]
    together = scorer.draw(prompts, sampling, [1, 2, 3])
    alone = [scorer.draw([prompt], sampling, [seed])[0] for prompt, seed in zip(prompts, [1, 2, 3], strict=True)]
    assert together == alone
    assert scorer.draw([prompts[0]] * 3, sampling, [1, 4, 5])[0] == alone[0]
    assert len({tuple(answer) for answer in scorer.draw([prompts[0]] * 6, sampling, range(6))}) == 6


@pytest.fixture(scope="module")
def untied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that does not repeat its last token for ever."""
    from tests import tiny

    return tiny.save_model(tmp_path_factory.mktemp("models") / "untied", tied=False)
