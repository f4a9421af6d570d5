"""What a run really consists of, and whether that is what its launcher was asked for.

Four launches of accelerate exit with 0 and do something else: a MULTI_CPU config with several processes starts one; a
MULTI_GPU or FSDP config on a machine without GPUs starts jobs that do not know each other; a config of one GPU trains
on the CPU there; an FSDP config on the CPU drops FSDP. So a run compares what it finds with what was asked for, which
reaches it through the environment that `accelerate launch` and `torchrun` set, and refuses a difference by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

from tandem import ranks
from tandem.devices import device_count, why_no_gpu
from tandem.errors import UserError

_REFUSED_PARALLELISM = {
    "CP": "context parallelism: TRL's DPO loss does not cut its completion mask",
    "SP": "sequence parallelism: TRL's DPO loss does not cut its completion mask",
    "TP": "tensor parallelism by the accelerate config: give the script --tp_size instead",
}


def _is_on(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "").lower() in ("true", "1", "yes")


def check_launch(
    environment: Mapping[str, str], arguments: Mapping[str, Any], *, cpu_asked: bool, tp_size: int
) -> None:
    """Refuse a launch that is known to start something else. Before anything is loaded or written.

    Args:
        environment: of this process.
        arguments: of TrainingArguments; device, precision and `save_strategy` count.
        cpu_asked: the run was told to use the CPU, and is not there for lack of an accelerator.
        tp_size: ranks that share each matrix.

    Raises:
        UserError: naming what was asked for, what would run, and what to change.
    """
    _check_engine(environment, arguments["use_cpu"])
    _check_processes(environment, arguments["use_cpu"], cpu_asked)
    _check_precision(environment, arguments)
    world = ranks.count(environment)
    sharded = _is_on(environment, "ACCELERATE_USE_FSDP") or _is_on(environment, "ACCELERATE_USE_DEEPSPEED")
    if "8bit" in arguments.get("optim", "") and (tp_size > 1 or _is_on(environment, "ACCELERATE_USE_FSDP")):
        raise UserError(
            f"--optim {arguments['optim']}: bitsandbytes' optimizers take no sharded weights (FSDP, --tp_size): use "
            "adamw_torch, whose state is sharded there too"
        )
    if tp_size > 1 and sharded:
        raise UserError(
            "--tp_size cannot be had with an accelerate config of FSDP or DeepSpeed: use one of DDP; processes beyond "
            "--tp_size shard by FSDP all the same"
        )
    if world % tp_size:
        raise UserError(f"--tp_size {tp_size} needs as many processes, or a multiple of it, not {world}")
    if tp_size > 1 and arguments["save_strategy"] != "no":
        raise UserError("--tp_size needs --save_strategy no: transformers cannot resume a model cut when it was loaded")


def _check_engine(environment: Mapping[str, str], on_cpu: bool) -> None:
    if _is_on(environment, "ACCELERATE_USE_MEGATRON_LM"):
        raise UserError("the accelerate config asks for Megatron-LM, which Tandem does not support: use FSDP version 2")
    if _is_on(environment, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        for kind, why in _REFUSED_PARALLELISM.items():
            size = environment.get(f"PARALLELISM_CONFIG_{kind}_SIZE", "1")
            if size != "1":
                raise UserError(f"{kind.lower()}_size {size} in the accelerate config is refused: {why}")
    if not _is_on(environment, "ACCELERATE_USE_FSDP"):
        return
    if environment.get("FSDP_VERSION", "1") != "2":
        raise UserError(
            "the accelerate config asks for FSDP version 1, which fails with LoRA and is deprecated; convert it: "
            "accelerate to-fsdp2 --config_file OLD.yaml --output_file NEW.yaml"
        )
    if on_cpu:
        raise UserError(
            "the accelerate config asks for FSDP, but accelerate drops it on the CPU: "
            "use accelerate_configs/cpu.yaml, or torchrun --nproc_per_node N for several processes"
        )
    if _is_on(environment, "FSDP_ACTIVATION_CHECKPOINTING"):
        raise UserError("fsdp_activation_checkpointing in the accelerate config: --gradient_checkpointing does that")


def _check_processes(environment: Mapping[str, str], on_cpu: bool, cpu_asked: bool) -> None:
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in environment
    alone = not ranks.has_launcher(environment)
    gpu_asked = environment.get("ACCELERATE_USE_CPU", "true").lower() == "false"
    if by_accelerate and alone and gpu_asked and on_cpu and not cpu_asked:
        raise UserError(
            f"accelerate was asked for a GPU, but this machine has none: {why_no_gpu()}; or train on the CPU with "
            "accelerate_configs/cpu.yaml"
        )
    if by_accelerate and alone and "MASTER_ADDR" in environment:
        raise UserError(
            "the accelerate config asks for several processes on the CPU, but accelerate has started one: "
            "use torchrun --nproc_per_node N, or set num_processes: 1"
        )
    if by_accelerate and not alone and on_cpu and not cpu_asked:
        raise UserError(
            f"the accelerate config asks for a GPU per process, but this machine has none: {why_no_gpu()}; or "
            "use accelerate_configs/cpu.yaml, or torchrun --nproc_per_node N for several processes on the CPU"
        )
    local = ranks.count_here(environment)
    if not on_cpu and local > device_count():
        raise UserError(
            f"{local} processes on this machine, but it has {device_count()} devices: "
            "set --num_processes to the number of devices"
        )


def _check_precision(environment: Mapping[str, str], arguments: Mapping[str, Any]) -> None:
    asked = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    got = next((name for name in ("bf16", "fp16") if arguments[name]), "no")
    if asked not in ("no", got):
        raise UserError(
            f"the accelerate config asks for mixed_precision {asked}, but the run computes in "
            f"{'float32' if got == 'no' else got}: set mixed_precision: 'no' there; the script's are --bf16 and --fp16"
        )


def start_processes(arguments: Mapping[str, Any]) -> TrainingArguments | None:
    """Connect the processes of this run. Before a model is loaded: only then is it loaded once per machine (FSDP), in
    parts (ZeRO-3) or as slices (tensor parallelism).

    Returns:
        an object that must exist while models are loaded: transformers holds only a weak reference to the DeepSpeed
        config in it, which it needs then.
    """
    if not ranks.has_launcher():
        return None
    own = TrainingArguments.__dataclass_fields__  # the others are TRL's
    return TrainingArguments(**{name: value for name, value in arguments.items() if name in own})


@dataclass(frozen=True)
class Topology:
    """What a run consists of, according to accelerate's state.

    Attributes:
        processes, nodes: how many.
        device: what each process computes on.
        engine: ddp, fsdp, zero1, zero2, zero3, tp, tp_fsdp or single.
        offloaded: sharded weights and the optimizer's state rest in host memory.
        precision: what the forward computes in, and what the weights are held in.
        pairs: per process and micro-batch.
        accumulation: micro-batches per optimizer step.
        copies: processes that get the same pairs.
    """

    processes: int
    nodes: int
    device: str
    engine: str
    offloaded: bool
    precision: str
    pairs: int
    accumulation: int
    copies: int = 1

    @classmethod
    def of(cls, accelerator: Accelerator, args: TrainingArguments, model: Any) -> "Topology":
        """Read it from the state of accelerate.

        Raises:
            UserError: the processes are not those that the launcher has started.
        """
        asked = ranks.count()
        if accelerator.num_processes != asked:
            raise UserError(f"the launcher started {asked} processes, but accelerate sees {accelerator.num_processes}")
        copies = getattr(model, "tp_size", None) or 1
        computed = {"no": "", "bf16": ", computed in bfloat16", "fp16": ", computed in float16"}
        held = str(model.dtype).removeprefix("torch.")
        return cls(
            processes=asked,
            nodes=ranks.machines(),
            device=_device_name(accelerator.device, asked),
            engine=_engine(accelerator, copies, getattr(model, "fsdp_size", None) or 1),
            offloaded=_is_offloaded(accelerator),
            precision=f"weights in {held}" + computed["bf16" if args.bf16 else "fp16" if args.fp16 else "no"],
            pairs=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            copies=copies,
        )

    @property
    def global_batch(self) -> int:
        """Pairs per optimizer step, over all processes."""
        return self.pairs * self.accumulation * self.processes // self.copies

    def sharding(self) -> str:
        """How the policy is distributed over the processes, in words."""
        over = f"over {self.processes} processes"
        line = {
            "single": "whole",
            "ddp": "whole on each process, gradients averaged (DDP)",
            "fsdp": f"weights, gradients and optimizer sharded per layer {over} (FSDP 2)",
            "zero1": f"weights whole on each process, optimizer sharded {over} (ZeRO-1)",
            "zero2": f"weights whole on each process, gradients and optimizer sharded {over} (ZeRO-2)",
            "zero3": f"weights, gradients and optimizer sharded {over} (ZeRO-3)",
            "tp": f"each matrix cut {over} (tensor parallelism)",
            "tp_fsdp": f"each matrix cut over {self.copies} processes (tensor parallelism), the parts "
            f"sharded per layer over {self.processes // self.copies} (FSDP 2)",
        }[self.engine]
        return line + (", resting in host memory" if self.offloaded else "")

    def table(self, unit: str, **more: str) -> str:
        """The table that a run prints at its start; `more` are rows of the trainer's own, after the policy's."""
        share = f" / {self.copies} alike" if self.copies > 1 else ""
        rows = {
            "processes": f"{self.processes} on {self.nodes} node{'s' * (self.nodes > 1)}",
            "device": self.device,
            "policy": self.sharding(),
            **more,
            "precision": self.precision,
            "global batch": f"{self.global_batch} {unit} = {self.pairs} {unit} × {self.accumulation} accumulation × "
            f"{self.processes} process{'es' * (self.processes > 1)}{share}",
        }
        width = max(map(len, rows))
        return "\n".join(["this run is", *(f"  {name:<{width}}  {value}" for name, value in rows.items())])

    def verify(self, model: Any) -> None:
        """Check the prepared model against the table.

        Raises:
            UserError: it is not sharded as the table says.
        """
        found = {
            "fsdp": isinstance(model, FSDPModule) and _layers_sharded(model),
            "ddp": isinstance(model, DistributedDataParallel),
            "tp": _is_cut(model),
            "tp_fsdp": _is_cut(model) and any(isinstance(module, FSDPModule) for module in model.modules()),
            "single": True,
        }
        stage = f"zero{getattr(model, 'zero_optimization_stage', lambda: None)()}"
        if not found.get(self.engine, stage == self.engine):
            raise UserError(f"the policy was to be {self.sharding()}, but it is a plain {type(model).__name__}")


def _engine(accelerator: Accelerator, tp_size: int, fsdp_size: int) -> str:
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None:
        return f"zero{plugin.zero_stage}"
    if getattr(accelerator.state, "fsdp_plugin", None) is not None:
        return "fsdp"
    if tp_size > 1:
        return "tp_fsdp" if fsdp_size > 1 else "tp"
    return "ddp" if accelerator.num_processes > 1 else "single"


def _is_offloaded(accelerator: Accelerator) -> bool:
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
    if deepspeed is not None:
        return "cpu" in (deepspeed.offload_optimizer_device, deepspeed.offload_param_device)
    return fsdp is not None and isinstance(fsdp.cpu_offload, CPUOffloadPolicy)


def _device_name(device: torch.device, processes: int) -> str:
    if device.type != "cuda":
        return device.type
    name, there = torch.cuda.get_device_name(device), torch.cuda.device_count()
    if processes == 1 and there > 1:
        return f"{name}, 1 of {there} GPUs: accelerate_configs/ddp.yaml or fsdp.yaml takes all"
    return f"{name} each"


def _is_cut(model: Any) -> bool:
    meshes = (parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor))
    return any("tp" in (mesh.mesh_dim_names or ()) for mesh in meshes)


def _layers_sharded(model: Any) -> bool:
    """Whether every weight is sharded, and each layer is a unit: a single unit would gather the whole model at once."""
    # 4-bit weights stay whole: accelerate cannot shard them
    weights = (parameter for parameter in model.parameters() if parameter.is_floating_point())
    if not all(isinstance(weight, DTensor) for weight in weights):
        return False
    lists = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    return any(isinstance(layer, FSDPModule) for layers in lists for layer in layers)
