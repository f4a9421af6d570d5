"""kill -9 and lost machines, over all stages of both pipelines: the same bytes in the end."""

from pathlib import Path

import pytest

from tests.pipelines.campaign import PIPELINES


@pytest.mark.slow
@pytest.mark.parametrize(("pipeline", "kills", "losses"), [("all_stages", 40, 10), ("rounds", 20, 0)])
def test_nothing_of_kills_and_losses_is_to_be_seen(tmp_path: Path, pipeline: str, kills: int, losses: int):
    with PIPELINES[pipeline](tmp_path) as campaign:
        campaign.straight()
        assert campaign.go_on(kills, losses, until=float("inf"))
        assert campaign.state["faults"] == []
        # A stage of a second is over before its kill comes, now and then
        long = {stage for stage, seconds in campaign.state["took"].items() if seconds > 5}
        assert campaign.state["hits"].keys() >= long - {"report"}
