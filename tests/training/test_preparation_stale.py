"""What the key of prepared data must tell apart, beside what test_preparation.py shows."""

import json
from pathlib import Path

import datasets
import pytest
from tokenizers import pre_tokenizers

from tandem.errors import UserError
from tandem.training.preparation import training_data
from tests import tiny
from tests.training.test_preparation import CHAT, ids_of, plainly, run_of


def test_no_name_of_a_set_to_evaluate_on_hides_the_training_data(tmp_path: Path):
    other = tiny.save_pairs(tmp_path / "other.jsonl", tiny.hh_rows(4))
    for count in (12, 8):
        data = tiny.save_pairs(tmp_path / "rows.jsonl", tiny.hh_rows(count))
        for name in ("train_dataset", "eval_dataset"):
            run = run_of(data, tmp_path / "cache", eval_strategy="steps", eval_steps=5, eval_sets=f"{name}={other}")
            assert ids_of(training_data(run, tiny.tokenizer())) == plainly(run, tiny.tokenizer())[0]


def test_the_order_of_keys_that_a_template_writes_counts_for_rows_of_a_function(tmp_path: Path):
    (tmp_path / "own.py").write_text("def same(row):\n    return row\n")
    tokenizer = tiny.tokenizer("{{ tools|tojson }}" + tiny.TEMPLATE)
    data = tmp_path / "rows.jsonl"
    for order in ("ab", "ba"):
        tools = [{"name": "f", "parameters": {name: {"type": "string"} for name in order}}]
        tiny.save_pairs(data, [row | {"tools": tools} for row in CHAT[:3]])
        run = run_of(data, tmp_path / "cache", row_function=f"{tmp_path / 'own.py'}:same")
        assert ids_of(training_data(run, tokenizer)) == plainly(run, tokenizer)[0]


def test_nothing_is_kept_of_a_template_that_draws_or_a_tokenizer_with_a_part_of_its_own(tmp_path: Path):
    class Letters:
        def pre_tokenize(self, text: pre_tokenizers.PreTokenizer) -> None:
            pass

    drawing, own = tiny.tokenizer(tiny.TEMPLATE + "{% if false %}{{ [1, 2] | random }}{% endif %}"), tiny.tokenizer()
    own.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Letters())
    for tokenizer in (drawing, own):
        run = run_of(tiny.save_pairs(tmp_path / "rows.jsonl", tiny.hh_rows(3)), tmp_path / "cache")
        assert ids_of(training_data(run, tokenizer)) == plainly(run, tokenizer)[0]
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("place", ["../elsewhere.arrow", "part/elsewhere.arrow"])
def test_a_saved_folder_that_names_files_elsewhere_is_refused(place: str, tmp_path: Path):
    saved = tmp_path / "saved"
    datasets.Dataset.from_list(tiny.hh_rows(3)).save_to_disk(str(saved))
    (saved / "part").mkdir()
    (saved / "data-00000-of-00001.arrow").rename(saved / place)
    state = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps(state | {"_data_files": [{"filename": place}]}))
    with pytest.raises(UserError, match=r"state\.json names '.*elsewhere\.arrow', which is not in it"):
        training_data(run_of(saved, tmp_path / "cache"), tiny.tokenizer())


def test_a_name_of_a_set_that_no_file_can_have_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="NAME of at most 50 letters"):
        run_of(tmp_path, tmp_path, eval_strategy="steps", eval_sets=f"{'n' * 51}=data.jsonl")
