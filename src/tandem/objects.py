"""Objects from a user's own file or module: a loss, a data format, a backend (docs/extending.md)."""

import contextlib
import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tandem.errors import UserError


def version_of(name: str) -> str:
    """A digest of the file that holds `name`, as `load_object` takes it: what was computed with it is valid as long as
    the file stays the same."""
    place = name.rpartition(":")[0]
    file = Path(place)
    if not place.endswith(".py"):
        with _current_folder(), contextlib.suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(place)
            file = Path((spec and spec.origin) or place)
    content = file.read_bytes() if file.is_file() else name.encode(errors="replace")
    return hashlib.sha256(content).hexdigest()[:16]


@contextlib.contextmanager
def _current_folder() -> Iterator[None]:
    """Have modules looked for in the current folder too."""
    sys.path.append(os.getcwd())
    try:
        yield
    finally:
        sys.path.remove(os.getcwd())


def load_object(name: str, option: str) -> Any:
    """The object that `module:name` or `file.py:name` refers to; modules are looked for in the current folder too.

    Args:
        option: the option that names it, for the errors.

    Raises:
        UserError: there is no such module or file, or it has nothing of this name.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise UserError(f"{option} {name}: must be module:name or file.py:name")
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise UserError(f"{option} {name}: there is no file {place}")
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except SyntaxError as error:
            raise UserError(f"{option} {name}: {place} line {error.lineno}: {error.msg}") from error
    else:
        try:
            with _current_folder():
                module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name and not f"{place}.".startswith(f"{error.name}."):
                raise  # the module is there; one that it imports is not
            raise UserError(f"{option} {name}: there is no module {place} here or installed") from error
    if not hasattr(module, attribute):
        raise UserError(f"{option} {name}: {place} has no {attribute}")
    return getattr(module, attribute)
