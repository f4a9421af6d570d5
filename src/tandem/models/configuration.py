"""Reads the configuration of a model, or of an adapter's base, and tells a fault in the same words everywhere.

A configuration is read before any weights are, and tells the sizes of a model and the type its weights are stored in.
"""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig

from tandem.errors import UserError, first_line
from tandem.model_folder import ADAPTER_CONFIG, adapter_config
from tandem.options.model import is_adapter
from tandem.places import not_here

# What transformers, PEFT and safetensors raise over files that are missing, torn or of another model
LOADING_ERRORS = (
    OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError, TypeError, AttributeError,
    AssertionError, StrictDataclassError,
)  # fmt: skip


def base_of_adapter(folder: str) -> str:
    """The model that the adapter in `folder` was trained on.

    Raises:
        UserError: the adapter's config does not say, or cannot be read.
    """
    base = adapter_config(folder).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{folder}: {ADAPTER_CONFIG} has no base_model_name_or_path")
    if Path(str(base)).resolve() == Path(folder).resolve():
        raise UserError(f"{folder}: {ADAPTER_CONFIG} names the adapter itself as its base_model_name_or_path")
    return str(base)


def revision_of_base(folder: str) -> str | None:
    """The branch, tag or commit of a Hub model that the adapter in `folder` was trained on, where it says so."""
    revision = adapter_config(folder).get("revision")
    return str(revision) if revision else None


def load_fault(error: Exception) -> str:
    """A library's message on a model that it cannot load; in Tandem's words where it names a library's own argument."""
    if "trust_remote_code" in str(error):
        return "its repository has code of its own, which only SFT and DPO run, with --trust_remote_code: read it first"
    return first_line(error)


def read_config(name: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Any:
    """transformers' configuration of a model, in a folder or on the Hub; of an adapter, its base's.

    Raises:
        UserError: there is none that can be read, or the adapter names no base.
    """
    if is_adapter(name):
        return read_config(base_of_adapter(name), revision_of_base(name), trust_remote_code=trust_remote_code)
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except LOADING_ERRORS as error:
        raise UserError(f"{name}: {not_here(name)}its config cannot be read: {load_fault(error)}") from error


def stored_dtype(name: str, revision: str | None = None, *, trust_remote_code: bool = False) -> str:
    """The type that the weights of a model are stored in, by its configuration; an adapter's is its base's.

    Raises:
        UserError: as in `read_config`.
    """
    config = read_config(name, revision, trust_remote_code=trust_remote_code)
    dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)  # transformers 4 has the second
    return str(dtype or torch.float32).removeprefix("torch.")
