"""dpo_pipeline_sanity.sh, unchanged, in the Gaudi environment: from the check of the data to the report."""

import json
from pathlib import Path

import pytest

from tandem.runs import is_complete
from tests.judge.fault_server import FaultServer
from tests.pipelines.test_pipeline import OUTPUTS, ROOT, Pipeline


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as an image has it: without `.venv`, so that `python` is the environment's own."""
    folder = tmp_path_factory.mktemp("container")
    for name in ("accelerate_configs", "pipelines", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def test_the_whole_road(container: Path, tiny_model: Path, tiny_data: Path, tmp_path: Path):
    with FaultServer().serving() as judge:
        pipeline = Pipeline(tmp_path, tiny_model, tiny_data, judge)
        pipeline.script = container / "pipelines" / "dpo_pipeline_sanity.sh"
        code, screen = pipeline()
    assert code == 0, screen[-3000:]
    assert "Gaudi: layout padded" in screen  # the trainer was optimum-habana's
    for name in OUTPUTS:
        assert (pipeline.run / name).exists(), name
    for name in ("sft", "sft_dpo_init_merged", "dpo", "dpo_sanity_merged"):
        assert is_complete(pipeline.run / name), name
    results = json.loads((pipeline.run / "results.json").read_text())
    assert list(results["models"]) == ["base", "sft", "dpo"]
    assert results["models"]["dpo"]["mean_margin"]["value"] > 0.1  # it has learnt
    assert results["models"]["dpo"]["kl_per_token"]["value"] is not None
    config = json.loads((pipeline.run / "dpo_sanity_merged" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
