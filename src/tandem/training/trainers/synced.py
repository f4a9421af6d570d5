"""TR-DPO: a reference that follows the policy (Gorbatovski et al. 2024, arXiv 2404.09656, Eqs. 6 and 7).

Only what is trained makes policy and reference differ, so only that is held twice: with LoRA, an adapter. The reference
is forwarded with the policy's own modules, for which the two sets of tensors change places. Until the first sync it is
the policy before training, whose log-probs the cache has.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tandem.errors import UserError
from tandem.options.losses import DPOOptions
from tandem.training.trainers.topology import Topology

REFERENCE = "reference.safetensors"
"""Name, in a checkpoint, of the trained tensors of the reference."""


class SyncedReference:
    """The trained tensors of a policy as its reference has them.

    Args:
        policy: before training.
        alpha: α, the policy's share after a sync.
        every: optimizer steps from one sync to the next.
    """

    def __init__(self, policy: torch.nn.Module, alpha: float, every: int) -> None:
        self._trained = {name: each for name, each in policy.named_parameters() if each.requires_grad}
        self._held = {name: each.detach().clone() for name, each in self._trained.items()}
        self.alpha, self.every = alpha, every
        self.has_moved = False
        """Whether the reference is another than the policy before training."""

    @torch.no_grad()
    def sync(self) -> None:
        """α of the policy and 1 − α of what the reference was, parameter by parameter; of LoRA, of its A and its B."""
        for name, parameter in self._trained.items():
            self._held[name].mul_(1.0 - self.alpha).add_(parameter.detach(), alpha=self.alpha)
        self.has_moved = True

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """While this is open the policy's modules compute what the reference does; nothing may be differentiated."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self._trained.items():
            parameter.data, self._held[name] = self._held[name], parameter.data
        torch.clear_autocast_cache()  # which knows a parameter by its place, and would go on with the other's values

    def save(self, folder: Path) -> None:
        """Into a checkpoint; before the first sync there is nothing to save."""
        if self.has_moved:
            tensors: dict[str, Tensor] = {name: held.contiguous() for name, held in self._held.items()}
            save_file(tensors, folder / REFERENCE)

    def load(self, folder: Path, steps: int) -> None:
        """From a checkpoint of a run that had done `steps` steps.

        Raises:
            UserError: it has no such reference.
        """
        if steps < self.every:
            return
        file = folder / REFERENCE
        if not file.exists():
            raise UserError(f"{folder}: has no {REFERENCE}, so it is of a run without --sync_ref_model")
        saved = load_file(file)
        if saved.keys() != self._held.keys():
            raise UserError(f"{file}: is of other trained parameters than this run's")
        for name, held in self._held.items():
            held.copy_(saved[name])
        self.has_moved = True


class SyncCallback(TrainerCallback):
    """Syncs after every so many optimizer steps, before a checkpoint of the step is written."""

    def __init__(self, reference: SyncedReference) -> None:
        self._reference = reference

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self._reference.every == 0:
            self._reference.sync()


def synced_reference(policy: torch.nn.Module, dpo: DPOOptions, topology: Topology) -> SyncedReference | None:
    """The reference of a run with `--sync_ref_model`; None without.

    Raises:
        UserError: weights are sharded.
    """
    if not dpo.sync_ref_model:
        return None
    if topology.engine not in ("single", "ddp"):
        raise UserError(
            f"--sync_ref_model holds whole weights on each process, and this run has them sharded ({topology.engine}): "
            "use DDP, or --use_peft, which makes it small enough for that"
        )
    return SyncedReference(policy, dpo.ref_model_mixup_alpha, dpo.ref_model_sync_steps)
