import json
from pathlib import Path

import pytest

from tandem.data.options import DataOptions
from tandem.data.sources import load_training
from tandem.errors import UserError
from tandem.rounds.offline import without_held_out
from tandem.rounds.prompts import held_out_prompts
from tests import tiny


def test_given_pairs_of_held_out_prompts_are_left_out(tmp_path: Path):
    """PROMPTS and OFFLINE_PAIRS may be one data set: what is held out of the first must not be trained on."""
    pairs = str(tiny.save_pairs(tmp_path / "pairs.jsonl", tiny.hh_rows(40)))
    held_out = held_out_prompts(DataOptions(dataset_name=pairs, val_ratio=0.25))
    lines = [json.dumps({"prompt_id": prompt.prompt_id}) + "\n" for prompt in held_out]
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    said = without_held_out(pairs, tmp_path / "prompts.jsonl", tmp_path / "out.jsonl")
    assert len(held_out) > 5
    assert f"{40 - len(held_out)} pairs of" in said
    assert f"; {len(held_out)} left out" in said
    rows = load_training(DataOptions(dataset_name=str(tmp_path / "out.jsonl")))
    all_rows = {json.dumps(row["prompt"]): row for row in load_training(DataOptions(dataset_name=pairs))}
    assert len(rows) == 40 - len(held_out)
    for row in rows:
        assert all(row[side] == all_rows[json.dumps(row["prompt"])][side] for side in ("chosen", "rejected"))
    with pytest.raises(UserError, match="no such file"):
        without_held_out(pairs, tmp_path / "none.jsonl", tmp_path / "out.jsonl")
