"""What a run will need, before it is started: parameters, peak memory by part, steps, tokens and time.

No weights are loaded: `tandem.training.rehearsal` runs steps on the largest batches with fake tensors. Sharding is then
divided out.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any, Self

import torch
from datasets import Dataset
from torch import nn

from tandem.devices import fast_bf16
from tandem.engine.choice import LayoutReport
from tandem.engine.layout import Layout
from tandem.errors import UserError, first_line
from tandem.models.fits import reason_of
from tandem.models.load import load_tokenizer
from tandem.monitor.memory import GIB, read_memory
from tandem.options.fields import flags_of
from tandem.options.model import is_adapter
from tandem.options.training import PlanOptions, check_training
from tandem.training import cuda_memory, foreseen
from tandem.training.foreseen import build
from tandem.training.gpu import economies
from tandem.training.groups import Groups, pairs_of
from tandem.training.hardware import Hardware, read_hardware
from tandem.training.option_sets import DPOOptionSet, SFTOptionSet
from tandem.training.preparation import training_rows
from tandem.training.rehearsal import Rehearsal, Usage
from tandem.training.schedule import Schedule

# Bytes of a weight in nf4 with double quantization (QLoRA, arXiv 2305.14314, section 3)
_NF4_BYTES = 0.5 + 0.127 / 8
# Resident memory over the size of the activations, because of holes in glibc's heap (there are none where each tensor
# is mapped by itself, bench/RESULTS.md). Fitted to runs of all weights, and of LoRA, which frees more tensors between.
_HEAP_ALL, _HEAP_LORA = 1.27, 1.5
# Layers of the two models whose steps are timed
PROBED_LAYERS = (1, 5)
_PROBE_REPEATS = 3
# What a step raises that needs the values of fake tensors: torch's exceptions for it are all of these kinds
_WITHOUT_VALUES = (RuntimeError, NotImplementedError, TypeError, ValueError, AssertionError, IndexError, AttributeError)


@dataclasses.dataclass(frozen=True)
class Peak:
    """Memory in bytes, by part, on one device, at the moment of the run at which most is in use."""

    weights: int
    reference: int
    gradients: int
    optimizer: int
    activations: int
    kernels: int
    allocator: int
    libraries: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def plan_run(run: SFTOptionSet | DPOOptionSet, options: PlanOptions) -> str:
    """The plan of a run as text, a line for each figure.

    Raises:
        UserError: options that do not go together or that no plan counts, a model or data that cannot be read.
    """
    check_training(run.model, run.lora, run.train, run.dpo if isinstance(run, DPOOptionSet) else None)
    if run.train.tp_size > 1:
        raise UserError("--plan does not count --tp_size")
    hardware = read_hardware(options, run.train.use_cpu)
    data = training_rows(run, load_tokenizer(run.model))
    # The run has the same interpreter, libraries and data; elsewhere a round guess at the device's context
    libraries = read_memory(torch.device("cpu")).allocated if hardware.device == "cpu" else GIB // 2
    return "\n".join(Plan(run, hardware, data, libraries).lines())


@dataclasses.dataclass(frozen=True)
class Plan:
    """One run's figures. If the run does not fit, changed copies of it are tried.

    Attributes:
        data: the tokenized pairs that it trains on.
        libraries: bytes of everything that is not tensors.
        layouts: by the layout asked for, the one that the run will take; shared by all copies.
    """

    run: SFTOptionSet | DPOOptionSet
    hardware: Hardware
    data: Dataset | Groups
    libraries: int
    layouts: dict[Layout, LayoutReport] = dataclasses.field(default_factory=dict)

    def changed(self, options: dict[str, Any]) -> Self:
        """A copy with other values of these options."""
        parts = {
            name: dataclasses.replace(part, **{key: value for key, value in options.items() if hasattr(part, key)})
            for name, part in self.run._asdict().items()
        }
        return dataclasses.replace(self, run=self.run._replace(**parts))

    @functools.cached_property
    def schedule(self) -> Schedule:
        schedule = Schedule(
            self.run, self.hardware, self.data, foreseen.config_of(self.run.model).get_text_config(), self.asked
        )
        if self.asked not in self.layouts:
            longest = max(max(rows) for rows, _ in schedule.lengths)
            row = pairs_of(self.data[0])[0]
            ids = torch.tensor([token for name, ids in row.items() if name.endswith("_ids") for token in ids])
            self.layouts[self.asked] = foreseen.layout(self.run.model, self.asked, ids, longest)
        found = self.layouts[self.asked].layout
        return schedule if found == self.asked else dataclasses.replace(schedule, layout=found)

    @property
    def asked(self) -> Layout:
        """The layout that the run is asked to take."""
        return self.run.engine.layout if isinstance(self.run, DPOOptionSet) else self.run.train.layout

    # The model

    @functools.cached_property
    def model(self) -> Any:
        return self.build()

    def build(self, layers: int | None = None) -> Any:
        """The model as the run forwards it, or its first layers."""
        assert self.schedule
        report = self.layouts[self.asked]
        return build(self.run.model, self.run.lora, checkpoints=self.checkpoints, layers=layers, report=report)

    @property
    def checkpoints(self) -> bool:
        """Whether activations are recomputed in the backward pass, if the model can do that."""
        return self.run.train.gradient_checkpointing is not False

    @property
    def trains_adapter(self) -> bool:
        return self.run.lora.use_peft or is_adapter(self.run.model.model_name_or_path)

    def rehearse(self, model: Any) -> Rehearsal:
        train = self.run.train
        bf16 = train.bf16 if train.bf16 is not None else not self.hardware.is_here or fast_bf16()
        autocast = torch.float16 if train.fp16 else torch.bfloat16 if bf16 else None
        dropout = not (isinstance(self.run, DPOOptionSet) and self.run.dpo.disable_dropout)
        return Rehearsal(model, train, autocast, dropout)

    # Memory

    @functools.cached_property
    def peak(self) -> Peak:
        """Peak memory of the run on one device."""
        peak = max(map(self.on_device, self.usages()), key=lambda peak: peak.total)
        if self.checkpoints and self.hardware.device == "cpu":  # dropped activations leave holes in the heap, too
            return dataclasses.replace(peak, allocator=self.changed({"gradient_checkpointing": False}).peak.allocator)
        return peak

    def usages(self) -> list[Usage]:
        """Bytes in use at each of the moments that may need most.

        Raises:
            UserError: the model's forward needs values, and the model is too large to give it random ones.
        """
        try:
            return self.moments(self.rehearse(self.model))
        except _WITHOUT_VALUES as error:
            reason = first_line(error)
        try:
            return moments_by_values(self)
        except _WITHOUT_VALUES as error:
            name = self.run.model.model_name_or_path
            raise UserError(f"{name}: no plan, because a step fails: {reason_of(error)} ({reason})") from error

    def moments(self, step: Rehearsal) -> list[Usage]:
        """The first optimizer step, a later one, and the pass that scores the reference."""
        first, *later = self.schedule.batches
        micro_batches = min(self.schedule.accumulation, 2)
        # The first step makes the optimizer's state, so it has none while it needs its activations
        largest = self.schedule.largest
        usages = [step.count_step(largest(first), micro_batches=micro_batches, has_state=False)]
        if later:
            later_largest = largest(itertools.chain(*later))
            usages.append(step.count_step(later_largest, micro_batches=micro_batches, has_state=True))
        if isinstance(self.run, DPOOptionSet) and self.run.dpo.needs_reference:
            usages.append(self.reference_usage(step))
        if _syncs_reference(self.run):
            for usage in usages:
                usage["reference"] += size(step.model, trained=True)
        return usages

    def reference_usage(self, step: Rehearsal) -> Usage:
        """Bytes in use at the peak of the pass that scores the reference before training."""
        usage = step.count_forward(self.schedule.largest_reference())
        if isinstance(self.run, DPOOptionSet) and self.run.dpo.reference_model:  # counted as large as the policy
            usage["reference"] = usage["weights"]
        return usage

    def on_device(self, usage: Usage) -> Peak:
        """What each of the run's devices needs, from the usage of a run on a single one."""

        def share(part: str) -> int:
            kind = "weights" if part == "reference" else part
            size = usage[part] - (self.saved_by_4_bits if part == "weights" else 0)
            whole = _in_4_bits(self) if part == "weights" else 0  # 4-bit weights are never sharded
            return whole + (size - whole) // (self.hardware.processes if kind in self.hardware.sharded else 1)

        activations = usage["activations"]
        if "weights" in self.hardware.sharded:  # the layer that is computed and the next one are gathered
            blocks = max((size(each) for each in self.model.modules() if isinstance(each, nn.ModuleList)), default=0)
            activations += 2 * blocks // foreseen.depth(self.model.config)
        return Peak(
            weights=share("weights"),
            reference=share("reference"),
            gradients=share("gradients") * (2 if self.hardware.copies_gradients else 1),
            optimizer=share("optimizer"),
            activations=activations,
            kernels=kernels(self),
            allocator=int(usage["activations"] * (self.heap - 1)),
            libraries=self.libraries,
        )

    @property
    def heap(self) -> float:
        """The ratio of the memory that the allocator holds for activations to their size."""
        if self.hardware.device != "cpu":
            return cuda_memory.FRAGMENTATION
        return _HEAP_LORA if self.trains_adapter else _HEAP_ALL

    @property
    def saved_by_4_bits(self) -> int:
        """Bytes that 4 bits save in the linear layers."""
        return sum(weight.numel() * weight.element_size() for weight in _quantized(self)) - _in_4_bits(self)

    # Time

    def seconds(self) -> tuple[float, float] | None:
        """Seconds of a micro-batch's step and of a forward without gradient, from models of a few layers.

        The batch is the one nearest to the mean in tokens. None where the device is not here, or is too small for it.
        """
        if not self.hardware.is_here or self.run.lora.load_in_4bit:
            return None
        batches = list(itertools.chain(*self.schedule.batches))
        mean = sum(map(self.schedule.tokens, batches)) / len(batches)
        batch = self.schedule.batch(min(batches, key=lambda batch: abs(self.schedule.tokens(batch) - mean)))
        all_layers = foreseen.depth(self.model.config)
        counts, timings = [], []
        for layers in PROBED_LAYERS:
            model = self.build(min(layers, all_layers))
            counts.append(foreseen.depth(model.config))
            if size(model) * 4 > foreseen.LIMIT:
                return None
            timings.append(self.rehearse(model).time(batch, torch.device(self.hardware.device), _PROBE_REPEATS))
        few, more = counts
        if few == more:
            return timings[0]
        scale = (all_layers - few) / (more - few)
        step, forward = (first + scale * max(second - first, 0.0) for first, second in zip(*timings, strict=True))
        return step, forward

    # The text

    def lines(self) -> Iterator[str]:
        """The plan."""
        parameters = list(self.model.parameters())
        count = sum(parameter.numel() for parameter in parameters)
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        yield f"parameters: {count:,}; trained: {trained:,} ({trained / count:.2%})"
        limit, processes = self.hardware.limit, self.hardware.processes
        size, schedule = self.run.train.per_device_train_batch_size, self.schedule
        unit = "pairs" if isinstance(self.run, DPOOptionSet) else "examples"
        where = f"{processes} x {self.hardware.device}, batch {size}, layout {schedule.layout}"
        yield f"peak memory per device ({where}): {self.peak.total / GIB:.2f} GiB"
        if schedule.layout != self.asked:
            yield f"  layout {schedule.layout}, because {self.layouts[self.asked].reason}"
        for name, part in dataclasses.asdict(self.peak).items():
            yield f"  {name}: {part / GIB:.2f} GiB"
        yield f"steps: {schedule.steps} of {size} x {schedule.accumulation} x {processes} {unit}"
        yield f"tokens forwarded in training: {sum(map(schedule.tokens, itertools.chain(*schedule.batches))):,}"
        if processes > 1:
            yield schedule.unevenness_line()
        yield self.time_line()
        if limit is None:
            yield "memory of the device is not known: give --device_memory_gib to see whether this fits"
        elif self.peak.total <= limit:
            yield f"fits: {limit / GIB:.1f} GiB are there"
        else:
            yield f"WILL NOT FIT: {limit / GIB:.1f} GiB are there; {self.remedy(limit)}"

    def time_line(self) -> str:
        if (seconds := self.seconds()) is None:
            return "time: not measured, since the run's device is not here or the model is too large for a probe"
        step, forward = seconds
        batches = self.schedule.batches
        micro_batches = (
            sum(map(len, batches)) / self.hardware.processes * self.schedule.unevenness(self.schedule.as_dealt)
        )
        if _syncs_reference(self.run):  # a forward in each micro-batch after the first sync
            step += forward
        line = f"time: {_duration(step * micro_batches)} of training"
        if isinstance(self.run, DPOOptionSet) and self.run.dpo.needs_reference:
            of_reference = len(self.data) / self.run.train.per_device_train_batch_size / self.hardware.processes
            line += f", {_duration(forward * of_reference)} of the reference where not cached"
        return line

    def remedy(self, limit: int) -> str:
        """The cheapest known change with which the run fits into `limit` bytes."""
        for change in self.ways_out():
            if (total := self.changed(change).peak.total) <= limit:
                return f"the cheapest change that fits is {flags_of(change)} ({total / GIB:.2f} GiB)"
        return (
            "smaller batches, gradient checkpointing and LoRA are not enough: shard it (FSDP), or take a smaller model"
        )

    def ways_out(self) -> Iterator[dict[str, Any]]:
        """Changes of options, each alone and with all before it."""
        together: dict[str, Any] = {}
        for change in economies(self.run, self.schedule.accumulation):
            yield change
            together |= change
            if together != change:
                yield dict(together)


