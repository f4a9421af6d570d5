from pathlib import Path

import pytest

from tandem.errors import UserError
from tandem.rounds.recipe import of_later_rounds


def test_later_rounds_go_on_training_the_adapter_that_is_there(tmp_path: Path):
    file = tmp_path / "dpo.yaml"
    file.write_text(
        "use_peft: true\nlora_r: 8\nuse_dora: true\nlora_rank_pattern: {q_proj: 4}\nbeta: 1.0e-1\nseed: 07\n"
    )
    assert of_later_rounds(str(file)) == "beta: '1.0e-1'\nseed: '07'\n"
    file.write_text("load_in_4bit: true\nuse_peft: true\n")
    with pytest.raises(UserError, match="ROUNDS=1"):
        of_later_rounds(str(file))
    file.write_text("")
    assert of_later_rounds(str(file)) == "{}\n"
