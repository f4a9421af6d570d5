"""What a DPO run will take, before it is started: parameters, peak memory by part, steps, tokens and time.

No weights are loaded. The model is built on the meta device, and training steps on the run's largest batch are played
through with fake tensors, which have shapes and lifetimes and no values: every storage that the step makes is counted
while it lives. Sharding is arithmetic on top.
"""

import dataclasses
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tandem.config import StrictLoader
from tandem.engine.forward import forward_plan
from tandem.engine.layout import PairPlan, plan_pairs
from tandem.errors import UserError
from tandem.models import base_of_adapter, fast_bf16, has_accelerator, load_tokenizer, lora_config
from tandem.monitor.memory import GIB, read_memory
from tandem.options import PlanOptions, TrainOptions, check_training, is_adapter
from tandem.run_options import DPORun
from tandem.trainers.trl import PairCollator
from tandem.training import training_pairs

# What TRL 1.16 asks of the fused forward for its metrics
_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")
# Bytes of a weight in nf4 with double quantization (QLoRA, arXiv 2305.14314, section 3)
_NF4_BYTES = 0.5 + 0.127 / 8
# What the resident memory is over the activations' own size, probably holes in glibc's heap between tensors that live
# and die. Fitted to the runs of bench/RESULTS.md: of all weights, and of LoRA, which drops more tensors in between.
_HEAP_ALL, _HEAP_LORA = 1.27, 1.6
# Layers of the two models whose steps are timed
_PROBED_LAYERS = (1, 2)
_PROBE_LIMIT = 2 * GIB


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Where the run goes.

    Attributes:
        device: `cpu` or the accelerator's type.
        processes: data-parallel processes.
        sharded: which of weights, gradients and optimizer are cut over the processes.
        copies_gradients: whether DDP holds a second copy of the gradients, for communication.
        limit: memory of one device in bytes, None where it is not known.
        is_here: whether this machine is the one.
    """

    device: str
    processes: int
    sharded: frozenset[str]
    copies_gradients: bool
    limit: int | None
    is_here: bool


@dataclasses.dataclass(frozen=True)
class Peak:
    """Memory in bytes at the moment of the training step that needs most, on one device."""

    weights: int
    reference: int
    gradients: int
    optimizer: int
    activations: int
    allocator: int
    libraries: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def read_hardware(options: PlanOptions, use_cpu: bool) -> Hardware:
    """The hardware of an accelerate config file, or of this process without one.

    Raises:
        UserError: the file cannot be read, or is not an accelerate config.
    """
    config: dict[str, Any] = {}
    if options.accelerate_config is not None:
        try:
            config = yaml.load(Path(options.accelerate_config).read_text(encoding="utf-8"), Loader=StrictLoader)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"--accelerate_config {options.accelerate_config}: cannot be read: {error}") from error
        if not isinstance(config, dict) or "distributed_type" not in config:
            raise UserError(f"--accelerate_config {options.accelerate_config}: not a config of accelerate")
    kind = str(config.get("distributed_type", "NO"))
    on_cpu = use_cpu or bool(config.get("use_cpu")) or (not config and not has_accelerator())
    stage = (config.get("deepspeed_config") or {}).get("zero_stage", 0)
    sharded = {"weights", "gradients", "optimizer"} if kind == "FSDP" or stage == 3 else set()
    sharded |= {"optimizer"} if stage >= 1 else set()
    sharded |= {"gradients"} if stage >= 2 else set()
    is_here = on_cpu or has_accelerator()
    accelerator = torch.accelerator.current_accelerator() if has_accelerator() else None
    limit = None if options.device_memory_gib is None else int(options.device_memory_gib * GIB)
    if limit is None and on_cpu:
        limit = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    elif limit is None and torch.cuda.is_available():
        limit = torch.cuda.mem_get_info()[1]
    return Hardware(
        device="cpu" if on_cpu else accelerator.type if accelerator else "cuda",
        processes=int(config.get("num_processes") or 1),
        sharded=frozenset(sharded),
        copies_gradients=kind.startswith("MULTI_"),
        limit=limit,
        is_here=is_here,
    )


def plan_dpo(run: DPORun, options: PlanOptions) -> str:
    """The plan of a DPO run as text, a line for each figure.

    Raises:
        UserError: options that do not go together, a model or data that cannot be read, or the padded layout.
    """
    check_training(run.model, run.lora, run.train, run.dpo)
    if run.engine.layout == "padded":
        raise UserError("--plan counts the layouts shared and packed, not TRL's own padded one")
    hardware = read_hardware(options, run.train.use_cpu)
    tokenizer = load_tokenizer(run.model)
    pairs = list(training_pairs(run, tokenizer))
    return "\n".join(_Run(run, hardware, pairs, tokenizer.pad_token_id).lines())


class _Run:
    """One run's figures; changed copies of it are the candidates where it does not fit."""

    def __init__(
        self,
        run: DPORun,
        hardware: Hardware,
        pairs: Sequence[dict[str, list[int]]],
        pad_token_id: int,
    ) -> None:
        self.model, self.lora, self.text, self.train = run.model, run.lora, run.text, run.train
        self.dpo, self.engine, self.hardware = run.dpo, run.engine, hardware
        train = run.train
        self.pairs, self.pad_token_id = pairs, pad_token_id
        self.accumulation = train.accumulation(hardware.processes)
        bf16 = fast_bf16() if hardware.is_here else True
        self.autocast = None if train.bf16 is False else torch.bfloat16 if train.bf16 or bf16 else None
        if train.fp16:
            self.autocast = torch.float16
        # The run has the same interpreter, libraries and data; elsewhere a round guess at the device's context
        self.base = read_memory(torch.device("cpu")).allocated if hardware.device == "cpu" else GIB // 2

    def changed(self, train: dict[str, Any], lora: dict[str, Any]) -> "_Run":
        other = _Run.__new__(_Run)
        other.__dict__.update(self.__dict__)
        other.train, other.lora = dataclasses.replace(self.train, **train), dataclasses.replace(self.lora, **lora)
        other.accumulation = other.train.accumulation(self.hardware.processes)
        return other

    # Steps and tokens

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.train.debug:
            return 4
        if self.train.max_steps != -1:
            return self.train.max_steps
        return max(1, int(self.train.num_train_epochs * self.steps_per_epoch))

    @property
    def steps_per_epoch(self) -> int:
        micro_batches = -(-len(self.pairs) // (self.train.per_device_train_batch_size * self.hardware.processes))
        return -(-micro_batches // self.accumulation)

    def tokens(self, pair: dict[str, list[int]]) -> int:
        """Tokens of a pair that the backbone forwards."""
        prompt = len(pair["prompt_ids"])
        answers = sum(min(len(pair[side]), self.text.max_length - prompt) for side in ("chosen_ids", "rejected_ids"))
        return prompt + answers if self.engine.layout == "shared" else 2 * prompt + answers

    def batches(self) -> list[list[dict[str, list[int]]]]:
        """The micro-batches of all epochs, in the order of the trainer's sampler."""
        size = self.train.per_device_train_batch_size
        batches = []
        for epoch in range(-(-self.steps // self.steps_per_epoch)):
            # As accelerate's SeedableRandomSampler deals them
            generator = torch.Generator().manual_seed(self.train.seed + epoch)
            order = torch.randperm(len(self.pairs), generator=generator).tolist()
            batches += [[self.pairs[i] for i in order[start : start + size]] for start in range(0, len(order), size)]
        return batches[: self.steps * self.accumulation * self.hardware.processes]

    # The model

    def build(self, layers: int | None = None) -> PreTrainedModel:
        """The model on the meta device, with its adapter; with fewer layers where wanted."""
        name = self.model.model_name_or_path
        on_adapter = is_adapter(name)
        if on_adapter:
            name = base_of_adapter(name)
        trust = self.model.trust_remote_code
        try:
            config = AutoConfig.from_pretrained(name, revision=self.model.model_revision, trust_remote_code=trust)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{name}: has no config of a model: {str(error).splitlines()[0]}") from error
        text_config = config.get_text_config()
        if layers is not None:
            text_config.num_hidden_layers = layers
            if getattr(text_config, "layer_types", None):
                text_config.layer_types = text_config.layer_types[:layers]
        config.use_cache = False
        dtype = getattr(config, "dtype", None) if self.model.dtype == "auto" else getattr(torch, self.model.dtype)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32, trust_remote_code=trust)
        if self.checkpoints:
            # Fake tensors have no random state to keep
            model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        if on_adapter:
            from peft import PeftConfig, get_peft_model

            adapter = PeftConfig.from_pretrained(self.model.model_name_or_path)
            adapter.inference_mode = False
            return get_peft_model(model, adapter, low_cpu_mem_usage=True)
        if adapter := lora_config(self.lora):
            from peft import get_peft_model

            return get_peft_model(model, adapter, low_cpu_mem_usage=True)
        return model

    @property
    def checkpoints(self) -> bool:
        return self.train.gradient_checkpointing is not False

    def plan(self, batch: Sequence[dict[str, list[int]]]) -> tuple[PairPlan, Tensor, Tensor]:
        """The engine's plan of a batch, with its ids and labels, (2B, S) int64."""
        collate = PairCollator(self.pad_token_id, self.text.max_length)
        grid = collate([pair | {"pair_id": ""} for pair in batch])
        labels = grid["input_ids"].masked_fill(grid["completion_mask"] == 0, -100)
        return (
            plan_pairs(grid["input_ids"], grid["attention_mask"], labels, self.engine.layout),
            grid["input_ids"],
            labels,
        )

    # Memory

    def peak(self) -> Peak:
        """Peak memory of a training step on one device."""
        batches, per_step = self.batches(), self.accumulation * self.hardware.processes

        def largest(of: list[list[dict[str, list[int]]]]) -> list[dict[str, list[int]]]:
            return max(of, key=lambda batch: sum(map(self.tokens, batch)))

        # The first step makes the optimizer's state, so it has none while it needs its activations
        peaks = [self._peak_of(largest(batches[:per_step]), has_state=False)]
        if later := batches[per_step:]:
            peaks.append(self._peak_of(largest(later), has_state=True))
        return max(peaks, key=lambda peak: peak.total)

    def _peak_of(self, batch: list[dict[str, list[int]]], *, has_state: bool) -> Peak:
        model = self.build()
        quantized = self._saved_by_4_bits(model)
        plan, ids, labels = self.plan(batch)
        fake = FakeTensorMode()
        with fake:
            _move(model, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu"))

        def to_fake(tensor: Tensor) -> Tensor:
            return fake.from_tensor(tensor)

        plan = _map_tensors(plan, to_fake)
        storages = _Storages()
        step = _Step(model, self.train, plan, to_fake(ids), to_fake(labels), self.autocast, "cpu")
        with fake, storages:
            for parameter in model.parameters():
                storages.add(parameter)
            weights = storages.live
            step.watch(storages)
            if has_state:
                step.backward()
                step.update()
                storages.forget_peak()
            for _ in range(min(self.accumulation, 2)):
                step.backward()
            if has_state or self.steps == 1:
                step.update()
        at = storages.at_peak
        processes = self.hardware.processes

        def share(part: str, size: int) -> int:
            return size // processes if part in self.hardware.sharded else size

        gathered = 0
        if "weights" in self.hardware.sharded:  # two layers are whole while one is computed
            gathered = (
                2
                * max(_size(module) for module in model.modules() if isinstance(module, nn.ModuleList))
                // max(1, model.config.get_text_config().num_hidden_layers)
            )
        gradients = share("gradients", at["gradients"]) * (2 if self.hardware.copies_gradients else 1)
        activations = storages.peak - weights - at["gradients"] - at["optimizer"]
        reference = 0
        if self.dpo.reference_model:  # in memory until all pairs are scored, before the first gradient
            reference = max(0, weights - gradients - share("optimizer", at["optimizer"]) - activations)
        return Peak(
            weights=share("weights", weights - quantized),
            reference=reference,
            gradients=gradients,
            optimizer=share("optimizer", at["optimizer"]),
            activations=activations + gathered,
            allocator=int(activations * (self.heap - 1)),
            libraries=self.base,
        )

    @property
    def heap(self) -> float:
        """Memory that the allocator holds for activations, over their size; on an accelerator counted as 1."""
        if self.hardware.device != "cpu":
            return 1.0
        return _HEAP_LORA if self.lora.use_peft or is_adapter(self.model.model_name_or_path) else _HEAP_ALL

    def _saved_by_4_bits(self, model: PreTrainedModel) -> int:
        """Bytes that the linear layers take less in 4 bits."""
        if not self.lora.load_in_4bit:
            return 0
        head = model.get_output_embeddings().weight
        linear = {
            id(module.weight): module.weight
            for module in model.modules()
            if isinstance(module, nn.Linear) and not module.weight.requires_grad and module.weight is not head
        }
        return int(sum(weight.numel() * (weight.element_size() - _NF4_BYTES) for weight in linear.values()))

    # Time

    def seconds(self) -> tuple[float, float] | None:
        """Seconds of a micro-batch's step and of its reference's forward, from models of one and two layers.

        The batch is the one nearest to the mean in tokens. None where the device is not here, or is too small for it.
        """
        if not self.hardware.is_here or self.lora.load_in_4bit:
            return None
        batches = self.batches()
        sizes = [sum(map(self.tokens, batch)) for batch in batches]
        mean = sum(sizes) / len(sizes)
        plan, ids, labels = self.plan(batches[min(range(len(sizes)), key=lambda index: abs(sizes[index] - mean))])
        device = torch.device(self.hardware.device)
        timings = []
        for layers in _PROBED_LAYERS:
            model = self.build(layers)
            if _size(model) * 4 > _PROBE_LIMIT:
                return None
            _move(model, lambda tensor: _random(tensor, device))
            step = _Step(
                model,
                self.train,
                _map_tensors(plan, lambda tensor: tensor.to(device)),
                ids.to(device),
                labels.to(device),
                self.autocast,
                device.type,
            )
            timings.append((_timed(step.whole, device), _timed(step.reference, device)))
        (step_one, forward_one), (step_two, forward_two) = timings
        more = self.build().config.get_text_config().num_hidden_layers - 1
        return step_one + more * max(step_two - step_one, 0.0), forward_one + more * max(forward_two - forward_one, 0.0)

    # The text

    def lines(self) -> Iterator[str]:
        """The plan."""
        model = self.build()
        count = sum(parameter.numel() for parameter in model.parameters())
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        yield f"parameters: {count:,}; trained: {trained:,} ({trained / count:.2%})"
        peak, limit = self.peak(), self.hardware.limit
        size, processes = self.train.per_device_train_batch_size, self.hardware.processes
        where = f"{processes} x {self.hardware.device}, batch {size}, layout {self.engine.layout}"
        yield f"peak memory per device ({where}): {peak.total / GIB:.2f} GiB"
        for field in dataclasses.fields(peak):
            yield f"  {field.name}: {getattr(peak, field.name) / GIB:.2f} GiB"
        yield f"steps: {self.steps} of {size} x {self.accumulation} x {processes} pairs"
        tokens = sum(sum(map(self.tokens, batch)) for batch in self.batches())
        yield f"tokens forwarded in training: {tokens:,}"
        if (seconds := self.seconds()) is None:
            yield "time: not measured, since the run's device is not here or the model is too large for a probe"
        else:
            training = seconds[0] * self.accumulation * self.steps
            reference = seconds[1] * len(self.pairs) / size / processes
            yield f"time: {_duration(training)} of training, {_duration(reference)} of the reference where not cached"
        if limit is None:
            yield "memory of the device is not known: give --device_memory_gib to see whether this fits"
        elif peak.total <= limit:
            yield f"fits: {limit / GIB:.1f} GiB are there"
        else:
            yield f"WILL NOT FIT: {limit / GIB:.1f} GiB are there; {self.remedy(limit)}"

    def remedy(self, limit: int) -> str:
        """The cheapest change, of those that are known, with which the run fits into `limit` bytes."""
        for flags, run in self.candidates():
            if (total := run.peak().total) <= limit:
                return f"the cheapest change that fits is {flags} ({total / GIB:.2f} GiB)"
        return (
            "smaller batches, gradient checkpointing and LoRA are not enough: shard it (FSDP), or take a smaller model"
        )

    def candidates(self) -> Iterator[tuple[str, "_Run"]]:
        """Changes by what they cost: first nothing but time, last what is trained."""
        size, total = self.train.per_device_train_batch_size, self.train.per_device_train_batch_size * self.accumulation
        smaller: dict[str, Any] = {}
        flags = ""
        while size > 1 and size % 2 == 0:
            size //= 2
            smaller = {
                "per_device_train_batch_size": size,
                "gradient_accumulation_steps": total // size,
                "global_batch_size": None,
            }
            flags = f"--per_device_train_batch_size {size} --gradient_accumulation_steps {total // size}"
            yield flags, self.changed(smaller, {})
        if not self.checkpoints:
            smaller = smaller | {"gradient_checkpointing": True}
            yield "--gradient_checkpointing true", self.changed({"gradient_checkpointing": True}, {})
            if flags:
                yield f"{flags} --gradient_checkpointing true", self.changed(smaller, {})
            flags = f"{flags} --gradient_checkpointing true".strip()
        if not self.lora.use_peft and not is_adapter(self.model.model_name_or_path):
            yield "--use_peft true", self.changed({}, {"use_peft": True})
            if flags:
                yield f"--use_peft true {flags}", self.changed(smaller, {"use_peft": True})


class _Storages(TorchDispatchMode):
    """Counts the bytes of all storages while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.at_peak: dict[str, int] = {}
        self.parts = {"gradients": 0, "optimizer": 0}
        self._sizes: dict[int, int] = {}

    def forget_peak(self) -> None:
        """Begin anew at what lives now."""
        self.peak, self.at_peak = self.live, dict(self.parts)

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        weakref.finalize(storage, self._drop, key)
        if self.live > self.peak:
            self.peak, self.at_peak = self.live, dict(self.parts)

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return result


class _Step:
    """A training step on one batch, on fake tensors or real ones."""

    def __init__(
        self,
        model: Any,
        train: TrainOptions,
        plan: PairPlan,
        ids: Tensor,
        labels: Tensor,
        autocast: torch.dtype | None,
        device: str,
    ) -> None:
        self.model, self.plan, self.ids, self.labels = model.train(), plan, ids, labels
        self.base = model.get_base_model() if hasattr(model, "peft_config") else model
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.max_grad_norm = train.max_grad_norm
        self.optimizer = _optimizer(train, self.trained)
        self.autocast, self.device = autocast, device

    def watch(self, storages: _Storages) -> None:
        """Have `storages` told of the bytes of gradients and optimizer state."""
        self.storages = storages

        def accumulated(parameter: Tensor) -> None:
            if id(parameter) not in seen:
                seen.add(id(parameter))
                storages.parts["gradients"] += parameter.numel() * parameter.element_size()

        seen: set[int] = set()
        self._gradients = seen
        for parameter in self.trained:
            parameter.register_post_accumulate_grad_hook(accumulated)

    def forward(self) -> Tensor:
        enabled = self.autocast is not None
        with torch.autocast(self.device, dtype=self.autocast or torch.bfloat16, enabled=enabled):
            return forward_plan(self.base, self.plan, self.ids, self.labels, _OUTPUTS).log_probs.sum()

    def backward(self) -> None:
        self.forward().backward()

    def update(self) -> None:
        if self.max_grad_norm:
            nn.utils.clip_grad_norm_(self.trained, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if hasattr(self, "storages"):
            self._gradients.clear()
            states = [value for state in self.optimizer.state.values() for value in state.values()]
            sizes = [state.numel() * state.element_size() for state in states if isinstance(state, Tensor)]
            self.storages.parts |= {"gradients": 0, "optimizer": sum(sizes)}

    def whole(self) -> None:
        self.backward()
        self.update()

    @torch.no_grad()
    def reference(self) -> None:
        self.forward()


def _optimizer(train: TrainOptions, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """One with the state of `train.optim`; those of 8 bits are counted as AdamW."""
    if train.optim == "sgd":
        return torch.optim.SGD(parameters, lr=1e-6)
    if train.optim == "adafactor":
        return torch.optim.Adafactor(parameters, lr=1e-6)
    return torch.optim.AdamW(parameters, lr=1e-6)


def _move(model: nn.Module, make: Any) -> None:
    """Put `make(tensor)` in the place of every parameter and buffer; tied ones stay tied."""
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    new = make(tensor)
                    if isinstance(tensor, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = (tensor, new)
                table[name] = made[id(tensor)][1]


def _random(tensor: Tensor, device: torch.device) -> Tensor:
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
    return torch.randn(tensor.shape, dtype=tensor.dtype, device=device) * 0.02


def _map_tensors(plan: PairPlan, function: Any) -> PairPlan:
    values = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    return dataclasses.replace(
        plan, **{name: function(value) for name, value in values.items() if isinstance(value, Tensor)}
    )


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _timed(function: Any, device: torch.device, repeats: int = 2) -> float:
    """Seconds of the fastest call, after one that warms up."""
    function()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