def moments_by_values(plan: Plan) -> list[Usage]:
    """`moments` on random numbers, of the whole model if it is small enough. Else it is extrapolated to all layers from
    two models of few layers."""
    models = [plan.build()]
    if size(models[0]) * 4 > foreseen.LIMIT:
        config = foreseen.config_of(plan.run.model)
        kinds = foreseen.layers_of_all_kinds(config)
        models = [plan.build(layers) for layers in (kinds, min(2 * kinds, foreseen.depth(config)))]
    if max(map(size, models)) * 4 > foreseen.LIMIT:
        name = plan.run.model.model_name_or_path
        raise UserError(f"{name}: no plan: what it does depends on values, and it is too large to be tried with some")
    counted = [plan.moments(dataclasses.replace(plan.rehearse(model), values=True)) for model in models]
    if len(models) == 1:
        return counted[0]
    few, more = (foreseen.depth(model.config) for model in models)
    scale = (foreseen.depth(plan.model.config) - few) / (more - few)
    return [
        Usage({part: int(one[part] + scale * (two[part] - one[part])) for part in one | two})
        for one, two in zip(*counted, strict=True)
    ]


def _syncs_reference(run: SFTOptionSet | DPOOptionSet) -> bool:
    return isinstance(run, DPOOptionSet) and run.dpo.sync_ref_model


