"""Numbers and names in the form that pages and model cards show."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tandem.report.collect import Json

MODEL_NAMES = {"base": "Base", "sft": "SFT", "dpo": "DPO", "chosen": "Chosen in the data"}


def percent(share: float) -> str:
    """0.583 → 58.3%."""
    return f"{100 * share:.1f}%"


def number(value: float) -> str:
    """A count in full, a measured number to three digits, with a minus sign instead of a hyphen."""
    is_whole = isinstance(value, int) or abs(value) >= 1000
    text = f"{round(value):,}" if is_whole else f"{value:#.3g}".rstrip(".")
    return text.replace("-", "−")


def show_value(estimate: Mapping[str, Any] | None, is_share: bool = False) -> str:
    """The value of an estimate."""
    if estimate is None or estimate.get("value") is None:
        return "–"
    return percent(estimate["value"]) if is_share else number(estimate["value"])


def show_interval(estimate: Mapping[str, Any] | None, is_share: bool = False) -> str:
    """The interval of an estimate, empty if it has none."""
    if estimate is None or estimate.get("low") is None or estimate.get("high") is None:
        return ""
    show = percent if is_share else number
    return f"{show(estimate['low'])} to {show(estimate['high'])}"


def show_difference(estimate: Mapping[str, Any] | None, is_share: bool = False) -> Json:
    """A difference as `value` with its sign, `interval` and `p`; shares in percentage points."""
    if estimate is None:
        return {"value": "–", "interval": "", "p": ""}

    def signed(value: float | None) -> str:
        if value is None:
            return ""
        text = f"{100 * value:.1f}" if is_share else f"{value:#.3g}".rstrip(".")
        return ("" if value < 0 else "+") + text.replace("-", "−")

    value, low, high = (signed(estimate[end]) for end in ("value", "low", "high"))
    return {
        "value": f"{value} points" if is_share else value,
        "interval": f"{low} to {high}" if low and high else "",
        "p": show_p(estimate["p"]) if "p" in estimate else "",
    }


def show_p(p: float) -> str:
    """A p-value; one below 0.001 without its size, which means little there."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def duration(seconds: float) -> str:
    """75 → 1 min 15 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def public(value: Any) -> str:
    """The name of a model or data set for the page: of a path, only the last part, since pages are passed on."""
    text = str(value)
    return Path(text).name if text.startswith(("/", "./", "../", "~")) else text


ELSEWHERE = "PATH_TO"  # replaces the folders of the machine that a run was on
_ABSOLUTE = re.compile(r"""(?<![\w.:/~<-])(?:~\w*)?/(?:[^\s/'":,]+/)*(?=[^\s/'",])""")


def without_places(text: str) -> str:
    """`text` with `PATH_TO/` in place of the folders of absolute paths."""
    return _ABSOLUTE.sub(f"{ELSEWHERE}/", text)


def model_name(label: str) -> str:
    """What a model label is called on the page."""
    return MODEL_NAMES.get(label, label)
