"""Sums over the steps between two logs."""

import dataclasses

import numpy as np
from numpy.typing import NDArray


@dataclasses.dataclass
class Interval:
    """Sums over the steps since the log before; saved with each checkpoint."""

    pairs: int = 0
    margin: float = 0.0
    chosen: float = 0.0
    correct: float = 0.0
    kl: float = 0.0
    kl_pairs: int = 0
    tau0: float | None = None

    def add(self, margins: NDArray[np.float64], chosen: NDArray[np.float64], kl: NDArray[np.float64]) -> None:
        """Take a step's pairs, (n,) nats each; kl is NaN where there is no estimate."""
        self.pairs += margins.size
        self.margin += float(margins.sum())
        self.chosen += float(chosen.sum())
        self.correct += float((margins > 0).sum() + 0.5 * (margins == 0).sum())
        self.kl += float(kl[np.isfinite(kl)].sum())
        self.kl_pairs += int(np.isfinite(kl).sum())

    @property
    def mean_chosen(self) -> float:
        """Mean log-prob of the chosen answers, nats per answer."""
        return self.chosen / self.pairs

    @property
    def mean_margin(self) -> float:
        """Nats, not scaled by β."""
        return self.margin / self.pairs

    @property
    def accuracy(self) -> float:
        """Share of pairs with a positive margin; one of zero counts half."""
        return self.correct / self.pairs

    @property
    def mean_kl(self) -> float | None:
        """Nats per answer; None without an estimate."""
        return self.kl / self.kl_pairs if self.kl_pairs else None
