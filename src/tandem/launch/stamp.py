"""Stamps of the stages of a pipeline, by which it skips a stage that was done with the same settings and inputs.

    python -m tandem.launch.stamp begin|check ROOT RUN NAME OUTPUT < COMMAND

`pipelines/lib.sh` calls it. ROOT is the checkout, RUN the run folder, NAME and OUTPUT are the stage's. On standard
input comes its command, each word ended by a NUL. `begin` writes the stamp of a stage that begins to
RUN/.stages/NAME.begun, which is renamed to NAME when the stage is done; `check` compares the stamp in RUN/.stages/NAME
with the one that the stage would get now.

A stamp holds the stage's options, defaults included, and hashes of the content of the data and models that they name.
RUN and ROOT may move: paths in them are kept relative.
"""

import contextlib
import dataclasses
import importlib.util
import json
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.digests import Hashes, manifest_digest
from tandem.errors import UserError, script_main
from tandem.runs import CONFIG, sha256_json, write_atomic

Stamp = dict[str, Any]

# Options that name what a stage reads
_INPUTS = re.compile(r"model|adapter|dataset_name|tokenizer")


@dataclass
class Stage:
    """A stage of a pipeline.

    Attributes:
        root, run: paths of the checkout and the run folder, as the command spells them.
        name, output: the stage's name, and the file or folder that it leaves in `run`.
        words: its command.
    """

    root: str
    run: str
    name: str
    output: str
    words: list[str]

    @property
    def file(self) -> Path:
        return Path(self.run) / ".stages" / self.name

    @property
    def script(self) -> int | None:
        """The index in `words` of a script of Tandem's; None in a command without one.

        No other program is asked for its options: to load it would be to run it.
        """
        return next((index for index, word in enumerate(self.words) if _is_ours(Path(word))), None)

    def portable(self, value: Any) -> Any:
        """`value` with $RUN and $ROOT at the head of paths that are in the run folder or the checkout."""
        if isinstance(value, list):
            return [self.portable(item) for item in value]
        if not isinstance(value, str):
            return value
        for folder, variable in ((self.run, "$RUN"), (self.root, "$ROOT")):
            if value == folder or value.startswith(f"{folder}/"):
                return variable + value[len(folder) :]
        return value

    def here(self, value: Any) -> Any:
        """A `portable` value with the paths that this pipeline has for $RUN and $ROOT."""
        if isinstance(value, list):
            return [self.here(item) for item in value]
        if not isinstance(value, str):
            return value
        head, slash, rest = value.partition("/")
        return {"$RUN": self.run, "$ROOT": self.root}.get(head, head) + slash + rest


def _is_ours(script: Path) -> bool:
    ours = script.suffix == ".py" and script.parent.name == "scripts" and script.stem.isidentifier()
    return ours and importlib.util.find_spec(f"tandem.commands.{script.stem}") is not None


def main(argv: list[str]) -> None:
    """Write a stamp, or check one.

    Raises:
        UserError: the stage was done with other settings or inputs.
    """
    action, root, run, name, output = argv
    words = sys.stdin.buffer.read().decode(errors="surrogateescape").split("\0")[:-1]
    stage = Stage(root, run, name, output, words)
    hashes = Hashes(stage.file.with_name("hashes.json"))
    if action == "begin":
        write_atomic(stage.file.with_name(f"{name}.begun"), json.dumps(stamp(stage, hashes)) + "\n")
    else:
        _check(stage, hashes)
    hashes.save()


def stamp(stage: Stage, hashes: Hashes) -> Stamp:
    """The stamp that `stage` gets now."""
    options = _options(stage)
    inputs = {
        name: digest
        for name, (value, _) in options.items()
        if _INPUTS.search(name) and (digest := _digest(stage, value, hashes))
    }
    return {
        "command": _command(stage, hashes),
        "options": {name: stage.portable(value) for name, (value, _) in options.items()},
        "given": _given(options),
        "inputs": inputs,
    }


def _given(options: dict[str, tuple[Any, bool]]) -> list[str]:
    return [name for name, (_, is_default) in options.items() if not is_default]


def _check(stage: Stage, hashes: Hashes) -> None:
    text = stage.file.read_text()
    try:
        done = json.loads(text)
        known = isinstance(done, dict)
    except ValueError:
        known = False
    if known and done["command"] == _command(stage, hashes) and _inputs_are_those_of(done, stage, hashes):
        return  # the options need not be read, which takes longer
    before = done if known else _of_older_version(stage)
    now = stamp(stage, hashes)
    changed = _changes(before, now)
    if changed:
        raise UserError(
            f"stage {stage.name} was done with other settings in {stage.run} ({'; '.join(changed)}): "
            f"set another OUTPUT_DIR, or remove {stage.run}/{stage.output}"
        )
    write_atomic(stage.file, json.dumps(now) + "\n")


