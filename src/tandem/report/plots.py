"""Drawings of the tail monitor's logs, as SVG in the page's colours, as `curves` makes them of the trainer's log.

All text in the drawings is made here from numbers: none comes from a data set, a model or a machine.
"""

import itertools
import math
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem.monitor.margins import read_margins_log
from tandem.report.curves import CHOSEN, DPO, MUTED, SFT, new_figure, thinned, to_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Records = Sequence[dict[str, Any]]

RANKS_NAMED = 8  # with more ranks than this, a legend would cover the drawing


def monitor_plots(logs: str | Path, history: Records) -> Iterator[tuple[str, str, str]]:
    """Title, note and SVG of each drawing that there are numbers for.

    Args:
        logs: the logs folder of the DPO stage, which holds `margins/`.
        history: the trainer's `log_history`.
    """
    steps, events = read_margins_log(Path(logs) / "margins")
    deltas = [event["delta"] for event in events if event["event"] == "warmup_end"]
    tested = [record for record in steps if record["p_hat"] is not None]
    failed = sum(record["over"] for record in tested)
    drawings = (
        ("Margins", "nats, not scaled by β; shaded: 10% to 90%, min to max", draw_margins(steps)),
        ("Tail", f"share of margins above τ; {failed} of {len(tested)} tests failed", draw_tail(tested, deltas)),
        ("β", "what each step's loss used", draw_beta(steps)),
        ("Memory", "GiB in use, by rank", draw_memory(history)),
    )
    for title, note, figure in drawings:
        if figure is not None:
            yield title, note, to_svg(figure, f"{title} by optimizer step: {note}")


def draw_margins(steps: Records) -> "Figure | None":
    """The range, the 10% to 90% range, the median and the mean of each step's margins, and τ; None without margins."""
    drawn = [record for record in steps if record["mean"] is not None]
    if not drawn:
        return None
    figure, axes = new_figure()
    mean = statistics.fmean
    for low, high, alpha, least_of, most_of in (("min", "max", 0.15, min, max), ("p10", "p90", 0.3, mean, mean)):
        (x, least), (_, most) = (
            zip(*thinned([(record["step"], record[key]) for record in drawn], of_bin), strict=True)
            for key, of_bin in ((low, least_of), (high, most_of))
        )
        axes.fill_between(x, least, most, alpha=alpha, color=DPO, linewidth=0)
    axes.axhline(0.0, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)))
    for key, label, colour, style in (
        ("median", "median", DPO, "-"),
        ("mean", "mean", DPO, ":"),
        ("tau", "threshold τ", SFT, "-"),
    ):
        axes.plot(*_series(drawn, key), style, color=colour, linewidth=1.6, label=label)
    return _finish(figure, axes)


def draw_tail(tested: Records, deltas: Sequence[float]) -> "Figure | None":
    """The share above τ of each tested step against δ, failed tests marked; None if no step was tested."""
    if not tested:
        return None
    figure, axes = new_figure()
    axes.plot(*_series(tested, "p_hat"), color=DPO, linewidth=1.2, label="share above τ")
    failed = [record for record in tested if record["over"]]
    if failed:
        axes.plot(*_series(failed, "p_hat", max), "o", color=SFT, markersize=3.5, label="test failed")
    for delta in deltas:
        axes.axhline(delta, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)), label=f"δ = {delta:g}")
    axes.set_ylim(bottom=0.0)
    return _finish(figure, axes)


def draw_beta(steps: Records) -> "Figure | None":
    """β by step; None if there are no steps."""
    if not steps:
        return None
    figure, axes = new_figure()
    axes.plot(*_series(steps, "beta"), color=DPO, linewidth=1.6)
    return _finish(figure, axes)


def draw_memory(history: Records) -> "Figure | None":
    """Memory in use on each rank, with its peak in the legend; None if memory was not logged."""
    ranks = sorted({int(m[1]) for record in history for key in record if (m := re.match(r"system/rank_(\d+)/", key))})
    if not ranks:
        return None
    figure, axes = new_figure()
    styles = itertools.cycle(itertools.product(("-", "--", ":"), (DPO, SFT, CHOSEN, MUTED)))
    for rank, (style, colour) in zip(ranks, styles, strict=False):
        _, peaks = _series(history, f"system/rank_{rank}/peak_gib", max)
        label = f"rank {rank}" + (f", peak {max(peaks):.3g}" if peaks else "")
        x, allocated = _series(history, f"system/rank_{rank}/allocated_gib", max)
        axes.plot(x, allocated, style, color=colour, linewidth=1.6, label=label if len(ranks) <= RANKS_NAMED else None)
    axes.set_ylim(bottom=0.0)
    return _finish(figure, axes)


def _series(
    records: Records, key: str, of_bin: Callable[[Sequence[float]], float] = statistics.fmean
) -> tuple[list[int], list[float]]:
    """Steps and values of the records that have a finite number under `key`, `thinned`."""
    known = [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float) and math.isfinite(r[key])]
    found = thinned(known, of_bin)
    return [step for step, _ in found], [float(value) for _, value in found]


def _finish(figure: "Figure", axes: Any) -> "Figure":
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, labelcolor=MUTED, fontsize=10, handlelength=1.4)
    for line in axes.lines:
        if len(line.get_xdata()) == 1:  # a line of one point would not show
            line.set_marker("o")
    axes.set_xlabel("step", color=MUTED)
    return figure
