"""Run sft or dpo under Ray Train: ray_launch.py RAY OPTIONS… scripts/dpo.py ITS OPTIONS…"""

from pathlib import Path

from tandem.launch.ray import launch

_RUNS = ("sft", "dpo")


def main(argv: list[str]) -> None:
    """Launch. `dpo` or `sft` may be given in place of a script: a Tandem installed from its wheel has no scripts/."""
    at = next((index for index, word in enumerate(argv) if word in _RUNS or Path(word).suffix == ".py"), len(argv))
    words = [str(Path(__file__).parent / f"{word}.py") if word in _RUNS else word for word in argv[at : at + 1]]
    launch([*argv[:at], *words, *argv[at + 1 :]])
