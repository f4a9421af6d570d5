"""What a pipeline asks of its data before the first stage, and what of them its stamps hold."""

from pathlib import Path

import pytest

from tandem.launch import held_out
from tandem.launch.stamp import sources
from tests import tiny


@pytest.mark.parametrize("entries", ["- dataset_name: a.jsonl\n- dataset_name: b\n", "dataset_name: a.jsonl\n"])
def test_a_stamp_is_of_the_sources_of_a_file(tmp_path: Path, entries: str):
    (tmp_path / "data.yaml").write_text(entries)
    names = [str(tmp_path / "a.jsonl"), str(tmp_path / "b")]
    assert sources(tmp_path / "data.yaml") == names[: entries.count("dataset_name")]


def test_the_share_is_printed_for_the_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tiny.save_pairs(tmp_path / "pairs.jsonl", tiny.hh_rows(2))
    held_out.main([str(tmp_path / "pairs.jsonl")])
    assert capsys.readouterr().out == "0.25\n"
