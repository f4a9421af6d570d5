"""Who may ask when: the adaptive limit and the budget, without a server."""

import asyncio

import pytest

from tandem.errors import UserError
from tandem.judge.admission import Admission, OverBudget
from tandem.judge.asking import raise_first
from tandem.judge.backends.batch import batch_files


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 10))


async def finish(admission, count):
    for _ in range(count):
        async with admission.request(0.0):
            pass


def test_a_429_halves_the_limit_once_per_congestion_and_replies_win_it_back(monkeypatch):
    async def story():
        admission = Admission(8, None)
        for _ in range(5):
            admission.too_many_requests()  # all of one moment
        limits = [admission.limit]
        monkeypatch.setattr("tandem.judge.admission.HALVING_PAUSE", 0.0)
        for _ in range(5):
            admission.too_many_requests()
        limits.append(admission.limit)
        for replies in (1, 2, 3, 4, 5, 6, 7, 8):  # as many replies as the limit: one more
            await finish(admission, replies)
            limits.append(admission.limit)
        return limits

    assert run(story()) == [4, 1, 2, 3, 4, 5, 6, 7, 8, 8]


def test_no_more_than_the_limit_are_under_way():
    async def story():
        admission = Admission(3, None)
        active = most = 0

        async def one():
            nonlocal active, most
            async with admission.request(0.0):
                active += 1
                most = max(most, active)
                await asyncio.sleep(0.001)
                active -= 1

        await asyncio.gather(*(one() for _ in range(20)))
        return most

    assert run(story()) == 3


def test_the_budget_waits_for_what_is_held_back_before_it_gives_up():
    async def story():
        admission = Admission(10, 10.0)
        done = 0

        async def one():
            nonlocal done
            async with admission.request(4.0):  # at most 4, in truth 1
                await asyncio.sleep(0.001)
                admission.spend(1.0)
                done += 1

        results = await asyncio.gather(*(one() for _ in range(20)), return_exceptions=True)
        return done, admission.left, {type(result) for result in results}

    # 7 spent leaves 3, less than the 4 that one more might cost
    assert run(story()) == (7, 3.0, {type(None), OverBudget})


def test_a_request_that_fails_gives_its_place_back():
    async def story():
        admission = Admission(1, 5.0)
        for _ in range(3):
            with pytest.raises(ValueError):
                async with admission.request(5.0):
                    raise ValueError
        return admission.left

    assert run(story()) == 5.0


def test_the_error_that_the_user_can_act_on_comes_first():
    with pytest.raises(UserError):
        raise_first([None, OverBudget(), UserError("key")])
    raise_first([None, None])


def test_batch_files_keep_within_the_limits(monkeypatch):
    monkeypatch.setattr("tandem.judge.backends.batch.BATCH_REQUESTS", 3)
    assert [len(lines) for lines in batch_files(((str(i), {}) for i in range(7)), "/v1/responses")] == [3, 3, 1]
    assert list(batch_files([], "")) == []
    size = len(next(iter(batch_files([("0", {})], "/v1/responses")))[0])
    monkeypatch.setattr("tandem.judge.backends.batch.BATCH_BYTES", 2 * size + 1)
    assert [len(lines) for lines in batch_files(((str(i), {}) for i in range(5)), "/v1/responses")] == [2, 2, 1]
