"""SFT and DPO under Ray Train: the scripts' own functions, in workers that Ray starts, again after a failure too.

All workers must see the same output folder: one machine's disk, or a shared one. When a worker dies, Ray ends the
others and starts all anew; they resume from the last complete checkpoint in the output folder, as the same command
always does. Each complete checkpoint is also copied to the storage path, which may be in the cloud; an output folder
without a complete checkpoint, as on a new machine, gets the last copy.
"""

import dataclasses
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from tandem import contract, ranks
from tandem.errors import AlarmStop, Preempted, TandemExit, UserError
from tandem.options.fields import REQUIRED, opt
from tandem.options.parsing import parse
from tandem.options.rules import Options
from tandem.options.training import TrainOptions
from tandem.runs import RUN, checkpoints, is_complete
from tandem.training.option_sets import DPOOptionSet, SFTOptionSet, classes, foreign

_RUNS = {"sft.py": SFTOptionSet, "dpo.py": DPOOptionSet}
_DESCRIPTION = "Train under Ray: ray_launch.py RAY OPTIONS… scripts/dpo.py ITS OPTIONS…, or scripts/sft.py"


@dataclasses.dataclass
class RayOptions(Options):
    """Ray."""

    num_workers: int = opt(REQUIRED, "processes to train in", low=1)
    address: str | None = opt(None, "an existing cluster: its address, or auto; unset: a cluster on this machine alone")
    cpus_per_worker: float = opt(1.0, "CPUs that Ray sets aside for each worker", above=0)
    gpus_per_worker: float = opt(0.0, "GPUs of each worker: 0 or 1")
    storage_path: str | None = opt(None, "where Ray copies checkpoints: a folder, s3://… or gs://…; unset: OUTPUT_ray")
    max_failures: int = opt(3, "how often a failed worker group is started again; -1: always", low=-1)
    reference_workers: int = opt(0, "dpo.py: this many workers of their own fill the reference cache first", low=0)

    def conflicts(self) -> Iterator[str]:
        if self.gpus_per_worker not in (0, 1):
            yield f"--gpus_per_worker must be 0 or 1, not {self.gpus_per_worker}: one process drives one GPU"


def launch(argv: list[str]) -> None:
    """Train as `argv`, `RAY OPTIONS… SCRIPT SCRIPT OPTIONS…`, says.

    Raises:
        UserError: the command line is wrong, or Ray is not installed or cannot be reached.
        TandemExit: a worker's training ended with it.
    """
    at = next((index for index, argument in enumerate(argv) if Path(argument).name in _RUNS), len(argv))
    (options,) = parse(argv[:at], (RayOptions,), prog="ray_launch.py", description=_DESCRIPTION)
    if at == len(argv):
        raise UserError("command line: name the script to run, scripts/sft.py or scripts/dpo.py, and its options")
    if not Path(argv[at]).is_file():
        raise UserError(f"{argv[at]}: no such script")
    job = _Job(str(Path(argv[at]).resolve()), argv[at + 1 :], os.getcwd())
    if options.reference_workers and job.kind is not DPOOptionSet:
        raise UserError("--reference_workers has no effect with sft.py: it has no reference")
    train = job.run().train
    if importlib.util.find_spec("ray") is None:
        raise UserError(f"Ray is not installed: {contract.extra('ray')}")
    _run(options, job, train)


@dataclasses.dataclass(frozen=True)
class _Job:
    """A script with its command line and working folder, to be run in workers."""

    script: str
    argv: list[str]
    cwd: str

    def module(self) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"tandem_{Path(self.script).stem}", self.script)
        assert spec is not None and spec.loader is not None  # it ends in .py
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    @property
    def kind(self) -> type[SFTOptionSet] | type[DPOOptionSet]:
        return _RUNS[Path(self.script).name]

    def run(self) -> Any:
        """The script's options: an instance of `kind`."""
        name = Path(self.script).name
        return self.kind(*parse(self.argv, classes(self.kind), prog=name, description="", foreign=foreign(self.kind)))


