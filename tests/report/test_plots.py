"""Drawings of the files a monitored run leaves."""

import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandem.monitor.margins import MarginsLog
from tandem.monitor.tail import TailConfig, TailState, update
from tandem.report.curves import BINS, thinned
from tandem.report.plots import RANKS_NAMED, draw_beta, draw_margins, draw_memory, draw_tail, monitor_plots

ALL = ["Margins", "Tail", "β", "Memory"]


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
    log.flush()
    assert 0 < state.failures < state.tests
    return tmp_path / "logs"


def history(ranks: int = 2) -> list[dict[str, Any]]:
    return [
        {"step": step, "loss": 0.69}
        | {f"system/rank_{r}/allocated_gib": 1.0 + r for r in range(ranks)}
        | {f"system/rank_{r}/peak_gib": 2.0 + r for r in range(ranks)}
        for step in range(2, 21, 2)
    ] + [{"step": 20, "eval_loss": 0.6}]


def test_every_drawing_is_well_formed_and_alone(logs: Path) -> None:
    plots = list(monitor_plots(logs, history()))
    assert [title for title, _, _ in plots] == ALL
    ids: list[str] = []
    for title, note, svg in plots:
        root = ElementTree.fromstring(svg.replace("xlink:href", "href"))
        assert root.get("aria-label") == f"{title} by optimizer step: {note}"
        own = re.findall(r'\bid="([^"]+)"', svg)
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg)) <= set(own)
        ids += own
        # Nothing fetched, nothing run, and no colour but the page's
        assert not re.search(r'<script|(?:href|src)="(?!#)|@import', svg)
        assert set(re.findall(r"(?:fill|stroke): ?([^;\"]+)", svg)) <= {
            "none",
            *(f"var(--{name})" for name in ("muted", "rule", "dpo", "sft", "chosen")),
        }
    assert len(ids) == len(set(ids))


def test_the_note_counts_the_failed_tests(logs: Path) -> None:
    notes = {title: note for title, note, _ in monitor_plots(logs, [])}
    assert re.fullmatch(r"share of margins above τ; \d+ of 15 tests failed", notes["Tail"])


def test_only_what_there_is_data_for(logs: Path, tmp_path: Path) -> None:
    def titles(folder: Path, ranks: int) -> list[str]:
        return [title for title, _, _ in monitor_plots(folder, history(ranks))]

    assert titles(tmp_path / "none", 0) == []
    assert titles(logs, 0) == ALL[:3]
    assert titles(tmp_path / "none", 1) == ALL[3:]


def lines(figure: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].lines}


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


def test_margins_drawn() -> None:
    figure: Any = draw_margins(STEPS)
    assert lines(figure)["median"] == ([1, 3, 4], [0.1, 1.1, 2.1])
    assert lines(figure)["mean"] == ([1, 3, 4], [0.0, 1.0, 2.0])
    assert lines(figure)["threshold τ"] == ([3, 4], [0.75, 0.5])
    outer, inner = (band.get_paths()[0].get_extents() for band in figure.axes[0].collections)
    assert (outer.y0, outer.y1, inner.y0, inner.y1) == (-1, 3, -0.5, 2.5)


def test_tail_drawn_with_its_failures() -> None:
    figure = draw_tail(STEPS[2:], [0.15])
    assert lines(figure)["share above τ"] == ([3, 4], [0.25, 0.125])
    assert lines(figure)["test failed"] == ([3], [0.25])
    assert lines(figure)["δ = 0.15"][1] == [0.15, 0.15]
    assert "test failed" not in lines(draw_tail(STEPS[3:], [0.15]))


def test_beta_drawn() -> None:
    figure: Any = draw_beta(STEPS)
    (line,) = figure.axes[0].lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1, 2, 3, 4], [0.1, 0.1, 0.2, 0.3])


def test_memory_drawn_by_rank() -> None:
    drawn = lines(draw_memory(history(3)))
    assert list(drawn) == ["rank 0, peak 2", "rank 1, peak 3", "rank 2, peak 4"]
    assert drawn["rank 1, peak 3"] == (list(range(2, 21, 2)), [2.0] * 10)
    many: Any = draw_memory(history(RANKS_NAMED + 3))
    assert many.axes[0].get_legend() is None
    assert [line.get_ydata()[0] for line in many.axes[0].lines] == [1.0 + rank for rank in range(RANKS_NAMED + 3)]


def test_text_and_nan_in_a_log_are_not_drawn() -> None:
    values = [1.0, math.nan, "<script>", None, 2.0]
    records = [{"step": step, "system/rank_0/allocated_gib": value} for step, value in enumerate(values)]
    assert lines(draw_memory(records)) == {"rank 0": ([0, 4], [1.0, 2.0])}


def test_a_long_run_is_drawn_in_bins(tmp_path: Path):
    """Of 50 steps each: the least, the greatest and the last step of them; a short run is drawn as it is."""
    steps = [
        {
            "step": n,
            "mean": 0.0,
            "median": 0.0,
            "tau": 1.0,
            "min": -1.0,
            "max": 1.0,
            "p10": -0.5,
            "p90": 0.5,
            "beta": 0.1,
        }
        for n in range(1, 100_001)
    ]
    steps[70_010] |= {"min": -9.0, "max": 7.0}
    figure = draw_margins(steps)
    assert figure is not None
    (axes,) = figure.axes
    assert all(len(line.get_xdata()) <= BINS for line in axes.lines)
    corners = axes.collections[0].get_paths()[0].vertices
    assert len(corners) <= 2 * BINS + 5
    assert (corners[:, 1].min(), corners[:, 1].max()) == (-9.0, 7.0)
    assert thinned([(1, 2.0), (2, 4.0)]) == [(1, 2.0), (2, 4.0)]
    long = thinned([(n, float(n)) for n in range(1, 2 * BINS + 1)])
    assert (len(long), long[0], long[-1]) == (BINS, (2, 1.5), (2 * BINS, 2 * BINS - 0.5))
