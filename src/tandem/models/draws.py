"""Draws tokens for each row of a batch from a random stream of its own, so that no row affects another's draw."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import LogitsProcessor

from tandem.models.sampling import Sampling

LIKELIEST = 1024  # tokens that hold the nucleus nearly always; sorting a vocabulary of 49,152 costs forty times as much


class RowDraws(LogitsProcessor):
    """Draws a token for each row by inverting its distribution at its next uniform number, and masks all others.

    `generate` takes the most likely token, which is then the drawn one. The distribution is
    softmax(logits / temperature), cut to the nucleus of `top_p` (Holtzman et al. 2020), as in vLLM and transformers.

    Args:
        seeds: one for each row; equal seeds draw equal numbers
        sampling: temperature above 0
        width: columns of the prompts, with which `generate` begins; None where its ids are as wide as they will be
            from the first call on (optimum-habana's): calls are counted
    """

    def __init__(self, seeds: Sequence[int], sampling: Sampling, width: int | None) -> None:
        uniforms = [np.random.default_rng(seed).random(sampling.max_new_tokens, np.float32) for seed in seeds]
        self._uniforms = torch.from_numpy(np.stack(uniforms))
        self._sampling = sampling
        self._width, self._calls = width, 0

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows (k,), by index, and no others."""
        self._uniforms = self._uniforms[rows.cpu()]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """`scores` (rows, vocabulary) with all but the drawn token at −∞."""
        number = self._calls if self._width is None else input_ids.shape[1] - self._width
        self._calls += 1
        uniform = self._uniforms[:, number].to(scores.device)
        token = pick(scores.float() / self._sampling.temperature, self._sampling.top_p, uniform)
        drawn = torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)
        return drawn  # type: ignore[return-value]


def pick(logits: torch.Tensor, top_p: float, uniform: torch.Tensor) -> torch.Tensor:
    """The token of each row: the first whose cumulated probability, within the nucleus, is above the number.

    Args:
        logits: (rows, vocabulary) float32
        top_p: probability of the nucleus; 1 keeps all tokens
        uniform: (rows,) float32 in [0, 1)

    Returns:
        (rows,) int64
    """
    probabilities = logits.softmax(-1)
    if top_p >= 1:
        return _place(probabilities, uniform)
    if probabilities.shape[1] <= LIKELIEST or logits.device.type == "hpu":  # which compiles one way, not two
        return _of_nucleus(*probabilities.sort(descending=True, stable=True), top_p, uniform)
    likeliest, tokens = probabilities.topk(LIKELIEST)
    token = _of_nucleus(likeliest, tokens, top_p, uniform)
    flat = (likeliest.cumsum(-1)[:, -1] < top_p).nonzero()[:, 0]  # rows whose nucleus is larger
    if len(flat):
        ordered, tokens = probabilities[flat].sort(descending=True, stable=True)
        token[flat] = _of_nucleus(ordered, tokens, top_p, uniform[flat])
    return token


def _of_nucleus(ordered: torch.Tensor, tokens: torch.Tensor, top_p: float, uniform: torch.Tensor) -> torch.Tensor:
    """(rows,) tokens drawn from the nucleus, given probabilities (rows, k), falling, that hold it, and their tokens."""
    inside = ordered.cumsum(-1) - ordered < top_p
    inside[:, 0] = True
    place = _place(ordered * inside, uniform)
    return tokens.gather(1, place[:, None])[:, 0]


def _place(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    cumulated = weights.cumsum(-1)
    reach = uniform[:, None] * cumulated[:, -1:]
    place = (cumulated <= reach).sum(-1)
    # Rounding may carry a number beyond the last token that has any weight
    last = weights.shape[1] - 1 - (weights > 0).flip(-1).int().argmax(-1)
    return torch.minimum(place, last)
