"""The reference's log-probs of a trainer's pairs: read from the cache, or computed before training and kept there."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, tqdm
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from tandem.data.tokenized import SIDES
from tandem.engine.lengths import PairLengths, token_arrays
from tandem.engine.modes import evaluating
from tandem.engine.pairs import PairCollator
from tandem.engine.precision import computed_in, is_sharded
from tandem.engine.ref_cache import RefCache, Source, fingerprint, pair_key, source_key
from tandem.log import logger
from tandem.training.trainers.reference import check_gap, gap, starts_as_its_base

Logps: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Summed log-probs of chosen and of rejected answers, (B,) nats each."""


class ReferenceScorer:
    """Scores the pairs (`data.tokenized.tokenize_pair`, with their `pair_id`) of a trainer with its reference.

    Args:
        trainer: its `ref_model`, or without one its policy, is the reference until training begins.
        cache: None in a run whose losses need no reference.
        logps: (model, batch) → the model's log-probs.
        given: the model that is the reference; None: it is the policy before training.
        added: the config of the adapter that the policy got for this run; None: it got none.
        source: the files that the reference was read from, by which its fingerprint is remembered; None: none.
    """

    def __init__(
        self,
        trainer: Any,
        cache: RefCache | None,
        logps: Callable[[Any, dict[str, Any]], Logps],
        *,
        given: PreTrainedModel | None,
        added: PeftConfig | None,
        source: Source | None = None,
    ) -> None:
        self._trainer, self.cache, self._model_logps, self._source = trainer, cache, logps, source or Source()
        self.name: str | None = given.name_or_path if given is not None else None
        self._with_adapter = given is not None or not starts_as_its_base(added)
        self._fingerprint = ""
        self._checked = False

    # What subclasses for other accelerators and launches change

    @contextlib.contextmanager
    def ready(self) -> Iterator[Any]:
        """The reference, ready to be forwarded on all ranks."""
        yield self._trainer.ref_model or self._trainer.model

    def gather(self, logps: Logps) -> Logps:
        """The log-probs of all ranks, each pair once. Collective."""
        gathered: Logps = self._trainer.accelerator.gather_for_metrics(logps)
        return gathered

    def collator(self, batch_size: int) -> PairCollator:
        """The collator of the batches that the reference scores."""
        collator: PairCollator = self._trainer.data_collator
        return collator

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision that the policy is forwarded in."""
        context: contextlib.AbstractContextManager[Any] = self._trainer.accelerator.autocast()
        return context

    # The reference's log-probs

    def identify(self, model: PreTrainedModel) -> None:
        """Compute the fingerprint of `model`, the reference, or look it up. Before anything wraps it. Collective."""
        if self.cache is None:
            return
        main = self._trainer.accelerator.is_main_process
        key = source_key(model, self._source, adapter=self._with_adapter) if main else None
        found = of_rank_0(self.cache.fingerprint_of(key) if key is not None else None)
        if found is None:
            # If each rank has the whole model, only one hashes it; the hash of a sharded model is a collective
            of_whole = fingerprint(model, adapter=self._with_adapter) if main or is_sharded(model) else None
            found = of_rank_0(of_whole)
            if key is not None:
                self.cache.keep_fingerprint(key, found)
        self._fingerprint = found

    def with_columns(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """`dataset` with the reference's log-probs: from the cache, or computed and added to it batch by batch.

        Args:
            name: of the split, for the log.
        """
        if self.cache is None:  # TRL reads the columns all the same, for the rewards that it logs
            nothing = [0.0] * len(dataset)
            return dataset.add_column("ref_chosen_logps", nothing).add_column("ref_rejected_logps", nothing)
        keys = self._keys(dataset)
        known = self.cache.read(keys) if self._trainer.accelerator.is_main_process else None
        # Another run may add entries between the reads of two ranks, which would then forward different batches
        found: dict[bytes, tuple[float, float]] = of_rank_0(known)
        missing = [index for index, key in enumerate(keys) if key not in found]
        hits = len(keys) - len(missing)
        logger.info("reference of %s pairs: %d of %d in %s", name, hits, len(keys), self.cache.path)
        if missing:
            # A loader draws random numbers, but the run must draw the same ones whether the cache was full or not
            with torch.random.fork_rng(devices=[]):
                found |= self._score(dataset, keys, missing, name, batch_size)
        chosen, rejected = zip(*(found[key] for key in keys), strict=True)
        return dataset.add_column("ref_chosen_logps", list(chosen)).add_column("ref_rejected_logps", list(rejected))

    def _keys(self, dataset: Dataset) -> list[bytes]:
        dtype = f"{self._trainer.model.dtype} under {self._trainer.accelerator.mixed_precision}"
        longest = self._trainer.data_collator.max_length
        keys = []
        columns = [name for name in dataset.column_names if name.endswith(("_ids", "_mask"))]
        for pair in token_arrays(dataset, columns):
            prompt = pair["prompt_ids"]
            rows = [np.concatenate([prompt, pair[f"{side}_ids"]])[:longest] for side in SIDES]
            masks = [pair.get(f"{side}_mask", np.ones(1, np.int32)) for side in SIDES]
            scored = [
                len(row) - len(prompt) if mask.all() else mask[: len(row) - len(prompt)]
                for row, mask in zip(rows, masks, strict=True)
            ]
            keys.append(pair_key(self._fingerprint, rows, scored, dtype, self._trainer.ld_alpha))
        return keys

    def _score(
        self, dataset: Dataset, keys: list[bytes], missing: list[int], name: str, batch_size: int
    ) -> dict[bytes, tuple[float, float]]:
        # By length, so that batches have little padding; the longest first, so that a run that lacks the memory fails
        # at once
        tokens = PairLengths.of(dataset, self._trainer.data_collator.max_length).tokens("packed")
        order = sorted(missing, key=lambda index: -tokens[index])
        loader = DataLoader(dataset.select(order), batch_size=batch_size, collate_fn=self.collator(batch_size))
        scores: dict[bytes, tuple[float, float]] = {}
        done = 0  # not len(scores): a pair may occur twice
        writes = self._trainer.accelerator.is_main_process and self.cache is not None
        writer = self.cache.writer() if writes and self.cache else contextlib.nullcontext(lambda _: None)
        with self.ready() as model, writer as write:
            for batch in tqdm(self._trainer.accelerator.prepare(loader), desc=f"reference of {name} pairs"):
                batch.pop("pair_id")
                gathered = self.gather(self.logps(model, batch))
                values = torch.stack(gathered, dim=1)[: len(order) - done].tolist()
                some = {keys[order[done + row]]: tuple(pair) for row, pair in enumerate(values)}
                done += len(values)
                scores |= some
                write(some)
        return scores

    def logps(self, model: Any, inputs: dict[str, Any]) -> Logps:
        """A batch's log-probs by the reference `model`, without the policy's adapter unless that belongs to it."""
        off: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        policy = self._trainer.accelerator.unwrap_model(self._trainer.model)
        if isinstance(policy, PeftModel) and not self._with_adapter:
            off = policy.disable_adapter()
        with torch.no_grad(), evaluating(model), off, self.autocast():
            return self._model_logps(model, inputs)

    # That it is the policy before training

    def check_once(self, model: Any, inputs: dict[str, Any]) -> None:
        """Run `check_gap` on the first batch of a run that is not resumed, before its first update. Collective."""
        if self._checked:
            return
        self._checked = True
        if self.cache is None or self.name is not None or self._trainer.state.global_step > 0:
            return
        inputs = self._trainer._prepare_inputs(inputs)
        device = inputs["input_ids"].device
        with torch.no_grad(), evaluating(model), self.autocast():
            policy = torch.cat(self._model_logps(model, inputs))
            computed = computed_in(model, device.type)
        reference = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        found = gap(policy, reference.to(policy), inputs["completion_mask"][:, 1:].sum(1))
        check_gap(self._trainer.accelerator.gather(found[None]).max().item(), computed)


def of_rank_0(value: Any) -> Any:
    """Rank 0's value on every rank: with FSDP's economical loading only it has the weights. Collective."""
    return broadcast_object_list([value])[0]
