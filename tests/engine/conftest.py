"""A `DPOTrainer` on a tiny model, with and without the engine."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from tandem.engine.choice import LayoutReport
from tandem.engine.forward import pair_engine
from tests.engine.tiny_models import PAD, VOCABULARY, random_pairs


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Two-layer models are slower on two threads than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {f"<{index}>": index for index in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<3>")),
        pad_token=f"<{PAD}>",
        bos_token="<1>",
        eos_token="<2>",
    )


class _TokenizedTrainer(DPOTrainer):
    """TRL's trainer over pairs that are token ids already."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


@pytest.fixture
def build_trainer(tmp_path: Path):
    """`build_trainer(model, reference, engine="shared" | None, ...)`: a trainer over already tokenized pairs.

    `engine=None` is stock TRL. Other keywords go to `DPOConfig`. The trainer gets `.reports`, the engine's.
    """

    def build(
        model: PreTrainedModel,
        reference: PreTrainedModel | None,
        *,
        engine: str | None = "shared",
        pairs: list[dict[str, list[int]]] | None = None,
        peft_config: Any = None,
        **settings: Any,
    ) -> DPOTrainer:
        arguments = DPOConfig(
            output_dir=str(tmp_path / "run"),
            **{
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-3,
                "logging_steps": 1,
                "max_length": 40,
                "report_to": [],
                "save_strategy": "no",
                "use_cpu": True,
                "bf16": False,
                "gradient_checkpointing": False,
                "disable_tqdm": True,
                "seed": 0,
                "beta": 0.3,
            }
            | settings,
        )
        reports: list[LayoutReport] = []
        install = pair_engine(layout=engine or "padded", on_report=reports.append, cache_dir=tmp_path / "probe")
        with install if engine else contextlib.nullcontext():
            trainer = _TokenizedTrainer(
                model=model,
                ref_model=reference,
                args=arguments,
                train_dataset=Dataset.from_list(pairs or random_pairs(8)),
                processing_class=_tokenizer(),
                peft_config=peft_config,
            )
        trainer.reports = reports
        return trainer

    return build
