"""Replay the `pip install` steps of a Dockerfile where there is no engine to build it.

    python tests/containers/replay_pip.py Dockerfile.gaudi --python-version 3.12 --torch 2.10.0
    python tests/containers/replay_pip.py Dockerfile --python-version 3.12 --torch 2.13.0

Each step is resolved and downloaded for that Python, as binary packages. An empty wheel stands in for torch: on Gaudi
it is the image's own, on CUDA it and its libraries are gigabytes.
"""

import argparse
import re
import shlex
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def pip_steps(dockerfile: str) -> list[list[str]]:
    """The arguments of each `pip install` in RUN instructions, but for the project itself."""
    joined = re.sub(r"\\\n", " ", dockerfile)
    commands = [
        shlex.split(command)
        for line in joined.splitlines()
        if line.startswith("RUN ")
        for command in line.removeprefix("RUN ").split("&&")
    ]
    steps = [command[command.index("pip") + 2 :] for command in commands if "pip" in command and "install" in command]
    return [[word for word in step if word != "--no-cache-dir"] for step in steps if "-e" not in step]


def stand_in(folder: Path, version: str) -> str:
    """An empty torch in `folder`; the local part of its version keeps pip from taking a real one."""
    version += "+replay"
    info = f"torch-{version}.dist-info"
    with zipfile.ZipFile(folder / f"torch-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return version


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dockerfile", type=Path)
    parser.add_argument("--python-version", required=True)
    parser.add_argument("--torch", required=True, help="version of the image's torch")
    options = parser.parse_args()
    steps = pip_steps(options.dockerfile.read_text())
    if not steps:
        sys.exit(f"{options.dockerfile}: no pip install in it")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "constraints.txt").write_text(f"torch=={stand_in(folder, options.torch)}\n")
        target = ["--python-version", options.python_version, "--only-binary=:all:", "--dest", str(folder / "wheels")]
        found = ["--find-links", str(folder), "--constraint", str(folder / "constraints.txt")]
        for step in steps:
            print("pip install", shlex.join(step), flush=True)
            subprocess.run([sys.executable, "-m", "pip", "download", "-q", *target, *found, *step], check=True)
        print(f"{options.dockerfile}: {len(list((folder / 'wheels').iterdir()))} packages for {options.python_version}")


if __name__ == "__main__":
    main()
