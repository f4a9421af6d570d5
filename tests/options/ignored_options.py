"""Is each proof of `test_option_effects.PROOFS` one? It must fail when the library ignores its option.

    python -m tests.options.ignored_options [--log FILE] [Class.option | Class …]

Every option in turn reads as its default in the library's code, whatever its user gave; what parses, saves and refuses
it still sees the value. A proof that passes all the same proves nothing. All of them take about an hour on one core:
with `--log` a run that was stopped goes on with the options that the file has no line on. The weak ones are named at
the end, and in the exit code.
"""

import argparse
import contextlib
import dataclasses
import importlib
import io
import pkgutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tandem.options.fields import handed_on
from tests.options.test_option_effects import PROOFS

ROOT = Path(__file__).parents[2]
LIBRARY = str(ROOT / "src" / "tandem")
CODE = (LIBRARY, str(ROOT / "scripts"))
CONFIG = tuple(str(ROOT / "src" / "tandem" / "options" / f"{name}.py") for name in ("parsing", "fields", "rules"))
_COMPREHENSIONS = ("<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>")  # functions of their own before Python 3.12
_GONE = object()


class Ignored:
    """A field that keeps its value, and tells it to nobody in the library but to what reads, checks and saves it."""

    def __init__(self, name: str, default: Any) -> None:
        self.name, self.default = name, default

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None or not self._caller_computes():
            return self.default if instance is None else instance.__dict__[self.name]
        return self.default

    def __set__(self, instance: Any, value: Any) -> None:
        instance.__dict__[self.name] = value

    def _caller_computes(self) -> bool:
        frame: Any = sys._getframe(2)
        if not frame.f_code.co_filename.startswith(CODE):
            return False
        while frame.f_code.co_name in _COMPREHENSIONS:
            frame = frame.f_back
        if frame.f_code is handed_on.__code__:  # what TRL gets is used there
            return True
        while frame is not None:
            if frame.f_code.co_filename in CONFIG or frame.f_code.co_name in ("__post_init__", "__init__"):
                return frame.f_code.co_name == "__init__" and frame.f_code.co_filename.startswith(CODE)
            frame = frame.f_back
        return True


@contextlib.contextmanager
def ignored(cls: type, name: str) -> Iterator[None]:
    """While the block runs, the library takes the default of an option of `cls`."""
    field = cls.__dataclass_fields__[name]  # type: ignore[attr-defined]
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    before = cls.__dict__.get(name, _GONE)
    setattr(cls, name, Ignored(name, default))
    try:
        yield
    finally:
        if before is _GONE:
            delattr(cls, name)
        else:
            setattr(cls, name, before)


def option_classes() -> dict[str, type]:
    """The classes of PROOFS by name."""
    found: dict[str, type] = {}
    for module in pkgutil.walk_packages([LIBRARY], "tandem."):
        with contextlib.suppress(ImportError):  # of optimum-habana or vLLM, which are not here
            loaded = importlib.import_module(module.name)
            found |= {name: getattr(loaded, name) for name in PROOFS if hasattr(loaded, name)}
    return found


class Counter:
    """A pytest plugin that counts what passed."""

    passed = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.passed += report.when == "call" and report.passed


def outcome(proof: str) -> str:
    """How a test ends: passed, failed or not run."""
    counter = Counter()
    screen = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,  # a path that is ignored may be the current one
        contextlib.chdir(folder),
        contextlib.redirect_stdout(screen),
        contextlib.redirect_stderr(screen),
    ):
        arguments = ["-c", str(ROOT / "pyproject.toml"), str(ROOT / "tests" / proof), "-q", "-x"]
        arguments += ["-p", "no:cacheprovider", "-m", "slow or not slow"]
        code = pytest.main(arguments, plugins=[counter])
    if code == 0:
        return "passed" if counter.passed else "not run"
    return {1: "failed"}.get(int(code), f"not run (pytest ended with {int(code)})")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="Class.option", help="only these; default: all")
    parser.add_argument("--log", type=Path, help="file of results, read before and added to")
    given = parser.parse_args(argv)
    known = given.log.read_text().splitlines() if given.log and given.log.exists() else []
    done = {line.split()[1].rstrip(":"): line for line in known}
    classes = option_classes()
    for cls, options in PROOFS.items():
        for name, proof in options.items():
            option = f"{cls}.{name}"
            if option in done or (given.names and not {option, cls} & set(given.names)):
                continue
            with ignored(classes[cls], name):
                ended = outcome(proof)
            done[option] = f"{'ok  ' if ended == 'failed' else 'WEAK'} {option}: {ended}: {proof}"
            print(done[option], flush=True)
            if given.log:
                with given.log.open("a") as file:
                    file.write(f"{done[option]}\n")
    weak = [line for line in done.values() if line.startswith("WEAK")]
    print("\n".join([f"of {len(done)} options {len(weak)} may be ignored unnoticed", *weak]))
    return bool(weak)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
