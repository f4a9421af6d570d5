"""Policy and reference sharded over several processes: FSDP version 2, DeepSpeed and tensor parallelism."""

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import fsdp_utils
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from trl.models import prepare_deepspeed
from trl.trainer import dpo_trainer as trl_dpo_trainer

from tandem.engine.pairs import PairCollator
from tandem.errors import UserError
from tandem.models.lora import left_out
from tandem.models.reached import beside_text, expert_parameters
from tandem.training.held import upcast_trained
from tandem.training.trainers.budget import TokenBudget
from tandem.training.trainers.reference_scorer import Logps, ReferenceScorer


class ShardedScorer(ReferenceScorer):
    """Scores a reference that is sharded as the launch asks for, within the trainer's token budget."""

    _engine: Any = None
    """DeepSpeed's, of the policy: made for the training pairs, and used for the held-out ones too."""

    @contextlib.contextmanager
    def ready(self) -> Iterator[Any]:
        trainer = self._trainer
        with scoring(trainer.ref_model or self._engine or trainer.model, trainer.accelerator) as ready:
            if trainer.is_deepspeed_enabled and trainer.ref_model is None:
                self._engine = ready
            yield ready

    def gather(self, logps: Logps) -> Logps:
        tp_size = self._trainer._tp_size
        if tp_size == 1:
            return super().gather(logps)
        # The ranks of a tensor-parallel group, neighbours, have the same pairs
        chosen, rejected = (
            self._trainer.accelerator.gather(side).view(-1, tp_size, len(side))[:, 0].flatten() for side in logps
        )
        return chosen, rejected

    def collator(self, batch_size: int) -> PairCollator:
        budget: TokenBudget = self._trainer.budget
        return budget.collator()

    def logps(self, model: Any, inputs: dict[str, Any]) -> Logps:
        budget: TokenBudget = self._trainer.budget
        scored = super().logps
        return budget.score(inputs, lambda batch: scored(model, batch))


def shard_by_layer(accelerator: Accelerator, model: Any) -> None:
    """Have FSDP shard `model` with a unit for each layer, unless the launch names others, and sum gradients exactly."""
    plugin = accelerator.state.fsdp_plugin
    plugin.mixed_precision_policy = exact_sums(plugin.mixed_precision_policy)
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = layer_classes(model)


def saves_shards(accelerator: Accelerator) -> bool:
    """Whether transformers would write shards, from which it writes no model at the end."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    return plugin is not None and "FULL_STATE_DICT" not in str(plugin.state_dict_type)


def trained(model: Any) -> str:
    """How many parameters are trained; with an adapter, also which layers have one, by the ends of their names."""
    count = dict.fromkeys((True, False), 0)
    for parameter in model.parameters():
        count[parameter.requires_grad] += getattr(parameter, "ds_numel", parameter.numel())
    line = f"{count[True]:,} of {sum(count.values()):,} parameters"
    if not isinstance(model, PeftModel):
        aside = ", ".join(beside_text(model))
        return f"{line}; not {aside}, which text does not reach" if aside else line
    tuner = model.base_model
    names = [*getattr(tuner, "targeted_module_names", ()), *getattr(tuner, "targeted_parameter_names", ())]
    adapted = Counter(name.rpartition(".")[2] for name in names)
    parts = ", ".join(f"{name} ({number})" for name, number in sorted(adapted.items()))
    line = f"{line}, the adapter's: {parts}" if parts else line
    if others := left_out(model):
        line += f"; not {', '.join(others)}, whose forward is no linear layer's"
    experts = expert_parameters(model.get_base_model())
    if experts and not getattr(tuner, "targeted_parameter_names", ()):
        line += f"; no expert has one: --lora_target_parameters {' '.join(experts)}"
    return line


def learning_rate(args: Any) -> str:
    """The peak learning rate and the schedule, in words."""
    name = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    if not args.warmup_steps:
        return f"{args.learning_rate:g}, {name}"
    steps = args.warmup_steps
    warmup = f"{steps:.0%} of all steps" if steps < 1 else f"{steps:g} step{'s' * (steps != 1)}"
    return f"{args.learning_rate:g}, {name}, after {warmup} of warm-up"


def save_without_weights(model: PreTrainedModel | PeftModel, folder: str) -> None:
    """Write a model's configuration into `folder`, or its adapter's."""
    if isinstance(model, PeftModel):
        config = copy.copy(model.peft_config[model.active_adapter])
        config.inference_mode = True  # as PEFT writes it
        config.save_pretrained(folder)
        return
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def exact_sums(policy: MixedPrecisionPolicy | None) -> MixedPrecisionPolicy | None:
    """`policy` with gradients summed in float32, and outputs left in the type they were computed in.

    accelerate would round DPO's log-probs to bfloat16, and −72.16 nats to −72.0. They are float32 as they are; every
    layer's output made float32 as well would double what gradient checkpointing keeps.
    """
    if policy is None or policy.param_dtype in (None, torch.float32):
        return policy
    return MixedPrecisionPolicy(param_dtype=policy.param_dtype, reduce_dtype=torch.float32)


def shard(accelerator: Accelerator, model: Any) -> Any:
    """accelerate's sharding by FSDP version 2, the head in one unit with a module that the forward calls.

    Of a head only the weights are read. As a unit of its own it would be gathered by whoever reads it, and torch takes
    the gradient of what `DTensor.full_tensor` gathers for the same on all processes: each would train its part of the
    head on its own pairs alone. accelerate 1.15 pairs the head with a norm, which it finds neither under an adapter nor
    in a model of several modalities.
    """
    if accelerator.mixed_precision != "no" and not isinstance(model, FSDPModule):
        upcast_trained(model)  # as accelerate does, but where weights are in 4 bits
    find = fsdp_utils._find_final_norm
    fsdp_utils._find_final_norm = called_with_head
    try:
        return fsdp2_prepare_model(accelerator, model)
    finally:
        fsdp_utils._find_final_norm = find


def called_with_head(model: Any) -> nn.Module | None:
    """The module in whose unit the head goes: the decoder's final norm, or without one the decoder itself.

    A tied head goes with the embedding; then it is None where there is no norm.
    """
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder = whole.get_decoder()
    norms = [module for module in decoder.children() if "norm" in type(module).__name__.lower()]
    if norms:
        return norms[-1]
    head, embedding = whole.get_output_embeddings(), whole.get_input_embeddings()
    return None if head is None or head.weight is embedding.weight else decoder


def gather_once(model: nn.Module) -> None:
    """Gather the weights of every unit of FSDP version 2 for a moment, before training.

    A unit that the forward never calls is never gathered, such as a vision tower when the input is text. torch 2.13
    allocates a weight's gathered form on the first gather, and without it (`FSDPParam._unsharded_param`) fails in the
    backward of a micro-batch that does not synchronise gradients.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            module.reshard()


