"""The settings of a run as its `run.json` keeps them, and which of them a resumed run may change."""

import json
import os
import platform
import subprocess
from dataclasses import replace
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import tandem
from tandem import ranks
from tandem.digests import manifest_digest
from tandem.errors import UserError
from tandem.options.fields import names_of
from tandem.options.model import LoraOptions, ModelOptions, is_adapter
from tandem.options.parsing import defaults
from tandem.options.training import TrainOptions
from tandem.runs import RUN, checkpoints, is_complete
from tandem.training.option_sets import DPOOptionSet, SFTOptionSet

Run = TypeVar("Run", SFTOptionSet, DPOOptionSet)

# Options that change how a run is watched or where it is stored, not what it computes: they may differ on a resume
FREE_ON_RESUME = {
    "logging_steps", "report_to", "run_name", "mount_dir", "resume_from_checkpoint", "allow_changed",
    "save_total_limit", "output_dir", "logging_first_step", "wandb_project", "dataloader_num_workers", "ddp_timeout",
    "dataset_num_proc", "token_cache", "token_cache_gib",
}  # fmt: skip
# A resume takes these from the checkpoint with the optimizer's state, so another value would have no effect
_KEPT_BY_OPTIMIZER = {"learning_rate", "weight_decay", "optim"}

# Of versions that did not note which options were given
_FORMER_DEFAULTS = {"learning_rate": (1e-6, 2e-5)}

# The option that names a model, by the entry with that model's content (as far as the model has a manifest)
_CONTENTS = {"model_content": "model_name_or_path", "reference_content": "reference_model"}

# Entries that older runs do not have, and that are not compared with them then
_NOTED_LATER = (*_CONTENTS, "tokens")


def usual(*options: Any) -> dict[str, Any]:
    """By name, the value of each option if it is not given: its default, or what the default means in this run."""
    known = defaults(*options)
    for each in options:
        if isinstance(each, TrainOptions):
            known["learning_rate"] = each.usual_rates[_trains_adapter(options)]
    return known


def _trains_adapter(options: tuple[Any, ...]) -> bool:
    return any(
        (isinstance(each, LoraOptions) and each.use_peft)
        or (isinstance(each, ModelOptions) and is_adapter(each.model_name_or_path))
        for each in options
    )


def as_begun(run: Run) -> Run:
    """`run` with a value for each option.

    It is the value that is given now. For an option that is not given, nor was to the run that is resumed, it is that
    run's, since the default may have changed; otherwise the usual one.

    Raises:
        UserError: the folder's `run.json` is not one of ours.
    """
    known, asked = usual(*run), run.train.resume_from_checkpoint
    folder = Path(run.train.output_dir if asked in ("auto", "no") else asked)
    before = run_in(folder, known) if asked != "no" else None
    kept = before if before and (is_complete(folder) or checkpoints(folder) or asked != "auto") else None

    def settled(part: Any) -> Any:
        values = {}
        for name in names_of(type(part)):
            value = known[name] if name == "learning_rate" and getattr(part, name) is None else getattr(part, name)
            if kept and value == known[name] and name in kept["config"] and name not in given(kept, known):
                value = kept["config"][name]
            if value != getattr(part, name):
                values[name] = value
        return replace(part, **values) if values else part

    return type(run)(*map(settled, run))


def given(run: dict[str, Any], known: dict[str, Any]) -> set[str]:
    """The options that a run was given; for a run that did not note them, those whose values are not the usual ones.

    Args:
        run: of `run.json`.
        known: `usual` values.
    """
    noted = run.get("given")
    if noted is not None:
        return set(noted)
    return {
        name
        for name, value in run["config"].items()
        if value != known.get(name) and value not in _FORMER_DEFAULTS.get(name, ())
    }


