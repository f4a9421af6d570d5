"""What Tandem borrows from inside other packages: private names, and overridden or replaced ones that nobody promises.

One record a name: where it is used, and the test that exercises it. Before training, `check` looks each name up and
compares the packages' versions with those that all tests ran with. There are two environments, the main one
(requirements.txt) and Intel Gaudi's (requirements-gaudi.txt); the ranges of versions stand here and nowhere else.

Importing this module imports nothing heavy; `check` imports what it looks into.
"""

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import CodeType
from typing import Any

from tandem.errors import UserError, first_line

DISTRIBUTION = "tandem-dpo"  # `tandem` on PyPI is a stranger's
UNTESTED = "TANDEM_UNTESTED_VERSIONS"


@dataclasses.dataclass(frozen=True)
class Borrowed:
    """A name inside another package.

    Attributes:
        owner: the module or class that has it, dotted; its first part is the package.
        name: the name. One that only instances have (`_tr_loss`) is looked for in the code of the owner's methods.
        used_in: the module of tandem.
        test: the test that fails where it means something else.
        takes: its parameters, which must be these, in this order; None: not compared.
        fields: fields that this dataclass must have.
        instead_of: the public way, and why it does not do.
    """

    owner: str
    name: str
    used_in: str
    test: str
    takes: tuple[str, ...] | None = None
    fields: tuple[str, ...] = ()
    instead_of: str = ""

    @property
    def package(self) -> str:
        return self.owner.partition(".")[0]

    def problem(self) -> str | None:
        """What is wrong with it, if anything is."""
        try:
            owner = resolve(self.owner)
        except (ImportError, AttributeError) as error:
            return f"{self.owner} is not there ({first_line(error)})"
        if not hasattr(owner, self.name):
            return None if self.name in _mentioned(owner) else f"{self.owner} has no {self.name}"
        value = getattr(owner, self.name)
        if self.takes is not None and (found := tuple(inspect.signature(value).parameters)) != self.takes:
            return f"{self.owner}.{self.name} takes {list(found)}, not {list(self.takes)}"
        if missing := [field for field in self.fields if field not in getattr(value, "__dataclass_fields__", {})]:
            return f"{self.owner}.{self.name} lacks {', '.join(missing)}"
        return None


@dataclasses.dataclass(frozen=True)
class Contract:
    """What is borrowed in one environment, and the versions of its packages that the tests ran with."""

    name: str
    versions: dict[str, str]
    borrowed: tuple[Borrowed, ...]


_FORWARD, _CHECKPOINTS, _SHARDING = "engine.forward", "training.trainers.checkpoints", "training.trainers.sharding"
_BASE, _ON_TRL = "training.trainers.base", "training.trainers.on_trl"
_EQUAL, _RESUMED = "tests/training/trainers/test_tandem_trainer.py", "tests/training/test_stages.py"
_TWO_PROCESSES = "tests/distributed/test_sharded_equality.py"
_REHEARSED = "tests/training/test_rehearsal.py"
_DECODING, _DECODED = "models.decoding", "tests/models/test_decoding.py"
_DPO, _SFT, _TRAINER = "trl.trainer.dpo_trainer.DPOTrainer", "trl.SFTTrainer", "transformers.Trainer"

