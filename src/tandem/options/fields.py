"""An option is a field of a dataclass: `opt` makes it, with its default, its help and the rules it must keep.

The field is the one home of an option's name, type, default, help text and rules; `options.rules` enforces them.
Nothing heavy is imported here, so that a wrong command line is answered at once.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Union

from tandem.errors import UserError

REQUIRED: Any = "<required>"  # default of an option that has none; `parse` refuses to go on without a value


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which values an option may have, and on which other options its effect depends.

    Attributes:
        choices: the allowed values; of a list, those that its items may have.
        low, above, high, below: bounds of a number, or of each number of a list: ≥, >, ≤ and <.
        besides: allowed values outside of the bounds, each with its meaning for the error message ("" for none).
        hint: why there is a bound, or what to do instead; told with the bound.
        needs: conditions without which the option has no effect, as `options.rules.Condition` reads them.
        unless: conditions under which it has none.
    """

    choices: Sequence[Any] | None = None
    low: float | None = None
    above: float | None = None
    high: float | None = None
    below: float | None = None
    besides: Mapping[Any, str] = dataclasses.field(default_factory=dict)
    hint: str = ""
    needs: str | Sequence[str] = ()
    unless: str | Sequence[str] = ()


def opt(default: Any, help: str, *, trl: bool | str = False, **rules: Any) -> Any:
    """A dataclass field that is a command line option.

    Args:
        default: its value where none is given; REQUIRED for an option that must be given.
        help: what it does, for `--help`.
        trl: True if TRL's configuration takes its value unchanged under the same name, or the name it has there; see
            `handed_on`.
        rules: see `Rules`.
    """
    metadata = {"help": help, "rules": Rules(**rules), "trl": trl}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Option:
    """An option, as its field declares it."""

    name: str
    type: Any
    default: Any
    help: str
    rules: Rules
    trl: bool | str

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The plain types a value may have: `str | None` gives (str, NoneType)."""
        if typing.get_origin(self.type) in (Union, types.UnionType):
            return typing.get_args(self.type)
        return (self.type,)

    @property
    def is_list(self) -> bool:
        return any(typing.get_origin(kind) is list for kind in self.kinds)


def options_of(cls: type) -> list[Option]:
    """The options of a dataclass, in the order of its fields."""
    hints = typing.get_type_hints(cls)
    options = []
    for field in dataclasses.fields(cls):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        help, rules = field.metadata.get("help", ""), field.metadata.get("rules", Rules())
        options.append(Option(field.name, hints[field.name], default, help, rules, field.metadata.get("trl", False)))
    return options


def names_of(cls: type) -> list[str]:
    return [option.name for option in options_of(cls)]


def changed(options: Any) -> list[str]:
    """Names of the options of a dataclass whose values are not their defaults."""
    return [option.name for option in options_of(type(options)) if getattr(options, option.name) != option.default]


def handed_on(*instances: Any) -> dict[str, Any]:
    """The options that TRL's configuration takes as they are, under its names."""
    return {
        option.name if option.trl is True else str(option.trl): getattr(instance, option.name)
        for instance in instances
        for option in options_of(type(instance))
        if option.trl
    }


def flags(names: Sequence[str]) -> str:
    """`--a, --b have` or `--a has`, the beginning of a sentence."""
    return f"{', '.join(f'--{name}' for name in names)} {'has' if len(names) == 1 else 'have'}"


def flags_of(values: Mapping[str, Any]) -> str:
    """Options as a command line gives them: `--a 1 --b true`."""
    return " ".join(f"--{name} {shown(value)}" for name, value in values.items())


def shown(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, dict):
        return json.dumps(value)
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def refuse(problems: Sequence[str]) -> None:
    """Raise one `UserError` that names all `problems`, if there are any."""
    if problems:
        raise UserError("; ".join(problems))
