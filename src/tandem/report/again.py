"""The command lines with which a reported run can be repeated."""

import itertools
import re
import shlex
from pathlib import Path

from tandem.report.collect import Json, Run
from tandem.report.numbers import ELSEWHERE

_SETTING = re.compile(r"[A-Z_]+=")  # shell variables, which `stage` of pipelines/lib.sh writes before a command


_SCRIPT = re.compile(r"(.*/)scripts/\w+\.py")


def commands(run: Run) -> Json:
    """Command lines that repeat the run in a new folder: of the whole `pipeline`, and of single training `stages`.

    The pipeline's are the commands that its stages ran with, to be typed in the root of a checkout.
    """
    folder = Path(ELSEWHERE) / run.folder.resolve().name
    again = folder.with_name(f"{folder.name}_again")
    return {
        "pipeline": _pipeline_again(run),
        "stages": [
            f"python scripts/{name}.py --config {_quoted(folder / name / 'config.yaml')} "
            f"--output_dir {_quoted(again / name)}"
            for name, stage in run.stages.items()
            if stage.config_yaml is not None
        ],
    }


def _pipeline_again(run: Run) -> list[str]:
    """The shell variables that the stages were run with, and then their commands."""
    settings: dict[str, str] = {}
    lines = []
    for words in run.commands.values():
        command = list(itertools.dropwhile(_SETTING.match, words))
        settings |= dict(word.split("=", 1) for word in words[: len(words) - len(command)])
        lines.append(command)
    if "RUN" not in settings:
        return []
    folder = settings["RUN"]
    root = next((found[1] for line in lines for word in line if (found := _SCRIPT.fullmatch(word))), "")

    def moved(word: str) -> str:
        if word == folder or word.startswith(f"{folder}/"):
            word = word.replace(folder, f"{folder}_again", 1)
        return shlex.quote(word.removeprefix(root))

    return [
        *(f"git checkout {sha}" for sha in [_commit(run)] if sha),
        "source pipelines/lib.sh",
        *(f"{name}={moved(value)}" for name, value in settings.items()),
        *(" ".join(map(moved, line)) for line in lines),
    ]


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _commit(run: Run) -> str | None:
    return next((shlex.quote(sha) for stage in run.stages.values() if (sha := stage.run.get("git_sha"))), None)
