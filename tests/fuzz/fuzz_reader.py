"""Fuzz the reader with Atheris, guided by the branches it takes: `make fuzz`, or with libFuzzer's options

    python tests/fuzz/fuzz_reader.py -max_total_time=600 [FOLDER OF INPUTS]

Anything but a UserError is a crash; the input that made it is left as crash-… in the current folder.
"""

import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[2]))
with atheris.instrument_imports(include=["tandem.data", "tests.fuzz", "json", "csv"]):
    from tests.fuzz import reader


def main() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        inputs = Path(folder) / "inputs"
        inputs.mkdir()
        for number, seed in enumerate(reader.seeds()):
            (inputs / f"seed-{number}").write_bytes(seed)
        limits = ["-max_len=4096", "-timeout=30", "-rss_limit_mb=4096", "-print_final_stats=1"]
        atheris.Setup(
            [sys.argv[0], *limits, *sys.argv[1:], str(inputs)], lambda data: reader.read(data, Path(folder)) and None
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main()
