"""An adapter and its base → one model folder that anything loads."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from tandem.errors import UserError
from tandem.options.fields import REQUIRED, changed, opt
from tandem.options.model import ModelOptions, is_adapter
from tandem.options.rules import Options
from tandem.runs import CONFIG, damage, is_complete, model_files, refusal, staged_dir

_SHARDS = "pytorch_model_fsdp_0"  # accelerate's name for them


@dataclass
class MergeOptions(Options):
    """Merge."""

    adapter: str = opt(REQUIRED, "folder of the trained adapter (a full model is copied as it is)")
    output_dir: str = opt(REQUIRED, "folder for the merged model")
    base_model: str | None = opt(None, "base model, where it is not the one the adapter names")
    dtype: str = opt("float32", "type of the merged weights", choices=("float32", "bfloat16", "float16", "auto"))


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
    # Not when the options are parsed: a pipeline has them parsed before there is an adapter
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
    from tandem.models.load import check_weights

    check_weights(Path(folder))
    files = model_files(folder)
    if not any(file.suffix == ".safetensors" for file in files):
        raise UserError(f"--adapter {folder}: has no weights (.safetensors)")
    for file in files:
        shutil.copy2(file, staging / file.name)


def _merge_adapter(options: MergeOptions, staging: Path) -> None:
    from peft import PeftModel

    from tandem.models.load import base_of_adapter, load_adapter, load_model, load_tokenizer

    base = options.base_model or base_of_adapter(options.adapter)
    model = load_model(ModelOptions(model_name_or_path=base, dtype=options.dtype))
    if isinstance(model, PeftModel):  # the adapter was trained on top of another one
        model = model.merge_and_unload()
    try:
        merged = load_adapter(model, options.adapter).merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise UserError(f"--adapter {options.adapter}: cannot be merged: {error}") from error
    merged.save_pretrained(staging)
    tokenizer_home = options.adapter if (Path(options.adapter) / "tokenizer_config.json").exists() else base
    load_tokenizer(ModelOptions(model_name_or_path=tokenizer_home)).save_pretrained(staging)