MAIN = Contract(
    "main environment",
    {
        "torch": ">=2.11,<2.14",
        "transformers": ">=5.23,<5.24",
        "trl": ">=1.16,<1.17",
        "accelerate": ">=1.15,<1.16",
        "peft": ">=0.21,<0.22",
    },
    (
        Borrowed(
            "trl.trainer.dpo_trainer",
            "add_fused_lm_head",
            _FORWARD,
            "tests/engine/test_forward.py",
            takes=("model", "temperature", "cast_lm_head_to_fp32", "outputs"),
        ),
        Borrowed(
            "trl.trainer.sft_trainer",
            "add_fused_lm_head",
            _FORWARD,
            "tests/training/test_examples.py",
            takes=("model", "temperature", "cast_lm_head_to_fp32", "outputs"),
        ),
        Borrowed(
            "trl.trainer.utils",
            "FusedCausalLMOutput",
            _FORWARD,
            "tests/engine/test_forward.py",
            fields=(
                "loss",
                "log_probs",
                "entropy",
                "log_sum_sq_probs",
                "mean_logits",
                "is_top1",
                "label_mask",
                "aux_loss",
            ),
        ),
        Borrowed("trl.trainer.utils", "maybe_gather_lm_head_ctx", "engine.logprobs", "tests/engine/test_logprobs.py"),
        Borrowed("trl.trainer.utils", "create_model_from_path", "models.load", "tests/models/test_load.py"),
        Borrowed("trl.kernels", "ChunkedLogProbFunction", "engine.logprobs", "tests/engine/test_logprobs.py"),
        Borrowed("trl.trainer.dpo_trainer", "create_model_from_path", _SHARDING, _TWO_PROCESSES),
        Borrowed("trl.trainer.dpo_trainer", "prepare_fsdp", _SHARDING, _TWO_PROCESSES),
        Borrowed("trl.models.utils", "prepare_deepspeed", _SHARDING, _TWO_PROCESSES),
        Borrowed(_DPO, "_prepare_dataset", "training.trainers.trl", _EQUAL),
        Borrowed(_DPO, "_set_signature_columns_if_needed", "training.trainers.trl", _EQUAL),
        Borrowed(_DPO, "_precompute_ref_logps", "training.trainers.trl", _EQUAL),
        Borrowed(_DPO, "_metrics", "training.trainers.deferred", _EQUAL),
        Borrowed(_DPO, "_total_train_tokens", "training.trainers.deferred", _EQUAL),
        Borrowed(_DPO, "_signature_columns", "training.trainers.trl", _EQUAL),
        Borrowed(_SFT, "_metrics", _CHECKPOINTS, _RESUMED),
        Borrowed(_SFT, "_total_train_tokens", _CHECKPOINTS, _RESUMED),
        Borrowed(_DPO, "_tp_size", _SHARDING, _TWO_PROCESSES),
        Borrowed(_TRAINER, "_get_grad_norm", "training.trainers.trl", _EQUAL),
        Borrowed(
            _TRAINER,
            "_get_train_sampler",
            _ON_TRL,
            _TWO_PROCESSES,
            takes=("self", "train_dataset"),
        ),
        Borrowed(
            _TRAINER,
            "current_gradient_accumulation_steps",
            "training.trainers.budget",
            "tests/training/trainers/test_budget.py",
        ),
        Borrowed(_TRAINER, "_save_checkpoint", _BASE, _RESUMED, takes=("self", "model", "trial")),
        Borrowed(_TRAINER, "_tr_loss", _CHECKPOINTS, _RESUMED),
        Borrowed(_TRAINER, "_total_loss_scalar", _CHECKPOINTS, _RESUMED),
        Borrowed(_TRAINER, "_globalstep_last_logged", _CHECKPOINTS, _RESUMED),
        Borrowed(_TRAINER, "_initial_global_step", _CHECKPOINTS, _RESUMED),
        Borrowed(_TRAINER, "_run_epoch", _ON_TRL, _RESUMED),
        Borrowed(_TRAINER, "_maybe_log_save_evaluate", _BASE, _RESUMED),
        Borrowed(_TRAINER, "_determine_best_metric", _BASE, _RESUMED, takes=("self", "metrics", "trial")),
        Borrowed(_TRAINER, "_finalize_training", _ON_TRL, _RESUMED),
        Borrowed(_TRAINER, "_save", _ON_TRL, _TWO_PROCESSES),
        Borrowed("transformers.TrainingArguments", "_n_gpu", _ON_TRL, "tests/training/trainers/test_sharding.py"),
        Borrowed(_TRAINER, "_prepare_for_training", _ON_TRL, _TWO_PROCESSES),
        Borrowed(_TRAINER, "create_accelerator_and_postprocess", _ON_TRL, _TWO_PROCESSES),
        Borrowed("transformers.trainer", "safe_globals", _CHECKPOINTS, "tests/test_bad_input.py"),
        Borrowed(
            "transformers.PreTrainedConfig",
            "_attn_implementation",
            "engine.attention",
            "tests/engine/test_attention.py",
            # It also walks all modules, too slow for a layer that switches to its own function and back on every call
            instead_of="set_attn_implementation looks for a kernel on the Hub under any name that has `flash` in it",
        ),
        Borrowed(
            "transformers.PreTrainedModel",
            "_supports_attention_backend",
            "engine.choice",
            "tests/engine/test_forward.py",
        ),
        Borrowed("transformers.PreTrainedModel", "_no_split_modules", _SHARDING, _TWO_PROCESSES),
        Borrowed("transformers.generation.GenerationMixin", "_supports_default_dynamic_cache", _DECODING, _DECODED),
        *(
            Borrowed("transformers.cache_utils.DynamicLayer", name, "models.growing", _DECODED)
            for name in ("update", "lazy_initialization", "get_seq_length", "batch_select_indices")
        ),
        Borrowed(
            "transformers.PreTrainedModel",
            "_from_config",
            "training.foreseen",
            "tests/training/test_foreseen.py",
            instead_of="from_config of the AutoModel classes, which know no class beside the one of each table",
        ),
        Borrowed(
            "transformers.models.mixtral.modeling_mixtral",
            "load_balancing_loss_func",
            "engine.backbone",
            "tests/engine/test_backbone.py",
            takes=("gate_logits", "num_experts", "top_k", "attention_mask"),
        ),
        Borrowed("accelerate.utils.fsdp_utils", "fsdp2_prepare_model", _SHARDING, _TWO_PROCESSES),
        Borrowed("accelerate.utils.fsdp_utils", "_find_final_norm", _SHARDING, _TWO_PROCESSES, takes=("model",)),
        Borrowed("peft.tuners.lora.layer", "_get_in_out_features", "models.load", _TWO_PROCESSES),
        Borrowed(
            "peft.utils.transformers_weight_conversion",
            "_convert_peft_config_moe",
            "models.lora",
            "tests/models/test_reached.py",
            takes=("peft_config", "model"),
        ),
        Borrowed("torch.distributed.fsdp.FSDPModule", "_get_fsdp_state", "models.shards", _TWO_PROCESSES),
        Borrowed(
            "torch.distributed.fsdp._fully_shard._fsdp_state.FSDPState",
            "_fsdp_param_group",
            "models.shards",
            _TWO_PROCESSES,
        ),
        Borrowed(
            "torch.distributed.fsdp._fully_shard._fsdp_state.FSDPState",
            "_mp_policy",
            "engine.precision",
            _TWO_PROCESSES,
        ),
        Borrowed(
            "torch.distributed.fsdp._fully_shard._fsdp_param.FSDPParam", "_module_info", "models.shards", _TWO_PROCESSES
        ),
        Borrowed("torch.cpu", "_is_avx512_bf16_supported", "devices", "tests/training/test_stages.py"),
        Borrowed("torch.cpu", "_is_amx_tile_supported", "devices", "tests/training/test_stages.py"),
        Borrowed("torch._subclasses", "FakeTensorMode", "training.rehearsal", _REHEARSED),
        Borrowed("torch._subclasses", "FakeTensor", "training.rehearsal", "tests/training/test_families.py"),
        Borrowed("torch", "_grouped_mm", "training.rehearsal", "tests/training/test_families.py"),
        Borrowed("torch.utils._python_dispatch", "TorchDispatchMode", "training.rehearsal", _REHEARSED),
        Borrowed("torch.utils", "_pytree", "training.rehearsal", _REHEARSED),
        Borrowed("torch.UntypedStorage", "_cdata", "training.rehearsal", _REHEARSED),
        Borrowed("torch.nn.Module", "_parameters", "training.rehearsal", _REHEARSED),
        Borrowed("torch.nn.Module", "_buffers", "training.rehearsal", _REHEARSED),
    ),
)

