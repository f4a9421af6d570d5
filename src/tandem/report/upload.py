"""A trained model on the Hugging Face Hub, with a model card that carries its numbers."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.errors import UserError
from tandem.options.fields import REQUIRED, opt
from tandem.options.model import is_adapter
from tandem.options.rules import Options
from tandem.runs import CARD, model_files, refusal

TOKEN_VARIABLE = "HF_TOKEN"
CARD_SETTINGS = (
    "dataset_name",
    "beta",
    "loss_type",
    "learning_rate",
    "num_train_epochs",
    "max_length",
    "use_peft",
    "lora_r",
)

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class UploadOptions(Options):
    """Upload."""

    repo_id: str = opt(REQUIRED, "repository on the Hub: owner/name; it is created if it is not there")
    folder: str = opt(REQUIRED, "model or adapter folder to push")
    run_dir: str | None = opt(None, "run folder whose numbers go onto the model card; unset: a card without numbers")
    private: bool = opt(False, "create the repository as a private one")
    dry_run: bool = opt(False, "print what would be pushed; reach no network")

    def conflicts(self) -> Iterator[str]:
        if not _REPO_ID.fullmatch(self.repo_id) or ".." in self.repo_id or "--" in self.repo_id:
            yield f"--repo_id {self.repo_id}: must be owner/name, of letters, digits, '-', '_' and '.'"


def upload(options: UploadOptions) -> str:
    """Push the folder and its card as one commit; returns the commit's address, or with --dry_run what would be pushed.

    Raises:
        UserError: the folder is no complete model, $HF_TOKEN is not set, or the Hub refuses.
    """
    folder = Path(options.folder)
    files = complete_model_files(folder)
    card = model_card(options)
    if options.dry_run:
        return _plan(options, files, card)
    token = os.environ.get(TOKEN_VARIABLE)
    if not token:
        raise UserError(f"${TOKEN_VARIABLE} is not set: pushing to {options.repo_id} needs a token with write access")
    return _push(options, files, card, token)


def complete_model_files(folder: Path) -> list[Path]:
    """`model_files` of a folder that holds all of a model or adapter.

    Raises:
        UserError: it is not a folder, its training has not finished, a part of the model is missing, or a file is a
            link to something outside of it.
    """
    if not folder.is_dir():
        raise UserError(f"--folder {folder}: no such folder")
    reason = refusal(folder)
    if reason is not None:
        raise UserError(f"--folder {folder}: {reason}")
    if missing := _missing(folder):
        raise UserError(f"--folder {folder}: not a complete model: {', '.join(missing)} missing")
    files = model_files(folder)
    for file in files:
        if not file.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"--folder {folder}: {file.name} is a link to {file.resolve()}; copy it here if it is to go"
            )
    return files


def _missing(folder: Path) -> list[str]:
    if is_adapter(str(folder)):
        needed = ["adapter_model.safetensors"]
    else:
        needed = ["config.json", "tokenizer_config.json", *_weights(folder)]
    return [name for name in needed if not (folder / name).is_file()]


def _weights(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return ["model.safetensors"]
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not an index of safetensors files ({error!r})") from error


def model_card(options: UploadOptions) -> str:
    """The README.md of the repository: results, the judge's calibration, the data's fingerprint."""
    from tandem.report import page
    from tandem.report.collect import Run, read_run

    run = read_run(options.run_dir) if options.run_dir else Run(Path(options.folder))
    # Training began with the first stage's model; DPO began with the SFT model
    base = next((stage.config.get("model_name_or_path") for stage in run.stages.values()), None)
    config = run.stages["dpo"].config if "dpo" in run.stages else {}
    metrics, judgement = page.metrics_table(run), page.judgement(run)
    if metrics and run.results:
        metrics |= {
            "n_pairs": run.results["n_pairs"],
            "reference": _public(run.results.get("reference", "the reference")),
        }
    if judgement:
        judgement |= {"model": _public(judgement["model"])}
    versions: dict[str, str] = next((stage.run.get("versions", {}) for stage in reversed(run.stages.values())), {})
    templates = page.environment(autoescape=False)
    templates.filters["cell"] = _cell
    body = templates.get_template("card.md.jinja").render(
        title=options.repo_id.split("/")[1],
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        settings=[
            (name, _public(value))
            for name, value in [("model", base), *((name, config.get(name)) for name in CARD_SETTINGS)]
            if value is not None
        ],
        metrics=metrics,
        headline=page.headline(run),
        judgement=judgement,
        data=page.data_table(run),
    )
    body = re.sub(r"\n{3,}", "\n\n", body).strip()
    return f"---\n{_metadata(options, base, config.get('dataset_name'))}\n---\n\n{body}\n"


def _metadata(options: UploadOptions, base: Any, dataset: Any) -> str:
    from huggingface_hub import ModelCardData

    return ModelCardData(
        library_name="peft" if is_adapter(options.folder) else "transformers",
        tags=["tandem", "dpo", "trl"],
        base_model=base if _on_hub(base) else None,
        datasets=[dataset] if _on_hub(dataset) else None,
    ).to_yaml()


def _on_hub(name: Any) -> bool:
    return isinstance(name, str) and bool(_HUB_NAME.fullmatch(name)) and not Path(name).exists()


def _public(value: Any) -> str:
    """A value as the card may show it: of a path on this machine, its last part."""
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if _on_hub(text) else Path(text).name or text


def _cell(value: Any) -> str:
    """Text that stays one cell of a Markdown table, and text."""
    return re.sub(r"([\\|<>\[\]`*])", r"\\\1", " ".join(str(value).split()))


def _plan(options: UploadOptions, files: list[Path], card: str) -> str:
    sizes = [f"{file.stat().st_size:>15,}  {file.name}" for file in files if file.name != CARD]
    sizes.append(f"{len(card.encode()):>15,}  {CARD} (the model card below)")
    kind = "private" if options.private else "public"
    return "\n".join([f"would push to {options.repo_id} ({kind} if it is new):", *sizes, "", card])


def _push(options: UploadOptions, files: list[Path], card: str, token: str) -> str:
    from httpx2 import HTTPError  # what huggingface_hub asks with, and lets through where there is no connection
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    api = HfApi(token=token)
    operations = [CommitOperationAdd(file.name, file) for file in files]
    operations.append(CommitOperationAdd(CARD, card.encode()))
    try:
        api.create_repo(options.repo_id, private=options.private, exist_ok=True)
        commit = api.create_commit(options.repo_id, operations, commit_message="Model and card, by Tandem")
    except OfflineModeIsEnabled:
        raise UserError("HF_HUB_OFFLINE is set: unset it to push") from None
    except (HTTPError, OSError, ValueError) as error:
        raise UserError(f"the Hub refused {options.repo_id}: {error}") from error
    return commit.commit_url
