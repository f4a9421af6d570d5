"""Draws by inverse distribution: the distribution is transformers' own, and no row depends on another."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from tandem.models import draws
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


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([0.1, 1.0, 3.0, 9.0]),
    top_p=st.floats(0.01, 0.999),
    vocabulary=st.sampled_from([5, 1024, 1025, 3000]),
)
def test_the_nucleus_is_that_of_transformers(seed: int, spread: float, top_p: float, vocabulary: int):
    """Rows that need the whole vocabulary, and rows that do not, in one batch: the number 0 draws the likeliest token,
    the largest below 1 the last of the nucleus, and the middle of a token's share that token.

    A last token whose place transformers' sums, in another order, round to the other side is not looked at.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2, vocabulary, generator=generator) * torch.tensor([[spread], [5.0]])
    kept = TopPLogitsWarper(top_p)(None, rows).double().softmax(-1)
    ordered, tokens = kept.sort(descending=True, stable=True)
    size = (ordered > 0).sum(-1)
    ends = ordered.cumsum(-1)
    probed = torch.stack([torch.zeros_like(size), size // 2, (size - 2).clamp(min=0)], 1)
    middles = (ends - ordered / 2).gather(1, probed)
    wide = ordered.gather(1, probed) > 1e-5  # narrower than that, rounding may draw the next
    unsure = ((rows.double().softmax(-1).sort(descending=True)[0].cumsum(-1) - top_p).abs() < 1e-5).any(1)
    for column in range(3):
        drawn = pick(rows, top_p, middles[:, column].float())
        same = drawn == tokens.gather(1, probed[:, column : column + 1])[:, 0]
        assert (same | unsure | ~wide[:, column]).all()
    last = pick(rows, top_p, torch.full((2,), float(np.nextafter(np.float32(1), np.float32(0)))))
    assert ((kept.gather(1, last[:, None])[:, 0] > 0) | unsure).all()


def test_the_same_token_with_and_without_the_whole_vocabulary_sorted(monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 5000, generator=generator) * torch.linspace(0.1, 6, 64)[:, None]
    uniform = torch.rand(64, generator=generator)
    quick = pick(logits, 0.95, uniform)
    monkeypatch.setattr(draws, "LIKELIEST", 5000)
    assert torch.equal(quick, pick(logits, 0.95, uniform))


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_tokens_without_probability_are_never_drawn(top_p: float):
    logits = torch.full((3, 8), -torch.inf)
    logits[:, 2], logits[:, 5] = 0.0, 0.0
    drawn = pick(logits, top_p, torch.tensor([0.0, 0.49, float(np.nextafter(np.float32(1), np.float32(0)))]))
    assert drawn.tolist() == [2, 2, 5]


def test_temperature_sharpens():
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(5000, -1).contiguous()
    sampling = Sampling(1, temperature=0.5, top_p=1.0)
    scores = RowDraws(range(5000), sampling, width=4)(torch.zeros(5000, 4, dtype=torch.long), logits)
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