def layer_classes(model: PreTrainedModel) -> list[str]:
    """Class names of the repeated layers, which become one unit of sharding each.

    Transformers' own list, less what this model has not; without one, the longest list of modules.

    Raises:
        UserError: there is neither: sharding would gather the whole model at once.
    """
    present = {type(module).__name__ for module in model.modules()}
    named = [name for name in getattr(model, "_no_split_modules", None) or () if name in present]
    if named:
        return named
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    if not lists:
        raise UserError(f"{type(model).__name__} has no repeated layers that FSDP could shard one by one")
    return sorted({type(layer).__name__ for layer in max(lists, key=len)})


def average_cut_adapter(model: nn.Module, accelerator: Accelerator) -> None:
    """Have the gradients of an adapter on cut layers averaged over the processes that have the same part of it.

    transformers 5.23 averages what is whole on each process (`Trainer._sync_replicated_trainable_parameters`), and FSDP
    what it shards; an adapter's slice is neither.
    """
    alike = accelerator.torch_device_mesh["dp_shard"].get_group()

    def average(parameter: torch.Tensor) -> None:
        if accelerator.sync_gradients and isinstance(parameter.grad, DTensor):
            torch.distributed.all_reduce(parameter.grad.to_local(), op=torch.distributed.ReduceOp.AVG, group=alike)

    for parameter in model.parameters():
        is_part = isinstance(parameter, DTensor) and parameter.device_mesh.mesh_dim_names == ("tp",)
        if parameter.requires_grad and is_part:
            parameter.register_post_accumulate_grad_hook(average)


def check_saves_whole(accelerator: Accelerator) -> None:
    """Refuse ZeRO-3 that would leave shards instead of a model.

    Raises:
        UserError: naming the setting.
    """
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is None or plugin.zero_stage != 3:
        return
    if not plugin.deepspeed_config["zero_optimization"].get("stage3_gather_16bit_weights_on_model_save"):
        raise UserError("ZeRO-3 without zero3_save_16bit_model: true in the accelerate config would save no model")


def shard_frozen(model: PreTrainedModel, accelerator: Accelerator) -> PreTrainedModel:
    """TRL's `prepare_fsdp` with a reference sharded like the policy, a layer a unit: as one unit, each of its forwards
    would gather the whole model."""
    plugin = accelerator.state.fsdp_plugin
    policy_layers = plugin.transformer_cls_names_to_wrap
    plugin.transformer_cls_names_to_wrap = layer_classes(model)
    try:
        return shard(accelerator, model.requires_grad_(False)).eval()
    finally:
        plugin.transformer_cls_names_to_wrap = policy_layers


@contextlib.contextmanager
def policy_is_reference(given: PreTrainedModel | None) -> Iterator[None]:
    """While TRL's constructor runs: it shards a reference by layer, and loads none where the policy's first weights are
    the reference. Under FSDP it would load the model a second time, since the policy is sharded only in `train`."""
    load, shard = trl_dpo_trainer.create_model_from_path, trl_dpo_trainer.prepare_fsdp
    if given is None:
        trl_dpo_trainer.create_model_from_path = lambda *_, **__: None
    trl_dpo_trainer.prepare_fsdp = shard_frozen
    try:
        yield
    finally:
        trl_dpo_trainer.create_model_from_path, trl_dpo_trainer.prepare_fsdp = load, shard


@contextlib.contextmanager
def scoring(model: Any, accelerator: Accelerator) -> Iterator[Any]:
    """A model not trained yet, or a reference, ready to be forwarded without gradients on all processes.

    Under FSDP the policy is sharded here, before its optimizer is there, and stays so for training. Afterwards nothing
    that was gathered is kept: weights that a checkpoint brings must not meet a gathered copy of older ones. And what is
    trained is as before: PEFT, which switches an adapter off and on, says so to the gathered weights alone.
    """
    state = accelerator.state
    if getattr(state, "deepspeed_plugin", None) is not None and not hasattr(model, "zero_optimization_stage"):
        yield prepare_deepspeed(model, accelerator)
        return
    if getattr(state, "fsdp_plugin", None) is not None:
        model = shard(accelerator, model)
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    yield model
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    for parameter, is_trained in before:
        parameter.requires_grad_(is_trained)
