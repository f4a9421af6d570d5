"""Mixtures: several sources of pairs as one data set, each with its weight."""

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tandem.data import select
from tandem.data.files import is_data_file
from tandem.data.formats import Row, kind_of
from tandem.data.options import ALL, MISSING, SOURCE_OPTIONS, DataOptions
from tandem.data.several import as_rows, flat
from tandem.errors import UserError
from tandem.options.fields import opt, options_of
from tandem.options.parsing import convert, unknown_option
from tandem.options.yaml_text import TextLoader
from tandem.ranks import tell


@dataclasses.dataclass(frozen=True)
class Source:
    """One source of pairs, and its weight among the others."""

    options: DataOptions
    weight: float = opt(1.0, "share of the training pairs, relative to the other sources' weights")


def sources_of(options: DataOptions) -> list[Source]:
    """The sources that `options.dataset_name` names: those of a mixture's YAML file, or itself.

    Raises:
        UserError: a mixture that cannot be read, or that has options which would do nothing.
    """
    if not options.is_mixture:
        return [Source(options)]
    where = f"--dataset_name {options.dataset_name}"
    sources = [
        _source(options, entry, f"{where}: source {number}") for number, entry in enumerate(_entries(options, where), 1)
    ]
    for number, source in enumerate(sources, 1):
        for earlier, other in enumerate(sources[: number - 1], 1):
            if source.options == other.options:
                raise UserError(
                    f"{where}: source {number} is source {earlier} again; give it once, with a higher weight"
                )
    return sources


def _entries(options: DataOptions, where: str) -> list[Any]:
    try:
        entries = yaml.load(Path(options.dataset_name).read_text(encoding="utf-8"), Loader=TextLoader)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: !!timestamp of a date that is none
        raise UserError(f"{where}: not YAML: {error}") from error
    if isinstance(entries, dict) and "dataset_name" in entries:  # one source, with the options that go with it
        return [entries]
    if not isinstance(entries, list) or len(entries) < 2:
        raise UserError(f"{where}: must be a list of two or more sources, each with dataset_name and weight")
    return entries


def _source(options: DataOptions, entry: Any, where: str) -> Source:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: must have dataset_name and weight, not be {kind_of(entry)}")
    known = {option.name: option for option in options_of(DataOptions) if option.name in SOURCE_OPTIONS}
    known["weight"] = next(option for option in options_of(Source) if option.name == "weight")
    values = {}
    for name, value in entry.items():
        if name not in known:
            raise unknown_option(str(name), list(known), where, _of_the_whole(str(name)))
        values[name] = convert(known[name], value, where)
    if "dataset_name" not in values:
        raise UserError(f"{where}: dataset_name is missing")
    weight = values.pop("weight", 1.0)
    if weight <= 0:
        raise UserError(f"{where}: weight must be above 0, not {weight}; leave the source out instead")
    if options.val_ratio_of == MISSING and "dataset_test_split" in values:
        options = dataclasses.replace(options, val_ratio=0.0, val_ratio_of=ALL)
    if not options.val_ratio and values.get("pair_strategy") != select.BEST_RANDOM:
        values["data_seed"] = DataOptions.data_seed  # it shuffles the mixture, and does nothing to one source
    values["dataset_name"] = _beside(Path(options.dataset_name), values["dataset_name"])
    try:
        source = dataclasses.replace(options, **values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if source.is_mixture:
        raise UserError(f"{where}: {source.dataset_name} is a mixture itself; name its sources here")
    return Source(source, weight)


def _of_the_whole(name: str) -> str | None:
    whole = {option.name for option in options_of(DataOptions)} - set(SOURCE_OPTIONS)
    return f"it is of the whole mixture: --{name}" if name in whole else None


def _beside(mixture: Path, name: str) -> str:
    """`name` as a path relative to the mixture's file, unless it is a Hub name."""
    path = mixture.parent / Path(name).expanduser()
    local = name.startswith((".", "/", "~")) or is_data_file(name) or name.endswith((".yaml", ".yml")) or path.exists()
    return str(path) if local else name


def mix(sources: Sequence[Source], parts: Sequence[list[Row]], seed: int) -> list[Row]:
    """The training pairs of a mixture: `parts[i]` are all those of `sources[i]`.

    It is the largest mixture in which each source's share is its weight over the sum of weights and no pair is used
    twice: the source that runs out first is used whole, the others are sampled. The first N pairs of the order are a
    mixture in the same shares. One source is returned as it is.

    Raises:
        UserError: a source has no training pair left.
    """
    if len(sources) == 1:
        return parts[0]
    for source, part in zip(sources, parts, strict=True):
        if not part:
            raise UserError(f"{source.options.dataset_name}: every prompt of it is held out; lower --val_ratio")
    # Rows, of several pairs where a prompt has several rejected answers: such pairs stay together
    of_sources = [as_rows(part) for part in parts]
    # Rows per unit of weight that every source can give
    scale = min(len(rows) / source.weight for source, rows in zip(sources, of_sources, strict=True))
    generator = random.Random(seed)
    mixed: list[list[Row]] = []
    for source, rows, part in zip(sources, of_sources, parts, strict=True):
        taken = generator.sample(rows, min(len(rows), max(1, round(scale * source.weight))))
        count = sum(map(len, taken))
        tell(f"mixture: {count} of {len(part)} training pairs of {source.options.dataset_name}")
        mixed += taken
    generator.shuffle(mixed)
    return flat(mixed)
