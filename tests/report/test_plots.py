"""Plots read from the files a run leaves."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from tandem.monitor.margins import MarginsLog
from tandem.monitor.tail import TailConfig, TailState, update
from tandem.report.plots import (
    beta_axes,
    curve_axes,
    margins_axes,
    memory_axes,
    read_history,
    run_plots,
    tail_axes,
)

ALL = ["margins", "tail", "beta", "loss", "accuracy", "logps", "memory"]


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """20 steps whose tail grows heavy after the warm-up."""
    rng = np.random.default_rng(0)
    log, state = MarginsLog(tmp_path / "logs" / "margins"), TailState(beta=0.1)
    config = TailConfig(delta=0.1, warmup_steps=5, ema=0.05)
    for step in range(1, 21):
        margins = rng.normal(0.1 * step, 1.0 + 0.1 * step, 16)
        state, tail = update(state, margins, config)
        log.write_step(1, step, [f"p{i}" for i in range(16)], margins, tail)
        if tail.warmup_ended and tail.tau is not None:
            log.write_warmup_end(1, step, tail.tau, config.delta)
    return tmp_path / "logs"


def history(ranks: int = 2) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "loss": 0.69 - 0.01 * step,
            "rewards/accuracies": 0.5 + 0.02 * step,
            "logps/chosen": -80.0 - step,
            "logps/rejected": -80.0 - 2 * step,
        }
        | {f"system/rank_{r}/allocated_gib": 1.0 + r for r in range(ranks)}
        | {f"system/rank_{r}/peak_gib": 2.0 + r for r in range(ranks)}
        for step in range(2, 21, 2)
    ] + [{"step": 20, "eval_loss": 0.6, "eval_rewards/accuracies": 0.7}, {"step": 20, "train_runtime": 3.0}]


def test_every_plot_is_well_formed_and_alone(logs: Path) -> None:
    plots = run_plots(logs, history())
    assert [plot.name for plot in plots] == ALL
    ids: list[str] = []
    for plot in plots:
        root = ElementTree.fromstring(plot.svg)
        assert root.tag.endswith("svg")
        assert root.get("aria-label") == plot.title
        ids += re.findall(r'\bid="([^"]+)"', plot.svg)
        used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', plot.svg))
        assert used <= set(re.findall(r'\bid="([^"]+)"', plot.svg))
        # Nothing fetched, nothing run, no colour of a page assumed
        assert not re.search(r'<script|(?:href|src)="(?!#)|@import|<metadata', plot.svg)
        assert "currentColor" in plot.svg
        assert "#010203" not in plot.svg
        assert not re.search(r"fill: ?#(ffffff|000000)", plot.svg)
    assert len(ids) == len(set(ids))


def test_the_same_data_give_the_same_bytes(logs: Path) -> None:
    assert run_plots(logs, history()) == run_plots(logs, history())


def test_only_what_there_is_data_for(logs: Path, tmp_path: Path) -> None:
    assert run_plots(tmp_path / "none", []) == []
    assert [plot.name for plot in run_plots(logs, [])] == ALL[:3]
    assert [plot.name for plot in run_plots(tmp_path / "none", history(0))] == ["loss", "accuracy", "logps"]


def axes() -> Any:
    return Figure().add_subplot()


def lines(drawn: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in drawn.lines}


STEPS = [
    {"step": 1, "mean": 0.0, "median": 0.1, "min": -1, "p10": -0.5, "p90": 0.5, "max": 1, "tau": None}
    | {"p_hat": None, "over": None, "beta": 0.1},
    {"step": 2, "mean": None, "median": None, "min": None, "p10": None, "p90": None, "max": None, "tau": 0.5}
    | {"p_hat": None, "over": None, "beta": 0.1},
    {"step": 3, "mean": 1.0, "median": 1.1, "min": 0, "p10": 0.5, "p90": 1.5, "max": 2, "tau": 0.75}
    | {"p_hat": 0.25, "over": True, "beta": 0.2},
    {"step": 4, "mean": 2.0, "median": 2.1, "min": 1, "p10": 1.5, "p90": 2.5, "max": 3, "tau": 0.5}
    | {"p_hat": 0.125, "over": False, "beta": 0.3},
]
EVENTS = [{"event": "warmup_end", "step": 2, "tau0": 0.5, "delta": 0.15}]


def test_margins_drawn() -> None:
    drawn = axes()
    assert margins_axes(drawn, STEPS)
    assert lines(drawn)["median"] == ([1, 3, 4], [0.1, 1.1, 2.1])
    assert lines(drawn)["threshold τ"] == ([3, 4], [0.75, 0.5])
    outer, inner = (band.get_paths()[0].get_extents() for band in drawn.collections)
    assert (outer.y0, outer.y1, inner.y0, inner.y1) == (-1, 3, -0.5, 2.5)


def test_tail_drawn_with_its_failures() -> None:
    drawn = axes()
    assert tail_axes(drawn, STEPS, EVENTS)
    assert lines(drawn)["share above τ"] == ([3, 4], [0.25, 0.125])
    assert lines(drawn)["δ = 0.15"][1] == [0.15, 0.15]
    (failed,) = drawn.collections
    assert failed.get_offsets().tolist() == [[3, 0.25]]
    assert failed.get_label() == "test failed (1 of 2)"
    assert not tail_axes(axes(), STEPS[:2], EVENTS)


def test_beta_drawn() -> None:
    drawn = axes()
    assert beta_axes(drawn, STEPS)
    assert lines(drawn)["β"] == ([1, 2, 3, 4], [0.1, 0.1, 0.2, 0.3])


def test_curves_leave_out_what_is_not_finite() -> None:
    drawn = axes()
    records = [{"step": 1, "loss": 0.7}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": "<script>"}]
    assert curve_axes(drawn, records, {"loss": "training", "eval_loss": "held out"}, "loss")
    assert lines(drawn) == {"training": ([1], [0.7])}


def test_memory_drawn_by_rank() -> None:
    drawn = axes()
    assert memory_axes(drawn, history(11))
    assert list(lines(drawn))[::2] == [f"rank {rank}" for rank in range(11)]
    assert lines(drawn)["rank 1"] == (list(range(2, 21, 2)), [2.0] * 10)
    assert lines(drawn)["rank 1, peak"][1] == [3.0] * 10


def test_history_is_the_runs_own_or_the_latest_checkpoints(tmp_path: Path) -> None:
    assert read_history(tmp_path) == []
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        state = {"log_history": [{"step": step}]}
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "checkpoint-11").mkdir()  # killed before its state was written
    assert read_history(tmp_path) == [{"step": 10}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 12}]}))
    assert read_history(tmp_path) == [{"step": 12}]
