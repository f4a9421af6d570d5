"""Reads the options of a script from YAML and the command line, and refuses what it does not know.

Nothing heavy is imported here, so that a wrong command line is answered at once.
"""

import argparse
import dataclasses
import difflib
import json
import math
import os
import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tandem.credentials import hide, holds_secret, names_secret
from tandem.errors import UserError
from tandem.options.fields import REQUIRED, Option, names_of, options_of, refuse, shown
from tandem.options.migration import Counterpart, translated
from tandem.options.rules import broken_rules
from tandem.options.yaml_text import read_yaml, to_yaml, yaml_line
from tandem.runs import write_atomic

_BOOLEANS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False, "on": True, "off": False}

_NAMES_KEY = re.compile(r"api_?key$|(?:^|_)token$|password$")
_KEYS = "the environment: HF_TOKEN, OPENAI_API_KEY or WANDB_API_KEY"


def convert(option: Option, value: Any, where: str) -> Any:
    """`value` as `option`'s type; text is parsed.

    Raises:
        UserError: the value is not of the type, or not one of the choices, or holds a secret; `where` says where it
            came from.
    """
    if type(None) in option.kinds and (value is None or _lower(value) in ("none", "null")):
        return None
    if value is None:
        raise UserError(f"{where}: {option.name} needs a value")
    for kind in option.kinds:
        try:
            converted = _as_kind(kind, value)
        except (TypeError, ValueError, KeyError, OverflowError):
            continue
        _check_choice(option, converted, where)
        _refuse_secret(option, converted, where)
        return converted
    expected = " or ".join(_kind_name(kind) for kind in option.kinds if kind is not type(None))
    raise UserError(f"{where}: {option.name} must be {expected}, not {value!r}")


def _as_kind(kind: Any, value: Any) -> Any:
    if typing.get_origin(kind) is dict:
        return _as_mapping(value)
    if typing.get_origin(kind) is list:
        items = value if isinstance(value, list) else [value]
        return [_as_kind(typing.get_args(kind)[0], item) for item in items]
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise ValueError
        return value
    if kind is bool:
        if isinstance(value, bool):
            return value
        return _BOOLEANS[_lower(value)]
    if isinstance(value, bool) or kind is type(None):
        raise TypeError
    if kind is str:
        if not isinstance(value, str | int | float):
            raise TypeError
        return str(value)
    if kind is int and not isinstance(value, str) and int(value) != value:
        raise ValueError
    if kind is int and isinstance(value, str) and not value.strip("+-").replace("_", "").isdecimal():
        return _as_kind(int, float(value))  # 1e3, 5.0
    if kind is float and not math.isfinite(float(value)):
        raise ValueError
    return kind(value)


def _as_mapping(value: Any) -> dict[str, Any]:
    """A mapping, given as a YAML file's, whose values are still text, or as JSON on the command line."""
    mapping = json.loads(value) if isinstance(value, str) else value
    if not isinstance(mapping, dict):
        raise TypeError
    return {str(name): _as_json(each) for name, each in mapping.items()}


def _as_json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _lower(value: Any) -> str:
    return str(value).lower()


def _kind_name(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if typing.get_origin(kind) is dict:
        return 'a mapping, as {"name": 1}'
    if typing.get_origin(kind) is list:
        return f"a list ({_kind_name(typing.get_args(kind)[0])} each)"
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(kind)))}"
    return names.get(kind, str(kind))


def _check_choice(option: Option, value: Any, where: str) -> None:
    if option.rules.choices is None:
        return
    for item in value if isinstance(value, list) else [value]:
        if item not in option.rules.choices:
            raise UserError(
                f"{where}: {option.name} must be one of {', '.join(map(str, option.rules.choices))}, not {item}"
            )


def _refuse_secret(option: Option, value: Any, where: str) -> None:
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, str) and holds_secret(item):
            raise UserError(
                f"{where}: {option.name} holds a key or password, which would show in files and process lists; "
                f"put it into {_KEYS}"
            )


class _Parser(argparse.ArgumentParser):
    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        # By itself argparse takes -1 for a value, but -1e-5 and -inf for options
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+|inf)(e[-+]?\d+)?$", re.IGNORECASE)

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message} (see --help)")


