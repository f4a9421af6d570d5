import os
import signal
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import TrainerControl

from tandem.training.trainers.callbacks import Preemption


def test_a_notice_while_ranks_compare_theirs_is_not_lost():
    def gather(mine: Tensor) -> Tensor:
        gathered = mine.clone()
        os.kill(os.getpid(), signal.SIGTERM)
        return gathered

    accelerator = SimpleNamespace(num_processes=2, device=torch.device("cpu"), gather=gather)
    with Preemption(accelerator) as preemption:
        stops = [
            preemption.on_step_end(None, None, TrainerControl()).should_training_stop  # type: ignore[arg-type]
            for _ in range(2)
        ]
    assert stops == [False, True]
