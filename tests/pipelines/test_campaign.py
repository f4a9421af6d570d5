"""kill -9 and lost machines, over all stages of both pipelines: the same bytes in the end.

A campaign takes the better part of an hour. One that `python -m tests.pipelines.campaign` has begun in the folder
$CAMPAIGN/PIPELINE is gone on with.
"""

import os
from pathlib import Path

import pytest

from tests.pipelines.campaign import PIPELINES


@pytest.mark.slow
@pytest.mark.parametrize(("pipeline", "kills", "losses"), [("all_stages", 40, 10), ("rounds", 20, 0)])
def test_nothing_of_kills_and_losses_is_to_be_seen(tmp_path: Path, pipeline: str, kills: int, losses: int):
    folder = Path(os.environ["CAMPAIGN"]) / pipeline if "CAMPAIGN" in os.environ else tmp_path
    with PIPELINES[pipeline](folder) as campaign:
        campaign.straight()
        assert campaign.go_on(kills, losses, until=float("inf"))
        assert campaign.state["faults"] == []
        # A stage of a second is over before its kill comes, now and then
        long = {stage for stage, seconds in campaign.state["took"].items() if seconds > 5}
        assert campaign.state["hits"].keys() >= long - {"report"}