def _build_parser(classes: Sequence[type], prog: str, description: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=_as_called(prog), description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; the command line wins over it")
    parser.add_argument("--print_config", action="store_true", help="print every option, its value and its source")
    for cls in classes:
        group = parser.add_argument_group((cls.__doc__ or cls.__name__).split("\n")[0].rstrip("."))
        for option in options_of(cls):
            group.add_argument(f"--{option.name}", **_argparse_keywords(option))
    return parser


def _as_called(prog: str) -> str:
    """The name that the user called the program by: `dpo.py`, or `tandem dpo`."""
    return f"tandem {Path(prog).stem}" if Path(sys.argv[0]).name == "tandem" else prog


def _argparse_keywords(option: Option) -> dict[str, Any]:
    default = "required" if option.default is REQUIRED else f"default: {shown(option.default)}"
    help = f"{option.help} ({default})".replace("%", "%%")
    metavar = "{" + ",".join(map(str, option.rules.choices)) + "}" if option.rules.choices else "VALUE"
    keywords: dict[str, Any] = {"help": help, "metavar": metavar}
    if bool in option.kinds:
        keywords |= {"nargs": "?", "const": "true", "metavar": "BOOL"}
    elif option.is_list:
        keywords["nargs"] = "+"
    return keywords


def unknown_option(name: str, known: Sequence[str], where: str, reason: str | None = None) -> UserError:
    """The error for an unknown option: the `reason`, where keys are read from, or else the nearest known name."""
    if reason is None and _NAMES_KEY.search(name.lower().replace("-", "_")):
        reason = f"keys are read from {_KEYS}"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"; {reason}" if reason else f"; did you mean {near[0]}?" if near else " (see --help)"
    return UserError(f"{where}: unknown option {name}{hint}")


@dataclasses.dataclass
class _Read:
    """The values of `known` options that a config file and a command line give, and what is wrong with them.

    Attributes:
        misspelt: whether there is an unknown option.
        values: by option, of its type; a later source wins.
        sources: by option, where its value is from.
        unusable: options whose value is refused.
        problems: a message for each refused value and each unknown option.
    """

    known: Mapping[str, Option]
    misspelt: bool
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    sources: dict[str, str] = dataclasses.field(default_factory=dict)
    unusable: set[str] = dataclasses.field(default_factory=set)
    problems: list[str] = dataclasses.field(default_factory=list)

    def take(self, source: str, given: Mapping[str, Any], foreign: Mapping[str, Counterpart]) -> None:
        """Take the values that `source` gives, over those of earlier sources."""
        for name, value in given.items():
            try:
                name, value = translated(name, value, given, self.known, foreign, source)
                if not name:
                    continue
                self.sources[name] = source
                if name not in self.known:
                    self.misspelt = True
                    raise unknown_option(name, list(self.known), source)
                self.values[name] = convert(self.known[name], value, source)
            except UserError as problem:
                self.unusable.add(name)
                self.problems.append(str(problem))


def _no_check(*instances: Any) -> None:
    pass


def parse(
    argv: Sequence[str],
    classes: Sequence[type],
    *,
    prog: str,
    description: str = "",
    check: Callable[..., None] = _no_check,
    foreign: Mapping[str, Counterpart] = {},
) -> tuple[Any, ...]:
    """Instances of the dataclasses `classes`, from defaults, then `--config FILE`, then the command line.

    Args:
        argv: the command line, without the program's name.
        classes: their options together are the program's.
        prog, description: for `--help`.
        foreign: options of other programs that are renamed, dropped or refused, each with a message.
        check: raises a `UserError` on instances that do not go together. It is called with values that a class has
            refused as well.

    Raises:
        UserError: everything that is wrong, in one message: unknown options (with the nearest known ones), values of
            the wrong type, missing options, and what the options' rules, their classes and `check` refuse. Rules that
            depend on a value that is missing or of the wrong type are not checked.
    """
    parser = _build_parser(classes, prog, description)
    for name in foreign.keys() - {option.name for cls in classes for option in options_of(cls)}:
        parser.add_argument(f"--{name}", nargs="*", help=argparse.SUPPRESS)
    namespace, extra = parser.parse_known_args(list(argv))
    given = vars(namespace)
    known = {option.name: option for cls in classes for option in options_of(cls)}
    problems = _stray_arguments(extra, list(known))
    config_file = given.pop("config", None)
    print_config = given.pop("print_config", False)
    read = _Read(known, misspelt=bool(problems))
    read.take(f"--config {config_file}", read_yaml(config_file) if config_file else {}, foreign)
    read.take("command line", given, foreign)
    problems += read.problems
    missing = [option for option in known.values() if option.default is REQUIRED and option.name not in read.values]
    if not read.misspelt:  # else the missing option may be the misspelt one
        missed = [option for option in missing if option.name not in read.unusable]
        problems += [f"--{option.name} is required: {option.help}" for option in missed]
    unusable = read.unusable | {option.name for option in missing}
    instances, refusals = _checked(classes, read.values, unusable, check)
    refuse([*problems, *refusals])
    if print_config:
        _print_config(instances, read.sources)
        raise SystemExit(0)
    return tuple(instances)


def faults_of(values: dict[str, Any], classes: Sequence[type], check: Callable[..., None] = _no_check) -> list[str]:
    """What `parse` would refuse of `values`, which are of their options' types already."""
    options = [option for cls in classes for option in options_of(cls)]
    missing = [option for option in options if option.default is REQUIRED and option.name not in values]
    _, refusals = _checked(classes, values, {option.name for option in missing}, check)
    return [*(f"--{option.name} is required: {option.help}" for option in missing), *refusals]


def _checked(
    classes: Sequence[type], values: dict[str, Any], unusable: set[str], check: Callable[..., None]
) -> tuple[list[Any], list[str]]:
    """An instance of each class, and what is wrong with each by itself and with all of them together."""
    instances, problems = _instances(classes, values, unusable)
    problems += broken_rules(instances, between=True, without=unusable)
    problems += [] if unusable else _told(lambda: check(*instances))
    return instances, problems


def _instances(classes: Sequence[type], values: dict[str, Any], unusable: set[str]) -> tuple[list[Any], list[str]]:
    """An instance of each class, even where the class refuses its values, and what the classes refuse."""
    instances: list[Any] = []
    problems: list[str] = []
    for cls in classes:
        own = {name: values[name] for name in names_of(cls) if name in values}
        if unusable & set(names_of(cls)):
            instances.append(_unchecked(cls, own))
            problems += broken_rules(instances[-1:], without=unusable)
            continue
        try:
            instances.append(cls(**own))
        except UserError as problem:
            problems.append(str(problem))
            instances.append(_unchecked(cls, own))
    return instances, problems


def _unchecked(cls: type, values: dict[str, Any]) -> Any:
    """An instance that its class would refuse: with it, its conflicts with other classes can be told as well."""
    instance: Any = object.__new__(cls)
    for option in options_of(cls):
        setattr(instance, option.name, values.get(option.name, option.default))
    return instance


def _told(check: Callable[[], None]) -> list[str]:
    """What `check` refuses, as a list of messages."""
    try:
        check()
    except UserError as problem:
        return [str(problem)]
    return []


def _print_config(instances: Sequence[Any], sources: dict[str, str]) -> None:
    """Print every option with its value and source, and the environment variables that a run reads besides."""
    for name, value in resolved(*instances).items():
        print(f"{yaml_line(name, value)}  # {sources.get(name, 'default')}")
    print(*_environment(), sep="\n")


def _stray_arguments(extra: Sequence[str], known: Sequence[str]) -> list[str]:
    """What is wrong with the arguments that argparse did not know; values behind an unknown option count as its own."""
    problems = []
    behind_unknown = False
    for argument in extra:
        if argument.startswith("-"):
            name = argument.split("=")[0].lstrip("-")
            problems.append(str(unknown_option(name, known, "command line")))
            behind_unknown = True
        elif not behind_unknown:
            problems.append(f"command line: unexpected argument {argument} (options start with --)")
    return problems


# How the names of variables begin that the libraries and launchers read
_VARIABLES = (
    "TANDEM_", "HF_", "HUGGING_FACE_", "TRANSFORMERS_", "ACCELERATE_", "FSDP_", "WANDB_", "OPENAI_", "PT_HPU_",
    "PYTORCH_", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "WORLD_SIZE", "RANK",
    "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip


def _environment() -> list[str]:
    """Lines with the environment variables that a run reads beside its options. Of a secret only that it is set."""
    lines = []
    for name, value in sorted(os.environ.items()):
        if name.startswith(_VARIABLES):
            lines.append(f"# {name}={'(set, not shown)' if names_secret(name) else hide(value)}  # environment")
    return lines


def resolved(*instances: Any) -> dict[str, Any]:
    """Every option of `instances` with its value, flat: as YAML this is a config file that replays the run."""
    return {
        option.name: getattr(instance, option.name) for instance in instances for option in options_of(type(instance))
    }


def defaults(*instances: Any) -> dict[str, Any]:
    """Every option of the classes of `instances` with its default, flat, in the form of `resolved`."""
    return {option.name: option.default for instance in instances for option in options_of(type(instance))}


def save(path: str | Path, *instances: Any) -> None:
    """Write the options of `instances` to a YAML file that replays the run as `--config`."""
    write_atomic(path, to_yaml(resolved(*instances)))