def _inputs_are_those_of(done: Stamp, stage: Stage, hashes: Hashes) -> bool:
    return all(
        _digest(stage, stage.here(done["options"].get(name)), hashes) == digest
        for name, digest in done["inputs"].items()
    )


def _command(stage: Stage, hashes: Hashes) -> dict[str, Any]:
    """The words of the command, and the content of the config files that it names."""
    configs = {
        stage.portable(word): hashes.of(Path(word))
        for word in stage.words
        if word.endswith((".yaml", ".yml")) and Path(word).is_file()
    }
    return {"words": [stage.portable(word) for word in stage.words], "configs": configs}


def _options(stage: Stage) -> dict[str, tuple[Any, bool]]:
    """Every option of the stage's script with its value and whether that is the default; empty without a script."""
    if stage.script is None:
        return {}
    from tandem.launch.preflight import options_of_command

    return options_of_command(stage.words)


def _digest(stage: Stage, value: Any, hashes: Hashes) -> str | None:
    """The digest of the file or folder that `value` names; None where it names none, or the stage's own output."""
    if isinstance(value, list):
        found = [_digest(stage, item, hashes) for item in value]
        return sha256_json(found) if any(found) else None
    if not isinstance(value, str) or not value:
        return None
    path = Path(value)
    if path in (Path(stage.run), Path(stage.run) / stage.output):
        return None
    if path.is_dir():
        return manifest_digest(path) or hashes.of_folder(path)
    if not path.is_file():
        return None
    beside = sources(path) if path.suffix in (".yaml", ".yml") else []
    return sha256_json([hashes.of(path), *(_digest(stage, source, hashes) for source in beside)])


def sources(mixture: Path) -> list[str]:
    """The files and folders that the YAML file of a mixture, or of one source, names."""
    import yaml

    try:
        entries = yaml.load(mixture.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
        names = [entry["dataset_name"] for entry in ([entries] if isinstance(entries, dict) else entries)]
    except (yaml.YAMLError, ValueError, KeyError, TypeError):
        return []  # the stage itself says what is wrong with the file
    return [str(mixture.parent / Path(name).expanduser()) for name in names if isinstance(name, str)]


def _changes(before: Stamp, now: Stamp) -> list[str]:
    """What differs, in words.

    An option that was given neither then nor now counts as equal: a newer Tandem may have changed its default, or added
    the option.
    """
    if not now["options"]:
        return [] if before["command"] == now["command"] else ["its command was another"]
    from tandem.training.settings import FREE_ON_RESUME

    given = set(now["given"]) | set(before["given"] if "given" in before else before["options"])
    found = []
    for name, value in now["options"].items():
        was = before["options"].get(name)
        content, content_was = now["inputs"].get(name), before["inputs"].get(name)
        if content and content_was:  # then its path may be another
            if content != content_was:
                found.append(f"{name} {value} has another content")
        elif name in given and was != value and name not in FREE_ON_RESUME and not name.startswith("alarm_"):
            found.append(f"{name} was {was}, is {value}")
    return found


def _of_older_version(stage: Stage) -> Stamp:
    """The stamp of a stage that was done by an older Tandem, which kept its command and, of most stages, the options.

    Raises:
        UserError: the command cannot be read, or is one that is refused now.
    """
    file = stage.file.with_name(f"{stage.name}.command")
    try:
        words = shlex.split(file.read_text())
    except (OSError, ValueError):
        raise UserError(
            f"{stage.file} cannot be read: remove {stage.run}/{stage.output}, to have it made anew"
        ) from None
    noted = {}
    while words and re.match(r"[A-Z_]+=", words[0]):
        name, _, noted[name] = words.pop(0).partition("=")
    old = Stage("", noted.get("RUN", stage.run), stage.name, stage.output, words)
    if old.script is None:
        return {
            "command": {"words": [old.portable(word) for word in words], "configs": {}},
            "options": {},
            "inputs": {},
        }
    old.root = str(Path(words[old.script]).parents[1])
    try:
        options = _options(dataclasses.replace(stage, words=stage.here(old.portable(words))))
    except UserError as error:
        raise UserError(
            f"stage {stage.name} was done by an older version in {stage.run}, with what is refused now ({error}): "
            f"set another OUTPUT_DIR, or remove {stage.run}/{stage.output}"
        ) from None
    values = {name: stage.portable(value) for name, (value, _) in options.items()}
    return {"command": {}, "options": values | _saved(stage, old), "given": _given(options), "inputs": {}}


def _saved(stage: Stage, old: Stage) -> Stamp:
    """The options that the stage saved in or beside its output."""
    import yaml

    output = Path(stage.run) / stage.output
    for file in (output / CONFIG, output.with_suffix(".yaml"), output.with_name(f"{stage.name}.yaml")):
        with contextlib.suppress(OSError, ValueError, yaml.YAMLError, AttributeError):
            saved = yaml.safe_load(file.read_text(encoding="utf-8"))
            return {name: old.portable(value) for name, value in saved.items()}
    return {}


if __name__ == "__main__":
    script_main(main)
