"""A preparation that is ended: nobody waits for what its processes work on."""

import time
from collections.abc import Sequence

import psutil
import pytest

from tandem.data import chunks
from tandem.data.chunks import Workers


def _slowly(rows: Sequence[int]) -> int:
    time.sleep(30 * rows[0])
    return rows[0]


def test_an_interrupt_does_not_wait_for_the_chunks_at_work(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chunks, "CHUNK", 1)
    begun, before = time.monotonic(), psutil.Process().children()
    with pytest.raises(KeyboardInterrupt), Workers(_slowly, 2) as workers:
        for made in workers.map([0, 1, 1, 1], 4, "rows"):
            assert made == 0
            raise KeyboardInterrupt
    assert time.monotonic() - begun < 10
    assert psutil.Process().children() == before
