"""Merges an adapter and its base into one model folder that any program loads."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem.errors import UserError
from tandem.log import logger
from tandem.models.companions import carry
from tandem.options.fields import REQUIRED, changed, opt
from tandem.options.model import ModelOptions, is_adapter
from tandem.options.rules import Options
from tandem.runs import CONFIG, damage, is_complete, model_files, refusal, staged_dir

# Of log-probs in float32, relative; deep models with experts differ by 1e-6 to 1e-5, other weights by 1e-2 and more
_TOLERANCE = 1e-3
_SHARDS = "pytorch_model_fsdp_0"  # accelerate's name for them


if TYPE_CHECKING:
    import torch


@dataclass
class MergeOptions(Options):
    """Merge."""

    adapter: str = opt(REQUIRED, "folder of the trained adapter (a full model is copied as it is)")
    output_dir: str = opt(REQUIRED, "folder for the merged model")
    base_model: str | None = opt(None, "base model, where it is not the one the adapter names")
    dtype: str = opt(
        "auto", "type of the merged weights; auto: the base's", choices=("auto", "float32", "bfloat16", "float16")
    )


@dataclass
class MergeShardsOptions(Options):
    """Merge shards."""

    checkpoint: str = opt(REQUIRED, "checkpoint-N of a run whose weights FSDP keeps in shards")
    output_dir: str = opt(REQUIRED, "folder for the model, or for the adapter")


def merge_shards(options: MergeShardsOptions) -> None:
    """Write the model or adapter of a checkpoint in shards to `output_dir`, complete or not at all.

    The shards' index is a pickle, which can run code: only for checkpoints of one's own.

    Raises:
        UserError: it is no whole checkpoint in shards, or `output_dir` holds other files.
    """
    checkpoint = Path(options.checkpoint)
    if not (checkpoint / _SHARDS).is_dir():
        raise UserError(f"--checkpoint {checkpoint}: holds no shards of FSDP ({_SHARDS})")
    reason = damage(checkpoint)
    if reason is not None:
        raise UserError(f"--checkpoint {checkpoint} cannot be used: {reason}")
    _check_target(options.output_dir)
    from accelerate.utils import merge_fsdp_weights

    with staged_dir(options.output_dir) as staging:
        merge_fsdp_weights(str(checkpoint / _SHARDS), str(staging))
        for file in model_files(checkpoint):
            shutil.copy2(file, staging / file.name)
        if is_adapter(options.checkpoint):
            (staging / "model.safetensors").rename(staging / "adapter_model.safetensors")


def merge(options: MergeOptions) -> None:
    """Write the merged model and its tokenizer to `output_dir`, complete or not at all.

    Raises:
        UserError: there is no finished adapter or model to merge, or `output_dir` holds other files.
    """
    _check(options)
    with staged_dir(options.output_dir) as staging:
        if is_adapter(options.adapter):
            _merge_adapter(options, staging)
        else:
            _copy_model(options.adapter, staging)


def _check(options: MergeOptions) -> None:
    # Checked here because preflight parses this stage before the adapter exists
    folder = Path(options.adapter)
    if not is_adapter(options.adapter) and not (folder / "config.json").is_file():
        raise UserError(f"--adapter {options.adapter}: neither an adapter's folder nor a model's")
    reason = refusal(folder)
    if reason is not None:
        raise UserError(f"--adapter {options.adapter}: {reason}")
    _check_target(options.output_dir)
    if is_adapter(options.adapter):
        return
    for name in ("base_model", "dtype"):
        if name in changed(options):
            raise UserError(f"--{name} has no effect: {options.adapter} is a full model, not an adapter")


def _check_target(folder: str) -> None:
    target = Path(folder)
    former = is_complete(target) and not (target / CONFIG).exists()  # a merge, not a training run
    if not former and target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"--output_dir {folder}: holds other files, which a merge would remove")


def _copy_model(folder: str, staging: Path) -> None:
    from tandem.models.weights import check_weights

    check_weights(Path(folder))
    files = model_files(folder)
    if not any(file.suffix == ".safetensors" for file in files):
        raise UserError(f"--adapter {folder}: has no weights (.safetensors)")
    for file in files:
        shutil.copy2(file, staging / file.name)


def _merge_adapter(options: MergeOptions, staging: Path) -> None:
    import torch

    from tandem.models.adapters import rounded
    from tandem.models.configuration import base_of_adapter, revision_of_base, stored_dtype
    from tandem.models.ends import stop_at_turn_end
    from tandem.models.load import load_tokenizer
    from tandem.models.shard_merge import merge_files, save_config

    if options.base_model:
        base = ModelOptions(model_name_or_path=options.base_model)
    else:
        revision = revision_of_base(options.adapter)
        base = ModelOptions(model_name_or_path=base_of_adapter(options.adapter), model_revision=revision)
    dtype = stored_dtype(base.model_name_or_path, base.model_revision) if options.dtype == "auto" else options.dtype
    model = merge_files(base, options.adapter, getattr(torch, dtype), staging)
    by_files = model is not None
    if not by_files:
        model = rounded(merged_whole(base, options.adapter), getattr(torch, dtype))
    has_tokenizer = (Path(options.adapter) / "tokenizer_config.json").exists()
    tokenizer = load_tokenizer(ModelOptions(model_name_or_path=options.adapter) if has_tokenizer else base)
    stop_at_turn_end(model, tokenizer)
    if by_files:
        save_config(model, getattr(torch, dtype), staging)
    else:
        model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    carry(base.model_name_or_path, base.model_revision, staging)


def merged_whole(base: ModelOptions, adapter: str) -> Any:
    from tandem.models.adapters import merged
    from tandem.models.load import load_adapter, load_merged

    adapted = load_adapter(load_merged(base), adapter).eval()
    row = _row(adapted)
    before = _log_probs(adapted, row)
    try:
        model = merged(adapted)
    except UserError as error:
        raise UserError(f"--adapter {adapter}: {error}") from error
    _check_merged(before, _log_probs(model, row), adapter)
    return model


def _row(model: Any) -> "torch.Tensor":
    """(1, 32) token ids, drawn from the whole vocabulary."""
    import torch

    rows = model.get_input_embeddings().weight.shape[0]
    return torch.randint(rows, (1, 32), generator=torch.Generator().manual_seed(0))


def _log_probs(model: Any, row: "torch.Tensor") -> "torch.Tensor | None":
    """(1, 32, V) nats, or None where the model cannot be forwarded here."""
    import torch

    try:
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=row, use_cache=False).logits
    except Exception as error:  # a model may need a device or a kernel that is not here
        logger.warning("the merge cannot be checked here: %s: %s", type(error).__name__, error)
        return None
    return logits.float().log_softmax(-1)


def _check_merged(before: "torch.Tensor | None", after: "torch.Tensor | None", adapter: str) -> None:
    """Refuse a merge that computes something else than adapter and base did.

    Raises:
        UserError: their log-probs differ by more than rounding explains.
    """
    if before is None or after is None:
        return
    difference = ((after - before).abs().mean() / before.abs().mean()).item()
    if not difference <= _TOLERANCE:
        raise UserError(
            f"--adapter {adapter}: merged, it is another model than it was on its base (log-probs differ by "
            f"{difference:.1e} of themselves); nothing was written"
        )
