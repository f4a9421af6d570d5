"""Models and tokenizers loaded from a folder or the Hub, with load errors as one-line UserErrors."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import try_to_load_from_cache
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tandem import contract, ranks
from tandem.data.adapt import adapt_template
from tandem.data.texts import PLAIN_TEMPLATE, ensure_chat_template
from tandem.devices import gpu_without_bf16, has_cuda
from tandem.errors import UserError, first_line
from tandem.log import logger
from tandem.model_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_config
from tandem.models.adapters import merged, rounded, weights_are_sent
from tandem.models.configuration import (
    LOADING_ERRORS,
    base_of_adapter,
    load_fault,
    read_config,
    revision_of_base,
    stored_dtype,
)
from tandem.models.shards import check_adapter, gather_tied_head
from tandem.models.weights import check_weights, pickled
from tandem.options.model import ModelOptions, TemplateOptions, check_folder, is_adapter
from tandem.places import not_here

if TYPE_CHECKING:
    from peft import PeftModel


def load_tokenizer(
    options: ModelOptions, template: TemplateOptions | None = None, day: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of `options`, with a pad token and a chat template as `template`, else `options`, asks for it.

    With `day`, YYYY-MM-DD, a template that writes the date writes that one.

    Raises:
        UserError: nothing there that is a tokenizer.
    """
    name = options.tokenizer_name_or_path or options.model_name_or_path
    revision = options.model_revision if options.tokenizer_name_or_path is None else None
    if is_adapter(name) and not (Path(name) / "tokenizer_config.json").exists():
        name, revision = base_of_adapter(name), revision_of_base(name)
    check_folder(name, "tokenizer_config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=options.trust_remote_code)
    except LOADING_ERRORS as error:
        raise UserError(f"{name}: {not_here(name)}no tokenizer can be loaded: {load_fault(error)}") from error
    template = template or options
    if tokenizer.chat_template is not None and template.chat_template is None:
        _try_template(name, tokenizer)
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise UserError(
            f"{name}: its tokenizer has neither a pad_token nor an eos_token: name one in its tokenizer_config.json"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if template.chat_template is None and ensure_chat_template(tokenizer):
        logger.info("%s has no chat template: using %r (turns as HH transcripts)", name, PLAIN_TEMPLATE)
    adapt_template(tokenizer, template, day or template.day)
    if not template.is_own:
        _try_template(template.chat_template or name, tokenizer)
    return tokenizer


def _try_template(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    # transformers renders in a sandbox, which stops a template that reaches for more than its messages
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    except (TemplateError, ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{name}: its chat template cannot render a user's turn: {first_line(error)}") from error


def load_model(
    options: ModelOptions,
    *,
    trainable_adapter: bool = False,
    quantize: bool = False,
    tp_size: int = 1,
    sharded: bool = False,
    meta: bool = False,
) -> PreTrainedModel:
    """The model of `options`, on the CPU; the caller moves it. An adapter's folder gives its base with the adapter on.

    With `tp_size` above 1 this is the process's slice (tensor parallelism), sharded over the processes with the same
    slice. With `sharded` it is sharded over all processes (FSDP), and each reads its own part. Where weights are sent
    (`adapters.weights_are_sent`), one process per machine reads them, and the others get the model on the meta device,
    as all do with `meta`.

    Safetensors only: a pickle checkpoint can run code, and is refused.

    Raises:
        UserError: a folder that is not a model, weights that are missing, of another shape or in another format, no
            quantization library.
    """
    name = options.model_name_or_path
    if is_adapter(name):
        base = _base_options(options, name)
        if not is_adapter(base.model_name_or_path):
            if sharded:
                check_adapter(name)
            model = load_model(base, quantize=quantize, tp_size=tp_size, sharded=sharded)
        elif quantize or tp_size > 1 or sharded:
            raise UserError(f"{name}: is an adapter on the adapter {base.model_name_or_path}: merge that one first")
        else:
            model = load_merged(base)
        return load_adapter(model, name, trainable=trainable_adapter)
    check_folder(name, "config.json")
    check_weights(Path(name))
    if Path(name).is_dir():
        name = str(Path(name).absolute())  # an adapter's config names its base so, and is read from other folders
    keywords = _where_and_how(options, quantize, tp_size, sharded, meta)
    try:
        model, loading = _create_model(
            name,
            dtype=options.dtype,
            trust_remote_code=options.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **keywords,
        )
    except LOADING_ERRORS as error:
        raise UserError(f"{name}: cannot be loaded as a model: {load_fault(error)}") from error
    if missing := sorted(loading["missing_keys"]):  # transformers fills them with random numbers
        raise UserError(f"{name}: not a whole causal language model: {len(missing)} weights missing, as {missing[0]}")
    if sharded:
        gather_tied_head(model)
    return model


def _where_and_how(options: ModelOptions, quantize: bool, tp_size: int, sharded: bool, meta: bool) -> dict[str, Any]:
    """Keywords of from_pretrained: on which devices, and with which quantization, attention and revision."""
    keywords: dict[str, Any] = {"quantization_config": _four_bits()} if quantize else {}
    if tp_size > 1 or sharded:
        from transformers.distributed import DistributedConfig

        alike = ranks.count() // tp_size
        keywords["distributed_config"] = DistributedConfig(tp_size=tp_size, fsdp_size=alike)
    elif meta or (weights_are_sent() and not ranks.is_first_here() and not quantize):
        keywords["device_map"] = "meta"
    else:
        keywords["device_map"] = None  # TRL's `auto` would spread each process's model over all devices
    if options.attn_implementation:
        keywords["attn_implementation"] = options.attn_implementation
    if options.model_revision:
        keywords["revision"] = options.model_revision
    return keywords


def weight_files(options: ModelOptions) -> list[Path]:
    """The files that `load_model` reads for `options`, its adapter's too. None where the weights may not be those of
    files alone: with code beside the model, a merge while loading, or an adapter whose initialisation changes its base
    or draws numbers that it does not save."""
    name = options.model_name_or_path
    if options.trust_remote_code:
        return []
    if is_adapter(name):
        base = _base_options(options, name)
        config = adapter_config(name)
        plain = config.get("peft_type") == "LORA" and config.get("init_lora_weights") in (True, False, "gaussian")
        if is_adapter(base.model_name_or_path) or not plain:
            return []
        inner = weight_files(base)
        own = [Path(name) / ADAPTER_CONFIG, Path(name) / ADAPTER_WEIGHTS]
        return inner + own if inner and all(file.is_file() for file in own) else []
    folder = Path(name)
    if not folder.is_dir():
        cached = try_to_load_from_cache(name, "config.json", revision=options.model_revision)
        if not isinstance(cached, str):
            return []
        folder = Path(cached).parent
    weights = sorted(folder.glob("*.safetensors"))
    return [*weights, *sorted(folder.glob("*.json"))] if weights else []


def load_merged(options: ModelOptions) -> PreTrainedModel:
    """The model of `options` without an adapter around it: an adapter is merged in float32, and the result rounded once
    to `options.dtype`.

    Raises:
        UserError: as in `load_model`, or an adapter that cannot be merged.
    """
    name = options.model_name_or_path
    if not is_adapter(name):
        return load_model(options)
    dtype = options.dtype
    if dtype == "auto":
        dtype = stored_dtype(name, trust_remote_code=options.trust_remote_code)
    adapted: Any = load_model(replace(options, dtype="float32"))
    try:
        whole = merged(adapted)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    return rounded(whole, getattr(torch, dtype))


def _create_model(name: str, *, dtype: str, **keywords: Any) -> Any:
    try:
        from trl.trainer.utils import create_model_from_path
    except ImportError:  # TRL 0.9.6, which optimum-habana needs; beside it is transformers 4
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(name, torch_dtype=dtype, **keywords)
    return create_model_from_path(name, dtype=dtype, **keywords)


def check_model(name: str, revision: str | None = None) -> None:
    """Refuse a model or adapter that cannot be loaded, as far as that shows without reading its weights.

    Raises:
        UserError: no such folder or Hub name, or one with no readable config or tokenizer, or with its weights missing.
    """
    if is_adapter(name):
        _check_adapter(name)
        check_model(base_of_adapter(name), revision_of_base(name))
    else:
        folder = Path(name)
        check_folder(name, "config.json")
        read_config(name, revision)
        check_weights(folder)
        if folder.is_dir() and not any(folder.glob("*.safetensors")):
            raise UserError(f"{name}: has no weights (.safetensors)")
    load_tokenizer(ModelOptions(model_name_or_path=name, model_revision=revision))


def load_adapter(base: PreTrainedModel, folder: str, *, trainable: bool = False) -> "PeftModel":
    """`base` with the adapter in `folder` on it; on the meta device, where `base` is.

    Raises:
        UserError: no adapter in safetensors there, or one of another model.
    """
    from peft import PeftModel

    _check_adapter(folder)
    try:
        with adapters_of_whole_layers():
            empty = all(parameter.is_meta for parameter in base.parameters())
            return PeftModel.from_pretrained(base, folder, is_trainable=trainable, low_cpu_mem_usage=empty)
    except LOADING_ERRORS as error:
        why = f"cannot be loaded as an adapter of {base.name_or_path}: {first_line(error)}"
        raise UserError(f"{folder}: {why}") from error


def _check_adapter(folder: str) -> None:
    if (Path(folder) / "adapter_model.safetensors").is_file():
        return
    if (Path(folder) / "adapter_model.bin").is_file():
        raise pickled(folder, "adapter_model.bin")
    raise UserError(f"{folder}: not an adapter's folder: it has no adapter_model.safetensors")


@contextlib.contextmanager
def adapters_of_whole_layers() -> Iterator[None]:
    """Within the block, PEFT makes a new adapter for whole layers, of which each process of tensor parallelism then
    keeps its part.

    PEFT 0.21 would make it as wide as this process's part of the layer (`tuners_utils._get_in_out_features`). Its first
    values would then not be those on one process, and transformers 5.23 would take its width for the layer's.
    """
    from peft.tuners.lora import layer

    # PEFT 0.17, of Gaudi's environment: no tensor parallelism. Elsewhere the contract refuses a PEFT without it
    if not hasattr(layer, "_get_in_out_features"):
        yield
        return
    width_of_part = layer._get_in_out_features

    def width(module: torch.nn.Module) -> tuple[int, int] | tuple[None, None]:
        if isinstance(module, torch.nn.Linear):
            return module.in_features, module.out_features
        return width_of_part(module)

    layer._get_in_out_features = width
    try:
        yield
    finally:
        layer._get_in_out_features = width_of_part


def commit_of(name: str, revision: str | None) -> str | None:
    """The commit of a Hub model that `revision`, or else its main branch, names in the Hub's cache on this machine;
    `revision` itself where the cache does not have it."""
    file = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(file).parent.name if isinstance(file, str) else revision


def _base_options(options: ModelOptions, adapter: str) -> ModelOptions:
    return replace(options, model_name_or_path=base_of_adapter(adapter), model_revision=revision_of_base(adapter))


def _four_bits() -> Any:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise UserError(f"--load_in_4bit needs bitsandbytes: {contract.extra('quantization')}") from None
    # On CPUs with AVX512-BF16, bitsandbytes 0.50 packs weights at their first forward without gradients: the scales are
    # bfloat16 from then on, and no gradient goes through (`_convert_weight_packed_for_cpu`)
    if not has_cuda():
        raise UserError("--load_in_4bit needs a CUDA device: leave it out here, which trains the adapter all the same")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16 if gpu_without_bf16() else torch.bfloat16,
    )
