"""What surrounds the training step, row by row: this tree beside another, in one run.

    git worktree add /tmp/before 40aa243
    python bench/table23.py /tmp/before

Both sides of a row run in turns, each in a process of its own with this interpreter and the packages it has. CPU
seconds, the least of the turns; what is imported and set up beforehand is not counted, but for what a command line
costs.
Prints rows for RESULTS.md. Further rows have a bench of their own: uneven processes `balance.py`, preparation and its
memory `scale.py`, decoding `decode.py`.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CLOCK = """
import json, os, resource, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
def cpu():
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)
"""
# The last line of each prints what is measured. `new` is whether it is this tree
ROWS = {
    "reference cache: 300 batches of 8 written, s of wall": """
from tandem.engine.ref_cache import RefCache
import contextlib
cache = RefCache(folder)
with (cache.writer() if new else contextlib.nullcontext(cache.write)) as write:
    began = time.perf_counter()
    for batch in range(300):
        write({(8 * batch + i).to_bytes(16, "big"): (-1.0, -2.0) for i in range(8)})
    print(time.perf_counter() - began)
""",
    "reference cache: keys of 10,000 pairs": """
import numpy as np
from tandem.engine.ref_cache import pair_key
ids = np.random.default_rng(0).integers(0, 49000, 244, np.int32)
lists = ids if new else ids.tolist()
began = cpu()
for number in range(10_000):
    pair_key("0" * 32, [lists, lists[:200]], [44, 30], "float32", None)
print(cpu() - began)
""",
    "margins: a run of 8,000 steps cut back to 4,000": """
import numpy as np
from tandem.monitor.margins import MarginsLog
from tandem.monitor.tail import TailRecord
os.fsync, sync = lambda _: None, os.fsync
log = MarginsLog(folder)
for step in range(1, 8001):
    log.write_step(1, step, ["a", "b"], np.zeros(2, np.float32), TailRecord(beta=0.1, tau=1.0))
log.flush()
os.fsync = sync
began = cpu()
log.truncate_after(4000)
print(cpu() - began)
""",
    "a nucleus of 0.95 drawn from 32 × 49,152 logits, 10 times": """
import torch
from transformers.generation.logits_process import TopPLogitsWarper
torch.set_num_threads(1)
logits, uniform = 5 * torch.randn(32, 49_152), torch.rand(32)  # a nucleus of some hundreds, as models have
if new:
    from tandem.models.draws import pick
began = cpu()
for _ in range(10):
    if new:
        pick(logits, 0.95, uniform)
    else:
        torch.multinomial(TopPLogitsWarper(0.95)(None, logits).softmax(-1), 1)
print(cpu() - began)
""",
    "a mistyped option": """
began = cpu()
import subprocess
script = str(Path(sys.argv[2]) / "scripts" / "dpo.py")
subprocess.run([sys.executable, script, "--learning-rate", "1e-5"], capture_output=True)
print(cpu() - began)
""",
    "a missing data file": """
began = cpu()
import subprocess
script = str(Path(sys.argv[2]) / "scripts" / "dpo.py")
flags = ["--model_name_or_path", str(folder), "--dataset_name", "nope.jsonl", "--output_dir", str(folder / "out")]
subprocess.run([sys.executable, script, *flags], capture_output=True)
print(cpu() - began)
""",
    "import tandem.training": """
began = cpu()
import importlib
importlib.import_module("tandem.training.stages" if new else "tandem.training")
print(cpu() - began)
""",
}


def measured(code: str, tree: Path, new: bool) -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", f"{CLOCK}\nnew = {new}\n{code}", folder, str(tree)]
        environment = os.environ | {"PYTHONPATH": f"{tree / 'src'}:{tree}", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tree)
    if done.returncode:
        sys.exit(f"{tree}: {done.stderr[-1500:]}")
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a tree of an older commit")
    parser.add_argument("--turns", type=int, default=2)
    given = parser.parse_args()
    print("| seconds of CPU unless named | before | now |\n|---|---|---|", flush=True)
    for name, code in ROWS.items():
        turns = [
            [measured(code, tree, new) for tree, new in ((given.before, False), (ROOT, True))]
            for _ in range(given.turns)
        ]
        before, now = (min(each) for each in zip(*turns, strict=True))
        print(f"| {name} | {before:.3g} | **{now:.3g}** |", flush=True)


if __name__ == "__main__":
    main()
