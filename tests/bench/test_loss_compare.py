"""The comparison of two commits must see the smallest difference, or "equal bit for bit" says nothing."""

from typing import Any

import numpy as np
import pytest
import torch

from bench.loss_compare import compare

NEXT_UP = float(np.nextafter(np.float32(1), np.float32(2)))


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (0.6931471805599453, 0.6931471805599454),
        (0.0, -0.0),
        (1, 1.0),
        (np.float32([1, 2]), np.float32([NEXT_UP, 2])),
        (np.float32([1]), np.float64([1])),
        (np.float32([1]), np.float32([1, 1])),
        (torch.tensor([1.0]), torch.tensor([NEXT_UP])),
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.bfloat16)),
    ],
)
def test_the_smallest_difference_is_named(ours: Any, theirs: Any):
    assert compare("weights", {"a": ours}, {"a": ours}) == []
    (line,) = compare("weights", {"a": ours}, {"a": theirs})
    assert line.startswith("weights: a ")


def test_not_a_number_equals_itself():
    assert compare("loss", {"a": float("nan")}, {"a": float("nan")}) == []


def test_what_is_missing_is_named():
    assert compare("weights", {"a": 1, "b": 2}, {"a": 1}) == ["weights: in one commit alone: b"]
    assert compare("weights", {}, {}) == ["weights: nothing was found"]
