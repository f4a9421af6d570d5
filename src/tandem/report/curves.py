"""Training curves as SVG with the page's colours as CSS variables, so that one drawing fits light and dark."""

import dataclasses
import html
import io
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tandem.report.collect import Json, Run, as_written

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Matplotlib draws in these placeholders, which are then replaced by the variables of report.css
COLOURS = {
    "#010203": "var(--muted)",
    "#010204": "var(--rule)",
    "#010205": "var(--dpo)",
    "#010206": "var(--sft)",
    "#010207": "var(--chosen)",
}
MUTED, RULE, DPO, SFT, CHOSEN = COLOURS
BINS = 2000  # points of a curve at most; it is a few hundred pixels wide
SIZE = (4.6, 2.7)  # inches; about the width of the page's columns, so that text keeps its size


@dataclasses.dataclass(frozen=True)
class Line:
    """A curve of one key of the trainer's log."""

    key: str
    label: str
    colour: str


@dataclasses.dataclass(frozen=True)
class Curves:
    """A drawing of curves from one stage's log."""

    stage: str
    title: str
    note: str
    lines: tuple[Line, ...]
    level: float | None = None  # where a horizontal line is drawn, to compare with


DRAWINGS = (
    Curves("sft", "SFT loss", "nats per answer token", (Line("loss", "training", SFT),)),
    Curves("dpo", "DPO loss", "0.69: no preference (sigmoid)", (Line("loss", "training", DPO),)),
    Curves(
        "dpo",
        "Accuracy in training",
        "share of pairs with a positive margin",
        (Line("rewards/accuracies", "training", DPO),),
        0.5,
    ),
    Curves("dpo", "Reward margin", "β times the mean margin", (Line("rewards/margins", "training", DPO),), 0.0),
    Curves(
        "dpo",
        "Implicit rewards",
        "β times the log-ratio to the reference",
        (Line("rewards/chosen", "chosen", CHOSEN), Line("rewards/rejected", "rejected", SFT)),
        0.0,
    ),
    Curves(
        "dpo",
        "Log-probabilities",
        "of whole answers, nats",
        (Line("logps/chosen", "chosen", CHOSEN), Line("logps/rejected", "rejected", SFT)),
    ),
)


def training_curves(run: Run) -> Iterator[tuple[str, str, str]]:
    """Title, note and SVG of every drawing that the run's logs have numbers for."""
    for curves in DRAWINGS:
        stage = run.stages.get(curves.stage)
        if stage is None or stage.metrics is None:
            continue
        with as_written(run.folder / curves.stage / "training_metrics.json"):
            series = [
                (dataclasses.replace(line, key=prefix + line.key), points)
                for line in curves.lines
                for prefix in ("", "eval_")
                if (points := _points(stage.metrics["log_history"], prefix + line.key))
            ]
        if series:
            yield curves.title, curves.note, to_svg(_draw(curves, series), _describe(curves, series))


def _points(history: Sequence[Json], key: str) -> list[tuple[int, float]]:
    return thinned([(record["step"], float(record[key])) for record in history if record.get(key) is not None])


def thinned(
    points: Sequence[tuple[int, float]], of_bin: Callable[[Sequence[float]], float] = statistics.fmean
) -> list[tuple[int, float]]:
    """At most `BINS` points. Several neighbours become one: the last one's step, and `of_bin` of their values."""
    size = -(-len(points) // BINS)
    if size <= 1:
        return list(points)
    bins = (points[start : start + size] for start in range(0, len(points), size))
    return [(each[-1][0], of_bin([value for _, value in each])) for each in bins]


def _describe(curves: Curves, series: Sequence[tuple[Line, list[tuple[int, float]]]]) -> str:
    parts = []
    for line, points in series:
        (first, start), (last, end) = points[0], points[-1]
        parts.append(f"{_label(line, curves)} from {start:.3g} at step {first} to {end:.3g} at step {last}")
    return f"{curves.title}: {', '.join(parts)}"


def _label(line: Line, curves: Curves) -> str:
    if not line.key.startswith("eval_"):
        return line.label
    return "held out" if len(curves.lines) == 1 else f"{line.label}, held out"


def _draw(curves: Curves, series: Sequence[tuple[Line, list[tuple[int, float]]]]) -> "Figure":
    figure, axes = new_figure()
    if curves.level is not None:
        axes.axhline(curves.level, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)))
    for line, points in series:
        steps, values = zip(*points, strict=True)
        held_out = line.key.startswith("eval_")
        marker = "o" if held_out or len(points) == 1 else None
        style = "--" if held_out else "-"
        label = _label(line, curves)
        axes.plot(steps, values, style, color=line.colour, linewidth=1.6, marker=marker, markersize=3.5, label=label)
    if len(series) > 1:
        axes.legend(frameon=False, labelcolor=MUTED, fontsize=10, handlelength=1.4)
    axes.set_xlabel("step", color=MUTED)
    return figure


def new_figure() -> tuple["Figure", Any]:
    """A figure with one pair of axes in the page's plain style. pyplot, which keeps its figures, is not used."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.grid(axis="y", color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=10, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    return figure, axes


def to_svg(figure: "Figure", description: str) -> str:
    """`figure` as SVG to embed in HTML: without a prolog and clashing ids, text as text, in the page's colours.

    `description` is its text for screen readers.
    """
    import matplotlib as mpl

    out = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": description}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box is not None
    body = svg[svg.index(">", view_box.end()) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    used = set(re.findall(r'#([^")]+)[")]', body))  # the other ids, figure_1 and so on, are the same in every drawing
    body = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", body)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    for drawn, variable in COLOURS.items():
        body = body.replace(drawn, variable)
    label = html.escape(description)
    return f'<svg {view_box[0]} role="img" aria-label="{label}">{body.strip()}'
