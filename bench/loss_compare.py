"""Whether two commits train alike: every loss, margin and weight, bit for bit.

    python bench/loss_compare.py 40aa243 main
    python bench/loss_compare.py main .                            # a folder is taken as it is, uncommitted changes too
    python bench/loss_compare.py 40aa243 main --flags "--loss_type ipo sft --ld_alpha 0.5"

Each commit is checked out on its own, and trains a tiny model that is made here, on the CPU, through its own
`scripts/dpo.py`, in a process for each of: full and LoRA, in the layouts shared and padded. Compared are all numbers of
the log but those of time and memory, the margin of every pair in every step, and every tensor that the run saved. Exits
with 1 where something differs.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests import tiny  # noqa: E402

SETTINGS = {
    f"{name}, {layout}": [*flags, "--layout", layout]
    for name, flags in {"full": [], "LoRA": ["--use_peft", "true"]}.items()
    for layout in ("shared", "padded")
}
# All that a later commit may choose otherwise by default, and that would change the numbers, is said here
OPTIONS = (
    "--max_steps 6 --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --learning_rate 1e-2 --bf16 false "
    "--use_cpu true --optim adamw_torch --lora_target_modules all-linear --gradient_checkpointing true "
    "--logging_steps 1 --eval_strategy steps --eval_steps 3 --save_strategy no --report_to none"
)
NOT_COMPARED = ("runtime", "per_second", "system/")


@contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    """The files of a commit; of a folder, the folder itself."""
    if Path(commit).is_dir():
        yield Path(commit).resolve()
        return
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def train(tree: Path, flags: list[str], inputs: Path, output: Path) -> None:
    """One run of a tree's scripts/dpo.py."""
    command = [
        sys.executable, str(tree / "scripts" / "dpo.py"), "--model_name_or_path", str(inputs / "model"),
        "--dataset_name", str(inputs / "data"), "--output_dir", str(output), "--ref_cache", f"{output}-cache",
        *shlex.split(OPTIONS), *flags,
    ]  # fmt: skip
    environment = os.environ | {
        "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(inputs / "cache"), "HF_HOME": str(inputs / "cache"),
    }  # fmt: skip
    run = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{tree}: {shlex.join(command)}\n{run.stderr[-3000:]}")


def logged(run: Path) -> dict[str, Any]:
    """Every number of the run's log, by step and name."""
    history = json.loads((run / "training_metrics.json").read_text())["log_history"]
    return {
        f"{name} at step {entry['step']}": value
        for entry in history
        for name, value in entry.items()
        if not any(part in name for part in NOT_COMPARED)
    }


def margins(run: Path) -> dict[str, Any]:
    """The margins of each step in nats, in the order in which the pairs were forwarded; not by their ids, whose making
    may have changed."""
    folder = run / "logs" / "margins"
    return {str(file.relative_to(folder)): np.load(file)["margin"] for file in sorted(folder.rglob("*.npy"))}


def weights(run: Path) -> dict[str, Any]:
    """Every tensor of the model or adapter that the run left."""
    files = run.glob("*.safetensors")
    return {name: tensor for file in sorted(files) for name, tensor in load_file(file).items()}


def equal(ours: Any, theirs: Any) -> bool:
    """Bit for bit; not a number equals itself."""
    if isinstance(ours, torch.Tensor):
        same = ours.dtype == theirs.dtype and ours.shape == theirs.shape
        return same and torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))
    if isinstance(ours, np.ndarray):
        return ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes()
    return repr(ours) == repr(theirs)


def gap(ours: Any, theirs: Any) -> str:
    """How far two values lie apart, in words."""
    if np.shape(ours) != np.shape(theirs):
        return f"{np.shape(ours)} values against {np.shape(theirs)}"
    ours, theirs = (torch.as_tensor(value).double() for value in (ours, theirs))
    apart = (ours - theirs).abs().max().item()
    return f"up to {apart:.3g} apart"


def compare(kind: str, ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """A line on each difference; first, how much was compared."""
    if not ours or not theirs:
        return [f"{kind}: nothing was found"]
    both = [name for name in ours if name in theirs]
    different = [name for name in both if not equal(ours[name], theirs[name])]
    lines = [f"{kind}: {name} {gap(ours[name], theirs[name])}" for name in different[:5]]
    if len(different) > 5:
        lines.append(f"{kind}: and {len(different) - 5} more of {len(both)}")
    if alone := sorted(ours.keys() ^ theirs.keys()):
        lines.append(f"{kind}: in one commit alone: {', '.join(alone[:8])}{' …' * (len(alone) > 8)}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs=2, metavar="COMMIT")
    parser.add_argument("--flags", default="", help="further options of scripts/dpo.py, given to both")
    given = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny.save_model(folder / "model")
        (folder / "data").mkdir()
        tiny.save_pairs(folder / "data" / "train.jsonl", tiny.hh_rows(32))
        tiny.save_pairs(folder / "data" / "test.jsonl", tiny.hh_rows(8, start=32))
        for side, commit in enumerate(given.commits):
            with checked_out(commit, folder / f"tree{side}") as tree:
                for setting, flags in SETTINGS.items():
                    train(tree, [*flags, *shlex.split(given.flags)], folder, folder / f"run{side}" / setting)
        for setting in SETTINGS:
            runs = [folder / f"run{side}" / setting for side in (0, 1)]
            lines, counts = [], []
            for kind, read in (("logged number", logged), ("margins", margins), ("weights", weights)):
                ours, theirs = map(read, runs)
                lines += compare(kind, ours, theirs)
                counts.append(f"{len(ours)} {kind}{'s' * (kind == 'logged number')}")
            print(f"{setting}: {'different' if lines else 'equal bit for bit'} ({', '.join(counts)})")
            print("".join(f"  {line}\n" for line in lines), end="")
            failed |= bool(lines)
    sys.exit(failed)


if __name__ == "__main__":
    main()