def settings_of(config: dict[str, Any], known: dict[str, Any], before: dict[str, Any] | None = None) -> dict[str, Any]:
    """The settings that a run's result depends on, as `run.json` has them.

    Args:
        config: its options.
        known: their `usual` values.
        before: the settings of the run that is resumed, if any: options that it was not given count as not given here.
    """
    own = {name for name, value in config.items() if value != known.get(name)}
    if before:
        own -= {name for name in own if before["config"].get(name) == config[name]} - given(before, known)
    return {"config": config, "given": sorted(own), "processes": ranks.count()}


def contents_of(config: dict[str, Any]) -> dict[str, str]:
    """Hex digests of the run's models, from their manifests; a model without one has no entry.

    The path alone does not say what a run began with: a new merge lies where the old one did.
    """
    found = {}
    for name, option in _CONTENTS.items():
        folder = config.get(option)
        if folder and (digest := manifest_digest(folder)):
            found[name] = digest
    return found


def run_in(folder: str | Path, defaults: dict[str, Any]) -> dict[str, Any] | None:
    """The `run.json` of the run that wrote to `folder`; None where there is none.

    For an option that is newer than that run it has the default, which is what the run did.

    Raises:
        UserError: the file is not one of ours.
    """
    path = Path(folder) / RUN
    try:
        run: dict[str, Any] = json.loads(path.read_text())
        if not run["id"] or not run["config"]:
            return None
        return run | {"config": defaults | run["config"]}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): choose another --output_dir") from error


def day_of(run: dict[str, Any] | None) -> str:
    """The day that a run's chat template tells, as YYYY-MM-DD: that of its start, which for a new run is today."""
    return str((run or {}).get("day") or datetime.now().date().isoformat())


def changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """The settings that differ, each with a few words on how, without those that cannot change a result.

    Args:
        before: of `run.json`.
        now: the entries of it to compare, `config` among them.
    """
    was = before["config"] | before
    found = {
        name: f"{name} was {was.get(name)}, is {value}"
        for name, value in (now["config"] | now).items()
        if name not in ("config", "given")
        and name not in FREE_ON_RESUME
        and not name.startswith("alarm_")
        and (name in was or name not in _NOTED_LATER)
        and was.get(name) != value
    }
    if len(found) > 1:  # other pairs and lengths give other tokens: only what nothing else explains is told
        found.pop("tokens", None)
    return found


def check_changes(
    before: dict[str, Any] | None, now: dict[str, Any], train: TrainOptions, where: str | None = None
) -> list[str]:
    """The changes since `before` that the user allows, in words.

    Args:
        where: what is there; unset: `output_dir` holds it.

    Raises:
        UserError: naming every change that is not allowed.
    """
    known = now["config"].keys() | {"processes", "data", *_NOTED_LATER}
    unknown = sorted(set(train.allow_changed) - known)
    if unknown:
        raise UserError(f"--allow_changed {' '.join(unknown)}: there is no such setting")
    changed = changes(before, now) if before else {}
    kept = sorted(_KEPT_BY_OPTIMIZER & changed.keys() & set(train.allow_changed))
    if kept:
        raise UserError(
            f"--allow_changed {' '.join(kept)}: the optimizer's state in a checkpoint brings the old value back; "
            "begin a new run from the model in it"
        )
    refused = [name for name in changed if name not in train.allow_changed]
    if refused:
        raise UserError(
            f"{where or f'--output_dir {train.output_dir} holds'} a run with other settings "
            f"({'; '.join(changed[name] for name in refused)}): choose another folder, start over in this one with "
            f"--resume_from_checkpoint no, or go on all the same with --allow_changed {' '.join(refused)}"
        )
    return list(changed.values())


def _commit() -> str | None:
    """The commit that runs; None where this is no checkout, or there is no git (the container images have none)."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    except FileNotFoundError:
        return None


def environment() -> dict[str, Any]:
    packages = ("torch", "transformers", "trl", "accelerate", "peft", "datasets")
    return {
        "git_sha": _commit(),
        "python": platform.python_version(),
        # Not of the installed package `tandem`, which is a stranger's
        "versions": {name: metadata.version(name) for name in packages} | {"tandem": tandem.__version__},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }
