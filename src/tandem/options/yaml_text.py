"""YAML in and out: no Python objects, no key twice, and plain values as the text that stands in the file."""

import math
from pathlib import Path
from typing import Any

import yaml

from tandem.errors import UserError


class StrictLoader(yaml.SafeLoader):
    """YAML without Python objects, which refuses a key that is there twice: PyYAML silently takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"option {name} appears twice")
        return super().construct_mapping(node, deep)


class TextLoader(StrictLoader):
    """YAML in which every plain value but null stays the text that stands in the file.

    `parsing.convert` reads it by its option's type. YAML 1.1 would read the revision 0123456 as 42798, and the name
    12:30:00 as 45000.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012  # PyYAML declares it so
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in StrictLoader.yaml_implicit_resolvers.items()
    }


def read_yaml(path: str, what: str = "--config") -> dict[str, Any]:
    """The mapping in a YAML file, its plain values as text.

    Args:
        what: what the file is, for the errors.

    Raises:
        UserError: it cannot be read, or holds no mapping.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=TextLoader)
    except UserError as error:
        raise UserError(f"{what} {path}: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{what} {path}: not YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{what} {path}: must be a mapping of options, not a {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


def to_yaml(values: dict[str, Any]) -> str:
    """`values` as a YAML document that `parse` reads back to the same options."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def yaml_line(name: str, value: Any) -> str:
    """`name: value` of a YAML document, in one line whatever the value."""
    braced = yaml.dump({name: value}, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=math.inf)
    return braced.strip()[1:-1]


class _Dumper(yaml.SafeDumper):
    """YAML in which Unicode's further line breaks are escaped, so that they are read back as they were."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if set(text) & set("\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