_GAUDI_TRAINER, _GAUDI_DPO = "optimum.habana.GaudiTrainer", "optimum.habana.trl.GaudiDPOTrainer"
_ON_GAUDI, _GAUDI_RUNS = "training.trainers.gaudi", "tests/gaudi/test_runs.py"

GAUDI = Contract(
    "Gaudi's environment",
    {
        "torch": ">=2.6,<2.14",
        "transformers": ">=4.55.4,<4.56",
        "trl": ">=0.9.6,<0.10",
        "accelerate": ">=1.10,<1.11",
        "peft": ">=0.17,<0.18",
        "optimum-habana": ">=1.21,<1.22",
    },
    (
        Borrowed(_GAUDI_TRAINER, "_save", _ON_GAUDI, _GAUDI_RUNS),
        Borrowed(_GAUDI_TRAINER, "_save_checkpoint", _BASE, _GAUDI_RUNS),
        Borrowed(_GAUDI_TRAINER, "_prepare_inputs", _ON_GAUDI, _GAUDI_RUNS),
        Borrowed(_GAUDI_TRAINER, "FusedNorm", _ON_GAUDI, _GAUDI_RUNS),
        Borrowed(_GAUDI_DPO, "_stored_metrics", _ON_GAUDI, _GAUDI_RUNS),
        Borrowed(_GAUDI_DPO, "dpo_loss", _ON_GAUDI, _GAUDI_RUNS),
        Borrowed(_GAUDI_DPO, "tokenize_row", _ON_GAUDI, _GAUDI_RUNS),
        Borrowed(
            "optimum.habana.transformers.modeling_attn_mask_utils.GaudiAttentionMaskConverter",
            "_make_causal_mask",
            "models.habana",
            "tests/gaudi/test_stock_bugs.py",
        ),
        Borrowed(
            "optimum.habana.transformers.modeling_utils",
            "adapt_transformers_to_gaudi",
            "models.habana",
            "tests/gaudi/test_stock_bugs.py",
        ),
        Borrowed("transformers.trainer", "safe_globals", _CHECKPOINTS, _GAUDI_RUNS),
    ),
)


