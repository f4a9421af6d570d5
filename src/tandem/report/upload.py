"""Pushes a trained model to the Hugging Face Hub, with a model card that has its numbers."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.errors import UserError
from tandem.model_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, WEIGHTS, adapter_config, indexed_files
from tandem.options.fields import REQUIRED, opt
from tandem.options.model import is_adapter
from tandem.options.rules import Options
from tandem.places import is_hub_name
from tandem.report import published
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
_FILE = re.compile(r"\.(?:jsonl?|ndjson|csv|tsv|parquet|arrow|gz|zst|ya?ml|txt)$", re.IGNORECASE)
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


@dataclass
class UploadOptions(Options):
    """Upload."""

    repo_id: str = opt(REQUIRED, "repository on the Hub: owner/name; it is created if it is not there")
    folder: str = opt(REQUIRED, "model or adapter folder to push")
    run_dir: str | None = opt(None, "run folder whose numbers go onto the model card; unset: a card without numbers")
    base_model: str | None = opt(
        None, "Hub name of the model that the folder is an adapter on, or was trained from; unset: what the run says"
    )
    license: str | None = opt(None, "license of the model, by the Hub's name for it, as apache-2.0; onto the card")
    private: bool = opt(False, "create the repository as a private one")
    dry_run: bool = opt(False, "print what would be pushed; reach no network")

    def conflicts(self) -> Iterator[str]:
        if not _REPO_ID.fullmatch(self.repo_id) or ".." in self.repo_id or "--" in self.repo_id:
            yield f"--repo_id {self.repo_id}: must be owner/name, of letters, digits, '-', '_' and '.'"
        if self.license is not None and not _LICENSE.fullmatch(self.license):
            yield f"--license {self.license}: must be the Hub's name for it, as apache-2.0, mit, llama3.1 or other"
        if self.base_model is not None and not _on_hub(self.base_model):
            yield f"--base_model {self.base_model}: must be a name on the Hub, as owner/name, and no folder"


def upload(options: UploadOptions) -> str:
    """Push the folder and its card as one commit; returns the commit's address, or with --dry_run what would be pushed.

    Raises:
        UserError: the folder is no complete model, $HF_TOKEN is not set, or the Hub refuses.
    """
    folder = Path(options.folder)
    contents: dict[str, Path | bytes] = {file.name: file for file in complete_model_files(folder) if file.name != CARD}
    contents |= {
        name: published.configuration(folder / name)
        for name in contents
        if name.endswith("config.json") and name != ADAPTER_CONFIG
    }
    if is_adapter(str(folder)):
        contents[ADAPTER_CONFIG] = _published_config(folder, options.base_model)
    card = model_card(options)
    contents[CARD] = card.encode()
    if options.dry_run:
        return _plan(options, contents, card)
    token = os.environ.get(TOKEN_VARIABLE)
    if not token:
        raise UserError(f"${TOKEN_VARIABLE} is not set: pushing to {options.repo_id} needs a token with write access")
    return _push(options, contents, token)


def _published_config(folder: Path, base_model: str | None) -> bytes:
    """adapter_config.json with a base that others can load.

    Raises:
        UserError: its base is a folder of this machine, and no other base is given.
    """
    config = adapter_config(folder)
    base = config.get("base_model_name_or_path")
    if base_model is None and not _on_hub(base):
        raise UserError(
            f"--folder {folder}: an adapter on {base}, a folder that is on this machine alone: push that model and "
            "name it with --base_model, or merge the adapter (scripts/merge_lora.py) and push the whole model"
        )
    config = published.without_places(config) | {"base_model_name_or_path": base_model or base}
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def complete_model_files(folder: Path) -> list[Path]:
    """`model_files` of a folder that holds a complete model or adapter.

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
        needed = [ADAPTER_WEIGHTS]
    else:
        needed = ["config.json", "tokenizer_config.json", *_weights(folder)]
    return [name for name in needed if not (folder / name).is_file()]


def _weights(folder: Path) -> list[str]:
    named = indexed_files(folder)
    return [WEIGHTS] if named is None else sorted(named)


