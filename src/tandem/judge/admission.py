"""Who may ask the judge now: the pace that the server bears, and the money that is left."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

HALVING_PAUSE = 1.0  # seconds in which further 429s are taken for the same congestion


class OverBudget(Exception):
    """The next request might cost more than --max_cost leaves."""


class Admission:
    """Who may ask now: at most `limit` requests at a time, and none that might overrun the budget.

    The limit is halved at a 429 and grows by one after as many replies as it allows at a time (additive increase,
    multiplicative decrease). A request that waits out a Retry-After keeps its place, which slows the rest down too.
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
        """Wait for a place, and keep `worst_cost` of the budget back while the block runs."""
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
        # With requests under way, some of what they hold back may come free: wait rather than give up
        return self._within_budget(worst_cost) or self._active == 0

    def check(self, worst_cost: float) -> None:
        """Raise OverBudget if `worst_cost` might not be left."""
        if not self._within_budget(worst_cost):
            raise OverBudget

    def spend(self, cost: float) -> None:
        """Take what a reply cost off the budget."""
        if self.left is not None:
            self.left -= cost

    def too_many_requests(self) -> None:
        """The server answered 429."""
        now = asyncio.get_running_loop().time()
        if now - self._halved_at >= HALVING_PAUSE:
            self._halved_at = now
            self._replies = 0
            self.limit = max(1, self.limit // 2)