def installed() -> Contract:
    """The contract of the environment that this process runs in."""
    found = importlib.util.find_spec("optimum") and importlib.util.find_spec("optimum.habana")
    return GAUDI if found else MAIN


def problems() -> list[str]:
    """Everything that is wrong with the installed packages, a line each: names they lack, and untested versions."""
    return [*_of_versions(installed()), *_of_names(installed())]


@functools.cache
def check() -> None:
    """Look up all borrowed names, before a run loads anything.

    Raises:
        UserError: naming the package, the versions that Tandem works with, and what is missing.
            `TANDEM_UNTESTED_VERSIONS=1` lets other versions pass, as long as no name is missing.
    """
    contract = installed()
    faults = [*_of_names(contract)]
    if os.environ.get(UNTESTED) != "1":
        faults = [*_of_versions(contract), *faults]
    if faults:
        raise UserError("; ".join(faults))


def extra(name: str) -> str:
    """The command that installs an optional part of Tandem: in a checkout, or for an installed wheel."""
    root = Path(__file__).parents[2]
    return (
        f"pip install -e '.[{name}]'"
        if (root / "pyproject.toml").is_file()
        else f"pip install '{DISTRIBUTION}[{name}]'"
    )


def _of_versions(contract: Contract) -> Iterator[str]:
    from packaging.specifiers import SpecifierSet  # takes 0.1 s, which the answer to a wrong command line saves

    for package, versions in contract.versions.items():
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            yield f"{package} is not installed: pip install '{package}{versions}'"
            continue
        # 2.13.0+cpu is a 2.13.0
        if found.partition("+")[0] not in SpecifierSet(versions, prereleases=True):
            yield (
                f"{package} {found} is installed, and Tandem was tested with {package}{versions}: "
                f"pip install '{package}{versions}', or try it with {UNTESTED}=1"
            )


def _of_names(contract: Contract) -> Iterator[str]:
    for borrowed in contract.borrowed:
        if problem := borrowed.problem():
            package = "optimum-habana" if borrowed.package == "optimum" else borrowed.package
            versions = contract.versions[package]
            found = metadata.version(package)
            yield f"{package} {found}: {problem}; Tandem needs {package}{versions}: pip install '{package}{versions}'"


def resolve(dotted: str) -> Any:
    """The module or class of this name.

    Raises:
        ImportError, AttributeError: there is none.
    """
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError as error:
            if length == 1 or not dotted.startswith(error.name or " "):
                raise
            continue
        for part in parts[length:]:
            value = getattr(value, part)
        return value
    raise ImportError(dotted)


def _mentioned(owner: Any) -> set[str]:
    """The names that a class's own methods mention, those of its bases too."""
    names: set[str] = set()
    for cls in getattr(owner, "__mro__", ()):
        names |= set(getattr(cls, "__annotations__", {}))
        for value in vars(cls).values():
            function = inspect.unwrap(getattr(value, "fget", None) or getattr(value, "__func__", value))
            names |= names_in(getattr(function, "__code__", None))
    return names


def names_in(code: CodeType | None) -> set[str]:
    """The names that code, and the functions within it, mention."""
    if code is None:
        return set()
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= names_in(constant)
    return names
