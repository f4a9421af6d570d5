"""Which requests to the judge may be sent now, by the rate that the server allows and the budget that is left."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

HALVING_PAUSE = 1.0  # seconds after a 429 in which further ones count as part of the same congestion


class OverBudget(Exception):
    """The next request might cost more than --max_cost leaves."""


class Admission:
    """Admits requests: at most `limit` at a time, and none that might overrun the budget.

    The limit is halved at a 429, and grows by one after `limit` replies (additive increase, multiplicative decrease).
    A request that waits out a Retry-After keeps its place, so that fewer others are sent meanwhile.
    """

    def __init__(self, maximum: int, left: float | None) -> None:
        self.maximum = self.limit = maximum
        self.left = left  # of the budget; None: no budget
        self._active = 0
        self._reserved = 0.0
        self._replies = 0
        self._halved_at = -HALVING_PAUSE
        self._changed = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def request(self, worst_cost: float) -> AsyncIterator[None]:
        """Wait for a place, and reserve `worst_cost` of the budget while the block runs."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._active < self.limit and self._affordable(worst_cost))
            self.check(worst_cost)
            self._active += 1
            self._reserved += worst_cost
        try:
            yield
        finally:
            async with self._changed:
                self._active -= 1
                self._reserved -= worst_cost
                self._replies += 1
                if self._replies >= self.limit:
                    self._replies = 0
                    self.limit = min(self.maximum, self.limit + 1)
                self._changed.notify_all()

    def _within_budget(self, worst_cost: float) -> bool:
        return self.left is None or self._reserved + worst_cost <= self.left

    def _affordable(self, worst_cost: float) -> bool:
        # Requests under way may cost less than is reserved for them: wait for them before giving up
        return self._within_budget(worst_cost) or self._active == 0

    def check(self, worst_cost: float) -> None:
        """Raise OverBudget if the budget, less what is reserved, does not cover `worst_cost`."""
        if not self._within_budget(worst_cost):
            raise OverBudget

    def spend(self, cost: float) -> None:
        """Subtract the cost of a reply from the budget."""
        if self.left is not None:
            self.left -= cost

    def too_many_requests(self) -> None:
        """Slow down: the server has answered 429."""
        now = asyncio.get_running_loop().time()
        if now - self._halved_at >= HALVING_PAUSE:
            self._halved_at = now
            self._replies = 0
            self.limit = max(1, self.limit // 2)
