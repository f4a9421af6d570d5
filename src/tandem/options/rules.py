"""Enforces the rules that options carry (`opt(…, low=1, needs="use_peft")`): bounds, and that each has an effect."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tandem.options.fields import Option, flags, options_of, refuse, shown


class Options:
    """Base of the dataclasses of options: making an instance that breaks a rule of its fields raises a `UserError`.

    Rules that a single field cannot express (two options that exclude each other) are in `conflicts`.
    """

    def __post_init__(self) -> None:
        refuse(self.faults())

    def faults(self) -> list[str]:
        """Everything that is wrong with the values, a sentence each."""
        return [*broken_rules([self]), *self.conflicts()]

    def conflicts(self) -> Iterable[str]:
        """What is wrong beyond the fields' own rules. It is called with values that break those as well."""
        return ()


@dataclasses.dataclass(frozen=True)
class Condition:
    """A condition on another option, with a reason for messages.

    Written as `name` (the option is true), `name=value`, `name=this|that` (either) or `name!=value`, with the reason
    behind a comma. A list meets `name=value` if one of its items is the value.
    """

    name: str
    differs: bool
    values: tuple[str, ...]
    reason: str

    @classmethod
    def read(cls, text: str) -> "Condition":
        condition, comma, reason = text.partition(",")
        matched = re.fullmatch(r"(\w+)(?:(!?)=(.+))?", condition)
        assert matched is not None, f"{text}: no condition"
        name, differs, values = matched.groups()
        return cls(name, differs == "!", tuple((values or "true").split("|")), comma + reason)

    def holds(self, value: Any) -> bool:
        return self.differs != any(_is(each, text) for each in _items(value) for text in self.values)

    def told(self) -> str:
        """The flag, and the values if only certain ones will do, with which a command line meets the condition."""
        if self.differs or self.values == ("true",):
            return f"--{self.name}{self.reason}"
        return f"--{self.name} {' or '.join(self.values)}{self.reason}"

    def met(self, value: Any) -> str:
        """The flag and value by which this command line meets the condition."""
        if self.differs or len(self.values) == 1:
            return self.told()
        return f"--{self.name} {shown(value)}{self.reason}"


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [value]


def _is(value: Any, text: str) -> bool:
    if isinstance(value, float):
        return shown(value) == text or shown(value) == f"{text}.0"
    return shown(value) == text


def broken_rules(instances: Sequence[Any], *, between: bool = False, without: Iterable[str] = ()) -> list[str]:
    """Which rules the options in `instances` break, a sentence each.

    Args:
        between: check only conditions on options of the other instances; else only bounds and conditions on options of
            the same instance.
        without: options that are left aside, because they are missing or known to be wrong.
    """
    skipped = set(without)
    everything = _values(instances)
    problems = []
    for instance in instances:
        own = _values([instance])
        known = everything.keys() - own.keys() if between else own.keys()
        usable = {name: everything[name] for name in known - skipped}
        looked_at = [option for option in options_of(type(instance)) if option.name not in skipped]
        if not between:
            problems += [broken for option in looked_at if (broken := broken_bound(option, own[option.name]))]
        problems += _without_effect(looked_at, own, usable)
    return problems


def _values(instances: Iterable[Any]) -> dict[str, Any]:
    return {option.name: getattr(each, option.name) for each in instances for option in options_of(type(each))}


def broken_bound(option: Option, value: Any) -> str | None:
    """How a value lies outside of its option's bounds, if it does; NaN always does."""
    rules = option.rules
    bounds = (rules.low, rules.above, rules.high, rules.below)
    if value is None or all(bound is None for bound in bounds):
        return None
    for number in _items(value):
        if number in rules.besides or _inside(number, *bounds):
            continue
        condition = _bounds_told(*bounds)
        for special, meaning in rules.besides.items():
            condition += f", or {special}{meaning and ' '}{meaning}"
        hint = f"; {rules.hint}" if rules.hint else ""
        got = "got" if condition == "not be negative" else "not"
        return f"--{option.name} must {condition}, {got} {number}{hint}"
    return None


def _inside(number: float, low: float | None, above: float | None, high: float | None, below: float | None) -> bool:
    return (
        not math.isnan(number)
        and (low is None or number >= low)
        and (above is None or number > above)
        and (high is None or number <= high)
        and (below is None or number < below)
    )


def _bounds_told(low: float | None, above: float | None, high: float | None, below: float | None) -> str:
    """The bounds in words that follow "must"."""
    if low is not None and high is not None:
        return f"be between {low} and {high}"
    if low == 0 and below is None:
        return "not be negative"
    parts = {"at least": low, "above": above, "at most": high, "below": below}
    return "be " + " and ".join(f"{words} {bound}" for words, bound in parts.items() if bound is not None)


def _without_effect(options: Iterable[Option], own: Mapping[str, Any], usable: Mapping[str, Any]) -> list[str]:
    """The changed options that have no effect beside the `usable` values; those of one reason in one sentence."""
    found: dict[str, list[str]] = {}
    for option in options:
        if own[option.name] == option.default:
            continue
        for text in _texts(option.rules.needs):
            condition = Condition.read(text)
            if condition.name in usable and not condition.holds(usable[condition.name]):
                found.setdefault(f"without {condition.told()}", []).append(option.name)
        for text in _texts(option.rules.unless):
            condition = Condition.read(text)
            if condition.name in usable and condition.holds(value := usable[condition.name]):
                found.setdefault(f"with {condition.met(value)}", []).append(option.name)
    return [f"{flags(names)} no effect {reason}" for reason, names in found.items()]


def _texts(conditions: str | Sequence[str]) -> Sequence[str]:
    return [conditions] if isinstance(conditions, str) else conditions


def conditions_of(option: Option) -> list[Condition]:
    """All conditions on other options that the rules of an option name."""
    return [Condition.read(text) for text in (*_texts(option.rules.needs), *_texts(option.rules.unless))]