def _run(options: RayOptions, job: _Job, train: TrainOptions) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    try:
        ray.init(address=options.address, include_dashboard=False if options.address is None else None)
    except (ConnectionError, ValueError) as error:
        raise UserError(f"--address {options.address}: no Ray cluster there: {error}") from error
    output = Path(train.output_dir).resolve()
    resources = {"CPU": options.cpus_per_worker} | ({"GPU": 1} if options.gpus_per_worker else {})
    try:
        outcome = ray.remote(num_cpus=0)(_Outcome).remote()
        if options.reference_workers:
            score = ray.remote(num_cpus=options.cpus_per_worker, num_gpus=options.gpus_per_worker)(_score)
            parts = options.reference_workers
            ray.get([score.remote(job, outcome, part, parts) for part in range(parts)])
            raise_ended(ray.get(outcome.get.remote()))
        trainer = TorchTrainer(
            _work,
            train_loop_config={"job": job, "outcome": outcome, "output": str(output)},
            scaling_config=ScalingConfig(
                num_workers=options.num_workers,
                use_gpu=options.gpus_per_worker > 0,
                resources_per_worker=resources,
            ),
            run_config=RunConfig(
                name=output.name,
                storage_path=_storage(options.storage_path or f"{output}_ray"),
                failure_config=FailureConfig(max_failures=options.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=train.save_total_limit),
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError:
            raise_ended(ray.get(outcome.get.remote()))
            raise
        raise_ended(ray.get(outcome.get.remote()))
    finally:
        ray.shutdown()


def _storage(path: str) -> str:
    return path if "://" in path else str(Path(path).resolve())


class _Outcome:
    """An actor that keeps which `TandemExit` ended the training: to Ray, an exception is just another failure."""

    def __init__(self) -> None:
        self._ended: tuple[str, str] | None = None

    def set(self, kind: str, message: str) -> None:
        self._ended = self._ended or (kind, message)

    def get(self) -> tuple[str, str] | None:
        return self._ended


def raise_ended(ended: tuple[str, str] | None) -> None:
    """Raise the `TandemExit` that a worker's training ended with, if any; `ended` has its class's name and message."""
    if ended is not None:
        kind, message = ended
        raise {cls.__name__: cls for cls in (UserError, AlarmStop, Preempted)}[kind](message)


def _score(job: _Job, outcome: Any, part: int, parts: int) -> None:
    """The task of a reference worker: compute part `part` of `parts` of the reference's log-probs into the cache."""
    import ray

    os.chdir(job.cwd)
    from tandem.training.stages import fill_reference_cache

    try:
        fill_reference_cache(job.run(), part=part, parts=parts)
    except TandemExit as stop:
        ray.get(outcome.set.remote(type(stop).__name__, str(stop)))


def _work(config: dict[str, Any]) -> None:
    """The task of a training worker: the script's own `main`."""
    import ray
    import ray.train

    job, outcome, output = config["job"], config["outcome"], Path(config["output"])
    if ray.get(outcome.get.remote()) is not None:
        return  # Ray started it again after a `TandemExit`, which is final
    os.chdir(job.cwd)
    _bring_back(output)
    if ray.train.get_context().get_world_size() == 1:
        _leave_group()
    from tandem.training.session import added_callbacks

    try:
        with added_callbacks(_report()):
            job.module().main(job.argv)
    except TandemExit as stop:
        ray.get(outcome.set.remote(type(stop).__name__, str(stop)))
        raise  # so that Ray ends the other workers, which may be waiting for this one


def _bring_back(output: Path) -> None:
    """Fetch Ray's copy of the last checkpoint where the output folder has no complete one, as on a new machine."""
    import ray.train
    import torch.distributed

    copy = ray.train.get_checkpoint()
    has_none = not any(is_complete(path) for path in checkpoints(output))
    if ray.train.get_context().get_world_rank() == 0 and copy is not None and has_none:
        folder = output / Path(copy.path).name
        copy.to_directory(str(folder))
        if not (output / RUN).exists():
            shutil.copy(folder / RUN, output / RUN)
    torch.distributed.barrier()


def _leave_group() -> None:
    """Undo the process group that Ray makes for a single worker: accelerate would wrap the model in DDP for it, which
    copies every gradient."""
    import torch.distributed

    torch.distributed.destroy_process_group()
    ranks.leave_group()


def _report() -> Any:
    import ray.train
    from transformers import TrainerCallback

    class Report(TrainerCallback):
        """Hands each checkpoint to Ray once all ranks have written their parts; rank 0 alone copies it.

        Ray's own RayTrainReportCallback has every rank copy the folder, while other ranks may still be writing to it.
        """

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            args.distributed_state.wait_for_everyone()
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            mine = ray.train.Checkpoint.from_directory(str(folder)) if state.is_world_process_zero else None
            ray.train.report({"step": state.global_step}, checkpoint=mine, checkpoint_dir_name=folder.name)

    return Report()
