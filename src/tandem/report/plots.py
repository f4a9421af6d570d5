"""Plots of a training run as SVG text for the report's page.

Inline SVG without background whose lines and text are `currentColor`, so that a page in light or dark colours both
read well. Data are numbers alone: no text of a dataset, model or machine is drawn.
"""

import dataclasses
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tandem.monitor.margins import read_margins_log

Records = Sequence[dict[str, Any]]

# Stands for currentColor while matplotlib draws, which knows no such colour
_INK = "#010203"
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    # Blue, orange, green, pink, sky of Okabe & Ito: told apart by the colour-blind, on white and on black
    "axes.prop_cycle": cycler(color=["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9"]),
}
_FAILED = "#d55e00"


@dataclasses.dataclass(frozen=True)
class Plot:
    """One figure of the report."""

    name: str
    """File-safe."""
    title: str
    svg: str
    """An `<svg>` element to put into a page as it is."""


def run_plots(logs: str | Path, history: Records) -> list[Plot]:
    """The plots of a training run that there is data for.

    Args:
        logs: the run's logs folder, which has `margins/`.
        history: `log_history` of the trainer, see `read_history`.
    """
    steps, events = read_margins_log(Path(logs) / "margins")
    plots = [
        _plot("margins", "Margins, policy against reference", margins_axes, steps),
        _plot("tail", "Share of margins above the threshold", tail_axes, steps, events),
        _plot("beta", "β", beta_axes, steps),
        _plot("loss", "Loss", curve_axes, history, {"loss": "training", "eval_loss": "held out"}, "loss"),
        _plot(
            "accuracy",
            "Pairs ranked right",
            curve_axes,
            history,
            {"rewards/accuracies": "training", "eval_rewards/accuracies": "held out"},
            "share of pairs",
        ),
        _plot(
            "logps",
            "Log-probability of the answers",
            curve_axes,
            history,
            {"logps/chosen": "chosen", "logps/rejected": "rejected"},
            "nats per answer",
        ),
        _plot("memory", "Memory by rank", memory_axes, history),
    ]
    return [plot for plot in plots if plot is not None]


def read_history(folder: str | Path) -> list[dict[str, Any]]:
    """The trainer's log history of a training output: `trainer_state.json` there, or of its latest checkpoint.

    Empty if there is none.
    """
    folder = Path(folder)
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: _step_of(path.name))
    for candidate in (folder, *reversed(checkpoints)):
        try:
            history: list[dict[str, Any]] = json.loads((candidate / "trainer_state.json").read_text())["log_history"]
        except FileNotFoundError:
            continue
        return history
    return []


def _step_of(name: str) -> int:
    number = name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1


def _plot(name: str, title: str, draw: Any, *data: Any) -> Plot | None:
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(7.0, 2.8), layout="constrained")
        axes = figure.add_subplot()
        if not draw(axes, *data):
            return None
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.15, color=_INK)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return Plot(name, title, _svg(figure, name, title))


def _svg(figure: Figure, name: str, title: str) -> str:
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    # Several figures share a page, so what matplotlib numbers from 1 needs a name of its own
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


def _series(records: Records, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the records that have a finite number under `key`."""
    found = [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float) and math.isfinite(r[key])]
    return [step for step, _ in found], [float(value) for _, value in found]


def margins_axes(axes: Axes, steps: Records) -> bool:
    """Min to max, 10% to 90%, median and mean of each step's margins, and τ. False if there is nothing to draw."""
    drawn = [record for record in steps if record["mean"] is not None]
    if not drawn:
        return False
    x = [record["step"] for record in drawn]
    for low, high, alpha, label in (("min", "max", 0.15, "min to max"), ("p10", "p90", 0.3, "10% to 90%")):
        bounds = ([record[low] for record in drawn], [record[high] for record in drawn])
        axes.fill_between(x, *bounds, alpha=alpha, color="C0", linewidth=0, label=label)
    axes.plot(x, [record["median"] for record in drawn], color="C0", label="median")
    axes.plot(x, [record["mean"] for record in drawn], color="C0", linestyle=":", label="mean")
    tau_steps, tau = _series(drawn, "tau")
    if tau:
        axes.plot(tau_steps, tau, color="C1", label="threshold τ")
    axes.axhline(0.0, color=_INK, linewidth=0.5)
    axes.set_ylabel("nats")
    return True


def tail_axes(axes: Axes, steps: Records, events: Records) -> bool:
    """p_hat of each step against δ, failed tests marked. False if there is nothing to draw."""
    x, p_hat = _series(steps, "p_hat")
    if not x:
        return False
    axes.plot(x, p_hat, color="C0", linewidth=0.8, label="share above τ")
    failed = [record for record in steps if record["over"]]
    axes.scatter(
        [record["step"] for record in failed],
        [record["p_hat"] for record in failed],
        color=_FAILED,
        s=12,
        zorder=3,
        label=f"test failed ({len(failed)} of {len(x)})",
    )
    for event in events:
        if event["event"] == "warmup_end":
            axes.axhline(event["delta"], color=_INK, linestyle="--", linewidth=0.8, label=f"δ = {event['delta']:g}")
    axes.set_ylabel("share of pairs")
    axes.set_ylim(bottom=0.0)
    return True


def beta_axes(axes: Axes, steps: Records) -> bool:
    """β that each step's loss used. False if there is nothing to draw."""
    x, beta = _series(steps, "beta")
    axes.plot(x, beta, label="β")
    axes.set_ylabel("β")
    return bool(x)


def curve_axes(axes: Axes, history: Records, labels: dict[str, str], unit: str) -> bool:
    """One line for each key of `labels` that the history has. False if it has none."""
    for key, label in labels.items():
        x, y = _series(history, key)
        if x:
            axes.plot(x, y, label=label, marker="." if len(x) < 30 else None)
    axes.set_ylabel(unit)
    return bool(axes.lines)


def memory_axes(axes: Axes, history: Records) -> bool:
    """Allocated memory of each rank, and its peak as a dashed line. False if there is nothing to draw."""
    ranks = sorted({int(m[1]) for record in history for key in record if (m := re.match(r"system/rank_(\d+)/", key))})
    for rank in ranks:
        x, allocated = _series(history, f"system/rank_{rank}/allocated_gib")
        (line,) = axes.plot(x, allocated, label=f"rank {rank}")
        x, peak = _series(history, f"system/rank_{rank}/peak_gib")
        axes.plot(x, peak, linestyle="--", color=line.get_color(), label=f"rank {rank}, peak")
    axes.set_ylabel("GiB")
    axes.set_ylim(bottom=0.0)
    return bool(ranks)