def model_card(options: UploadOptions) -> str:
    """The README.md of the repository: results, the judge's calibration, the data's fingerprint."""
    from tandem.report.collect import Run, read_run
    from tandem.report.page import environment
    from tandem.report.tables import data_table, metrics_table
    from tandem.report.verdict import headline, judgement

    run = read_run(options.run_dir) if options.run_dir else Run(Path(options.folder))
    # The base is the model that the first stage trained: DPO's own is the result of SFT
    base = options.base_model or next((stage.config.get("model_name_or_path") for stage in run.stages.values()), None)
    if base is None and is_adapter(options.folder):
        base = json.loads(_published_config(Path(options.folder), None))["base_model_name_or_path"]
    config = run.stages["dpo"].config if "dpo" in run.stages else {}
    metrics, judged = metrics_table(run), judgement(run)
    if metrics and run.results:
        metrics |= {
            "n_pairs": run.results["n_pairs"],
            "reference": _public(run.results.get("reference", "the reference")),
        }
    if judged:
        judged |= {"model": _public(judged["model"])}
    versions: dict[str, str] = next((stage.run.get("versions", {}) for stage in reversed(run.stages.values())), {})
    templates = environment(autoescape=False)
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
        headline=headline(run),
        judgement=judged,
        data=data_table(run),
        repo_id=options.repo_id,
        adapter=is_adapter(options.folder),
    )
    body = re.sub(r"\n{3,}", "\n\n", body).strip()
    return f"---\n{_metadata(options, run, base)}\n---\n\n{body}\n"


def _metadata(options: UploadOptions, run: Any, base: Any) -> str:
    """The card's YAML, with the held-out results as the Hub's model-index."""
    from huggingface_hub import ModelCardData

    dataset = run.stages["dpo"].config.get("dataset_name") if "dpo" in run.stages else None
    return ModelCardData(
        model_name=options.repo_id.split("/")[1],
        eval_results=_eval_results(run, dataset) or None,
        license=options.license,
        language=_languages(run) or None,
        pipeline_tag="text-generation",
        library_name="peft" if is_adapter(options.folder) else "transformers",
        tags=["tandem", "dpo", "trl"],
        base_model=base if _on_hub(base) else None,
        datasets=[str(dataset)] if _on_hub(dataset) else None,
    ).to_yaml()


def _eval_results(run: Any, dataset: Any) -> list[Any]:
    from huggingface_hub import EvalResult

    models = (run.results or {}).get("models", {})
    tuned = models.get("dpo") or models.get("sft") or {}
    names = {"preference_accuracy": "accuracy", "perplexity_chosen": "perplexity"}
    shown = str(dataset) if _on_hub(dataset) else "held-out preference pairs"
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=shown if _on_hub(dataset) else "preference-pairs",
            dataset_name=shown,
            metric_type=kind,
            metric_name=name.replace("_", " "),
            metric_value=round(tuned[name]["value"], 6),
        )
        for name, kind in names.items()
        if isinstance(tuned.get(name), dict) and tuned[name].get("value") is not None
    ]


def _languages(run: Any) -> list[str]:
    """The languages of at least a tenth of the training pairs, as the data check names them."""
    found = ((run.data or {}).get("splits", {}).get("train") or {}).get("languages") or {}
    counts = found.items() if isinstance(found, dict) else []
    total = sum(count for _, count in counts if isinstance(count, int | float)) or 1
    return sorted(name for name, count in counts if re.fullmatch(r"[a-z]{2,3}", str(name)) and count >= total / 10)


def _on_hub(name: Any) -> bool:
    """Whether a name can be one on the Hub: it is neither a path nor a file's name."""
    return isinstance(name, str) and is_hub_name(name) and not _FILE.search(name)


def _public(value: Any) -> str:
    """A value for the card: of a path, only the last part."""
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if _on_hub(text) else Path(text).name or text


def _cell(value: Any) -> str:
    """`value` as one cell of a Markdown table, its Markdown characters escaped."""
    return re.sub(r"([\\|<>\[\]`*])", r"\\\1", " ".join(str(value).split()))


def _plan(options: UploadOptions, contents: Mapping[str, Path | bytes], card: str) -> str:
    sizes = [
        f"{len(content) if isinstance(content, bytes) else content.stat().st_size:>15,}  {name}"
        for name, content in contents.items()
        if name != CARD
    ]
    sizes.append(f"{len(card.encode()):>15,}  {CARD} (the model card below)")
    kind = "private" if options.private else "public"
    return "\n".join([f"would push to {options.repo_id} ({kind} if it is new):", *sizes, "", card])


def _push(options: UploadOptions, contents: Mapping[str, Path | bytes], token: str) -> str:
    from httpx2 import HTTPError  # huggingface_hub lets it pass where there is no connection
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    api = HfApi(token=token)
    operations: list[Any] = [CommitOperationAdd(name, content) for name, content in contents.items()]
    try:
        api.create_repo(options.repo_id, private=options.private, exist_ok=True)
        there = set(api.list_repo_files(options.repo_id)) - contents.keys()
        operations += [CommitOperationDelete(name) for name in sorted(there) if published.would_be_loaded(name)]
        commit = api.create_commit(options.repo_id, operations, commit_message="Model and card, by Tandem")
    except OfflineModeIsEnabled:
        raise UserError("HF_HUB_OFFLINE is set: unset it to push") from None
    except (HTTPError, OSError, ValueError) as error:
        raise UserError(f"the Hub refused {options.repo_id}: {error}") from error
    return commit.commit_url
