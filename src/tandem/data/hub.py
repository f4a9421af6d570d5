"""Data sets on the Hugging Face Hub: the names of their splits, and their rows."""

import functools
from collections.abc import Iterable
from typing import Any

from tandem.errors import UserError
from tandem.places import not_here


@functools.cache
def split_names(name: str, config: str | None, revision: str | None) -> tuple[str, ...]:
    """The splits that a data set has, without loading one.

    Raises:
        UserError: it cannot be asked for.
    """
    import datasets

    try:
        return tuple(map(str, datasets.get_dataset_split_names(name, config, revision=revision)))
    except Exception as error:  # the library raises a dozen types: not found, no access, no network, …
        raise UserError(f"--dataset_name {name}: {not_here(name)}{error}") from error


def load(name: str, config: str | None, revision: str | None, split: str) -> Iterable[Any]:
    """The rows of a split, which may have a slice (`train[:5%]`).

    Raises:
        UserError: it cannot be loaded.
    """
    import datasets

    try:
        rows: Iterable[Any] = datasets.load_dataset(name, config, split=split, revision=revision)
    except Exception as error:  # as above, and a bad slice
        raise UserError(f"--dataset_name {name} (split {split}): {not_here(name)}{error}") from error
    return rows
