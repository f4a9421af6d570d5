"""`python -m tests.sizes`: how large the code in src and scripts is, and what is larger than the house allows."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LIMITS = {"file": 400, "class": 250, "function": 60, "signature": 7}
UNITS = {"signature": "parameters"}


class Size(NamedTuple):
    """Of a file, class or function the lines; of a signature the parameters, without self, cls and ctx."""

    kind: str
    where: str
    size: int


def sizes(folder: Path) -> Iterator[Size]:
    """The size of everything in the Python files under `folder`."""
    for file in sorted(folder.rglob("*.py")):
        text, path = file.read_text(encoding="utf-8"), file.relative_to(ROOT) if file.is_relative_to(ROOT) else file
        yield Size("file", str(path), len(text.splitlines()))
        for node in ast.walk(ast.parse(text)):
            where = f"{path}:{getattr(node, 'lineno', 0)} {getattr(node, 'name', '')}"
            if isinstance(node, ast.ClassDef):
                yield Size("class", where, _lines(node))
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield Size("function", where, _lines(node))
                yield Size("signature", where, _parameters(node.args))


def _lines(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def _parameters(arguments: ast.arguments) -> int:
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    names = [each.arg for each in named if each is not None]
    return len(names) - (names[:1] in (["self"], ["cls"], ["ctx"]))


def too_large(found: list[Size]) -> list[str]:
    """A line for each size above its limit."""
    return [
        f"{each.where}: a {each.kind} of {each.size} {UNITS.get(each.kind, 'lines')}, of at most {LIMITS[each.kind]}"
        for each in found
        if each.size > LIMITS[each.kind]
    ]


def main() -> int:
    found = [size for folder in ("src", "scripts") for size in sizes(ROOT / folder)]
    for kind, limit in LIMITS.items():
        of_kind = [size for size in found if size.kind == kind]
        largest = max(of_kind, key=lambda size: size.size)
        unit = UNITS.get(kind, "lines")
        print(f"{kind}: {len(of_kind)}, the largest {largest.size} {unit} of at most {limit}: {largest.where}")
    lines = too_large(found)
    print(*lines, sep="\n") if lines else print("nothing is too large")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