def size(model: nn.Module, *, trained: bool = False) -> int:
    """Bytes of the parameters; with `trained`, only of those that are trained."""
    parameters = [each for each in model.parameters() if each.requires_grad or not trained]
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def kernels(plan: Plan) -> int:
    """Bytes that CUDA's kernels take for the largest batch and the CPU's kernels do not; see `cuda_memory`."""
    if plan.hardware.device != "cuda":
        return 0
    computed = plan.rehearse(plan.model).autocast or plan.model.dtype
    batch = plan.schedule.largest(itertools.chain(*plan.schedule.batches))
    own = cuda_memory.of_batch(plan.model.config.get_text_config(), batch, computed.itemsize)
    return own + cuda_memory.nccl_buffers(plan.hardware.processes)


def _in_4_bits(plan: Plan) -> int:
    """Bytes of the weights that are held in 4 bits."""
    return int(sum(weight.numel() * _NF4_BYTES for weight in _quantized(plan)))


def _quantized(plan: Plan) -> list[torch.Tensor]:
    """The weights that are held in 4 bits: those of the linear layers except the output head."""
    if not plan.run.lora.load_in_4bit:
        return []
    head = plan.model.get_output_embeddings().weight
    linear = {
        id(module.weight): module.weight
        for module in plan.model.modules()
        if isinstance(module, nn.Linear) and not module.weight.requires_grad and module.weight is not head
    }
    return list(linear.values())


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
