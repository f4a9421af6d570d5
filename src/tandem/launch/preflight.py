"""Check the command lines of all stages of a pipeline before the first of them runs: `pipelines/lib.sh` calls it.

    python -m tandem.launch.preflight ACCELERATE_CONFIG < STAGES

On standard input comes, for each stage, the number of words that follow, its name, its output and its command, each
ended by a NUL. No model is loaded and nothing is written, so that the answer comes within seconds.
"""

import contextlib
import dataclasses
import importlib.util
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tandem import ranks
from tandem.data.options import DataOptions, SFTDataOptions
from tandem.data.sources import load_splits
from tandem.errors import UserError, script_main
from tandem.options.accelerate import read_accelerate_config
from tandem.options.fields import refuse

_OF_SFT = {field.name for field in dataclasses.fields(SFTDataOptions)} - {
    field.name for field in dataclasses.fields(DataOptions)
}


def main(argv: list[str]) -> None:
    """Check the stages on standard input, as launched with the accelerate config that `argv` names.

    Raises:
        UserError: everything that is wrong, with the stage's name.
    """
    config = read_accelerate_config(argv[0], "ACCELERATE_CONFIG")
    asked = os.environ.get("NUM_PROCESSES", "")
    if asked and not asked.isdecimal():
        raise UserError(f"NUM_PROCESSES must be a whole number, not {asked}")
    processes = int(asked or config.processes)
    problems: list[str] = []
    read: list[dict[str, Any]] = []
    for name, command in _stages(sys.stdin.buffer.read().decode(errors="surrogateescape").split("\0")):
        try:
            with ranks.as_if(processes if command[0] == "launch" else 1):
                values = {name: value for name, (value, _) in options_of_command(command).items()}
            reader = SFTDataOptions if "completion_key" in values else DataOptions
            data = {field.name: values[field.name] for field in dataclasses.fields(reader) if field.name in values}
            if "dataset_name" not in data:
                continue  # the stage reads no data, though one of its options may be called like one of the reader's
            # The first stage will read the data soon; what a later one would read otherwise is read here once
            if read and {name: data[name] for name in data if name not in _OF_SFT} not in read:
                load_splits(reader(**data))
            read.append({name: data[name] for name in data if name not in _OF_SFT})
        except UserError as problem:
            problems.append(f"stage {name}: {problem}")
    refuse(problems)


def _stages(words: list[str]) -> Iterator[tuple[str, list[str]]]:
    while len(words) > 1:
        count = int(words[0])
        name, _output, *command = words[1 : count + 1]
        yield name, command
        words = words[count + 1 :]


def options_of_command(command: list[str]) -> dict[str, tuple[Any, bool]]:
    """Each option of the script in a command, with its value and whether that is its default.

    The script itself is run, with --print_config, to tell them.

    Raises:
        UserError: the script's own.
    """
    at = next(index for index, word in enumerate(command) if word.endswith(".py"))
    spec = importlib.util.spec_from_file_location(f"script_{Path(command[at]).stem}", command[at])
    assert spec is not None and spec.loader is not None  # it ends in .py
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen), contextlib.suppress(SystemExit):
        script.main([*command[at + 1 :], "--print_config"])
    options = {}
    for line in screen.getvalue().splitlines():
        for name, value in (yaml.safe_load(line) or {}).items():
            options[name] = (value, line.endswith("  # default"))
    return options


if __name__ == "__main__":
    script_main(main)
